"""Metrics against naive loops, the linear probe, the pictures."""
import csv
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import reference
import torch
from conftest import REPORTS, SMALL, small_mg3d

import data
import eval as evaluation
import losses
import model
import phantoms
import pretrain

ROOT = Path(__file__).resolve().parent.parent
SIZE = (32, 32, 32)


# ---------------------------------------------------------------------------------------------------- metrics

def pairs(score, label):
    """AUROC by its meaning: every positive against every negative."""
    wins = [(p > n) + (p == n) / 2 for p in score[label == 1] for n in score[label == 0]]
    return np.mean(wins) if wins else float("nan")


@pytest.mark.parametrize("seed", range(5))
def test_auroc_counts_pairs(seed):
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 2, 40)
    for score in (rng.normal(size=40), rng.integers(0, 4, 40), np.zeros(40), label, -label):    # with and without ties
        assert evaluation.auroc(score, label) == pytest.approx(pairs(score, label), abs=1e-12)


def test_auroc_of_one_class_is_nan():
    assert np.isnan(evaluation.auroc([0.1, 0.2], [1, 1])) and np.isnan(evaluation.auroc([0.1, 0.2], [0, 0]))


def test_macro_auroc_leaves_out_unknown_labels_and_absent_classes():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(30, 4)), rng.integers(0, 2, (30, 4)).astype(float)
    labels[::3, 1] = np.nan
    labels[:, 2] = 1
    known = ~np.isnan(labels)
    expected = [pairs(scores[known[:, j], j], labels[known[:, j], j]) for j in (0, 1, 3)]
    assert evaluation.macro_auroc(scores, labels) == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("unknown", [-1, np.nan, 2, 0.5])
def test_an_unknown_label_is_neither_positive_nor_negative(unknown):
    score = np.array([0.9, 0.8, 0.5, 0.4, 0.3, 0.1, 0.95, 0.1])
    label = np.array([1, 1, 0, 1, 0, 0, unknown, unknown])
    assert evaluation.auroc(score, label) == pytest.approx(8 / 9)       # of 3 x 3 pairs one is the wrong way round
    assert evaluation.macro_auroc(score[:, None], label[:, None]) == pytest.approx(8 / 9)
    assert np.isnan(evaluation.auroc(score[[0, 6]], label[[0, 6]]))


def test_a_mean_says_of_how_many():
    assert evaluation.how_many([0.5, 0.7]) == "2 findings"
    assert evaluation.how_many([0.5, np.nan, np.nan]) == "1 findings (the other 2 have one class alone)"


def test_bootstrap_is_reproducible_and_covers():
    rng = np.random.default_rng(0)
    covered, widths = 0, []
    for _ in range(100):
        sample = rng.normal(3, 1, 50)
        low, high = evaluation.bootstrap(np.mean, sample, times=300)
        covered += low <= 3 <= high
        widths.append(high - low)
    assert 88 <= covered <= 99                                  # of 100 intervals of 95 %
    assert np.mean(widths) == pytest.approx(2 * 1.96 / np.sqrt(50), rel=0.1)
    assert evaluation.bootstrap(np.mean, sample) == evaluation.bootstrap(np.mean, sample)
    assert evaluation.bootstrap(np.mean, sample) != evaluation.bootstrap(np.mean, sample, seed=1)


def test_bootstrap_keeps_items_together():
    items = np.arange(20.0)
    assert evaluation.bootstrap(lambda a, b: np.abs(a - b).max(), items, items) == (0, 0)


def test_one_item_has_no_interval():
    assert np.isnan(evaluation.bootstrap(np.mean, np.array([0.7]))).all()
    assert np.isnan(evaluation.bootstrap(np.mean, np.array([]))).all()
    low, high = evaluation.bootstrap(np.mean, np.array([0.0, 1.0]))
    assert (low, high) == (0, 1)


def test_the_scans_of_a_patient_are_drawn_together():
    rng = np.random.default_rng(0)
    names = np.array(["b", "a", "b", "c", "a", "b"])
    score, label = rng.random(6), np.array([0, 1, 1, 0, 0, 1])
    found = evaluation.bootstrap(evaluation.auroc, score, label, patients=names)
    draws, rng = [], np.random.default_rng(0)
    for _ in range(1000):
        rows = [i for drawn in rng.integers(0, 3, 3) for i in range(6) if names[i] == "abc"[drawn]]
        draws.append(evaluation.auroc(score[rows], label[rows]))
    assert found == pytest.approx(np.nanpercentile(draws, [2.5, 97.5]))
    assert found != pytest.approx(evaluation.bootstrap(evaluation.auroc, score, label))
    assert np.isnan(evaluation.bootstrap(np.mean, score, patients=["a"] * 6)).all()


def test_an_interval_covers_where_patients_have_several_scans():
    rng, covered = np.random.default_rng(0), {"scans": 0, "patients": 0}
    for _ in range(100):
        patients = np.repeat(np.arange(40), rng.integers(1, 6, 40))
        values = rng.normal(size=40)[patients]
        for unit, names in (("scans", None), ("patients", patients)):
            low, high = evaluation.bootstrap(np.mean, values, patients=names, times=300)
            covered[unit] += low <= 0 <= high
    assert covered["patients"] >= 86 and covered["scans"] <= 80


@pytest.mark.parametrize("flags", [("probe", "--data", "m.csv", "--checkpoint", "x", "--few", -1),
                                   ("probe", "--data", "m.csv", "--checkpoint", "x", "--batch_size", 0),
                                   ("embed", "--input", "a.nii", "--checkpoint", "x", "--size", 32, 0, 32),
                                   ("pairing", "--data", "m.csv", "--checkpoint", "x", "--seed", -1),
                                   ("--task", "acdc", "--data", "x", "--checkpoint", "x", "--fold", -1)])
def test_numbers_out_of_range_are_refused_by_every_command(command, flags):
    code, text = command("eval.py", *flags)
    name, values = next((flag, flags[i + 1:]) for i, flag in enumerate(flags)
                        if flag in ("--few", "--batch_size", "--size", "--seed", "--fold"))
    assert code == 1 and f"error: {name} {' '.join(map(str, values))}: expected at least" in text


@pytest.mark.parametrize("flags", [("check", "--data", "m.csv", "--limit", 0), ("check", "--data", "m.csv", "--limit", -2),
                                   ("cache", "--data", "m.csv", "--workers", -1), ("demo", "--out", "d", "--n", 0),
                                   ("cache", "--data", "m.csv", "--size", 0, 32, 32)])
def test_numbers_out_of_range_are_refused_by_data(command, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text = command("data.py", *flags)
    assert code == 1 and f"error: {flags[3]} {' '.join(map(str, flags[4:]))}: expected at least" in text
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------- linear probe

def normal_equations(x, y, x_new, penalty):
    """Ridge regression with an intercept that is not penalised."""
    centred = x - x.mean(0)
    weight = np.linalg.solve(centred.T @ centred + penalty * np.eye(x.shape[1]), centred.T @ (y - y.mean(0)))
    return (x_new - x.mean(0)) @ weight + y.mean(0)


@pytest.mark.parametrize("n, features, noise", [(12, 5, 0.1), (12, 5, 3.0), (9, 20, 0.5)])
def test_ridge_is_the_naive_loop(n, features, noise):
    rng = np.random.default_rng(n + features)
    x, x_new = rng.normal(2, 3, (n, features)), rng.normal(2, 3, (7, features))
    y = x @ rng.normal(size=(features, 3)) + noise * rng.normal(size=(n, 3))
    z, z_new = (x - x.mean(0)) / x.std(0), (x_new - x.mean(0)) / x.std(0)
    penalties = np.logspace(-1, 4, 9)
    errors = []
    for penalty in penalties:                                   # fit anew without each item in turn
        left_out = [normal_equations(np.delete(z, i, 0), np.delete(y, i, 0), z[i:i + 1], penalty)[0] - y[i]
                    for i in range(n)]
        errors.append(np.mean(np.square(left_out)))
    expected = normal_equations(z, y, z_new, penalties[np.argmin(errors)])
    assert np.allclose(evaluation.ridge(x, y, x_new, range(n), penalties), expected)


def test_the_penalty_is_chosen_on_other_patients():
    """A second scan of each patient, almost its first, must not tell what to predict of it."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.normal(size=(15, 12)), 2, 0) + 0.01 * rng.normal(size=(30, 12))
    y = np.repeat(x[::2, :1] + 2 * rng.normal(size=(15, 1)), 2, 0)
    x_new, patients = rng.normal(size=(7, 12)), np.repeat(np.arange(15), 2)
    z, z_new = (x - x.mean(0)) / x.std(0), (x_new - x.mean(0)) / x.std(0)
    penalties, best = np.logspace(-1, 4, 9), {}
    for unit in (patients, np.arange(30)):
        errors = []
        for penalty in penalties:
            left_out = [normal_equations(z[unit != one], y[unit != one], z[unit == one], penalty) - y[unit == one]
                        for one in set(unit)]
            errors.append(np.square(left_out).sum())
        best[len(set(unit))] = penalties[np.argmin(errors)]
    assert best[15] > best[30]
    found = evaluation.ridge(x, y, x_new, patients, penalties)
    assert np.allclose(found, normal_equations(z, y, z_new, best[15]))
    assert np.allclose(evaluation.ridge(x, y, x_new, range(30), penalties), normal_equations(z, y, z_new, best[30]))


def test_ridge_survives_a_constant_feature():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 3))
    x[:, 1] = 0.3
    assert np.isfinite(evaluation.ridge(x, x[:, :1], x, range(20))).all()


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """40 blocks of tissue in air; the first finding is whether the block is large, the others are coins."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(40):
        labels = rng.integers(0, 2, 18)
        labels[0] = i % 2
        volume = rng.normal(-1000, 10, (24, 24, 24))
        side = 12 + 7 * labels[0] + rng.integers(0, 3)
        volume[2:2 + side, 2:2 + side, 2:2 + side] = 40
        nib.save(nib.Nifti1Image(volume.astype(np.int16), np.diag([8, 8, 8, 1])), folder / f"{i}.nii.gz")
        rows.append([f"{i}.nii.gz", "A block.", "train" if i < 26 else "test", *labels])
    with (folder / "m.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["volume", "report", "split", *data.LABELS], *rows])
    return folder


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return model.build_encoder("swin_t")


def test_features_are_the_mean_of_the_last_map(labelled, encoder):
    items = data.load_items(labelled / "m.csv")[:3]
    features = evaluation.global_features(encoder, items, labelled / "cache", SIZE, batch_size=2)
    for item, row in zip(items, features):
        with torch.no_grad():
            last = encoder(data.load_volume(item, size=SIZE)[None])[-1]
        assert np.allclose(row, last[0].flatten(1).mean(1), atol=1e-5)
    assert features.shape == (3, encoder.channels[-1]) and features.dtype == np.float64


def test_probe_finds_what_the_features_hold(labelled, encoder):
    items = data.load_items(labelled / "m.csv")
    scores, truth = evaluation.probe(evaluation.probe_features(encoder, items, labelled / "cache", SIZE), items)
    assert scores.shape == truth.shape == (14, 18)
    assert truth[:, 0].tolist() == [i % 2 for i in range(26, 40)]       # the held-out ones, in order
    assert evaluation.auroc(scores[:, 0], truth[:, 0]) > 0.95
    assert 0.3 < evaluation.macro_auroc(scores[:, 1:], truth[:, 1:]) < 0.7, "coins cannot be foretold"


def test_probe_command(labelled, encoder):
    torch.save(model.export_encoder(encoder), labelled / "encoder.pt")
    common = [sys.executable, str(ROOT / "eval.py"), "probe", "--checkpoint", "encoder.pt", "--cache", "cache",
              "--size", *map(str, SIZE)]

    def run(*flags):
        return subprocess.run(check=False, args=[*common, *flags], cwd=labelled, capture_output=True, text=True, timeout=120)
    done = run("--data", "m.csv", "--encoder", "swin_t", "--out", "probe")
    assert done.returncode == 0, done.stderr
    result = json.loads((labelled / "probe" / "probe.json").read_text())
    assert result["n"] == 14 and result["chance"] == 0.5 and list(result["auc"]) == list(data.LABELS)
    assert result["auc"][data.LABELS[0]] > 0.95
    assert result["interval"][0] <= result["macro_auc"] <= result["interval"][1]
    assert np.nanmean(list(result["auc"].values())) == pytest.approx(result["macro_auc"])
    assert f"{result['macro_auc']:.3f}" in done.stdout and "n = 14" in done.stdout and data.LABELS[17] in done.stdout

    rows = list(csv.reader((labelled / "m.csv").open()))
    for row in rows[27:]:
        row[4:9] = "0" * 5                      # five findings without a positive among the held-out
    rows[30][10] = "-1"
    with (labelled / "some.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    done = run("--data", "some.csv", "--encoder", "swin_t", "--out", "some")
    assert "macro AUC of 13 findings (the other 5 have one class alone)" in done.stdout and "n = 13" in done.stdout
    assert "some.csv: labels of -1 are taken as unknown" in done.stderr
    assert "some.csv: left out 1 of 40 volumes without all 18 labels" in done.stderr
    (labelled / "torn.nii.gz").write_bytes((labelled / "39.nii.gz").read_bytes()[:5000])
    rows = list(csv.reader((labelled / "m.csv").open()))
    rows[-1][0] = "torn.nii.gz"
    with (labelled / "torn.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    done = run("--data", "torn.csv", "--encoder", "swin_t", "--out", "torn")
    assert done.returncode == 0 and "torn.nii.gz: cannot be read" in done.stderr and "n = 13" in done.stdout
    refused = run("--data", "m.csv")
    assert refused.returncode == 1 and "--encoder" in refused.stderr and "Traceback" not in refused.stderr


def test_a_finding_that_none_has_is_not_fitted():
    """Its scores are unknown, and its AUC is not .5."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (60, 18)).astype(np.float32)
    labels[:40, 3], labels[:40, 5] = 0, 1               # none and all of those to fit on
    items = [data.Item(str(i), "x", "", "train" if i < 40 else "test", str(i), labels[i]) for i in range(60)]
    features = [rng.normal(size=(40, 4)), rng.normal(size=(20, 4))]
    scores, truth = evaluation.probe(features, items)
    found = evaluation.auroc(scores, truth)
    assert [k for k, auc in enumerate(found) if np.isnan(auc)] == [3, 5]
    others = [k for k in range(18) if k not in (3, 5)]
    expected = evaluation.ridge(features[0], labels[:40].astype(float), features[1], range(40))[:, others]
    assert np.array_equal(scores[:, others], expected)
    few = evaluation.compare_probes(features, features, items, few=5)["few"]    # draws lack many findings
    assert 0 < few["untrained"] == few["pretrained"] < 1
    none = [item._replace(labels=np.zeros(18)) if item.split == "test" else item for item in items]
    assert np.isnan(evaluation.macro_auroc(*evaluation.probe(features, none)))
    for few in (0, 1, 40):
        assert "few" not in evaluation.compare_probes(features, features, items, few=few)


def test_unlabelled_data_are_refused(labelled):
    items = data.load_items(labelled / "m.csv")
    for some, found in (([item._replace(labels=None) for item in items], "0 and 0"), (items[:26], "26 and 0"),
                        ([items[0]._replace(labels=np.full(18, np.nan)), *items[26:]], "0 and 14")):
        with pytest.raises(ValueError, match=f"labelled volumes.*found {found}"):
            evaluation.split_labelled(some)


def test_the_checkpoint_says_which_encoder_it_holds(tmp_path, encoder):
    torch.save({"model": {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()},
                "config": {"encoder": "swin_t", "size": [32, 32, 64]}}, tmp_path / "last.pt")
    found, config = evaluation.load_encoder(tmp_path / "last.pt")
    assert config["size"] == [32, 32, 64]
    assert all(torch.equal(weight, found.state_dict()[name]) for name, weight in encoder.state_dict().items())


# --------------------------------------------------------------------------------------------------- pictures

def drawn(path):
    picture = matplotlib.image.imread(path)[..., :3]
    assert picture.std() > 0.02, f"{path} is blank"
    return picture


@pytest.fixture(scope="module")
def network_and_batch(labelled, tmp_path_factory):
    sentences = ["The heart is normal.", "A large nodule is seen in the left lung.", "There is no effusion."]
    items = [item._replace(report=" ".join(sentences)) for item in data.load_items(labelled / "m.csv")[:2]]
    folder = tmp_path_factory.mktemp("text")
    phantoms.make_demo_text_encoder(folder, [items[0].report])
    torch.manual_seed(0)
    text_encoder = model.TextEncoder(str(folder))
    network = model.MG3D(model.build_encoder("swin_t"), text_encoder, embed_dim=24).eval()
    make = partial(data.pretraining_example, tokenizer=text_encoder.tokenizer, cache=labelled / "cache",
                   size=(32, 32, 64))
    examples = data.Examples(items, make)
    batch = data.collate([examples[i, 0] for i in range(2)], text_encoder.tokenizer.pad_token_id)
    return network, {key: value for key, value in batch.items() if torch.is_tensor(value)}, sentences


def test_curves(tmp_path):
    rows = [{"step": step, "loss": 10 / (step + 1), "lr": 1, "mim": 1 / (step + 1), "dfa": float(np.sin(step))}
            for step in range(30)]
    for name, some in (("all", rows), ("one", rows[:1])):
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
        assert pretrain.read_log(tmp_path / "log.jsonl") == some
        evaluation.plot_curves(some, tmp_path / f"{name}.png")
        assert drawn(tmp_path / f"{name}.png").shape[1] == pytest.approx(3 * 2.6 * 120, abs=2)     # loss, mim, dfa


def test_reconstruction(tmp_path, network_and_batch):
    network, batch = network_and_batch[0], dict(network_and_batch[1])
    evaluation.plot_reconstruction(network, batch, tmp_path / "a.png")
    whole = drawn(tmp_path / "a.png")
    batch["volume_mask"] = torch.zeros_like(batch["volume_mask"])
    evaluation.plot_reconstruction(network, batch, tmp_path / "b.png")
    unmasked = drawn(tmp_path / "b.png")
    third = whole.shape[1] // 3
    assert np.array_equal(whole[:, :third], unmasked[:, :third])                       # the volume itself
    assert not np.array_equal(whole[:, third:2 * third], unmasked[:, third:2 * third])


def test_a_coronal_slice_has_the_head_up_and_the_right_on_the_left():
    volume = torch.zeros(1, 4, 5, 6)                            # z runs to the head, x to the patient's right
    volume[0, 3, 2, 5] = 1
    picture = evaluation._coronal(volume)
    assert picture.shape == (4, 6) and picture[0, 0] == 1 and picture.sum() == 1


def test_attention_of_sentences(tmp_path, network_and_batch):
    """One panel a sentence; their maps are those of a batch, padding left out."""
    network, batch, sentences = network_and_batch
    volume = batch["volume"][0]
    for name, some in (("three", sentences), ("one", sentences[:1])):
        item = data.Item("a", "a", " ".join(some), "test", "a")
        evaluation.plot_attention(network, item, volume, tmp_path / f"{name}.png")
    assert drawn(tmp_path / "three.png").shape[1] == pytest.approx(3 * drawn(tmp_path / "one.png").shape[1], abs=6)
    found, maps = evaluation.sentence_maps(network, volume, " ".join(sentences))
    with torch.no_grad():
        F_S_star, _ = network.sentence_features(batch, network.encode_image(batch["volume"]))
        expected = network.sentence_attention.maps(F_S_star, network.encode_image(batch["volume"]))[0].mean(0)
    assert found == sentences and torch.allclose(maps.sum(1), torch.ones(3))
    assert torch.allclose(maps, expected, atol=1e-5) and (maps[0] - maps[1]).abs().max() > 1e-6


@pytest.fixture(scope="module")
def with_masks(tmp_path_factory):
    return data.load_items(phantoms.write_demo(tmp_path_factory.mktemp("phantoms"), 8, seed=3, workers=1))


def test_lesions_lie_where_the_mask_has_them(with_masks):
    """A token holds a finding if one of its voxels does, after the crop of the volumes."""
    for item in with_masks[:3]:
        mask = data.to_ras(item.mask, *data.read_stored(item.mask), is_mask=True)[0]
        kept = [round(n * part) for n, part in zip(mask.shape, data.CROP)]
        z, y, x = [(n - k) // 2 for n, k in zip(mask.shape, kept)]
        mask = mask[z:z + kept[0], y:y + kept[1], x:x + kept[2]]
        expected = np.zeros((18, 4, 3, 4), bool)
        for place in np.ndindex(4, 3, 4):
            ranges = [slice(n * i // k, -(-n * (i + 1) // k)) for n, i, k in zip(mask.shape, place, (4, 3, 4))]
            for number in np.unique(mask[tuple(ranges)]).astype(int):
                if number:
                    expected[(number - 1, *place)] = True
        assert expected.any() and np.array_equal(data.lesions(item, (4, 3, 4)).numpy(), expected)
        other = item._replace(patient="demo", volume=None)              # its mask may mean something else
        assert not data.lesions(other, (4, 3, 4)).any()


def test_reports_look_for_their_volumes(monkeypatch):
    items = [data.Item(str(i), Path(str(i)), f"Report {i}.", "test", f"p{i}") for i in range(20)]
    volumes, reports = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(evaluation, "predict_features", lambda run, items, progress: volumes)
    monkeypatch.setattr(evaluation, "text_features", lambda network, texts: reports)
    ranks = [sum(report @ other >= report @ own for other in volumes) for report, own in zip(reports, volumes)]
    found = evaluation.retrieve_reports(torch.nn.Linear(1, 1), items, None, SIZE)
    assert found["k"] == 2 and found["value"] == pytest.approx(np.mean([rank <= 2 for rank in ranks]))


def test_attention_on_lesions_is_measured_against_two_controls(with_masks, tmp_path, monkeypatch, network_and_batch):
    network = network_and_batch[0]

    def looking(on_lesion):
        """A model that looks at what a sentence states (or at all places alike), and everywhere else evenly"""
        def maps_of(network, volume, report):
            item = next(item for item in with_masks if item.report == report)
            sentences, places = data.split_sentences(report), data.lesions(item, (4, 4, 4)).flatten(1).float()
            maps = torch.full((len(sentences), 64), 1 / 64)
            for i, sentence in enumerate(sentences):
                for k in np.flatnonzero(evaluation.findings(sentence)):
                    if on_lesion and places[k].any():
                        maps[i] = places[k] / places[k].sum()
            return sentences, maps
        monkeypatch.setattr(evaluation, "sentence_maps", maps_of)
        return evaluation.lesion_attention(network, with_masks, tmp_path, (32, 32, 32))
    network.encoder.stride, stride = 8, network.encoder.stride
    seeing, blind = looking(True), looking(False)
    network.encoder.stride = stride
    assert seeing["inside"] == pytest.approx(1) and seeing["interval"][0] > 0.3 and seeing["n"] == 8
    assert seeing["random"] == blind["random"] == pytest.approx(blind["inside"]) == pytest.approx(blind["others"])
    assert 0.02 < blind["random"] < 0.6 and blind["interval"] == pytest.approx([0, 0], abs=1e-6)
    assert seeing["interval_to_others"][0] > 0.2 and blind["interval_to_others"] == pytest.approx([0, 0], abs=1e-6)
    said = evaluation.say_lesion_attention(seeing)
    assert "inside their lesion 1.000" in said and f"difference {1 - seeing['random']:+.3f} [" in said
    assert f"other sentences {seeing['others']:.3f} [" in said


def test_differences_of_the_reference_run_are_paired_over_seeds():
    rows = [{"arm": arm, "seed": seed, "probe": value} for arm, values in (
        ("six", {1: 0.7, 2: 0.9, 3: 0.8, 4: 0.1}), ("scratch", {3: 0.5, 1: 0.6, 2: 0.7})) for seed, value in values.items()]
    rows.append({"arm": "scratch", "seed": 4, "few": 1.0})              # not measured: it does not count
    low, mean, high = reference.paired(rows, "six", "scratch", "probe")  # of 0.1, 0.2 and 0.3
    half = 4.302653 * 0.1 / 3 ** 0.5                                    # Student's t, two degrees of freedom
    assert (low, mean, high) == pytest.approx((0.2 - half, 0.2, 0.2 + half))
    assert reference.paired(rows, "six", "clip alone", "probe") is None
    assert np.isnan(reference.t_interval([0.3])[0])
    assert "six - scratch: +0.200 [-0.048, +0.448]" in reference.table(rows)


def test_a_picture_of_attention_outlines_the_lesion(with_masks, tmp_path, network_and_batch):
    network = network_and_batch[0]
    item = max(with_masks, key=lambda item: item.labels.sum())
    words = item._replace(report=" ".join(data.split_sentences(item.report)))
    volume = data.load_volume(item, tmp_path, (32, 32, 32))
    evaluation.plot_attention(network, words, volume, tmp_path / "with.png")
    evaluation.plot_attention(network, words._replace(mask=None), volume, tmp_path / "without.png")
    cyan = [((picture[..., 0] < 0.4) & (picture[..., 1] > 0.7) & (picture[..., 2] > 0.7)).sum()
            for picture in (drawn(tmp_path / "with.png"), drawn(tmp_path / "without.png"))]
    assert cyan[0] > 100 and cyan[1] == 0


# ------------------------------------------------------------------------- what a loss learns

def test_probes_know_the_patients():
    """The penalty leaves out patients, and the interval resamples them."""
    rng = np.random.default_rng(0)
    labels = np.repeat(rng.integers(0, 2, (60, 18)), 2, 0).astype(np.float32)
    items = [data.Item(str(i), Path(f"{i}.nii"), "", "train" if i < 60 else "test", f"p{i // 2}", row)
             for i, row in enumerate(labels)]
    before, after = ([rows[:60], rows[60:]] for rows in (
        np.repeat(rng.normal(size=(60, 20)), 2, 0) + 0.01 * rng.normal(size=(120, 20)),
        np.repeat(rng.normal(size=(60, 20)) + labels[::2, :1], 2, 0)))
    scores, truth = evaluation.probe(after, items)
    patients = np.repeat(np.arange(30), 2)
    assert np.allclose(scores, evaluation.ridge(after[0], labels[:60].astype(float), after[1], patients))
    assert not np.allclose(scores, evaluation.ridge(after[0], labels[:60].astype(float), after[1], range(60)))

    def gain(a, b, truth):
        return evaluation.macro_auroc(b, truth) - evaluation.macro_auroc(a, truth)
    low, _, high = evaluation.compare_probes(before, after, items)["difference"]
    names = [f"p{i // 2}" for i in range(60, 120)]
    arrays = evaluation.probe(before, items)[0], scores, truth
    assert (low, high) == pytest.approx(evaluation.bootstrap(gain, *arrays, patients=names))
    assert (low, high) != pytest.approx(evaluation.bootstrap(gain, *arrays))


def test_probes_are_compared_on_the_same_items():
    rng = np.random.default_rng(0)
    labels = (rng.random((300, 18)) < 0.5).astype(np.float32)
    items = [data.Item(str(i), "x", "", "train" if i < 200 else "test", str(i), labels[i]) for i in range(300)]

    def features(noise):
        return [labels[part] + noise * rng.standard_normal((len(labels[part]), 18))
                for part in (slice(200), slice(200, 300))]
    blurred, clear = features(2.0), features(0.5)
    better = evaluation.compare_probes(blurred, clear, items, few=50)
    assert better["pretrained"] - better["untrained"] == pytest.approx(better["difference"][1])
    assert "linear probe of 18 findings, macro AUC on 100" in evaluation.say_probe(better)
    assert better["difference"][1] > 0.1 and better["difference"][0] > 0 and better["n"] == 100
    assert better["few"]["pretrained"] > better["few"]["untrained"] and better["few"]["labels"] == 50
    low, value, high = evaluation.compare_probes(clear, features(0.5), items)["difference"]
    assert low < 0 < high and abs(value) < 0.02


def pairs_of(network, text_folder, n=24, size=4):
    """Batches of drawn volumes that are bright where their report says so"""
    tokenizer = network.text_encoder.tokenizer
    rng = np.random.default_rng(0)
    batches = []
    for number in range(n // size):
        texts = [REPORTS[i % 2] for i in range(size)]
        batch = data.text_batch(tokenizer, texts) | {"ids": [f"{number} {i}" for i in range(size)]}
        batch["volume"] = torch.from_numpy(rng.random((size, 1, *SMALL), np.float32)) / 9
        batch["volume"][1::2] += 0.5
        batch["volume_mask"] = torch.from_numpy(rng.random((size, 1, *SMALL)) < 0.5)
        chosen = (torch.rand(batch["input_ids"].shape) < 0.4) & (batch["sentence_ids"] >= 0)
        batch["mlm_labels"] = torch.where(chosen, batch["input_ids"], -100)
        batch["masked_ids"] = torch.where(batch["mlm_labels"] != -100, tokenizer.mask_token_id, batch["input_ids"])
        singles = [sentence for text in texts for sentence in data.split_sentences(text)]
        encoded = tokenizer(singles, padding=True, return_tensors="pt")
        batch["single_ids"], batch["single_mask"] = encoded["input_ids"], encoded["attention_mask"]
        batches.append(batch)
    return batches


def test_pairing_tells_a_loss_that_uses_the_report(text_folder):
    """CLIP alone sees which text belongs to which volume; a MIM whose fusion is cut off cannot."""
    network = small_mg3d(text_folder, ["mim", "clip"])
    batches = pairs_of(network, text_folder, 40)
    with torch.no_grad():
        for layer in network.image_fusion.layers:
            layer.cross_attention.out.weight.zero_()
            layer.cross_attention.out.bias.zero_()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for batch in batches[:4] * 4:
        optimizer.zero_grad()
        losses.compute(network(batch), batch, ["clip"])["clip"].backward()
        optimizer.step()
    result = evaluation.pairing(network, batches, ["mim", "clip"])
    assert result["clip"]["uses_report"] and result["clip"]["interval"][0] > 0
    assert result["clip"]["other"] > result["clip"]["own"] and result["clip"]["gradient_cosine"] < 0.9
    assert not result["mim"]["uses_report"] and result["mim"]["gradient_cosine"] == pytest.approx(1, abs=1e-4)
    assert result["mim"]["own"] == pytest.approx(result["mim"]["other"], rel=1e-5)
    few = evaluation.pairing(network, batches[:3], ["clip"])["clip"]
    assert few["uses_report"] is None and few["reason"] == "3 batches of other patients, fewer than 8"
    again = [{**batch, "ids": batch["ids"][::-1]} for batch in batches[:5] for _ in range(2)]
    assert evaluation.pairing(network, again, ["clip"])["clip"]["reason"] == "5 batches of other patients, fewer than 8"
    alone = [{key: value[:1] for key, value in batch.items() if not key.startswith("single")} for batch in batches[:2]]
    alone = evaluation.pairing(network, alone, ["clip"])["clip"]    # a loss of 0 asks for nothing
    assert alone["own"] == 0 and np.isnan(alone["gradient_cosine"])
    assert "too few batches" in evaluation.say_pairing(evaluation.pairing(network, batches[:3], ["clip"]))
    of_clip = {"clip": result["clip"] | {"own": 2.0, "other": 2.5}}
    assert "uses the report, for 25.0% of its value" in evaluation.say_pairing(of_clip)


def test_knowing_nothing_is_the_best_constant(text_folder):
    network = small_mg3d(text_folder)
    batches = pairs_of(network, text_folder, 16)
    found = evaluation.know_nothing(network, batches, model.LOSSES, 4)
    volumes, masks = (torch.cat([batch[key] for batch in batches]) for key in ("volume", "volume_mask"))
    mean = volumes.mean(0, keepdim=True).expand_as(volumes)
    assert found["mim"] == pytest.approx(losses.mim_loss(mean, volumes, masks).item(), rel=1e-5)
    assert found["cml"] == 2 * found["dfa"] == 2 * found["clip"] == pytest.approx(2 * np.log(4))
    words = torch.cat([batch["input_ids"][batch["sentence_ids"] >= 0] for batch in batches]).tolist()
    masked = torch.cat([batch["mlm_labels"][batch["mlm_labels"] != -100] for batch in batches]).tolist()
    assert np.isfinite(found["mlm"]) and masked
    assert found["mlm"] == pytest.approx(-np.mean([np.log(words.count(w) / len(words)) for w in masked]), rel=1e-4)
    rows = [network.text_encoder.encode_sentences(b["single_ids"], b["single_mask"]) for b in batches]
    rows = torch.nn.functional.normalize(torch.cat(rows), dim=-1)
    patient = torch.cat([b["sentence_mask"].nonzero()[:, 0] + 4 * i for i, b in enumerate(batches)])
    same_batch = patient[:, None] // 4 == patient // 4
    cosines = (rows @ rows.T)[same_batch & (patient[:, None] < patient)]
    assert found["ssm"] == pytest.approx((cosines - cosines.median()).abs().mean().item(), rel=0.05)
    with torch.no_grad():                       # no other constant gives SFR less
        F_S = [network(batch)["sentences"] for batch in batches]
    for seed in range(5):
        torch.manual_seed(seed)
        constant = torch.randn(1, 1, 24)
        other = np.mean([losses.sfr_loss(constant.expand_as(f), f, b["sentence_mask"]).item()
                         for f, b in zip(F_S, batches)])
        assert found["sfr"] <= other + 1e-5


def test_a_loss_has_learned_when_its_end_lies_below_nothing():
    rows = [{"mim": 1 - 0.01 * i, "mlm": 5.0, "clip": None if i == 3 else 2.0} for i in range(40)]
    found = evaluation.levels(rows, {"mim": 0.9, "mlm": 5.0, "clip": 2.1})
    assert found["mim"] == {"nothing": 0.9, "first": pytest.approx(0.985), "last": pytest.approx(0.625), "learned": True}
    assert found["mlm"]["learned"] is False and found["clip"]["learned"] and np.isnan(found["clip"]["first"])
    for some, reason in ((rows[:19], "fewer than 20 rows"), ([*rows[:-1], {"mim": None}], "a value that is not finite")):
        level = evaluation.levels(some, {"mim": 0.9})["mim"]
        assert level["learned"] is None and level["reason"] == reason
    assert evaluation.levels(rows[-20:], {"mim": 0.9})["mim"]["learned"] is True


def test_a_result_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    evaluation.write_result({"value": 1.0}, path)
    with pytest.raises(UnicodeEncodeError):                         # the name of a file that is no text
        evaluation.write_result({"value": 2.0, "id": "\udcff"}, path)
    assert json.loads(path.read_text()) == {"value": 1.0} and [*tmp_path.iterdir()] == [path]
