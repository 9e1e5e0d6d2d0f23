"""Metrics of the tasks against naive loops and other libraries; sliding window; evaluation, prediction, pictures."""
import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from conftest import REAL, real_data
from sacrebleu.metrics import BLEU
from scipy import integrate, stats
from torch import nn

import data
import eval as evaluation
import model
import phantoms

ROOT = Path(__file__).resolve().parent.parent
WORDS = ["the", "lung", "is", "clear", "no", "effusion", "nodule", "in", "left", "lobe", "of", "heart"]


def config_of(task, **more):
    """What finetune.py writes into best.pt beside the weights."""
    return {"task": task, "encoder": "swin_t", "size": [32, 32, 32], "spacing": None, "text_encoder": "demo", "embed_dim": 24,
            "vocabulary": ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS], "seed": 0, "fold": 0, "batch_size": 4, "workers": 0,
            "use_checkpoint": False, "temperature": 0.1, "patients": [], "pretrained_on": [], "init": "scratch",
            **more}


def run_of(network, task, cache=None, row=None, **more):
    return evaluation.Run(network, row or data.TASKS[task], config_of(task, **more), cache, "cpu")


def drawn(path):
    picture = matplotlib.image.imread(path)[..., :3]
    assert picture.std() > 0.02, f"{path} is blank"
    return picture


# ---------------------------------------------------------------------------------------------------- metrics

def test_accuracy():
    rng = np.random.default_rng(0)
    pred, label = rng.integers(0, 3, 50), rng.integers(0, 3, 50)
    assert evaluation.accuracy(pred, label) == pytest.approx(sum(int(p == t) for p, t in zip(pred, label)) / 50)
    assert evaluation.accuracy([1, 1, 0], [1, 0, 0]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("seed", range(4))
def test_the_auc_is_that_of_scipy_and_the_area_under_the_curve(seed):
    rng = np.random.default_rng(seed)
    label = rng.permutation([0, 1] + rng.integers(0, 2, 38).tolist())
    for score in (rng.normal(size=40), rng.integers(0, 4, 40).astype(float), np.zeros(40)):
        u = stats.mannwhitneyu(score[label == 1], score[label == 0]).statistic
        assert evaluation.auroc(score, label) == pytest.approx(u / (label.sum() * (1 - label).sum()), abs=1e-12)
        false, true = evaluation.roc(score, label)
        assert false[0] == true[0] == 0 and false[-1] == true[-1] == 1
        assert integrate.trapezoid(true, false) == pytest.approx(evaluation.auroc(score, label), abs=1e-12)


def dice_of_sets(pred, truth, k):
    p, t = ({tuple(i) for i in np.argwhere(x == k)} for x in (pred, truth))
    return 2 * len(p & t) / (len(p) + len(t)) if t else math.nan


@pytest.mark.parametrize("seed, classes", [(0, 2), (1, 4), (2, 4)])
def test_dice_counts_voxels(seed, classes):
    rng = np.random.default_rng(seed)
    pred, truth = rng.integers(0, classes, (2, 5, 6, 7))
    if seed == 2:
        truth[truth == 2] = 0                               # absent, and yet predicted
        pred[pred == 3] = 0                                 # there, and never predicted
    expected = [dice_of_sets(pred, truth, k) for k in range(1, classes)]
    assert np.allclose(evaluation.dice(pred, truth, classes), expected, atol=1e-12, equal_nan=True)
    if seed == 2:
        assert np.isnan(expected[1]) and expected[2] == 0


def test_dice_by_hand():
    truth = np.array([[0, 1, 1, 2]])
    assert evaluation.dice(truth, truth, 3).tolist() == [1, 1]
    assert evaluation.dice(np.array([[1, 1, 0, 0]]), truth, 3).tolist() == [0.5, 0]
    assert np.isnan(evaluation.dice(truth, np.zeros((1, 4)), 3)).all()
    assert np.isnan(evaluation.dice(np.zeros((1, 4)), np.zeros((1, 4)), 2)).all()
    with pytest.raises(ValueError, match=r"\(1, 4\).*\(4, 1\)"):
        evaluation.dice(truth, truth.T, 3)


def test_dice_is_that_of_monai():
    metrics = pytest.importorskip("monai.metrics")
    rng = np.random.default_rng(0)
    pred, truth = rng.integers(0, 4, (2, 6, 4, 5, 6))
    truth[0][truth[0] == 1] = 0
    truth[1] = 0
    metric = metrics.DiceMetric(include_background=False, reduction="none", ignore_empty=True)
    one_hot = [F.one_hot(torch.from_numpy(x), 4).movedim(-1, 1) for x in (pred, truth)]
    theirs = metric(*one_hot).numpy()
    ours = np.stack([evaluation.dice(p, t, 4) for p, t in zip(pred, truth)])
    assert np.allclose(ours, theirs, atol=1e-6, equal_nan=True) and np.isnan(ours[1]).all()


def bleu_by_loops(hypotheses, references):
    scores = []
    for longest in range(1, 5):
        product = 1.0
        for n in range(1, longest + 1):
            matched = possible = 0
            for hypothesis, reference in zip(hypotheses, references):
                words, left = hypothesis.split(), reference.split()
                left = [left[i:i + n] for i in range(len(left) - n + 1)]
                for i in range(len(words) - n + 1):
                    possible += 1
                    if words[i:i + n] in left:
                        left.remove(words[i:i + n])         # a reference's n-gram matches once
                        matched += 1
            product *= matched / possible if possible else 0
        h, r = (sum(len(text.split()) for text in texts) for texts in (hypotheses, references))
        brevity = 0 if h == 0 else 1 if h > r else math.exp(1 - r / h)
        scores.append(100 * brevity * product ** (1 / longest))
    return scores


def random_reports(rng, n, shortest=0):
    return [" ".join(rng.choice(WORDS, rng.integers(shortest, 25))) for _ in range(n)]


@pytest.mark.parametrize("seed", range(4))
def test_bleu_is_the_naive_loop(seed):
    rng = np.random.default_rng(seed)
    references = random_reports(rng, 12, 3)
    for hypotheses in (random_reports(rng, 12), [" ".join(text.split()[:9]) for text in references],
                       [text + " and more" for text in references], ["of"] * 12, [""] * 12):
        assert evaluation.bleu(hypotheses, references) == pytest.approx(bleu_by_loops(hypotheses, references), abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_bleu_is_that_of_sacrebleu(seed):
    rng = np.random.default_rng(seed)
    references = random_reports(rng, 12, 3)
    hypotheses = [" ".join(word for word in text.split() if rng.random() < 0.8) for text in references]
    theirs = [BLEU(max_ngram_order=n, tokenize="none", smooth_method="none", force=True).corpus_score(hypotheses, [references]).score
              for n in range(1, 5)]
    assert evaluation.bleu(hypotheses, references) == pytest.approx(theirs, abs=1e-6)


def test_bleu_by_hand():
    assert evaluation.bleu(["a b c d e"], ["a b c d e"]) == pytest.approx([100] * 4)
    # 3 of 4 words, 1 of 3 pairs (b c is in neither order), brevity exp(1 - 5/4)
    found = evaluation.bleu(["a b x c"], ["a b c d e"])
    assert found == pytest.approx([100 * math.exp(-0.25) * 3 / 4, 100 * math.exp(-0.25) * math.sqrt(3 / 4 / 3), 0, 0])
    assert evaluation.bleu(["the the the"], ["the lung"])[0] == pytest.approx(100 / 3)      # a word matches once
    with pytest.raises(ValueError, match="zip"):
        evaluation.bleu(["a", "b"], ["a"])


def test_bleu_counts_chinese_characters():
    """With and without blanks; "6mm" and English words stay whole."""
    hypothesis, reference = "两肺纹理清晰，大小约6mm lung", "两肺纹理增多，大小约6mm lung"
    spaced = [" ".join("两肺纹理清晰，大小约") + " 6mm lung", " ".join("两肺纹理增多，大小约") + " 6mm lung"]
    expected = bleu_by_loops(spaced[:1], spaced[1:])
    assert expected[0] == pytest.approx(100 * 10 / 12) and expected[3] > 0
    assert evaluation.bleu([hypothesis], [reference]) == pytest.approx(expected)
    assert evaluation.bleu(spaced[:1], spaced[1:]) == pytest.approx(expected)
    assert data.report_words("心影不大，约0.5cm。CT-guided") == [*"心影不大约", "0.5cm", "ct-guided"]
    assert data.report_words("カテーテル 々〇") == [*"カテーテル々〇"]


def rouge_by_recursion(hypothesis, reference):
    @functools.cache
    def common(words, others):
        if not words or not others:
            return 0
        if words[0] == others[0]:
            return 1 + common(words[1:], others[1:])
        return max(common(words[1:], others), common(words, others[1:]))
    words, others = tuple(hypothesis.split()), tuple(reference.split())
    longest = common(words, others)
    if longest == 0:
        return 0
    precision, recall = longest / len(words), longest / len(others)
    return 100 * (1 + 1.2 ** 2) * precision * recall / (recall + 1.2 ** 2 * precision)


@pytest.mark.parametrize("seed", range(4))
def test_rouge_is_the_naive_recursion(seed):
    rng = np.random.default_rng(seed)
    for hypothesis, reference in zip([*random_reports(rng, 12), "", "of"], random_reports(rng, 14, 1)):
        assert evaluation.rouge_l(hypothesis, reference) == pytest.approx(rouge_by_recursion(hypothesis, reference))


def test_rouge_by_hand():
    assert evaluation.rouge_l("a b c", "a b c") == pytest.approx(100) and evaluation.rouge_l("a", "b") == 0
    # a and c of four words and of three: 2/4 and 2/3
    assert evaluation.rouge_l("a x y c", "a b c") == pytest.approx(100 * 2.44 * (1 / 2) * (2 / 3) / (2 / 3 + 1.44 / 2))
    assert evaluation.rouge_l("心影不大", "心 影 增 大") == pytest.approx(75)       # characters, with and without blanks


# --------------------------------------------------------------------------------------- findings that a report names

def named(text):
    return [name for name, is_named in zip(data.LABELS, evaluation.findings(text)) if is_named]


@pytest.mark.parametrize("text, expected", [
    ("A nodule of 8 mm is seen. No pleural effusion was detected.", ["Lung nodule"]),
    ("Pleural effusion was not observed, and there is consolidation.", ["Consolidation"]),
    ("No nodule, mass or consolidation was detected in both lungs.", []),               # a denial goes on
    ("No nodule was detected, a consolidation is seen on the left.", ["Consolidation"]),    # it ends with its verb
    ("No mass. Consolidation on the left.", ["Consolidation"]),                         # or with its sentence
    ("no mass . consolidation in the left lobe .", ["Consolidation"]),                  # as a generator writes it
    ("A lymph node that does not reach pathological size is seen.", ["Lymphadenopathy"]),
    ("Bronchiectasis cannot be excluded. Emphysema is excluded.", ["Bronchiectasis"]),
    ("There is a hypodense nodule in the left thyroid lobe.", []),
    ("Fibroatelectatic changes are seen in both lungs.", ["Pulmonary fibrotic sequela"]),
    ("Paraseptal emphysema is observed.", ["Emphysema"]),
    ("Fluid is seen in the pericardium. Heart size increased.", ["Cardiomegaly", "Pericardial effusion"]),
    ("Calcified plaques are observed in the aorta and coronary arteries.",
     ["Arterial wall calcification", "Coronary artery wall calcification"]),
    ("", []), ("心影增大。", []),
])
def test_findings_of_a_sentence(text, expected):
    assert named(text) == expected


def test_findings_of_drawn_reports(tmp_path):
    """Sentence by sentence: each states one finding at most, all together those that were drawn."""
    for index in range(300):
        rng = np.random.default_rng(index)
        drawn = [{"label": name, "size_mm": rng.choice([0, phantoms.FINDINGS[name][3] or 0]), "side": side, "lobe": lobe}
                 for name in phantoms.FINDINGS if rng.random() < 0.25
                 for side, lobe in [phantoms.FINDINGS[name][1][rng.integers(len(phantoms.FINDINGS[name][1]))]]]
        report = phantoms.write_report(drawn, rng)
        assert sorted(named(report)) == sorted(lesion["label"] for lesion in drawn)
        stated = [named(sentence) for sentence in data.split_sentences(report)]
        assert max(map(len, stated)) <= 1 and sum(map(len, stated)) == len(drawn)
        assert named(" ".join(data.report_words(report, with_stops=True))) == named(report)


@real_data
@pytest.mark.parametrize("rows, least", [(800, 0.94), (200, 0.95)])
def test_findings_of_real_reports(rows, least):
    """The rules were written by looking at the first 800 rows of the 1,000 alone."""
    with open(REAL / "reports" / f"ct_rate_{rows}.csv", encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    truth = np.array([[float(row[name]) for name in data.LABELS] for row in table])
    for texts in ([row["report_text"] for row in table],
                  [" ".join(data.report_words(row["report_text"], with_stops=True)) for row in table]):
        found = evaluation.agreement(np.stack([evaluation.findings(text) for text in texts]), truth)
        assert len(table) == rows and found["micro"]["F1"] > least and found["macro"]["F1"] > least
        for name, (correct, wrong, missing) in found["correct_wrong_missing"].items():
            assert correct / (correct + (wrong + missing) / 2) > 0.84, name


@pytest.mark.parametrize("seed", range(3))
def test_agreement_is_the_naive_loop(seed):
    rng = np.random.default_rng(seed)
    reports, truth = rng.random((30, 18)) < 0.3, rng.choice([0, 1, np.nan], (30, 18), p=[0.6, 0.2, 0.2])
    truth[:, 4], reports[:, 5] = 0, False               # one that nobody has, one that is never named
    rows = []
    for report, labels in zip(reports.T, truth.T):
        correct = sum(1 for said, label in zip(report, labels) if said and label == 1)
        wrong = sum(1 for said, label in zip(report, labels) if said and label == 0)
        missing = sum(1 for said, label in zip(report, labels) if not said and label == 1)
        rows.append((correct, wrong, missing))
    found = evaluation.agreement(reports, truth)
    assert list(found["correct_wrong_missing"].values()) == [list(row) for row in rows]
    correct, wrong, missing = map(sum, zip(*rows))
    precision, recall = correct / (correct + wrong), correct / (correct + missing)
    assert found["micro"] == pytest.approx({"precision": precision, "recall": recall, "F1": 2 * precision * recall / (precision + recall)})
    shares = [(c / (c + w) if c else 0, c / (c + m), 2 * c / (2 * c + w + m)) for k, (c, w, m) in enumerate(rows) if k != 4]
    assert list(found["macro"].values()) == pytest.approx(np.mean(shares, 0))


@pytest.mark.parametrize("seed", range(4))
def test_recall_counts_ties_against_the_query(seed):
    rng = np.random.default_rng(seed)
    similarity = rng.integers(0, 6, (9, 9)) if seed % 2 else rng.normal(size=(9, 9))
    expected = []
    for k in (1, 3, 9):
        hits = 0
        for i in range(9):
            before = sum(similarity[i, j] >= similarity[i, i] for j in range(9) if j != i)
            hits += before < k
        expected.append(hits / 9)
    assert evaluation.recall_at_k(similarity, (1, 3, 9)) == pytest.approx(expected)


def test_recall_by_hand():
    assert evaluation.recall_at_k(np.eye(4), (1, 2)) == [1, 1]
    assert evaluation.recall_at_k(np.zeros((4, 4)), (1, 3, 4)) == [0, 0, 1]                 # all alike: nothing is found
    rows_are_queries = np.array([[1, 2, 0], [0, 3, 1], [5, 0, 1]])
    assert evaluation.recall_at_k(rows_are_queries, (1, 2)) == pytest.approx([1 / 3, 1])
    with pytest.raises(ValueError, match="1 similarities"):
        evaluation.recall_at_k(np.array([[np.nan, 0], [0, 1.]]), (1,))


# --------------------------------------------------------------------------------------------- sliding window

class Bumps(nn.Module):
    """Logits of three classes that differ from place to place of a window: what a real network does near its borders."""

    def forward(self, x):
        place = torch.linspace(0, 3, x[0].numel()).view(x.shape[1:])
        return torch.cat([x, x * place.sin(), place.cos() + x], 1)


def blended_by_loops(network, volume, size, overlap):
    """Every voxel's weighted mean over the windows that hold it."""
    shape = volume.shape[1:]
    starts = []
    for n, s in zip(shape, size):
        step = int(s * (1 - overlap))
        number = 1
        while (number - 1) * step < n - s:
            number += 1
        starts.append([round((n - s) * i / (number - 1)) if number > 1 else 0 for i in range(number)])
    gauss = [[math.exp(-0.5 * ((i - (s - 1) / 2) / (s / 8)) ** 2) for i in range(s)] for s in size]
    total, weight = np.zeros((3, *shape)), np.zeros(shape)
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                logits = network(volume[None, :, z:z + size[0], y:y + size[1], x:x + size[2]])[0].numpy()
                for i, j, k in np.ndindex(*size):
                    w = max(gauss[0][i] * gauss[1][j] * gauss[2][k], 1e-3)
                    total[:, z + i, y + j, x + k] += w * logits[:, i, j, k]
                    weight[z + i, y + j, x + k] += w
    return torch.from_numpy(total / weight).softmax(0)


@pytest.mark.parametrize("shape, overlap", [((11, 8, 19), 0.5), ((9, 9, 9), 0.75), ((8, 8, 8), 0.5), ((17, 8, 9), 0.0)])
def test_sliding_window_is_the_naive_loop(shape, overlap):
    volume = torch.rand(1, *shape, generator=torch.Generator().manual_seed(0))
    expected = blended_by_loops(Bumps(), volume, (8, 8, 8), overlap)
    for batch_size in (1, 3):
        found = evaluation.sliding_window(Bumps(), volume, (8, 8, 8), overlap, batch_size)
        assert found.dtype == torch.float32 and torch.allclose(found.double(), expected, atol=1e-6)


def test_what_looks_at_single_voxels_does_not_see_the_windows():
    def network(x):
        return torch.cat([x, 1 - x], 1)
    for shape in ((13, 20, 9), (5, 20, 3), (4, 4, 4)):                              # larger, in part smaller, smaller
        volume = torch.rand(1, *shape)
        found = evaluation.sliding_window(network, volume, (8, 8, 8), 0.5)
        assert found.shape == (2, *shape)
        assert torch.allclose(found, network(volume[None])[0].softmax(0), atol=1e-6)


def test_a_smaller_volume_is_padded_around():
    seen = []

    def network(x):
        seen.append(x)
        return torch.cat([x, x], 1)
    volume = torch.full((1, 4, 8, 5), 2.)
    evaluation.sliding_window(network, volume, (8, 8, 8), 0.5)
    assert len(seen) == 1 and seen[0].shape == (1, 1, 8, 8, 8)
    assert torch.equal(seen[0][0, :, 2:6, :, 1:6], volume) and (seen[0] == 0).sum() == 512 - 160


def test_a_batch_holds_no_more_than_asked():
    sizes = []

    def network(x):
        sizes.append(len(x))
        return torch.cat([x, x], 1).bfloat16()                                      # what autocast gives
    found = evaluation.sliding_window(network, torch.rand(1, 8, 8, 20), (8, 8, 8), 0.5, batch_size=3)
    assert sizes == [3, 1] and found.dtype == torch.float32


# --------------------------------------------------------------------------------------- evaluation, by its kinds

def items_of(labels=None, n=None, reports=None, **more):
    return [data.Item(f"case_{i}", Path(f"case_{i}.nii.gz"), reports[i] if reports else "", "test", f"p{i}",
                      None if labels is None else np.array(labels[i], np.float32), None, **more)
            for i in range(n or len(reports or labels))]


@pytest.fixture
def constant_inputs(monkeypatch):
    """The network's input of case_3 is a cube of 3s: a network that takes the mean sees which case it is."""
    monkeypatch.setattr(data, "network_input", lambda item, task, cache: torch.full((1, 4, 4, 4), float(item.id.split("_")[1])))


class Table(nn.Module):
    """Answers case i with row i."""

    def __init__(self, rows):
        super().__init__()
        self.rows = torch.tensor(rows, dtype=torch.float32)

    def forward(self, volume):
        return self.rows[volume.mean((1, 2, 3, 4)).round().long()]


def test_accuracy_of_exclusive_classes(constant_inputs, tmp_path):
    label = [0, 0, 0, 1, 1, 2, 0]
    pred = [0, 0, 1, 1, 1, 1, 0]
    items = items_of(np.eye(3)[label])
    network = Table(np.eye(3)[pred] * 5)
    no_interval_of_one_patient(run_of(network, "cc-ccii"), items)
    result = evaluation.evaluate(run_of(network, "cc-ccii"), items, tmp_path)
    assert result["task"] == "cc-ccii" and result["metric"] == "ACC" and result["n"] == 7 and result["split"] == "test"
    assert result["value"] == pytest.approx(5 / 7) and result["chance"] == pytest.approx(4 / 7)
    assert result["interval"][0] <= 5 / 7 <= result["interval"][1]
    assert result["per_class"] == pytest.approx({"normal": 3 / 4, "common pneumonia": 1, "COVID-19": 0})
    assert result["ids_sha1"] == hashlib.sha1("\n".join(f"case_{i}" for i in range(7)).encode()).hexdigest()
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    p = math.exp(5) / (math.exp(5) + 2)
    assert [float(rows[2][name]) for name in data.TASKS["cc-ccii"].classes] == pytest.approx([(1 - p) / 2, p, (1 - p) / 2], abs=1e-6)
    assert rows[5]["id"] == "case_5" and rows[5]["true COVID-19"] == "1.0"
    drawn(tmp_path / "roc.png")


def test_severity_is_told_among_those_with_covid(constant_inputs):
    labels = [(1, 1), (1, 0), (1, 0), (1, 1), (0, 0), (0, 0)]
    scores = [[0, 2], [0, 1], [0, 0], [0, 0.5], [0, 9], [0, 8]]
    result = evaluation.evaluate(run_of(Table(scores), "stoic"), items_of(labels))
    assert result["value"] == pytest.approx(3 / 4) and result["n"] == 4 and result["protocol"] == "severe among COVID-19"
    assert result["more"] == {"auc_all_items": pytest.approx(3 / 8), "n_all_items": 6} and result["per_class"]["severe"] == pytest.approx(3 / 8)
    assert result["per_class"]["COVID-19"] == 0.5 and result["chance"] == 0.5


def no_interval_of_one_patient(run, items):
    """All scans are of one patient: there is nobody to resample."""
    result = evaluation.evaluate(run, [item._replace(patient="p") for item in items])
    assert result["patients"] == 1 and np.isnan(result["interval"]).all()


def test_auc_over_all_candidates(constant_inputs):
    network, items = Table([[0], [1], [2], [3]]), items_of([[0], [1], [0], [1]])
    network.train()
    result = evaluation.evaluate(run_of(network, "luna16"), items)
    assert not network.training
    assert result["value"] == pytest.approx(3 / 4) and result["n"] == 4 and result["per_class"] == {"nodule": result["value"]}
    assert result["protocol"] == "nodule among all items"


def test_labels_of_ones_own_are_judged_where_they_are_known(constant_inputs, tmp_path):
    """The mean AUC of those with both classes"""
    task = data.TASKS["labels"]._replace(classes=("a", "b", "c"))
    scores = np.random.default_rng(0).normal(size=(12, 3))
    labels = np.random.default_rng(1).choice([0, 1, np.nan], (12, 3))
    labels[:, 2] = np.where(labels[:, 2] == 1, np.nan, labels[:, 2])            # nobody has it
    result = evaluation.evaluate(run_of(Table(scores.tolist()), "labels", row=task), items_of(labels), tmp_path)
    known = ~np.isnan(labels)
    aucs = [pairs_won(scores[known[:, k], k], labels[known[:, k], k]) for k in (0, 1)]
    assert [result["per_class"][name] for name in "ab"] == pytest.approx(aucs) and math.isnan(result["per_class"]["c"])
    assert result["value"] == pytest.approx(np.mean(aucs)) and result["interval"][0] < result["value"] < result["interval"][1]
    assert result["protocol"] == "all items, mean of 2 findings (the other 1 have one class alone)"
    assert result["n"] == 12 and result["positives"] == {name: int(np.nansum(labels[:, k])) for k, name in enumerate("abc")}
    one = evaluation.evaluate(run_of(Table(scores[:, :1].tolist()), "labels", row=task._replace(classes=("a",))), items_of(labels[:, :1]))
    assert one["value"] == pytest.approx(aucs[0]) and one["n"] == known[:, 0].sum() and one["protocol"] == "a among all items"


def test_saturated_probabilities_are_still_ranked(constant_inputs, tmp_path):
    """In float32 the sigmoids of 20 to 45 and the softmaxes of such logits are all 1.0."""
    logits = [20, 45, 30, 25, 40, 38]
    items = items_of([(1, i % 2) for i in range(6)])
    result = evaluation.evaluate(run_of(Table([[0, z] for z in logits]), "stoic"), items)
    assert result["value"] == pytest.approx(pairs_won(logits, [0, 1, 0, 1, 0, 1])) == 6 / 9
    rows = [[0, 0, z] for z in logits]
    rows[0] = [90, 0, 91]                               # the largest logit, the smallest probability
    items = items_of(np.eye(3)[[2, 1, 2, 1, 2, 1]])
    run = run_of(Table(rows), "cc-ccii")
    result = evaluation.evaluate(run, items, tmp_path)
    assert result["more"]["auc"]["COVID-19"] == pytest.approx(pairs_won([1, *logits[1:]], [1, 0, 1, 0, 1, 0]))
    found = evaluation.predict_classes(run, items)
    assert np.allclose(found, torch.tensor(rows).double().softmax(1).numpy(), atol=1e-9)
    written = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert float(written[0]["COVID-19"]) == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-6)


def pairs_won(scores, labels):
    pairs = [(a, b) for a, x in zip(scores, labels) for b, y in zip(scores, labels) if x and not y]
    return sum(a > b for a, b in pairs) / len(pairs)


def test_an_absent_class_is_null_in_the_file(constant_inputs, tmp_path):
    network, items = Table([[0], [1]]), items_of([[1], [1]])
    with pytest.warns(RuntimeWarning):
        result = evaluation.evaluate(run_of(network, "luna16"), items, tmp_path)
    assert math.isnan(result["value"])
    evaluation.write_result(result, tmp_path / "result.json")
    written = json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    assert written["value"] is None and written["interval"] == [None, None]
    assert written["reason"] == "the items that count have not both classes"
    evaluation.print_result(result)
    assert "for the items that count have not both classes, n = 2" in evaluation.summary(result)


def test_predictions_that_are_not_finite_are_the_reason(constant_inputs):
    result = evaluation.evaluate(run_of(Table([[0], [math.nan], [1]]), "luna16"), items_of([[1], [0], [0]]))
    assert math.isnan(result["value"]) and result["reason"] == "predictions that are not finite"
    for rows in ([[0, 0, 1], [math.nan] * 3, [1, 0, 0]], [[0, 0, 1], [0, math.inf, 0], [1, 0, 0]]):
        result = evaluation.evaluate(run_of(Table(rows), "cc-ccii"), items_of(np.eye(3)))
        assert math.isnan(result["value"]) and result["reason"] == "predictions that are not finite"


def test_the_interval_of_a_task_is_over_patients(constant_inputs):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (60, 1))
    items = [item._replace(patient=f"p{i // 4}") for i, item in enumerate(items_of(labels))]
    network = Table(labels + 1.5 * np.repeat(rng.normal(size=(15, 1)), 4, 0))
    result = evaluation.evaluate(run_of(network, "luna16"), items)
    assert result["n"] == 60 and result["patients"] == 15
    scores, patients = network.rows[:, 0].double().numpy(), np.repeat(np.arange(15), 4)
    assert result["interval"] == pytest.approx(evaluation.bootstrap(
        evaluation.auroc, scores, labels[:, 0], patients=[f"p{i}" for i in patients]), abs=1e-6)
    assert np.ptp(result["interval"]) > np.ptp(evaluation.bootstrap(evaluation.auroc, scores, labels[:, 0]))


# segmentation: scans of 12³ voxels on disk in different orientations, "networks" that know where the truth is

def write_scan(path, array, affine, lps=False):
    image = nib.Nifti1Image(array, affine)
    if lps:
        image = image.as_reoriented(nib.orientations.ornt_transform(*(nib.orientations.axcodes2ornt(c) for c in ("RAS", "LPS"))))
    nib.save(image, path)


@pytest.fixture
def scans(tmp_path):
    """Three scans with masks: a cube of class 1, a cube of each of two classes, and one without any."""
    items = []
    for i in range(3):
        image, mask = np.full((12, 10, 8), -1000, np.int16), np.zeros((12, 10, 8), np.uint8)
        if i < 2:
            mask[2:6, 2:6, 2:6] = 1
        else:
            image[0, 0, 0] = 200
        if i == 1:
            mask[7:9, 7:9, 1:3] = 2
        image[mask > 0] = 100 * mask[mask > 0].astype(np.int16)
        affine = np.diag([2., 2., 3., 1])
        affine[:3, 3] = -20, 5, 100
        write_scan(tmp_path / f"scan{i}.nii.gz", image, affine, lps=i == 1)
        write_scan(tmp_path / f"mask{i}.nii.gz", mask, affine, lps=i == 1)
        items.append(data.Item(f"sub/scan{i}.nii.gz", tmp_path / f"scan{i}.nii.gz", "", "test", f"p{i}", None, None, tmp_path / f"mask{i}.nii.gz"))
    task = data.TASKS["acdc"]._replace(classes=("a", "b"), size=(8, 8, 8), overlap=0.5, window=(-1000., 1000.), spacing=None)
    return items, task, tmp_path


class ByGrey(nn.Module):
    """Class k where the grey is nearest to that of k: -1000, 100 and 200 HU."""

    def forward(self, x):
        return -99 * torch.cat([x.abs(), (x - 0.55).abs(), (x - 0.6).abs()], 1)


def test_dice_in_the_own_grid(scans):
    items, task, folder = scans
    result = evaluation.evaluate(run_of(ByGrey(), "acdc", folder / "cache", task), items, folder / "out")
    no_interval_of_one_patient(run_of(ByGrey(), "acdc", folder / "cache", task), items)
    assert result["value"] == 1 and result["per_class"] == {"a": 1, "b": 1} and result["interval"] == (1, 1)
    assert result["n"] == 2 and result["more"]["without_truth"] == 3 and result["more"]["marked_without_truth"] == 1     # the bright corner of scan2
    full_a, full_b = 2 * 64 / (64 + 960), 2 * 8 / (8 + 960)
    assert result["chance"] == pytest.approx((full_a + (full_a + full_b) / 2) / 2)
    for i in range(3):
        saved, scan = (nib.load(folder / name) for name in (f"out/masks/sub%2Fscan{i}.nii.gz", f"scan{i}.nii.gz"))
        assert np.allclose(saved.affine, scan.affine) and saved.shape == scan.shape
        assert saved.get_data_dtype() == np.uint8
    assert np.array_equal(nib.load(folder / "out/masks/sub%2Fscan1.nii.gz").get_fdata(), nib.load(folder / "mask1.nii.gz").get_fdata())
    rows = list(csv.reader((folder / "out" / "dice.csv").open()))
    assert rows[0] == ["id", "a", "b"] and rows[2] == ["sub/scan1.nii.gz", "1.0", "1.0"] and rows[3][1:] == ["nan", "nan"]
    drawn(folder / "out" / "overlay.png")


def test_a_mask_of_a_network_that_has_diverged_is_refused(scans):
    items, task, folder = scans
    network = run_of(ByGrey(), "acdc", folder / "cache", task)
    network.network.forward = lambda x: torch.full((len(x), 3, *x.shape[2:]), math.nan)
    with pytest.raises(ValueError, match="scan0.nii.gz: found predictions that are not finite"):
        evaluation.evaluate(network, items)


def test_every_scan_has_a_mask_of_its_own(scans):
    items, task, folder = scans
    network = run_of(ByGrey(), "acdc", folder / "cache", task)
    names = {"肺_甲.nii.gz": "肺_甲", "a b/1": "a b%2F1", "a_b_1": "a_b_1", "50%2F": "50%252F", ".x": "%2Ex", "Müller\t?.nii": "Müller%09%3F"}
    renamed = [items[0]._replace(id=name) for name in names]
    (folder / "names" / "masks").mkdir(parents=True)
    (folder / "names" / "masks" / "of_an_older_run.nii.gz").touch()
    evaluation.evaluate(network, renamed, folder / "names")
    assert sorted(path.name for path in (folder / "names" / "masks").iterdir()) == sorted(f"{name}.nii.gz" for name in names.values())
    twice = [items[0]._replace(id="a.nii.gz"), items[1]._replace(id="a.mha")]
    with pytest.raises(ValueError, match="the same name for masks of .*scan0.nii.gz, .*scan1.nii.gz"):
        evaluation.evaluate(network, twice, folder / "twice")
    assert not (folder / "twice" / "masks").exists()


def test_scans_of_one_name_do_not_overwrite_each_other(scans):
    items, task, folder = scans
    network = run_of(ByGrey(), "acdc", folder / "cache", task)
    found = {}
    for i, place in enumerate(("A", "B", "x/B", "A")):                 # the last one again: it keeps its file
        (folder / place).mkdir(parents=True, exist_ok=True)
        (folder / place / "ct.nii.gz").write_bytes(items[i % 3 if place != "A" else 0].volume.read_bytes())
        scan = data.Item("ct.nii.gz", folder / place / "ct.nii.gz", "", None, "x")
        evaluation.predict_scan(network, scan, folder / "one")
        found[place] = json.loads((folder / "one" / "inputs.json").read_text())
    assert found["x/B"] == found["A"] and sorted(found["A"]) == sorted(path.name for path in (folder / "one").glob("*mask*"))
    assert list(found["A"].values()) == [str(folder / place / "ct.nii.gz") for place in ("A", "B", "x/B")]
    assert next(iter(found["A"])) == "ct_mask.nii.gz"
    for name, label in zip(found["A"], (1, 2)):
        assert nib.load(folder / "one" / name).get_fdata().max() == label


def test_scans_without_any_truth_have_no_dice(scans):
    items, task, folder = scans
    result = evaluation.evaluate(run_of(ByGrey(), "acdc", folder / "cache", task), items[2:])
    assert math.isnan(result["value"]) and result["reason"] == "no scan has any class" and result["n"] == 0
    one = evaluation.evaluate(run_of(ByGrey(), "acdc", folder / "cache", task), items[:1])
    assert one["value"] == 1 and "reason" not in one and np.isnan(one["interval"]).all()


def test_overlay_shows_correct_wrong_and_missing(tmp_path):
    pred, truth = np.zeros((2, 40, 40), int)
    pred[:20, :20], truth[:20, 20:] = 1, 1                      # wrong and missing, one beside the other
    pred[20:, :20] = truth[20:, :20] = 1
    evaluation.plot_overlay([("scan", np.zeros((40, 40)), pred, truth, 0.5, 1)], tmp_path / "overlay.png")
    picture = drawn(tmp_path / "overlay.png")
    whole = picture[len(picture) // 2:-40].reshape(-1, 3)       # the lower picture, without the legend
    for colour in ((0.1, 0.8, 0.2), (0.95, 0.15, 0.1), (1, 0.85, 0)):
        seen = np.abs(whole - 0.75 * np.array(colour)).max(1) < 0.01
        assert seen.sum() > 5000, colour
    rows, columns = ((np.abs(picture[len(picture) // 2:-40] - 0.75 * np.array(colour)).max(2) < 0.01).nonzero()
                     for colour in ((0.1, 0.8, 0.2), (0.95, 0.15, 0.1)))
    assert rows[0].mean() < columns[0].mean() and abs(rows[1].mean() - columns[1].mean()) < 2      # correct above wrong, as y goes up


def test_segmenting_one_scan(scans, capsys):
    items, task, folder = scans
    alone = data.Item("scan1.nii.gz", items[1].volume, "", "test", "x", None, None)
    evaluation.predict_scan(run_of(ByGrey(), "acdc", folder / "cache", task), alone, folder / "one")
    saved, truth = nib.load(folder / "one" / "scan1_mask.nii.gz"), nib.load(folder / "mask1.nii.gz")
    assert np.array_equal(saved.get_fdata(), truth.get_fdata()) and np.allclose(saved.affine, truth.affine)
    assert nib.aff2axcodes(saved.affine) == ("L", "P", "S")
    assert f"{64 * 12 / 1000:.2f} ml" in capsys.readouterr().out


# reports

class Writer(nn.Module):
    def __init__(self, texts, vocabulary):
        super().__init__()
        self.tokens = [[vocabulary.index(word) for word in text.split()] for text in texts]

    def generate(self, volume):
        return [self.tokens[round(float(v.mean()))] for v in volume]


def test_reports_under_both_protocols(constant_inputs, tmp_path):
    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", *WORDS]
    reports = ["The lung is clear. No effusion.", "Nodule in the left lobe of the lung.", " ".join(["heart"] * 160) + ".", "No strange effusion in the lung."]
    said = ["the lung is clear no effusion", "nodule in the lung", " ".join(["heart"] * 150), "no <unk> effusion in the lung"]
    train = items_of(reports=["The lung is clear. No effusion.", "The lung is clear.", "The lung is clear. No nodule."])
    run = run_of(Writer(said, vocabulary), "ctrg", vocabulary=vocabulary)
    no_interval_of_one_patient(run, items_of(reports=reports))
    result = evaluation.evaluate(run, items_of(reports=reports), tmp_path, train_items=train)
    more = result["more"]
    whole = ["the lung is clear no effusion", "nodule in the left lobe of the lung", " ".join(["heart"] * 160), "no strange effusion in the lung"]
    cut = [*whole[:2], " ".join(["heart"] * 150), "no <unk> effusion in the lung"]
    assert [result["per_class"][f"BLEU-{n}"] for n in range(1, 5)] == pytest.approx(bleu_by_loops(said, whole))
    assert more["bleu_released"] == pytest.approx(bleu_by_loops(said, cut))
    assert result["value"] == result["per_class"]["BLEU-4"] < more["bleu_released"][3]
    assert result["interval"][0] <= result["value"] <= result["interval"][1] and result["n"] == 4
    assert more["bleu_constant"] == pytest.approx(bleu_by_loops(["the lung is clear no effusion"] * 4, whole))
    assert result["chance"] == more["bleu_constant"][3] and "training part" in result["protocol"]
    whole_of_150 = [*whole[:2], " ".join(["heart"] * 150), whole[3]]
    assert more["bleu_at_most"] == pytest.approx(bleu_by_loops(whole_of_150, whole))
    assert more["distinct_reports"] == 1
    assert result["protocol"].startswith("words of whole references")
    rows = json.loads((tmp_path / "reports.json").read_text())
    assert rows[1] == {"id": "case_1", "generated": said[1], "truth": whole[1] + " ."}
    assert more["ROUGE-L"] == pytest.approx(np.mean([rouge_by_recursion(*pair) for pair in zip(said, whole)]))
    assert more["ROUGE-L_constant"] == pytest.approx(np.mean([rouge_by_recursion("the lung is clear no effusion", text) for text in whole]))
    assert more["findings"]["generated"] is None and "has no full stop" in more["findings"]["reason"]
    page = (tmp_path / "reports.html").read_text()
    assert "case_2" in page and "case_3" not in page and all(f">{word}<" in page for word in whole[1].split())


def test_the_constant_report_is_the_best_of_many():
    rng = np.random.default_rng(0)
    base, reports = rng.choice(WORDS, 12), []
    for changed in [4] * 200 + [0]:             # the last has what all others have in common
        words = base.copy()
        words[rng.permutation(12)[:changed]] = rng.choice(WORDS, changed)
        reports.append(" ".join(words))
    best = reports.pop()
    fits = [bleu_by_loops([report] * 200, reports)[3] for report in (best, *reports)]
    assert fits[0] > 1.05 * max(fits[1:])
    for place in (0, 60, 120, 199):             # wherever it stands, among many
        assert evaluation.constant_report([*reports[:place], best, *reports[place:]]) == best


def first_words(reports, most=None):
    words = [data.report_words(report, with_stops=True)[:most] for report in reports]
    return [" ".join(filter(data.has_words, report)) for report in words]


@real_data
def test_what_a_constant_and_a_short_report_have_on_real_ones():
    table = json.loads((REAL / "reports" / "ctrg_chest.json").read_text(encoding="utf-8"))
    train, test = ([row["report"] for row in table[part]] for part in ("train", "test"))
    constant = first_words([evaluation.constant_report(train)]) * len(test)
    assert evaluation.bleu(constant, first_words(test)) == pytest.approx([58.6, 48.5, 41.6, 36.5], abs=0.05)
    assert evaluation.bleu(first_words(test, 150), first_words(test))[3] == pytest.approx(91.9, abs=0.05)
    copies = [" ".join(data.report_words(report, with_stops=True)[:150]) for report in test]
    found = evaluation.score_findings(items_of(reports=test), copies, test[0], {"."})     # the best generator
    assert found["generated"] == found["true report as it could be generated"]
    micro = found["generated"]["micro"]
    assert [micro[name] for name in ("precision", "recall", "F1")] == pytest.approx([0.973, 0.614, 0.753], abs=0.0005)
    ct_rate = []
    for name in ("ct_rate_800.csv", "ct_rate_200.csv"):
        with (REAL / "reports" / name).open(newline="", encoding="utf-8") as file:
            ct_rate += [row["report_text"] for row in csv.DictReader(file)]
    assert evaluation.bleu(first_words(ct_rate, 150), first_words(ct_rate))[3] == pytest.approx(36.9, abs=0.05)
    lengths = np.array([len(data.report_words(report, with_stops=True)) for report in ct_rate])
    assert np.maximum(lengths - 150, 0).sum() / lengths.sum() == pytest.approx(0.50, abs=0.005)


def test_chinese_reports_are_compared_by_characters(constant_inputs):
    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", *"两肺纹理清晰心影不大"]
    said = [" ".join("两肺纹理清晰"), " ".join("心影不大")]
    result = evaluation.evaluate(run_of(Writer(said, vocabulary), "ctrg", vocabulary=vocabulary),
                                 items_of(reports=["两肺纹理清晰。", "心影增大。"]))
    assert result["protocol"].startswith("Chinese characters of whole references")
    assert result["per_class"]["BLEU-1"] == pytest.approx(100 * 9 / 10)


def test_findings_of_generated_reports(constant_inputs, capsys):
    """Against the labels of those that have some, else against the true reports"""
    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", ".", "is", "present", "absent", "nodule", "emphysema"]
    said = ["nodule is present . emphysema is absent .", "nodule is present .", "emphysema is present .", ""]
    reports = ["A nodule is seen.", "Normal.", "Emphysema. No nodule.", "A nodule."]
    train = items_of(reports=["Emphysema is present."] * 3)
    run = run_of(Writer(said, vocabulary), "ctrg", vocabulary=vocabulary)
    more = evaluation.evaluate(run, items_of(reports=reports), train_items=train)["more"]["findings"]
    assert more["against"] == "true report" and more["n"] == 4 and "true report" not in more
    counts = more["generated"].pop("correct_wrong_missing")
    assert counts.pop("Lung nodule") == [1, 1, 1] and counts.pop("Emphysema") == [1, 0, 0]
    assert all(row == [0, 0, 0] for row in counts.values())
    assert more["generated"]["micro"] == pytest.approx({"precision": 2 / 3, "recall": 2 / 3, "F1": 2 / 3})
    assert more["generated"]["macro"] == pytest.approx({"precision": 3 / 4, "recall": 3 / 4, "F1": 3 / 4})
    assert more["constant report"]["correct_wrong_missing"]["Emphysema"] == [1, 3, 0]
    labels = np.full((4, 18), np.nan)
    labels[1], labels[2] = 0, 0
    labels[2, data.LABELS.index("Lung nodule")] = 1
    items = [item._replace(labels=row) for item, row in zip(items_of(reports=reports), labels)]
    items[3] = items[3]._replace(labels=None)
    result = evaluation.evaluate(run, items, train_items=train)
    more = result["more"]["findings"]
    assert more["against"] == "labels" and more["n"] == 2
    assert [more[name]["correct_wrong_missing"]["Lung nodule"] for name in ("generated", "true report")] == [[0, 1, 1], [0, 0, 1]]
    assert more["true report"]["correct_wrong_missing"]["Emphysema"] == [0, 1, 0]
    evaluation.print_result(result)
    assert "findings against" in capsys.readouterr().out


def test_findings_of_chinese_reports_are_not_told(constant_inputs):
    vocabulary = ["<pad>", "<bos>", "<eos>", "<unk>", *"心影不大。"]
    items = [item._replace(labels=np.ones(18)) for item in items_of(reports=["心影增大。", "心影不大。"])]
    result = evaluation.evaluate(run_of(Writer(["心 影 不 大 。"] * 2, vocabulary), "ctrg", vocabulary=vocabulary), items)
    assert result["more"]["findings"] == {"generated": None, "reason": "the true reports name no finding: only English ones are read"}
    assert result["per_class"]["BLEU-1"] == pytest.approx(100 * 7 / 8)      # full stops are no words


# prompts and retrieval: a volume's feature is a row of a table, a text's is told from its first words

@pytest.fixture(scope="module")
def text_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    phantoms.make_demo_text_encoder(folder, [f"not {name}." for name in data.LABELS] + [" ".join(WORDS) + "."])
    return model.TextEncoder(str(folder))


class TwoTowers(nn.Module):
    def __init__(self, text_encoder, images, texts):
        super().__init__()
        self.text_encoder, self.images, self.texts = text_encoder, torch.tensor(images, dtype=torch.float32), texts

    def encode_image(self, volume):
        return self.images[volume.mean((1, 2, 3, 4)).round().long()][:, None].repeat(1, 3, 1)

    def encode_text(self, input_ids, attention_mask, sentence_ids, sentence_mask):
        assert (attention_mask.sum(1) > 2).all() and sentence_mask.any(1).all() and sentence_ids.max() < sentence_mask.shape[1]
        said = [self.text_encoder.tokenizer.decode(ids[mask.bool()], skip_special_tokens=True) for ids, mask in zip(input_ids, attention_mask)]
        return torch.stack([torch.tensor(self.texts(text), dtype=torch.float32) for text in said])


def test_prompts_are_compared_in_pairs(constant_inputs, text_encoder, tmp_path):
    names = [name.lower() for name in data.LABELS]

    def texts(text):                                        # finding k points along axis k, its denial the other way
        feature = np.zeros(18)
        feature[names.index(text.removeprefix("not ").removesuffix(".").strip())] = -1 if text.startswith("not ") else 1
        return feature * 7                                  # lengths do not count
    rng = np.random.default_rng(0)
    images, labels = rng.normal(size=(9, 18)), rng.integers(0, 2, (9, 18)).astype(float)
    labels[0], labels[1], labels[2, 4] = 0, 1, np.nan
    towers = run_of(TwoTowers(text_encoder, images, texts), "ct-rate-vocab")
    result = evaluation.evaluate(towers, items_of(labels), tmp_path)
    cosine = images / np.linalg.norm(images, axis=1, keepdims=True)
    known = ~np.isnan(labels)
    expected = [evaluation.auroc(cosine[k, j], labels[k, j]) for j, k in enumerate(known.T)]
    assert list(result["per_class"]) == list(data.LABELS) and list(result["per_class"].values()) == pytest.approx(expected)
    assert result["value"] == pytest.approx(np.mean(expected)) and result["chance"] == 0.5
    found = evaluation.predict_classes(towers, items_of(labels))
    assert np.allclose(found, 1 / (1 + np.exp(-2 * cosine / 0.1)), atol=1e-5)
    drawn(tmp_path / "roc.png")


def test_texts_do_not_depend_on_their_batch(text_encoder, monkeypatch):
    torch.manual_seed(0)
    towers = run_of(model.MG3D(model.build_encoder("swin_t"), text_encoder, losses=("clip",), embed_dim=24).eval(), "ct-rate-retrieval")
    texts = ["The lung is clear. No effusion in the left lobe. Nodule.", "No nodule.", "Heart. Lung is clear"]
    together = evaluation.text_features(towers.network, texts)
    alone = torch.cat([evaluation.text_features(towers.network, [text]) for text in texts])
    assert together.shape == (3, 24) and torch.allclose(together, alone, atol=1e-5)
    assert torch.allclose(together.norm(dim=1), torch.ones(3))
    seen, make = [], data.text_batch
    monkeypatch.setattr(data, "text_batch", lambda tokenizer, texts: seen.extend(texts) or make(tokenizer, texts))
    others = [" ".join([texts[0]] * n) for n in range(2, 31)]
    twice = evaluation.text_features(towers.network, [*texts, *others, *texts])
    assert torch.equal(twice[:3], twice[-3:]) and torch.allclose(twice[:3], together, atol=1e-5)
    assert seen == [*texts, *others]                                # none twice, with another padding


def test_retrieval_under_both_protocols(constant_inputs, text_encoder, tmp_path):
    angles = np.linspace(0, 1.5, len(WORDS))
    ids = [f"valid_{i // 2 + 1}_a_{i % 2 + 1}" for i in range(12)]                  # two reconstructions of each of 6 scans

    def texts(text):
        angle = angles[WORDS.index(text.split()[0].strip(".").lower())]
        return [np.cos(angle), np.sin(angle)]
    reports = [f"{WORDS[i // 2]} lung." for i in range(12)]
    images = [texts(reports[i]) if i != 4 else texts(reports[0]) for i in range(12)]        # the first of scan 3 looks like scan 1
    items = [item._replace(id=name) for item, name in zip(items_of(reports=reports), ids)]
    order = dict(zip(ids, range(12)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "network_input", lambda item, task, cache: torch.full((1, 4, 4, 4), float(order[item.id])))
        towers = run_of(TwoTowers(text_encoder, images, texts), "ct-rate-retrieval")
        result = evaluation.evaluate(towers, items, tmp_path)
    cosine = np.array([texts(report) for report in reports]) @ np.array(images).T
    close = cosine >= cosine.diagonal()[:, None] - 1e-6
    ranks = [sum(row) for row in close]
    volumes, scans, _ = result["more"]["protocols"].values()
    assert volumes["n"] == result["n"] == 12 and scans["n"] == 6
    assert volumes["Recall@5"] == result["value"] == pytest.approx(np.mean(np.array(ranks) <= 5))
    assert volumes["chance of Recall@5"] == result["chance"] == 5 / 12 and scans["chance of Recall@50"] == 1
    ranks = [sum(row[::2]) for row in close[::2]]
    assert scans["Recall@5"] == pytest.approx(np.mean(np.array(ranks) <= 5)) and scans["median_rank"] == np.median(ranks)
    assert scans["ids_sha1"] == hashlib.sha1("\n".join(sorted(ids[::2])).encode()).hexdigest()
    assert result["metric"] == "Recall@5", "50 of 12 say nothing"
    evaluation.print_result(result)
    rows = list(csv.reader((tmp_path / "ranks.csv").open()))
    assert rows[0][:2] == ["id", "rank"] and rows[1][0] == "valid_1_a_1" and int(rows[1][1]) == 3


@pytest.mark.parametrize("n, k", [(1, None), (2, 1), (5, 1), (9, 1), (10, 5), (12, 5)])
def test_recall_among_few_is_of_a_k_that_can_differ(constant_inputs, text_encoder, n, k):
    def texts(text):
        return np.eye(12)[WORDS.index(text.split()[0].strip(".").lower())]
    images = np.eye(12)[np.roll(np.arange(n), 1 if n < 10 else 0)]          # few find another's volume
    items = items_of(reports=[f"{word} lung." for word in WORDS[:n]])
    result = evaluation.evaluate(run_of(TwoTowers(text_encoder, images, texts), "ct-rate-retrieval"), items)
    volumes = result["more"]["protocols"]["volumes"]
    no_interval_of_one_patient(run_of(TwoTowers(text_encoder, images, texts), "ct-rate-retrieval"), items)
    if k is None:
        assert math.isnan(result["value"]) and "always finds itself" in result["reason"]
    else:
        assert result["metric"] == f"Recall@{k}" and result["chance"] == pytest.approx(k / n)
        assert result["value"] == volumes[f"Recall@{k}"] == (0 if n < 10 else 1) and "reason" not in result
    for other in (1, 5, 10, 50, 100):
        assert math.isnan(volumes[f"Recall@{other}"]) == (other >= n)
        assert volumes[f"chance of Recall@{other}"] == min(1, other / n)


def test_the_nearest_reports_of_one_scan(constant_inputs, text_encoder, tmp_path, capsys):
    def texts(text):
        return np.eye(12)[WORDS.index(text.split()[0])]
    index = items_of(reports=[f"{word} lung." for word in WORDS[1:5] * 2])
    network = TwoTowers(text_encoder, np.eye(12)[[0, 3]], texts)
    evaluation.predict_scan(run_of(network, "ct-rate-retrieval"), items_of(n=2)[1], tmp_path, index)
    rows = list(csv.DictReader((tmp_path / "retrieved.csv").open()))
    assert len(rows) == 4, "each report once"
    assert rows[0]["report"] == f"{WORDS[3]} lung." and float(rows[0]["similarity"]) == pytest.approx(1)
    assert f"{WORDS[3]} lung." in capsys.readouterr().out


def test_probabilities_and_report_of_one_scan(constant_inputs, tmp_path, capsys):
    one = items_of(n=2)[1]
    evaluation.predict_scan(run_of(Table([[0, 0, 0], [0, 3, 1]]), "cc-ccii"), one, tmp_path)
    rows = list(csv.DictReader((tmp_path / "probabilities.csv").open()))
    expected = np.exp([0, 3, 1]) / np.exp([0, 3, 1]).sum()
    assert [float(row["probability"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-6)
    evaluation.predict_scan(run_of(Writer(["lung", "no effusion"], WORDS), "ctrg", vocabulary=WORDS), one, tmp_path)
    assert (tmp_path / "report.txt").read_text() == "no effusion\n"
    assert "common pneumonia" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- the command line

def run(*flags, cwd=None):
    return subprocess.run(check=False, args=[sys.executable, str(ROOT / "eval.py"), *map(str, flags)], cwd=cwd, capture_output=True, text=True, timeout=120)


def here(*flags, cwd):
    """The same within this process, which need not import torch anew."""
    args, before = evaluation.flags().parse_args([str(flag) for flag in flags]), os.getcwd()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            evaluation.COMMANDS[args.command](args)
        return SimpleNamespace(returncode=0, stdout=out.getvalue(), stderr="")
    except (ValueError, OSError) as error:
        return SimpleNamespace(returncode=1, stdout="", stderr=str(error))
    finally:
        os.chdir(before)


def test_help_does_not_wait_for_torch():
    code = "import sys, runpy\nsys.argv = ['eval.py', '--help']\ntry:\n runpy.run_path('eval.py', run_name='__main__')\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    done = subprocess.run(check=False, args=[sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("--task", "--input", "probe", "embed", "export", "radar"))


def test_flags_before_a_command_are_refused():
    done = run("--split", "train", "zeroshot", "--checkpoint", "last.pt", "--data", "demo")
    assert done.returncode == 2 and "flags stand behind zeroshot" in done.stderr


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return model.build_encoder("swin_t")


def test_embed(tmp_path, encoder):
    rng = np.random.default_rng(0)
    (tmp_path / "scans" / "deep").mkdir(parents=True)
    affine = np.diag([8, 8, 8, 1])
    for name in ("a.nii.gz", "deep/b.nii.gz"):
        volume = rng.normal(-1000, 10, (24, 24, 24))
        volume[4:20, 4:20, 4:20] = rng.normal(40, 10)
        nib.save(nib.Nifti1Image(volume.astype(np.int16), affine), tmp_path / "scans" / name)
    image = sitk.GetImageFromArray(volume.astype(np.int16))
    image.SetSpacing((8, 8, 8))
    sitk.WriteImage(image, str(tmp_path / "scans" / "c.mha"))
    (tmp_path / "scans" / "broken.nii.gz").write_bytes(b"nothing")
    torch.save({"model": {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()},
                "config": {"encoder": "swin_t", "size": [32, 32, 64]}}, tmp_path / "last.pt")
    done = run("embed", "--checkpoint", "last.pt", "--input", "scans", "--out", "new/emb.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "broken.nii.gz" in done.stderr and "1 scans left out" in done.stdout
    with np.load(tmp_path / "new" / "emb.npz", allow_pickle=False) as found:
        assert found["ids"].tolist() == ["a.nii.gz", "c.mha", "deep/b.nii.gz"]
        assert found["features"].dtype == np.float32 and found["features"].shape == (3, encoder.channels[-1])
        items = [data.Item("", tmp_path / "scans" / name, "", "test", "", None, None) for name in found["ids"]]
        expected = evaluation.global_features(encoder, items, None, (32, 32, 64))
        assert np.allclose(found["features"], expected, atol=1e-5)
    done = here("embed", "--checkpoint", "last.pt", "--input", "scans/broken.nii.gz", cwd=tmp_path)
    assert done.returncode == 1 and "broken.nii.gz" in done.stderr


def test_what_a_mixed_folder_holds(tmp_path):
    """Files of all endings, folders of DICOM and of pictures; tables, previews and hidden files are none."""
    for name in ("a.nii", "B.NII.GZ", "deep/c.mhd", "deep/d.nhdr", "deep/e.nrrd", "deep/f.mha", "deep/g.npz", "deep/h.npy"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    others = ("deep/c.raw", "deep/preview.png", "table.csv", "notes/readme.md", "._a.nii", ".cache/z.nii", "slices/1.PNG", "slices/2.PNG")
    for name in others:
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    (tmp_path / "in" / "bare").mkdir()
    (tmp_path / "in" / "bare" / "1.dcm").write_bytes(b"no preamble")
    for name in ("series/IM1", "series/IM2", "with/1.2.3", "with/i.nii", "DICOMDIR"):
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(bytes(128) + b"DICM")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "in" / "deep")
    found = [path.relative_to(tmp_path / "in").as_posix() for path in evaluation.find_scans(tmp_path / "in")]
    assert found == ["B.NII.GZ", "a.nii", "bare", *(f"deep/{name}" for name in ("c.mhd", "d.nhdr", "e.nrrd", "f.mha", "g.npz", "h.npy")),
                     "series", "slices", "with", "with/i.nii"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "IM1").write_bytes(b"no preamble")
    assert evaluation.find_scans(tmp_path / "old") == [tmp_path / "old"]
    assert evaluation.find_scans(tmp_path / "in" / "notes") == [tmp_path / "in" / "notes"]


def test_embed_names_folders_of_slices(tmp_path, encoder, monkeypatch):
    torch.save({"model": {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()},
                "config": {"encoder": "swin_t", "size": [32, 32, 32]}}, tmp_path / "last.pt")
    for z, grey in enumerate(np.random.default_rng(0).integers(0, 255, (8, 24, 24)).astype(np.uint8)):
        (tmp_path / "set" / "scan").mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(sitk.GetImageFromArray(grey), str(tmp_path / "set" / "scan" / f"{z}.png"))
    nib.save(nib.Nifti1Image(chest(np.random.default_rng(0)).T, np.eye(4)), tmp_path / "set" / "b.nii.gz")
    for place, ids in (("set", ["b.nii.gz", "scan"]), ("set/scan", ["scan"]), ("set/b.nii.gz", ["b.nii.gz"])):
        done = here("embed", "--checkpoint", "last.pt", "--input", place, "--out", "e.npz", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert np.load(tmp_path / "e.npz")["ids"].tolist() == ids and "0 scans left out" in done.stdout


def test_radar(tmp_path):
    for method, values in (("ours", (0.9, 0.7, 30.)), ("scratch", (0.8, 0.6, 20.))):
        for task, metric, value, chance in zip(("cc-ccii", "acdc", "ctrg"), ("ACC", "Dice", "BLEU-4"), values, (0.4, 0.1, 10.)):
            (tmp_path / method / task).mkdir(parents=True)
            result = {"task": task, "metric": metric, "value": value, "chance": chance} | ({"std": 0.0123} if task == "acdc" else {})
            (tmp_path / method / task / "result.json").write_text(json.dumps(result))
    (tmp_path / "scratch" / "ctrg" / "result.json").unlink()
    files = sorted(tmp_path.glob("*/*/result.json"))
    done = here("radar", *files, "--out", "radar.png", cwd=tmp_path)
    assert done.returncode == 0 and "2 methods" in done.stdout, done.stderr
    assert done.stdout.splitlines()[:4] == [
        "| method | acdc Dice | cc-ccii ACC | ctrg BLEU-4 |", "| --- | --- | --- | --- |",
        "| ours | 70.00±1.23 | 90.00 | 30.00 |", "| scratch | 60.00±1.23 | 80.00 |  |"]
    drawn(tmp_path / "radar.png")
    done = here("radar", *files, files[0], cwd=tmp_path)
    assert done.returncode == 1 and "a second result of ours for acdc" in done.stderr
    (tmp_path / "other.json").write_text("[1]")
    done = here("radar", "other.json", cwd=tmp_path)
    assert done.returncode == 1 and "other.json" in done.stderr


def test_radar_tells_what_cannot_be_compared(tmp_path, caplog):
    same = {"task": "ct-rate-retrieval", "metric": "Recall@5", "chance": 0.25, "n": 20, "ids_sha1": "a", "split": "test"}
    cases = {"ours": same | {"value": 0.5}, "same": same | {"value": 0.25}, "older": same | {"value": 0.3, "more": {}},
             "fold": same | {"value": 0.4, "ids_sha1": "b", "n": 21}, "metric": same | {"value": 0.4, "metric": "Recall@50"},
             "null": same | {"value": None, "reason": "no report"}}
    del cases["older"]["ids_sha1"]
    for name, result in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps(result))

    def radar(*names):
        caplog.clear()
        return here("radar", *(f"{name}/result.json" for name in names), cwd=tmp_path)
    done = radar("ours", "same", "older")
    assert done.returncode == 0 and "warning" not in caplog.text
    done = radar("ours", "fold")
    assert "| fold | 40.00 |" in done.stdout
    for key in ("n", "ids_sha1"):
        assert f"fold/result.json cannot be compared with ours: another {key}\n" in caplog.text
    done = radar("ours", "metric")                              # another column
    assert "| ours | 50.00 |  |" in done.stdout and "| metric |  | 40.00 |" in done.stdout and "warning" not in caplog.text
    assert "| null |  |" in radar("ours", "null").stdout


# ------------------------------------------------------------------------------- checkpoints and the command lines

def save_checkpoint(path, task, **more):
    """A network of a task that was never trained, as finetune.py writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    config = config_of(task, **more)
    if data.TASKS[task].kind in ("prompt", "retrieve") and not (path.parent / "text_encoder").exists():
        phantoms.make_demo_text_encoder(path.parent / "text_encoder", [f"not {name}." for name in data.LABELS])
    torch.manual_seed(0)
    row = data.TASKS[task]._replace(size=tuple(config["size"]), spacing=config["spacing"] and tuple(config["spacing"]))
    if task in ("labels", "segment"):
        row = row._replace(classes=("one", "two"))              # its data told them
    network = model.build_network(row.kind, len(row.classes), config, path.parent).eval()
    weights = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("text_encoder.")}
    fields = {name: value for name, value in row._asdict().items() if name not in ("records", "layout", "recipe", "demo")}
    torch.save({"model": weights, "config": config, "merging": "monai", "task": fields}, path)
    return network


@pytest.mark.parametrize("task", list(data.TASKS))
def test_a_checkpoint_comes_back(tmp_path, monkeypatch, task):
    trained, network = data.TASKS[task], save_checkpoint(tmp_path / "best.pt", task, spacing=[2., 2., 2.])
    torch.manual_seed(1)
    monkeypatch.setitem(data.TASKS, task, data.TASKS[task]._replace(overlap=0.9, classes=("edited",)))      # since
    found, row, config, cache, device = evaluation.load_checkpoint(tmp_path / "best.pt", "folder")
    assert type(found) is type(network) and not found.training and config["task"] == task
    classes = trained.classes if task not in ("labels", "segment") else ("one", "two")
    assert row == trained._replace(size=(32, 32, 32), spacing=(2, 2, 2), classes=classes) and (cache, device) == ("folder", "cpu")
    ours, theirs = found.state_dict(), network.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_no_checkpoint_of_a_task_is_refused(tmp_path, encoder):
    torch.save(model.export_encoder(encoder), tmp_path / "encoder.pt")
    weights = {"encoder.w": torch.zeros(1)}
    torch.save({"model": weights, "config": {"encoder": "swin_t", "steps": 9}}, tmp_path / "last.pt")
    (tmp_path / "text.pt").write_text("no weights")
    for name, found in (("encoder.pt", "best.pt of finetune.py"), ("last.pt", "best.pt of finetune.py"), ("text.pt", "read"),
                        ("absent.pt", "")):
        with pytest.raises(ValueError, match=f"{name}.*{found}"):
            evaluation.load_checkpoint(tmp_path / name)
    save_checkpoint(tmp_path / "best.pt", "stoic")
    checkpoint = torch.load(tmp_path / "best.pt", weights_only=True)
    del checkpoint["model"]["head.weight"]
    torch.save(checkpoint, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="head.weight"):
        evaluation.load_checkpoint(tmp_path / "best.pt")


def read_graph(path):
    """What eval.py export wrote, without the project -> (callable, what its mg3d.json says)"""
    extra = {"mg3d.json": ""}
    graph = torch.export.load(path, extra_files=extra).module()
    return graph, json.loads(extra["mg3d.json"])


@pytest.mark.parametrize("task", ["cc-ccii", "msd-lung", "ctrg", "ct-rate-vocab", "ct-rate-retrieval"])
def test_a_network_of_a_task_is_exported(tmp_path, monkeypatch, task):
    network = save_checkpoint(tmp_path / "best.pt", task, size=[16, 16, 16])
    done = here("export", "--checkpoint", "best.pt", "--out", "new/net.pt2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote new/net.pt2: from " in done.stdout and [path.name for path in (tmp_path / "new").iterdir()] == ["net.pt2"]
    graph, notes = read_graph(tmp_path / "new" / "net.pt2")
    assert notes["task"] == task and notes["classes"] == list(data.TASKS[task].classes)
    is_cropped = task in ("ctrg", "ct-rate-vocab", "ct-rate-retrieval")
    assert notes["crop"] == (list(data.CROP) if is_cropped else None)
    assert notes["inputs"]["volume"] == [1, 1, 16, 16, 16] and notes["window"] == list(data.TASKS[task].window)
    volume = torch.rand(1, 1, 16, 16, 16)
    name, shapes = next(iter(notes["outputs"].items()))
    with torch.no_grad():
        if task == "ctrg":                              # a short report, in the length of the graph
            tokens = torch.randint(16, (1, 5))
            shown = F.pad(tokens, (0, notes["inputs"]["tokens"][1] - 5), value=model.PAD)
            found, expected = graph(volume, shown), network(volume, tokens)
            assert name == "logits" and list(found.shape) == shapes[0] == [1, 151, len(notes["vocabulary"])]
            found = found[:, :5]
        else:
            found, expected = graph(volume), network(volume) if name == "logits" else None
            assert [list(found.shape)] == shapes
        if name == "feature":
            monkeypatch.setattr(data, "network_input", lambda item, task, cache: volume[0])
            item = data.Item("1", Path("1"), "", "test", "1", None, None)
            trained = run_of(network, task)
            expected = evaluation.predict_features(trained, [item])
        if task == "ct-rate-vocab":                     # the file suffices for the findings
            cosines = found @ torch.tensor(notes["texts"]).T
            log_odds = (cosines[:, ::2] - cosines[:, 1::2]) / notes["temperature"]
            assert np.allclose(log_odds, evaluation.predict_log_odds(trained, [item]), atol=1e-4)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


STAND_ALONE = """
import importlib.util, torch
assert importlib.util.find_spec("data") is importlib.util.find_spec("losses") is None
torch.set_num_threads(2)
with torch.inference_mode():
    torch.save(torch.export.load("net.pt2").module()(torch.load("volume.pt")), "maps.pt")
"""


def test_an_exported_encoder_needs_nothing_of_the_project(tmp_path, encoder):
    torch.save({"model": {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()},
                "config": {"encoder": "swin_t", "size": [16, 16, 24], "hu": "header"}}, tmp_path / "last.pt")
    done = here("export", "--checkpoint", "last.pt", "--out", "net.pt2", cwd=tmp_path)
    assert done.returncode == 0 and "[1, 96, 2, 2, 3]" in done.stdout, done.stderr
    volume = torch.rand(1, 1, 16, 16, 24)
    torch.save(volume, tmp_path / "volume.pt")
    done = subprocess.run([sys.executable, "-c", STAND_ALONE], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        maps = encoder(volume)
    for found, expected in zip(torch.load(tmp_path / "maps.pt"), maps, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    notes = read_graph(tmp_path / "net.pt2")[1]
    assert (notes["task"], notes["hu"], notes["window"]) == (None, "header", [-1000, 1000])
    assert (notes["view"], notes["crop"]) == ("whole", [0.88, 0.66, 0.88])


def test_what_cannot_be_exported_is_named(tmp_path, monkeypatch, encoder):
    torch.save(model.export_encoder(encoder), tmp_path / "encoder.pt")
    save_checkpoint(tmp_path / "best.pt", "luna16")
    (tmp_path / "old.pt2").write_text("a graph")
    export = partial(here, "export", "--out", "old.pt2", cwd=tmp_path)
    for flags, words in ((["encoder.pt"], "does not say which encoder it holds: give --encoder"),
                         (["encoder.pt", "--encoder", "unet"], "does not fill the encoder"),
                         (["encoder.pt", "--encoder", "swin_t", "--size", 32, 32, 36], "--size 32 32 36: every side must be a multiple of 8"),
                         (["best.pt", "--size", 20, 16, 16], "--size 20 16 16: every side must be a multiple of 8"),
                         (["absent.pt"], "absent.pt: found no such file")):
        done = export("--checkpoint", *flags)
        assert done.returncode == 1 and words in done.stderr
    load_graph = torch.export.load
    monkeypatch.setattr(torch.export, "load", lambda path: SimpleNamespace(module=lambda: lambda x: 1 + load_graph(path).module()(x)))
    with pytest.raises(AssertionError, match="not close"):
        export("--checkpoint", "best.pt", "--size", 16, 16, 16)
    assert (tmp_path / "old.pt2").read_text() == "a graph"
    assert {path.name for path in tmp_path.iterdir()} == {"encoder.pt", "best.pt", "old.pt2"}


def chest(rng, shape=(40, 40, 40)):
    """Air, a body and two lungs: what passes as Hounsfield units (z, y, x)"""
    volume = rng.normal(-1000, 5, shape)
    volume[:, 4:-4, 4:-4] = rng.normal(40, 10, volume[:, 4:-4, 4:-4].shape)
    volume[6:-6, 8:-8, 8:16] = volume[6:-6, 8:-8, -16:-8] = -850
    return volume.astype(np.int16)


def write_itk(path, array, spacing=(2., 2., 2.), origin=(10., -20., 30.), direction=None):
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    image.SetDirection(direction or np.eye(3).ravel().tolist())
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(path))
    return image


@pytest.fixture(scope="module")
def stoic(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stoic")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(60):
        write_itk(folder / "set" / "data" / "mha" / f"{i}.mha", chest(rng, (12, 40, 40)), (8., 8., 25.))
        rows.append((i, *((0, 0), (1, 0), (1, 1))[i % 3]))
    (folder / "set" / "metadata").mkdir()
    with (folder / "set" / "metadata" / "reference.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("PatientID", "probCOVID", "probSevere"), *rows])
    save_checkpoint(folder / "best.pt", "stoic")
    return folder


def test_the_command_line_of_a_task(stoic):
    done = run("--task", "stoic", "--data", "set", "--checkpoint", "best.pt", cwd=stoic)
    assert done.returncode == 0, done.stderr
    result = json.loads((stoic / "eval" / "result.json").read_text())
    test = [item for item in data.load_task("stoic", stoic / "set") if item.split == "test"]
    assert result["more"]["n_all_items"] == len(test) == 12 and result["n"] == 8 and result["split"] == "test"
    assert result["ids_sha1"] == hashlib.sha1("\n".join(sorted(item.id for item in test)).encode()).hexdigest()
    rows = list(csv.DictReader((stoic / "eval" / "predictions.csv").open()))
    among = [row for row in rows if row["true COVID-19"] == "1.0"]
    score, label = (np.array([float(row[name]) for row in among]) for name in ("severe", "true severe"))
    assert result["value"] == pytest.approx(evaluation.auroc(score, label))
    last = done.stdout.strip().splitlines()[-2]
    assert f"stoic: AUC {result['value']:.3f} [" in last and "n = 8 (test), chance 0.500" in last
    drawn(stoic / "eval" / "roc.png")


@pytest.mark.parametrize("more", [{"seed": 3}, {"fold": 2}])
def test_the_split_of_the_training_is_that_of_the_test(stoic, more):
    save_checkpoint(stoic / "other" / "best.pt", "stoic", **more)
    done = here("--task", "stoic", "--data", "set", "--checkpoint", "other/best.pt", "--out", "other", cwd=stoic)
    assert done.returncode == 0, done.stderr
    expected, usual = ([item for item in data.load_task("stoic", stoic / "set", **some) if item.split == "test"]
                       for some in (more, {}))
    found = json.loads((stoic / "other" / "result.json").read_text())["ids_sha1"]
    assert found == evaluation._hash(expected) != evaluation._hash(usual)


def test_patients_of_the_training_in_the_test_part_are_told(stoic, caplog):
    items = data.load_task("stoic", stoic / "set")
    trained = sorted({item.patient for item in items if item.split != "test"})
    tested = [item.patient for item in items if item.split == "test"]
    for patients, n in ((trained, 0), (trained + tested[:2], 2)):
        (stoic / "seen").mkdir(exist_ok=True)
        save_checkpoint(stoic / "seen" / "best.pt", "stoic", patients=sorted(data.patient_hashes(patients)))
        done = here("--task", "stoic", "--data", "set", "--checkpoint", "seen/best.pt", "--out", "seen", cwd=stoic)
        assert done.returncode == 0, done.stderr
        assert f"patients seen in training: {n}" in done.stdout and (f"{n} patients of the test part" in caplog.text) == bool(n)
        assert json.loads((stoic / "seen" / "result.json").read_text())["more"]["patients_seen_in_training"] == n


def test_patients_of_the_pretraining_in_the_test_part_are_told(stoic, caplog):
    tested = [item.patient for item in data.load_task("stoic", stoic / "set") if item.split == "test"]
    (stoic / "pre").mkdir()
    save_checkpoint(stoic / "pre" / "best.pt", "stoic", init="last.pt",
                    pretrained_on=sorted(data.patient_hashes([*tested[:3], "somebody else"])))
    done = here("--task", "stoic", "--data", "set", "--checkpoint", "pre/best.pt", "--out", "pre", cwd=stoic)
    assert "3 of 12 patients of the test part bear names of patients that last.pt was trained on" in caplog.text
    assert "patients seen in pretraining: 3" in done.stdout
    here("--task", "stoic", "--data", "set", "--split", "train", "--checkpoint", "pre/best.pt", "--out", "pre", cwd=stoic)
    assert json.loads((stoic / "pre" / "result.json").read_text())["more"]["patients_seen_in_pretraining"] is None
    save_checkpoint(stoic / "pre" / "best.pt", "stoic", init="monai.pt", pretrained_on=None)
    here("--task", "stoic", "--data", "set", "--checkpoint", "pre/best.pt", "--out", "pre", cwd=stoic)
    assert json.loads((stoic / "pre" / "result.json").read_text())["more"]["patients_seen_in_pretraining"] is None


def test_one_scan_has_the_probabilities_of_the_set(stoic):
    item = data.load_task("stoic", stoic / "set")[0]
    expected = evaluation.predict_classes(evaluation.load_checkpoint(stoic / "best.pt", stoic / "cache"), [item])[0]
    done = here("--task", "stoic", "--checkpoint", "best.pt", "--input", item.volume, "--out", "one", cwd=stoic)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((stoic / "one" / "probabilities.csv").open()))
    assert [row["class"] for row in rows] == ["COVID-19", "severe"]
    assert [float(row["probability"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-6)
    assert f"{expected[1]:.3f}" in done.stdout


def test_wrong_requests_are_named(stoic):
    (stoic / "notes.txt").write_text("no scan")
    nib.save(nib.Nifti1Image(np.eye(32, dtype=np.uint8)[..., None].repeat(8, 2), np.eye(4)), stoic / "a_mask.nii.gz")
    scan = "set/data/mha/0.mha"
    for flags, *words in ((["--task", "acdc", "--input", scan], "task stoic", "acdc"), (["--task", "lung", "--input", scan], "task stoic", "lung"),
                          (["--task", "stoic"], "--data or --input"), (["--task", "stoic", "--input", "notes.txt"], "notes.txt", "neither two DICOM slices"),
                          (["--task", "stoic", "--input", "absent.nii"], "absent.nii"), (["--task", "stoic", "--input", "a_mask.nii.gz"], "a_mask", "Hounsfield"),
                          (["--task", "stoic", "--input", scan, "--centre", 1, 2, 3], "no --centre"), (["--task", "stoic", "--data", "nowhere"], "nowhere")):
        done = here(*flags, "--checkpoint", "best.pt", cwd=stoic)
        assert done.returncode == 1
        assert all(word in done.stderr for word in words), done.stderr
    done = run("--task", "stoic", "--input", "notes.txt", "--checkpoint", "best.pt", cwd=stoic)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr


def test_a_candidate_is_looked_at_where_the_file_says(tmp_path):
    rng = np.random.default_rng(0)
    volume = chest(rng, (40, 44, 48))
    volume[20:24, 28:32, 34:38] = 300                                               # what the cubes below hold
    write_itk(tmp_path / "scan.mhd", volume)
    nib.save(nib.Nifti1Image(volume.T, np.array([[-2., 0, 0, -10], [0, -2, 0, 20], [0, 0, 2, 30], [0, 0, 0, 1]])), tmp_path / "scan.nii.gz")
    save_checkpoint(tmp_path / "best.pt", "luna16")
    lps = np.array([10 + 2 * 36, -20 + 2 * 30, 30 + 2 * 22])
    found = []
    for name, centre in (("scan.mhd", lps), ("scan.nii.gz", lps * [-1, -1, 1]), ("scan.mhd", lps - 20)):
        done = here("--task", "luna16", "--checkpoint", "best.pt", "--input", name, "--centre", *centre, "--out", "o", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        found.append(float(next(iter(csv.DictReader((tmp_path / "o" / "probabilities.csv").open())))["probability"]))
    assert found[0] == pytest.approx(found[1], abs=1e-6) and found[0] != pytest.approx(found[2], abs=1e-6)
    done = here("--task", "luna16", "--checkpoint", "best.pt", "--input", "scan.mhd", cwd=tmp_path)
    assert done.returncode == 1 and "--centre X Y Z" in done.stderr


def test_the_mask_of_a_meta_image_has_its_world(tmp_path):
    """Smaller than the patch along z, oblique and flipped: the mask lies over the scan."""
    turn = np.array([[np.cos(.2), -np.sin(.2), 0], [np.sin(.2), np.cos(.2), 0], [0, 0, -1]])
    image = write_itk(tmp_path / "scan.mha", chest(np.random.default_rng(0), (20, 40, 70)), (1.5, 2., 3.), direction=turn.ravel().tolist())
    save_checkpoint(tmp_path / "best.pt", "msd-lung", spacing=[3., 3., 3.])
    done = here("--task", "msd-lung", "--checkpoint", "best.pt", "--input", "scan.mha", "--out", "o", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    mask = sitk.ReadImage(str(tmp_path / "o" / "scan_mask.nii.gz"))
    assert mask.GetSize() == image.GetSize() and np.allclose(mask.GetSpacing(), image.GetSpacing(), atol=1e-5)
    for index in ((0, 0, 0), (5, 30, 11)):
        assert np.allclose(mask.TransformIndexToPhysicalPoint(index), image.TransformIndexToPhysicalPoint(index), atol=1e-3)
    assert "lung cancer" in done.stdout and " ml" in done.stdout


def test_reports_to_search_are_asked_for(tmp_path):
    write_itk(tmp_path / "scan.mha", chest(np.random.default_rng(0)))
    save_checkpoint(tmp_path / "best.pt", "ct-rate-retrieval")
    done = here("--task", "ct-rate-retrieval", "--checkpoint", "best.pt", "--input", "scan.mha", cwd=tmp_path)
    assert done.returncode == 1 and "--data" in done.stderr


def test_report_of_one_scan(tmp_path):
    write_itk(tmp_path / "scan.mha", chest(np.random.default_rng(0)))
    save_checkpoint(tmp_path / "best.pt", "ctrg")
    done = here("--task", "ctrg", "--checkpoint", "best.pt", "--input", "scan.mha", "--out", "o", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "report.txt").read_text().strip() in done.stdout


# ------------------------------------------------------------- zero-shot findings and retrieval of a dual encoder

def test_a_bootstrap_of_several_numbers_is_that_of_each():
    rng = np.random.default_rng(0)
    scores, truth = rng.normal(size=(60, 4)), rng.integers(0, 2, (60, 4)).astype(float)
    truth[::7, 1], truth[:, 3] = np.nan, 1
    table = evaluation.auc_table(scores, truth, ["a", "b", "c", "one class"], range(60))
    assert list(table) == ["a", "b", "c", "mean", evaluation.WEIGHTED]
    for k, name in enumerate("abc"):
        expected = evaluation.auroc(scores[:, k], truth[:, k]), evaluation.bootstrap(evaluation.auroc, scores[:, k], truth[:, k])
        assert table[name] == pytest.approx([expected[1][0], expected[0], expected[1][1]])
    aucs, positives = [table[name][1] for name in "abc"], [(truth[:, k] == 1).sum() for k in range(3)]
    assert table["mean"][1] == pytest.approx(np.mean(aucs)) == pytest.approx(evaluation.macro_auroc(scores, truth))
    assert (table["mean"][0], table["mean"][2]) == pytest.approx(evaluation.bootstrap(evaluation.macro_auroc, scores, truth))
    assert table[evaluation.WEIGHTED][1] == pytest.approx(np.dot(aucs, positives) / sum(positives))
    for n in (1, 2):
        empty = evaluation.auc_table(scores[:n], np.ones((n, 4)), "abcd", range(n))
        assert list(empty) == ["mean", evaluation.WEIGHTED] and np.isnan(list(empty.values())).all()


def retrieval_by_loops(similarity, ids, reports):
    """{protocol: ranks of the reports, ranks of the volumes}: each candidate is a set of volumes"""
    def scan(name):
        parts = name.removesuffix(".nii.gz").split("_")
        return "_".join(parts[:3]) if parts[0].endswith(("train", "valid")) else name
    order, found = sorted(range(len(ids)), key=lambda i: ids[i]), {}
    scans, texts = {}, {}
    for i in order:
        scans.setdefault(scan(ids[i]), {i})
        texts.setdefault(reports[i], set()).add(i)
    for name, groups in (("volumes", [{i} for i in range(len(ids))]), ("scans", list(scans.values())), ("unique findings", list(texts.values()))):
        ranks = ([], [])
        for own in groups:
            for rank, score in zip(ranks, (lambda a, b: max(similarity[min(a, key=order.index), j] for j in b),
                                           lambda a, b: max(similarity[min(b, key=order.index), j] for j in a))):
                rank.append(1 + sum(score(own, other) >= score(own, own) for other in groups if other is not own))
        found[name] = ranks
    return found


def test_three_protocols_of_retrieval_in_both_directions(constant_inputs, text_encoder, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    ids = [f"set/train_{i // 3}_a_{i % 3 + 1}.nii.gz" for i in range(12)] + [f"scan_{i}_a_1" for i in range(12, 24)]
    said = [*np.repeat(range(4), 3), *range(4, 12), 5, 5, 5, 11]        # 12 texts: of reconstructions, and of others alike
    reports = [f"{WORDS[k]} lung." for k in said]
    vectors = rng.integers(-2, 3, (12, 3)).astype(float) + [0, 0, 9]    # integers: some similarities tie
    images = [vectors[k] + rng.integers(-1, 2, 3) for k in said]
    items = [item._replace(id=name) for item, name in zip(items_of(reports=reports), ids)]
    order = dict(zip(ids, range(24)))
    monkeypatch.setattr(data, "network_input", lambda item, task, cache: torch.full((1, 4, 4, 4), float(order[item.id])))
    towers = TwoTowers(text_encoder, np.array(images), lambda text: vectors[WORDS.index(text.split()[0])])
    row = data.TASKS["ct-rate-retrieval"]
    result = evaluation.evaluate(run_of(towers, "retrieval", row=row), items, tmp_path)
    features = evaluation.predict_features(run_of(towers, "retrieval", row=row), items)
    similarity = (evaluation.text_features(towers, reports) @ features.T).numpy()
    expected = retrieval_by_loops(similarity, ids, reports)
    assert list(result["more"]["protocols"]) == list(expected)
    assert [len(ranks[0]) for ranks in expected.values()] == [24, 16, 12]
    for name, found in result["more"]["protocols"].items():
        n = len(expected[name][0])
        assert found["n"] == n and found["chance of mean_rank"] == (n + 1) / 2
        for ranks, numbers in zip(np.array(expected[name]), (found, found["volume to report"])):
            assert numbers["mean_rank"] == pytest.approx(ranks.mean()) and numbers["median_rank"] == np.median(ranks)
            for k in (1, 5, 10, 50, 100):
                share = (ranks <= k).mean()
                assert math.isnan(numbers[f"Recall@{k}"]) if k >= n else numbers[f"Recall@{k}"] == pytest.approx(share)
    unique = result["more"]["protocols"]["unique findings"]
    assert result["metric"] == "Recall@5" and result["value"] == unique["Recall@5"] and result["n"] == 12
    assert result["chance"] == 5 / 12 and result["protocol"].startswith("unique findings: a report finds")
    assert result["ids_sha1"] == hashlib.sha1("\n".join(sorted(ids)).encode()).hexdigest()
    assert evaluation.evaluate(run_of(towers, "ct-rate-retrieval"), items)["n"] == 24     # the task counts volumes
    drawn(tmp_path / "recall.png")


def test_another_patients_report_or_label_gives_chance(constant_inputs, text_encoder):
    """Features that are perfect for the right pairs tell nothing of permuted ones."""
    rng = np.random.default_rng(0)
    labels, names = rng.integers(0, 2, (400, 4)).astype(float), [name.lower() for name in data.LABELS[:4]]

    def texts(text):
        feature = np.zeros(4)
        feature[names.index(text.removeprefix("not ").removesuffix(".").strip())] = -1 if text.startswith("not ") else 1
        return feature
    row = data.TASKS["ct-rate-vocab"]._replace(classes=data.LABELS[:4])
    towers = run_of(TwoTowers(text_encoder, 2 * labels - 1, texts), "zeroshot", row=row)
    assert evaluation.evaluate(towers, items_of(labels))["value"] == 1
    permuted = evaluation.evaluate(towers, items_of(rng.permutation(labels)))
    assert permuted["interval"][0] < 0.5 < permuted["interval"][1] and abs(permuted["value"] - 0.5) < 0.05
    similarity = torch.eye(400)
    for order, low, high in ((np.arange(400), 1, 1), (rng.permutation(400), 0, 0.06)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "text_features", lambda network, reports, order=order: similarity[order])
            items = items_of(reports=[f"Report {i}." for i in range(400)])
            scores, metric, _, ranks = evaluation.score_retrieval(
                run_of(None, "retrieval", row=data.TASKS["ct-rate-retrieval"]), items, similarity + 1e-3 * torch.randn(400, 400), None, ())
            assert scores["metric"] == "Recall@10" and scores["chance"] == 0.025 and low <= metric(ranks) <= high


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """30 scans with a large or a small block, a manifest of them, and last.pt as of pretrain.py with --clip, whose image
    projection is fitted to the texts. Two scans are of the patient that it was trained on."""
    folder = tmp_path_factory.mktemp("towers")
    rng, rows = np.random.default_rng(0), []
    for i in range(30):
        large, coin = i % 2, rng.integers(0, 2)
        volume = rng.normal(-1000, 10, (24, 24, 24))
        side = 11 + 8 * large + rng.integers(0, 3)
        volume[2:2 + side, 2:2 + side, 2:2 + side] = 40
        nib.save(nib.Nifti1Image(volume.astype(np.int16), np.diag([8, 8, 8, 1])), folder / f"{i}.nii.gz")
        report = f"There is {'a large' if large else 'no'} block. Scan {i}."
        split = "train" if i < 8 else "valid" if i < 10 else "test"
        rows.append([f"{i}.nii.gz", report, split, f"P{min(i, 28)}", large, "" if i == 12 else -1 if i == 13 else coin, large])
    columns = ["volume", "report", "split", "patient", "large_block", "Coin", "Cardiomegaly"]
    with (folder / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    (folder / "p.csv").write_text("name,positive,negative\nLarge block,a large block.,no block.\ncoin,a coin.,no coin.\n")
    phantoms.make_demo_text_encoder(folder / "text_encoder", [*(row[1] for row in rows), "a coin.", *data.LABELS])
    config = {**dict.fromkeys(model.LOSSES, False), "clip": True, "encoder": "swin_t", "use_checkpoint": False, "embed_dim": 24,
              "text_encoder": "demo", "size": [32, 32, 32], "hu": "header", "mlm_prob": 0.15, "temperature": 0.1, "batch_size": 4, "workers": 0}
    torch.manual_seed(0)
    network = model.build_network("pretrain", 0, config, folder).eval()
    items = data.load_items(folder / "m.csv")[:8]
    features = evaluation.global_features(network.encoder, items, folder / "cache", (32, 32, 32), "header")
    text = evaluation.text_features(network, ["a large block.", "no block."]).double().numpy()
    target = np.array([[-1.], [1.]])[[i % 2 for i in range(8)]] * (text[0] - text[1])
    shift = features.mean(0)
    weight = np.linalg.lstsq(features - shift, target, rcond=1e-6)[0]
    apart = np.linalg.svd(np.stack(text))[2][-1]        # so that cosines are not 1 and -1 alone
    with torch.no_grad():
        network.image_proj.weight.copy_(torch.from_numpy(weight.T))
        network.image_proj.bias.copy_(torch.from_numpy(apart - shift @ weight))
    save_pretrained(folder / "last.pt", network, config)
    return folder, network, config


def save_pretrained(path, network, config):
    weights = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("text_encoder.")}
    patients = sorted(data.patient_hashes(["P28"]))
    torch.save({"model": weights, "config": config, "merging": "monai", "patients": patients}, path)


def test_zeroshot_of_own_prompts(towers, caplog):
    folder, network, _ = towers
    done = here("zeroshot", "--checkpoint", "last.pt", "--data", "m.csv", "--prompts", "p.csv", "--out", "zero", cwd=folder)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "zero" / "result.json").read_text())
    items = [item for item in data.load_items(folder / "m.csv") if item.split == "test"]
    with torch.no_grad():
        volumes = [network.encode_image(data.load_volume(item, None, (32, 32, 32), "header")[None])[0].mean(0) for item in items]
        texts = evaluation.text_features(network, ["a large block.", "no block.", "a coin.", "no coin."])
    cosines = np.array([[F.cosine_similarity(volume, text, dim=0).item() for text in texts] for volume in volumes])
    table = {row["volume"]: row for row in csv.DictReader((folder / "m.csv").open())}
    for k, (name, column) in enumerate((("Large block", "large_block"), ("coin", "Coin"))):
        truth = np.array([{"1": 1, "0": 0}.get(table[item.id][column], math.nan) for item in items])
        score = cosines[:, 2 * k] - cosines[:, 2 * k + 1]
        assert result["per_class"][name] == pytest.approx(evaluation.auroc(score, truth), abs=1e-6)
        assert result["positives"][name] == np.nansum(truth)
    assert result["per_class"]["Large block"] > 0.95 and result["n"] == 20 and result["split"] == "test" and result["chance"] == 0.5
    assert result["value"] == pytest.approx(np.mean(list(result["per_class"].values())))
    assert result["interval"][0] < result["value"] < result["interval"][1]
    low, weighted, high = result["more"]["weighted_auc"]
    positives = list(result["positives"].values())
    assert low < weighted < high and weighted == pytest.approx(np.dot(positives, list(result["per_class"].values())) / sum(positives))
    assert result["ids_sha1"] == hashlib.sha1("\n".join(sorted(item.id for item in items)).encode()).hexdigest()
    assert result["protocol"] == "all items, mean of 2 findings, 'a large block.' against 'no block.' and so on"
    assert result["more"]["score"] == "cosine of pooled features, taught by --clip" and "warning: last.pt was trained" not in caplog.text
    assert result["more"]["patients_seen_in_training"] == 1 and "1 of 19 patients of the test part" in caplog.text
    assert "m.csv: labels of -1 are taken as unknown" in caplog.text
    assert f"zeroshot: AUC {result['value']:.3f} [" in done.stdout and "n = 20 (test), chance 0.500" in done.stdout
    assert f"coin {result['positives']['coin']:45d}" in done.stdout and evaluation.span(result["more"]["intervals"]["coin"]) in done.stdout
    assert data.volume_file(items[0], folder / "cache", (32, 32, 32), "header").exists()        # as in pre-training
    drawn(folder / "zero" / "roc.png")


def test_zeroshot_of_the_findings_and_its_parts(towers, caplog):
    folder = towers[0]
    done = here("zeroshot", "--checkpoint", "last.pt", "--data", "m.csv", "--split", "train", "--out", "of18", cwd=folder)
    assert done.returncode == 0, done.stderr
    result = json.loads((folder / "of18" / "result.json").read_text())
    assert result["n"] == 8 and result["split"] == "train" and "mean of 1 findings (the other 17 have one class alone)" in result["protocol"]
    assert result["value"] == result["per_class"]["Cardiomegaly"] and result["per_class"]["Emphysema"] is None
    assert "the prompts: in 18 of 36 texts there are words that the text encoder does not know: not" in caplog.text     # no report has it
    items = data.load_items(folder / "m.csv")
    assert {item.split for item in evaluation.tested_part(items, None, "")} == {"test"}
    rest = [item for item in items if item.split != "test"]
    assert {item.split for item in evaluation.tested_part(rest, None, "")} == {"valid"}
    assert evaluation.tested_part(items[:8], None, "") == items[:8]
    with pytest.raises(ValueError, match="m.csv: found nothing for the part valid, expected another --split"):
        evaluation.tested_part(items[:8], "valid", "m.csv")


def test_retrieval_from_the_command_line(towers, caplog):
    folder, network, config = towers
    cml = model.MG3D(network.encoder, network.text_encoder, ["cml"], embed_dim=24)
    save_pretrained(folder / "cml.pt", cml, config | {"clip": False, "cml": True})
    shutil.copytree(folder / "text_encoder", folder / "task" / "text_encoder")
    save_checkpoint(folder / "task" / "best.pt", "ct-rate-retrieval")
    for name, taught in (("cml.pt", "nothing"), ("task/best.pt", "ct-rate-retrieval")):
        caplog.clear()
        done = here("retrieval", "--checkpoint", name, "--data", "m.csv", "--out", "found", cwd=folder)
        assert done.returncode == 0, done.stderr
        result = json.loads((folder / "found" / "result.json").read_text())
        assert result["task"] == "retrieval" and result["metric"] == "Recall@5" and result["n"] == 20 and result["chance"] == 0.25
        assert result["value"] == result["more"]["protocols"]["unique findings"]["Recall@5"]
        assert result["more"]["score"] == f"cosine of pooled features, taught by {taught}"
        assert ("cml.pt was trained without --clip" in caplog.text) == (name == "cml.pt")
        assert re.search(r"unique findings +volume to report +20 +\d", done.stdout)
    drawn(folder / "found" / "recall.png")


def test_what_cannot_be_compared_with_texts_is_refused(towers, encoder):
    folder, network, config = towers
    torch.save(model.export_encoder(encoder), folder / "encoder.pt")
    mim = model.MG3D(network.encoder, network.text_encoder, ["ssm"], embed_dim=24)
    save_pretrained(folder / "ssm.pt", mim, config | {"clip": False, "ssm": True})
    save_checkpoint(folder / "stoic.pt", "stoic")
    for name, *words in (("encoder.pt", "encoder.pt: found no text side"), ("ssm.pt", "ssm.pt: found no projection of whole reports"),
                         ("stoic.pt", "stoic.pt: found no projection of whole reports", "ct-rate-vocab"), ("absent.pt", "absent.pt")):
        for task in ("zeroshot", "retrieval"):
            done = here(task, "--checkpoint", name, "--data", "m.csv", "--out", "refused", cwd=folder)
            assert done.returncode == 1 and all(word in done.stderr for word in words), done.stderr
    for name, text, *words in (("columns", "name,text\nx,y\n", "the columns", "positive"), ("none", "name,positive,negative\n", "none.csv: found no row"),
                               ("same", "name,positive,negative\nCoin,a.,a.\n", "line 2", "two texts that differ"),
                               ("empty", "name,positive,negative\nCoin,a coin,\n", "line 2", "two texts that differ"),
                               ("twice", "name,positive,negative\nCoin,a,b\nCoin,b,c\n", "line 3", "'Coin'"),
                               ("absent", "name,positive,negative\nNodule,a nodule,no nodule\n", "m.csv: found the columns", "Nodule"),
                               ("text", "name,positive,negative\nreport,a,b\n", "m.csv, line 2", "0, 1 or, where it is unknown, -1"),
                               ("unknown", "name,positive,negative\nCoin,strange,words\n", "unknown.csv", "unknown words")):
        (folder / f"{name}.csv").write_text(text)
        done = here("zeroshot", "--checkpoint", "last.pt", "--data", "m.csv", "--prompts", f"{name}.csv", "--out", "refused", cwd=folder)
        assert done.returncode == 1 and all(word in done.stderr for word in words), done.stderr
    assert not (folder / "refused").exists()
    items = data.load_items(folder / "m.csv")
    with pytest.raises(ValueError, match="found no columns Cardiomegaly, Coin, expected a manifest"):
        evaluation.label_items(items, ("Cardiomegaly", "Coin"), folder)
    with pytest.raises(ValueError, match="found no label of Cardiomegaly, expected .* --prompts"):
        evaluation.label_items([item._replace(labels=None) for item in items], ("Cardiomegaly",), "m.csv")


def test_volumes_without_a_label_are_left_out(towers, caplog):
    folder = towers[0]
    items = data.load_items(folder / "m.csv")
    found = evaluation.label_items(items, ("Coin",), folder / "m.csv")
    assert [item.id for item in items if item.id not in {other.id for other in found}] == ["12.nii.gz", "13.nii.gz"]
    assert "left out 2 of 30 items without a label" in caplog.text
    both = evaluation.label_items(items, ("Coin", "large block"), folder / "m.csv")
    assert len(both) == 30 and [item.labels[1] for item in both] == [i % 2 for i in range(30)] and np.isnan(both[12].labels[0])
