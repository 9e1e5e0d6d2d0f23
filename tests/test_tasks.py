"""data.py: the tasks in their native layouts, real fold files and slabs of LUNA16."""
import collections
import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import REAL, load, real_data, save_nifti, write_csv

import data
from data import LABELS, TASKS, load_task

LPS = np.diag([-1.5, -2, 3, 1])
ONE_SPLIT = ("luna16", "ctrg", "ct-rate-vocab", "ct-rate-retrieval")        # sets without folds


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def scan(path, values=None, affine=LPS):
    """A small CT of 8×16×16 voxels, or `values` (z, y, x), as NIfTI or MetaImage"""
    if values is None:
        values = np.random.default_rng(0).normal(-500, 500, (8, 16, 16)).clip(-1000, 600).astype(np.int16)
    if path.name.endswith(".nii.gz"):
        save_nifti(path, values, affine)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(sitk.GetImageFromArray(values), str(path))


def mask(path, label=1, affine=LPS):
    values = np.zeros((8, 16, 16), np.uint8)
    values[2:5, 4:8, 4:8] = label
    scan(path, values, affine)


# Each writes a set into a folder: of 10 patients if it does not say otherwise.

def cc_ccii(folder, n=10, csvs=True):
    rows = []
    for i in range(n):
        label = ("Normal", "CP", "NCP")[i % 3]
        for k in range(2):
            path = folder / label / str(100 + i) / str(1000 + 2 * i + k)
            path.mkdir(parents=True)
            for z in range(8):
                grey = np.random.default_rng(z).integers(0, 255, (16, 16)).astype(np.uint8)
                sitk.WriteImage(sitk.GetImageFromArray(grey), str(path / f"{z}.png"))
            rows.append(["x.zip", i % 3, label, 100 + i, 1000 + 2 * i + k])
    if csvs:
        cut = round(n * 0.6) * 2
        columns = "zip_file,target,label,patient_id,scan_id"
        write_csv(folder / "folds" / "CC_CCII_fold0_train.csv", columns, rows[:cut])
        write_csv(folder / "folds" / "CC_CCII_fold0_valid.csv", columns, rows[cut:])


def luna16(folder, subsets=range(10)):
    rows = []
    for subset in range(10):
        if subset in subsets:
            scan(folder / f"subset{subset}" / f"1.2.{subset}.mhd")
        rows += [[f"1.2.{subset}", 5.5 + k, 6, 3, k] for k in (0, 1)]
    touch(folder / "seg-lungs-LUNA16" / "1.2.0.mhd")                # of the same name, no scan
    write_csv(folder / "candidates_V2.csv", "seriesuid,coordX,coordY,coordZ,class", rows)


def msd_lung(folder, n=10):
    rows = [{"image": f"./imagesTr/lung_{i:03d}.nii.gz", "label": f"./labelsTr/lung_{i:03d}.nii.gz"}
            for i in range(n)]
    for row in rows:
        scan(folder / row["image"])
        mask(folder / row["label"])
    content = {"training": rows, "test": ["./imagesTs/lung_900.nii.gz"]}
    (folder / "dataset.json").write_text(json.dumps(content))
    return rows


def covid(folder, n=10):
    for i in range(n):
        scan(folder / "Train" / f"volume-covid19-A-{i:04d}_ct.nii.gz")
        mask(folder / "Train" / f"volume-covid19-A-{i:04d}_seg.nii.gz")
    scan(folder / "Validation" / "volume-covid19-A-0900_ct.nii.gz")     # the challenge keeps its mask


def acdc(folder, first=1, n=10):
    for i in range(first, first + n):
        patient = folder / f"patient{i:03d}"
        for frame in ("frame01", f"frame{i + 5:02d}"):
            scan(patient / f"{patient.name}_{frame}.nii.gz")
            mask(patient / f"{patient.name}_{frame}_gt.nii.gz", label=3)
        scan(patient / f"{patient.name}_4d.nii.gz")
        (patient / "Info.cfg").write_text(f"ED: 1\nES: {i + 5}\nGroup: DCM\n")


def stoic(folder, n=20):
    for i in range(n):
        scan(folder / "data" / "mha" / f"{i}.mha")
    write_csv(folder / "metadata" / "reference.csv", "PatientID,probCOVID,probSevere",
              [[i, int(i % 4 < 3), int(i % 4 == 0)] for i in range(n)])


def ctrg(folder, n=10, name="CTRG.json"):
    rows = [{"id": f"{i}.nii.gz", "report": f"Report {i}.", "result": "", "image_path": f"ct/{i}.nii.gz"}
            for i in range(n)]
    for row in rows:
        scan(folder / row["image_path"])
    content = {"train": rows[:7], "val": rows[7:], "test": rows[7:]}
    (folder / name).write_text(json.dumps(content))
    return content


def ct_rate(folder, n=10, columns=LABELS):
    names = [f"{'train' if i < 7 else 'valid'}_{i}_a_1.nii.gz" for i in range(n)]
    for name in names:
        scan(folder / name.split("_")[0] / name)
    write_csv(folder / "reports.csv", "VolumeName,Findings_EN,Impressions_EN",
              [[name, "Fine.", "Well."] for name in names])
    rows = [[name, *[(i + LABELS.index(label)) % 2 for label in columns]] for i, name in enumerate(names)]
    write_csv(folder / "labels.csv", ["VolumeName", *columns], rows)


def labels(folder, n=10):
    for i in range(n):
        scan(folder / "ct" / f"{i}.nii.gz")
    write_csv(folder / "manifest.csv", "volume,age,big heart,Lung_Nodule", [[f"ct/{i}.nii.gz", 50 + i, i % 2, (0, "TRUE", "")[i % 3]]
                                                                      for i in range(n)])


def segment(folder, n=10, values=(1, 2)):
    rows = [[f"ct/{i}.nii.gz", f"masks/{i}.nii.gz"] for i in range(n)]
    for i, (volume, name) in enumerate(rows):
        scan(folder / volume)
        mask(folder / name, values[i % len(values)])
    write_csv(folder / "manifest.csv", "volume,mask", rows)


WRITE = {"cc-ccii": cc_ccii, "luna16": luna16, "msd-lung": msd_lung, "covid-19-20": covid, "acdc": acdc,
         "stoic": stoic, "ctrg": ctrg, "ct-rate-vocab": ct_rate, "ct-rate-retrieval": ct_rate,
         "labels": labels, "segment": segment}


def patients(items):
    """{split: its patients}; asserts that no patient is in two."""
    names = {split: {item.patient for item in items if item.split == split} for split in data.SPLITS}
    assert sum(map(len, names.values())) == len({item.patient for item in items})
    return names


def numbers(items):
    """Patients in train, valid and test"""
    return tuple(map(len, patients(items).values()))


# --------------------------------------------------------------------------------------------- all

def test_the_table():
    assert set(TASKS) == set(WRITE) and len(TASKS) == 11
    for task in TASKS.values():
        assert task.kind in ("classify", "segment", "report", "prompt", "retrieve")
        assert task.view in ("whole", "slices", "cube", "box", "patch")
        assert all(side % 32 == 0 for side in task.size)
        assert task.recipe.keys() == {"epochs", "warmup", "batch_size", "lr", "lr_encoder", "weight_decay",
                                      "decay", "clip_grad"}


def test_settings_are_all_that_a_network_needs(tmp_path):
    for task in TASKS.values():
        torch.save(task.settings(), tmp_path / "task.pt")
        settings = load(tmp_path / "task.pt")               # nothing but plain values
        assert settings.keys() == set(task._fields) - {"records", "layout", "recipe", "demo"}
        assert task._replace(**settings) == task


@pytest.mark.parametrize("name", TASKS)
def test_every_set_loads_and_is_checked(name, tmp_path, command):
    WRITE[name](tmp_path)
    items = load_task(name, tmp_path)
    task = data.with_classes(TASKS[name], items)
    assert [item[:5] for item in items] == [item[:5] for item in load_task(name, str(tmp_path))]     # seeded
    assert all(numbers(items))
    assert len({item.id for item in items}) == len(items)
    assert all((item.mask is not None) == (task.kind == "segment") for item in items)
    assert all((item.centre is not None) == (task.view == "cube") for item in items)
    if task.kind in ("classify", "prompt"):
        for item in items:
            assert item.labels.dtype == np.float32 and item.labels.shape == (len(task.classes),)
    code, text = command("data.py", "check", "--task", name, "--data", tmp_path, "--limit", 2)
    assert code == 0, text
    assert task.layout in text and "8x16x16" in text and "2 volumes read, 0 of them with a problem" in text
    for split in data.SPLITS:
        assert re.search(rf"^{split} +\d+ items of \d+ patients in \d+ volumes", text, re.MULTILINE)


@pytest.mark.parametrize("name", TASKS)
def test_an_empty_folder_is_told_the_layout(name, tmp_path, command):
    for folder in (tmp_path, tmp_path / "none"):
        code, text = command("data.py", "check", "--task", name, "--data", folder)
        assert code == 1 and str(folder) in text and TASKS[name].layout in text and "Traceback" not in text


@pytest.mark.parametrize("name", ONE_SPLIT)
def test_a_set_without_folds_refuses_one(name, tmp_path):
    WRITE[name](tmp_path)
    with pytest.raises(ValueError, match="found --fold 3, but no folds, expected no --fold"):
        load_task(name, tmp_path, fold=3)


def test_a_fold_of_masks_in_two_parts_is_refused(tmp_path):
    acdc(tmp_path / "training")
    acdc(tmp_path / "testing", first=101, n=3)
    assert patients(load_task("acdc", tmp_path))["test"] == {"patient101", "patient102", "patient103"}
    with pytest.raises(ValueError, match="found --fold 1, but no folds, expected no --fold"):
        load_task("acdc", tmp_path, fold=1)
    shutil.rmtree(tmp_path / "testing")
    assert len({*patients(load_task("acdc", tmp_path, fold=1))["test"]}) == 2       # a fifth that is drawn


def test_drawn_splits_are_by_patient_seeded_and_disjoint(tmp_path, caplog):
    stoic(tmp_path, 40)
    caplog.set_level("INFO")
    items = load_task("stoic", tmp_path)
    assert f"{tmp_path}: no parts: 8 of 40 patients are drawn to test on" in caplog.text
    assert numbers(items) == (24, 8, 8)
    assert patients(load_task("stoic", tmp_path)) == patients(items)
    assert patients(load_task("stoic", tmp_path, seed=1)) != patients(items)
    for split in data.SPLITS:                               # every class in every part
        labels = np.array([item.labels for item in items if item.split == split])
        assert (labels.sum(0) > 0).all() and (labels.sum(0) < len(labels)).all()


@pytest.mark.parametrize("n", [40, 62])
def test_drawn_folds_are_fifths_that_share_no_patient(n, tmp_path):
    stoic(tmp_path, n)
    tests = [patients(load_task("stoic", tmp_path, fold=fold))["test"] for fold in range(5)]
    assert set.union(*tests) == {str(i) for i in range(n)} and sum(map(len, tests)) == n
    with pytest.raises(ValueError, match="--fold 5, but no folds, expected 0 to 4"):
        load_task("stoic", tmp_path, fold=5)


def test_missing_scans(tmp_path, caplog, command):
    stoic(tmp_path, 40)
    (tmp_path / "data" / "mha" / "7.mha").unlink()
    assert len(load_task("stoic", tmp_path)) == 39
    assert re.search("found no file for 1 of 40 volumes: .*7.mha; left out", caplog.text)
    code, text = command("data.py", "check", "--task", "stoic", "--data", tmp_path, "--limit", 2)
    assert code == 1 and "2 volumes read, 0 of them with a problem; 1 left out" in text
    for split, found in zip(data.SPLITS, numbers(load_task("stoic", tmp_path))):
        assert re.search(rf"^{split} +{found} items", text, re.MULTILINE)       # those of the training
    for i in (8, 9):
        (tmp_path / "data" / "mha" / f"{i}.mha").unlink()
    message = "no file for 3 of 40 volumes: .*7.mha.*8.mha.*9.mha, expected at most 5 %"
    with pytest.raises(ValueError, match=message):
        load_task("stoic", tmp_path)


@pytest.mark.parametrize("change", [{"window": (-175., 250.)}, {"spacing": (1., 1., 1.)}])
def test_a_row_of_whole_scans_has_the_preprocessing_of_pretraining(tmp_path, monkeypatch, change):
    ctrg(tmp_path)
    monkeypatch.setitem(TASKS, "ctrg", TASKS["ctrg"]._replace(**change))
    with pytest.raises(ValueError, match="ctrg: found window .* of a whole scan, expected .* as in pre-training"):
        load_task("ctrg", tmp_path)


def test_a_task_of_ones_own_has_no_drawn_set(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "mine", TASKS["stoic"])
    with pytest.raises(ValueError, match="mine: found no set to draw"):
        load_task("mine", "demo", cache=tmp_path)
    stoic(tmp_path / "set")
    assert load_task("mine", tmp_path / "set")


def test_a_task_may_take_its_values_as_stored(tmp_path):
    stoic(tmp_path)
    item, task = load_task("stoic", tmp_path)[0], TASKS["stoic"]._replace(size=(16, 16, 16))
    values = np.random.default_rng(0).normal(-1000, 20, (16, 16, 8)).astype(np.int16)
    values[4:12, 4:12, 2:6] = 40
    scan(item.volume, values + np.int16(1024))
    assert data.prepare(item, task, tmp_path / "cache")[0].min() == 0               # guessed: air again
    with pytest.raises(ValueError, match="air near -1000"):
        data.prepare(item, task._replace(hu="header"), tmp_path / "cache")


def test_the_end_of_a_long_report_is_told_and_not_taught(tmp_path, caplog):
    ctrg(tmp_path)
    task, item = TASKS["ctrg"]._replace(size=(32, 32, 32)), load_task("ctrg", tmp_path)[0]
    reports = {n: " ".join(["heart"] * n) for n in (149, 150, 151, 400)}
    words = data.build_vocabulary([reports[149], reports[150]])
    assert not caplog.records
    assert data.build_vocabulary(reports.values()) == words
    share = 100 * (1 + 250) / (149 + 150 + 151 + 400)
    assert f"{share:.1f} % of the words of the reports, the ends of long ones, are not learned" in caplog.text
    number = {word: i for i, word in enumerate(words)}
    for n, report in reports.items():
        tokens = data.task_example(item._replace(report=report), None, task, vocabulary=number)["tokens"].tolist()
        expected = ["<bos>", *["heart"] * min(n, 151), *["<eos>"] * (n <= 150)]     # <eos> where it ends alone
        assert [words[token] for token in tokens] == expected


@pytest.mark.parametrize("name", ["luna16", "msd-lung", "stoic", "ctrg"])
def test_scans_are_prepared_once(name, tmp_path, monkeypatch, caplog):
    folder, cache, task = tmp_path / "set", tmp_path / "cache", TASKS[name]
    WRITE[name](folder)
    items = load_task(name, folder)
    assert data.prepare_all(items, cache, 1, task) == items
    scans = {item.volume for item in items}
    dtypes = {"": np.float16}
    if task.view != "whole":
        dtypes[".affine"] = np.float64
    if task.kind == "segment":
        dtypes[".mask"] = np.uint8
    written = sorted(cache.iterdir())
    assert len(written) == len(scans) * len(dtypes)
    assert {Path(file.stem).suffix: np.load(file).dtype for file in written} == dtypes
    times = [file.stat().st_mtime_ns for file in written]
    assert data.prepare_all(items, cache, 1, task) == items     # all is there: nothing is written
    assert [file.stat().st_mtime_ns for file in sorted(cache.iterdir())] == times
    with monkeypatch.context() as patch:                    # a network's input is read from there alone
        patch.delattr(data, "read_stored")
        for item in items:
            assert data.network_input(item, task, cache).shape == (1, *task.size)

    item = items[-1]
    item.volume.write_bytes(b"broken")
    if len(scans) == 20:                                    # one of 20 may be wrong, one of 10 may not
        good = [one for one in items if one.volume != item.volume]
        assert data.prepare_all(items, cache, 1, task) == good and len(good) == 19
        assert re.search(f"left out {item.volume}: .*expected", caplog.text)
    else:
        with pytest.raises(ValueError, match=f"1 of 10 scans are wrong, more than 5 %:\n.*{item.volume}: .*expected"):
            data.prepare_all(items, cache, 1, task)


# ------------------------------------------------------------------------------------ each of them

def test_cc_ccii(tmp_path):
    cc_ccii(tmp_path, 20)
    items = load_task("cc-ccii", tmp_path)
    assert patients(items)["test"] == {str(112 + i) for i in range(8)}     # the valid part of the fold file
    item = next(item for item in items if item.id == "101/1003")
    assert item.volume == tmp_path / "CP" / "101" / "1003" and item.labels.tolist() == [0, 1, 0]
    message = r"found \['CC_CCII_fold0_train.csv', .*expected also \*fold1\*train"
    with pytest.raises(ValueError, match=message):
        load_task("cc-ccii", tmp_path, fold=1)
    shutil.move(tmp_path / "CP", tmp_path / "unzipped" / "CP-20" / "CP")    # as a zip gives it
    assert len(load_task("cc-ccii", tmp_path)) == 40
    shutil.rmtree(tmp_path / "Normal")
    with pytest.raises(ValueError, match="no file for 14 of 40 volumes"):
        load_task("cc-ccii", tmp_path)
    shutil.rmtree(tmp_path / "folds")
    with pytest.raises(ValueError, match="part train: found none or all with normal"):
        load_task("cc-ccii", tmp_path)


def test_cc_ccii_without_folds_and_with_bad_ones(tmp_path):
    cc_ccii(tmp_path, 30, csvs=False)
    assert numbers(load_task("cc-ccii", tmp_path)) == (18, 6, 6)
    for part in ("train", "valid"):
        write_csv(tmp_path / f"fold0_{part}.csv", "target,label,patient_id", [["1", "CP", 101]])
    with pytest.raises(ValueError, match=r"expected also \['scan_id'\]"):
        load_task("cc-ccii", tmp_path)


def test_cc_ccii_with_a_part_to_test_on(tmp_path):
    cc_ccii(tmp_path)
    folds = tmp_path / "folds"
    columns, *rows = list(csv.reader((folds / "CC_CCII_fold0_train.csv").read_text().splitlines()))
    write_csv(folds / "CC_CCII_fold0_train.csv", columns, rows[:-6])
    write_csv(folds / "CC_CCII_fold0_test.csv", columns, rows[-6:])                 # of three patients
    tested = [item for item in load_task("cc-ccii", tmp_path) if item.split == "test"]
    assert sorted(item.id for item in tested) == sorted(f"{row[3]}/{row[4]}" for row in rows[-6:])


def test_cc_ccii_patient_in_two_parts(tmp_path):
    cc_ccii(tmp_path)
    train, valid = (tmp_path / "folds" / f"CC_CCII_fold0_{part}.csv" for part in ("train", "valid"))
    columns, *rows = list(csv.reader(train.read_text().splitlines()))
    write_csv(train, columns, rows + [["x", 1, "CP", 107, 1014]])
    write_csv(valid, columns, [["x", 1, "CP", 107, 1015]])
    with pytest.raises(ValueError, match="the patient 107 in train and in test, expected it in one"):
        load_task("cc-ccii", tmp_path)
    write_csv(valid, columns, [["x", 1, "CP", 107, 1014]])
    with pytest.raises(ValueError, match=r"found 107/1014 \(.*CP/107/1014\) twice, expected it once"):
        load_task("cc-ccii", tmp_path)


def test_cc_ccii_npy(tmp_path):
    rows = []
    for i in range(15):
        grey = np.random.default_rng(i).integers(0, 256, (8, 16, 20), np.uint8)     # slices, rows, columns
        np.save(tmp_path / f"p{i}-s{i + 50}.npy", grey)
        rows.append([i % 3, ("Normal", "CP", "NCP")[i % 3], i, i + 50])
    with pytest.raises(ValueError, match=r"found \[\], expected also \*fold0\*train"):
        load_task("cc-ccii", tmp_path)
    write_csv(tmp_path / "fold0_train.csv", "target,label,patient_id,scan_id", rows[:9])
    write_csv(tmp_path / "fold0_valid.csv", "target,label,patient_id,scan_id", rows[9:])
    item = load_task("cc-ccii", tmp_path)[-1]
    array, spacing, _ = data.read_volume(item.volume)
    hu = grey[:, ::-1, ::-1] / 255 * 2000 - 1000            # rows run to the back
    np.testing.assert_allclose(array, hu, atol=1e-3)
    assert data.to_hounsfield(array, item.volume)[1].startswith("pictures") and spacing == (1, 1, 1)
    folder = tmp_path / "png"
    folder.mkdir()
    for z in range(8):
        sitk.WriteImage(sitk.GetImageFromArray(grey[z]), str(folder / f"{z}.png"))
    np.testing.assert_array_equal(data.read_volume(folder)[0], array)       # as pictures are read
    np.save(item.volume, grey.astype(np.float32))
    message = r"p14-s64.npy: cannot be read: float32 of shape \(8, 16, 20\), not uint8"
    with pytest.raises(ValueError, match=message):
        data.read_volume(item.volume)


@real_data
def test_cc_ccii_real_fold_files(tmp_path):
    for part in ("train", "valid"):
        path = tmp_path / f"CC_CCII_fold0_{part}.csv"
        shutil.copyfile(REAL / "splits" / path.name, path)
        for _, row in data.read_table(path):
            (tmp_path / row["zip_file"][:-4] / row["patient_id"] / row["scan_id"]).mkdir(parents=True)
    items = load_task("cc-ccii", tmp_path)
    assert len(items) == 4178 and sum(item.split == "test" for item in items) == 1664
    assert all(patients(items).values())
    assert np.sum([item.labels for item in items], 0).tolist() == [1078, 1556, 1544]


def test_luna16(tmp_path):
    luna16(tmp_path)
    items = load_task("luna16", tmp_path)
    assert len(items) == 20 and items[0].centre == (-5.5, -6, 3) and items[0].labels.tolist() == [0]
    assert items[0].volume == tmp_path / "subset0" / "1.2.0.mhd" and items[0].id == "1.2.0:2"
    assert patients(items)["valid"] == {"1.2.5", "1.2.6"}
    assert patients(items)["test"] == {"1.2.7", "1.2.8", "1.2.9"}
    (tmp_path / "candidates_V2.csv").rename(tmp_path / "candidates.csv")
    assert len(load_task("luna16", tmp_path)) == 20


def test_luna16_with_some_subsets(tmp_path, caplog):
    luna16(tmp_path, subsets=(0, 1, 2, 8))
    assert numbers(load_task("luna16", tmp_path)) == (2, 1, 1)
    assert "left out 6 series without .mhd: 1.2.3, 1.2.4, 1.2.5" in caplog.text


def test_luna16_series_without_its_raw_file(tmp_path, command):
    luna16(tmp_path)
    (tmp_path / "subset1" / "1.2.1.raw").unlink()
    code, text = command("data.py", "check", "--task", "luna16", "--data", tmp_path)
    problem = "1.2.1.mhd +PROBLEM .*subset1/1.2.1.mhd: cannot be read: .*with its .raw"
    assert code == 1 and re.search(problem, text)
    assert "10 volumes read, 1 of them with a problem" in text


def test_luna16_to_test_on(tmp_path):
    luna16(tmp_path, subsets=(7, 9))
    assert {item.split for item in load_task("luna16", tmp_path)} == {"test"}


def test_a_set_with_a_split_of_its_own_is_not_split_anew(tmp_path):
    luna16(tmp_path / "luna", subsets=range(7))
    ct_rate(tmp_path / "ct")
    shutil.rmtree(tmp_path / "ct" / "valid")
    for name, folder in (("luna16", "luna"), ("ct-rate-vocab", "ct"), ("ct-rate-retrieval", "ct")):
        with pytest.raises(ValueError, match="none for the part test"):
            load_task(name, tmp_path / folder)


def test_luna16_lacks_few_scans_of_the_subsets_that_are_there(tmp_path):
    luna16(tmp_path)
    (tmp_path / "subset3" / "1.2.3.mhd").rename(tmp_path / "subset2" / "1.2.30.mhd")
    with pytest.raises(ValueError, match="no .mhd for 1 of 10 series"):
        (tmp_path / "subset3" / "1.2.31.mhd").write_text("")
        load_task("luna16", tmp_path)


def test_labels_in_each_part_of_a_split(tmp_path):
    labels(tmp_path)
    path = tmp_path / "manifest.csv"
    rows = [[f"ct/{i}.nii.gz", ("train", "valid", "test")[i % 3], (i % 2, i % 2, "")[i % 3]] for i in range(10)]
    write_csv(path, "volume,split,ill", rows)
    with pytest.raises(ValueError, match="no label in the part test"):
        load_task("labels", tmp_path)


def test_cc_ccii_names_of_patients_may_have_letters(tmp_path):
    cc_ccii(tmp_path, csvs=False)
    (tmp_path / "Normal" / "100").rename(tmp_path / "Normal" / "A100")
    assert len(load_task("cc-ccii", tmp_path)) == 20


@pytest.mark.parametrize("old, new, message", [
    ("5.5,6,3,0", "5.5,six,3,0", "candidates_V2.csv, line 2: found .* 'six', expected a number"),
    ("6,3,1", "6,3,2", "candidates_V2.csv, line 3: found class '2', expected one of .'0', '1'"),
    ("6,3,1", "6,3,0", "part train: found none or all with nodule"),
    ("class", "label", r"candidates_V2.csv: .*expected also \['class'\]")])
def test_luna16_bad_candidates(tmp_path, old, new, message):
    luna16(tmp_path)
    path = tmp_path / "candidates_V2.csv"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        load_task("luna16", tmp_path)


def real_nodules():
    return [row for _, row in data.read_table(REAL / "luna" / "nodules_inside_slabs.csv")]


def real_slab(case):
    return REAL / "luna" / f"{case}_slab.nii.gz"


@real_data
def test_luna16_centre_lies_in_the_nodule_of_the_real_slabs(tmp_path):
    nodules = [row for row in real_nodules() if row["case"] != "LIDC-IDRI-0002"]
    for subset in range(10):
        (tmp_path / f"subset{subset}").mkdir()
    for case, subset in (("LIDC-IDRI-0001", 0), ("LIDC-IDRI-0003", 9)):
        series = next(row["seriesuid"] for row in nodules if row["case"] == case)
        slab = sitk.ReadImage(str(real_slab(case)))
        sitk.WriteImage(slab, str(tmp_path / f"subset{subset}" / f"{series}.mhd"))
    columns = ("seriesuid", "coordX", "coordY", "coordZ")
    write_csv(tmp_path / "candidates.csv", [*columns, "class"],
              [[*[row[name] for name in columns], 1] for row in nodules])
    items = TASKS["luna16"].records(tmp_path, 0)
    assert len(items) == len(nodules) and {item.split for item in items} == {"train", "test"}
    volumes = {item.volume: data.read_volume(item.volume) for item in items}
    for item, row in zip(items, nodules):
        array, _, affine = volumes[item.volume]
        x, y, z = np.rint(np.linalg.inv(affine) @ [*item.centre, 1])[:3].astype(int)
        stored, stored_affine = data.read_stored(real_slab(row["case"]))
        index = int(row["i"]), int(row["j"]), int(row["k"])             # of the stored slab
        np.testing.assert_allclose((stored_affine @ [*index, 1])[:3], item.centre, atol=1.3)
        assert array[z, y, x] == stored[index]
        if float(row["diameter_mm"]) > 20:
            assert array[z - 1:z + 2, y - 3:y + 4, x - 3:x + 4].mean() > -200       # a nodule, not lung


@real_data
def test_cubes_of_real_slabs_hold_their_nodules(tmp_path):
    task = TASKS["luna16"]._replace(size=(2, 64, 64))
    for row in real_nodules():
        if float(row["diameter_mm"]) > 20:
            x, y, z = (float(row[f"coord{axis}"]) for axis in "XYZ")
            item = data.Item(row["case"], real_slab(row["case"]), "", None, row["case"], np.float32([1]),
                             None, None, (-x, -y, z))
            slices = data.network_input(item, task, tmp_path)[0]        # (2, 64, 64)
            nodule, edge = slices[1, 28:36, 28:36].mean(), slices[1, -4:].mean()
            assert nodule > 0.55 > edge                                 # 0.625 is 0 HU, 0.1 is lung


def test_msd_lung(tmp_path, caplog):
    rows = msd_lung(tmp_path)
    items = load_task("msd-lung", tmp_path)
    assert numbers(items) == (6, 2, 2)
    assert items[0].mask == tmp_path / "labelsTr" / "lung_000.nii.gz"
    assert items[0].volume == tmp_path / "imagesTr" / "lung_000.nii.gz"
    folds = {"training": [row | {"fold": i % 5} for i, row in enumerate(rows)]}
    (tmp_path / "folds").mkdir()
    (tmp_path / "folds" / "mine.json").write_text(json.dumps(folds))
    assert patients(load_task("msd-lung", tmp_path, fold=3))["test"] == {"lung_003", "lung_008"}
    with pytest.raises(ValueError, match=r"mine.json: found the folds \[0, 1, 2, 3, 4\], expected fold 5"):
        load_task("msd-lung", tmp_path, fold=5)
    assert "left out" not in caplog.text
    (tmp_path / "folds" / "mine.json").write_text(json.dumps(folds | {"testing": rows[:2]}))
    load_task("msd-lung", tmp_path, fold=3)
    assert "mine.json: its folds count: left out 2 cases of other parts" in caplog.text
    (tmp_path / "more.json").write_text(json.dumps(folds))
    with pytest.raises(ValueError, match="mine.json: found also .*more.json for a list of cases, expected one"):
        load_task("msd-lung", tmp_path)


def test_msd_lung_bad_input(tmp_path, command):
    rows = msd_lung(tmp_path)
    (tmp_path / rows[4]["label"]).unlink()
    with pytest.raises(ValueError, match="1 cases without mask: .*labelsTr/lung_004.nii.gz"):
        load_task("msd-lung", tmp_path)
    mask(tmp_path / rows[4]["label"])
    mask(tmp_path / rows[5]["label"], label=7)
    check = ("data.py", "check", "--task", "msd-lung", "--data", tmp_path)
    code, text = command(*check)
    problem = "lung_005.nii.gz: found the label values [7.0], expected 0 to 1"
    assert code == 1 and problem in text
    assert "10 volumes read, 1 of them" in text and "0: 2000, 1: 48" in text
    mask(tmp_path / rows[5]["label"], affine=np.eye(4))
    code, text = command(*check)
    assert code == 1 and re.search("lung_005.nii.gz: found a mask of .* expected the grid of", text)
    for content, message in (('{"training": [', "dataset.json: found JSONDecodeError"),
                             ('{"training": [{"image": "a"}]}', "dataset.json: found KeyError: 'label'"),
                             ('{"training": ["a"]}', "dataset.json: found"),
                             ("[]", "found nothing of msd-lung"),
                             (json.dumps({"training": rows + rows[:1]}), r"found lung_000 \(.*lung_000.nii.gz\) twice")):
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            load_task("msd-lung", tmp_path)


def test_covid(tmp_path, caplog):
    covid(tmp_path)
    items = load_task("covid-19-20", tmp_path)
    assert len(items) == 10 and items[3].patient == "0003"
    assert items[3].mask.name == "volume-covid19-A-0003_seg.nii.gz"
    assert "Validation: left out 1 scans: none has a mask" in caplog.text
    for name in ("0047_1", "0196_0"):                               # as seven of the real ones are called
        scan(tmp_path / "Train" / f"volume-covid19-A-{name}_ct.nii.gz")
        mask(tmp_path / "Train" / f"volume-covid19-A-{name}_seg.nii.gz")
    items = {item.patient: item for item in load_task("covid-19-20", tmp_path)}
    assert len(items) == 12 and items["0047"].mask.name == "volume-covid19-A-0047_1_seg.nii.gz"
    (tmp_path / "Train" / "volume-covid19-A-0005_seg.nii.gz").unlink()
    with pytest.raises(ValueError, match="1 cases without mask: .*A-0005_seg"):
        load_task("covid-19-20", tmp_path)


def test_names_without_a_patient_and_folds_that_are_not_read_are_told(tmp_path, caplog):
    for i in range(12):
        scan(tmp_path / "imagesTr" / f"heart_{i:03d}_0000.nii.gz")
        mask(tmp_path / "labelsTr" / f"heart_{i:03d}.nii.gz")
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["heart_000"], "val": ["heart_001"]}]))
    items = load_task("acdc", tmp_path)
    assert len({item.patient for item in items}) == 12
    assert "names without a patient, such as heart_000_0000.nii.gz: each counts as another" in caplog.text
    assert "splits_final.json: folds of nnU-Net are not read" in caplog.text


def test_a_scan_in_metres_is_refused(tmp_path):
    for spacing in (0.0015, 1500):
        volume = save_nifti(tmp_path / f"{spacing}.nii", np.random.default_rng(0).integers(-999, 99, (8, 8, 8), np.int16), np.diag([spacing, spacing, spacing, 1]))
        with pytest.raises(ValueError, match=f"{spacing}.nii: found a spacing of .*expected millimetres, between 0.05"):
            data.prepare(data.Item("a", volume, "", "train", "a"), TASKS["msd-lung"], tmp_path / "cache")


@real_data
@pytest.mark.parametrize("name, file, counts", [
    ("msd-lung", "10_Decathlon_Task06_Lung_folds.json", (13, 50)),
    ("covid-19-20", "Covid19_20_folds.json", (40, 159))])
def test_real_fold_files(name, file, counts, tmp_path):
    shutil.copyfile(REAL / "splits" / file, tmp_path / file)
    content = json.loads((REAL / "splits" / file).read_text())
    for row in content["training"]:
        touch(tmp_path / "scans" / row["image"])
        touch(tmp_path / "scans" / row["label"])
    (tmp_path / "dataset.json").write_text(json.dumps({"training": [{"image": "x", "label": "y"}]}))
    items = load_task(name, tmp_path, fold=1)
    tested = [item.volume.name for item in items if item.split == "test"]
    assert set(tested) == {Path(row["image"]).name for row in content["training"] if row["fold"] == 1}
    assert (len(tested), len(items) - len(tested)) == counts
    assert all(patients(items).values())


def test_acdc(tmp_path):
    acdc(tmp_path / "training")
    items = load_task("acdc", tmp_path)
    assert len(items) == 20 and numbers(items) == (6, 2, 2)
    assert not any("4d" in item.id or "_gt" in item.id for item in items)
    assert patients(load_task("acdc", tmp_path / "training")) == patients(items)
    acdc(tmp_path / "testing", first=101, n=2)
    assert patients(load_task("acdc", tmp_path))["test"] == {"patient101", "patient102"}
    (tmp_path / "training" / "patient003" / "patient003_frame01_gt.nii.gz").unlink()
    with pytest.raises(ValueError, match="1 cases without mask: .*patient003_frame01_gt"):
        load_task("acdc", tmp_path)


@real_data
def test_acdc_real_list_is_split_by_patient(tmp_path, caplog):
    shutil.copyfile(REAL / "splits" / "ACDC_fold0.json", tmp_path / "ACDC_fold0.json")
    content = json.loads((REAL / "splits" / "ACDC_fold0.json").read_text())
    for row in content["training"] + content["validation"]:
        touch(tmp_path / row["image"])
        touch(tmp_path / row["label"])
    items = load_task("acdc", tmp_path)
    assert numbers(items) == (64, 16, 20)
    assert len(items) == 200 and "patients on both sides" in caplog.text
    rows = content["training"]
    content["validation"] = [row for row in rows if "patient001" in row["image"]]
    content["training"] = [row for row in rows if "patient001" not in row["image"]]
    (tmp_path / "ACDC_fold0.json").write_text(json.dumps(content))
    assert patients(load_task("acdc", tmp_path))["test"] == {"patient001"}     # by patient already: as it is


def test_stoic_bad_reference(tmp_path):
    stoic(tmp_path)
    path = tmp_path / "metadata" / "reference.csv"
    write_csv(path, "probSevere,PatientID,probCOVID",
              [[int(i % 4 == 0), i, int(i % 4 < 3)] for i in range(20)])
    labels = [item.labels.tolist() for item in load_task("stoic", tmp_path)]
    assert labels[:4] == [[1, 1], [1, 0], [1, 0], [0, 0]]
    for columns, rows, message in (
            ("PatientID,probCOVID,probSevere", [[1, 0.5, 0]],
             "reference.csv, line 2: found probCOVID '0.5', expected one of .'0', '1'"),
            ("PatientID,probCOVID,probSevere", [[i, 1, i % 2] for i in range(20)],
             "part train: found none or all with COVID-19"),
            ("PatientID,probCOVID", [[1, 0]], r"reference.csv: .*expected also \['probSevere'\]")):
        write_csv(path, columns, rows)
        with pytest.raises(ValueError, match=message):
            load_task("stoic", tmp_path)


def test_ctrg(tmp_path, caplog):
    content = ctrg(tmp_path)
    items = load_task("ctrg", tmp_path)
    assert patients(items)["test"] == {"7.nii.gz", "8.nii.gz", "9.nii.gz"}  # listed as val too: not valid
    assert collections.Counter(item.split for item in items) == {"train": 5, "valid": 2, "test": 3}
    assert [item.id for item in load_task("ctrg", tmp_path / "CTRG.json")] == [item.id for item in items]
    content["train"][2]["report"] = " . "
    (tmp_path / "CTRG.json").write_text(json.dumps(content))
    assert len(load_task("ctrg", tmp_path)) == 9 and "an empty report: 2.nii.gz" in caplog.text
    del content["train"][3]["report"]
    (tmp_path / "CTRG.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="CTRG.json: .*KeyError: 'report'"):
        load_task("ctrg", tmp_path)
    ctrg(tmp_path, name="other.json")
    with pytest.raises(ValueError, match="CTRG.json: found also .*other.json for the reports, expected one"):
        load_task("ctrg", tmp_path)


@pytest.mark.parametrize("name", ["ct-rate-vocab", "ct-rate-retrieval"])
def test_ct_rate(name, tmp_path):
    ct_rate(tmp_path)
    items = load_task(name, tmp_path)
    assert patients(items)["test"] == {"valid_7", "valid_8", "valid_9"}
    assert len(patients(items)["train"]) == 5
    assert items[0].labels.tolist() == [k % 2 for k in range(18)]
    ct_rate(tmp_path, columns=LABELS[::-1])                 # columns in another order follow their names
    assert load_task(name, tmp_path)[0].labels.tolist() == [k % 2 for k in range(18)]
    shutil.rmtree(tmp_path / "train")
    assert {item.split for item in load_task(name, tmp_path)} == {"test"}


def test_vocab_needs_labels_and_draws_training_volumes(tmp_path, monkeypatch):
    ct_rate(tmp_path, columns=LABELS[:17])
    assert len(load_task("ct-rate-retrieval", tmp_path)) == 10
    message = "unknown labels of train_0_a_1, train_1_a_1, train_2_a_1 …, expected 0 or 1 for all 18"
    with pytest.raises(ValueError, match=message):
        load_task("ct-rate-vocab", tmp_path)
    (tmp_path / "labels.csv").unlink()
    with pytest.raises(ValueError, match=message):
        load_task("ct-rate-vocab", tmp_path)
    ct_rate(tmp_path)
    monkeypatch.setattr(data, "FEW_SHOT_VOLUMES", 4)
    items = load_task("ct-rate-vocab", tmp_path)
    assert collections.Counter(item.split for item in items) == {"train": 4, "valid": 1, "test": 3}
    assert patients(load_task("ct-rate-vocab", tmp_path)) == patients(items)
    drawn = {frozenset(patients(load_task("ct-rate-vocab", tmp_path, seed=k))["train"]) for k in range(5)}
    assert len(drawn) > 1


def test_ct_rate_manifest(tmp_path):
    splits = [("train", "valid", "test")[i % 3] for i in range(10)]
    for i in range(10):
        scan(tmp_path / f"{i}.nii.gz")
    path = write_csv(tmp_path / "manifest.csv", ["volume", "report", "split", *LABELS],
                     [[f"{i}.nii.gz", "Fine.", splits[i], *[i % 2] * 18] for i in range(10)])
    for name in ("ct-rate-vocab", "ct-rate-retrieval"):
        assert [item.split for item in load_task(name, path)] == splits
    write_csv(path, "volume,report,split,patient",
              [[f"{i}.nii.gz", "Fine.", ("valid", "test")[i % 2], "p"] for i in range(10)])
    with pytest.raises(ValueError, match="the patient p in valid and in test"):
        load_task("ct-rate-retrieval", path)


# ------------------------------------------------------------------------------------- one's own data

def own(folder, columns, rows):
    """Scans of one's own with these columns beside the volume"""
    for i in range(len(rows)):
        scan(folder / f"{i}.nii.gz")
    return write_csv(folder / "my.csv", f"volume,{columns}", [[f"{i}.nii.gz", *row] for i, row in enumerate(rows)])


def test_columns_of_labels(tmp_path, caplog):
    caplog.set_level("INFO")
    unknown = ("", "-1", "nan", "N/A")
    rows = [[f"P{i // 2}", i % 2, ("True", "false", "1.0", "0", unknown[i // 5 % 4])[i % 5], 20 + i, "A",
             "", int(i == 3), "" if i == 11 else 1 - i % 2, "first"] for i in range(40)]
    rows[7][1] = rows[7][2] = rows[7][6] = rows[7][7] = ""      # nothing is known of it
    path = own(tmp_path, "patient,one,two,age,scanner,empty,rare,lung_nodule,report", rows)
    items = load_task("labels", path)
    assert items[0].classes == ("one", "two", "rare", "Lung nodule")
    assert "labels one, two, rare, Lung nodule\n" in caplog.text
    assert [item.id for item in items] == [f"{i}.nii.gz" for i in range(40) if i != 7]
    assert "left out 1 of 40 items without a label: 7.nii.gz" in caplog.text
    for item in items:
        i = int(item.id.split(".")[0])
        two = (1, 0, 1, 0, np.nan)[i % 5]
        expected = [i % 2, two, i == 3, np.nan if i == 11 else 1 - i % 2]
        assert np.array_equal(item.labels, np.float32(expected), equal_nan=True) and item.patient == f"P{i // 2}"
    assert all(patients(items).values())
    assert len({tuple(sorted(patients(load_task("labels", path, fold))["test"])) for fold in range(5)}) == 5
    assert {*re.findall("part .*: none or all have (.*)", caplog.text)} == {"rare"}      # of one patient


def test_a_fifth_is_drawn_of_each_label(tmp_path):
    items = load_task("labels", own(tmp_path, "ill", [[int(i % 5 == 0)] for i in range(50)]))
    assert numbers(items) == (31, 9, 10)
    assert [sum(item.labels[0] for item in items if item.split == split) for split in data.SPLITS] == [6, 2, 2]


def test_the_split_of_a_manifest_counts(tmp_path):
    parts = ("train", "val", "test", "train")
    path = own(tmp_path, "ill,split", [[int(i % 8 < 4), parts[i % 4]] for i in range(40)])
    assert numbers(load_task("labels", path)) == (20, 10, 10)
    assert [item.split for item in load_task("labels", path)][:4] == ["train", "valid", "test", "train"]
    with pytest.raises(ValueError, match="my.csv: found --fold 1, but no folds, expected no --fold"):
        load_task("labels", path, fold=1)
    path = own(tmp_path, "ill,split", [[int(i % 8 < 4), "val" if i % 4 == 1 else "train"] for i in range(40)])
    assert numbers(load_task("labels", path)) == (24, 6, 10)    # that of validation is the one to report on
    path = own(tmp_path, "ill,split,patient", [[i % 2, ("train", "test")[i > 20], "P"] for i in range(40)])
    with pytest.raises(ValueError, match="the patient P in train and in test"):
        load_task("labels", path)


@pytest.mark.parametrize("columns, cell, message", [
    ("ill", "2", "my.csv, line 6: found ill '2', expected 0, 1 or, where it is unknown, -1"),
    ("Cardiomegaly", "maybe", "my.csv, line 6: found Cardiomegaly 'maybe', expected 0, 1 or, where it is unknown, -1"),
])
def test_a_cell_that_is_no_label_is_named(tmp_path, columns, cell, message):
    rows = [[i % 2] for i in range(40)]
    rows[4] = [cell]
    with pytest.raises(ValueError, match=message):
        load_task("labels", own(tmp_path, columns, rows))


def test_bad_sets_of_labels(tmp_path):
    path = own(tmp_path, "age", [[i] for i in range(10, 30)])
    with pytest.raises(ValueError, match="my.csv: found no label column, expected one at least"):
        load_task("labels", path)
    path = own(tmp_path, "ill", [[1] for i in range(20)])
    with pytest.raises(ValueError, match="part train: found none or all with ill, expected some of both"):
        load_task("labels", path)
    write_csv(tmp_path / "other.csv", "volume,ill", [])
    with pytest.raises(ValueError, match="no label column"):
        load_task("labels", tmp_path / "other.csv")


def test_classes_of_masks(tmp_path, monkeypatch):
    segment(tmp_path, values=(1, 3, 2))
    items = load_task("segment", tmp_path, cache=tmp_path / "cache")
    task = data.with_classes(TASKS["segment"], items)
    assert task.classes == ("1", "2", "3") and numbers(items) == (6, 2, 2)
    assert set(np.unique(data.prepare(items[1], task, tmp_path / "cache")[1])) == {0, 3}
    monkeypatch.setattr(data, "in_processes", None)             # the masks are read once
    assert load_task("segment", tmp_path, cache=tmp_path / "cache")[0].classes == task.classes
    monkeypatch.undo()
    mask(tmp_path / "masks" / "0.nii.gz", 4)                    # but those that changed
    assert load_task("segment", tmp_path, cache=tmp_path / "cache")[0].classes == ("1", "2", "3", "4")


def test_masks_are_nothing_to_a_task_of_labels(tmp_path, command):
    """One manifest may serve both: the values of its masks are no classes of its labels."""
    path = own(tmp_path, "mask,one", [[f"{i}_mask.nii.gz", i % 2] for i in range(10)])
    for i in range(10):
        mask(tmp_path / f"{i}_mask.nii.gz", 7)
    code, text = command("data.py", "check", "--task", "labels", "--data", path)
    assert code == 0 and "10 volumes read, 0 of them with a problem" in text, text


def test_bad_masks_of_ones_own(tmp_path):
    segment(tmp_path, values=(255,))
    with pytest.raises(ValueError, match=r"found the values \[0.0, 255.0\] in all masks, expected 0 \(background\) to K"):
        load_task("segment", tmp_path, cache=tmp_path)
    segment(tmp_path, values=(0,))
    with pytest.raises(ValueError, match=r"found the values \[0.0\] in all masks"):
        load_task("segment", tmp_path, cache=tmp_path)
    segment(tmp_path)
    (tmp_path / "masks" / "3.nii.gz").unlink()
    with pytest.raises(ValueError, match="found 1 cases without mask: .*3.nii.gz, expected none"):
        load_task("segment", tmp_path, cache=tmp_path)
    write_csv(tmp_path / "manifest.csv", "volume,mask", [["ct/0.nii.gz", "masks/0.nii.gz"], ["ct/1.nii.gz", ""]])
    with pytest.raises(ValueError, match="found 1 cases without mask: ct/1.nii.gz"):
        load_task("segment", tmp_path, cache=tmp_path)
    write_csv(tmp_path / "manifest.csv", "volume,report", [["ct/0.nii.gz", "Fine."]])
    with pytest.raises(ValueError, match=r"expected also \['mask'\]"):
        load_task("segment", tmp_path, cache=tmp_path)


def test_reports_are_generated_for_labelled_sets_too(tmp_path):
    path = own(tmp_path, "report,split,Lung nodule", [[f"Report {i}.", ("train", "test")[i > 6], i % 2] for i in range(10)])
    items = load_task("ctrg", path)
    assert numbers(items) == (5, 2, 3) and items[1].labels[data.LABELS.index("Lung nodule")] == 1
    ct_rate(tmp_path / "ct_rate")
    items = load_task("ctrg", tmp_path / "ct_rate")
    assert items[0].report == "Fine.\nWell." and len(items[0].labels) == 18 and all(numbers(items))


# --------------------------------------------------------------- what other tools write and leave behind

APPLE = b"\0\5\x16\7\0\2\0\0Mac OS X"


@pytest.mark.parametrize("name", TASKS)
def test_hidden_copies_change_nothing(name, tmp_path):
    """Beside every file the ._file of a Mac's archive, beside every table and list a copy of an editor"""
    folder, archive = tmp_path / "set", tmp_path / "archive"
    WRITE[name](folder)
    expected = load_task(name, folder)
    for path in sorted(folder.rglob("*")):
        if path.name in ("CP", "subset0", "imagesTr", "Train", "patient001", "metadata", "train"):
            shutil.copytree(path, folder / "__MACOSX" / path.relative_to(folder), dirs_exist_ok=True)
        path.with_name("._" + path.name).write_bytes(APPLE)
        if path.suffix in (".csv", ".json"):
            copy = path.parent / ".ipynb_checkpoints" / path.name
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
    assert [item[:5] for item in load_task(name, folder)] == [item[:5] for item in expected]
    folder.rename(archive)                                  # the set behind links, folder by folder
    folder.mkdir()
    for path in archive.iterdir():
        (folder / path.name).symlink_to(path)
    assert [item[:5] for item in load_task(name, folder)] == [item[:5] for item in expected]


def test_acdc_behind_a_link_is_tested_on_its_test_patients(tmp_path):
    acdc(tmp_path / "set" / "training")
    acdc(tmp_path / "disk" / "testing", first=101, n=2)
    (tmp_path / "set" / "testing").symlink_to(tmp_path / "disk" / "testing")
    (tmp_path / "set" / "a_second_way").symlink_to(tmp_path / "set" / "training")
    items = load_task("acdc", tmp_path / "set")
    assert len(items) == 24 and patients(items)["test"] == {"patient101", "patient102"}


@pytest.mark.parametrize("one, other, test", [
    ("training", "testing", 2), ("ACDC_train", "ACDC_test", 2), ("Train set", "Test-Set (1)", 2), ("train", "Validation", 2),
    ("test_run/training", "test_run/testing", 2), ("scanner A", "latest", None), ("a", "test-retest", None), ("a", "attested/b", None)])
def test_whole_names_of_folders_tell_the_split(tmp_path, one, other, test):
    acdc(tmp_path / one)
    acdc(tmp_path / other, first=101, n=2)
    tested = {item.patient for item in load_task("acdc", tmp_path) if item.split == "test"}
    assert (tested == {"patient101", "patient102"}) == bool(test)


def test_a_list_means_the_file_that_it_names(tmp_path):
    msd_lung(tmp_path)
    shutil.copytree(tmp_path / "imagesTr", tmp_path / "clipped" / "imagesTr")
    scan(tmp_path / "clipped" / "lung_000.nii.gz")
    assert {item.volume.parent for item in load_task("msd-lung", tmp_path)} == {tmp_path / "imagesTr"}
    (tmp_path / "lists").mkdir()
    (tmp_path / "dataset.json").rename(tmp_path / "lists" / "dataset.json")     # seen from the folder, then
    assert {item.volume.parent for item in load_task("msd-lung", tmp_path)} == {tmp_path / "imagesTr"}
    (tmp_path / "lists" / "dataset.json").rename(tmp_path / "clipped" / "dataset.json")
    items = load_task("msd-lung", tmp_path)                 # seen from the list, first
    assert {item.volume.parent for item in items} == {tmp_path / "clipped" / "imagesTr"}
    assert {item.mask.parent for item in items} == {tmp_path / "labelsTr"}
    (tmp_path / "clipped" / "dataset.json").rename(tmp_path / "lists" / "dataset.json")
    (tmp_path / "raw").mkdir()
    (tmp_path / "imagesTr").rename(tmp_path / "raw" / "imagesTr")
    message = "clipped/imagesTr/lung_000.nii.gz: found also .*raw/imagesTr/lung_000.nii.gz for ./imagesTr/lung_000.nii.gz of .*dataset.json"
    with pytest.raises(ValueError, match=message):
        load_task("msd-lung", tmp_path)


def test_lists_as_other_tools_write_them(tmp_path):
    rows = msd_lung(tmp_path)
    listed = tmp_path / "dataset.json"

    def split_of(**content):
        listed.write_text(json.dumps(content))
        items = load_task("msd-lung", tmp_path)
        return "".join(next(item.split[1] for item in items if item.id == f"lung_{i:03d}") for i in range(10))
    windows = [{name: [path[2:].replace("/", "\\")] for name, path in row.items()} for row in rows]
    assert split_of(Training=windows[:6], validation=rows[6:]).endswith("eeee")             # "test"
    parts = split_of(train=rows[:6], val=rows[6:8], testing=rows[8:])
    assert set(parts[:6]) == {"r"} and parts[6:] == "aaee"
    assert split_of(training=[row | {"fold": str(i % 5)} for i, row in enumerate(rows)])[::5] == "ee"
    for content, message in (({"training": rows[:8], "holdout": rows[8:]}, "the part 'holdout'"),
                             ({"training": [row | {"image": [row["image"]] * 2} for row in rows]}, "too many values")):
        with pytest.raises(ValueError, match=f"dataset.json: found .*{message}"):
            split_of(**content)


@pytest.mark.parametrize("name", ["msd-lung", "covid-19-20", "acdc"])
def test_nnunet_names_its_channels(name, tmp_path, caplog):
    cases = {"msd-lung": "lung_{:03d}", "covid-19-20": "volume-covid19-A-{:04d}", "acdc": "patient{:03d}_frame01"}
    for i in range(12):
        part = "Tr" if i < 10 else "Ts"
        scan(tmp_path / f"images{part}" / (cases[name].format(i) + "_0000.nii.gz"))
        mask(tmp_path / f"labels{part}" / (cases[name].format(i) + ".nii.gz"))
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "CT"}, "numTraining": 10, "file_ending": ".nii.gz"}')
    items = load_task(name, tmp_path)
    assert numbers(items) == (8, 2, 2) and items[3].mask.name == cases[name].format(3) + ".nii.gz"
    shutil.rmtree(tmp_path / "labelsTs")
    assert numbers(load_task(name, tmp_path)) == (6, 2, 2) and "none has a mask" in caplog.text
    rows = [{"image": f"./imagesTr/{cases[name].format(i)}.nii.gz", "label": f"./labelsTr/{cases[name].format(i)}.nii.gz"} for i in range(10)]
    (tmp_path / "dataset.json").write_text(json.dumps({"training": rows}))
    listed = load_task(name, tmp_path)
    assert len(listed) == 10 and listed[3].volume.name == cases[name].format(3) + "_0000.nii.gz"


def test_endings_in_capitals_and_unpacked_masks(tmp_path):
    for i in range(10):
        name = tmp_path / f"volume-covid19-A-{i:04d}"
        scan(tmp_path / "ct.nii.gz")
        (tmp_path / "ct.nii.gz").rename(f"{name}_CT.NII.GZ")
        mask(tmp_path / "seg.nii.gz")
        scan_mask = sitk.ReadImage(str(tmp_path / "seg.nii.gz"))
        sitk.WriteImage(scan_mask, f"{name}_seg.nii")
    (tmp_path / "seg.nii.gz").unlink()
    items = load_task("covid-19-20", tmp_path)
    assert len(items) == 10 and items[2].id == "volume-covid19-A-0002_CT" and items[2].patient == "0002"
    assert items[2].mask.name == "volume-covid19-A-0002_seg.nii"
    assert data.network_input(items[2], TASKS["covid-19-20"], tmp_path / "cache").shape == (1, 32, 192, 192)


def two_of_a_case(name, folder):
    """A set with a second file for one of its cases -> the two"""
    WRITE[name](folder)
    if name == "covid-19-20":
        first, second = (folder / "Train" / f"volume-covid19-A-0003_ct.nii{end}" for end in (".gz", ""))
        scan(folder / "new.nii.gz")
        (folder / "new.nii.gz").rename(second)
    elif name == "luna16":
        first, second = folder / "subset3" / "1.2.3.mhd", folder / "v2" / "subset4" / "1.2.3.mhd"
        scan(second)
    elif name == "stoic":
        first, second = folder / "data" / "mha" / "7.mha", folder / "data" / "mha" / "more" / "7.mha"
        scan(second)
    elif name == "cc-ccii":
        first, second = folder / "CP" / "101" / "1003", folder / "NCP" / "101" / "1003"
        shutil.copytree(first, second)
    return first, second


@pytest.mark.parametrize("name", ["cc-ccii", "luna16", "covid-19-20", "stoic"])
def test_two_files_for_a_case_are_refused(name, tmp_path):
    names = "|".join(str(path) for path in two_of_a_case(name, tmp_path))
    with pytest.raises(ValueError, match=f"({names}): found also ({names}) for .*, expected one of them"):
        load_task(name, tmp_path)


@pytest.mark.parametrize("name, table", [("luna16", "candidates_V2.csv"), ("cc-ccii", "folds/CC_CCII_fold0_train.csv")])
def test_two_versions_of_a_table_are_refused(name, table, tmp_path):
    WRITE[name](tmp_path)
    copy = tmp_path / "old" / Path(table).name
    copy.parent.mkdir()
    shutil.copyfile(tmp_path / table, copy)
    with pytest.raises(ValueError, match=f"{table}: found also .*old/.*|old/.*: found also .*{table}"):
        load_task(name, tmp_path)


def test_cc_ccii_label_against_its_folder(tmp_path):
    cc_ccii(tmp_path)
    table = tmp_path / "folds" / "CC_CCII_fold0_train.csv"
    table.write_text(table.read_text().replace("1,CP,101,1002", "2,NCP,101,1002"))
    with pytest.raises(ValueError, match="fold0_train.csv, line 4: found label 'NCP', expected 'CP', that of .*CP/101/1002"):
        load_task("cc-ccii", tmp_path)


def test_spellings_of_classes(tmp_path):
    """As pandas writes numbers of a column with gaps, or booleans; parts under other names"""
    stoic(tmp_path / "stoic")
    expected = [item.labels.tolist() for item in load_task("stoic", tmp_path / "stoic")]
    write_csv(tmp_path / "stoic" / "metadata" / "reference.csv", "patientid, probCOVID ,PROBSEVERE",
              [[i, str(i % 4 < 3), f"{int(i % 4 == 0)}.0"] for i in range(20)])
    assert [item.labels.tolist() for item in load_task("stoic", tmp_path / "stoic")] == expected
    cc_ccii(tmp_path / "cc")
    expected = [item[:5] for item in load_task("cc-ccii", tmp_path / "cc")]
    for part, name in (("train", "Training"), ("valid", "val")):
        table = tmp_path / "cc" / "folds" / f"CC_CCII_fold0_{part}.csv"
        text = table.read_text().replace(",0,Normal", ",0.0,normal").replace(",2,NCP", ",2.0, ncp")
        table.with_name(f"cc_ccii_Fold0_{name}.CSV").write_text(text.replace(",", ";"))
        table.unlink()
    assert [item[:5] for item in load_task("cc-ccii", tmp_path / "cc")] == expected
    luna16(tmp_path / "luna")
    expected = [item.labels.tolist() for item in load_task("luna16", tmp_path / "luna")]
    table = tmp_path / "luna" / "candidates_V2.csv"
    table.write_text(re.sub(r"(\d)$", r"\1.0", table.read_text(), flags=re.MULTILINE).replace("class", "Class"))
    assert [item.labels.tolist() for item in load_task("luna16", tmp_path / "luna")] == expected


@pytest.mark.parametrize("name, table, old, new, message", [
    ("luna16", "candidates_V2.csv", ",3,1", ",3,-1", "line 3: found class '-1', expected one of .'0', '1'"),
    ("stoic", "metadata/reference.csv", "0,1,1", "0,1,-1", "line 2: found probSevere '-1', expected one of .'0', '1'"),
    ("cc-ccii", "folds/CC_CCII_fold0_train.csv", "x.zip,1,CP", "x.zip,1,COVID", "line 4: found label 'COVID', expected one of .'Normal'")])
def test_classes_are_closed_sets(name, table, old, new, message, tmp_path):
    WRITE[name](tmp_path)
    path = tmp_path / table
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=f"{path.name}, {message}"):
        load_task(name, tmp_path)


def test_vocab_refuses_an_uncertain_label(tmp_path, caplog):
    ct_rate(tmp_path)
    path = tmp_path / "labels.csv"
    path.write_text(path.read_text().replace("valid_8_a_1.nii.gz,0", "valid_8_a_1.nii.gz,-1"))
    with pytest.raises(ValueError, match="unknown labels of valid_8_a_1, expected 0 or 1"):
        load_task("ct-rate-vocab", tmp_path)
    assert "labels.csv: labels of -1 are taken as unknown" in caplog.text
    assert len(load_task("ct-rate-retrieval", tmp_path)) == 10
