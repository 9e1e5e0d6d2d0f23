"""Synthetic sets of the nine tasks: native names and formats, the same bytes for the same seed, labels that voxels show."""
import csv
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

import data

N = 6
FILES = {           # all files of a set of six patients: pattern -> how many
    "cc-ccii": {r"(Normal|CP|NCP)/\d+/\d+/\d{4}\.png": None, r"CC_CCII_fold0_(train|valid)\.csv": 2},
    "luna16": {r"subset[0-5]/1\.3\.6\.1\.4\.1\.14519\.5\.2\.1\.6279\.6001\.\d{30}\.(mhd|raw)": 2 * N,
               r"candidates_V2\.csv": 1},
    "msd-lung": {r"imagesTr/lung_00\d\.nii\.gz": N, r"labelsTr/lung_00\d\.nii\.gz": N, r"dataset\.json": 1},
    "covid-19-20": {r"volume-covid19-A-000\d_(ct|seg)\.nii\.gz": 2 * N, r"Covid19_20_folds\.json": 1},
    "acdc": {r"training/(patient00\d)/\1_frame\d\d(_gt)?\.nii\.gz": 4 * N, r"training/patient00\d/Info\.cfg": N},
    "stoic": {r"data/mha/\d\.mha": N, r"metadata/reference\.csv": 1},
    "ctrg": {r"volumes/\d\.nii\.gz": N, r"ctrg_chest\.json": 1},
    "ct-rate": {r"(train|valid)/(\1_\d)/(\2_a)/\3_[12]\.nii\.gz": N + 1,
                r"radiology_text_reports/(train|validation)_reports\.csv": 2,
                r"multi_abnormality_labels/(train|valid)_predicted_labels\.csv": 2,
                r"metadata/(train|validation)_metadata\.csv": 2, r"metadata/no_chest_(train|valid)\.txt": 2},
}
for task in ("ct-rate-vocab", "ct-rate-retrieval"):
    FILES[task] = FILES["ct-rate"]
INDEX = re.compile(r".*\.(csv|json|txt)")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """demo(task) -> the folder of six patients of a task, written once."""
    written = {}

    def folder(task):
        if task not in written:
            written[task] = tmp_path_factory.mktemp(task)
            data.write_task_demo(task, written[task], n=N, seed=5, workers=1)
        return written[task]
    return folder


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("task", data.TASK_DEMOS)
def test_files_have_the_names_of_the_real_set(task, demo):
    names = set(contents(demo(task))) - {"recipe.json"}
    for pattern, count in FILES[task].items():
        found = {name for name in names if re.fullmatch(pattern, name)}
        assert found and count in (None, len(found)), pattern
        names -= found
    assert not names


@pytest.mark.parametrize("task", data.TASK_DEMOS)
def test_the_same_seed_gives_the_same_bytes_whatever_n_and_workers(task, demo, tmp_path):
    data.write_task_demo(task, tmp_path / "a", n=2, seed=5, workers=2)
    whole = contents(demo(task))
    few = {name: text for name, text in contents(tmp_path / "a").items() if not INDEX.fullmatch(name)}
    assert few and all(whole[name] == text for name, text in few.items())
    data.write_task_demo(task, tmp_path / "b", n=2, seed=5, workers=1)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    data.write_task_demo(task, tmp_path / "c", n=1, seed=6, workers=1)
    assert contents(tmp_path / "c").items() != contents(tmp_path / "a").items()


@pytest.mark.parametrize("task", data.TASK_DEMOS)
def test_recipe(task, demo):
    recipe = json.loads((demo(task) / "recipe.json").read_text())
    assert {"encoder", "size", "epochs", "batch_size", "lr", "lr_encoder", "warmup"} <= set(recipe) and \
        all(side % 32 == 0 for side in recipe["size"])


def test_patients_are_not_those_of_another_task(demo):
    one = data.read_volume(demo("ctrg") / "volumes/1.nii.gz")[1]
    assert one != data.read_volume(demo("stoic") / "data/mha/1.mha")[1]
    assert one != pytest.approx(data.phantom(5, 0, [])["spacing"].tolist(), abs=1e-5)


def test_cc_ccii(demo):
    folder = demo("cc-ccii")
    tables = {part: rows_of(folder / f"CC_CCII_fold0_{part}.csv") for part in ("train", "valid")}
    for row in tables["train"] + tables["valid"]:
        assert list(row) == "zip_file target label patient_id scan_id n_slice scan_count all_scan_ids".split()
        assert row["label"] == ("Normal", "CP", "NCP")[int(row["target"])]
        scan = folder / row["label"] / row["patient_id"] / row["scan_id"]
        scans = json.loads(row["all_scan_ids"])
        assert len(scans) == int(row["scan_count"]) and int(row["scan_id"]) in scans
        grey = sitk.GetArrayFromImage(sitk.ReadImage(str(scan / "0000.png")))
        assert grey.dtype == np.uint8 and grey.ndim == 2
        array, _, _ = data.read_volume(scan)
        assert len(array) == int(row["n_slice"]) and (array.min(), array.max()) == (-1000, 1000)
        # RAS, though pictures say nothing of it: every other slice of the patient, and what is painted
        volume = data.chest(1005, int(row["patient_id"]) - 1000)[0].vol[scans.index(int(row["scan_id"]))::2]
        changed = np.abs((array + 1000) * .7 - 1000 - volume.clip(-1000, 400)) > 150
        right, left = changed[..., array.shape[2] // 2:].mean(), changed[..., :array.shape[2] // 2].mean()
        assert {"Normal": right + left < .003, "CP": min(right, left) < .002 < .006 < max(right, left),
                "NCP": min(right, left) > .01}[row["label"]], (row["label"], right, left)
    assert len(tables["train"]) == N + 3 and not tables["valid"]       # two scans of the first three


def test_cc_ccii_parts_share_no_patient_and_hold_all_classes(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "chest", lambda seed, index: (SimpleNamespace(
        vol=np.zeros((4, 8, 8), np.float32), rng=np.random.default_rng(0)), np.eye(4)))
    for paint in ("opacities", "consolidation"):
        monkeypatch.setattr(data, paint, lambda *_: None)
    data.cc_ccii_index(tmp_path, [data.cc_ccii_demo(tmp_path, 0, index) for index in range(18)])
    train, valid = (rows_of(tmp_path / f"CC_CCII_fold0_{part}.csv") for part in ("train", "valid"))
    assert not {row["patient_id"] for row in train} & {row["patient_id"] for row in valid}
    assert {row["label"] for row in train} == {row["label"] for row in valid} == {"Normal", "CP", "NCP"}
    assert len({row["scan_id"] for row in train + valid}) == len(train + valid)


def test_luna16_candidates_of_class_1_sit_in_a_ball_and_the_others_do_not(demo):
    folder = demo("luna16")
    rows = rows_of(folder / "candidates_V2.csv")
    assert list(rows[0]) == ["seriesuid", "coordX", "coordY", "coordZ", "class"]
    assert len(rows) == 20 * N and sum(row["class"] == "1" for row in rows) == 4 * N
    for series in {row["seriesuid"] for row in rows}:
        path, = folder.glob(f"subset*/{series}.mhd")
        image = sitk.ReadImage(str(path))                   # the oracle: ITK's own world coordinates
        array = sitk.GetArrayFromImage(image)
        assert array.dtype == np.int16 and image.GetDirection() == tuple(np.eye(3).ravel())
        mine = [row for row in rows if row["seriesuid"] == series]
        places = [[float(row[key]) for key in ("coordX", "coordY", "coordZ")] for row in mine]
        nodules = [place for place, row in zip(places, mine) if row["class"] == "1"]
        for place, row in zip(places, mine):
            i, j, k = image.TransformPhysicalPointToIndex(place)
            near = array[k - 1:k + 2, j - 1:j + 2, i - 1:i + 2]
            if row["class"] == "1":
                assert np.median(near) > -20
                shell = [array[k, j, i + 8], array[k, j, i - 8], array[k, j + 8, i], array[k, j - 8, i]]
                assert np.median(shell) < -400
            else:
                assert min(np.linalg.norm(np.subtract(place, nodule)) for nodule in nodules) > 38
    array, spacing, affine = data.read_volume(path)         # and ours: LPS -> RAS
    index = np.linalg.solve(affine, [-nodules[0][0], -nodules[0][1], nodules[0][2], 1])[2::-1]
    assert array[tuple(np.rint(index).astype(int))] > -50


@pytest.mark.parametrize("task, file", [("msd-lung", "dataset.json"), ("covid-19-20", "Covid19_20_folds.json")])
def test_lesions_are_in_the_lungs_and_brighter_than_they_are(task, file, demo):
    folder = demo(task)
    table = json.loads((folder / file).read_text(encoding="utf-8"))
    assert table["labels"]["0"] == "background" and table["numTraining"] == len(table["training"]) == N
    assert [row["fold"] for row in table["training"]] == [0, 1, 2, 3, 4, 0]
    orientations = set()
    for row in table["training"]:
        (array, spacing, affine), (mask, _, mask_affine) = (
            data.read_volume(folder / row[key]) for key in ("image", "label"))
        orientations.add(data.nib.aff2axcodes(data.read_stored(folder / row["image"])[1]))
        assert mask.shape == array.shape and np.array_equal(affine, mask_affine)
        assert set(np.unique(mask)) == {0, 1}
        inside = mask > 0
        around = ndimage.binary_dilation(inside, iterations=4) & ~ndimage.binary_dilation(inside, iterations=2)
        assert np.median(array[inside]) > np.quantile(array[around], .25) + 200
        litres = inside.sum() * np.prod(spacing) / 1e6
        if task == "msd-lung":                              # 30 to 50 mm, solid
            assert .008 < litres < .11 and 20 < np.median(array[inside]) < 100
        else:
            assert litres > .05
    assert len(orientations) == 4


def test_msd_lung_test_images_have_no_label(tmp_path):
    rows = [data.msd_lung_demo(tmp_path, 0, index) for index in (13, 14)]
    data.decathlon_index("dataset.json", "Lung", "cancer", tmp_path, rows)
    table = json.loads((tmp_path / "dataset.json").read_text())
    assert table["test"] == ["./imagesTs/lung_015.nii.gz"] and table["numTest"] == 1
    assert [row["image"] for row in table["training"]] == ["./imagesTr/lung_014.nii.gz"]
    assert (tmp_path / "imagesTs/lung_015.nii.gz").exists() and not (tmp_path / "labelsTr/lung_015.nii.gz").exists()


def test_acdc(demo):
    gains = []
    for folder in sorted((demo("acdc") / "training").iterdir()):
        info = dict(line.split(": ") for line in (folder / "Info.cfg").read_text().splitlines())
        assert set(info) == {"ED", "ES", "Group", "Height", "NbFrame", "Weight"} and info["ED"] == "1"
        volumes = []
        for frame in (info["ED"], info["ES"]):
            stem = f"{folder.name}_frame{int(frame):02d}"
            (array, spacing, affine), (mask, _, mask_affine) = (
                data.read_volume(folder / f"{stem}{end}.nii.gz") for end in ("", "_gt"))
            assert mask.shape == array.shape and np.array_equal(affine, mask_affine)
            assert spacing[0] == 10 and 2.6 < spacing[1] < 3.3 and array.min() >= 0
            assert set(np.unique(mask)) == {0, 1, 2, 3}
            right, muscle, left = (np.median(array[mask == k]) for k in (1, 2, 3))
            assert min(right, left) > 1.6 * muscle
            x = [np.nonzero(mask == k)[2].mean() for k in (1, 3)]
            assert x[0] > x[1]                              # the right ventricle lies to the right of the left one
            ring = ndimage.binary_dilation(mask == 3, structure=np.ones((1, 3, 3))) & (mask != 3)
            assert (mask[ring] == 2).mean() > .98
            volumes.append([(mask == k).sum() for k in (1, 3)])
        assert all(end < .8 * start for start, end in zip(*volumes))
        gains.append(left)
    assert max(gains) > 1.5 * min(gains)


def lung_share(path, low, high):
    """Part of the patient's right and left thorax whose HU lie between `low` and `high`."""
    array, _, _ = data.read_volume(path)
    cut = tuple(slice(round(n * a), round(n * b)) for n, a, b in zip(array.shape, (.3, .25, .15), (.75, .75, .85)))
    inside = ndimage.uniform_filter((array[cut] > low) & (array[cut] < high), 3, output=float) > .8
    middle = inside.shape[2] // 2
    return inside[..., middle:].mean(), inside[..., :middle].mean()


def test_stoic(demo):
    rows = rows_of(demo("stoic") / "metadata/reference.csv")
    assert list(rows[0]) == ["PatientID", "probCOVID", "probSevere"]
    labels = [(row["probCOVID"], row["probSevere"]) for row in rows]
    assert labels == [("0", "0"), ("1", "0"), ("1", "1")] * 2
    for row, (covid, severe) in zip(rows, labels):
        hazy = lung_share(demo("stoic") / f"data/mha/{row['PatientID']}.mha", -620, -350)
        assert (min(hazy) > .01) == (covid == "1")


def test_ctrg(demo):
    table = json.loads((demo("ctrg") / "ctrg_chest.json").read_text(encoding="utf-8"))
    assert list(table) == ["train", "val", "test"] and table["val"] == table["test"] and len(table["train"]) == N
    for row in table["train"]:
        assert set(row) == {"id", "report", "result", "image_path", "split"} and row["split"] == "train"
        large = "Marked enlargement" in row["report"]
        assert large == ("ardiomegaly" in row["result"]) and large != ("heart is of normal size" in row["report"])
        assert len(row["report"].split(". ")) == 4
    assert len({row["report"] for row in table["train"]}) > 3
    items = data.load_items(demo("ctrg") / "ctrg_chest.json")
    assert len(items) == N and all(item.volume.exists() for item in items)


def test_ctrg_says_the_side(tmp_path):
    more_on_the_right = {"right": [], "left": []}
    for index in range(14):
        report = data.ctrg_demo(tmp_path, 3, index)["report"]
        array, _, _ = data.read_volume(tmp_path / "volumes" / f"{index + 1}.nii.gz")
        lower = array[len(array) // 5:len(array) // 2]
        left, right = np.array_split(lower, 2, axis=2)          # x runs to the right
        for side in re.findall("fills the (right|left) lower lobe", report):
            more_on_the_right[side].append(right.mean() - left.mean())
    assert min(more_on_the_right["right"]) > max(more_on_the_right["left"])


def test_ct_rate(demo, caplog):
    folder = demo("ct-rate-vocab")
    items = {item.id: item for item in data.load_items(folder)}
    assert (folder / "metadata/no_chest_train.txt").read_text() == "train_1_a_2.nii.gz\n"
    assert set(items) == {f"{'train' if k % 5 < 3 else 'valid'}_{k + 1}_a_1" for k in range(N)}
    assert "6 of 7 reports" in caplog.text
    for item in items.values():
        assert item.labels.shape == (18,) and item.rescale == (1, -1024)
        findings, impression = item.report.split("\n", 1) if "\n" in item.report else (item.report, "")
        assert [name for name in data.LABELS if f"{name}." in impression] == \
            [name for name, label in zip(data.LABELS, item.labels) if label]
    row = rows_of(folder / "metadata/train_metadata.csv")[0]
    assert json.loads(row["XYSpacing"]) == pytest.approx(data.read_volume(items["train_1_a_1"].volume)[1][1:], abs=1e-3)


def test_ct_rate_second_reconstruction_is_the_same_patient(demo):
    one, two = (demo("ct-rate-vocab") / f"train/train_1/train_1_a/train_1_a_{k}.nii.gz" for k in (1, 2))
    (first, spacing, affine), (second, thick, shifted) = map(data.read_volume, (one, two))
    assert thick[0] == pytest.approx(2 * spacing[0], rel=1e-4) and len(second) == len(first) // 2
    second, note = data.to_hounsfield(second, two, rescale=(1, -1024))
    assert "rescale" in note and data.to_hounsfield(first, one, rescale=(1, -1024))[1] == "as stored"
    pairs = first[:len(second) * 2].reshape(-1, 2, *first.shape[1:]).mean(1)
    difference = (second - pairs)[:, 20:-20, 20:-20]
    assert abs(difference.mean()) < 2 and 10 < difference.std() < 30
    world = affine @ [0, 0, .5, 1]
    assert np.allclose(world, shifted @ [0, 0, 0, 1], atol=1e-3)


def test_command(tmp_path, monkeypatch, capsys):
    for task, path in (("acdc", tmp_path / "acdc"), ("ctrg", tmp_path / "ctrg")):
        monkeypatch.setattr(sys, "argv", ["data.py", "demo", "--task", task, "--out", str(tmp_path / task), "--n", "1"])
        with pytest.raises(SystemExit) as stop:
            data.main()
        assert not stop.value.code and capsys.readouterr().out.strip() == str(path) and path.exists()
