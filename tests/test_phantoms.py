"""Every finding is in the voxels, where the report says; the sets have the layout of the real ones."""
import csv
import json
import re
import sys
from collections import defaultdict
from functools import cache

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

import data
import eval as evaluation
import phantoms
from phantoms import FINDINGS, TASK_DEMOS, phantom

NAMES = list(FINDINGS)
KEYWORDS = dict(zip(FINDINGS, (
    "pacemaker|device|medical material", "aortic|arterial", "heart size|cardiomegaly", "pericardial",
    "coronary", "hernia", "lymph", "emphysem", "atelecta", "nodule", "ground glass|opacity",
    "fibrotic", "pleural", "mosaic", "peribronchial", "consolidation", "bronchiecta",
    "interlobular")))

phantom_of = cache(phantom)


def alone(name, index):
    """A patient with one finding, and the volume of the same patient without any."""
    return phantom_of(3, index, (name,)), phantom_of(3, index, ())["volume"]


def rows_of(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def millimetres(patient):
    """World coordinates x, y, z of every voxel, each (z, y, x), from the affine alone."""
    k, j, i = np.meshgrid(*map(np.arange, patient["volume"].shape), indexing="ij")
    world = np.stack([i, j, k], -1) @ patient["affine"][:3, :3].T + patient["affine"][:3, 3]
    return world.transpose(3, 0, 1, 2)


def lungs_of(patient, healthy):
    """The lungs (z, y, x), from the voxels of the healthy twin alone, and the x of the body's middle."""
    x = millimetres(patient)[0]
    tissue = ndimage.binary_opening(healthy > -300)
    body = np.stack([ndimage.binary_fill_holes(image) for image in tissue])
    middle = x[body].mean()
    return body & (healthy < -600) & (np.abs(x - middle) > 25), middle


def sentences(patient):
    return [sentence for sentence in re.split(r"(?<=\.)\s+", patient["report"].lower()) if sentence]


# ---------------------------------------- the phantoms

def test_the_table_has_the_labels_of_ct_rate():
    order = ("Medical material, Arterial wall calcification, Cardiomegaly, Pericardial effusion, Coronary artery wall "
             "calcification, Hiatal hernia, Lymphadenopathy, Emphysema, Atelectasis, Lung nodule, Lung opacity, "
             "Pulmonary fibrotic sequela, Pleural effusion, Mosaic attenuation pattern, Peribronchial thickening, "
             "Consolidation, Bronchiectasis, Interlobular septal thickening")       # of CT-RATE's columns
    assert NAMES == list(data.LABELS) == order.split(", ")
    assert all(len(set(names.split(" | "))) >= 2 for _, _, names, _ in FINDINGS.values())


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_a_finding_changes_its_place_and_no_other(name, index):
    patient, healthy = alone(name, index)
    number = NAMES.index(name)
    change = np.abs(patient["volume"].astype(int) - healthy)
    here = patient["mask"] == number + 1
    assert set(np.unique(patient["mask"])) == {0, number + 1}
    assert patient["labels"].sum() == patient["labels"][number] == 1
    assert np.median(change[here]) > 100 and (change[here] > 40).mean() > 0.97
    assert change[~here].max() <= 62
    # what a small network is given: centre crop, 64 voxels a side
    margins = [round(n * (1 - part) / 2) for n, part in zip(here.shape, data.CROP)]
    crop = tuple(slice(margin, n - margin) for n, margin in zip(here.shape, margins))
    zoom = 64 / np.array(here[crop].shape)
    small = [ndimage.zoom(np.float32(volume[crop].clip(-1000, 1000)), zoom, order=1)
             for volume in (patient["volume"], healthy)]
    assert (np.abs(small[0] - small[1]) > 120).sum() >= 50


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_side_and_lobe_are_those_of_the_coordinates(name, index):
    patient, healthy = alone(name, index)
    lesion, = patient["lesions"]
    lung, middle = lungs_of(patient, healthy)
    x, y, z = millimetres(patient)
    here = patient["mask"] > 0
    assert np.allclose(lesion["centre"], ndimage.center_of_mass(here))
    right = (x[here] > middle).mean()
    if lesion["side"] == "bilateral":
        assert 0.15 < right < 0.85
    elif lesion["side"]:
        assert (right if lesion["side"] == "right" else 1 - right) > 0.9
    if lesion["lobe"]:
        # above the oblique fissure, which falls towards the front; above the horizontal one
        of_side = lung & ((x > middle) if lesion["side"] == "right" else (x < middle))
        y0 = (y[lung].min() + y[lung].max()) / 2
        z0 = np.quantile(z[of_side], (0, 1)) @ (0.53, 0.47)
        horizontal = (z[here] - z0).mean()
        oblique = (z[here] - z0 + 0.85 * (y[here] - y0)).mean()
        upper = "middle" if horizontal < 8 and lesion["side"] == "right" else "upper"
        if abs(oblique) > 8:                # its height varies from patient to patient
            assert lesion["lobe"] == ("lower" if oblique < 0 else upper), (oblique, horizontal)
        else:
            assert lesion["lobe"] in ("lower", upper), (oblique, horizontal)


def test_places_vary():
    def places(name):
        lesions = [phantom(8, index, [name])["lesions"][0] for index in range(12)]
        return {(lesion["side"], lesion["lobe"]) for lesion in lesions}
    for name in ("Atelectasis", "Lung nodule", "Lung opacity", "Consolidation", "Bronchiectasis"):
        assert len(places(name)) >= 3
    assert {side for side, _ in places("Pleural effusion")} == {"left", "right", "bilateral"}


@pytest.mark.parametrize("index", range(6))
def test_sizes_are_those_of_the_voxels(index):
    patient, healthy = alone("Lung nodule", index)
    lesion, = patient["lesions"]
    change = (patient["volume"] - healthy.astype(float))[patient["mask"] > 0]
    diameter = (6 * change.sum() / 900 * np.prod(patient["spacing"]) / np.pi) ** (1 / 3)
    assert diameter == pytest.approx(lesion["size_mm"], rel=0.12) and 15 <= lesion["size_mm"] <= 40.5
    patient, healthy = alone("Pleural effusion", index)
    thick = (patient["volume"] - healthy.astype(int) > 400).sum(1).max() * patient["spacing"][1]
    assert abs(thick - patient["lesions"][0]["size_mm"]) < 8
    patient, _ = alone("Hiatal hernia", index)
    tall = (patient["mask"] > 0).any((1, 2)).sum() * patient["spacing"][0]
    assert tall == pytest.approx(patient["lesions"][0]["size_mm"], rel=0.25)


@pytest.mark.parametrize("index", range(40))
def test_report_says_what_is_there_and_nothing_else(index):
    patient = phantom_of(4, index)
    lesion_of = {lesion["label"]: lesion for lesion in patient["lesions"]}
    for number, name in enumerate(NAMES):
        mentioned = [sentence for sentence in sentences(patient) if re.search(KEYWORDS[name], sentence)]
        positive = [sentence for sentence in mentioned if not re.search(r"\b(no|absent|excluded)\b", sentence)]
        assert patient["labels"][number] == (name in lesion_of) == len(positive)
        assert len(mentioned) <= 1
        assert (np.sum(patient["mask"] == number + 1) >= 20) == (name in lesion_of)
        if positive:
            text, lesion = positive[0], lesion_of[name]
            side = {"bilateral": "both"}.get(lesion["side"], lesion["side"])
            assert set(re.findall(r"\b(right|left|both)\b", text)) == ({side} if side else set())
            assert set(re.findall(r"\b(upper|middle|lower)\b", text)) == ({lesion["lobe"]} - {None})
            large = FINDINGS[name][3]
            size = [] if large is None else ["large" if lesion["size_mm"] >= large else "small"]
            assert re.findall(r"\b(large|small)\b", text) == size


def test_only_the_picture_tells_presence():
    """Masked words cost nats; knowing the labels must save some: else no image can help to fill them in."""
    rng = np.random.default_rng(0)
    counts = defaultdict(lambda: np.zeros(2))           # sentence: how often its finding is present and absent
    told = []
    for _ in range(40_000):
        name = rng.choice(NAMES)
        _, places, _, large = FINDINGS[name]
        is_present = rng.random() < 0.62                # as often as in the reports that mention it
        size = rng.choice([0, large]) if large else None
        sentence = tuple(phantoms.describe(name, places[rng.integers(len(places))], size, is_present, rng).split())
        counts[name, sentence][int(is_present)] += 1
        told.append((name, sentence, int(is_present)))
    by_length = defaultdict(list)
    for (name, sentence), count in counts.items():
        by_length[len(sentence)].append((name, sentence, count))
    saved, words = 0.0, 0
    for name, sentence, is_present in told[:1500]:
        masked = rng.random(len(sentence)) < 0.15
        if masked.any():
            fitting = [(other, count) for other, words_of_it, count in by_length[len(sentence)]
                       if all(hidden or a == b for a, b, hidden in zip(words_of_it, sentence, masked))]
            right = counts[name, sentence]
            blind = right.sum() / sum(count.sum() for _, count in fitting)
            # The labels say which findings are present: sentences that contradict them are ruled out. Of the
            # other findings half are present, as they are on the whole.
            informed = right[is_present] / sum(count[is_present] if other == name else count.sum() / 2
                                               for other, count in fitting)
            saved += np.log(informed / blind)
            words += masked.sum()
    assert saved / words >= 0.05


def test_reports_and_findings_vary():
    patients = [phantom_of(4, index) for index in range(40)]
    assert len({patient["report"] for patient in patients}) == 40
    share = np.mean([patient["labels"] for patient in patients], 0)
    assert share.min() > 0.04 and share.max() < 0.6


def test_every_combination_can_be_drawn():
    patient = phantom(1, 0, NAMES)
    assert patient["labels"].sum() == 18 and np.bincount(patient["mask"].ravel(), minlength=19).min() >= 20


def test_it_is_a_chest():
    for index in range(3):
        patient = phantom(2, index, [])
        volume, (x, y, z) = patient["volume"], millimetres(patient)
        lung, middle = lungs_of(patient, volume)
        litres = [lung[side].sum() * np.prod(patient["spacing"]) / 1e6 for side in (x > middle, x < middle)]
        assert all(1.5 < volume_of_lung < 4 for volume_of_lung in litres)
        spine = (volume > 300) & (np.abs(x - middle) < 25)
        assert y[spine].mean() < y[lung].mean() - 40
        soft = (volume > 20) & (volume < 250) & (np.abs(x - middle) < 75)
        heart = soft & (np.abs(z - np.quantile(z[lung], 0.35)) < 10) & (np.abs(y - y[lung].mean() - 20) < 25)
        assert x[heart].mean() < middle - 8
        for axis, part in enumerate(data.CROP):                 # the centre crop keeps the lungs
            position = np.flatnonzero(lung.any(tuple({0, 1, 2} - {axis}))) / lung.shape[axis]
            assert position.min() > (1 - part) / 2 and position.max() < (1 + part) / 2


# ---------------------------------------- the demo

@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return phantoms.write_demo(tmp_path_factory.mktemp("demo"), n=24, seed=4, workers=2)


def test_the_same_seed_gives_the_same_bytes(tmp_path, written):
    second = phantoms.write_demo(tmp_path, n=6, seed=4, workers=1)      # fewer phantoms and processes
    files = {name: content for name, content in contents(tmp_path).items() if name != "manifest.csv"}
    assert len(files) == 12 and files.items() <= contents(written.parent).items()
    assert all(content[3:8] == bytes(5) for content in files.values())  # gzip without name and time
    assert rows_of(second) == rows_of(written)[:6]
    assert len({path.read_bytes() for path in written.parent.glob("volumes/*")}) == 24


def test_a_complete_folder_is_reused(tmp_path, monkeypatch):
    def write(n, seed):
        return phantoms.write_demo(tmp_path, n=n, seed=seed, workers=1)
    manifest, mask = write(3, 1), tmp_path / "masks/demo_0002.nii.gz"
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.delattr(phantoms, "phantom")                      # nothing is drawn again
        assert write(3, 1) == manifest and contents(tmp_path) == before
    stamp = mask.stat().st_mtime_ns
    monkeypatch.setattr(phantoms, "VERSION", -1)                # other voxels or words
    write(3, 1)
    assert mask.stat().st_mtime_ns > stamp
    write(2, 2)
    assert len(rows_of(manifest)) == 2 and rows_of(manifest)[0]["report"] == phantom(2, 0)["report"]


def test_files_are_what_the_phantom_is_in_any_orientation(written):
    orientations = set()
    for index, row in enumerate(rows_of(written)):
        patient = phantom_of(4, index)
        for key in ("volume", "mask"):
            image = nibabel.load(written.parent / row[key])
            assert "".join(nibabel.aff2axcodes(image.affine)) == patient["stored"]
            straight = nibabel.as_closest_canonical(image)
            assert np.array_equal(np.asarray(straight.dataobj).transpose(2, 1, 0), patient[key])
            assert np.allclose(straight.affine, patient["affine"], atol=1e-3)
            assert image.get_data_dtype() == patient[key].dtype
            assert np.allclose(straight.header.get_zooms()[::-1], patient["spacing"], rtol=1e-5)
        orientations.add(patient["stored"])
    assert orientations == set(phantoms.STORED)


def test_manifest(written):
    rows = rows_of(written)
    assert list(rows[0]) == ["volume", "report", "split", "patient", *data.LABELS, "mask"]
    assert [row["split"] for row in rows] == ["train" if i % 10 < 7 else "test" for i in range(24)]
    assert len({row["patient"] for row in rows}) == 24
    for index, row in enumerate(rows):
        assert row["report"] == phantom_of(4, index)["report"]
        assert [float(row[name]) for name in NAMES] == phantom_of(4, index)["labels"].tolist()
    assert len(data.load_items(written)) == 24


# ---------------------------------------- sets of the tasks

CT_RATE = (r"(train|valid)/(\1_\d)/(\2_a)/\3_[12]\.nii\.gz|"
           r"radiology_text_reports/(train|validation)_reports\.csv|"
           r"multi_abnormality_labels/(train|valid)_predicted_labels\.csv|"
           r"metadata/(train|validation)_metadata\.csv|metadata/no_chest_(train|valid)\.txt")
SETS = {            # patients and files of a set: (patients, files without the pictures of cc-ccii, pattern)
    "cc-ccii": (12, 2, r"(Normal|CP|NCP)/\d+/\d+/\d{4}\.png|CC_CCII_fold0_(train|valid)\.csv"),
    "luna16": (8, 17, r"subset[0-7]/1(\.\d+){11}\.\d{30}\.(mhd|raw)|candidates_V2\.csv"),
    "msd-lung": (10, 21, r"(imagesTr|labelsTr)/lung_0\d\d\.nii\.gz|dataset\.json"),
    "covid-19-20": (6, 13, r"volume-covid19-A-000\d_(ct|seg)\.nii\.gz|Covid19_20_folds\.json"),
    "acdc": (6, 30, r"training/(patient00\d)/(\1_frame\d\d(_gt)?\.nii\.gz|Info\.cfg)"),
    "stoic": (24, 25, r"data/mha/\d+\.mha|metadata/reference\.csv"),
    "ctrg": (14, 15, r"volumes/\d+\.nii\.gz|ctrg_chest\.json"),
    "ct-rate-vocab": (8, 18, CT_RATE), "ct-rate-retrieval": (8, 18, CT_RATE),
    "labels": (20, 21, r"volumes/\d+\.nii\.gz|manifest\.csv"),
    "segment": (10, 21, r"(volume|mask)s/\d+\.nii\.gz|manifest\.csv")}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """demo(task) -> the folder of a small set of a task, written once."""
    @cache
    def write(task):
        return phantoms.write_task_demo(task, tmp_path_factory.mktemp(task), SETS[task][0], 5, workers=1)
    return write


@pytest.mark.parametrize("task", TASK_DEMOS)
def test_files_have_the_names_of_the_real_set_and_its_loader_reads_them(task, demo):
    _, count, pattern = SETS[task]
    names = contents(demo(task))
    assert all(re.fullmatch(pattern, name) for name in names)
    assert len([name for name in names if not name.endswith(".png")]) == count
    items = data.load_task(task, demo(task))
    assert {item.split for item in items} == {"train", "valid", "test"}
    assert all(item.volume.exists() for item in items)


@pytest.mark.parametrize("task", TASK_DEMOS)
def test_patients_depend_on_seed_and_task_alone(task, demo, tmp_path):
    for name, n, seed, workers in (("a", 2, 5, 2), ("b", 2, 5, 1), ("c", 1, 6, 1)):
        phantoms.write_task_demo(task, tmp_path / name, n=n, seed=seed, workers=workers)
    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b and not c.items() <= a.items()
    patients = {name: content for name, content in a.items() if not re.search(r"\.(csv|json|txt)$", name)}
    assert patients and patients.items() <= contents(demo(task)).items()


def test_patients_are_not_those_of_another_task(demo):
    paths = demo("ctrg") / "volumes/1.nii.gz", demo("stoic") / "data/mha/1.mha"
    spacings = [*(data.read_volume(path)[1] for path in paths), phantom(5, 0, [])["spacing"]]
    assert len(np.unique(np.round(spacings, 4), axis=0)) == 3


def test_cc_ccii(demo):
    folder = demo("cc-ccii")
    train, valid = (rows_of(folder / f"CC_CCII_fold0_{part}.csv") for part in ("train", "valid"))
    assert not {row["patient_id"] for row in train} & {row["patient_id"] for row in valid}
    assert {row["label"] for row in train} == {row["label"] for row in valid} == {"Normal", "CP", "NCP"}
    for row in train + valid:
        assert row["label"] == ("Normal", "CP", "NCP")[int(row["target"])]
        array, _, _ = data.read_volume(folder / row["label"] / row["patient_id"] / row["scan_id"])
        assert (array.min(), array.max()) == (-1000, 1000)
        # RAS, though pictures say nothing of it: every other slice of the patient
        findings = {"Normal": [], "CP": ["Consolidation"], "NCP": ["Lung opacity"]}[row["label"]]
        volume = phantom(1005, int(row["scan_id"]), findings)["volume"]
        assert np.abs((array + 1000) * 0.7 - 1000 - volume[::2].clip(-1000, 400)).max() < 6.5


def test_luna16_candidates_of_class_1_sit_in_a_ball_and_the_others_do_not(demo):
    rows = rows_of(demo("luna16") / "candidates_V2.csv")
    assert list(rows[0]) == ["seriesuid", "coordX", "coordY", "coordZ", "class"]
    assert [row["class"] for row in rows] == ["1", "0", "0", "0", "0"] * 8
    for row in rows:
        path, = demo("luna16").glob(f"subset*/{row['seriesuid']}.mhd")
        image = sitk.ReadImage(str(path))                       # the oracle: ITK's own world coordinates
        assert image.GetDirection() == tuple(np.eye(3).ravel())
        place = [float(row[key]) for key in ("coordX", "coordY", "coordZ")]
        value = image[image.TransformPhysicalPointToIndex(place)]
        if row["class"] == "1":
            nodule = place
            assert value > -50
            array, _, affine = data.read_volume(path)           # and ours: LPS -> RAS
            index = np.linalg.solve(affine, [-place[0], -place[1], place[2], 1])[2::-1]
            assert array[tuple(np.rint(index).astype(int))] == value
        else:
            assert np.linalg.norm(np.subtract(place, nodule)) > 38


@pytest.mark.parametrize("task, file", [("msd-lung", "dataset.json"),
                                        ("covid-19-20", "Covid19_20_folds.json")])
def test_lesions_are_in_the_lungs_and_brighter_than_they_are(task, file, demo):
    folder = demo(task)
    rows = json.loads((folder / file).read_text(encoding="utf-8"))["training"]
    assert [row["fold"] for row in rows] == [index % 5 for index in range(len(rows))]
    orientations = set()
    for row in rows:
        array, _, affine = data.read_volume(folder / row["image"])
        mask, _, mask_affine = data.read_volume(folder / row["label"])
        orientations.add(nibabel.aff2axcodes(nibabel.load(folder / row["image"]).affine))
        assert mask.shape == array.shape and np.array_equal(affine, mask_affine)
        assert set(np.unique(mask)) == {0, 1}
        inside = mask > 0
        shell = ndimage.binary_dilation(inside, iterations=4) & ~ndimage.binary_dilation(inside, iterations=2)
        assert np.median(array[inside]) > np.quantile(array[shell], 0.1) + 200
    assert len(orientations) == 5


def test_msd_lung_test_images_have_no_label(tmp_path):
    rows = phantoms.write_msd_lung(tmp_path, 0, 14)["dataset.json"]
    assert rows == [("test", "./imagesTs/lung_015.nii.gz")]
    assert set(contents(tmp_path)) == {"imagesTs/lung_015.nii.gz"}


def test_acdc(demo):
    brightness = []
    for folder in sorted((demo("acdc") / "training").iterdir()):
        info = dict(line.split(": ") for line in (folder / "Info.cfg").read_text().splitlines())
        volumes = []
        for frame in (info["ED"], info["ES"]):
            stem = f"{folder.name}_frame{int(frame):02d}"
            array, spacing, affine = data.read_volume(folder / f"{stem}.nii.gz")
            mask, _, mask_affine = data.read_volume(folder / f"{stem}_gt.nii.gz")
            assert np.array_equal(affine, mask_affine) and spacing[0] == 10
            right, muscle, left = (np.median(array[mask == k]) for k in (1, 2, 3))
            assert min(right, left) > 1.6 * muscle
            assert np.nonzero(mask == 1)[2].mean() > np.nonzero(mask == 3)[2].mean()    # on the right
            volumes.append((mask == 3).sum())
        assert volumes[1] < 0.8 * volumes[0]
        brightness.append(left)
    assert max(brightness) > 1.5 * min(brightness)


def test_stoic(demo):
    rows = rows_of(demo("stoic") / "metadata/reference.csv")
    assert list(rows[0]) == ["PatientID", "probCOVID", "probSevere"]
    assert [(row["probCOVID"], row["probSevere"]) for row in rows] == [("0", "0"), ("1", "0"), ("1", "1")] * 8


def test_ctrg(demo):
    folder = demo("ctrg")
    table = json.loads((folder / "ctrg_chest.json").read_text(encoding="utf-8"))
    assert list(table) == ["train", "val", "test"] and table["val"] == table["test"]
    assert len(table["train"]) == 11
    for row in table["train"] + table["val"]:
        assert set(row) == {"id", "report", "result", "image_path"}
        stated = [sentence for sentence in row["report"].lower().split(".") if "consolidation" in sentence
                  and not re.search(r"\b(no|absent|excluded)\b", sentence)]
        assert bool(stated) == ("Consolidation" in row["result"])
    assert len({row["report"] for row in table["train"]}) == 11
    assert len(data.load_items(folder / "ctrg_chest.json")) == 14


def test_ct_rate(demo, caplog):
    folder = demo("ct-rate-vocab")
    items = {item.id: item for item in data.load_items(folder)}
    assert (folder / "metadata/no_chest_train.txt").read_text() == "train_1_a_2.nii.gz\n"
    expected = {f"{'train' if k % 5 < 3 else 'valid'}_{k + 1}_a_1" for k in range(8)}
    assert items.keys() - {"train_7_a_2"} == expected
    assert not caplog.records                   # the one that is no chest is not missed
    for item in items.values():
        assert item.labels.shape == (18,) and item.rescale == (1, -1024) and "Not given" not in item.report
        _, _, impression = item.report.partition("\n")
        assert {name for name in NAMES if f"{name}." in impression} == \
            {name for name, label in zip(NAMES, item.labels) if label}


def test_ct_rate_second_reconstruction_is_the_same_patient(demo):
    paths = [demo("ct-rate-vocab") / f"train/train_1/train_1_a/train_1_a_{k}.nii.gz" for k in (1, 2)]
    (first, spacing, affine), (second, thick, shifted) = map(data.read_volume, paths)
    assert thick[0] == pytest.approx(2 * spacing[0], rel=1e-4)
    second, note = data.to_hounsfield(second, paths[1], rescale=(1, -1024))
    assert "rescale" in note and data.to_hounsfield(first, paths[0], rescale=(1, -1024))[1] == "as stored"
    assert np.array_equal(second, first[::2]) and np.allclose(affine[:, 3], shifted[:, 3], atol=1e-3)


def test_command(tmp_path, monkeypatch, capsys):
    manifest = tmp_path / "manifest.csv"
    for flags, path in ((["--task", "acdc"], tmp_path), (["--task", "ctrg"], tmp_path), ([], manifest)):
        monkeypatch.setattr(sys, "argv", ["data.py", "demo", *flags, "--out", str(tmp_path), "--n", "1"])
        data.main()
        assert capsys.readouterr().out.strip() == str(path) and path.exists()


def test_demo_text_encoder_knows_the_words_of_the_reports(tmp_path):
    from transformers import AutoModel, AutoTokenizer
    for folder in ("a", "b"):
        phantoms.make_demo_text_encoder(tmp_path / folder, ["A 5 mm nodule, solid.", "No nodules!"], seed=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    tokens = tokenizer("No solid Nodule; 5 cm [MASK]", return_offsets_mapping=True)
    assert tokenizer.is_fast and tokenizer.convert_ids_to_tokens(tokens["input_ids"]) == [
        "[CLS]", "no", "solid", "nodule", "[UNK]", "5", "[UNK]", "[MASK]", "[SEP]"]
    assert tokens.word_ids()[1:6] == [0, 1, 2, 3, 4] and tokens["offset_mapping"][3] == (9, 15)
    weights = [AutoModel.from_pretrained(tmp_path / folder).state_dict() for folder in ("a", "b")]
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])


def test_prompts_are_sentences_of_reports():
    """Each states or denies its finding in words that the reports have, so that the demo's text encoder knows them."""
    words = {word for label in phantoms.FINDINGS for seed in range(20) for is_present in (True, False)
             for word in phantoms.describe(label, (None, None), 20, is_present, np.random.default_rng(seed)).split()}
    for number, label in enumerate(phantoms.FINDINGS):
        positive, negative = phantoms.prompts(label)
        assert np.flatnonzero(evaluation.findings(positive)) == [number]
        assert not evaluation.findings(negative).any()
        assert {*positive.lower().strip(".").split(), *negative.lower().strip(".").split()} <= words
    assert data.demo_prompts() == [text for label in data.LABELS for text in phantoms.prompts(label)]
    assert phantoms.prompts("Cardiomegaly") == ["There is some cardiomegaly.", "There is no cardiomegaly."]
