"""Metrics, prediction and pictures of MG-3D.

    python eval.py --task T --data DIR --checkpoint out/best.pt      the number of a task with its interval; writes result.json
    python eval.py --task T --checkpoint out/best.pt --input SCAN    one scan: a mask, a table of probabilities, a report
    python eval.py probe --data demo --checkpoint out/last.pt        linear probe of a frozen encoder on the 18 findings
    python eval.py embed --checkpoint out/encoder.pt --input DIR     features of scans, one row each
    python eval.py radar A/result.json B/result.json                 methods and tasks in one chart

Volumes come from data.py, networks from model.py. Accuracy, AUC, Dice and recall are shares of 1, BLEU is in percent.
"""
import argparse
import csv
import difflib
import functools
import hashlib
import itertools
import json
import logging
import math
import pickle
import re
import sys
import textwrap
from collections import Counter
from pathlib import Path


def flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", help="one of the nine, a row of TASKS in data.py")
    parser.add_argument("--checkpoint", type=Path, help="best.pt of finetune.py")
    parser.add_argument("--data", help="the task's data in their own layout; with --input: the reports to search")
    parser.add_argument("--split", choices=("train", "valid", "test"), default="test", help="part to report on (default: test)")
    parser.add_argument("--fold", type=int, help="fold of sets that have folds (default: as in training)")
    parser.add_argument("--input", type=Path, help="instead of --data: one scan, any file or folder that data.py reads")
    parser.add_argument("--centre", type=float, nargs=3, metavar=("X", "Y", "Z"), help="mm of the place to look at, for tasks "
                        "of candidates: RAS for NIfTI, LPS for all else, as the file and LUNA16's own CSV have it")
    parser.add_argument("--out", type=Path, help="folder for results (default: eval, beside the checkpoint)")
    parser.add_argument("--cache", default="cache", help="folder of preprocessed volumes (default: cache)")
    commands = parser.add_subparsers(dest="command", metavar="{probe,embed,radar}")
    shown = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--checkpoint", required=True, help="last.pt, encoder.pt or best.pt, or any file that load_weights knows")
    shared.add_argument("--encoder", help="swin_b, swin_l, swin_t or unet; last.pt and best.pt know it by themselves")
    shared.add_argument("--size", type=int, nargs=3, metavar=("D", "H", "W"), help="input size; last.pt knows it by itself")
    shared.add_argument("--hu", choices=["auto", "header", "csv"], help="source of Hounsfield units; last.pt knows it, else auto")
    shared.add_argument("--cache", default="cache", help="folder of preprocessed volumes")
    p = commands.add_parser("probe", parents=[shared], help="linear probe of a frozen encoder on CT-RATE's 18 findings", **shown)
    p.add_argument("--data", required=True, help="demo, a manifest with label columns, or a CT-RATE folder: fitted on train, "
                   "reported on the rest")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--out", default="out/probe", help="folder for probe.json")
    p = commands.add_parser("embed", parents=[shared], help="features of scans: the average of the encoder's last map", **shown)
    p.add_argument("--input", type=Path, required=True, help="a scan, or a folder of scans, however deep")
    p.add_argument("--out", type=Path, default="embeddings.npz", help="file with ids (n,) and features (n, C) float32")
    p = commands.add_parser("radar", help="a table, a row a method, and a chart, an axis a task", **shown)
    p.add_argument("results", type=Path, nargs="+", help="result.json files. The method is their key `method`, else the "
                   "name of their folder, or of the one above where that is named after the task")
    p.add_argument("--out", type=Path, default="radar.png")
    return parser


if __name__ == "__main__":                              # before torch is imported: --help answers at once
    args = flags().parse_args()

import matplotlib
import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import model

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.patches import Patch  # noqa: E402

log = logging.getLogger("mg3d")


# ---------------------------------------------------------------------------------------------------- metrics

def auroc(score, label):
    """Area under the ROC curve: the chance that a positive scores higher than a negative, ties counted half.

    score (n,), label (n,) of 0 and 1 -> float; nan where one class is absent (Mann-Whitney U).
    """
    score, positive = np.asarray(score), np.asarray(label).astype(bool)
    n_pos, n_neg = positive.sum(), (~positive).sum()
    if n_pos == 0 or n_neg == 0:
        return float("nan")
    return float((rankdata(score)[positive].sum() - n_pos * (n_pos + 1) / 2) / (n_pos * n_neg))


def _mean(values):
    return float(values.mean()) if len(values) else math.nan


def macro_auroc(scores, labels):
    """Mean AUROC over the columns of (n, k) that hold both classes; a label of NaN leaves that item out of its column."""
    aucs = np.array([auroc(scores[k, j], labels[k, j]) for j, k in enumerate(~np.isnan(labels).T)])
    return _mean(aucs[~np.isnan(aucs)])


def accuracy(pred, label):
    """Share of items whose predicted class is the true one: class numbers (n,), (n,) -> float"""
    return float((np.asarray(pred) == np.asarray(label)).mean())


def roc(score, label):
    """ROC curve, a point for each distinct score: score (n,), label (n,) of 0 and 1 -> false, true positive rates (m,)"""
    order = np.argsort(-score, kind="stable")
    last = np.r_[np.flatnonzero(np.diff(score[order])), len(score) - 1]             # of each run of ties
    true = np.cumsum(label[order])[last]
    false = last + 1 - true
    return np.r_[0, false / false[-1]], np.r_[0, true / true[-1]]


def dice(pred, truth, num_classes):
    """Dice of every class but 0 between two label maps of one shape -> (num_classes - 1,), nan where the truth has none of
    a class, whatever was predicted: such pairs are left out of means, as in MONAI. ValueError for different shapes."""
    pred, truth = np.asarray(pred), np.asarray(truth)
    if pred.shape != truth.shape:
        raise ValueError(f"found a prediction of shape {pred.shape} and a truth of {truth.shape}, expected the same")
    scores = []
    for k in range(1, num_classes):
        p, t = pred == k, truth == k
        scores.append(2 * (p & t).sum() / (p.sum() + t.sum()) if t.any() else np.nan)
    return np.array(scores, float)


def _bleu_counts(hypothesis, reference):
    """(10,): n-grams of n = 1..4 that match and that there are in the hypothesis, then the words of both."""
    words, truth = hypothesis.split(), reference.split()
    counts = []
    for n in range(1, 5):
        grams, true_grams = (Counter(zip(*(text[i:] for i in range(n)))) for text in (words, truth))
        counts += [(grams & true_grams).total(), grams.total()]
    return np.array([*counts, len(words), len(truth)], float)


def _bleu(counts):
    """Counts (n, 10) of n reports -> [BLEU-1, …, BLEU-4] of the corpus"""
    *counts, words, truth = np.sum(counts, 0)
    if not words:
        return [0.0] * 4
    with np.errstate(divide="ignore"):                  # log 0: no match at all makes BLEU 0
        logs = np.log(np.divide(counts[0::2], np.maximum(counts[1::2], 1)))
    return [float(100 * math.exp(min(0, 1 - truth / words)) * np.exp(logs[:n].mean())) for n in range(1, 5)]


def bleu(hypotheses, references):
    """[BLEU-1, BLEU-2, BLEU-3, BLEU-4] in percent: of the corpus, cumulative, with brevity penalty, without smoothing,
    on words between blanks, one reference each; the COCO caption tool's and sacrebleu's (tokenize and smooth "none").

    hypotheses, references: lists of n str. ValueError where they differ in length.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"found {len(hypotheses)} hypotheses and {len(references)} references, expected one reference each")
    return _bleu([_bleu_counts(*pair) for pair in zip(hypotheses, references)])


def retrieval_ranks(similarity):
    """Similarity (n, n), row i a query whose match is column i -> ranks (n,) from 1. Ties count against the query:
    whoever finds all alike finds nothing. ValueError for what is not finite."""
    similarity = np.asarray(similarity)
    if not np.isfinite(similarity).all():
        raise ValueError(f"found {(~np.isfinite(similarity)).sum()} similarities that are no finite numbers")
    return (similarity >= similarity.diagonal()[:, None]).sum(1)


def recall_at_k(similarity, ks):
    """Share of queries (rows: reports) whose match (column of the same number: volume) is among the first k, for each k"""
    ranks = retrieval_ranks(similarity)
    return [float((ranks <= k).mean()) for k in ks]


def bootstrap(metric, *arrays, times=1000, seed=0):
    """95 % percentile interval of metric(*arrays), items (dim 0) drawn anew `times` times -> (low, high)"""
    rng = np.random.default_rng(seed)
    n = len(arrays[0])
    draws = [metric(*(a[i] for a in arrays)) for i in (rng.integers(0, n, n) for _ in range(times))]
    return tuple(float(q) for q in np.nanpercentile(draws, [2.5, 97.5]))


# ----------------------------------------------------------------------------------------------- linear probe

@torch.no_grad()
def global_features(encoder, items, cache, size, hu="auto", batch_size=8):
    """The average of the encoder's last map for every volume: (n, C) float64 numpy"""
    encoder.eval()
    device = next(encoder.parameters()).device
    rows = []
    for i in tqdm(range(0, len(items), batch_size), desc="features", leave=False, disable=None):
        volumes = torch.stack([data.load_volume(item, cache, size, hu) for item in items[i:i + batch_size]])
        rows.append(encoder(volumes.to(device))[-1].float().mean((2, 3, 4)).cpu())
    return torch.cat(rows).double().numpy()


def ridge(x, y, x_new, penalties=np.logspace(-1, 5, 25)):
    """Ridge regression in closed form, the penalty with the least leave-one-out error: x (n, C), y (n, k) -> (m, k)"""
    mean, std = x.mean(0), x.std(0) + 1e-8
    x, x_new = (x - mean) / std, (x_new - mean) / std
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    y_mean = y.mean(0)
    uty, best = u.T @ (y - y_mean), (np.inf, None)
    for penalty in penalties:
        shrink = s ** 2 / (s ** 2 + penalty)
        leverage = np.einsum("ij,j,ij->i", u, shrink, u) + 1 / len(x)
        residual = (y - y_mean - u @ (shrink[:, None] * uty)) / (1 - leverage)[:, None]      # of the item left out
        best = min(best, (float((residual ** 2).mean()), float(penalty)))
    return x_new @ (vt.T @ ((s / (s ** 2 + best[1]))[:, None] * uty)) + y_mean


def split_labelled(items):
    """Items with all 18 labels -> (those to fit on: split train, those to report on: the others)."""
    labelled = [item for item in items if item.labels is not None and not np.isnan(item.labels).any()]
    fit, held_out = ([i for i in labelled if (i.split == "train") == train] for train in (True, False))
    if not fit or not held_out:
        raise ValueError(f"a probe needs labelled volumes of the split train and of another: found {len(fit)} and {len(held_out)}; "
                         f"a manifest has a column `split` and the columns {', '.join(data.LABELS[:2])}, …")
    return fit, held_out


def probe(encoder, items, cache, size, hu="auto", batch_size=8):
    """Scores of a linear probe: (scores (n, 18), labels (n, 18)) of the held-out items"""
    fit, held_out = split_labelled(items)
    x, x_new = (global_features(encoder, part, cache, size, hu, batch_size) for part in (fit, held_out))
    labels, truth = (np.stack([item.labels for item in part]).astype(float) for part in (fit, held_out))
    return ridge(x, labels, x_new), truth


# ---------------------------------------------------------------------------------------- networks of the tasks

def build_network(config, folder):
    """The network of a fine-tuning run, with weights of its own. folder: where OUT/text_encoder lies, for the demo's texts."""
    task = data.TASKS[config["task"]]
    encoder = model.build_encoder(config["encoder"], use_checkpoint=config["use_checkpoint"])
    if task.kind == "classify":
        return model.Classifier(encoder, len(task.classes))
    if task.kind == "segment":
        return model.SwinUNETR(encoder, 1 + len(task.classes))
    if task.kind == "report":
        return model.ReportGenerator(encoder, len(config["vocabulary"]))
    text = Path(folder, "text_encoder") if config["text_encoder"] == "demo" else config["text_encoder"]
    return model.MG3D(encoder, model.TextEncoder(str(text)), losses=("clip",), embed_dim=config["embed_dim"])


def load_checkpoint(path):
    """best.pt of finetune.py -> (network in eval mode, its Task with the size and spacing of the run, config). ValueError
    for anything else, naming the file."""
    path = Path(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError, FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"{path}: found no file that can be read safely (weights_only), expected best.pt: {error}") from None
    config = checkpoint.get("config", {}) if isinstance(checkpoint, dict) else {}
    if config.get("task") not in data.TASKS:
        raise ValueError(f"{path}: found {'a checkpoint of pre-training' if config else 'weights alone'}, expected best.pt of "
                         f"finetune.py for one of the tasks {', '.join(data.TASKS)}")
    network = build_network(config, path.parent)
    missing, unexpected = network.load_state_dict(checkpoint["model"], strict=False)
    wrong = [key for key in missing if not key.startswith("text_encoder.")] + unexpected
    if wrong:
        raise ValueError(f"{path}: found other weights than its config asks for, among them {wrong[:3]}")
    if checkpoint["merging"]:
        network.encoder.merging = checkpoint["merging"]
    spacing = config["spacing"] and tuple(config["spacing"])
    return network.eval(), data.TASKS[config["task"]]._replace(size=tuple(config["size"]), spacing=spacing), config


@torch.no_grad()
def sliding_window(network, volume, size, overlap, batch_size=2, device="cpu", progress=False):
    """Class probabilities of a volume of any size: volume (1, D, H, W) -> (K, D, H, W) float32 on the CPU.

    Windows of `size` overlap by `overlap` or a little more; their logits are averaged with Gaussian weights (σ = an eighth
    of a side). A smaller volume is padded with 0, as in training, and cut back. `device` holds one batch of
    windows at a time, nothing else.
    """
    shape = volume.shape[1:]
    pad = [max(0, s - n) for s, n in zip(size, shape)]
    volume = F.pad(volume, [side for p in pad[::-1] for side in (p // 2, p - p // 2)])
    starts, weight = [], torch.ones(())
    for n, s in zip(volume.shape[1:], size):
        count = math.ceil((n - s) / max(1, int(s * (1 - overlap)))) + 1
        starts.append(np.linspace(0, n - s, count).round().astype(int).tolist())
        weight = weight[..., None] * torch.exp(-0.5 * ((torch.arange(s) - (s - 1) / 2) / (s / 8)) ** 2)
    weight = weight.clamp(min=1e-3)                                                 # corners seen by one window alone
    windows = [tuple(slice(a, a + s) for a, s in zip(corner, size)) for corner in itertools.product(*starts)]
    total, weights = None, torch.zeros(volume.shape[1:])
    for i in tqdm(range(0, len(windows), batch_size), desc="windows", leave=False, disable=None if progress else True):
        some = windows[i:i + batch_size]
        logits = network(torch.stack([volume[(slice(None), *w)] for w in some]).to(device))
        for window, one in zip(some, logits.cpu().float()):
            if total is None:
                total = torch.zeros(len(one), *volume.shape[1:])
            total[(slice(None), *window)] += weight * one
            weights[window] += weight
    total /= weights
    return total.softmax(0)[(slice(None), *(slice(p // 2, p // 2 + n) for p, n in zip(pad, shape)))]


def _stack_inputs(items, task, cache):
    return torch.stack([data.network_input(item, task, cache) for item in items])


def _batches(items, task, config, cache, device, progress):
    """The network's inputs (B, 1, D, H, W) of items in order, on the device, with a progress bar."""
    loader = DataLoader(items, config["batch_size"], num_workers=config["workers"] if len(items) > 1 else 0,
                        collate_fn=functools.partial(_stack_inputs, task=task, cache=cache),
                        generator=torch.Generator())    # of its own: evaluation leaves the random state of training alone
    for volume in tqdm(loader, desc="evaluate", leave=False, disable=None if progress else True):
        yield volume.to(device, non_blocking=True)


@torch.no_grad()
def image_features(network, items, task, config, cache, device, progress=False):
    """Global volume features of length 1: (n, E) on the CPU"""
    return torch.cat([F.normalize(network.encode_image(volume).mean(1).float(), dim=-1).cpu()
                      for volume in _batches(items, task, config, cache, device, progress)])


def text_batch(tokenizer, texts):
    """Reports or prompts, n str, as `MG3D.encode_text` takes them, in order: three (n, L), sentence_mask (n, S)"""
    reports = [data.tokenize_report(tokenizer, data.split_sentences(text)) for text in texts]
    ids, sentence_ids = ([torch.from_numpy(report[name]) for report in reports] for name in ("input_ids", "sentence_ids"))
    sentences = [torch.ones(len(report["sentences"]), dtype=torch.bool) for report in reports]
    return {"input_ids": pad_sequence(ids, True, tokenizer.pad_token_id),
            "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], True),
            "sentence_ids": pad_sequence(sentence_ids, True, -1), "sentence_mask": pad_sequence(sentences, True)}


@torch.no_grad()
def text_features(network, texts, device, batch_size=32):
    """Global features of length 1 of reports or prompts: list of n str -> (n, E) on the CPU"""
    rows = []
    for i in range(0, len(texts), batch_size):
        batch = text_batch(network.text_encoder.tokenizer, texts[i:i + batch_size])
        rows.append(F.normalize(network.encode_text(*(x.to(device) for x in batch.values())).float(), dim=-1).cpu())
    return torch.cat(rows)


def prompts(classes):
    """The two prompts of every class, in a row: [name 0, not name 0, name 1, …]"""
    return [prompt for name in classes for prompt in (f"{name}.", f"not {name}.")]


@torch.no_grad()
def probabilities(network, items, task, config, cache, device, progress=False):
    """Probability of every class for every item: (n, K) float32 numpy. For kinds classify and prompt."""
    if task.kind == "prompt":
        texts = text_features(network, prompts(task.classes), device)                           # (2K, E)
        similarity = image_features(network, items, task, config, cache, device, progress) @ texts.T    # (n, 2K)
        pairs = similarity.unflatten(1, (-1, 2)) / config["temperature"]
        return pairs.softmax(-1)[..., 0].numpy()
    logits = torch.cat([network(volume).float().cpu() for volume in _batches(items, task, config, cache, device, progress)])
    return (logits.softmax(1) if task.exclusive else logits.sigmoid()).numpy()


@torch.no_grad()
def segment(network, item, task, cache, device, progress=False):
    """Label map of one scan in its own stored grid and orientation: uint8 (x, y, z), affine 4×4"""
    volume, _, _ = data.prepare(item, task, cache)
    volume = torch.from_numpy(np.array(volume, dtype=np.float32))[None]
    return data.to_own_grid(sliding_window(network, volume, task.size, task.overlap, device=device, progress=progress), item)


@torch.no_grad()
def generate_reports(network, items, task, config, cache, device, progress=False):
    """A report of each item's scan: list of str, words between blanks"""
    return [" ".join(config["vocabulary"][token] for token in tokens)
            for volume in _batches(items, task, config, cache, device, progress) for tokens in network.generate(volume)]


# ------------------------------------------------------------------------------------------- the nine evaluations

def evaluate(network, items, task, config, cache, device, out=None, progress=True, train_items=()):
    """The number of a task on `items`, as a dict: task, metric, value, its 95 % bootstrap interval, n, chance, protocol, split,
    ids_sha1, per_class {name: value}, and more of its kind.

    With `out`: predictions and pictures go to that folder. train_items: what the constant report to compare with is taken from.
    """
    network.to(device).eval()
    if out:
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
    of_kind = {"classify": _evaluate_classes, "prompt": _evaluate_classes, "segment": _evaluate_masks,
               "report": _evaluate_reports, "retrieve": _evaluate_retrieval}[task.kind]
    found = of_kind(network, items, task, config, cache, device, out, progress, train_items)
    head = {"task": config["task"], "metric": task.metric, "value": found["value"], "interval": found["interval"],
            "n": len(items), "chance": found["chance"], "split": "+".join(sorted({item.split for item in items})),
            "ids_sha1": _hash(items), "per_class": found["per_class"], "positives": {}, "protocol": found["protocol"]}
    return head | found


def _hash(items):
    return hashlib.sha1("\n".join(sorted(item.id for item in items)).encode()).hexdigest()


def _write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


def _evaluate_classes(network, items, task, config, cache, device, out, progress, _):
    scores = probabilities(network, items, task, config, cache, device, progress)
    truth = np.stack([item.labels for item in items]).astype(float)                 # (n, K), NaN = unknown
    known = ~np.isnan(truth)
    aucs = {name: auroc(s[k], t[k]) for name, s, t, k in zip(task.classes, scores.T, truth.T, known.T)}
    result = {"chance": 0.5, "per_class": aucs, "positives": {name: int(np.nansum(t)) for name, t in zip(task.classes, truth.T)}}
    if task.exclusive:
        pred, label = scores.argmax(1), truth.argmax(1)
        found = {name: accuracy(pred[label == k], k) if (label == k).any() else math.nan for k, name in enumerate(task.classes)}
        result |= dict(value=accuracy(pred, label), interval=bootstrap(accuracy, pred, label), per_class=found, auc=aucs,
                       chance=float(np.bincount(label).max() / len(label)), protocol="all items; chance: the commonest class")
    elif task.kind == "prompt":
        result |= dict(value=macro_auroc(scores, truth), interval=bootstrap(macro_auroc, scores, truth),
                       protocol=f"all items, mean of {len(task.classes)}, '{{name}}.' against 'not {{name}}.'")
    else:
        # The last class, among those who have the classes before it: severe among COVID-19-positive, as the STOIC challenge asks.
        among = (truth[:, :-1] == 1).all(1) & known[:, -1]
        s, t = scores[among, -1], truth[among, -1]
        result |= dict(value=auroc(s, t), interval=bootstrap(auroc, s, t), n=len(t),
                       protocol=f"{task.classes[-1]} among " + (" and ".join(task.classes[:-1]) or "all items"))
        if len(task.classes) > 1:
            result |= dict(auc_all_items=aucs[task.classes[-1]], n_all_items=len(items))
    if out:
        rows = ([item.id, *s, *t] for item, s, t in zip(items, scores.tolist(), truth.tolist()))
        _write_csv(out / "predictions.csv", [["id", *task.classes, *(f"true {name}" for name in task.classes)], *rows])
        plot_roc(scores, truth, task.classes, out / "roc.png")
    return result


def _save_mask(path, labels, affine):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels, affine), path)


def _file_name(item):
    return re.sub(r"[^A-Za-z0-9_.-]", "_", re.sub(r"\.(nii|nii\.gz|mha|mhd|nrrd|npz)$", "", item.id))


def _evaluate_masks(network, items, task, config, cache, device, out, progress, _):
    K = 1 + len(task.classes)
    scores, constant, false_alarms, examples = [], [], 0, []
    for item in tqdm(items, desc="evaluate", unit="scan", leave=False, disable=None if progress else True):
        labels, affine = segment(network, item, task, cache, device)
        pred = nib.apply_orientation(labels, nib.io_orientation(affine)).T          # (z, y, x), RAS
        truth = data.to_ras(item.mask, *data.read_stored(item.mask), is_mask=True)[0]
        scores.append(dice(pred, truth, K))
        volumes = np.array([(truth == k).sum() for k in range(1, K)])
        constant.append(np.where(volumes > 0, 2 * volumes / (volumes + truth.size), np.nan))     # all voxels are of class k
        false_alarms += sum((pred == k).any() for k in range(1, K) if not volumes[k - 1])
        if out:
            _save_mask(out / "masks" / f"{_file_name(item)}.nii.gz", labels, affine)
            if len(examples) < 4 and truth.any():
                z = (truth > 0).sum((1, 2)).argmax()
                image, spacing, _ = data.read_volume(item.volume)
                if task.window:
                    image, _ = data.to_hounsfield(image, item.volume, "auto", item.rescale)
                low, high = task.window or np.percentile(image[z], (1, 99))
                examples.append((item.id, (image[z] - low) / (high - low), pred[z], truth[z], np.nanmean(scores[-1]),
                                 spacing[1] / spacing[2]))
    scores, constant = np.array(scores), np.array(constant)                         # (n, K - 1)
    counted = ~np.isnan(scores).all(1)
    cases = np.nanmean(scores[counted], 1)                                          # classes first, then scans, as MONAI does
    if out:
        _write_csv(out / "dice.csv", [["id", *task.classes], *([item.id, *row] for item, row in zip(items, scores.tolist()))])
        if examples:
            plot_overlay(examples, out / "overlay.png")
    known = {name: column[~np.isnan(column)] for name, column in zip(task.classes, scores.T)}
    return dict(value=_mean(cases), interval=bootstrap(np.mean, cases) if len(cases) else (math.nan,) * 2, n=len(cases),
                chance=_mean(np.nanmean(constant[counted], 1)), per_class={name: _mean(column) for name, column in known.items()},
                protocol="mean over scans in their own grid, scans and classes without truth left out; chance: all voxels marked",
                positives={name: len(column) for name, column in known.items()}, chance_of_an_empty_mask=0.0,
                without_truth=int(np.isnan(scores).sum()), marked_without_truth=int(false_alarms))


def _evaluate_reports(network, items, task, config, cache, device, out, progress, train_items):
    reports = generate_reports(network, items, task, config, cache, device, progress)
    truth = [" ".join(data.report_words(item.report)) for item in items]
    # The released protocol cuts references to 150 words and replaces words that the network cannot say, which flatters.
    words = set(config["vocabulary"])
    released = [" ".join(word if word in words else "<unk>" for word in text.split()[:150]) for text in truth]
    counts = np.stack([_bleu_counts(*pair) for pair in zip(reports, truth)])
    # To compare with: of up to 100 reports the one that fits up to 200 best, all of the training part where it is given.
    rng = np.random.default_rng(0)
    pool = [" ".join(data.report_words(item.report)) for item in train_items] or truth
    some, others = ([pool[i] for i in rng.permutation(len(pool))[:n]] for n in (100, 200))
    best = max(sorted(set(some)), key=lambda one: bleu([one] * len(others), others)[3])
    constant, scores = bleu([best] * len(truth), truth), _bleu(counts)
    if out:
        rows = [dict(id=item.id, generated=report, truth=text) for item, report, text in zip(items, reports, truth)]
        (out / "reports.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
        plot_reports([(row["id"], row["generated"], row["truth"]) for row in rows[:3]], out / "reports.png")
    return dict(value=scores[3], interval=bootstrap(lambda c: _bleu(c)[3], counts), chance=constant[3],
                protocol=f"whole references; chance: a constant report of the {'training' if train_items else 'same'} part",
                per_class={f"BLEU-{n}": score for n, score in enumerate(scores, 1)}, bleu_released=bleu(reports, released),
                bleu_constant=constant, distinct_reports=len(set(reports)) / len(reports),
                distinct_true_reports=len(set(truth)) / len(truth))


def _evaluate_retrieval(network, items, task, config, cache, device, out, progress, _):
    ks = (5, 10, 50, 100)
    volumes = image_features(network, items, task, config, cache, device, progress)
    similarity = (text_features(network, [item.report for item in items], device) @ volumes.T).numpy()  # rows: reports
    first = {}                                          # train_1_a_2 is the second reconstruction of the scan train_1_a
    for i in sorted(range(len(items)), key=lambda i: items[i].id):
        first.setdefault(re.sub(r"(?<=_[a-z])_\d+$", "", items[i].id), i)
    scans, ranks, protocols = sorted(first.values()), retrieval_ranks(similarity), {}
    for name, some in (("volumes", range(len(items))), ("scans", scans)):
        own = retrieval_ranks(similarity[np.ix_(some, some)])
        protocols[name] = {"n": len(some), "ids_sha1": _hash([items[i] for i in some]), "median_rank": float(np.median(own)),
                           **{f"Recall@{k}": float((own <= k).mean()) for k in ks},
                           **{f"chance of Recall@{k}": min(1.0, k / len(some)) for k in ks}}
    if out:
        best = (-similarity).argsort(1, kind="stable")[:, :5]
        rows = ([item.id, rank, *(items[j].id for j in row)] for item, rank, row in zip(items, ranks, best))
        _write_csv(out / "ranks.csv", [["id", "rank", *(f"volume {k + 1}" for k in range(best.shape[1]))], *rows])
        nearest = (-similarity).argsort(0, kind="stable")[:3].T                     # reports of each volume
        plot_retrieval([(items[i].id, data.network_input(items[i], task, cache), [(j == i, items[j].report) for j in nearest[i]],
                         items[i].report) for i in scans[:3]], out / "retrieval.png")
    # Recall@50 of 60 volumes says little: of fewer than 500 the K that is at most a tenth, 5 at least.
    k = max([5] + [k for k in ks[1:] if k <= len(items) / 10 and k <= int(task.metric.split("@")[1])])
    return dict(metric=f"Recall@{k}", value=float((ranks <= k).mean()), interval=bootstrap(lambda r: (r <= k).mean(), ranks),
                chance=min(1.0, k / len(items)), per_class={f"Recall@{k}": protocols["volumes"][f"Recall@{k}"] for k in ks},
                protocols=protocols, protocol="volumes: a report finds its own among all volumes; ties count against it")


# --------------------------------------------------------------------------------------------------- pictures

def read_log(path):
    """log.jsonl -> list of dicts; a last line that was cut off is left out"""
    text = Path(path).read_text()
    return [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]


def plot_curves(log_path, out):
    """One panel a loss, one for their weighted sum, one for validation, over steps; the line is a running mean."""
    rows = read_log(log_path)
    names = [name for name in ("loss", *model.LOSSES, "valid") if any(name in row for row in rows)]
    fig, axes = plt.subplots(1, len(names), figsize=(2.6 * len(names), 2.4), squeeze=False)
    for ax, name in zip(axes[0], names):
        steps, values = np.array([(row["step"], row[name]) for row in rows if name in row], float).T     # None: NaN, a gap
        width = max(1, len(values) // 10)
        kernel = np.ones(width) / width
        ax.plot(steps, values, color="0.8", lw=0.8)
        ax.plot(steps[width - 1:], np.convolve(values, kernel, "valid"), lw=1.5, marker="o" if len(values) == 1 else "")
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("step", fontsize=8)
        ax.tick_params(labelsize=7)
    fig.tight_layout()
    fig.savefig(out, dpi=120)
    plt.close(fig)


def _coronal(volume):
    """(1, D, H, W) -> the middle coronal slice (D, W), head up, the patient's right on the left, as radiologists look"""
    return volume[0, :, volume.shape[2] // 2].flip(0, 1).float().cpu().numpy()


@torch.no_grad()
def plot_reconstruction(network, batch, out):
    """The middle coronal slice of a few volumes: as it is, masked, and as MIM rebuilds the masked part."""
    recon = network(batch)["recon"].float()
    volume, mask = batch["volume"], batch["volume_mask"]
    rows = min(3, len(volume))
    fig, axes = plt.subplots(rows, 3, figsize=(7.5, 2.5 * rows), squeeze=False)
    for i in range(rows):
        pictures = volume[i], volume[i].masked_fill(mask[i], 0), torch.where(mask[i], recon[i].clamp(0, 1), volume[i])
        for ax, picture, title in zip(axes[i], pictures, ("volume", "masked", "reconstructed")):
            ax.imshow(_coronal(picture), cmap="gray", vmin=0, vmax=1)
            ax.set_title(title if i == 0 else "", fontsize=10)
            ax.axis("off")
    fig.tight_layout()
    fig.savefig(out, dpi=120)
    plt.close(fig)


@torch.no_grad()
def plot_attention(network, batch, out, sentences):
    """Where the first sentences of the first report look: the attention of Eq. (11) over the volume, mean of heads."""
    attention = network.sentence_attention
    count = min(4, len(sentences), int(batch["sentence_mask"][0].sum()))
    alone = network.text_encoder.encode_sentences(batch["single_ids"][:count], batch["single_mask"][:count])[None]     # (1, S, E_t)
    tokens = network.encode_image(batch["volume"][:1])                              # (1, N, E)
    q, k = (model._heads(x, attention.num_heads) for x in (attention.query(alone), attention.key(tokens)))
    maps = (q @ k.mT * q.shape[-1] ** -0.5).float().softmax(-1).mean(1)             # (1, S, N)
    size = batch["volume"].shape[2:]
    maps = maps.unflatten(-1, [side // network.encoder.stride for side in size])    # (1, S, d, h, w)
    maps = F.interpolate(maps, size=size, mode="trilinear")[0]                      # (S, D, H, W)
    fig, axes = plt.subplots(1, count, figsize=(3.2 * count, 3.4), squeeze=False)
    for ax, heat, sentence in zip(axes[0], maps, sentences):
        ax.imshow(_coronal(batch["volume"][0]), cmap="gray", vmin=0, vmax=1)
        ax.imshow(_coronal(heat[None]), cmap="inferno", alpha=0.45)
        ax.set_title(sentence if len(sentence) < 45 else sentence[:42] + "…", fontsize=7)
        ax.axis("off")
    fig.tight_layout()
    fig.savefig(out, dpi=120)
    plt.close(fig)


def plot_roc(scores, truth, classes, out):
    """One ROC curve a class that has both kinds: scores (n, K), truth (n, K) of 0, 1 and NaN = unknown"""
    fig, ax = plt.subplots(figsize=(4.2 + 2.6 * (len(classes) > 4), 4.2))
    ax.plot([0, 1], [0, 1], color="0.8", lw=1)
    colours = plt.get_cmap("tab20" if len(classes) > 10 else "tab10").colors
    for k, (name, colour) in enumerate(zip(classes, colours)):
        known = ~np.isnan(truth[:, k])
        s, t = scores[known, k], truth[known, k]
        if 0 < t.sum() < len(t):
            ax.plot(*roc(s, t), lw=1.5, color=colour, label=f"{name} {auroc(s, t):.3f}")
    ax.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.005), aspect="equal")
    if len(ax.lines) > 1:
        ax.legend(fontsize=7, frameon=False, title="AUC", title_fontsize=7,
                  **(dict(loc="upper left", bbox_to_anchor=(1.01, 1)) if len(classes) > 4 else dict(loc="lower right")))
    fig.savefig(out, dpi=120, bbox_inches="tight")
    plt.close(fig)


def plot_overlay(examples, out):
    """A scan and, beside it, what was marked: correct green, wrong red, missing yellow (Fig. 7 of the paper).

    examples: (title, image in [0, 1], pred, truth, Dice, height of a pixel in widths), slices (y, x) in RAS.
    """
    colours = {"correct": (0.1, 0.8, 0.2), "wrong": (0.95, 0.15, 0.1), "missing": (1, 0.85, 0)}
    fig, axes = plt.subplots(2, len(examples), figsize=(2.8 * len(examples), 6), squeeze=False, layout="constrained")
    for (top, bottom), (title, image, pred, truth, score, aspect) in zip(axes.T, examples):
        rgb = np.repeat(np.clip(image, 0, 1)[..., None], 3, -1)
        places = (pred == truth) & (truth > 0), (pred != truth) & (pred > 0), (pred == 0) & (truth > 0)
        for where, colour in zip(places, colours.values()):
            rgb[where] = 0.25 * rgb[where] + 0.75 * np.array(colour)
        for ax, picture in ((top, image), (bottom, rgb)):
            ax.imshow(picture[:, ::-1], cmap="gray", vmin=0, vmax=1, origin="lower", aspect=aspect, interpolation="nearest")
            ax.axis("off")
        top.set_title(title[-32:], fontsize=8)
        bottom.set_title(f"Dice {score:.3f}", fontsize=8)
    patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
    fig.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False, fontsize=8, handlelength=1, columnspacing=1)
    fig.savefig(out, dpi=120)
    plt.close(fig)


def plot_reports(examples, out, width=62):
    """Generated beside true reports; words that match in order are green. examples: (id, generated, truth)"""
    texts, row = [], 0                                                              # (column, row, text, colour, weight)
    for name, generated, truth in examples:
        texts += [(0, row, name, "black", "bold"), (0, row + 1, "generated", "0.5", "normal"),
                  (width + 3, row + 1, "true", "0.5", "normal")]
        pair, end = (generated.split(), truth.split()), 0
        blocks = difflib.SequenceMatcher(None, *pair, autojunk=False).get_matching_blocks()
        for side, words in enumerate(pair):
            hit = {i for block in blocks for i in range(block[side], block[side] + block.size)}
            column, line = 0, row + 2
            for i, word in enumerate(words):
                if column and column + len(word) > width:
                    column, line = 0, line + 1
                texts.append((column + side * (width + 3), line, word, "#0a7d28" if i in hit else "0.35", "normal"))
                column += len(word) + 1
            end = max(end, line)
        row = end + 2
    columns = 2 * width + 5
    fig = plt.figure(figsize=(columns * 7 * 0.602 / 72, (row + 1) * 0.14))          # a letter is 0.602 of the font's size wide
    ax = fig.add_axes((0, 0, 1, 1), xlim=(-1, columns - 1), ylim=(row, -1))
    ax.axis("off")
    for x, y, text, colour, weight in texts:
        ax.text(x, y, text, color=colour, weight=weight, family="DejaVu Sans Mono", fontsize=7, va="center", parse_math=False)
    fig.savefig(out, dpi=140)
    plt.close(fig)


def plot_retrieval(examples, out):
    """The middle slice of a volume, its own report and the reports nearest to it; its own among these is green.

    examples: (id, volume (1, D, H, W), [(is its own, report), …], own report)
    """
    fig, axes = plt.subplots(len(examples), 2, figsize=(11, 3.6 * len(examples)), squeeze=False, width_ratios=(1, 2.6))
    for (left, right), (name, volume, nearest, own) in zip(axes, examples):
        left.imshow(_coronal(volume), cmap="gray", vmin=0, vmax=1)
        left.set_title(name, fontsize=8)
        left.axis("off")
        left.set_anchor("N")
        right.axis("off")
        y = 1.0
        for head, text, colour in [("its own", own, "0.35"), *((f"nearest {k + 1}", text, "#0a7d28" if same else "#b03020")
                                                               for k, (same, text) in enumerate(nearest))]:
            lines = textwrap.wrap(text, 125)
            lines = lines[:4] + ["…"] * (len(lines) > 4)
            right.text(0, y, head, transform=right.transAxes, fontsize=7, weight="bold", va="top")
            right.text(0.11, y, "\n".join(lines), transform=right.transAxes, fontsize=7, color=colour, va="top", parse_math=False)
            y -= 0.048 * max(1, len(lines)) + 0.03
    fig.tight_layout()
    fig.savefig(out, dpi=120)
    plt.close(fig)


def plot_radar(results, out):
    """One axis a task from chance (the centre) to the best value (the rim), one line a method (Fig. 8 of the paper).

    results: {method: {task: result of `evaluate`}}; a method without a task has a gap there.
    """
    tasks = [task for task in data.TASKS if any(task in of for of in results.values())]
    of_task = {task: [of[task] for of in results.values() if task in of] for task in tasks}
    chance = {task: found[0]["chance"] for task, found in of_task.items()}
    best = {task: max(one["value"] for one in found) for task, found in of_task.items()}
    angles = np.linspace(0, 2 * np.pi, len(tasks), endpoint=False)
    fig, ax = plt.subplots(figsize=(6.4, 5.6), subplot_kw={"projection": "polar"})
    ax.set_theta_zero_location("N")
    ax.set_theta_direction(-1)
    for method, of in results.items():
        radii = [(of[t]["value"] - chance[t]) / max(best[t] - chance[t], 1e-9) if t in of else np.nan for t in tasks]
        ax.plot([*angles, 2 * np.pi], np.clip([*radii, radii[0]], 0, 1), marker="o", ms=3, lw=1.5, label=method)
    ax.set_xticks(angles, [f"{t}\n{of_task[t][0]['metric']} {chance[t]:.3g} … {best[t]:.3g}" for t in tasks], fontsize=8)
    for label, side in zip(ax.get_xticklabels(), np.sin(angles).round(3)):
        label.set_horizontalalignment("center" if side == 0 else "left" if side > 0 else "right")
    ax.set_yticks([0.25, 0.5, 0.75, 1], [])
    ax.set_ylim(0, 1)
    ax.legend(loc="upper left", bbox_to_anchor=(1.15, 1.1), fontsize=8, frameon=False)
    fig.savefig(out, dpi=120, bbox_inches="tight")
    plt.close(fig)


# --------------------------------------------------------------------------------------------------- commands

def load_encoder(checkpoint, name=None):
    """An encoder with the weights of a file -> (encoder, config of the run or {}). `name` where the file does not know."""
    try:
        config = torch.load(checkpoint, map_location="cpu", weights_only=True).get("config", {})
    except Exception:                                   # load_weights says better what is wrong with the file
        config = {}
    name = name or config.get("encoder")
    if name is None:
        raise ValueError(f"{checkpoint} does not say which encoder it holds: give --encoder {'|'.join(model.ENCODERS)}")
    encoder = model.build_encoder(name)
    model.load_weights(encoder, checkpoint)
    return encoder, config


def probe_command(args):
    encoder, config = load_encoder(args.checkpoint, args.encoder)
    size = tuple(args.size or config.get("size") or data.SIZE)
    hu = args.hu or config.get("hu", "auto")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scores, truth = probe(encoder.to(device), data.load_items(args.data, args.cache), args.cache, size, hu, args.batch_size)
    low, high = bootstrap(macro_auroc, scores, truth)
    result = {"macro_auc": macro_auroc(scores, truth), "interval": [low, high], "n": len(truth), "chance": 0.5,
              "auc": {name: auroc(s, t) for name, s, t in zip(data.LABELS, scores.T, truth.T)}}
    print(f"{'finding':40s} positives   AUC")
    for name, t in zip(data.LABELS, truth.T):
        print(f"{name:40s} {int(t.sum()):9d}  {result['auc'][name]:.3f}")
    print(f"macro AUC of 18 findings {result['macro_auc']:.3f} [{low:.3f}, {high:.3f}], n = {len(truth)}, chance 0.500")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "probe.json").write_text(json.dumps(result, indent=1))


def embed_command(args):
    """Features of every scan of a folder; a scan that cannot be read is named and left out."""
    encoder, config = load_encoder(args.checkpoint, args.encoder)
    whole = "task" not in config or data.TASKS[config["task"]].view == "whole"      # a run on patches knows no size for this
    size, hu = tuple(args.size or whole and config.get("size") or data.SIZE), args.hu or config.get("hu", "auto")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder.to(device).eval()
    folder = args.input if args.input.is_dir() else args.input.parent
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix not in (".csv", ".json", ".txt")]
    known = [file for file in files if file.name.lower().endswith((".nii", ".nii.gz", ".mha", ".mhd", ".nrrd", ".npz"))]
    scans = sorted(known or {file.parent for file in files}) if args.input.is_dir() else [args.input]   # or DICOM, pictures
    ids, rows, failed = [], [], []
    for scan in tqdm(scans, desc="embed", unit="scan", disable=None):
        name = scan.relative_to(folder).as_posix()
        try:
            volume = data.load_volume(data.Item(name, scan, "", None, name, None, None), args.cache, size, hu)
        except ValueError as error:
            failed.append(str(error))
            continue
        with torch.no_grad():
            rows.append(encoder(volume[None].to(device))[-1].float().mean((2, 3, 4))[0].cpu().numpy())
        ids.append(name)
    for failure in failed:
        log.warning("left out %s", failure)
    if not rows:
        raise ValueError(f"{args.input}: found no scan that can be read, expected a scan or a folder of scans")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "wb") as file:                  # given a name, numpy would add .npz to it
        np.savez(file, ids=np.array(ids), features=np.stack(rows))
    print(f"wrote {args.out}: features ({len(rows)}, {len(rows[0])}); {len(failed)} scans left out")


def comparison_table(results):
    """{method: {task: result}} -> Markdown as the paper's tables are: a row a method, mean±std of the repeats in percent"""
    def cell(task, result):
        scale = 1 if data.TASKS[task].kind == "report" else 100                     # BLEU comes in percent
        return f"{result['value'] * scale:.2f}" + (f"±{result['std'] * scale:.2f}" if "std" in result else "")
    metrics = {task: result["metric"] for of in results.values() for task, result in of.items()}
    tasks = [task for task in data.TASKS if task in metrics]
    rows = [["method", *(f"{task} {metrics[task]}" for task in tasks)], ["---"] * (1 + len(tasks))]
    rows += [[method, *(cell(task, of[task]) if task in of else "" for task in tasks)] for method, of in results.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def radar_command(args):
    results = {}
    for path in args.results:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            task, _ = result["task"], float(result["value"]) + float(result["chance"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: found {error!r}, expected a result.json with task, metric, value and chance") from None
        folder = path.resolve().parent
        method = result.get("method") or (folder.parent if folder.name == task else folder).name
        if task not in data.TASKS or task in results.setdefault(method, {}):
            raise ValueError(f"{path}: found the task {task} of the method {method}, expected each of {', '.join(data.TASKS)} "
                             "at most once for a method")
        results[method][task] = result
    print(comparison_table(results))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot_radar(results, args.out)
    print(f"wrote {args.out}: {len(results)} methods")


def predict(network, item, task, config, cache, device, out, index=()):
    """One scan: writes a mask, probabilities, a report or the nearest reports of `index` (items) to `out` and prints them."""
    if task.kind == "segment":
        labels, affine = segment(network, item, task, cache, device, progress=True)
        path, voxel = out / f"{_file_name(item)}_mask.nii.gz", abs(np.linalg.det(affine[:3, :3])) / 1000
        _save_mask(path, labels, affine)
        for k, name in enumerate(task.classes, 1):
            print(f"{name:40s} {(labels == k).sum() * voxel:10.2f} ml")
    elif task.kind in ("classify", "prompt"):
        found = probabilities(network, [item], task, config, cache, device)[0].tolist()
        path = out / "probabilities.csv"
        _write_csv(path, [("class", "probability"), *zip(task.classes, found)])
        for name, probability in zip(task.classes, found):
            print(f"{name:40s} {probability:.3f}")
    elif task.kind == "report":
        report, path = generate_reports(network, [item], task, config, cache, device)[0], out / "report.txt"
        path.write_text(report + "\n", encoding="utf-8")
        print(report)
    else:
        ids = {other.report: other.id for other in index}                           # two reconstructions, one report
        feature = image_features(network, [item], task, config, cache, device)[0]
        found = zip((text_features(network, list(ids), device) @ feature).tolist(), ids.items())
        rows = [(k, name, score, report) for k, (score, (report, name)) in enumerate(sorted(found, reverse=True)[:10], 1)]
        path = out / "retrieved.csv"
        _write_csv(path, [("rank", "id", "similarity", "report"), *rows])
        for rank, name, score, report in rows[:5]:
            print(f"{rank:3d}  {score:.3f}  {name}  {textwrap.shorten(report, 160)}")
    print(f"wrote {path}")


def write_result(result, path):
    """A result as JSON, which has no NaN: null"""
    result = json.loads(json.dumps(result), parse_constant=lambda name: None)
    Path(path).write_text(json.dumps(result, indent=1, ensure_ascii=False), encoding="utf-8")


def summary(result):
    """The number of a task in one line"""
    low, high = result["interval"]
    return (f"{result['task']}: {result['metric']} {result['value']:.3f} [{low:.3f}, {high:.3f}], n = {result['n']} "
            f"({result['split']}), chance {result['chance']:.3f}")


def print_result(result):
    """The per-class table, what more there is, and the number."""
    positives = result["positives"]
    print(f"{'':40s} {'positives' if positives else '':>9s} {result['metric'] if positives else '':>9s}")
    for name, value in result["per_class"].items():
        print(f"{name:40s} {positives.get(name, ''):>9} {value:9.3f}")
    for name in [*result][[*result].index("protocol") + 1:]:                        # what its kind adds
        for part, value in result[name].items() if isinstance(result[name], dict) else [("", result[name])]:
            rounded = json.loads(json.dumps(value), parse_float=lambda number: round(float(number), 3))
            print(f"{name} {part}".replace("_", " ").strip() + f": {json.dumps(rounded, ensure_ascii=False)}")
    print(f"{result['protocol']}; ids {result['ids_sha1'][:10]}\n{summary(result)}")


def task_command(args):
    if args.task not in data.TASKS:
        raise ValueError(f"found --task {args.task}, expected one of {', '.join(data.TASKS)}, or a command: probe, embed, radar")
    if not args.checkpoint or not (args.data or args.input):
        raise ValueError("expected --checkpoint, and --data or --input")
    network, task, config = load_checkpoint(args.checkpoint)
    if config["task"] != args.task:
        raise ValueError(f"{args.checkpoint}: found a checkpoint of the task {config['task']}, expected one of {args.task}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = args.out or args.checkpoint.parent / "eval"
    items, part = [], []
    if args.data:
        items = data.load_task(args.task, Path(args.data), config["fold"] if args.fold is None else args.fold, config["seed"])
        part = [item for item in items if item.split == args.split]
    if args.input:
        by_place = task.view == "cube"
        if (args.centre is not None) != by_place:
            raise ValueError(f"--task {args.task}: expected {'--centre X Y Z' if by_place else 'no --centre'}")
        if task.kind == "retrieve" and not part:
            raise ValueError(f"--task {args.task}: expected --data, whose reports are those to search")
        item = data.Item(args.input.name, args.input, report="", split=None, patient=args.input.name, labels=None, rescale=None)
        if by_place:
            x, y, z = args.centre
            item = item._replace(centre=(x, y, z) if ".nii" in args.input.name.lower() else (-x, -y, z))
        out.mkdir(parents=True, exist_ok=True)
        predict(network.to(device), item, task, config, args.cache, device, out, part)
        return
    if not part:
        raise ValueError(f"{args.data}: found nothing for the part {args.split}, expected another --split")
    seen = {item.patient for item in part}.intersection(config["patients"]) if args.split == "test" else ()
    if seen:
        log.warning("%s: %d patients of the test part, %s among them, are those %s was trained on: the set or its split differs "
                    "from that of the training", args.data, len(seen), min(seen), args.checkpoint)
    part = data.prepare_all(part, task, args.cache, max(1, config["workers"]))  # names what cannot be read
    train_items = [item for item in items if item.split == "train"]
    result = evaluate(network, part, task, config, args.cache, device, out, train_items=train_items)
    result["patients_seen_in_training"] = len(seen)
    print_result(result)
    write_result(result, out / "result.json")
    print(f"wrote {out / 'result.json'}")


COMMANDS = {None: task_command, "probe": probe_command, "embed": embed_command, "radar": radar_command}

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        COMMANDS[args.command](args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
