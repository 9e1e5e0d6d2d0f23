"""Everything synthetic: chest CT phantoms with reports, sets of the tasks, a text encoder.

Arrays are (z, y, x) in RAS, points (x, y, z) in mm from the middle of the thorax: to the right,
forward and up. All randomness comes from a seed and the number of the patient.
"""
import csv
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from tqdm.contrib.concurrent import process_map

VERSION = 4  # of what is drawn; a folder of another version is drawn again
LOBES = [("right", "upper"), ("right", "middle"), ("right", "lower"),
         ("left", "upper"), ("left", "lower")]
STORED = "RAS", "LPS", "LAS", "RPS", "PIR"  # orientations of files
AIR = -200  # HU, upper bound of lung with air
AORTA = (0, 20, -10), (8, 22, 36), (-12, -10, 56), (-23, -38, 30), (-20, -42, -60), (-12, -40, -165)


# ---------------------------------------- one chest

def polyline(*points, n=60):
    """n points (n, 3) on the lines between points, equally many on each."""
    position = np.linspace(0, len(points) - 1, n)
    return np.array([np.interp(position, range(len(points)), axis) for axis in zip(*points)]).T


class Chest:
    """A healthy patient. The methods of findings draw at a place (side, lobe); some return mm.

    `volume` (D, H, W): HU without noise; `flat`: a view of it; `lung` (K,): its lung voxels. Of
    these `at` (K, 3) is the position, `lobe` (K,) the number in LOBES, `depth` (K,) the distance to
    the lung's surface, `clear` (K,) that to the next wall or fissure."""

    def __init__(self, seed, index):
        self.rng = np.random.default_rng([seed, index])
        self.spacing = self.rng.uniform(4.2, 4.6, 2)[[0, 1, 1]]  # (z, y, x) mm
        self.shape = tuple(np.rint(328 / self.spacing).astype(int))
        self.middle = (np.array(self.shape) - 1) / 2 + self.rng.uniform(-1, 1, 3)
        self.affine = np.diag([*self.spacing[::-1], 1])
        self.affine[:3, 3] = self.rng.uniform(-200, -100, 3).round(1)
        axes = [np.float32((np.arange(n) - middle) * step)
                for n, middle, step in zip(self.shape, self.middle, self.spacing)]
        depth = self.draw_body(*np.ix_(*axes))
        self.aorta = polyline(*AORTA, n=100)
        self.tube(self.aorta, 12.5, 160)
        self.tube(polyline((1, -2, 165), (1, -14, 36)), 8.5, -985)  # trachea
        self.draw_heart(self.rng.uniform(38, 43))
        self.draw_lung(depth.ravel(), *axes)

    def coverage(self, depth):
        """Share of a voxel that lies inside a surface, from its depth (mm) below it."""
        return np.clip(depth / float(self.spacing.mean()) + 0.5, 0, 1)

    def paint(self, share, value, where=None, high=AIR):
        """Blend `value` into voxels (the lung) whose HU are at most `high`."""
        where = self.lung if where is None else where
        before = self.flat[where]
        self.flat[where] = before + share * (before <= high) * (value - before)

    def tube(self, points, radius, value, high=4000):
        """Paint balls of a radius (mm) around points (..., 3): a tube."""
        index = np.reshape(points, (-1, 3))[:, ::-1] / self.spacing + self.middle
        reach = int(np.ceil(radius / self.spacing.min()))
        stencil = np.indices((2 * reach + 1,) * 3).reshape(3, -1).T - reach
        voxels = np.rint(index).astype(int)[:, None] + stencil  # (P, Q, 3): z, y, x
        offset = np.float32((voxels - index[:, None]) * self.spacing)
        share = self.coverage(radius - np.sqrt(np.einsum("pqi,pqi->pq", offset, offset)))
        where = np.ravel_multi_index(voxels[share > 0].T, self.shape, mode="clip")
        largest = np.zeros(self.flat.shape, np.float32)
        np.maximum.at(largest, where, share[share > 0])  # neighbouring points share voxels
        self.paint(largest[where], value, where, high)

    def inside(self, place):
        """Whether the lung voxels (K,) lie in a place (side, lobe); the lobe may be None."""
        numbers = [number for number, (side, lobe) in enumerate(LOBES)
                   if place[0] in (side, "bilateral") and place[1] in (lobe, None)]
        return np.isin(self.lobe, numbers)

    def spot(self, place):
        """A random lung voxel of a lobe, far from its walls."""
        clear = self.clear * self.inside(place)
        return self.rng.choice(np.flatnonzero(clear > 0.75 * clear.max()))

    def patch(self, place, radius):
        """Share (K,) of the lung voxels in a ball around a random spot of a lobe."""
        distance = np.linalg.norm(self.at - self.at[self.spot(place)], axis=1)
        return self.inside(place) * self.coverage(radius - distance)

    def draw_body(self, z, y, x):
        """Draw all but vessels; returns the depth (D, H, W) in mm below the lungs' surface."""
        spine = np.hypot(x / 19, (y + 62) / 20) < 1
        mediastinum = (np.abs(x) < 34) & (np.abs(y - 15) < 62)
        tissue = np.select([spine, mediastinum], [330, -100], 45)
        skin = (1 - np.hypot(x / 158, y / self.rng.uniform(109, 117))) * 100  # depth in mm below it
        tissue = -1000 + self.coverage(skin) * (tissue + 1000)  # (1, H, W)
        self.volume = np.repeat(np.float32(tissue), self.shape[0], 0)
        self.flat = self.volume.reshape(-1)
        oval = ((np.abs(x) - 60) / 64) ** 2 + (y / 86) ** 2  # 1 at the surface of the lungs
        diaphragm = np.float32(self.rng.uniform(-100, -90) + 38 * (1 - oval))
        np.copyto(self.volume, 100, where=(z < diaphragm) & (oval < 1.06))  # liver
        radius = np.sqrt(oval + (np.maximum(z - 15, 0) / 95) ** 2)
        depth = np.minimum((1 - radius) * 64, np.minimum(np.abs(x) - 26, z - diaphragm))
        self.volume += self.coverage(depth) * (-825 - self.volume)
        rib = (np.abs((z + 0.5 * y) % 23 - 11.5) < 5.5) & (np.abs(z + 25) < 95) & (np.abs(x) > 12)
        np.copyto(self.volume, 420, where=rib & (radius > 1.02) & (radius < 1.13))
        return depth

    def draw_heart(self, radius):
        self.radius = radius
        self.heart = np.array([-20, 18, -36]) - (radius - 40) * np.array([0.6, 0.2, 0.1])
        self.tube(self.heart, radius, 140, high=130)

    def draw_lung(self, depth, z, y, x):
        """List the lung voxels; draw fissures, vessels and bronchi."""
        self.lung = np.flatnonzero((depth > -2) & (self.flat < AIR))
        k, j, i = np.unravel_index(self.lung, self.shape)
        self.at = np.stack([x[i], y[j], z[k]], 1)
        x, y, z = self.at.T
        oblique = z + 0.85 * y + self.rng.uniform(0, 12)
        horizontal = z - self.rng.uniform(8, 16)
        right = np.where(oblique < 0, 2, horizontal < 0)
        self.lobe = np.where(x > 0, right, np.where(oblique < 0, 4, 3))
        to_horizontal = np.where((x > 0) & (oblique > 0), np.abs(horizontal), 99)
        fissure = np.minimum(0.75 * np.abs(oblique), to_horizontal)  # mm
        self.flat[self.lung] += 130 * np.clip(1.5 - fissure / 2, 0, 1)
        self.depth = depth[self.lung]
        to_heart = np.linalg.norm(self.at - self.heart, axis=1) - self.radius
        self.clear = np.min([self.depth, to_heart, fissure], 0)
        branches = []
        for number, (side, _) in enumerate(LOBES):
            hilum = np.array([36 if side == "right" else -36, -12, 12])
            ends = self.rng.choice(self.at[(self.lobe == number) & (self.clear > 7)], (22, 1))
            branches.append(hilum + np.linspace(0, 1, 30)[:, None] * (ends - hilum))
        vessels, self.bronchi = np.split(np.array(branches), [18], axis=1)  # (5, 18 or 4, 30, 3)
        self.tube(vessels, 1.9, 40, high=AIR)
        self.tube(self.bronchi, 4, -350, high=-100)

    def medical_material(self, place):
        self.tube((74 if place[0] == "right" else -74, 76, 78), 14, 3000)

    def arterial_wall_calcification(self, place):
        plaques = self.rng.integers(10, 60, (5, 1)) + np.arange(9)
        self.tube(self.aorta[plaques] + (12, 0, 0), 4, 1100)  # on the right wall

    def cardiomegaly(self, place):
        self.draw_heart(self.rng.uniform(54, 60))

    def pericardial_effusion(self, place):
        size = self.rng.uniform(12, 18)
        self.tube(self.heart, self.radius + size, 8, high=0)
        return size

    def coronary_artery_wall_calcification(self, place):
        path = polyline((-.5, .8, .3), (-.1, .5, .9), (.5, .5, .7), (.8, .6, 0))
        self.tube(self.heart + self.radius * path[self.rng.integers(25):], 3.5, 1300)

    def hiatal_hernia(self, place):
        radius = self.rng.uniform(24, 31)
        self.tube((-5, -28, -64), radius, 60, high=100)
        return 2 * radius

    def lymphadenopathy(self, place):
        radius = self.rng.uniform(13, 16.5)
        self.tube([(28, 4, 56), (4, -24, 8), (-32, 8, 42), (6, 50, 58)], radius, 75, high=70)
        return 2 * radius

    def emphysema(self, place):
        self.paint(self.inside(place) & (np.sin(self.at / 5).sum(1) > -0.6), -998)

    def atelectasis(self, place):
        plates = self.coverage(np.abs(self.at[:, 2] % 17 - 8.5) - 5)  # horizontal
        self.paint(self.patch(place, 45) * plates, 40)

    def lung_nodule(self, place):
        spot = self.spot(place)
        radius = min(self.rng.uniform(12, 20), max(8, self.clear[spot]))
        self.tube(self.at[spot], radius, 80, high=70)
        return 2 * radius

    def lung_opacity(self, place):
        self.paint(self.patch(place, self.rng.uniform(55, 65)), self.flat[self.lung] + 350)

    def pulmonary_fibrotic_sequela(self, place):
        pleura = self.coverage(12 - self.depth) * (self.at[:, 2] > 50)  # of the apex
        self.paint(self.inside(place) * pleura, 20)

    def pleural_effusion(self, place):
        size = self.rng.uniform(26, 50)
        self.paint(self.inside(place) * self.coverage(size - 86 - self.at[:, 1]), 8)  # at the back
        return size

    def mosaic_attenuation_pattern(self, place):
        change = np.where(np.sin(self.at / 10).sum(1) > 0, 210, -130)
        self.paint(self.inside(place), self.flat[self.lung] + change)

    def peribronchial_thickening(self, place):
        bronchi = self.bronchi[[place[0] in (side, "bilateral") for side, _ in LOBES]]
        self.tube(bronchi, 8.5, 30, high=60)
        self.tube(bronchi, 3, -985, high=60)

    def consolidation(self, place):
        self.paint(self.patch(place, self.rng.uniform(48, 58)), 45)

    def bronchiectasis(self, place):
        bronchi = self.bronchi[LOBES.index(place)]
        self.tube(bronchi, 9, 60, high=70)
        self.tube(bronchi, 6, -1000, high=70)

    def interlobular_septal_thickening(self, place):
        septa = np.min(np.abs(self.at % 19 - 9.5), 1)  # sheets in the three planes
        self.paint((self.inside(place) & (self.depth < 32)) * self.coverage(1.6 - septa), -150)


# ---------------------------------------- findings and reports

CENTRAL, SIDE = [(None, None)], [("right", None), ("left", None)]  # places: (side, lobe)
LUNGS, UPPER, LOWER = ([(side, lobe) for side in ("right", "left", "bilateral")]
                       for lobe in (None, "upper", "lower"))
# In the order of CT-RATE's labels: (layer: small findings are drawn last, places, names in a
# report, size in mm from which it is called large).
FINDINGS = {
    "Medical material": (4, SIDE, "pacemaker | cardiac device", None),
    "Arterial wall calcification": (4, CENTRAL, "aortic calcification | aortic plaque", None),
    "Cardiomegaly": (0, CENTRAL, "cardiomegaly | increased heart size", None),
    "Pericardial effusion": (0, CENTRAL, "pericardial effusion | pericardial fluid", 15),
    "Coronary artery wall calcification": (4, CENTRAL, "coronary calcification | coronary plaque", None),
    "Hiatal hernia": (3, CENTRAL, "hiatal hernia | hernia of the stomach", 55),
    "Lymphadenopathy": (4, CENTRAL, "lymphadenopathy | lymph node enlargement", 29.5),
    "Emphysema": (1, UPPER, "emphysema | emphysematous change", None),
    "Atelectasis": (2, LOBES, "atelectasis | atelectatic band", None),
    "Lung nodule": (4, LOBES, "nodule | solid nodule", 30),
    "Lung opacity": (1, LOBES, "ground glass opacity | ground glass", None),
    "Pulmonary fibrotic sequela": (2, UPPER, "fibrotic sequela | fibrotic change", None),
    "Pleural effusion": (1, LUNGS, "pleural effusion | pleural fluid", 38),
    "Mosaic attenuation pattern": (0, LUNGS, "mosaic attenuation | mosaic pattern", None),
    "Peribronchial thickening": (3, LUNGS, "peribronchial thickening | peribronchial cuff", None),
    "Consolidation": (2, LOBES, "consolidation | area of consolidation", None),
    "Bronchiectasis": (3, LOBES, "bronchiectasis | bronchiectatic change", None),
    "Interlobular septal thickening": (2, LOWER, "interlobular thickening | interlobular septa", None),
}
# Presence and absence differ in one word. If others told them apart, no picture were needed.
WORDINGS = (("there is {state} {name}{where}", ("some", "no")),
            ("{name}{where} is {state}", ("present", "absent")),
            ("{name} is {state}{where}", ("visible", "excluded")))
NORMAL = "the trachea is open | the airways are open", "the bones are normal | the ribs are intact"


def describe(label, place, size, is_present, rng):
    """A sentence on a finding at a place (side, lobe); size: large or small, None: it has none"""
    side, lobe = place
    _, _, names, large = FINDINGS[label]
    name = rng.choice(names.split(" | "))
    if large:
        name = f"{'large' if size >= large else 'small'} {name}"
    where = {"bilateral": f" in both {lobe} lobes"}.get(side, f" in the {side} {lobe} lobe")
    if lobe is None:
        where = {"bilateral": " on both sides", None: ""}.get(side, f" on the {side}")
    wording, (present, absent) = WORDINGS[rng.integers(len(WORDINGS))]
    return wording.format(state=present if is_present else absent, name=name, where=where)


def prompts(label):
    """What states a finding, at no place, and what denies it"""
    wording, states = WORDINGS[0]
    name = FINDINGS[label][2].split(" | ")[0]
    return [f"{wording.format(state=state, name=name, where='')}.".capitalize() for state in states]


def write_report(lesions, rng):
    """States every lesion and denies a fifth of the absent findings, each at a place."""
    sentences = [rng.choice(wordings.split(" | ")) for wordings in NORMAL]
    for lesion in lesions:
        place = lesion["side"], lesion["lobe"]
        sentences.append(describe(lesion["label"], place, lesion["size_mm"], True, rng))
    for label in sorted(set(FINDINGS) - {lesion["label"] for lesion in lesions}):
        if rng.random() < 0.2:
            _, places, _, large = FINDINGS[label]
            size = rng.choice([0, large]) if large else None
            sentences.append(describe(label, places[rng.integers(len(places))], size, False, rng))
    return " ".join(sentence.capitalize() + "." for sentence in rng.permutation(sentences))


def phantom(seed, index, findings=None):
    """One synthetic patient; the same arguments give the same voxels and words.

    findings: names to draw; None: each by a chance of 1/4. Returns volume (int16 HU), spacing (mm),
    affine, mask (uint8, k + 1 where finding k, drawn last, changed the voxels), labels (18,),
    report, lesions (centre in voxels) and stored, the orientation of its files."""
    chest = Chest(seed, index)
    chooser, noise, writer = (np.random.default_rng([seed, index, stream]) for stream in (1, 2, 3))
    names = list(FINDINGS)
    chosen = [name for name in names if chooser.random() < 0.25]
    chosen = chosen if findings is None else findings
    lobes = [LOBES[number] for number in chooser.permutation(5)]  # no two findings share one
    mask, lesions = np.zeros(chest.flat.shape, np.uint8), []
    for name in sorted(chosen, key=lambda name: FINDINGS[name][0]):
        number, (_, places, *_) = names.index(name), FINDINGS[name]
        chest.rng = np.random.default_rng([seed, index, 4 + number])
        place = lobes.pop() if places is LOBES else places[chest.rng.integers(len(places))]
        before = chest.flat.copy()
        size = getattr(chest, name.lower().replace(" ", "_"))(place)  # its method draws it
        changed = np.flatnonzero(np.abs(chest.flat - before) > 60)
        mask[changed] = number + 1
        lesions.append({"label": name, "side": place[0], "lobe": place[1], "size_mm": size,
                        "centre": np.mean(np.unravel_index(changed, chest.shape), 1)})
    level = np.float32(noise.uniform(12, 26))
    volume = chest.volume + level * noise.standard_normal(chest.shape, np.float32)
    return {"volume": volume.clip(-1024, 3071).astype(np.int16), "mask": mask.reshape(chest.shape),
            "spacing": chest.spacing, "affine": chest.affine, "stored": STORED[index % 5],
            "labels": np.float32(np.isin(names, chosen)), "lesions": lesions,
            "report": write_report(lesions, writer)}


# ---------------------------------------- files and the demo

def save_image(path, array, affine, stored="LPS"):
    """Write an array (z, y, x); `affine` is diagonal and takes its index (x, y, z) to RAS mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array)
    image.SetSpacing(np.diag(affine)[:3].tolist())
    image.SetOrigin((affine[:3, 3] * (-1, -1, 1)).tolist())  # ITK's world is LPS
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    image = sitk.DICOMOrient(image, stored)
    sitk.WriteImage(image, str(path), path.suffix != ".mhd", compressionLevel=1)


def save_patient(out, patient, volume, mask=None):
    """Write the volume of a phantom, and its mask, to files of OUT, oriented as it is stored."""
    for key, file in (("volume", volume), ("mask", mask)):
        if file:
            save_image(Path(out, file), patient[key], patient["affine"], patient["stored"])


def save_table(path, rows):
    """Write a file: .csv from dicts, .json from pairs (key, row), others from lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    with part.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows(rows)
        elif path.suffix == ".json":
            keys = dict.fromkeys(key for key, _ in rows)
            json.dump({key: [row for k, row in rows if k == key] for key in keys}, file, indent=1)
        else:
            file.writelines(f"{row}\n" for row in rows)
    part.replace(path)


def write_set(write, out, n, seed, workers):
    """Write n patients by write(out, seed, index) -> {index file: rows}; then the index files."""
    tables = {}
    for patient in process_map(partial(write, out, seed), range(n), chunksize=1, desc="phantoms",
                               max_workers=workers or os.cpu_count()):
        for file, rows in patient.items():
            tables.setdefault(file, []).extend(rows)
    for file, rows in tables.items():
        save_table(Path(out, file), rows)


def write_phantom(out, seed, index):
    """Random findings, for pre-training."""
    patient, split = phantom(seed, index), "train" if index % 10 < 7 else "test"
    files = {key: f"{key}s/demo_{index:04d}.nii.gz" for key in ("volume", "mask")}
    save_patient(out, patient, **files)
    labels = dict(zip(FINDINGS, patient["labels"].astype(int)))
    row = {"volume": files["volume"], "report": patient["report"], "split": split,
           "patient": f"demo{VERSION}-{seed}-{index:04d}", **labels, "mask": files["mask"]}
    return {"manifest.csv": [row]}


def write_demo(out, n=64, seed=0, workers=None):
    """Write n phantoms, then OUT/manifest.csv -> its path. The same n, seed and VERSION stay."""
    manifest = Path(out, "manifest.csv")
    if manifest.exists():
        with manifest.open(encoding="utf-8", newline="") as file:
            patients = [row.get("patient", "") for row in csv.DictReader(file)]
        if not all(patient.startswith("demo") for patient in patients):
            raise ValueError(f"{manifest}: found a manifest of others, expected none")
        if patients == [f"demo{VERSION}-{seed}-{index:04d}" for index in range(n)]:
            return manifest
        manifest.unlink()
    write_set(write_phantom, out, n, seed, workers)
    return manifest


# ---------------------------------------- demo sets of the tasks
LARGE = "Cardiomegaly", "Lung opacity", "Pleural effusion", "Consolidation"


def write_cc_ccii(out, seed, index):
    """Normal: nothing; CP: a consolidation; NCP: ground glass."""
    target = index % 3
    name, findings = (("Normal", []), ("CP", ["Consolidation"]), ("NCP", ["Lung opacity"]))[target]
    volume = phantom(seed, index, findings)["volume"].clip(-1000, 400)
    pictures = np.uint8(255 * ((volume + 1000) / 1400))[::2, ::-1, ::-1]  # every other slice, LPS
    folder = Path(out, name, str(1000 + index), str(index))
    folder.mkdir(parents=True, exist_ok=True)
    files = [f"{folder}/{number:04d}.png" for number in range(len(pictures))]
    sitk.WriteImage(sitk.GetImageFromArray(pictures), files)
    part = "valid" if index // 3 % 3 == 2 else "train"
    return {f"CC_CCII_fold0_{part}.csv": [
        {"target": target, "label": name, "patient_id": 1000 + index, "scan_id": index}]}


def write_luna16(out, seed, index):
    """A nodule and four other places of the lungs."""
    patient = phantom(seed, index, ["Lung nodule"])
    uid = f"1.3.6.1.4.1.14519.5.2.1.6279.6001.{10 ** 29 + 1000 * seed + index}"
    save_image(Path(out, f"subset{index % 10}", uid + ".mhd"), patient["volume"], patient["affine"])
    lung = np.unravel_index(Chest(seed, index).lung, patient["volume"].shape)
    places = np.vstack([patient["lesions"][0]["centre"], np.transpose(lung)])[:, ::-1]  # (1 + K, 3)
    places = places * np.diag(patient["affine"])[:3] + patient["affine"][:3, 3]
    places *= (-1, -1, 1)  # RAS to LPS
    far = places[np.linalg.norm(places - places[0], axis=1) > 40]
    others = np.random.default_rng([seed, index, 100]).choice(far, 4)
    rows = []
    for x, y, z in np.round([places[0], *others], 4):
        rows.append({"seriesuid": uid, "coordX": x, "coordY": y, "coordZ": z, "class": int(not rows)})
    return {"candidates_V2.csv": rows}


def write_case(out, patient, image, label, fold):
    """Write a segmentation case; returns its rows."""
    save_patient(out, patient | {"mask": np.uint8(patient["mask"] > 0)}, image, label)
    return [("training", {"fold": fold, "image": image, "label": label})]


def write_msd_lung(out, seed, index):
    """A nodule; every 15th patient is a test image without a label."""
    patient, name = phantom(seed, index, ["Lung nodule"]), f"lung_{index + 1:03d}.nii.gz"
    if index % 15 == 14:
        save_image(Path(out, "imagesTs", name), patient["volume"], patient["affine"])
        return {"dataset.json": [("test", f"./imagesTs/{name}")]}
    files = f"./imagesTr/{name}", f"./labelsTr/{name}"
    return {"dataset.json": write_case(out, patient, *files, index % 5)}


def write_covid_19_20(out, seed, index):
    """Ground glass, and in every other patient a consolidation."""
    patient = phantom(seed, index, ["Lung opacity", "Consolidation"][:2 - index % 2])
    files = (f"volume-covid19-A-{index + 1:04d}_{part}.nii.gz" for part in ("ct", "seg"))
    return {"Covid19_20_folds.json": write_case(out, patient, *files, index % 5)}


def write_acdc(out, seed, index):
    """Short-axis MR, diastole and systole: 1 right ventricle, 2 myocardium, 3 left ventricle."""
    rng = np.random.default_rng([seed, index])
    folder = f"training/patient{index + 1:03d}"
    systole = int(rng.integers(8, 15))
    step, radius, gain = rng.uniform((2.7, 21, 0.4), (3.2, 27, 4))
    z, y, x = np.ix_(np.arange(10), *(np.arange(-36, 36) * step + rng.uniform(-12, 12, (2, 1))))
    affine = np.diag([step, step, 10, 1])
    for frame, size in ((1, 1), (systole, rng.uniform(0.6, 0.72))):
        inner = radius * size * np.sqrt(1 - (z / 11) ** 2)  # to the apex
        outer = inner + 10
        right = np.hypot((x - 0.8 * outer) / inner, y / outer) < 1.1
        label = np.select([np.hypot(x, y) < inner, np.hypot(x, y) < outer, right], [3, 2, 1])
        label[[0, -1]] = 0
        image = np.choose(label, (30, 190, 85, 205)) + 8 * rng.standard_normal(label.shape)
        stem = f"{folder}/patient{index + 1:03d}_frame{frame:02d}"
        save_image(Path(out, stem + ".nii.gz"), np.int16(image.clip(0) * gain), affine)
        save_image(Path(out, stem + "_gt.nii.gz"), np.uint8(label), affine)
    return {folder + "/Info.cfg": ["ED: 1", f"ES: {systole}"]}


def write_stoic(out, seed, index):
    """Nothing, ground glass (COVID-19), or a consolidation too (severe)."""
    patient = phantom(seed, index, ["Lung opacity", "Consolidation"][:index % 3])
    save_image(Path(out, f"data/mha/{index + 1}.mha"), patient["volume"], patient["affine"])
    row = {"PatientID": index + 1, "probCOVID": int(index % 3 > 0), "probSevere": int(index % 3 > 1)}
    return {"metadata/reference.csv": [row]}


def write_ctrg(out, seed, index):
    """Up to four large findings; the same patients are val and test."""
    rng = np.random.default_rng([seed, index, 100])
    patient = phantom(seed, index, [name for name in LARGE if rng.random() < 0.4])
    name, path = f"{index + 1}.nii.gz", f"volumes/{index + 1}.nii.gz"
    save_patient(out, patient, path)
    result = ", ".join(lesion["label"] for lesion in patient["lesions"]) or "Normal"
    row = {"id": name, "report": patient["report"], "result": result, "image_path": path}
    parts = ["train"] if index % 10 < 7 else ["val", "test"]
    return {"ctrg_chest.json": [(part, row) for part in parts]}


def write_ct_rate(out, seed, index):
    """Random findings; every sixth scan has a second, thicker reconstruction."""
    patient = phantom(seed, index)
    volume, affine, labels = patient["volume"], patient["affine"], patient["labels"].astype(int)
    split, word = ("train", "train") if index % 5 < 3 else ("valid", "validation")
    scan = f"{split}_{index + 1}_a"
    scans = {f"{scan}_1.nii.gz": (volume, affine)}
    if index % 6 == 0:  # every other slice, plus 1024 as in the first CT-RATE
        scans[f"{scan}_2.nii.gz"] = volume[::2] + np.int16(1024), affine @ np.diag([1, 1, 2, 1])
    for name, image in scans.items():
        save_image(Path(out, split, f"{split}_{index + 1}", scan, name), *image)
    impression = " ".join(f"{lesion['label']}." for lesion in patient["lesions"]) or "Not given."
    columns = {
        f"radiology_text_reports/{word}_reports.csv": {
            "Findings_EN": patient["report"], "Impressions_EN": impression},
        f"metadata/{word}_metadata.csv": {"RescaleSlope": 1, "RescaleIntercept": -1024},
        f"multi_abnormality_labels/{split}_predicted_labels.csv": dict(zip(FINDINGS, labels))}
    tables = {file: [{"VolumeName": name} | row for name in scans] for file, row in columns.items()}
    return tables | {f"metadata/no_chest_{split}.txt": [*scans][1:] if index == 0 else []}


def write_labels(out, seed, index):
    """Four findings, each known of nine patients in ten; the age is no label."""
    rng = np.random.default_rng([seed, index, 100])
    chosen = [name for name in LARGE if rng.random() < 0.4]
    volume = f"volumes/{index + 1}.nii.gz"
    save_patient(out, phantom(seed, index, chosen), volume)
    labels = {name: int(name in chosen) if rng.random() < 0.9 else "" for name in LARGE}
    row = {"volume": volume, "patient": f"P{index + 1}", "age": int(rng.integers(20, 90)), **labels}
    return {"manifest.csv": [row]}


def write_segment(out, seed, index):
    """1 a nodule, 2 a pleural effusion."""
    names = ["Lung nodule", "Pleural effusion"]
    patient = phantom(seed, index, names)
    found = [patient["mask"] == 1 + list(FINDINGS).index(name) for name in names]
    patient["mask"] = np.uint8(np.select(found, [1, 2]))
    row = {name: f"{name}s/{index + 1}.nii.gz" for name in ("volume", "mask")}
    save_patient(out, patient, **row)
    return {"manifest.csv": [{**row, "patient": f"P{index + 1}"}]}


TASK_DEMOS = {  # patients by default, and what writes one of them
    "cc-ccii": (108, write_cc_ccii), "luna16": (80, write_luna16), "msd-lung": (30, write_msd_lung),
    "covid-19-20": (30, write_covid_19_20), "acdc": (24, write_acdc), "stoic": (150, write_stoic),
    "ctrg": (160, write_ctrg), "ct-rate-vocab": (160, write_ct_rate),
    "ct-rate-retrieval": (240, write_ct_rate), "labels": (160, write_labels),
    "segment": (30, write_segment)}


def write_task_demo(task, out, n=None, seed=0, workers=None):
    """Write n patients of a task in its native layout; returns what `--data` takes."""
    if task not in TASK_DEMOS:
        raise ValueError(f"{task}: found no set to draw, expected a row of phantoms.TASK_DEMOS")
    default_n, write = TASK_DEMOS[task]
    seed += 1000 * (1 + list(TASK_DEMOS).index(task))
    write_set(write, out, n or default_n, seed, workers)
    return Path(out)


def make_demo_text_encoder(folder, reports, seed=0):
    """Write a small random BERT that knows the words of the reports."""
    import torch
    from tokenizers import normalizers, pre_tokenizers
    from transformers import BertConfig, BertModel, BertTokenizerFast
    clean = normalizers.BertNormalizer(lowercase=True).normalize_str
    split = pre_tokenizers.BertPreTokenizer().pre_tokenize_str
    words = {word for report in reports for word, _ in split(clean(report))}
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
    save_table(Path(folder, "vocab.txt"), vocabulary)
    BertTokenizerFast(f"{folder}/vocab.txt", model_max_length=512).save_pretrained(folder)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=128, num_hidden_layers=2,
                        num_attention_heads=4, intermediate_size=256)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        bert = BertModel(config)
    bert.embeddings.word_embeddings.weight.data *= 5  # words weigh more than their positions
    bert.save_pretrained(folder)
