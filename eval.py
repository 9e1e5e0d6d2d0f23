"""Metrics, prediction and pictures of MG-3D.

    python eval.py --task T --data DIR --checkpoint out/best.pt    a task's number with its interval
    python eval.py --task T --checkpoint out/best.pt --input SCAN  one scan: a mask, probabilities, a report
    python eval.py zeroshot --data demo --checkpoint out/last.pt   findings told by what a text says
    python eval.py retrieval --data demo --checkpoint out/last.pt  volumes found by reports, and back
    python eval.py probe --data demo --checkpoint out/last.pt      a linear probe of the 18 findings
    python eval.py pairing --data demo --checkpoint out/last.pt    which losses use the right report
    python eval.py embed --checkpoint out/encoder.pt --input DIR   features of scans, one row each
    python eval.py export --checkpoint out/best.pt --out MODEL.pt2 a graph for PyTorch, without this code
    python eval.py radar A/result.json B/result.json               methods and tasks in one chart

Accuracy, AUC, Dice and recall are shares of 1, BLEU and ROUGE-L are in percent.
"""
import argparse
import contextlib
import csv
import difflib
import functools
import hashlib
import html
import itertools
import json
import logging
import math
import re
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
    add("--data", help="demo, or the task's set in its own layout; with --input: the reports to search")
    add("--split", choices=["train", "valid", "test"], default="test", help="part to report on")
    add("--fold", type=int, help="of sets that have folds; else the fold of the training")
    add("--input", type=Path, help="instead of --data: one scan, any file or folder that data.py reads")
    add("--centre", type=float, nargs=3, metavar=("X", "Y", "Z"),
        help="candidate to look at, in mm: RAS for NIfTI, LPS for all else, as in LUNA16's CSV")
    add("--out", type=Path, help="folder for results; else eval, beside the checkpoint")
    add("--cache", default="cache", help="folder of preprocessed volumes")

    weights = argparse.ArgumentParser(add_help=False)
    add = weights.add_argument
    add("--checkpoint", required=True, help="a file or hf:owner/name[/file]: ours or what load_weights knows")
    add("--encoder", help="swin_b, swin_l, swin_t or unet, if the file does not say")
    add("--merging", default="auto", choices=["auto", "monai", "v0.9", "mergingv2"],
        help="of patches, likewise")
    add("--size", type=int, nargs=3, metavar=("D", "H", "W"), help="of the input, if the file does not say")
    add("--hu", choices=["auto", "header", "csv"], help="source of Hounsfield units, likewise")
    shared = argparse.ArgumentParser(add_help=False, parents=[weights])
    add = shared.add_argument
    add("--cache", default="cache", help="folder of preprocessed volumes")

    towers = argparse.ArgumentParser(add_help=False)
    add = towers.add_argument
    add("--checkpoint", required=True, help="last.pt of pretrain.py; best.pt or last.pt of "
        "ct-rate-vocab or ct-rate-retrieval")
    add("--data", required=True, help="demo, a manifest, CT-RATE or cache folder, or a CTRG-Chest .json")
    add("--split", choices=["train", "valid", "test"], help="part to report on; else test, without "
        "one valid, without both all")
    add("--cache", default="cache", help="folder of preprocessed volumes")

    commands = parser.add_subparsers(dest="command")
    add = commands.add_parser("zeroshot", parents=[towers], formatter_class=Help).add_argument
    add("--prompts", type=Path, help="CSV name,positive,negative: two texts for each label column of "
        "that name; else 'NAME.' and 'not NAME.' of the 18, for the demo in words of its reports")
    add("--out", type=Path, default="out/zeroshot", help="folder for result.json and pictures")
    add = commands.add_parser("retrieval", parents=[towers], formatter_class=Help).add_argument
    add("--out", type=Path, default="out/retrieval", help="folder for result.json and a picture")
    add = commands.add_parser("probe", parents=[shared], formatter_class=Help).add_argument
    add("--data", required=True, help="demo, a manifest with labels, or a CT-RATE folder")
    add("--batch_size", type=int, default=8, help="volumes at a time")
    add("--few", type=int, default=100, help="labels of a second probe, the mean of 10 draws")
    add("--out", type=Path, default="out/probe", help="folder for probe.json")
    add = commands.add_parser("pairing", formatter_class=Help).add_argument
    add("--checkpoint", type=Path, required=True, help="last.pt of pretrain.py, or hf:owner/name/last.pt")
    add("--data", required=True, help="demo, or what the checkpoint was trained on; its held-out part counts")
    add("--cache", default="cache", help="folder of preprocessed volumes")
    add("--batch_size", type=int, default=24, help="volumes that stand against each other")
    add("--seed", type=int, default=0, help="of the batches and masks")
    add("--out", type=Path, help="folder for pairing.json and pairing.png; else that of the checkpoint")
    add = commands.add_parser("embed", parents=[shared], formatter_class=Help).add_argument
    add("--input", type=Path, required=True, help="a scan, or a folder of scans at any depth")
    add("--out", type=Path, default="embeddings.npz", help="ids (n,) and features (n, C) float32")
    add = commands.add_parser("export", parents=[weights], formatter_class=Help, description="The network "
        "of a task of finetune.py, or the encoder of any other file, for torch.export.load.").add_argument
    add("--out", type=Path, default="model.pt2", help="graph, weights, and mg3d.json: what goes in and out")
    add = commands.add_parser("radar", formatter_class=Help).add_argument
    add("results", type=Path, nargs="+", help="result.json files; the method is their key `method`, else "
        "the name of their folder, or of the one above where that is named after the task")
    add("--out", type=Path, default="radar.png", help="the chart")
    return parser


if __name__ == "__main__":  # before torch is imported: --help answers at once
    args = flags().parse_args()

import matplotlib
import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F
from sacrebleu.metrics import BLEU
from scipy.special import expit, logsumexp
from scipy.stats import rankdata
from tqdm import tqdm

import data
import losses
import model

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch

plt.rcParams.update({"font.size": 8, "axes.titlesize": 8, "legend.frameon": False, "savefig.dpi": 120})
log = logging.getLogger("mg3d")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SACREBLEU = BLEU(tokenize="none", smooth_method="none", effective_order=True)
PENALTIES = np.logspace(-1, 5, 25)  # of the ridge regression
WEIGHTED = "mean weighted by positives"
KS = (1, 5, 10, 50, 100)            # of Recall@K
# How a scan becomes an input, for those who have an exported file alone
VIEWS = {"whole": f"its middle, {data.CROP} of the sides, resized (trilinear)",
         "slices": "resized (trilinear) to 4/3 of height and width, of which the middle",
         "cube": "a part of this size around the candidate, not resampled",
         "box": f"its middle {data.BOX:.0f} mm, padded with air, resized (trilinear)",
         "patch": "resampled (trilinear) to `spacing` mm, parts of this size that overlap by `overlap`"}


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


def bootstrap(metric, *arrays, times=1000, seed=0):
    """95 % percentile interval of metric(*arrays) over resampled items (dim 0): (low, high), lists for
    a metric of several numbers; nan for fewer than two items"""
    rng, n = np.random.default_rng(seed), len(arrays[0])
    if n < 2:
        return math.nan, math.nan
    samples = (rng.integers(0, n, n) for _ in range(times))
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


def ridge(x, y, x_new, penalties=PENALTIES):
    """Ridge regression, its penalty by leave-one-out error: (n, C), (n, k), (m, C) -> (m, k)"""
    mean, std = x.mean(0), x.std(0) + 1e-8
    x, x_new = (x - mean) / std, (x_new - mean) / std
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    y_mean = y.mean(0)
    uty = u.T @ (y - y_mean)
    errors = []
    for penalty in penalties:
        shrink = s ** 2 / (s ** 2 + penalty)
        leverage = np.einsum("ij,j,ij->i", u, shrink, u) + 1 / len(x)
        residual = (y - y_mean - u @ (shrink[:, None] * uty)) / (1 - leverage)[:, None]
        errors.append((residual ** 2).mean())  # each item predicted by all others
    penalty = penalties[np.argmin(errors)]
    return x_new @ (vt.T @ ((s / (s ** 2 + penalty))[:, None] * uty)) + y_mean


def split_labelled(items):
    """Items with all 18 labels -> (those of the split train, the others)"""
    labelled = [item for item in items if item.labels is not None and not np.isnan(item.labels).any()]
    fit = [item for item in labelled if item.split == "train"]
    held_out = [item for item in labelled if item.split != "train"]
    if not fit or not held_out:
        raise ValueError(f"labelled volumes of the split train and others: found {len(fit)} and "
                         f"{len(held_out)}, expected some of both")
    return fit, held_out


def probe_features(encoder, items, cache, size, hu="auto", batch_size=8):
    """Features of the labelled items to fit on (n, C) and of those held out (m, C)"""
    groups = split_labelled(items)
    return [global_features(encoder, group, cache, size, hu, batch_size) for group in groups]


def probe(features, items, rows=slice(None)):
    """Scores of a linear probe, fitted on some rows, and labels of the held-out items: (m, 18) each.
    Scores are nan for a finding that none or all have."""
    y, truth = (np.array([item.labels for item in group], float) for group in split_labelled(items))
    x, y = features[0][rows], y[rows]
    return np.where(y.min(0) < y.max(0), ridge(x, y, features[1]), math.nan), truth


def untrained_encoder(config):
    """The encoder as a run of pretrain.py with these flags began; None if --init cannot be read"""
    torch.manual_seed(config["seed"])
    encoder = model.build_encoder(config["encoder"])
    try:
        if config["init"]:
            model.load_weights(encoder, config["init"], config.get("merging", "auto"))
        return encoder
    except ValueError as error:
        log.warning("no untrained encoder to compare with: %s", error)


def compare_probes(untrained, pretrained, items, few=0):
    """Linear probes on `probe_features` of two encoders: macro AUCs, their paired difference [low,
    value, high] and, with `few`, those with that many training items, means of 10 draws"""
    def gain(before, after, truth):
        return macro_auroc(after, truth) - macro_auroc(before, truth)
    (before, truth), (after, _) = probe(untrained, items), probe(pretrained, items)
    low, high = bootstrap(gain, before, after, truth)
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
    return {"k": k, "value": float(hits.mean()), "interval": list(bootstrap(np.mean, hits)),
            "chance": k / len(items), "n": len(items)}


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
    grid, patients = [side // network.encoder.stride for side in size], []
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
            patients.append(np.mean(rows, 0))
    inside, random, others = np.transpose(patients)
    means = {"inside": inside.mean(), "random": random.mean(), "others": others.mean()}
    return {**means, "interval": list(bootstrap(np.mean, inside - random)),
            "interval_to_others": list(bootstrap(np.mean, inside - others)), "n": len(patients)}


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
    …}}: for true pairs, and with the volumes of a batch handed on by one; over patients or batches.
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
    _, place = np.unique(np.concatenate([batch["ids"] for batch in batches]), return_inverse=True)
    result = {}
    for name, (own, other) in units.items():
        difference = np.subtract(other, own)
        if name in BY_PATIENT:  # a patient counts once, however often it was seen
            difference = np.bincount(place, difference) / np.bincount(place)
        low, high = bootstrap(np.mean, difference)
        result[name] = {"own": float(np.mean(own)), "other": float(np.mean(other)),
                        "interval": [low, high], "gradient_cosine": _mean(cosines[name]),
                        "uses_report": bool(low > 0)}
        if len(batches) < 8:
            result[name] |= {"uses_report": None, "reason": f"{len(batches)} batches, fewer than 8"}
    return result


def say_pairing(result):
    lines = [f"{'loss':5s} {'own report':>10s} {'another':>10s}  {'difference':24s} gradients' cosine"]
    for name, row in result.items():
        own, other, (low, high) = row["own"], row["other"], row["interval"]
        difference = f"{other - own:+.4f} [{low:+.4f}, {high:+.4f}]"
        verdict = "does not use the report"
        if row["uses_report"]:
            verdict = f"uses the report, for {(other - own) / abs(own):.1%} of its value"
        elif row["uses_report"] is None:
            verdict = "too few batches to say"
        lines.append(f"{name:5s} {own:10.4f} {other:10.4f}  {difference:24s} "
                     f"{row['gradient_cosine']:+.3f}  {verdict}")
    return "\n".join(lines)


def plot_pairing(result, out):
    """How much worse each loss is with another patient's report, in percent of its value"""
    with figure(out, 1, 1, 4.6, 3) as [[ax]]:
        for name, row in result.items():
            percent = 100 / abs(row["own"])
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


def load_checkpoint(path, cache="cache", device="cpu"):
    """best.pt of finetune.py -> Run, its network in eval mode. ValueError for any other file."""
    path = model.local_file(path)
    checkpoint = model.read_checkpoint(path)
    config = model.flags_of(checkpoint)
    if config.get("task") not in data.TASKS:
        raise ValueError(f"{path}: found the task {config.get('task')}, expected best.pt of "
                         f"finetune.py for one of {', '.join(data.TASKS)}")
    task = data.TASKS[config["task"]]._replace(**checkpoint["task"])  # of the training
    network = model.build_network(task.kind, len(task.classes), config, path.parent)
    model.restore(network, checkpoint, path)
    return Run(network.to(device).eval(), task, config, cache, device)


def _run_on_volumes(network, cache, size, hu, batch_size):
    """A run that sees the volumes of pre-training"""
    task = data.TASKS["ct-rate-vocab"]._replace(size=tuple(size), hu=hu)
    return Run(network, task, {"batch_size": batch_size}, cache, next(network.parameters()).device)


def _bar(steps, text, shown):
    return tqdm(steps, desc=text, leave=False, disable=None if shown else True)


def _batches(run, items, progress=True):
    """The network's inputs (B, 1, D, H, W), in the order of the items"""
    size = run.config["batch_size"]
    for i in _bar(range(0, len(items), size), "predict", progress and len(items) > 1):
        inputs = [data.network_input(item, run.task, run.cache) for item in items[i:i + size]]
        yield torch.stack(inputs).to(run.device)


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
# Each gives the part of the result that differs by kind, a metric and the arrays it is taken of.

def score_classes(run, items, scores, out, train_items):
    """Accuracy of exclusive classes, AUC of a single class or of the last one `among` another,
    otherwise the mean AUC. scores: log odds (n, K)"""
    task, names = run.task, run.task.classes
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
        pred, label = scores.argmax(1), truth.argmax(1)
        result |= {"chance": float(np.bincount(label).max() / len(label)),
                   "per_class": {name: _mean(pred[label == k] == k) for k, name in enumerate(names)},
                   "protocol": "all items; chance: the commonest class", "more": {"auc": aucs}}
        return result, accuracy, pred, label
    if len(names) > 1 and not task.among:
        result["protocol"] = f"all items, mean of {how_many(aucs.values())}"
        if task.kind == "prompt":
            one, other, *_ = run.config.get("prompts") or ("{name}.", "not {name}.")
            result["protocol"] += f", '{one}' against '{other}' and so on"
        if out:
            rows = auc_table(scores, truth, names)
            plot_aucs(rows, out / "auc.png")
            spans = {name: [low, high] for name, (low, _, high) in rows.items() if name in aucs}
            result["more"] = {"weighted_auc": rows[WEIGHTED], "intervals": spans}
        return result, macro_auroc, scores, truth
    counted = ~np.isnan(truth[:, -1])
    if task.among:  # as STOIC asks: severe among COVID-19
        counted &= truth[:, names.index(task.among)] == 1
        result["more"] = {"auc_all_items": aucs[names[-1]], "n_all_items": len(items)}
    result["n"] = int(counted.sum())
    result["protocol"] = f"{names[-1]} among {task.among or 'all items'}"
    return result, auroc, scores[counted, -1], truth[counted, -1]


def auc_table(scores, truth, classes):
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
    low, high = (np.broadcast_to(end, len(names)) for end in bootstrap(metric, scores, truth))
    return dict(zip(names, np.transpose([low, metric(scores, truth), high]).tolist()))


def score_masks(run, items, masks, out, train_items):
    """Dice of scans in their own grid. masks: (labels, affine) of each, one at a time"""
    names, values = run.task.classes, range(1, 1 + len(run.task.classes))
    scores, constant, false_alarms, examples = [], [], 0, []
    for (labels, affine), item, file_name in zip(masks, items, _file_names(items)):
        pred = nib.apply_orientation(labels, nib.io_orientation(affine)).T  # (z, y, x), RAS
        truth = data.read_volume(item.mask, is_mask=True)[0]
        scores.append(dice(pred, truth, 1 + len(names)))
        constant.append([dice(np.full_like(truth, k), truth, 1 + k)[-1] for k in values])
        false_alarms += sum(k in pred and k not in truth for k in values)
        if out:
            (out / "masks").mkdir(exist_ok=True)
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
    return result, _mean, cases


def score_findings(items, reports, constant, vocabulary):
    """Do reports name the findings of the labels or, where no item has any, of the true reports? Beside
    them the true reports, the most that can be told, and a constant report"""
    if not vocabulary & {".", "。"}:
        reason = "the generator has no full stop: where does a denial end?"
        return {"generated": None, "reason": reason}
    texts = {"generated": reports, "true report": [item.report for item in items],
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
    """Of 100 reports the one that fits 200 best, by BLEU-4"""
    rng = np.random.default_rng(0)
    some, sample = ([reports[i] for i in rng.permutation(len(reports))[:n]] for n in (100, 200))
    sample = list(map(_words_of, sample))

    def fit(report):
        return bleu([_words_of(report)] * len(sample), sample)[3]
    return max(sorted(set(some)), key=fit)


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
    released = [" ".join(word if word in known else "<unk>" for word in text.split()[:150])
                for text in truth]
    said = [" ".join(filter(data.has_words, report.split())) for report in reports]  # no full stops
    counts = np.stack([_bleu_counts(*pair) for pair in zip(said, truth)])  # (n, 10)
    source = "training" if train_items else "same"
    words = "Chinese characters" if any(map(data.CHARACTER.search, truth)) else "words"
    result = {"chance": constant[3],
              "per_class": {f"BLEU-{n}": score for n, score in enumerate(_bleu(counts), 1)},
              "protocol": f"{words} of whole references; chance: a constant report of the {source} "
                          "part",
              "more": {"bleu_released": bleu(said, released), "bleu_constant": constant,
                       "ROUGE-L": float(np.mean(list(map(rouge_l, said, truth)))),
                       "ROUGE-L_constant": float(np.mean(list(map(rouge_l, same, truth)))),
                       "findings": score_findings(items, reports, best, known),
                       "distinct_reports": len(set(said)) / len(said),
                       "distinct_true_reports": len(set(truth)) / len(truth)}}
    return result, lambda drawn: _bleu(drawn)[3], counts


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
    protocols, ranks = {}, {}
    for name, groups in candidates(items).items():
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
    # With few volumes Recall@50 is trivial: the largest K up to n / 10; 5, or 1 for fewer than 10.
    n = len(ranks)
    largest = max(5, min(n / 10, int(run.task.metric.split("@")[1])))
    k = max((k for k in KS if k <= largest and 2 * k <= n), default=1)
    result = {"metric": f"Recall@{k}", "chance": min(1.0, k / n), "n": n,
              "per_class": {f"Recall@{k}": found[f"Recall@{k}"] for k in KS},
              "protocol": f"{counted}: a report finds its own among all; ties count against it",
              "more": {"protocols": protocols}}
    return result, lambda drawn: float((drawn <= k).mean()) if k < n else math.nan, ranks


KINDS = {"classify": (predict_log_odds, score_classes), "prompt": (predict_log_odds, score_classes),
         "segment": (predict_masks, score_masks), "report": (predict_reports, score_reports),
         "retrieve": (predict_features, score_retrieval)}
NO_VALUE = {"classify": "the items that count have not both classes", "segment": "no scan has any class",
            "prompt": "no finding that some items have and some have not", "report": "no report",
            "retrieve": "an item that is alone always finds itself"}


def evaluate(run, items, out=None, progress=True, train_items=()):
    """The number of a task as a dict: task, metric, value, its 95 % interval, n, chance, protocol, split,
    ids_sha1, per_class and positives by name, `more` that its kind adds. A value that cannot be computed is
    nan, and `reason` says why. Pictures and predictions go to the folder `out`; one of train_items becomes
    the constant report.
    """
    run.network.eval()
    if out:
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
    predict, score = KINDS[run.task.kind]
    scores, metric, *arrays = score(run, items, predict(run, items, progress), out, train_items)
    result = {"task": run.config["task"], "metric": run.task.metric, "value": metric(*arrays),
              "interval": bootstrap(metric, *arrays), "n": len(items), "positives": {},
              "split": "+".join(sorted({item.split for item in items})), "ids_sha1": _hash(items)}
    if math.isnan(result["value"]):
        known = np.isfinite(arrays[0]).all()
        result["reason"] = NO_VALUE[run.task.kind] if known else "predictions that are not finite"
    return result | scores  # scores may name another metric and n


def predict_scan(run, item, out, index=()):
    """Print and write to `out`: a mask, probabilities, a report, or the nearest reports of `index` (items)"""
    out.mkdir(parents=True, exist_ok=True)
    kind, classes = run.task.kind, run.task.classes
    predict = predict_classes if kind in ("classify", "prompt") else KINDS[kind][0]
    [prediction] = predict(run, [item], progress=True)
    mask = f"{_file_name(item)}_mask.nii.gz"
    names = {"segment": mask, "report": "report.txt", "retrieve": "retrieved.csv"}
    path = _own_path(out, names.get(kind, "probabilities.csv"), item)
    if kind == "segment":
        labels, affine = prediction
        nib.save(nib.Nifti1Image(labels, affine), path)
        for k, name in enumerate(classes, 1):
            millilitres = (labels == k).sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
            print(f"{name:40s} {millilitres:10.2f} ml")
    elif kind == "report":
        path.write_text(prediction + "\n", encoding="utf-8")
        print(prediction)
    elif kind == "retrieve":
        ids = {other.report: other.id for other in index}  # two reconstructions, one report
        similarity = (text_features(run.network, list(ids)) @ prediction).tolist()
        ranked = sorted(zip(similarity, ids.items()), reverse=True)[:10]
        rows = [(rank, name, score, report) for rank, (score, (report, name)) in enumerate(ranked, 1)]
        _write_csv(path, ["rank", "id", "similarity", "report"], rows)
        for rank, name, score, report in rows[:5]:
            print(f"{rank:3d}  {score:.3f}  {name}  {textwrap.shorten(report, 160)}")
    else:
        rows = list(zip(classes, prediction.tolist()))
        _write_csv(path, ["class", "probability"], rows)
        for name, probability in rows:
            print(f"{name:40s} {probability:.3f}")
    print(f"wrote {path}")


def _hash(items):
    return hashlib.sha1("\n".join(sorted(item.id for item in items)).encode()).hexdigest()


def _write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def _file_name(item):
    """The id without its ending as the name of a file"""
    return data.file_name(data.ENDING.sub("", item.id))


def _file_names(items):
    """`_file_name` of each; ValueError if a second one would overwrite the file of the first"""
    first = {}
    for item in items:
        other = first.setdefault(_file_name(item), item)
        if other is not item:
            raise ValueError(f"found {other.volume} and {item.volume} for the mask {_file_name(item)}, "
                             "expected scans that differ in more than the ending of their names")
    return list(first)


def _own_path(out, name, item):
    """OUT/name, or another name where that belongs to another scan; OUT/inputs.json tells whose each is"""
    notes, scan = out / "inputs.json", item.volume.resolve()
    owners = json.loads(notes.read_text(encoding="utf-8")) if notes.exists() else {}
    names = itertools.chain([name, f"{scan.parent.name}_{name}"], (f"{k}_{name}" for k in itertools.count(2)))
    name = next(name for name in names if owners.get(name, str(scan)) == str(scan))
    write_result(owners | {name: str(scan)}, notes)
    return out / name


def without_nan(content):
    """JSON has no NaN and no infinity: null"""
    return json.loads(json.dumps(content), parse_constant=lambda name: None)


def write_result(result, path):
    text = json.dumps(without_nan(result), indent=1, ensure_ascii=False)
    with data.written_whole(Path(path)) as file:
        file.write(text.encode())


def summary(result):
    """The number of a task in one line"""
    reason = f", for {result['reason']}" if "reason" in result else ""
    return (f"{result['task']}: {result['metric']} {result['value']:.3f} {span(result['interval'])}{reason}, "
            f"n = {result['n']} ({result['split']}), chance {result['chance']:.3f}")


def print_result(result):
    positives, more = result["positives"], dict(result["more"])
    intervals, protocols = more.pop("intervals", {}), more.pop("protocols", None)
    if protocols:               # they hold the numbers of per_class
        print(say_protocols(protocols))
    else:
        print(f"{'':40s} {'positives':>9s} {result['metric']:>9s}" if positives else "")
        for name, value in result["per_class"].items():
            interval = f"  {span(intervals[name])}" if name in intervals else ""
            print(f"{name:40s} {positives.get(name, ''):>9} {value:9.3f}{interval}")
    more = json.loads(json.dumps(more), parse_float=lambda digits: round(float(digits), 3))
    for name, value in more.items():
        for key, content in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"{name} {key}".replace("_", " ").strip() + f": {json.dumps(content, ensure_ascii=False)}")
    print(f"{result['protocol']}; ids {result['ids_sha1'][:10]}\n{summary(result)}")


def say_protocols(protocols):
    """The table of a retrieval: each protocol in both directions, and chance"""
    columns = [*(f"Recall@{k}" for k in KS), "mean_rank"]
    lines = [f"{'':33s} {'n':>6s} " + " ".join(f"{column:>10s}" for column in columns)]
    for name, found in protocols.items():
        rows = {"report to volume": found, "volume to report": found["volume to report"],
                "chance": {column: found[f"chance of {column}"] for column in columns}}
        for direction, row in rows.items():
            numbers = [*(f"{row[column]:10.3f}" for column in columns[:-1]), f"{row['mean_rank']:10.1f}"]
            lines.append(f"{name:16s} {direction:16s} {found['n']:6d} {' '.join(numbers)}")
    return "\n".join(lines)


# -------------------------------- pictures

@contextlib.contextmanager
def figure(path, rows=1, columns=1, width=4.2, height=4.2, legend_outside=False, projection=None):
    """Axes (rows, columns) of width × height inches each, saved when the block ends"""
    fig, axes = plt.subplots(rows, columns, figsize=(columns * width, rows * height), squeeze=False,
                             layout=None if legend_outside else "constrained",
                             subplot_kw={"projection": projection})
    yield axes
    fig.savefig(path, bbox_inches="tight" if legend_outside else None)
    plt.close(fig)


def _show(ax, picture, title="", **options):
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1, **options)
    ax.set_title(title)
    ax.axis("off")


def _coronal(volume, y=None):
    """(1, D, H, W) -> a coronal slice (D, W), else the middle: head up, the patient's right on the left"""
    y = volume.shape[2] // 2 if y is None else y
    return volume[0, :, y].flip(0, 1).float().cpu().numpy()


def plot_curves(rows, out):
    """One panel a loss over steps, with a running mean. rows: the dicts of log.jsonl"""
    names = [name for name in ("loss", *model.LOSSES, "valid") if any(name in row for row in rows)]
    with figure(out, 1, len(names), 2.6, 2.4) as axes:
        for ax, name in zip(axes[0], names):
            points = [(row["step"], row[name]) for row in rows if name in row]
            steps, values = np.array(points, float).T  # None becomes NaN, a gap
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
    flatness = volume.shape[2] / volume.shape[4]
    with figure(out, min(3, len(volume)), 3, 2.5, 2.5 * flatness + 0.2) as axes:
        for i, row in enumerate(axes):
            for ax, (title, volumes) in zip(row, pictures.items()):
                _show(ax, _coronal(volumes[i]), title if i == 0 else "")


def plot_attention(network, item, volume, out):
    """Where four sentences of a report look, on slices through their lesions if item.mask has them: volume
    (1, D, H, W)"""
    sentences, maps = sentence_maps(network, volume, item.report)
    lesions = {}
    if item.mask:
        places = data.lesions(item, volume.shape[1:])
        stated = {i: places[findings(sentence)].any(0) for i, sentence in enumerate(sentences)}
        lesions = {i: place for i, place in stated.items() if place.any()}
    chosen = sorted(range(len(sentences)), key=lambda i: i not in lesions)[:4]  # lesions first
    grid = [side // network.encoder.stride for side in volume.shape[1:]]
    maps = F.interpolate(maps.unflatten(1, grid)[:, None], volume.shape[1:], mode="trilinear")
    flatness = volume.shape[1] / volume.shape[3]
    with figure(out, 1, len(chosen), 3.2, 3.2 * flatness + 0.3) as axes:
        for ax, i in zip(axes[0], chosen):
            lesion = lesions.get(i)
            y = None if lesion is None else int(lesion.sum((0, 2)).argmax())
            _show(ax, _coronal(volume, y), textwrap.shorten(sentences[i], 45, placeholder=" …"))
            ax.imshow(_coronal(maps[i], y), cmap="inferno", alpha=0.45)
            if lesion is not None:
                ax.contour(_coronal(lesion[None], y), [0.5], colors="cyan", linewidths=1)


def plot_roc(scores, truth, classes, out):
    """One ROC curve a class that has both kinds: scores (n, K), truth (n, K) of 0, 1 and NaN = unknown"""
    colours = plt.get_cmap("tab20" if len(classes) > 10 else "tab10").colors
    with figure(out, legend_outside=True) as [[ax]]:
        ax.plot([0, 1], [0, 1], color="0.8", lw=1, label="chance 0.500")
        for k, (name, colour) in enumerate(zip(classes, colours)):
            known = ~np.isnan(truth[:, k])
            score, label = scores[known, k], truth[known, k]
            if 0 < label.sum() < len(label):
                ax.plot(*roc(score, label), color=colour, label=f"{name} {auroc(score, label):.3f}")
        ax.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.005),
               aspect="equal")
        ax.legend(title="AUC", loc="upper left", bbox_to_anchor=(1, 1))


def plot_aucs(rows, out):
    """Each AUC with its interval, the largest on top, the means below. rows: of `auc_table`"""
    *others, mean, weighted = rows.items()
    others.sort(key=lambda row: -row[1][1])
    with figure(out, 1, 1, 5.6, 0.8 + 0.19 * len(rows)) as [[ax]]:
        ax.axvline(0.5, color="tab:red", ls="--", lw=0.8)
        for place, (_, (low, value, high)) in enumerate([*others, mean, weighted]):
            colour = "tab:blue" if place < len(others) else "black"
            ax.plot([low, high], [place, place], color=colour, lw=1.2)
            ax.plot(value, place, marker="o", ms=4, color=colour)
        ax.axhline(len(others) - 0.5, color="0.8", lw=0.8)
        ax.set_yticks(range(len(rows)), [name for name, _ in [*others, mean, weighted]])
        ax.set(xlabel="AUC and its 95 % interval; dashed: chance", ylim=(len(rows) - 0.4, -0.6))


def plot_recall(ranks, out):
    """Recall@k over k with chance. ranks: {protocol: those of the reports, those of the volumes}"""
    curves = {}  # protocols that have the same candidates share one
    for name, both in ranks.items():
        curves.setdefault(np.array(both).tobytes(), (both, []))[1].append(name)
    titles = "reports look for volumes", "volumes look for reports"
    with figure(out, 1, 2, 3.6, 3.4) as [axes]:
        for side, (ax, title) in enumerate(zip(axes, titles)):
            for both, names in curves.values():
                n = len(both[side])
                ks = np.arange(1, n + 1)
                recall = np.searchsorted(np.sort(both[side]), ks, side="right") / n
                [line] = ax.step(ks, recall, where="post", label=f"{', '.join(names)} (n = {n})")
                ax.plot(ks, ks / n, color=line.get_color(), ls="--", lw=0.8)
            ax.set(xscale="log", xlabel="k", title=title, xlim=(1, None), ylim=(0, 1.005))
            ax.set_xticks([k for k in KS if k < n], [k for k in KS if k < n])
        axes[0].set(ylabel="Recall@k; dashed: chance")
        curves = axes[0].get_legend_handles_labels()
        axes[0].figure.legend(*curves, loc="outside lower center", ncols=3)


def plot_overlay(examples, out):
    """Scans and, below, what was marked (Fig. 7 of the paper): slices (y, x) in RAS.

    examples: (title, image in [0, 1], pred, truth, Dice, height of a pixel in widths)
    """
    colours = {"correct": (0.1, 0.8, 0.2), "wrong": (0.95, 0.15, 0.1), "missing": (1, 0.85, 0)}
    with figure(out, 2, len(examples), 2.8, 3) as axes:
        for (top, bottom), (title, image, pred, truth, score, aspect) in zip(axes.T, examples):
            rgb = np.repeat(np.clip(image, 0, 1)[..., None], 3, -1)
            places = (pred == truth) & (truth > 0), (pred != truth) & (pred > 0), (pred == 0) & (truth > 0)
            for where, colour in zip(places, colours.values()):
                rgb[where] = 0.25 * rgb[where] + 0.75 * np.array(colour)
            options = {"origin": "lower", "aspect": aspect, "interpolation": "nearest"}
            _show(top, image[:, ::-1], title[-32:], **options)
            _show(bottom, rgb[:, ::-1], f"Dice {score:.3f}", **options)
        patches = [Patch(color=colour, label=name) for name, colour in colours.items()]
        axes[0, 0].figure.legend(handles=patches, loc="outside lower center", ncols=3)


def write_comparison(rows, path):
    """Generated beside true reports, a word a line. rows: dicts of id, generated, truth"""
    tables = [difflib.HtmlDiff().make_table(row["generated"].split(), row["truth"].split(),
                                              html.escape(row["id"]), "true") for row in rows]
    style = "<meta charset='utf-8'><style>.diff_add, .diff_chg, .diff_sub { background: #fbb }</style>"
    path.write_text("<hr>".join([style, *tables]), encoding="utf-8")


def plot_radar(results, methods, out):
    """One axis a task from chance (the centre) to the best value (the rim), one line a method (Fig. 8).

    results: {task: {method: result of `evaluate`}}; a method without a task has a gap there.
    """
    labels, radii = [], []
    for task, by_method in results.items():
        values = np.array([by_method.get(method, {}).get("value", math.nan) for method in methods])
        best, first = np.nanmax(values), next(iter(by_method.values()))
        labels.append(f"{task}\n{first['metric']} {first['chance']:.3g} … {best:.3g}")
        radii.append((values - first["chance"]) / max(best - first["chance"], 1e-9))
    angles = np.linspace(0, 2 * math.pi, len(results) + 1)
    with figure(out, 1, 1, 6.4, 5.6, legend_outside=True, projection="polar") as [[ax]]:
        ax.set(theta_zero_location="N", theta_direction=-1, ylim=(0, 1))
        ax.set_yticks([0.25, 0.5, 0.75, 1], [])
        ax.plot(angles, np.clip([*radii, radii[0]], 0, 1), marker="o", ms=3, label=methods)
        ax.set_xticks(angles[:-1], labels)
        for label, side in zip(ax.get_xticklabels(), np.sin(angles).round(3)):
            label.set_horizontalalignment("center" if side == 0 else "left" if side > 0 else "right")
        ax.legend(loc="upper left", bbox_to_anchor=(1.15, 1.1))


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


def _encoder_of(args):
    """The encoder of probe and embed on its device, its input size, source of HU, config of its run or {}"""
    encoder, config = load_encoder(args.checkpoint, args.encoder, args.merging)
    whole = "task" not in config or data.TASKS[config["task"]].view == "whole"  # else the size of a patch
    size = args.size or whole and config.get("size") or data.SIZE
    for name, ours in (("crop", data.CROP), ("window", data.WINDOW)):
        if tuple(config.get(name, ours)) != ours:
            log.warning("warning: %s was trained with the %s %s, here it is %s", args.checkpoint, name,
                        config[name], ours)
    return encoder.to(DEVICE), tuple(size), args.hu or config.get("hu", "auto"), config


def patients_of(path):
    """Hashes of the patients that a file of weights was trained on, as far as it tells"""
    state = model.read_checkpoint(path)
    config = model.flags_of(state)
    notes = model.notes_of(state)
    noted = notes if config or notes is not state else {}       # not those of others
    return {*noted.get("patients", ()), *config.get("pretrained_on", ()),
            *data.patient_hashes(config.get("patients", ()))}


def count_seen(items, hashes, source):
    """How many patients of items to test on were pre-trained on; a warning if any"""
    patients = {item.patient for item in items}
    seen = data.patient_hashes(patients) & set(hashes)
    if seen:
        log.warning("warning: %d of %d patients of the test part bear names of patients that %s was trained "
                    "on: the number may be too good", len(seen), len(patients), source)
    return len(seen)


def probe_command(args):
    encoder, size, hu, config = _encoder_of(args)
    items = data.load_items(args.data, args.cache)
    features = probe_features(encoder, items, args.cache, size, hu, args.batch_size)
    left_out = len(items) - sum(map(len, features))
    if left_out:
        log.warning("%s: left out %d of %d volumes without all 18 labels", args.data, left_out, len(items))
    scores, truth = probe(features, items)
    value, interval = macro_auroc(scores, truth), bootstrap(macro_auroc, scores, truth)
    per_class = dict(zip(data.LABELS, auroc(scores, truth)))
    print(f"{'finding':40s} positives   AUC")
    for (name, auc), positives in zip(per_class.items(), truth.sum(0)):
        print(f"{name:40s} {int(positives):9d}  {auc:.3f}")
    print(f"macro AUC of {how_many(per_class.values())} {value:.3f} {span(interval)}, "
          f"n = {len(truth)}, chance 0.500")
    result = {"macro_auc": value, "interval": interval, "n": len(truth), "chance": 0.5, "auc": per_class}
    held_out, trained_on = split_labelled(items)[1], patients_of(args.checkpoint)
    result["patients_seen_in_pretraining"] = count_seen(held_out, trained_on, args.checkpoint)
    if math.isnan(value):
        result["reason"] = NO_VALUE["prompt"]
    untrained = untrained_encoder(config) if "mlm_prob" in config else None     # of a run of pretrain.py
    if untrained is not None:
        before = probe_features(untrained.to(DEVICE), items, args.cache, size, hu, args.batch_size)
        result["gain"] = compare_probes(before, features, items, args.few)
        print(say_probe(result["gain"]))
    args.out.mkdir(parents=True, exist_ok=True)
    write_result(result, args.out / "probe.json")


def load_pretrained(path, device="cpu"):
    """last.pt of pretrain.py -> (MG3D in eval mode, its flags). ValueError for any other file."""
    checkpoint = model.read_checkpoint(path)
    config = model.flags_of(checkpoint)
    if "task" in config or "mlm_prob" not in config:
        raise ValueError(f"{path}: found no text side, expected last.pt of pretrain.py")
    network = model.build_network("pretrain", 0, config, model.local_file(path).parent)
    model.restore(network, checkpoint, path)
    return network.to(device).eval(), config


def load_towers(path, cache="cache", device="cpu"):
    """last.pt of pretrain.py, or a checkpoint of a task with texts -> Run, and which loss taught its score,
    in words. ValueError for a file without the projection of one side."""
    config = model.flags_of(model.read_checkpoint(path))
    if "task" in config:
        run, teacher = load_checkpoint(path, cache, device), f"the loss of {config['task']}"
    else:
        network, config = load_pretrained(path, device)
        task = data.TASKS["ct-rate-vocab"]._replace(size=tuple(config["size"]), hu=config["hu"])
        run = Run(network, task, config, cache, device)
        teacher = "--clip" if config.get("clip") else "nothing"
    if getattr(run.network, "text_pool", None) is None:
        raise data.wrong(path, "no projection of whole reports", "last.pt of pretrain.py with --clip, "
                         "or a checkpoint of ct-rate-vocab or ct-rate-retrieval")
    if teacher == "nothing":
        log.warning("warning: %s was trained without --clip, the only loss that brings the pooled "
                    "features of a volume and of its report together: expect chance", path)
    return run, f"cosine of pooled features, taught by {teacher}"


def tested_part(items, split, source):
    """The items of a part: of test, if there are none of valid, or else all. ValueError if none is left."""
    names = [split] if split else ["test", "valid"]
    parts = [[item for item in items if item.split == name] for name in names]
    chosen = next(filter(None, parts), [] if split else items)
    if not chosen:
        raise data.wrong(source, f"nothing for the part {split}", "another --split")
    return chosen


def read_prompts(path):
    """A CSV name,positive,negative -> K names and 2K texts in the order of `data.prompts`"""
    names, texts = [], []
    for where, row in data.read_table(path, "name", "positive", "negative"):
        name, *pair = row["name"], row["positive"], row["negative"]
        is_pair = all(map(data.has_words, pair)) and pair[0] != pair[1]
        if not name or name in names or not is_pair:
            raise data.wrong(where, f"the name {name!r} and the texts {pair}",
                             "a name that is there once and two texts that differ")
        names.append(name)
        texts += pair
    if not names:
        raise data.wrong(path, "no row", "at least one of name,positive,negative")
    return tuple(names), texts


def label_items(items, names, source):
    """The items that have any of these labels: of the 18, or other columns of the manifest `source`"""
    if set(names) <= set(data.LABELS):
        columns = [data.LABELS.index(name) for name in names]
        labels = {item.id: item.labels[columns] for item in items if item.labels is not None}
    elif Path(source).is_file():
        labels = data.read_labels(source, names)
    else:
        others = [name for name in names if name not in data.LABELS]
        raise data.wrong(source, f"no label columns {others}", "a manifest .csv that has them")
    labelled = data.with_labels(items, labels, source)
    if not labelled:
        raise data.wrong(source, f"no label of {data.shorten(names)} for {len(items)} volumes",
                         "some, or --prompts that names other label columns")
    return labelled


def zeroshot_command(args):
    names, texts = data.LABELS, data.demo_prompts() if args.data == "demo" else None
    if args.prompts:
        names, texts = read_prompts(args.prompts)
    items = tested_part(data.load_items(args.data, args.cache), args.split, args.data)
    items = label_items(items, names, args.data)
    run, score = load_towers(args.checkpoint, args.cache, DEVICE)
    prompts, tokenizer = texts or data.prompts(names), run.network.text_encoder.tokenizer
    run.network.text_encoder.check_words(prompts, args.prompts or "the prompts")
    unknown = [text for text in prompts if tokenizer.unk_token in tokenizer.tokenize(text)]
    if unknown:
        log.warning("warning: the text encoder lacks words of %d of %d prompts: %s", len(unknown),
                    len(prompts), data.shorten(unknown))
    task = run.task._replace(kind="prompt", metric="AUC", classes=names)
    run = run._replace(task=task, config=run.config | {"task": "zeroshot", "prompts": texts})
    evaluate_towers(run, items, args, score)


def retrieval_command(args):
    items = tested_part(data.load_items(args.data, args.cache), args.split, args.data)
    run, score = load_towers(args.checkpoint, args.cache, DEVICE)
    task = run.task._replace(kind="retrieve", metric="Recall@50")
    run = run._replace(task=task, config=run.config | {"task": "retrieval"})
    evaluate_towers(run, items, args, score)


def evaluate_towers(run, items, args, score):
    """Evaluate on items, print and write the result."""
    seen = count_seen(items, patients_of(args.checkpoint), args.checkpoint)
    items = data.prepare_all(items, args.cache, run.config["workers"], run.task)
    result = evaluate(run, items, args.out)
    result["more"] |= {"score": score, "patients_seen_in_training": seen}
    save_result(result, args.out)


def pairing_command(args):
    network, config = load_pretrained(args.checkpoint, DEVICE)
    held_out = [item for item in data.load_items(args.data, args.cache) if item.split != "train"]
    data.check_prepared(held_out, config["size"], config["hu"])
    items = list({item.patient: item for item in held_out}.values())    # a second scan has the same report
    if len(items) < 2 or args.batch_size < 2:
        raise ValueError(f"{args.data}: found {len(items)} held-out patients and --batch_size "
                         f"{args.batch_size}, expected at least two of each")
    count_seen(items, patients_of(args.checkpoint), args.checkpoint)
    tokenizer = network.text_encoder.tokenizer
    make = functools.partial(data.pretraining_example, tokenizer=tokenizer, cache=args.cache,
                             **{name: config[name] for name in ("hu", "mask_size", "mask_ratio", "mlm_prob")},
                             size=tuple(config["size"]))
    examples, size = data.Examples(items, make, args.seed), min(args.batch_size, len(items))
    batches = []
    for shuffle in range(3):
        order = np.random.default_rng((args.seed, shuffle)).permutation(len(items))
        for i in range(0, len(order) - size + 1, size):                 # batches of equal size
            chosen = [examples[int(index), shuffle] for index in order[i:i + size]]
            batches.append(data.collate(chosen, tokenizer.pad_token_id))
    if len(batches) < 8:
        log.warning("%s: only %d batches of %d: too few for a verdict", args.data, len(batches), size)
    enabled = [name for name in model.LOSSES if name in network.losses]
    result = pairing(network, batches, enabled, config["temperature"])
    print(say_pairing(result))
    out = args.out or args.checkpoint.parent
    out.mkdir(parents=True, exist_ok=True)
    write_result(result, out / "pairing.json")
    plot_pairing(result, out / "pairing.png")
    print(f"wrote {out / 'pairing.json'} and pairing.png")


def find_scans(folder):
    """What a folder holds at any depth: volume files, folders of DICOM, and folders of pictures that have no
    volume beside them; if there is nothing of these, every folder of files that may be slices"""
    scans, unknown, notes = [], [], re.compile(r".*\.(csv|json|txt)|DICOMDIR", re.IGNORECASE)
    for root, _, files in data.walk(folder):
        paths = [root / name for name in files if not notes.fullmatch(name)]
        volumes = [path for path in paths if data.ENDING.search(path.name)]
        others = [path for path in paths if not data.ENDING.search(path.name)]
        has_pictures = any(path.suffix.lower() in (".png", ".jpg", ".jpeg") for path in others)
        if any(map(data.is_dicom, others)) or (has_pictures and not volumes):
            scans.append(root)
        if others:
            unknown.append(root)
        scans += volumes
    return sorted(scans or unknown)


def embed_command(args):
    """Features of every scan of a folder; a scan that cannot be read is named and left out."""
    if args.out.suffix != ".npz":
        raise ValueError(f"--out {args.out}: expected a name that ends in .npz")
    encoder, size, hu, _ = _encoder_of(args)
    is_folder = args.input.is_dir()
    scans = find_scans(args.input) if is_folder else [args.input]
    ids, rows, failures = [], [], []
    for scan in tqdm(scans, desc="embed", unit="scan", disable=None):
        is_below = is_folder and scan != args.input
        name = scan.relative_to(args.input).as_posix() if is_below else scan.name or scan.resolve().name
        item = _scan_item(scan, name)
        try:
            rows.append(global_features(encoder, [item], args.cache, size, hu)[0])
            ids.append(item.id)
        except ValueError as error:
            failures.append(error)
    for failure in failures:  # after the bar
        log.warning("left out %s", failure)
    if not ids:
        raise ValueError(f"{args.input}: found no scan that can be read, expected a scan or a folder of them")
    features = np.array(rows, np.float32)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with open(args.out, "wb") as file:  # given a name, numpy would add .npz to it
        np.savez(file, ids=np.array(ids), features=features)
    print(f"wrote {args.out}: features {features.shape}; {len(failures)} scans left out")


class ImageFeature(torch.nn.Module):
    """The image half of an MG3D: (B, 1, D, H, W) -> global features of length 1 (B, E)"""

    def __init__(self, network):
        super().__init__()
        self.encoder, self.image_proj = network.encoder, network.image_proj

    def forward(self, volume):
        return F.normalize(model.MG3D.encode_image(self, volume).mean(1), dim=-1)


def load_for_export(args):
    """The network of a task, else an encoder; what it gives, and what its user must know"""
    config = model.flags_of(model.read_checkpoint(args.checkpoint))
    if "task" not in config:
        encoder, size, hu, _ = _encoder_of(args)
        return encoder, "maps", {"task": None, "kind": "encode", "view": "whole", "size": size,
                                 "window": data.WINDOW, "spacing": None, "hu": hu}
    if args.encoder or args.hu or args.merging != "auto":
        raise ValueError(f"{args.checkpoint}: found --encoder, --merging or --hu, expected none of them: a "
                         f"checkpoint of the task {config['task']} has its own")
    run = load_checkpoint(args.checkpoint)
    notes = {"task": config["task"], **run.task.settings()}
    notes |= {"size": args.size or notes["size"], "vocabulary": config["vocabulary"]}
    if run.task.kind == "prompt":  # log odds: (yes - no) / temperature, cosines of a feature and two texts
        texts = text_features(run.network, data.prompts(run.task.classes))
        notes |= {"texts": texts.tolist(), "temperature": config["temperature"]}
    if run.task.kind in ("prompt", "retrieve"):
        return ImageFeature(run.network), "feature", notes
    return run.network, "logits", notes


@torch.no_grad()
def export_command(args):
    """A graph for one volume on a CPU. It replaces --out when, read again, it gives our numbers."""
    if args.out.suffix != ".pt2":
        raise ValueError(f"--out {args.out}: expected a name that ends in .pt2")
    network, name, notes = load_for_export(args)
    network, size = network.cpu().eval(), notes["size"]
    stride = getattr(network, "encoder", network).stride
    if any(side % stride for side in size):
        raise ValueError(f"found the size {tuple(size)}, expected multiples of {stride}")
    inputs = {"volume": torch.rand(1, 1, *size)}
    if notes["kind"] == "report":  # shorter reports end in padding, which no word before it sees
        inputs["tokens"] = torch.randint(len(notes["vocabulary"]), (1, network.max_length + 1))
    expected = network(*inputs.values())
    expected = expected if name == "maps" else [expected]
    notes |= {"inputs": {key: list(tensor.shape) for key, tensor in inputs.items()},
              "outputs": {name: [list(tensor.shape) for tensor in expected]},
              "values": "HU, window to [0, 1]" if notes["window"] else "z-score of all voxels but 0",
              "axes": "z, y, x of a scan in RAS", "view": VIEWS[notes["view"]]}
    for key in ("inputs", "outputs", "axes", "values", "window", "hu", "spacing", "view"):
        print(f"{key:8s} {notes[key]}")
    print("traced, written and read again, which takes minutes for Swin-B in full size …", flush=True)
    program = torch.export.export(network, tuple(inputs.values()), strict=False)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_suffix(".part.pt2")
    try:
        torch.export.save(program, part, extra_files={"mg3d.json": json.dumps(notes)})
        found = torch.export.load(part).module()(*inputs.values())
        gap = max((a - b).abs().max().item() for a, b in zip(found if name == "maps" else [found], expected))
        if not gap <= 1e-5:
            raise ValueError(f"{part}: found outputs that differ by {gap:.1e}, expected at most 1e-5")
        part.replace(args.out)
    finally:
        part.unlink(missing_ok=True)
    print(f"wrote {args.out}: {args.out.stat().st_size / 1e6:.1f} MB; read again, it differs by {gap:.1e}")


def comparison_table(results, methods):
    """Markdown like the paper's tables: a row a method, mean±std in percent"""
    metrics = [next(iter(by_method.values()))["metric"] for by_method in results.values()]
    rows = [["method", *map(" ".join, zip(results, metrics))], ["---"] * (1 + len(results))]
    for method in methods:
        rows.append([method])
        for task, by_method in results.items():
            scale = 1 if data.TASKS[task].kind == "report" else 100  # BLEU comes in percent
            result = by_method.get(method, {})
            numbers = [result[name] for name in ("value", "std") if result.get(name) is not None]
            numbers = [f"{number * scale:.2f}" for number in numbers]
            rows[-1].append("±".join(numbers))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def check_column(task, by_method):
    """Results that stand in one column: ValueError for different metrics, a warning for different tests."""
    (first, reference), *others = by_method.items()
    for method, result in others:
        different = [f"{key} {str(reference[key])[:60]} and {str(result[key])[:60]}"
                     for key in ("metric", "split", "n", "ids_sha1", "protocol")
                     if key in reference and key in result and reference[key] != result[key]]
        found = f"{task}: found {'; '.join(different)} of the methods {first} and {method}"
        if reference["metric"] != result["metric"]:
            raise ValueError(f"{found}, expected one metric")
        if different:
            log.warning("warning: %s: these numbers cannot be compared", found)


def radar_command(args):
    results, methods = {task: {} for task in data.TASKS}, {}
    for path in args.results:
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            task = result["task"]
            if result["value"] is None:
                log.warning("%s: left out, its value is null: %s", path, result.get("reason", "unknown why"))
                continue
            float(result["value"]) + float(result["chance"]) + len(result["metric"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: found {error!r}, expected a result.json with task, metric, value and "
                             "chance") from None
        folder = path.resolve().parent
        method = result.get("method") or (folder.parent if folder.name == task else folder).name
        if task not in results or method in results[task]:
            raise ValueError(f"{path}: found the task {task} of the method {method}, expected each of "
                             f"{', '.join(data.TASKS)} at most once for a method")
        results[task][method] = result
        methods.setdefault(method)
    results = {task: by_method for task, by_method in results.items() if by_method}
    if not results:
        raise ValueError("found no result with a value, expected one at least")
    for task, by_method in results.items():
        check_column(task, by_method)
    print(comparison_table(results, methods))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot_radar(results, list(methods), args.out)
    print(f"wrote {args.out}: {len(methods)} methods")


def _scan_item(path, name, centre=None):
    return data.Item(name, path, "", split=None, patient=name, labels=None, rescale=None, centre=centre)


def task_command(args):
    if args.task not in data.TASKS:
        raise ValueError(f"found --task {args.task}, expected one of {', '.join(data.TASKS)}, or a command: "
                         f"{', '.join(filter(None, COMMANDS))}")
    if not args.checkpoint or not (args.data or args.input):
        raise ValueError("expected --checkpoint, and --data or --input")
    run = load_checkpoint(args.checkpoint, args.cache, DEVICE)
    config = run.config
    out = args.out or args.checkpoint.parent / "eval"
    if config["task"] != args.task:
        raise ValueError(f"{args.checkpoint}: found a checkpoint of the task {config['task']}, "
                         f"expected {args.task}")
    items = []
    if args.data:
        fold = config["fold"] if args.fold is None else args.fold
        items = data.load_task(args.task, args.data, fold, config["seed"], cache=args.cache)
        classes = data.with_classes(run.task, items).classes
        if run.task.kind == "classify" and classes != run.task.classes:
            raise ValueError(f"{args.data}: found the labels {', '.join(classes)}, expected those of "
                             f"{args.checkpoint}: {', '.join(run.task.classes)}")
    chosen = [item for item in items if item.split == args.split]
    if args.input:
        centre = args.centre
        if (centre is not None) != (run.task.view == "cube"):
            raise ValueError(f"--task {args.task}: expected {'no --centre' if centre else '--centre X Y Z'}")
        if run.task.kind == "retrieve" and not chosen:
            raise ValueError(f"--task {args.task}: expected --data, whose reports are those to search")
        if centre and ".nii" not in args.input.name.lower():  # LPS to RAS
            centre = [-centre[0], -centre[1], centre[2]]
        return predict_scan(run, _scan_item(args.input, args.input.name, centre), out, chosen)
    if not chosen:
        raise ValueError(f"{args.data}: found nothing for the part {args.split}, expected another --split")
    tested = chosen if args.split == "test" else []
    seen = count_seen(tested, data.patient_hashes(config["patients"]), args.checkpoint)
    seen_before = count_seen(tested, config.get("pretrained_on", ()), config.get("init"))
    chosen = data.prepare_all(chosen, args.cache, config["workers"], task=run.task)
    train_items = [item for item in items if item.split == "train"]
    result = evaluate(run, chosen, out, train_items=train_items)
    result["more"]["patients_seen_in_training"] = seen
    result["more"]["patients_seen_in_pretraining"] = seen_before
    save_result(result, out)


def save_result(result, out):
    print_result(result)
    write_result(result, out / "result.json")
    print(f"wrote {out / 'result.json'}")


COMMANDS = {None: task_command, "zeroshot": zeroshot_command, "retrieval": retrieval_command,
            "probe": probe_command, "pairing": pairing_command, "embed": embed_command,
            "export": export_command, "radar": radar_command}

if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        data.check_numbers(args)
        if str(vars(args).get("checkpoint")).startswith("hf:"):
            args.out = args.out or Path("eval")         # not into the hub's cache
            args.checkpoint = model.local_file(args.checkpoint)
        COMMANDS[args.command](args)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
