"""The demo phantoms: every finding is in the voxels, where the report says, and the same seed gives the same bytes."""
import csv
import re
from functools import cache

import nibabel
import numpy as np
import pytest
from scipy import ndimage

import data

KEYWORDS = ("pacemaker|port chamber|device", "calcif.*(aorta|aortic)|(aorta|aortic).*calcif",
            "heart size|cardiomegaly|heart is", "pericardial effusion", "coronary", "hiatal hernia", "lymph",
            "emphysem", "atelecta", "nodule", "ground glass", "fibrotic", "pleural effusion", "mosaic",
            "peribronchial", "consolidation", "bronchiecta", "interlobular")
NEGATION = r"\b(no|not)\b"


@cache
def alone(k, index):
    """A patient with finding k only, beside the healthy twin."""
    return data.phantom(3, index, findings=[k], with_healthy=True)


@cache
def drawn(index):
    return data.phantom(4, index)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return data.write_demo(tmp_path_factory.mktemp("demo"), n=24, seed=4, workers=2)


def rows_of(manifest):
    with manifest.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def millimetres(p):
    """World coordinates x, y, z of every voxel, each (z, y, x), from the affine alone."""
    k, j, i = np.meshgrid(*map(np.arange, p["volume"].shape), indexing="ij")
    return (np.stack([i, j, k], -1) @ p["affine"][:3, :3].T + p["affine"][:3, 3]).transpose(3, 0, 1, 2)


def lungs_of(p):
    """The lungs of the healthy twin (z, y, x), from the voxels alone, and the x of the body's middle."""
    x, y, z = millimetres(p)
    tissue = ndimage.binary_opening(p["healthy"] > -300)
    body = np.stack([ndimage.binary_fill_holes(one) for one in tissue])
    middle = x[body].mean()
    return body & (p["healthy"] < -600) & (np.abs(x - middle) > 25), middle


def sentences(p):
    return [one for one in re.split(r"(?<=\.)\s+", p["report"].lower()) if one]


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("k", range(18), ids=data.LABELS)
def test_a_finding_changes_its_place_and_no_other(k, index):
    p = alone(k, index)
    change = np.abs(p["volume"].astype(int) - p["healthy"])
    here = p["mask"] == k + 1
    assert set(np.unique(p["mask"])) == {0, k + 1} and p["labels"].sum() == p["labels"][k] == 1
    assert np.median(change[here]) > 100 and (change[here] > 40).mean() > .97
    assert change[~here].max() <= 62
    # what a small network is given: centre crop, 64 voxels a side
    margins = [round(n * (1 - part) / 2) for n, part in zip(here.shape, (.88, .66, .88))]
    crop = [slice(margin, n - margin) for n, margin in zip(here.shape, margins)]
    small = [ndimage.zoom(p[key][tuple(crop)].clip(-1000, 1000).astype(np.float32),
                          64 / np.array([s.stop - s.start for s in crop]), order=1) for key in ("volume", "healthy")]
    assert (np.abs(small[0] - small[1]) > 120).sum() >= 50


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("k", range(18), ids=data.LABELS)
def test_side_and_lobe_are_those_of_the_coordinates(k, index):
    p = alone(k, index)
    lung, middle = lungs_of(p)
    x, y, z = millimetres(p)
    for found in p["lesions"]:
        here = p["mask"] == k + 1
        if len(p["lesions"]) > 1:                           # several nodules: this one
            k_, j_, i_ = np.rint(found["centre"]).astype(int)
            here &= (x - x[k_, j_, i_]) ** 2 + (y - y[k_, j_, i_]) ** 2 + (z - z[k_, j_, i_]) ** 2 < 20 ** 2
        right = (x[here] > middle).mean()
        if k == 0:                                          # the device; its lead goes to the heart
            right = (x[here & (p["volume"] > 2700)] > middle).mean()
        if found["side"] == "bilateral":
            assert .15 < right < .85
        elif found["side"]:
            assert (right if found["side"] == "right" else 1 - right) > .9
        if found["lobe"]:
            # above the oblique fissure, which falls 40 degrees towards the front; above the horizontal one
            mine = lung & ((x > middle) if found["side"] == "right" else (x < middle))
            y0, z0 = (y[lung].min() + y[lung].max()) / 2, np.quantile(z[mine], (0, 1)) @ (.53, .47)
            oblique, across = (z[here] - z0 + .9 * (y[here] - y0)).mean(), (z[here] - z0).mean()
            expected = "lower" if oblique < 0 else "middle" if across < 8 and found["side"] == "right" else "upper"
            assert found["lobe"] == expected, (oblique, across)


def test_places_vary():
    for k in (8, 9, 10, 15, 16):
        assert len({(one["side"], one["lobe"]) for i in range(12) for one in data_lesions(k, i)}) >= 3
    assert {one["side"] for i in range(12) for one in data_lesions(12, i)} == {"left", "right", "bilateral"}


@cache
def data_lesions(k, index):
    return data.phantom(8, index, findings=[k])["lesions"]


@pytest.mark.parametrize("index", range(6))
def test_sizes_are_those_of_the_voxels(index):
    p = alone(9, index)
    x, y, z = millimetres(p)
    voxel = np.prod(p["spacing"])
    for one in p["lesions"]:
        k, j, i = np.rint(one["centre"]).astype(int)
        near = (x - x[k, j, i]) ** 2 + (y - y[k, j, i]) ** 2 + (z - z[k, j, i]) ** 2 < 20 ** 2
        grown = ((p["volume"].astype(float) - p["healthy"]) * (near & (p["healthy"] < -600)))[near].clip(0).sum() / 900
        grown += (near & (p["healthy"] >= -600) & (p["mask"] > 0)).sum()
        assert (6 * grown * voxel / np.pi) ** (1 / 3) == pytest.approx(one["size_mm"], rel=.12)
        assert 14 <= one["size_mm"] <= 30.5
    p = alone(12, index)
    thick = (p["volume"] - p["healthy"].astype(int) > 400).sum(1).max() * p["spacing"][1]
    assert thick == pytest.approx(p["lesions"][0]["size_mm"], rel=.1)
    p = alone(5, index)
    tall = (p["mask"] > 0).any((1, 2)).sum() * p["spacing"][0]
    assert tall == pytest.approx(p["lesions"][0]["size_mm"], rel=.25)


@pytest.mark.parametrize("index", range(40))
def test_report_says_what_is_there_and_nothing_else(index):
    p = drawn(index)
    said = sentences(p)
    for k, label in enumerate(data.LABELS):
        mentioned = [one for one in said if re.search(KEYWORDS[k], one)]
        positive = [one for one in mentioned if not re.search(NEGATION, one)]
        found = [one for one in p["lesions"] if one["label"] == label]
        assert p["labels"][k] == bool(found) == bool(positive)
        assert len(positive) == len(found) and (not positive or len(mentioned) == len(positive))
        assert (np.sum(p["mask"] == k + 1) >= 20) == bool(found)
        for one, text in zip(found, positive):
            sides = {"bilateral": "both|right and left"}.get(one["side"], one["side"])
            assert sides is None or re.search(rf"\b({sides})\b", text)
            assert set(re.findall(r"\b(right|left)\b", text)) <= {one["side"]} or one["side"] == "bilateral"
            assert set(re.findall(r"\b(upper|middle|lower)\b", text)) == ({one["lobe"]} if one["lobe"] else set())
            assert re.findall(r"\d+", text) == ([str(round(one["size_mm"]))] if one["size_mm"] else [])


def test_reports_read_like_reports():
    reports = [drawn(i) for i in range(40)]
    assert all(8 <= len(sentences(p)) <= 20 for p in reports)
    assert len({p["report"] for p in reports}) == 40
    assert len(set(re.findall(r"[a-z]+", " ".join(p["report"] for p in reports).lower()))) < 500
    share = np.mean([p["labels"] for p in reports], 0)
    assert share.shape == (18,) and share.min() > .04 and share.max() < .6


def test_every_combination_can_be_drawn():
    p = data.phantom(1, 0, findings=range(18))
    assert p["labels"].sum() == 18 and np.bincount(p["mask"].ravel(), minlength=19).min() >= 20
    healthy = data.phantom(1, 0, findings=[9], with_healthy=True)["healthy"]
    assert np.array_equal(data.phantom(1, 0, findings=[])["volume"], healthy)


def test_the_same_seed_gives_the_same_bytes(tmp_path, written):
    second = data.write_demo(tmp_path, n=6, seed=4, workers=1)      # fewer phantoms, another number of processes
    assert not list(tmp_path.rglob("*.part")) and len(list(tmp_path.rglob("*.nii.gz"))) == 12
    for path in tmp_path.rglob("*.nii.gz"):
        assert path.read_bytes() == (written.parent / path.relative_to(tmp_path)).read_bytes()
        assert path.read_bytes()[3] == 0 and path.read_bytes()[4:8] == bytes(4)         # gzip without name and time
    assert rows_of(second) == rows_of(written)[:6]
    assert len({path.read_bytes() for path in written.parent.glob("volumes/*")}) == 24


def test_a_complete_folder_is_reused_and_an_incomplete_one_completed(tmp_path):
    manifest = data.write_demo(tmp_path, n=3, seed=1, workers=1)
    volume, mask = tmp_path / "volumes/demo_0001.nii.gz", tmp_path / "masks/demo_0002.nii.gz"
    before, text = volume.stat().st_mtime_ns, manifest.read_text()
    assert data.write_demo(tmp_path, n=3, seed=1, workers=1) == manifest
    assert volume.stat().st_mtime_ns == before
    mask.unlink()
    data.write_demo(tmp_path, n=3, seed=1, workers=1)
    assert mask.exists() and manifest.read_text() == text
    data.write_demo(tmp_path, n=2, seed=2, workers=1)
    assert [row["patient"] for row in rows_of(manifest)] == ["demo-2-0000", "demo-2-0001"]


def test_files_are_what_the_phantom_is_in_any_orientation(written):
    seen = set()
    for i, row in enumerate(rows_of(written)):
        p = drawn(i)
        for key, array in (("volume", p["volume"]), ("mask", p["mask"])):
            image = nibabel.load(written.parent / row[key])
            assert "".join(nibabel.aff2axcodes(image.affine)) == p["stored"]
            straight = nibabel.as_closest_canonical(image)
            assert np.array_equal(np.asarray(straight.dataobj).transpose(2, 1, 0), array)
            assert np.allclose(straight.affine, p["affine"], atol=1e-3)
            assert image.get_data_dtype() == array.dtype
            assert np.allclose(straight.header.get_zooms()[::-1], p["spacing"], rtol=1e-5)
        seen.add(p["stored"])
    assert "RAS" in seen and len(seen) >= 3


def test_manifest(written):
    rows = rows_of(written)
    assert list(rows[0]) == ["volume", "report", "split", "patient", *data.LABELS, "mask"]
    assert [row["split"] for row in rows] == ["train" if i % 10 < 7 else "test" for i in range(24)]
    assert len({row["patient"] for row in rows}) == 24
    for i, row in enumerate(rows):
        assert row["report"] == drawn(i)["report"]
        assert [float(row[label]) for label in data.LABELS] == drawn(i)["labels"].tolist()


def test_it_is_a_chest():
    for index in range(3):
        p = data.phantom(2, index, findings=[], with_healthy=True)
        volume, (x, y, z) = p["volume"], millimetres(p)
        lung, middle = lungs_of(p)
        litres = [lung[side].sum() * np.prod(p["spacing"]) / 1e6 for side in (x > middle, x < middle)]
        assert all(1.5 < one < 4 for one in litres)
        bone = volume > 300
        assert y[bone & (np.abs(x - middle) < 25)].mean() < y[lung].mean() - 40         # the spine is behind
        soft = (volume > 20) & (volume < 250) & (np.abs(x - middle) < 75)
        low = soft & (np.abs(z - np.quantile(z[lung], .35)) < 10) & (np.abs(y - y[lung].mean() - 20) < 25)
        assert x[low].mean() < middle - 8                   # the heart lies to the left
        for axis, part in enumerate((.88, .66, .88)):       # the centre crop keeps the lungs
            at = np.flatnonzero(lung.any(tuple({0, 1, 2} - {axis}))) / lung.shape[axis]
            assert at.min() > (1 - part) / 2 and at.max() < (1 + part) / 2
