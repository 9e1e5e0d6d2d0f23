"""Metrics, prediction and pictures of MG-3D.

    python eval.py --task T --data DIR --checkpoint out/best.pt    a task's number with its interval
    python eval.py --task T --checkpoint out/best.pt --input SCAN  mask, probabilities or report of a scan
    python eval.py zeroshot --data demo --checkpoint out/last.pt   findings told by what a text says
    python eval.py retrieval --data demo --checkpoint out/last.pt  volumes found by reports and back
    python eval.py probe --data demo --checkpoint out/last.pt      a linear probe of the 18 findings
    python eval.py pairing --data demo --checkpoint out/last.pt    which losses use the right report
    python eval.py embed --checkpoint out/encoder.pt --input DIR   features of scans, one row each
    python eval.py export --checkpoint out/best.pt --out MODEL.pt2 a graph for PyTorch alone
    python eval.py radar A/result.json B/result.json               methods and tasks in one chart

Accuracy, AUC, Dice and recall are shares of 1, BLEU and ROUGE-L are in percent.
"""
import argparse
import contextlib
import csv
import difflib
import functools
import hashlib
import itertools
import json
import logging
import math
import re
import shutil
import sys
import textwrap
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def flags():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--task", help="a row of TASKS in data.py")
    add("--checkpoint", type=Path, help="best.pt of finetune.py, a path or hf:owner/name/file")
    add("--data", help="demo, or a set of the task; with --input: the reports to search")
    add("--split", choices=["train", "valid", "test"], default="test", help="part to report on")
    add("--fold", type=int, help="of sets that have folds; else the fold of the training")
    add("--input", type=Path, help="one scan instead of a set: a file or folder")
    add("--centre", type=float, nargs=3, metavar=("X", "Y", "Z"),
        help="candidate to look at, in mm: RAS for NIfTI, LPS for all else, as in LUNA16's CSV")
    add("--out", type=Path, help="folder for results; else eval, beside the checkpoint")
    add("--cache", default="cache", help="folder of preprocessed volumes")

    weights, sets, part, encoders = (argparse.ArgumentParser(add_help=False) for _ in range(4))
    weights.add_argument("--checkpoint", type=Path, required=True, help="a path or hf:owner/name[/file]")
    weights.add_argument("--cache", default="cache", help="folder of preprocessed volumes")
    sets.add_argument("--data", required=True, help="demo, or a set as pretrain.py takes it")
    part.add_argument("--split", choices=["train", "valid", "test"], help="else test, or valid, or all")
    add = encoders.add_argument
    add("--encoder", help="swin_b, swin_l, swin_t or unet, else what the file says")
    add("--merging", default="auto", choices=["auto", "monai", "v0.9", "mergingv2"], help="of patches")
    add("--size", type=int, nargs=3, metavar=("D", "H", "W"), help="of the input, likewise")
    add("--hu", choices=["auto", "header", "csv"], help="source of Hounsfield units, likewise")
    commands = parser.add_subparsers(dest="command")

    def command(name, out, *parents):
        parser = commands.add_parser(name, parents=parents, formatter_class=Help)
        what = "file or folder to write" if out else "folder to write; else it lies beside the checkpoint"
        parser.add_argument("--out", type=Path, default=out, help=what)
        return parser.add_argument
    add = command("zeroshot", None, weights, sets, part)
    add("--prompts", type=Path, help="CSV name,positive,negative: two texts a label column; else 'NAME.' "
        "and 'not NAME.' of the 18, for the demo in words of its reports")
    command("retrieval", None, weights, sets, part)
    add = command("probe", None, weights, sets, encoders)
    add("--batch_size", type=int, default=8, help="volumes at a time")
    add("--few", type=int, default=100, help="labels of a second probe of last.pt, the mean of 10 draws")
    add = command("pairing", None, weights, sets)
    add("--batch_size", type=int, default=24, help="volumes that stand against each other")
    add("--seed", type=int, default=0, help="of the batches and masks")
    add = command("embed", "embeddings.npz", weights, encoders)
    add("--input", type=Path, required=True, help="a scan, or a folder of scans at any depth")
    command("export", "model.pt2", weights, encoders)
    add = command("radar", "radar.png")
    add("results", type=Path, nargs="+", help="METHOD/result.json or METHOD/TASK/result.json")
    return parser


if __name__ == "__main__":  # before torch is imported: --help answers at once
    parser = flags()
    args = parser.parse_args()
    if args.command and args.command != sys.argv[1]:
        parser.error(f"flags stand behind {args.command}")      # before it they would be lost

import matplotlib.pyplot as plt
import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.patches import Patch
from sacrebleu.metrics import BLEU
from scipy.special import expit, logsumexp
from scipy.stats import rankdata
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import losses
import model

plt.switch_backend("Agg")
plt.rcParams.update({"font.size": 8, "axes.titlesize": 8, "legend.frameon": False, "savefig.dpi": 120})
log = logging.getLogger("mg3d")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SACREBLEU = BLEU(tokenize="none", smooth_method="none", effective_order=True)
PENALTIES = np.logspace(-1, 5, 25)  # of the ridge regression
WEIGHTED = "mean weighted by positives"
KS = (1, 5, 10, 50, 100)            # of Recall@K
PRETRAINING = data.TASKS["ct-rate-vocab"]._replace(kind="encode", classes=())


# --------------------------------- metrics

def auroc(score, label):
    """Area under the ROC curve: (n,), (n,) -> float; (n, K), (n, K) -> K floats. Labels other than 0
    and 1 are left out; nan where one class is absent."""
    score, label = np.asarray(score), np.asarray(label)
    positive, negative = label == 1, label == 0
    ranks = rankdata(np.where(positive | negative, score, np.inf), axis=0)  # the unknown come last
    n_pos, n_neg = positive.sum(0), negative.sum(0)
    wins = (ranks * positive).sum(0) - n_pos * (n_pos + 1) / 2  # Mann-Whitney U
    return (wins / np.where(n_pos * n_neg, n_pos * n_neg, math.nan)).tolist()


def macro_auroc(scores, labels):
    """Mean of the AUCs of the columns that have both classes"""
    return _mean(auroc(scores, labels))


def how_many(aucs):
    """Over how many findings a macro AUC is taken, in words"""
    absent = sum(map(math.isnan, aucs))
    others = f" (the other {absent} have one class alone)" if absent else ""
    return f"{len(aucs) - absent} findings{others}"


def _mean(values):
    """Mean of the values that are not nan"""
    values = [value for value in values if not math.isnan(value)]
    return float(np.mean(values)) if values else math.nan


def accuracy(pred, label):
    return float((np.asarray(pred) == np.asarray(label)).mean())


def roc(score, label):
    """False and true positive rates at each distinct score"""
    cuts = np.r_[np.inf, np.unique(score)[::-1]]
    negatives, positives = (np.sort(score[label == k]) for k in (0, 1))
    return [1 - np.searchsorted(group, cuts) / len(group) for group in (negatives, positives)]


def dice(pred, truth, num_classes):
    """Dice of the classes 1, … -> (num_classes - 1,), nan where the truth has none, as in MONAI"""
    pred, truth = np.asarray(pred), np.asarray(truth)
    if pred.shape != truth.shape:
        raise ValueError(f"found the shapes {pred.shape} and {truth.shape}, expected the same")
    scores = np.full(num_classes - 1, math.nan)
    for k in range(1, num_classes):
        marked, true = pred == k, truth == k
        if true.any():
            scores[k - 1] = 2 * (marked & true).sum() / (marked.sum() + true.sum())
    return scores


def bleu(hypotheses, references):
    """[BLEU-1, …, BLEU-4] of a corpus in percent, as of the COCO caption tool: cumulative, without
    smoothing; words stand between blanks, each Chinese character is one"""
    return _bleu([_bleu_counts(*pair) for pair in zip(hypotheses, references, strict=True)])


def _bleu_counts(hypothesis, reference):
    """(10,): n-grams that match, those of the hypothesis, n = 1 to 4 each; words of both texts"""
    score = SACREBLEU.sentence_score(data.space_out(hypothesis), [data.space_out(reference)])
    return np.array([*score.counts, *score.totals, score.sys_len, score.ref_len], float)


def _bleu(counts):
    """Counts (n, 10) of n reports -> [BLEU-1, …, BLEU-4]"""
    counts = np.sum(counts, axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):  # no word or no match: log 0 makes BLEU 0
        brevity = math.exp(min(0, 1 - counts[9] / counts[8]))
        logs = np.log(counts[:4] / np.maximum(counts[4:8], 1))
    return [float(100 * brevity * np.exp(logs[:n].mean())) for n in range(1, 5)]


def rouge_l(hypothesis, reference):
    """ROUGE-L in percent, of words as in `bleu`: F of the longest common subsequence, β = 1.2"""
    words, others = (data.space_out(text).split() for text in (hypothesis, reference))
    others = np.array(others, str)
    longest = np.zeros(1 + len(others), int)  # common to the words so far and the first j others
    for word in words:
        with_word = longest[:-1] + (others == word)
        longest[1:] = np.maximum.accumulate(np.maximum(longest[1:], with_word))
    return float(100 * (1 + 1.2 ** 2) * longest[-1] / (len(words) + 1.2 ** 2 * len(others)))


# How English reports state the findings. As in CT-RATE's labels any lymph node counts, and
# "fibroatelectatic" is fibrosis alone.
ELSEWHERE = r"^(?!.*(thyroid|adrenal|kidney|renal|liver|hepatic|spleen|breast|rib\b|fracture|humer)).*"
PLAQUE = r"(calcif|atheroscl|atherom|plaque)"
FINDERS = {
    "Medical material": r"catheter|\bpace|cardiac device|\bstents?\b|prosthe|\bsutur|sternotomy|metallic|"
                        r"valve replace|\bclips?\b|surgical material|\bport\b|chamber|cannula|\btube\b",
    "Arterial wall calcification": rf"aort.*{PLAQUE}|{PLAQUE}.*(aort|vascular)",
    "Cardiomegaly": r"cardiomegaly|(heart|\bctr|cardiothoracic).*(increase|enlarge|larger)|increase.*heart",
    "Pericardial effusion": r"pericardi.*(effusion|fluid)|(effusion|fluid).*pericardi",
    "Coronary artery wall calcification": rf"(coronary|\blad\b).*{PLAQUE}|{PLAQUE}.*(coronary|\blad\b)",
    "Hiatal hernia": r"hiat|hernia.*stomach",
    "Lymphadenopathy": r"(?<!intrapulmonary )lymph node|\blaps?\b|lymphadeno",
    "Emphysema": r"emphysem|\bbulla|bleb",
    "Atelectasis": r"(?<!fibro)atelecta",
    "Lung nodule": ELSEWHERE + r"nodules?\b",
    "Lung opacity": r"(ground|frosted).?glass|opacit|depend\w+ (\w+ )?densit",
    "Pulmonary fibrotic sequela": ELSEWHERE + r"(fibro|sequel|pleuroparenchymal (band|linear|dens))",
    "Pleural effusion": r"pleura.*(effusion|fluid)|(effusion|fluid).*(pleura|hemithora)|hydrothorax",
    "Mosaic attenuation pattern": r"mosaic",
    "Peribronchial thickening": r"peribronch.*(thick|cuff)|thick.*peribronch",
    "Consolidation": r"consolida",
    "Bronchiectasis": r"bronchiecta",
    "Interlobular septal thickening": r"interlobular (sept|thick)|(?<!para)septal thick"}
DENIAL = re.compile(r"\b(no|not(?! (reach|exceed|differ))|without|absen\w+|free of|negative|disappear\w*|"
                    r"(?<!cannot be )(excluded|ruled out)|never|neither|nor)\b", re.IGNORECASE)
VERB = re.compile(r"\b(is|are|was|were|has|have|detected|observed|seen)\b", re.IGNORECASE)


def findings(text):
    """Which of data.LABELS an English report states, and does not deny: bool (18,)"""
    found, goes_on = np.zeros(len(data.LABELS), bool), False
    for clause in data.split_sentences(text):
        is_denied = goes_on or DENIAL.search(clause)
        goes_on = is_denied and clause.endswith(",") and not VERB.search(clause)  # "No mass, …"
        if not is_denied:
            found |= [bool(re.search(FINDERS[name], clause, re.IGNORECASE)) for name in data.LABELS]
    return found


def agreement(named, truth):
    """Findings that n reports name, bool (n, 18), against labels (n, 18) of 0, 1 and NaN = unknown;
    macro: the mean over findings that somebody has"""
    there = truth == 1
    counts = np.array([named & there, named & (truth == 0), ~named & there]).sum(1)  # (3, 18)

    def shares(correct, wrong, missing):
        ratios = {"precision": correct / np.maximum(1, correct + wrong),
                  "recall": correct / np.maximum(1, correct + missing),
                  "F1": 2 * correct / np.maximum(1, 2 * correct + wrong + missing)}
        return {name: float(np.mean(ratio)) for name, ratio in ratios.items()}
    return {"micro": shares(*counts.sum(1)), "macro": shares(*counts[:, there.any(0)]),
            "correct_wrong_missing": dict(zip(data.LABELS, counts.T.tolist()))}


def retrieval_ranks(similarity):
    """(n, n), row i a query whose match is column i -> ranks (n,) from 1; ties count against it"""
    similarity = np.asarray(similarity)
    if bad := (~np.isfinite(similarity)).sum():
        raise ValueError(f"found {bad} similarities that are not finite, expected none")
    return (similarity >= similarity.diagonal()[:, None]).sum(1)


def recall_at_k(similarity, ks):
    """Share of queries whose match is among the first k, for each k"""
    ranks = retrieval_ranks(similarity)
    return [float((ranks <= k).mean()) for k in ks]


def _patients(items):
    return np.array([item.patient for item in items])


def rows_by_patient(patients):
    """The places of each patient's items: a list of arrays"""
    _, numbers, counts = np.unique(patients, return_inverse=True, return_counts=True)
    return np.split(numbers.argsort(kind="stable"), counts.cumsum()[:-1])


def bootstrap(metric, *arrays, patients=None, times=1000, seed=0):
    """95 % percentile interval of metric(*arrays) over resampled patients, each with all of its items
    (dim 0), or items if none are named: (low, high), lists for a metric of several numbers; nan for
    fewer than two"""
    rng, items = np.random.default_rng(seed), np.arange(len(arrays[0]))
    rows = items if patients is None else rows_by_patient(patients)
    n = len(rows)
    if n < 2:
        return math.nan, math.nan
    samples = (rng.integers(0, n, n) for _ in range(times))
    if n < len(items):
        samples = (np.concatenate([rows[i] for i in sample]) for sample in samples)
    draws = [metric(*(array[sample] for array in arrays)) for sample in samples]
    return tuple(np.nanpercentile(draws, [2.5, 97.5], axis=0).tolist())


def span(interval, sign=""):
    """[low, high] in words; sign: "+" for an interval of a difference"""
    return "[{:{sign}.3f}, {:{sign}.3f}]".format(*interval, sign=sign)


# ---------------------------- linear probe

@torch.no_grad()
def global_features(encoder, items, cache, size, hu="auto", batch_size=8):
    """The average of the encoder's last map for every volume: (n, C) float64 numpy"""
    run = _run_on_volumes(encoder.eval(), cache, size, hu, batch_size)
    rows = [encoder(volumes)[-1].float().mean((2, 3, 4)) for volumes in _batches(run, items)]
    return torch.cat(rows).cpu().double().numpy()


def ridge(x, y, x_new, patients, penalties=PENALTIES):
    """Ridge regression, its penalty by the error on patients left out one by one: (n, C), (n, k), (m, C),
    n names -> (m, k)"""
    mean, std = x.mean(0), x.std(0) + 1e-8
    x, x_new = (x - mean) / std, (x_new - mean) / std
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    y_mean = y.mean(0)
    uty = u.T @ (y - y_mean)
    rows, errors = rows_by_patient(patients), []
    for penalty in penalties:
        shrink = s ** 2 / (s ** 2 + penalty)
        residual = y - y_mean - u @ (shrink[:, None] * uty)
        leverages = ((u[row] * shrink) @ u[row].T + 1 / len(x) for row in rows)
        left_out = [np.linalg.solve((1 + 1e-9) * np.eye(len(row)) - leverage, residual[row])
                    for row, leverage in zip(rows, leverages)]  # predicted by all others
        errors.append(np.square(np.concatenate(left_out)).mean())
    penalty = penalties[np.argmin(errors)]
    return x_new @ (vt.T @ ((s / (s ** 2 + penalty))[:, None] * uty)) + y_mean


def split_labelled(items):
    """Items with all 18 labels -> (those of the split train, the others)"""
    labelled = [item for item in items if item.labels is not None and not np.isnan(item.labels).any()]
    fit = [item for item in labelled if item.split == "train"]
    held_out = [item for item in labelled if item.split != "train"]
    if len(set(_patients(fit))) < 2 or not held_out:
        raise ValueError(f"labelled volumes of the split train and others: found {len(fit)} and "
                         f"{len(held_out)}, expected some of both, and two patients to train on")
    return fit, held_out


def probe_features(encoder, items, cache, size, hu="auto", batch_size=8):
    """Features of the labelled items to fit on (n, C) and of those held out (m, C)"""
    groups = split_labelled(items)
    return [global_features(encoder, group, cache, size, hu, batch_size) for group in groups]


def probe(features, items, rows=slice(None)):
    """Scores of a linear probe, fitted on some rows, and labels of the held-out items: (m, 18) each.
    Scores are nan for a finding that none or all have."""
    fit, held_out = split_labelled(items)
    y, truth = (np.array([item.labels for item in group], float) for group in (fit, held_out))
    x, y, patients = features[0][rows], y[rows], _patients(fit)[rows]
    return np.where(y.min(0) < y.max(0), ridge(x, y, features[1], patients), math.nan), truth


def untrained_encoder(config):
    """The encoder as a run of pretrain.py with these flags began; None if --init cannot be read"""
    torch.manual_seed(config["seed"])
    encoder = model.build_encoder(config["encoder"])
    try:
        if config["init"]:
            model.load_weights(encoder, config["init"], config.get("merging", "auto"))
            log.info("untrained is here the encoder of %s, from which the run began", config["init"])
        return encoder
    except ValueError as error:
        log.warning("no untrained encoder to compare with: %s", error)


def compare_probes(untrained, pretrained, items, few=0):
    """Linear probes on `probe_features` of two encoders: macro AUCs, their paired difference [low,
    value, high] and, with `few`, those with that many training items, means of 10 draws"""
    def gain(before, after, truth):
        return macro_auroc(after, truth) - macro_auroc(before, truth)
    (before, truth), (after, _) = probe(untrained, items), probe(pretrained, items)
    patients = _patients(split_labelled(items)[1])
    low, high = bootstrap(gain, before, after, truth, patients=patients)
    aucs = auroc(after, truth)
    result = {"untrained": macro_auroc(before, truth), "pretrained": _mean(aucs),
              "difference": [low, gain(before, after, truth), high], "n": len(truth),
              "findings": how_many(aucs)}
    n = len(untrained[0])
    if 1 < few < n:
        rng = np.random.default_rng(0)
        draws = [rng.choice(n, few, replace=False) for _ in range(10)]
        result["few"] = {"labels": few}
        for name, features in (("untrained", untrained), ("pretrained", pretrained)):
            aucs = [macro_auroc(*probe(features, items, rows)) for rows in draws]
            result["few"][name] = _mean(aucs)
    return result


def say_probe(result):
    low, value, high = result["difference"]
    text = ("linear probe of {findings}, macro AUC on {n} held-out volumes: untrained encoder "
            "{untrained:.3f}, pre-trained {pretrained:.3f}, difference ").format(**result)
    text += f"{value:+.3f} {span([low, high], '+')}"
    if "few" in result:
        text += "; with {labels} labels {untrained:.3f} and {pretrained:.3f}".format(**result["few"])
    return text


# ---------------- what a loss learns
BY_PATIENT = ("mim", "mlm", "sfr")  # losses that each patient has alone


def _on_device(batch, network):
    device = next(network.parameters()).device
    return {key: value.to(device) for key, value in batch.items() if torch.is_tensor(value)}


@torch.no_grad()
def know_nothing(network, batches, enabled, global_batch):
    """{loss: its value for a model that knows nothing of the patient}: the mean volume, frequencies
    of words, the mean sentence, the best constant cosine, a random choice among `global_batch`"""
    batches = [_on_device(batch, network) for batch in batches]
    contrast = math.log(global_batch)
    levels = {"cml": 2 * contrast, "dfa": contrast, "clip": contrast}
    if "mim" in enabled:
        volumes = torch.cat([batch["volume"] for batch in batches])
        masks = torch.cat([batch["volume_mask"] for batch in batches])
        levels["mim"] = (volumes - volumes.mean(0)).square()[masks].mean().item()
    if "mlm" in enabled:
        words = torch.cat([batch["input_ids"][batch["sentence_ids"] >= 0] for batch in batches])
        masked = torch.cat([batch["mlm_labels"][batch["mlm_labels"] != -100] for batch in batches])
        levels["mlm"] = -(words.bincount() / len(words))[masked].log().mean().item()
    if "sfr" in enabled:
        rows, patients = [], 0
        for batch in batches:
            mask = batch["sentence_mask"]  # (B, S)
            words = network.encode_words(batch["input_ids"], batch["attention_mask"])
            sentences = model.sentence_mean(words, batch["sentence_ids"], mask.shape[1])
            rows.append(F.normalize(sentences[mask].float(), dim=-1))
            patients += len(mask)
        rows = torch.cat(rows)  # (ΣS, E)
        levels["sfr"] = (1 - rows @ F.normalize(rows.mean(0), dim=0)).sum().item() / patients
    if "ssm" in enabled:
        gaps = []
        for batch in batches:
            patient = batch["sentence_mask"].nonzero()[:, 0]  # of each sentence
            rows = network.text_encoder.encode_sentences(batch["single_ids"], batch["single_mask"])
            rows = F.normalize(rows.float(), dim=-1)
            cosines = (rows @ rows.T)[patient[:, None] < patient]
            gaps.append((cosines - cosines.median()).abs().mean().item() if len(cosines) else 0.0)
        levels["ssm"] = float(np.mean(gaps))
    return {name: levels[name] for name in enabled if name in levels}


def levels(rows, nothing):
    """{loss: {nothing, first, last, learned}}: means of the first and the last tenth of the rows of
    log.jsonl. Learned: the last lie below `nothing` by more than two standard errors."""
    tenth = max(1, len(rows) // 10)
    result = {}
    for name, level in nothing.items():
        values = np.array([row[name] for row in rows], float)  # None becomes nan
        first, last = values[:tenth], values[-tenth:]
        error = last.std(ddof=1) / math.sqrt(tenth) if tenth > 1 else math.nan
        most = last.mean() + 2 * error
        result[name] = {"nothing": level, "first": float(first.mean()), "last": float(last.mean()),
                        "learned": bool(most < level)}
        if math.isnan(most):
            reason = "fewer than 20 rows" if tenth == 1 else "a value that is not finite"
            result[name] |= {"learned": None, "reason": reason}
    return result


def retrieve_reports(network, items, cache, size, hu="auto", batch_size=24):
    """Recall of the volume of each report, by the cosine of global features"""
    volumes = predict_features(_run_on_volumes(network, cache, size, hu, batch_size), items, True)
    reports = text_features(network, [item.report for item in items])
    k = max(1, min(50, len(items) // 10))
    hits = (retrieval_ranks(reports @ volumes.T) <= k).astype(float)
    hits = hits if k < len(items) else hits * math.nan          # an item alone always finds itself
    interval = bootstrap(np.mean, hits, patients=_patients(items))
    return {"k": k, "value": float(hits.mean()), "interval": list(interval), "chance": k / len(items),
            "n": len(items)}


def say_retrieval(result):
    return ("retrieval of {n} held-out volumes by their reports: Recall@{k} {value:.3f} {span}, "
            "chance {chance:.3f}").format(**result, span=span(result["interval"]))


@torch.no_grad()
def sentence_maps(network, volume, report):
    """Where the sentences of a report look in its volume (1, D, H, W): the S sentences, and the
    attention of Eq. (11) on the N tokens, mean of the heads, (S, N) on the CPU"""
    tokenizer = network.text_encoder.tokenizer
    report = data.tokenize_report(tokenizer, data.split_sentences(report))
    words = tokenizer.pad({"input_ids": report["single_ids"]}, return_tensors="pt")
    batch = _on_device({**words, "volume": volume[None]}, network)
    queries = network.text_encoder.encode_sentences(batch["input_ids"], batch["attention_mask"])
    tokens = network.encode_image(batch["volume"])
    maps = network.sentence_attention.maps(queries[None], tokens)  # (1, heads, S, N)
    return report["sentences"], maps[0].float().mean(0).cpu()


def lesion_attention(network, items, cache, size, hu="auto"):
    """Share of a sentence's attention in the tokens that its lesion in `item.mask` touches, mean over
    patients, and two controls with intervals of the difference: a random place, other sentences"""
    grid, values, patients = [side // network.encoder.stride for side in size], [], []
    for item in _bar(items, "attention", True):
        volume = data.load_volume(item, cache, size, hu)
        sentences, maps = sentence_maps(network, volume, item.report)
        places, rows = data.lesions(item, grid).flatten(1), []  # (18, N)
        for i, sentence in enumerate(sentences):
            place = places[findings(sentence)].any(0).float()  # (N,)
            if place.any():
                inside = maps @ place  # (S,)
                others = (inside.sum() - inside[i]) / max(1, len(inside) - 1)
                rows.append([inside[i].item(), place.mean().item(), others.item()])
        if rows:
            values.append(np.mean(rows, 0))
            patients.append(item.patient)
    inside, random, others = np.transpose(values)
    means = {"inside": inside.mean(), "random": random.mean(), "others": others.mean()}
    low_high = functools.partial(bootstrap, np.mean, patients=patients)
    return {**means, "interval": list(low_high(inside - random)),
            "interval_to_others": list(low_high(inside - others)), "n": len(values)}


def say_lesion_attention(result):
    spans = [span(result[name], "+") for name in ("interval", "interval_to_others")]
    gap = result["inside"] - result["random"]
    return ("attention of sentences inside their lesion {inside:.3f}, at a random place {random:.3f}, "
            "difference {gap:+.3f} {spans[0]}; of the report's other sentences {others:.3f} {spans[1]}"
            ).format(**result, gap=gap, spans=spans)


def _of_patients(name, outputs, batch):
    """MIM, MLM or SFR of every patient of a batch, one by one: B floats"""
    masked_rows = (batch["mlm_labels"] != -100).nonzero()[:, 0]
    values = []
    for i in range(len(batch["volume"])):
        o = {key: value[masked_rows == i] if key in ("logits", "mlm_labels") else value[i:i + 1]
             for key, value in outputs.items()}
        part = {key: batch[key][i:i + 1] for key in ("volume", "volume_mask", "sentence_mask")}
        values.append(losses.compute(o, part, [name])[name].item())
    return values


def pairing(network, batches, enabled, temperature=0.1, gradients=3):
    """Does a loss use which report belongs to which volume? {loss: {own, other, interval of other - own,
    …}}: for true pairs, and with the volumes of a batch handed on by one; over patients or batches, and
    those of the same patients count once.
    gradient_cosine: of the two gradients on the encoder, mean of the first `gradients` batches."""
    network.eval()
    weights = [p for p in network.encoder.parameters() if p.requires_grad]
    units = {name: ([], []) for name in enabled}
    cosines = {name: [] for name in enabled}
    for number, batch in enumerate(_bar(batches, "pairing", True)):
        own = _on_device(batch, network)
        other = own | {key: own[key].roll(1, 0) for key in ("volume", "volume_mask")}
        slopes = defaultdict(list)
        for arm, pairs in enumerate((own, other)):
            with torch.set_grad_enabled(number < gradients):
                outputs = network(pairs)
                totals = losses.compute(outputs, pairs, enabled, temperature)
            for name, total in totals.items():
                values = [total.item()]
                if name in BY_PATIENT:
                    values = _of_patients(name, outputs, pairs)
                if name == "mim" and arm == 1:  # the volumes have moved, not the reports
                    values = np.roll(values, -1)
                units[name][arm].extend(values)
                if number < gradients:
                    grads = torch.autograd.grad(total, weights, retain_graph=True,
                                                materialize_grads=True)
                    slopes[name].append(torch.cat([grad.flatten() for grad in grads]))
        for name, (a, b) in slopes.items():
            both = a.any() and b.any()  # without a gradient there is no angle
            cosines[name].append(F.cosine_similarity(a, b, dim=0).item() if both else math.nan)
    patients, numbers = np.concatenate([batch["ids"] for batch in batches]), {}
    groups = [numbers.setdefault(frozenset(batch["ids"]), len(numbers)) for batch in batches]
    result = {}
    for name, (own, other) in units.items():
        units_seen = patients if name in BY_PATIENT else groups
        low, high = bootstrap(np.mean, np.subtract(other, own), patients=units_seen)
        result[name] = {"own": float(np.mean(own)), "other": float(np.mean(other)),
                        "interval": [low, high], "gradient_cosine": _mean(cosines[name]),
                        "uses_report": bool(low > 0)}
        if len(numbers) < 8:
            reason = f"{len(numbers)} batches of other patients, fewer than 8"
            result[name] |= {"uses_report": None, "reason": reason}
    return result


def say_pairing(result):
    lines = [f"{'loss':5s} {'own report':>10s} {'another':>10s}  {'difference':24s} gradients' cosine"]
    for name, row in result.items():
        own, other, (low, high) = row["own"], row["other"], row["interval"]
        difference = f"{other - own:+.4f} [{low:+.4f}, {high:+.4f}]"
        verdict = "does not use the report"
        if row["uses_report"]:
            share = (other - own) / max(abs(own), 1e-9)
            verdict = f"uses the report, for {share:.1%} of its value"
        elif row["uses_report"] is None:
            verdict = "too few batches to say"
        lines.append(f"{name:5s} {own:10.4f} {other:10.4f}  {difference:24s} "
                     f"{row['gradient_cosine']:+.3f}  {verdict}")
    return "\n".join(lines)


def plot_pairing(result, out):
    """How much worse each loss is with another patient's report, in percent of its value"""
    with figure(out, 1, 1, 4.6, 3) as [[ax]]:
        for name, row in result.items():
            percent = 100 / max(abs(row["own"]), 1e-9)
            colour = "tab:blue" if row["uses_report"] else "0.6"
            ax.bar(name, percent * (row["other"] - row["own"]), color=colour)
            ax.plot([name, name], percent * np.array(row["interval"]), color="black")
        ax.axhline(0, color="black", lw=0.8)
        ax.set(title="with another patient's report (blue: the loss uses the report)", ylabel="worse by %")


# -------------------- runs and predictions

class Run(NamedTuple):
    network: torch.nn.Module
    task: data.Task  # with the size and spacing of the training
    config: dict  # flags of the training, its vocabulary, its patients
    cache: str
    device: str


def check_preprocessing(config, source):
    """Warn if a file's network was trained with another crop or window than those of data.py."""
    for name, ours in (("crop", data.CROP), ("window", data.WINDOW)):
        if name in config and tuple(config[name] or ()) != ours:
            log.warning("warning: %s was trained with the %s %s, here it is %s", source, name, config[name],
                        ours)


def load_checkpoint(path, cache="cache", device="cpu"):
    """best.pt of finetune.py -> Run, its network in eval mode. ValueError for any other file."""
    path = model.local_file(path)
    checkpoint = model.read_checkpoint(path)
    config = model.flags_of(checkpoint)
    if config.get("task") not in data.TASKS or "task" not in checkpoint:
        raise ValueError(f"{path}: found the task {config.get('task')}, expected best.pt of "
                         f"finetune.py for one of {', '.join(data.TASKS)}")
    task = data.TASKS[config["task"]]._replace(**checkpoint["task"])  # of the training
    if task.view == "whole":
        check_preprocessing(config, path)
    network = model.build_network(task.kind, len(task.classes), config, path.parent)
    model.restore(network, checkpoint, path)
    return Run(network.to(device).eval(), task, config, cache, device)


def _run_on_volumes(network, cache, size, hu, batch_size):
    """A run that sees the volumes of pre-training"""
    task = PRETRAINING._replace(size=tuple(size), hu=hu)
    return Run(network, task, {"batch_size": batch_size}, cache, next(network.parameters()).device)


def _bar(steps, text, shown):
    return tqdm(steps, desc=text, leave=False, disable=None if shown else True)


def _stack_inputs(items, task, cache):
    return torch.stack([data.network_input(item, task, cache) for item in items])


def _batches(run, items, progress=True):
    """The network's inputs (B, 1, D, H, W), in the order of the items"""
    make = functools.partial(_stack_inputs, task=run.task._replace(records=None), cache=run.cache)
    workers = run.config.get("workers", 0) if len(items) > 1 else 0
    loader = DataLoader(items, run.config["batch_size"], num_workers=workers, collate_fn=make,
                        worker_init_fn=data.outlive_signals,
                        generator=torch.Generator())    # its own: that of a training stays
    for inputs in _bar(loader, "predict", progress and len(items) > 1):
        yield inputs.to(run.device, non_blocking=True)


@torch.no_grad()
def predict_log_odds(run, items, progress=False):
    """log(p / (1 - p)) of every class, which ranks items whose p is rounded to 1, too: (n, K) float64.
    The p of a prompt is that of "{name}." against "not {name}.", or of two texts in config."""
    if run.task.kind == "prompt":
        prompts = run.config.get("prompts") or data.prompts(run.task.classes)
        texts = text_features(run.network, prompts)  # (2K, E)
        cosines = (predict_features(run, items, progress) @ texts.T).double().numpy()
        return (cosines[:, ::2] - cosines[:, 1::2]) / run.config["temperature"]
    logits = torch.cat([run.network(inputs) for inputs in _batches(run, items, progress)])
    logits = logits.cpu().double().numpy()
    if run.task.exclusive:
        others = [logsumexp(np.delete(logits, k, 1), 1) for k in range(logits.shape[1])]
        logits = logits - np.stack(others, 1)
    return logits


def predict_classes(run, items, progress=False):
    """Probability of every class: (n, K) numpy"""
    return expit(predict_log_odds(run, items, progress))


@torch.no_grad()
def predict_features(run, items, progress=False):
    """Global volume features of length 1: (n, E) on the CPU"""
    rows = [run.network.encode_image(inputs).mean(1) for inputs in _batches(run, items, progress)]
    return F.normalize(torch.cat(rows).float(), dim=-1).cpu()


@torch.no_grad()
def text_features(network, texts):
    """Global features of length 1 of reports or prompts: n str -> (n, E) on the CPU"""
    rows, different = [], list(dict.fromkeys(texts))  # padding would tell equal texts apart
    for i in range(0, len(different), 32):
        batch = data.text_batch(network.text_encoder.tokenizer, different[i:i + 32])
        rows.append(network.encode_text(**_on_device(batch, network)))
    features = F.normalize(torch.cat(rows).float(), dim=-1).cpu()
    place = {text: i for i, text in enumerate(different)}
    return features[[place[text] for text in texts]]


@torch.no_grad()
def predict_reports(run, items, progress=False):
    """n str, words between blanks"""
    words = run.config["vocabulary"]
    return [" ".join(words[token] for token in tokens)
            for inputs in _batches(run, items, progress) for tokens in run.network.generate(inputs)]


@torch.no_grad()
def predict_masks(run, items, progress=False):
    """Yields the label map of each scan as the scan is stored: uint8 (x, y, z), affine 4×4"""
    for item in _bar(items, "predict", progress):
        volume = torch.from_numpy(np.array(data.prepare(item, run.task, run.cache)[0], np.float32))
        probabilities = sliding_window(run.network, volume[None], run.task.size, run.task.overlap,
                                       device=run.device, progress=progress)
        if not probabilities.isfinite().all():
            raise data.wrong(item.volume, "predictions that are not finite", "finite ones")
        yield data.to_own_grid(probabilities, item)


@torch.no_grad()
def sliding_window(network, volume, size, overlap, batch_size=2, device="cpu", progress=False):
    """Class probabilities of a volume of any size: (1, D, H, W) -> (K, D, H, W) float32 on the CPU.
    Logits of overlapping windows are averaged with Gaussian weights."""
    shape = volume.shape[1:]
    padded = np.maximum(shape, size)
    volume = torch.from_numpy(data.cut(volume[0].numpy(), (0, 0, 0), padded))
    starts, weight = [], torch.ones(())
    for n, side in zip(padded, size):
        count = math.ceil((n - side) / max(1, int(side * (1 - overlap)))) + 1
        starts.append(np.linspace(0, n - side, count).round().astype(int))
        place = (torch.arange(side) - (side - 1) / 2) / (side / 8)  # in σ
        weight = weight[..., None] * torch.exp(-0.5 * place ** 2)
    weight = weight.clamp(min=1e-3)  # a corner of the volume lies in one window alone
    windows = [(..., *map(slice, corner, np.add(corner, size)))
               for corner in itertools.product(*starts)]
    total, weights = 0, torch.zeros_like(volume)
    for i in _bar(range(0, len(windows), batch_size), "windows", progress):
        batch = windows[i:i + batch_size]
        inputs = torch.stack([volume[None][window] for window in batch])
        logits = network(inputs.to(device)).cpu().float()  # (B, K, *size)
        if i == 0:
            total = torch.zeros(logits.shape[1], *volume.shape)
        for window, window_logits in zip(batch, logits):
            total[window] += weight * window_logits
            weights[window] += weight
    inside = [slice(k // 2, k // 2 + n) for k, n in zip(padded - shape, shape)]
    return (total / weights).softmax(0)[(..., *inside)]


# ---------------------------------- scores
# Each gives the part of the result that differs by kind, a metric, the patients that are resampled for its
# interval, and the arrays it is taken of.

def score_classes(run, items, scores, out, train_items):
    """Accuracy of exclusive classes, AUC of a single class or of the last one `among` another,
    otherwise the mean AUC. scores: log odds (n, K)"""
    task, names, patients = run.task, run.task.classes, _patients(items)
    truth = np.stack([item.labels for item in items]).astype(float)  # (n, K), NaN = unknown
    aucs = dict(zip(names, auroc(scores, truth)))
    positives = dict(zip(names, np.nansum(truth, 0).astype(int).tolist()))
    result = {"chance": 0.5, "per_class": aucs, "positives": positives, "more": {}}
    if out:
        rows = np.hstack([expit(scores), truth]).tolist()
        _write_csv(out / "predictions.csv", ["id", *names, *(f"true {name}" for name in names)],
                   [[item.id, *row] for item, row in zip(items, rows)])
        plot_roc(scores, truth, names, out / "roc.png")
    if task.exclusive:
        label = truth.argmax(1)
        pred = np.where(np.isfinite(scores).all(1), scores.argmax(1), math.nan)
        result |= {"chance": float(np.bincount(label).max() / len(label)),
                   "per_class": {name: _mean(pred[label == k] == k) for k, name in enumerate(names)},
                   "protocol": "all items; chance: the commonest class", "more": {"auc": aucs}}
        return result, accuracy, patients, pred, label
    if len(names) > 1 and not task.among:
        result["protocol"] = f"all items, mean of {how_many(aucs.values())}"
        if task.kind == "prompt":
            one, other, *_ = run.config.get("prompts") or ("{name}.", "not {name}.")
            result["protocol"] += f", '{one}' against '{other}' and so on"
        if out:
            rows = auc_table(scores, truth, names, patients)
            spans = {name: [low, high] for name, (low, _, high) in rows.items() if name in aucs}
            result["more"] = {"weighted_auc": rows[WEIGHTED], "intervals": spans}
        return result, macro_auroc, patients, scores, truth
    counted = ~np.isnan(truth[:, -1])
    if task.among:  # as STOIC asks: severe among COVID-19
        counted &= truth[:, names.index(task.among)] == 1
        result["more"] = {"auc_all_items": aucs[names[-1]], "n_all_items": len(items)}
    result["n"] = int(counted.sum())
    result["protocol"] = f"{names[-1]} among {task.among or 'all items'}"
    return result, auroc, patients[counted], scores[counted, -1], truth[counted, -1]


def auc_table(scores, truth, classes, patients):
    """{name: [low, AUC, high]} of the classes (K,) that have both kinds, their mean, and their mean
    weighted by positives"""
    def metric(scores, truth):
        aucs = np.array(auroc(scores, truth))
        weights = np.where(np.isnan(aucs), 0, (truth == 1).sum(0))
        weighted = np.nansum(weights * aucs) / (weights.sum() or math.nan)
        return np.array([*aucs, _mean(aucs), weighted])
    known = np.flatnonzero(~np.isnan(auroc(scores, truth)))
    scores, truth = scores[:, known], truth[:, known]
    names = [*(classes[k] for k in known), "mean", WEIGHTED]
    interval = bootstrap(metric, scores, truth, patients=patients)
    low, high = (np.broadcast_to(end, len(names)) for end in interval)
    return dict(zip(names, np.transpose([low, metric(scores, truth), high]).tolist()))


def score_masks(run, items, masks, out, train_items):
    """Dice of scans in their own grid. masks: (labels, affine) of each, one at a time"""
    names, values = run.task.classes, range(1, 1 + len(run.task.classes))
    scores, constant, false_alarms, examples = [], [], 0, []
    file_names = _file_names(items)
    if out:
        shutil.rmtree(out / "masks", ignore_errors=True)        # of another model, perhaps of others
        (out / "masks").mkdir()
    for (labels, affine), item, file_name in zip(masks, items, file_names):
        pred = nib.apply_orientation(labels, nib.io_orientation(affine)).T  # (z, y, x), RAS
        truth = data.read_volume(item.mask, is_mask=True)[0]
        scores.append(dice(pred, truth, 1 + len(names)))
        constant.append([dice(np.ones_like(truth), truth == k, 2)[0] for k in values])
        false_alarms += sum(k in pred and k not in truth for k in values)
        if out:
            nib.save(nib.Nifti1Image(labels, affine), out / "masks" / f"{file_name}.nii.gz")
        if out and len(examples) < 4 and truth.any():
            z = (truth > 0).sum((1, 2)).argmax()
            image, spacing, _ = data.read_volume(item.volume)
            low, high = np.percentile(image[z], (1, 99))
            examples.append((item.id, (image[z] - low) / (high - low), pred[z], truth[z],
                             np.nanmean(scores[-1]), spacing[1] / spacing[2]))
    scores, constant = np.array(scores), np.array(constant)  # (n, K)
    if out:
        rows = [[item.id, *row] for item, row in zip(items, scores.tolist())]
        _write_csv(out / "dice.csv", ["id", *names], rows)
    if examples:
        plot_overlay(examples, out / "overlay.png")
    known = ~np.isnan(scores)
    counted = known.any(1)
    cases = np.nanmean(scores[counted], 1)  # mean over classes, then over scans, as in MONAI
    result = {"n": len(cases), "chance": _mean(np.nanmean(constant[counted], 1)),
              "per_class": {name: _mean(column) for name, column in zip(names, scores.T)},
              "positives": dict(zip(names, known.sum(0).tolist())),
              "protocol": "mean over scans in their own grid, scans and classes without truth left "
                          "out; chance: all voxels marked",
              "more": {"chance_of_an_empty_mask": 0.0, "without_truth": int((~known).sum()),
                       "marked_without_truth": false_alarms}}
    return result, _mean, _patients(items)[counted], cases


def score_findings(items, reports, constant, vocabulary):
    """Do reports name the findings of the labels or, where no item has any, of the true reports? Beside
    them the true reports, as they are and as the generator could write them, and a constant report"""
    if not vocabulary & {".", "。"}:
        reason = "the generator has no full stop: where does a denial end?"
        return {"generated": None, "reason": reason}
    true = [item.report for item in items]
    # Without commas some denials go on too long, and what is behind the last word is lost.
    writable = [" ".join(data.report_words(text, with_stops=True)[:data.MOST_WORDS]) for text in true]
    texts = {"generated": reports, "true report": true, "true report as it could be generated": writable,
             "constant report": [constant] * len(items)}
    named = {name: np.array([findings(text) for text in some]) for name, some in texts.items()}
    if not named["true report"].any():
        reason = "the true reports name no finding: only English ones are read"
        return {"generated": None, "reason": reason}
    unknown = np.full(len(data.LABELS), math.nan)
    truth = np.stack([unknown if item.labels is None else item.labels for item in items])
    against, labelled = "labels", ~np.isnan(truth).all(1)
    if not labelled.any():
        against, labelled, truth = "true report", labelled | True, named.pop("true report")
    results = {name: agreement(rows[labelled], truth[labelled]) for name, rows in named.items()}
    return {"against": against, "n": int(labelled.sum()), **results}


def _words_of(report, with_stops=False):
    return " ".join(data.report_words(report, with_stops))


def constant_report(reports):
    """The report that fits the others best by BLEU-4: of 1,000 the 30 that fit 20 best, of these the one that
    fits 300"""
    order = np.random.default_rng(0).permutation(len(reports))

    def best_first(candidates, n):
        sample = [_words_of(reports[i]) for i in order[:n]]
        scores = {report: bleu([_words_of(report)] * len(sample), sample)[3] for report in candidates}
        return sorted(candidates, key=scores.get, reverse=True)
    finalists = best_first(sorted({reports[i] for i in order[:1000]}), 20)[:30]
    return best_first(finalists, 300)[0]


def score_reports(run, items, reports, out, train_items):
    """BLEU, ROUGE-L and findings of the reports and, to compare, of the best constant report"""
    truth = [_words_of(item.report) for item in items]
    if out:
        rows = [{"id": item.id, "generated": report, "truth": _words_of(item.report, True)}
                for item, report in zip(items, reports)]
        write_result(rows, out / "reports.json")
        write_comparison(rows[:3], out / "reports.html")
    best = constant_report([item.report for item in train_items or items])
    same = [_words_of(best)] * len(truth)
    constant = bleu(same, truth)
    # The released protocol cuts references to 150 words and replaces unknown words, which flatters.
    known = set(run.config["vocabulary"])
    released = [" ".join(word if word in known else "<unk>" for word in text.split()[:data.MOST_WORDS])
                for text in truth]
    said = [" ".join(filter(data.has_words, report.split())) for report in reports]  # no full stops
    starts = [data.report_words(item.report, with_stops=True)[:data.MOST_WORDS] for item in items]
    most = [" ".join(filter(data.has_words, words)) for words in starts]
    counts = np.stack([_bleu_counts(*pair) for pair in zip(said, truth)])  # (n, 10)
    source = "training" if train_items else "same"
    words = "Chinese characters" if any(map(data.CHARACTER.search, truth)) else "words"
    result = {"chance": constant[3],
              "per_class": {f"BLEU-{n}": score for n, score in enumerate(_bleu(counts), 1)},
              "protocol": f"{words} of whole references; chance: a constant report of the {source} "
                          "part",
              "more": {"bleu_released": bleu(said, released), "bleu_constant": constant,
                       "bleu_at_most": bleu(most, truth),
                       "ROUGE-L": float(np.mean(list(map(rouge_l, said, truth)))),
                       "ROUGE-L_constant": float(np.mean(list(map(rouge_l, same, truth)))),
                       "findings": score_findings(items, reports, best, known),
                       "distinct_reports": len(set(said)) / len(said),
                       "distinct_true_reports": len(set(truth)) / len(truth)}}
    return result, lambda drawn: _bleu(drawn)[3], _patients(items), counts


def candidates(items):
    """What counts as one candidate of a retrieval: {protocol: groups of places in items}. "scans" takes
    the first of CT-RATE's train_1_a_1, train_1_a_2, …; "unique findings" has all of one report."""
    scans, by_report = {}, defaultdict(list)
    for i in sorted(range(len(items)), key=lambda i: items[i].id):
        scan = re.sub(r"((train|valid)_\d+_[a-z]+)_\d+(\.\w+)*$", r"\1", items[i].id)
        scans.setdefault(scan, [i])
        by_report[items[i].report].append(i)
    return {"volumes": [[i] for i in range(len(items))], "scans": sorted(scans.values()),
            "unique findings": sorted(by_report.values())}


def _recalls(ranks):
    shares = {f"Recall@{k}": float((ranks <= k).mean()) if k < len(ranks) else math.nan for k in KS}
    return {**shares, "mean_rank": float(ranks.mean()), "median_rank": float(np.median(ranks))}


def score_retrieval(run, items, volumes, out, train_items):
    """Recall@K of reports that look for their volume and back, by the protocols of `candidates`; the
    most similar volume of a candidate counts. volumes: features (n, E)"""
    reports = text_features(run.network, [item.report for item in items])
    similarity = (reports @ volumes.T).numpy()  # rows: reports
    protocols, ranks, groupings = {}, {}, candidates(items)
    for name, groups in groupings.items():
        first, n = [group[0] for group in groups], len(groups)
        rows = similarity[first]
        best = np.stack([rows[:, group].max(1) for group in groups], 1)  # (n, n)
        ranks[name] = retrieval_ranks(best), retrieval_ranks(best.T)
        forth, back = map(_recalls, ranks[name])
        protocols[name] = {"n": n, "ids_sha1": _hash(items[i] for i in first), **forth,
                           **{f"chance of Recall@{k}": min(1.0, k / n) for k in KS},
                           "chance of mean_rank": (n + 1) / 2, "volume to report": back}
    if out:
        rows = [[item.id, rank] for item, rank in zip(items, ranks["volumes"][0])]
        _write_csv(out / "ranks.csv", ["id", "rank"], rows)
        plot_recall(ranks, out / "recall.png")
    counted = "unique findings" if run.config["task"] == "retrieval" else "volumes"
    found, ranks = protocols[counted], ranks[counted][0]
    patients = _patients(items)[[group[0] for group in groupings[counted]]]
    # With few volumes Recall@50 is trivial: the largest K up to n / 10; 5, or 1 for fewer than 10.
    n = len(ranks)
    largest = max(5, min(n / 10, int(run.task.metric.split("@")[1])))
    k = max((k for k in KS if k <= largest and 2 * k <= n), default=1)
    result = {"metric": f"Recall@{k}", "chance": min(1.0, k / n), "n": n,
              "per_class": {f"Recall@{k}": found[f"Recall@{k}"] for k in KS},
              "protocol": f"{counted}: a report finds its own among all; ties count against it",
              "more": {"protocols": protocols}}
    return result, lambda drawn: float((drawn <= k).mean()) if k < n else math.nan, patients, ranks


# How a kind predicts and scores, and why it may have no value
KINDS = {"classify": (predict_log_odds, score_classes, "the items that count have not both classes"),
         "prompt": (predict_log_odds, score_classes, "no finding that some items have and some have not"),
         "segment": (predict_masks, score_masks, "no scan has any class"),
         "report": (predict_reports, score_reports, "no report"),
         "retrieve": (predict_features, score_retrieval, "an item that is alone always finds itself")}


def evaluate(run, items, out=None, progress=True, train_items=()):
    """The number of a task as a dict: task, metric, value, its 95 % interval, n, patients, chance, protocol,
    split, ids_sha1, per_class and positives by name, `more` of its kind; `reason` for a value of nan.
    out: folder of pictures and predictions; train_items: for the constant report."""
    run.network.eval()
    if out:
        out.mkdir(parents=True, exist_ok=True)
    predict, score, no_value = KINDS[run.task.kind]
    scores, metric, patients, *arrays = score(run, items, predict(run, items, progress), out, train_items)
    is_finite = np.isfinite(arrays[0]).all()
    value = metric(*arrays) if is_finite else math.nan
    interval = bootstrap(metric, *arrays, patients=patients) if is_finite else (math.nan, math.nan)
    result = {"task": run.config["task"], "metric": run.task.metric, "value": value, "interval": interval,
              "n": len(items), "patients": len(set(patients)), "positives": {},
              "split": "+".join(sorted({item.split for item in items})), "ids_sha1": _hash(items)}
    if math.isnan(value):
        result["reason"] = no_value if is_finite else "predictions that are not finite"
    return result | scores  # scores may name another metric and n


def predict_scan(run, item, out, index=()):
    """Print and write a mask, probabilities, a report, or the nearest reports of the items `index`"""
    kind = run.task.kind
    predict = predict_classes if kind in ("classify", "prompt") else KINDS[kind][0]
    [prediction] = predict(run, [item], progress=True)
    if kind == "segment":
        path = _own_path(out, f"{_file_names([item])[0]}_mask.nii.gz", item)
        labels, affine = prediction
        nib.save(nib.Nifti1Image(labels, affine), path)
        voxel = abs(np.linalg.det(affine[:3, :3])) / 1000           # millilitres
        lines = [f"{name:40s} {(labels == k).sum() * voxel:10.2f} ml"
                 for k, name in enumerate(run.task.classes, 1)]
    elif kind == "report":
        path = _own_path(out, "report.txt", item)
        path.write_text(prediction + "\n", encoding="utf-8")
        lines = [prediction]
    elif kind == "retrieve":
        path = _own_path(out, "retrieved.csv", item)
        ids = {other.report: other.id for other in index}  # two reconstructions, one report
        similarity = (text_features(run.network, list(ids)) @ prediction).tolist()
        rows = sorted(zip(similarity, ids.values(), ids), reverse=True)[:10]
        _write_csv(path, ["similarity", "id", "report"], rows)
        lines = [f"{score:.3f}  {name}  {text:.160}" for score, name, text in rows]
    else:
        path = _own_path(out, "probabilities.csv", item)
        rows = list(zip(run.task.classes, prediction.tolist()))
        _write_csv(path, ["class", "probability"], rows)
        lines = [f"{name:40s} {probability:.3f}" for name, probability in rows]
    print(*lines, f"wrote {path}", sep="\n")


def _hash(items):
    return hashlib.sha1("\n".join(sorted(item.id for item in items)).encode()).hexdigest()


def _write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def _file_names(items):
    """The ids without their endings as names of files. ValueError if two are alike."""
    names = [data.file_name(data.ENDING.sub("", item.id)) for item in items]
    alike = [item.volume for item, name in zip(items, names) if names.count(name) > 1]
    if alike:
        raise ValueError(f"found the same name for masks of {data.shorten(alike)}")
    return names


def _own_path(out, name, item):
    """OUT/name, after a hash if OUT/inputs.json says that it belongs to another scan"""
    notes, scan = out / "inputs.json", str(item.volume.resolve())
    owners = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
    if owners.get(name, scan) != scan:
        name = f"{hashlib.sha1(scan.encode()).hexdigest()[:8]}_{name}"
    write_result(owners | {name: scan}, notes)
    return out / name


def without_nan(content):
    """JSON has no NaN and no infinity: null"""
    return json.loads(json.dumps(content), parse_constant=lambda name: None)


def write_result(result, path):
    text = json.dumps(without_nan(result), indent=1, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with data.written_whole(path) as file:
        file.write(text.encode())


def summary(result):
    reason = f", for {result['reason']}" if "reason" in result else ""
    value = f"{result['metric']} {result['value']:.3f} {span(result['interval'])}{reason}"
    n = f"n = {result['n']} ({result['split']})"
    return f"{result['task']}: {value}, {n}, chance {result['chance']:.3f}"


def print_classes(metric, per_class, positives, intervals):
    print(f"{'':40s} {'positives':>9s} {metric:>9s}")
    for name, value in per_class.items():
        interval = f"  {span(intervals[name])}" if name in intervals else ""
        print(f"{name:40s} {positives.get(name, ''):>9} {value:9.3f}{interval}")


def print_protocols(protocols):
    """The table of a retrieval: each protocol in both directions, and chance"""
    columns = [*(f"Recall@{k}" for k in KS), "mean_rank"]
    print(f"{'':33s} {'n':>6s}", *(f"{column:>10s}" for column in columns))
    for name, found in protocols.items():
        chance = {column: found[f"chance of {column}"] for column in columns}
        rows = {"report to volume": found, "volume to report": found["volume to report"], "chance": chance}
        for way, row in rows.items():
            print(f"{name:16s} {way:16s} {found['n']:6d}", *(f"{row[column]:10.3f}" for column in columns))


def print_result(result):
    more = json.loads(json.dumps(result["more"]), parse_float=lambda digits: round(float(digits), 3))
    intervals, protocols = more.pop("intervals", {}), more.pop("protocols", None)
    if protocols:                               # they hold the numbers of per_class
        print_protocols(protocols)
    else:
        print_classes(result["metric"], result["per_class"], result["positives"], intervals)
    for name, value in more.items():
        for key, content in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"{name} {key}".replace("_", " ").strip() + f": {json.dumps(content, ensure_ascii=False)}")
    print(f"{result['protocol']}; ids {result['ids_sha1'][:10]}\n{summary(result)}")


# -------------------------------- pictures

@contextlib.contextmanager
def figure(path, rows=1, columns=1, width=4.2, height=4.2, projection=None):
    """Axes (rows, columns) of width × height inches each, saved when the block ends"""
    fig, axes = plt.subplots(rows, columns, figsize=(columns * width, rows * height), squeeze=False,
                             layout="constrained", subplot_kw={"projection": projection})
    yield axes
    fig.savefig(path)
    plt.close(fig)


def _show(ax, picture, title="", **options):
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1, **options)
    ax.set_title(title)
    ax.axis("off")


def _coronal(volume, y=None):
    """(1, D, H, W) -> slice (D, W) at y, else the middle: head up, the patient's right on the left"""
    y = volume.shape[2] // 2 if y is None else y
    return volume[0, :, y].flip(0, 1).float().cpu().numpy()


def plot_curves(rows, out):
    """One panel a loss over steps, with a running mean. rows: the dicts of log.jsonl"""
    names = [name for name in ("loss", *model.LOSSES, "valid") if any(name in row for row in rows)]
    with figure(out, 1, len(names), 2.6, 2.4) as axes:
        for ax, name in zip(axes[0], names):
            points = [(row["step"], row[name]) for row in rows if name in row]
            steps, values = np.array(points, float).T           # None becomes NaN, a gap
            width = max(1, len(values) // 10)
            means = np.convolve(values, np.ones(width) / width, "valid")
            ax.plot(steps, values, color="0.8", lw=0.8)
            if name in rows[0].get("nothing", {}):
                ax.axhline(rows[0]["nothing"][name], color="tab:red", ls="--", lw=0.8)
            ax.plot(steps[width - 1:], means, marker="o" if len(values) == 1 else "")
            ax.set(title=name, xlabel="step")


@torch.no_grad()
def plot_reconstruction(network, batch, out):
    """Coronal slices of three volumes: as they are, masked, and with the masked part rebuilt"""
    recon = network(batch)["recon"].float().clamp(0, 1)
    volume, mask = batch["volume"], batch["volume_mask"]
    pictures = {"volume": volume, "masked": volume.masked_fill(mask, 0),
                "reconstructed": torch.where(mask, recon, volume)}
    height = 2.5 * volume.shape[2] / volume.shape[4] + 0.2
    with figure(out, min(3, len(volume)), 3, 2.5, height) as axes:
        for i, row in enumerate(axes):
            for ax, (title, volumes) in zip(row, pictures.items()):
                _show(ax, _coronal(volumes[i]), title)


def plot_attention(network, item, volume, out):
    """Where four sentences of a report look in a volume (1, D, H, W), beside the lesions of a phantom"""
    sentences, maps = sentence_maps(network, volume, item.report)
    shape = volume.shape[1:]
    places = data.lesions(item, shape)                                              # (18, D, H, W)
    lesions = [places[findings(sentence)].any(0) for sentence in sentences]         # (D, H, W) each
    chosen = sorted(range(len(sentences)), key=lambda i: not lesions[i].any())[:4]  # lesions first
    grid = [side // network.encoder.stride for side in shape]
    maps = F.interpolate(maps.unflatten(1, grid)[:, None], shape, mode="trilinear")
    with figure(out, 1, len(chosen), 3.2, 3.2 * shape[0] / shape[2] + 0.3) as axes:
        for ax, i in zip(axes[0], chosen):
            y = int(lesions[i].sum((0, 2)).argmax()) if lesions[i].any() else None
            _show(ax, _coronal(volume, y), textwrap.shorten(sentences[i], 45, placeholder=" …"))
            ax.imshow(_coronal(maps[i], y), cmap="inferno", alpha=0.45)
            if lesions[i].any():
                ax.contour(_coronal(lesions[i][None], y), [0.5], colors="cyan", linewidths=1)


def plot_roc(scores, truth, classes, out):
    """The ROC curve of each class: scores (n, K), truth (n, K) of 0, 1 and NaN = unknown"""
    with figure(out, 1, 1, 6.4) as [[ax]]:
        ax.set_prop_cycle(color=plt.get_cmap("tab20").colors)
        ax.plot([0, 1], [0, 1], color="0.8", label="chance 0.500")
        for name, score, label in zip(classes, scores.T, truth.T):
            known = ~np.isnan(label)
            score, label = score[known], label[known]
            if 0 < label.sum() < len(label):
                ax.plot(*roc(score, label), label=f"{name} {auroc(score, label):.3f}")
        ax.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
        ax.figure.legend(title="AUC", loc="outside right upper")


def plot_recall(ranks, out):
    """Recall@K over K of reports. ranks: {protocol: those of the reports, those of the volumes}"""
    with figure(out) as [[ax]]:
        for name, (found, _) in ranks.items():
            ks = np.arange(1, len(found) + 1)
            line = ax.ecdf(found, label=f"{name} (n = {len(found)})")
            ax.plot(ks, ks / len(found), color=line.get_color(), ls="--", lw=0.8)
        ax.set(xscale="log", xlabel="K", ylabel="Recall@K; dashed: chance", xlim=(1, None))
        ax.legend()


def plot_overlay(examples, out):
    """Scans and, below, what was marked (Fig. 7 of the paper): slices (y, x) in RAS.
    examples: (title, image in [0, 1], pred, truth, Dice, height of a pixel in widths)"""
    paint = np.array([(0, 0, 0, 0), (0.1, 0.8, 0.2, 0.75), (0.95, 0.15, 0.1, 0.75), (1, 0.85, 0, 0.75)])
    with figure(out, 2, len(examples), 2.8, 3) as axes:
        for (top, bottom), (title, image, pred, truth, score, aspect) in zip(axes.T, examples):
            kind = np.select([(pred == truth) & (truth > 0), pred > 0, truth > 0], [1, 2, 3])
            options = {"origin": "lower", "aspect": aspect, "interpolation": "nearest"}
            _show(top, image[:, ::-1], title[-32:], **options)
            _show(bottom, image[:, ::-1], f"Dice {score:.3f}", **options)
            bottom.imshow(paint[kind][:, ::-1], **options)
        patches = [Patch(color=colour) for colour in paint[1:]]
        names = "correct", "wrong", "missing"
        axes[0, 0].figure.legend(patches, names, loc="outside lower center", ncols=3)


def write_comparison(rows, path):
    """Generated beside true reports, a word a line. rows: dicts of id, generated, truth"""
    generated = " ".join(f"{row['id']} {row['generated']}" for row in rows)
    truth = " ".join(f"{row['id']} {row['truth']}" for row in rows)
    page = difflib.HtmlDiff().make_file(generated.split(), truth.split(), "generated", "true")
    path.write_text(page, encoding="utf-8")


def plot_radar(columns, methods, out):
    """One axis a task from chance (centre) to the best value (rim), one line a method (Fig. 8).
    columns: {task and metric: {method: result}}; where a value is missing there is a gap."""
    values, chances = [], []
    for by_method in columns.values():
        values.append([by_method.get(method, {}).get("value") for method in methods])
        chances.append([next(iter(by_method.values()))["chance"]])
    values, chances = np.array(values, float), np.array(chances, float)     # None becomes NaN
    best = np.nanmax(values, 1, keepdims=True)
    radii = (values - chances) / np.maximum(best - chances, 1e-9)           # (tasks, methods)
    labels = [f"{name}\n{low:.3g} … {high:.3g}" for name, [low], [high] in zip(columns, chances, best)]
    angles = np.linspace(0, 2 * math.pi, len(columns) + 1)
    with figure(out, 1, 1, 6.4, 5.6, projection="polar") as [[ax]]:
        ax.plot(angles, np.clip([*radii, radii[0]], 0, 1), marker="o", ms=3, label=methods)
        ax.set(theta_zero_location="N", theta_direction=-1, ylim=(0, 1), yticklabels=[])
        ax.set_xticks(angles[:-1], labels)
        ax.tick_params(pad=24)
        ax.figure.legend(loc="outside right upper")


# -------------------------------- commands

def load_encoder(checkpoint, name=None, merging="auto"):
    """An encoder with the weights of a file -> (encoder, config of the run or {})"""
    config = model.flags_of(model.read_checkpoint(checkpoint))
    name = name or config.get("encoder")
    if name is None:
        raise ValueError(f"{checkpoint} does not say which encoder it holds: give --encoder "
                         f"{'|'.join(model.ENCODERS)}")
    encoder = model.build_encoder(name)
    model.load_weights(encoder, checkpoint, merging)
    return encoder, config


def load_as_run(args):
    """The encoder of any file of weights -> Run, whose task has the size and source of HU"""
    encoder, config = load_encoder(args.checkpoint, args.encoder, args.merging)
    is_whole = "task" not in config or data.TASKS[config["task"]].view == "whole"   # no patch
    size = args.size or is_whole and config.get("size") or data.SIZE
    data.check_size(size, min(16, encoder.stride))      # the last map alone is used
    check_preprocessing(config, args.checkpoint)
    task = PRETRAINING._replace(size=tuple(size), hu=args.hu or config.get("hu", "auto"))
    return Run(encoder.to(DEVICE), task, config, args.cache, DEVICE)


def load_pretrained(path, cache="cache", device="cpu"):
    """last.pt of pretrain.py -> Run of an MG3D in eval mode. ValueError for any other file."""
    checkpoint = model.read_checkpoint(path)
    config = model.flags_of(checkpoint)
    if "task" in config or "mlm_prob" not in config:
        raise data.wrong(path, "no text side", "last.pt of pretrain.py")
    check_preprocessing(config, path)
    network = model.build_network("pretrain", 0, config, model.local_file(path).parent)
    model.restore(network, checkpoint, path)
    task = PRETRAINING._replace(size=tuple(config["size"]), hu=config["hu"])
    return Run(network.to(device).eval(), task, config, cache, device)


def patients_of(path):
    """Hashes of the patients that a file of ours was trained on, as far as it tells; None of others' files"""
    state = model.read_checkpoint(path)
    config, notes = model.flags_of(state), model.notes_of(state)
    if not config:
        return None
    return {*notes.get("patients", ()), *(config.get("pretrained_on") or ()), *config.get("patients", ())}


def count_seen(items, hashes, source):
    """How many patients of items to test on were pre-trained on; a warning if any. None: unknown"""
    if hashes is None:
        return None
    patients = {item.patient for item in items}
    seen = data.patient_hashes(patients) & set(hashes)
    if seen:
        log.warning("warning: %d of %d patients of the test part bear names of patients that %s was "
                    "trained on", len(seen), len(patients), source)
    return len(seen)


def probe_command(args):
    run = load_as_run(args)
    listed = data.load_items(args.data, args.cache)
    fit, held_out = split_labelled(listed)
    items = data.prepare_all(fit + held_out, args.cache, 2, run.task)
    inputs = items, args.cache, run.task.size, run.task.hu, args.batch_size
    features = probe_features(run.network, *inputs)
    left_out = len(listed) - len(fit) - len(held_out)
    if left_out:
        log.warning("%s: left out %d of %d volumes without all 18 labels", args.data, left_out, len(listed))
    scores, truth = probe(features, items)
    tested = split_labelled(items)[1]
    patients = _patients(tested)
    value, interval = macro_auroc(scores, truth), bootstrap(macro_auroc, scores, truth, patients=patients)
    per_class = dict(zip(data.LABELS, auroc(scores, truth)))
    print_classes("AUC", per_class, dict(zip(data.LABELS, truth.sum(0).astype(int))), {})
    print(f"macro AUC of {how_many(per_class.values())} {value:.3f} {span(interval)}, "
          f"n = {len(truth)}, chance 0.500")
    seen = count_seen(tested, patients_of(args.checkpoint), args.checkpoint)
    result = {"macro_auc": value, "interval": interval, "n": len(truth), "patients": len(set(patients)),
              "chance": 0.5, "auc": per_class, "patients_seen_in_pretraining": seen,
              "checkpoint": str(args.checkpoint)}
    if math.isnan(value):
        result["reason"] = KINDS["prompt"][2]
    untrained = untrained_encoder(run.config) if "mlm_prob" in run.config else None
    if untrained is not None:                   # of a run of pretrain.py
        before = probe_features(untrained.to(DEVICE), *inputs)
        result["gain"] = compare_probes(before, features, items, args.few)
        print(say_probe(result["gain"]))
    write_result(result, (args.out or args.checkpoint.parent / "probe") / "probe.json")


def tested_part(items, split, source):
    """The items of a part; without a name of test, or of valid, or all. ValueError if there are none."""
    for name in [split] if split else ["test", "valid"]:
        part = [item for item in items if item.split == name]
        if part:
            return part
    if split:
        raise data.wrong(source, f"nothing for the part {split}", "another --split")
    return items


def read_prompts(path):
    """A CSV name,positive,negative -> K names and 2K texts in the order of `data.prompts`"""
    pairs = {}
    for where, row in data.read_table(path, "name", "positive", "negative"):
        pair = row["positive"], row["negative"]
        if row["name"] in (*pairs, "") or not all(map(data.has_words, pair)) or pair[0] == pair[1]:
            raise data.wrong(where, f"the name {row['name']!r} and the texts {pair}",
                             "a name that is there once and two texts that differ")
        pairs[row["name"]] = pair
    if not pairs:
        raise data.wrong(path, "no row", "at least one of name,positive,negative")
    return tuple(pairs), list(itertools.chain(*pairs.values()))


def label_items(items, names, source):
    """The items that have any of these labels, of the 18 or of other columns of a manifest"""
    if set(names) <= set(data.LABELS):
        columns = [data.LABELS.index(name) for name in names]
        labels = {item.id: item.labels[columns] for item in items if item.labels is not None}
    elif Path(source).is_file():
        labels = data.read_labels(source, names)
    else:
        raise data.wrong(source, f"no columns {data.shorten(names)}", "a manifest with them")
    labelled = data.with_labels(items, labels, source)
    if not labelled:
        raise data.wrong(source, f"no label of {data.shorten(names)}", "some, or other --prompts")
    return labelled


def towers_command(args):
    """zeroshot and retrieval: volumes against texts, by the features of a dual encoder"""
    config = model.flags_of(model.read_checkpoint(args.checkpoint))
    load = load_checkpoint if "task" in config else load_pretrained
    run = load(args.checkpoint, args.cache, DEVICE)
    if getattr(run.network, "text_pool", None) is None:
        raise data.wrong(args.checkpoint, "no projection of whole reports", "last.pt of a run with --clip, "
                         "or best.pt of ct-rate-vocab or ct-rate-retrieval")
    teacher = config.get("task") or ("--clip" if config.get("clip") else "nothing")
    if config.get("permute_reports"):
        teacher += " with the reports of other patients"
        log.warning("warning: %s was trained with --permute_reports: expect chance", args.checkpoint)
    if teacher == "nothing":
        log.warning("warning: %s was trained without --clip, the only loss that compares the features "
                    "of volumes and reports: expect chance", args.checkpoint)
    items = tested_part(data.load_items(args.data, args.cache), args.split, args.data)
    task, texts = run.task._replace(kind="retrieve", metric="Recall@50"), None
    checked, source = data.some_reports(items), args.data
    if args.command == "zeroshot":
        names, texts = data.LABELS, data.demo_prompts() if args.data == "demo" else None
        if args.prompts:
            names, texts = read_prompts(args.prompts)
        items = label_items(items, names, args.data)
        task = run.task._replace(kind="prompt", metric="AUC", classes=names)
        checked, source = texts or data.prompts(names), args.prompts or "the prompts"
    data.check_reports(run.network.text_encoder, checked, source)
    run = run._replace(task=task, config=run.config | {"task": args.command, "prompts": texts})
    seen = count_seen(items, patients_of(args.checkpoint), args.checkpoint)
    save_evaluation(run, items, args.out or args.checkpoint.parent / args.command,
                    score=f"cosine of pooled features, taught by {teacher}",
                    checkpoint=str(args.checkpoint), patients_seen_in_training=seen)


def save_evaluation(run, items, out, train_items=(), **more):
    """Evaluate on items, print and write the result with what is added to its `more`."""
    items = data.prepare_all(items, run.cache, run.config["workers"], run.task)
    result = evaluate(run, items, out, train_items=train_items)
    result["more"] |= more
    print_result(result)
    write_result(result, out / "result.json")
    print(f"wrote {out / 'result.json'}")


def pairing_command(args):
    network, task, config, *_ = load_pretrained(args.checkpoint, args.cache, DEVICE)
    held_out = [item for item in data.load_items(args.data, args.cache) if item.split != "train"]
    data.check_prepared(held_out, task.size, task.hu)
    items = list({item.patient: item for item in held_out}.values())    # one report a patient
    size = min(args.batch_size, len(items))
    if size < 2:
        raise data.wrong(args.data, f"{len(items)} held-out patients", "at least two in a batch")
    count_seen(items, patients_of(args.checkpoint), args.checkpoint)
    tokenizer = network.text_encoder.tokenizer
    settings = {name: config[name] for name in ("hu", "mask_size", "mask_ratio", "mlm_prob")}
    make = functools.partial(data.pretraining_example, tokenizer=tokenizer, cache=args.cache,
                             size=task.size, **settings)
    examples, batches = data.Examples(items, make, args.seed), []
    rng = np.random.default_rng(args.seed)
    order = rng.permutation(len(items))
    for shuffle in range(3):                                            # other neighbours, other masks
        for i in range(0, len(order) - size + 1, size):                 # batches of equal size
            chosen = [examples[int(index), shuffle] for index in rng.permutation(order[i:i + size])]
            batches.append(data.collate(chosen, tokenizer.pad_token_id))
    enabled = [name for name in model.LOSSES if name in network.losses]
    result = pairing(network, batches, enabled, config["temperature"])
    print(say_pairing(result))
    out = args.out or args.checkpoint.parent
    write_result(result, out / "pairing.json")
    plot_pairing(result, out / "pairing.png")
    print(f"wrote {out / 'pairing.json'} and pairing.png")
    if isinstance(network.sentence_attention, model.SentenceAttention):
        item = next(item for item in items if item.id == batches[0]["ids"][0])
        volume = data.load_volume(item, args.cache, task.size, task.hu)
        plot_attention(network, item, volume, out / "pairing_attention.png")
        print(f"wrote {out / 'pairing_attention.png'}: where sentences of {item.id} look")


def find_scans(folder):
    """The scans in a folder: volume files, folders of DICOM, folders of pictures alone; or itself"""
    scans = []
    for root, _, names in data.walk(folder):
        paths = [root / name for name in names if name != "DICOMDIR"]
        volumes = [path for path in paths if data.ENDING.search(path.name)]
        others = set(paths) - set(volumes)
        has_pictures = any(path.suffix.lower() in (".png", ".jpg", ".jpeg") for path in others)
        if any(map(data.is_dicom, others)) or (has_pictures and not volumes):
            scans.append(root)
        scans += volumes
    return sorted(scans) or [folder]


def embed_command(args):
    """Features of every scan of a folder; a scan that cannot be read is named and left out."""
    run = load_as_run(args)
    source = args.input.absolute()              # . has a name then
    scans = find_scans(source)
    ids, rows = [], []
    for scan in tqdm(scans, desc="embed", unit="scan", disable=None):
        name = scan.name if scan == source else scan.relative_to(source).as_posix()
        try:
            item = data.Item(name, scan, "", None, name)
            rows.append(global_features(run.network, [item], run.cache, run.task.size, run.task.hu))
            ids.append(name)
        except ValueError as error:
            log.warning("left out %s", error)
    if not ids:
        raise data.wrong(args.input, "no scan that can be read", "a scan or a folder of them")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    features = np.concatenate(rows).astype(np.float32)
    with data.written_whole(args.out) as file:
        np.savez(file, ids=np.array(ids), features=features)
    print(f"wrote {args.out}: features {features.shape}; {len(scans) - len(ids)} scans left out")


class ImageFeature(torch.nn.Module):
    """The image half of an MG3D: (B, 1, D, H, W) -> global features of length 1 (B, E)"""

    def __init__(self, network):
        super().__init__()
        self.encoder, self.image_proj = network.encoder, network.image_proj

    def forward(self, volume):
        tokens = self.image_proj(self.encoder(volume)[-1].flatten(2).mT)            # (B, N, E)
        return F.normalize(tokens.mean(1), dim=-1)


@torch.no_grad()
def export_command(args):
    """A graph for one volume on a CPU. It is written if, read again, it gives our numbers."""
    config = model.flags_of(model.read_checkpoint(args.checkpoint))
    if "task" in config and (args.encoder or args.hu or args.merging != "auto"):
        raise data.wrong(args.checkpoint, "weights of a task", "no --encoder, --merging or --hu")
    run = load_checkpoint(args.checkpoint) if "task" in config else load_as_run(args)
    network, kind, size = run.network.cpu().eval(), run.task.kind, args.size or run.task.size
    stride = getattr(network, "encoder", network).stride
    data.check_size(size, min(16, stride) if kind == "classify" else stride)
    notes = {**run.task.settings(), "task": config.get("task"), "size": size,
             "crop": data.CROP if run.task.view == "whole" else None,
             "vocabulary": config.get("vocabulary"), "axes": "z, y, x of a scan in RAS",
             "values": "HU, window to [0, 1]" if run.task.window else "z-score of all voxels but 0"}
    inputs, name = {"volume": torch.rand(1, 1, *size)}, "maps" if kind == "encode" else "logits"
    if kind == "report":  # shorter reports end in padding, which no word before it sees
        inputs["tokens"] = torch.randint(len(notes["vocabulary"]), (1, network.max_length + 1))
    if kind == "prompt":  # log odds: (yes - no) / temperature, cosines of a feature and two texts
        texts = text_features(network, data.prompts(run.task.classes))
        notes |= {"texts": texts.tolist(), "temperature": config["temperature"]}
    if kind in ("prompt", "retrieve"):
        network, name = ImageFeature(network), "feature"
    expected = network(*inputs.values())
    tensors = expected if name == "maps" else [expected]
    notes["inputs"] = {key: list(tensor.shape) for key, tensor in inputs.items()}
    notes["outputs"] = {name: [list(tensor.shape) for tensor in tensors]}
    print("traced, written and read again: minutes for Swin-B in full size", flush=True)
    program = torch.export.export(network, tuple(inputs.values()), strict=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with data.written_whole(args.out) as file:
        torch.export.save(program, file, extra_files={"mg3d.json": json.dumps(notes)})
        file.flush()
        found = torch.export.load(file.name).module()(*inputs.values())
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    print(f"wrote {args.out}: from {notes['inputs']} to {notes['outputs']}")


def radar_command(args):
    """A table like the paper's, a row a method, and a chart"""
    columns = {}                                # {task and metric: {method: result}}
    for path in args.results:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            task, metric, *_ = (result[key] for key in ("task", "metric", "value", "chance"))
        except (ValueError, KeyError, TypeError) as error:
            raise data.wrong(path, repr(error), "a result.json of a task") from None
        folder = path.resolve().parent
        method = (folder.parent if folder.name == task else folder).name
        by_method = columns.setdefault(f"{task} {metric}", {})
        if method in by_method:
            raise data.wrong(path, f"a second result of {method} for {task}", "one")
        by_method[method] = result
        other, first = next(iter(by_method.items()))
        for key in ("split", "n", "ids_sha1", "protocol"):
            if key in result and key in first and result[key] != first[key]:
                log.warning("warning: %s cannot be compared with %s: another %s", path, other, key)
    methods = list(dict.fromkeys(itertools.chain(*columns.values())))
    print(f"| method | {' | '.join(columns)} |\n|{' --- |' * (1 + len(columns))}")
    for method in methods:
        row = [method]
        for column, by_method in columns.items():
            scale = 1 if "BLEU" in column else 100                      # BLEU comes in percent
            result = by_method.get(method, {})
            numbers = [result[name] for name in ("value", "std") if result.get(name) is not None]
            row.append("±".join(f"{scale * number:.2f}" for number in numbers))
        print(f"| {' | '.join(row)} |")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot_radar(columns, methods, args.out)
    print(f"wrote {args.out}: {len(methods)} methods")


def task_command(args):
    if not (args.task and args.checkpoint and (args.data or args.input)):
        raise ValueError("expected --task, --checkpoint, and --data or --input; see --help")
    run = load_checkpoint(args.checkpoint, args.cache, DEVICE)
    config, out = run.config, args.out or args.checkpoint.parent / "eval"
    if config["task"] != args.task:
        raise data.wrong(args.checkpoint, f"the task {config['task']}", f"--task {args.task}")
    items, chosen = [], []
    if args.data:
        fold = config["fold"] if args.fold is None else args.fold
        items = data.load_task(args.task, args.data, fold, config["seed"], cache=args.cache)
        classes = data.with_classes(run.task, items).classes
        if run.task.kind == "classify" and classes != run.task.classes:
            raise data.wrong(args.data, f"the labels {classes}", f"{run.task.classes} as in training")
        chosen = tested_part(items, args.split, args.data)
        if run.task.kind == "retrieve":
            data.check_reports(run.network.text_encoder, data.some_reports(chosen), args.data)
    if args.input:
        centre = args.centre
        if (centre is not None) != (run.task.view == "cube"):
            raise ValueError(f"{args.task}: expected {'no --centre' if centre else '--centre X Y Z'}")
        if run.task.kind == "retrieve" and not chosen:
            raise ValueError(f"{args.task}: expected --data with the reports to search")
        if centre and ".nii" not in args.input.name.lower():  # LPS to RAS
            centre = [-centre[0], -centre[1], centre[2]]
        name = args.input.name
        item = data.Item(name, args.input, "", None, name, centre=centre)
        return predict_scan(run, item, out, chosen)
    seen = seen_before = None
    if args.split == "test":
        seen = count_seen(chosen, config["patients"], args.checkpoint)
        seen_before = count_seen(chosen, config["pretrained_on"], config["init"])
    train_items = [item for item in items if item.split == "train"]
    save_evaluation(run, chosen, out, train_items, patients_seen_in_training=seen,
                    patients_seen_in_pretraining=seen_before)


COMMANDS = {None: task_command, "zeroshot": towers_command, "retrieval": towers_command,
            "probe": probe_command, "pairing": pairing_command, "embed": embed_command,
            "export": export_command, "radar": radar_command}

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        data.check_numbers(args)
        if str(vars(args).get("checkpoint")).startswith("hf:"):
            args.out = args.out or Path("eval", args.command or "")     # not into the hub's cache
            args.checkpoint = model.local_file(args.checkpoint)
        COMMANDS[args.command](args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
