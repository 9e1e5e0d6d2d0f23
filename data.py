"""Files to tensors: the only file that knows a file format or a data set.

    python data.py check --data X                    a table of volumes and reports; exits 1 if something is wrong
    python data.py check --task T --data DIR         the same for one of the nine tasks: parts, classes, masks
    python data.py cache --data X --cache DIR        preprocess every volume once
    python data.py demo --out DIR --n 64             write synthetic chest phantoms with reports
    python data.py demo --task luna16 --out DIR      write a synthetic set of a task in that task's own layout

X is a manifest .csv (`volume,report[,split][,patient][,label columns]`, paths relative to it), a CT-RATE folder or a
CTRG-Chest .json. Letters: B patients, D H W voxels (z, y, x), L report tokens, S sentences.
"""
import argparse
import csv
import gzip
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import sys
import uuid
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import nibabel as nib
import numpy as np
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from scipy.interpolate import make_interp_spline
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

log = logging.getLogger("mg3d")

# --------------------------------------------------------------------------------------------------- constants

LABELS = ("Medical material", "Arterial wall calcification", "Cardiomegaly", "Pericardial effusion",
          "Coronary artery wall calcification", "Hiatal hernia", "Lymphadenopathy", "Emphysema", "Atelectasis",
          "Lung nodule", "Lung opacity", "Pulmonary fibrotic sequela", "Pleural effusion",
          "Mosaic attenuation pattern", "Peribronchial thickening", "Consolidation", "Bronchiectasis",
          "Interlobular septal thickening")     # the columns of CT-RATE's label files, in their order
SIZE = (128, 96, 128)                           # voxels (z, y, x) that the network sees
CROP = (0.88, 0.66, 0.88)                       # part of the scan (z, y, x) that the centre crop keeps
WINDOW = (-1000., 1000.)                        # HU that become 0 and 1. NOTE(paper): not given
SPLITS = ("train", "valid", "test")
DEMO_SIZE = 400                                 # phantoms of --data demo


# ----------------------------------------------------------------------------------------------------- volumes

def _pictures(folder):
    """The PNG and JPEG files of a folder in natural order: slice 10 follows slice 9."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg")]
    return sorted(files, key=lambda file: [int(part) if part.isdigit() else part
                                           for part in re.split(r"(\d+)", file.name)])


def _read_nifti(path):
    image = nib.load(path)
    with image.file_map["image"].get_prepare_fileobj("rb") as file:
        pixdim = type(image.header).from_fileobj(file, check=False)["pixdim"][1:4]
    affine = image.affine * [*(pixdim > 0), 1]              # nibabel reads a spacing of 0 as 1: put the 0 back
    xyz, slope, inter = image.dataobj.get_unscaled(), image.dataobj.slope, image.dataobj.inter
    if (slope, inter) != (1, 0):
        xyz = xyz.astype(np.float32) * np.float32(slope) + np.float32(inter)    # nibabel itself would use float64
    return xyz, affine


def _read_itk(path):
    pictures = _pictures(path) if path.is_dir() else []
    if pictures:
        image = sitk.ReadImage([str(file) for file in pictures], sitk.sitkUInt16)   # colour becomes grey
    elif path.is_dir():
        series = {i: sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path), i)
                  for i in sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(path))}
        if not series:
            raise ValueError("neither a DICOM series nor PNG or JPEG slices in this folder")
        image = sitk.ReadImage(max(series.values(), key=len))
    else:
        image = sitk.ReadImage(str(path))
    if image.GetDimension() == 4 and image.GetSize()[3] == 1:
        image = image[:, :, :, 0]
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise ValueError(f"it is {image.GetDimension()}D of size {image.GetSize()} with "
                         f"{image.GetNumberOfComponentsPerPixel()} values a voxel, expected 3D with one")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    affine = np.diag([-1, -1, 1, 1]) @ affine               # ITK's world is LPS, ours is RAS
    xyz = sitk.GetArrayFromImage(image).T
    return (_grey_over_window(xyz) if pictures else xyz), affine


def _grey_over_window(xyz):
    if xyz.max() > 255:
        raise ValueError(f"grey values up to {xyz.max()}, expected 8-bit pictures, 0 to 255")
    # Pictures hold no HU: grey 0..255 is laid over the window, so that scaling gives grey / 255 back.
    # They hold no geometry either: 1 mm, rows front to back, columns right to left, slices feet to head.
    return xyz.astype(np.float32) / 255 * (WINDOW[1] - WINDOW[0]) + WINDOW[0]


def _read_npy(path):
    array = np.load(path, allow_pickle=False)
    if array.ndim != 3 or array.dtype != np.uint8:
        raise ValueError(f"it holds {array.dtype} of shape {array.shape}, expected uint8 grey (slices, rows, columns)")
    return _grey_over_window(array.T), np.diag([-1, -1, 1, 1])


def _read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        array = file["arr_0"] * np.float32(1000)            # CT-RATE's preprocessing stores HU / 1000
    # NOTE(compat): these files come as (z, y, x) and, from other versions of the same script, as (z, x, y), square in
    # plane and without a header. A body is alike left and right and not front and back: that tells which is which.
    few = array[::8]
    one_sided = [np.abs(few - np.flip(few, axis)).mean() for axis in (1, 2)]
    if one_sided[0] < 0.8 * one_sided[1]:
        array = array.transpose(0, 2, 1)                                            # (z, x, y) -> (z, y, x)
    return array.T, np.diag([-0.75, -0.75, 1.5, 1])         # x to the left and y to the back, as CT-RATE stores them


def read_stored(path):
    """Read any volume as it is stored: array (x, y, z) in file units and its affine 4×4, voxel index -> RAS world mm.

    NIfTI; .mha, .mhd, .nrrd; a folder of DICOM or of PNG/JPEG slices; CT-RATE .npz; grey slices in a .npy.
    Raises ValueError naming the file.
    """
    path = Path(path)
    name = path.name.lower()
    if not path.exists():
        raise ValueError(f"{path}: found nothing there, expected a volume")
    if path.is_dir() or name.endswith((".mha", ".mhd", ".nrrd", ".nhdr")):
        read = _read_itk
    elif name.endswith((".nii", ".nii.gz")):
        read = _read_nifti
    elif name.endswith((".npz", ".npy")):
        read = _read_npz if name.endswith(".npz") else _read_npy
    else:
        raise ValueError(f"{path}: found a file of unknown kind, expected .nii, .nii.gz, .mha, .mhd (with its .raw), "
                         ".nrrd, .npz, .npy, or a folder of DICOM, PNG or JPEG slices")
    try:
        return read(path)
    except Exception as error:                              # the libraries raise a dozen kinds for a broken file
        reason = re.sub(r".*ITK ERROR: \w+\(\w+\): ", "", " ".join(str(error).split())) or type(error).__name__
        raise ValueError(f"{path}: cannot be read: {reason}; expected a whole volume"
                         f"{' with its .raw beside it' if name.endswith('.mhd') else ''}") from error


def to_ras(path, xyz, affine, is_mask=False):
    """Turn a stored array (x, y, z) so that x runs to the right, y to the front, z to the head.

    Returns array (z, y, x) float32, spacing (z, y, x) mm, affine 4×4 of the turned (x, y, z) index -> world mm.
    Raises ValueError, naming `path`, for what is no scan: not 3D, no geometry, NaN, constant (which a mask may be).
    """
    if xyz.ndim > 3:
        xyz = xyz.reshape(xyz.shape[:3] + tuple(n for n in xyz.shape[3:] if n != 1))
    if xyz.ndim != 3 or min(xyz.shape) < 2 or xyz.dtype.kind not in "biuf":
        raise ValueError(f"{path}: found an image of shape {xyz.shape} and type {xyz.dtype}, expected 3D and one real "
                         "number a voxel")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or spacing.min() <= 0 or abs(np.linalg.det(affine[:3, :3] / spacing)) < 1e-3:
        raise ValueError(f"{path}: found spacing {spacing.tolist()} and affine {affine[:3].tolist()}, expected finite "
                         "numbers, spacing above 0 and three independent axes")
    orientation = nib.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(orientation, xyz.shape)
    array = np.ascontiguousarray(nib.apply_orientation(xyz, orientation).T, dtype=np.float32)    # (z, y, x)
    low, high = array.min(), array.max()
    if not np.isfinite([low, high]).all() or low == high and not is_mask:
        raise ValueError(f"{path}: found values from {low} to {high}, expected finite ones that differ")
    return array, tuple(np.linalg.norm(affine[:3, 2::-1], axis=0).tolist()), affine


def read_volume(path):
    """Any supported volume -> array (z, y, x) float32 in file units, spacing (z, y, x) mm, affine 4×4; RAS-oriented.

    `affine` maps the (x, y, z) index of the returned array to world mm, as nibabel's do. Raises ValueError.
    """
    return to_ras(path, *read_stored(path))


def _likeness(values):
    """How much a sample of a chest scan looks like Hounsfield units; 0 or less is impossible."""
    def part(low, high):
        return ((values > low) & (values < high)).mean()
    air_and_lung, soft_tissue = part(-1150, -400), part(-200, 300)
    return air_and_lung + soft_tissue - 2 * part(-np.inf, -1200) - 2 * part(700, np.inf)


def to_hounsfield(array, path, hu="auto", rescale=None):
    """Values of a file -> (array in HU, a note in words on what was done).

    `hu`: "header" takes the values as read, "csv" applies `rescale`, "auto" decides from the values.
    rescale: (slope, intercept) of the metadata CSV or None. CT-RATE v1 files need it, v2 files have it applied.
    Raises ValueError naming `path` if no reading gives Hounsfield units of a chest.
    """
    if hu == "csv" and rescale is None:
        raise ValueError(f"{path}: found no RescaleSlope and RescaleIntercept for it, expected them for --hu csv")
    if str(path).endswith(".npy") or Path(path).is_dir() and _pictures(Path(path)):
        return array, "pictures: grey laid over the window"
    low, high = float(array.min()), float(array.max())
    if high - low <= 255:
        raise ValueError(f"{path}: found values from {low:g} to {high:g}, expected a CT in Hounsfield units; is it a "
                         "mask, a label map or a picture?")
    readings = {"as stored": (1, 0), "rescale of the metadata applied": rescale, "offset -1024 applied": (1, -1024)}
    if hu == "header":
        readings = {"as stored": (1, 0)}
    elif hu == "csv":
        readings = {"rescale of the metadata applied": rescale}
    elif rescale is None:
        del readings["rescale of the metadata applied"]
    else:
        del readings["offset -1024 applied"]
    sample = array.reshape(-1)[::array.size // 200_000 | 1]         # an odd stride does not follow one column
    sample = sample[sample > low]                                   # the lowest value may be padding: -1024 … -3024
    likeness = {note: _likeness(sample * slope + inter) for note, (slope, inter) in readings.items()}
    note = max(likeness, key=likeness.get)                          # the first, "as stored", wins a tie
    if likeness[note] <= 0:
        raise ValueError(f"{path}: found values from {low:g} to {high:g} that are no Hounsfield units when taken as "
                         f"{' or '.join(readings)}; expected air near -1000 and soft tissue near 0")
    slope, inter = readings[note]
    return (array, note) if (slope, inter) == (1, 0) else (array * np.float32(slope) + np.float32(inter), note)


def preprocess(array, spacing, size=SIZE, crop=CROP, window=WINDOW):
    """HU array (z, y, x) -> float32 tensor (1, D, H, W) in [0, 1]: centre crop, clip to `window`, scale, resize.

    Sec. IV.B of the paper. Raises ValueError if a spacing (z, y, x) is not above 0.
    """
    if not all(side > 0 for side in spacing):
        raise ValueError(f"found spacing {spacing}, expected numbers above 0")
    # NOTE(paper): the crop is a part of the field of view whatever its millimetres, the resize ignores the spacing,
    # its kind is not stated: trilinear on voxel centres, without smoothing. Cropping first only saves work.
    keep = [max(1, round(n * part)) for n, part in zip(array.shape, crop)]
    array = array[tuple(slice((n - k) // 2, (n - k) // 2 + k) for n, k in zip(array.shape, keep))]
    volume = (np.clip(array, *window) - window[0]) / (window[1] - window[0])
    volume = torch.from_numpy(volume.astype(np.float32))[None, None]                # (1, 1, z, y, x)
    return F.interpolate(volume, size=tuple(size), mode="trilinear", align_corners=False)[0]     # (1, D, H, W)


# ----------------------------------------------------------------------------------------------------- reports

_NEVER_LAST = {"e.g", "eg", "i.e", "ie", "cf", "dr", "prof", "assist", "vs", "approx", "fig"}
_SELDOM_LAST = {"al", "ca", "cm", "etc", "im", "ima", "img", "lab", "max", "min", "mm", "no", "nr", "resp", "se"}
_SENTENCE_END = re.compile(
    r"""(?<![.;?!])[.;?!]+["'”’]*(?=\s|$)   # punctuation before a blank, with the quotes that it closes
      | [;?!](?=\w) | \.(?=[A-Z][a-z])      # a forgotten blank
      | [。；？！]["”]* | [\r\n]""", re.VERBOSE)
_COMMA = re.compile(r"""((?<!\d)[,，]|[,，](?!\s*\d))["”]*""")
_LONGEST_PARENTHESIS = 300      # the longest in 2,804 reports has 280 letters; a longer one was never closed


def _is_abbreviation(text, match):
    """Is the full stop that `match` found part of an abbreviation or an ordinal ("approx. 5 mm", "T12. vertebra")?"""
    word = re.split(r"[\s(,;]", text[max(0, match.start() - 12):match.start()])[-1].lower()
    following = text[match.end():match.end() + 2].strip()[:1]
    if match[0] != "." or not following:
        return False
    single_letter, number = len(word) == 1 and word.isalpha(), word[-1:].isdigit()
    return (word in _NEVER_LAST
            or (word in _SELDOM_LAST or single_letter) and (following.islower() or following.isdigit())
            or number and following.islower())


def _words(text):
    return sum(any(letter.isalnum() for letter in word) for word in text.split())


def split_sentences(text):
    """Split a report into sentences, as concise as possible while complete (Sec. III.B of the paper).

    Cuts at . ; ? ! and line ends, then at commas between two parts of at least 3 words; never within numbers,
    abbreviations or parentheses. Without white space, the sentences in a row are the text. No letter or digit: [].
    """
    # NOTE(paper): "when separating a report using punctuation" is all the paper says; the rules are ours.
    inside = [0] * (len(text) + 1)                          # +1 where a closed parenthesis opens, -1 where it ends
    opened = []
    for i, letter in enumerate(text):
        if letter in "(（":
            opened.append(i)
        elif letter in ")）" and opened and i - (start := opened.pop()) <= _LONGEST_PARENTHESIS:
            inside[start] += 1
            inside[i] -= 1
    inside = list(itertools.accumulate(inside))

    ends = [match.end() for match in _SENTENCE_END.finditer(text)
            if not inside[match.start()] and not _is_abbreviation(text, match)]
    pieces = []
    for start, end in zip([0] + ends, ends + [len(text)]):
        commas = [match.end() for match in _COMMA.finditer(text, start, end) if not inside[match.start()]]
        parts = [text[a:b] for a, b in zip([start] + commas, commas + [end])]
        long = [_words(part) >= 3 for part in parts]
        pieces.append(parts[0])
        for part, both_long in zip(parts[1:], map(all, zip(long, long[1:]))):
            if both_long:
                pieces.append(part)
            else:
                pieces[-1] += part

    sentences, opening = [], ""                             # opening: what stands before its sentence, such as "2."
    for piece in pieces:
        if any(map(str.isalpha, piece)):
            sentences.append(opening + piece)
            opening = ""
        elif sentences and not opening and not any(map(str.isalnum, piece)):
            sentences[-1] += piece
        else:
            opening += piece
    if sentences:
        sentences[-1] += opening
    elif any(map(str.isalnum, opening)):
        sentences = [opening]
    return [" ".join(sentence.split()) for sentence in sentences]


def tokenize_report(tokenizer, sentences, max_sentences=32, max_tokens=250):
    """Tokenise the sentences of one report in a row and know which token belongs to which sentence and word.

    tokenizer: a fast Hugging Face tokenizer, BERT- or RoBERTa-like. Whole sentences are kept as long as they fit into
    max_tokens, special tokens counted; only a first sentence that alone is too long is cut itself. Returns a dict:
    input_ids, sentence_ids, word_ids (L,) int64, the latter two -1 at special tokens; sentences, the S kept ones;
    single_ids, a list of S int64 arrays, each sentence tokenised alone; cut, the number of words that were not kept.
    Raises ValueError if there is no sentence.
    """
    if not sentences:
        raise ValueError("found a report without a sentence, expected at least one")
    kept = list(sentences[:max_sentences])
    text = " ".join(kept)
    encoding = tokenizer(text, return_offsets_mapping=True, verbose=False)
    input_ids = np.array(encoding["input_ids"])                                     # (L,)
    word_ids = np.array([-1 if word is None else word for word in encoding.word_ids()])         # (L,)
    # A RoBERTa token may begin at the blank before its word: its last letter tells the sentence.
    last_letter = np.array(encoding["offset_mapping"])[:, 1] - 1                    # (L,)
    starts = np.cumsum([0] + [len(sentence) + 1 for sentence in kept[:-1]])         # (S,)
    sentence_ids = np.searchsorted(starts, last_letter.clip(0), side="right") - 1
    sentence_ids[word_ids < 0] = -1

    content = np.flatnonzero(sentence_ids >= 0)
    room = max_tokens - (len(input_ids) - len(content))
    if len(content) > room:
        whole = sentence_ids[content[room]]                 # the first sentence that does not fit
        content = content[:room] if whole == 0 else content[sentence_ids[content] < whole]
        kept = kept[:whole] or [text[:last_letter[content[-1]] + 1]]
        keep = np.sort(np.concatenate([np.flatnonzero(sentence_ids < 0), content]))
        input_ids, sentence_ids, word_ids = input_ids[keep], sentence_ids[keep], word_ids[keep]
    single_ids = tokenizer(kept, truncation=True, max_length=max_tokens)["input_ids"]
    return {"input_ids": input_ids, "sentence_ids": sentence_ids, "word_ids": word_ids, "sentences": kept,
            "single_ids": [np.array(ids) for ids in single_ids],
            "cut": len(" ".join(sentences).split()) - len(" ".join(kept).split())}


def mask_words(input_ids, word_ids, tokenizer, generator, prob=0.15):
    """Whole-word masking: -> masked_ids, labels, both (L,); labels are -100 where no word was chosen.

    prob of the words, at least one, are chosen; 80 % of them become the mask token, 10 % random tokens that are not
    special, 10 % stay (BERT). generator: numpy.random.Generator.
    """
    words = np.unique(word_ids[word_ids >= 0])
    chosen = generator.choice(words, size=max(1, round(prob * len(words))), replace=False)
    fate = np.ones(word_ids.max() + 1)                      # per word: < 0.8 mask, < 0.9 random, else as it is
    fate[chosen] = generator.random(len(chosen))
    labels = np.full_like(input_ids, -100)
    is_chosen = np.isin(word_ids, chosen)
    labels[is_chosen] = input_ids[is_chosen]
    masked_ids = input_ids.copy()
    masked_ids[is_chosen & (fate[word_ids] < 0.8)] = tokenizer.mask_token_id
    at_random = is_chosen & (fate[word_ids] >= 0.8) & (fate[word_ids] < 0.9)
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    masked_ids[at_random] = generator.choice(ordinary, size=at_random.sum())
    return masked_ids, labels


def mask_volume(size, mask_size, mask_ratio, generator):
    """-> bool tensor (1, D, H, W), True = masked: round(mask_ratio · n) of the n sub-volumes of mask_size³ voxels.

    generator: numpy.random.Generator. Raises ValueError if a side is not a multiple of mask_size.
    """
    if any(side % mask_size for side in size):
        raise ValueError(f"found size {tuple(size)}, expected multiples of mask_size {mask_size}")
    grid = [side // mask_size for side in size]
    mask = generator.permutation(math.prod(grid)) < round(mask_ratio * math.prod(grid))
    return torch.from_numpy(np.kron(mask.reshape(grid), np.ones((mask_size,) * 3, dtype=bool)))[None]


# -------------------------------------------------------------------------------------------------------- sets

class Item(NamedTuple):
    """One volume with its report."""
    id: str
    volume: Path
    report: str
    split: str | None               # one of SPLITS; None: `load_task` draws it
    patient: str
    labels: np.ndarray | None       # (18,) float32, NaN where one is unknown; of other tasks (K,), see `Task`
    rescale: tuple | None           # (slope, intercept) of the metadata
    mask: Path | None = None        # of the segmentation tasks, in the grid of `volume`
    centre: tuple | None = None     # (x, y, z) of a LUNA16 candidate, RAS world mm


def _utf8(path):
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: found the byte 0x{data[error.start]:02x}, which is not UTF-8; expected "
                         "a text file in UTF-8") from error


def _rows(path, required=()):
    """The rows of a CSV, a list of (line number, {column: text}). ValueError if a column of `required` is missing."""
    reader = csv.DictReader(io.StringIO(_utf8(path), newline=""), restval="")
    missing = [column for column in required if column not in (reader.fieldnames or [])]
    if missing:
        raise ValueError(f"{path}: found the columns {reader.fieldnames}, expected also {missing}")
    rows = [(reader.line_num, row) for row in reader]
    for line, row in rows:
        if None in row:
            raise ValueError(f"{path}, line {line}: found {len(row) + len(row[None]) - 1} fields, expected "
                             f"{len(row) - 1}; a report that holds commas stands in quotes")
    return rows


def _labels(path, line, row):
    """The 18 labels of a row, (18,) with NaN for unknown ones; None if it has none of the columns."""
    if not any(name in row for name in LABELS):
        return None
    try:
        return np.array([float(row.get(name) or "nan") for name in LABELS], dtype=np.float32)
    except ValueError as error:
        raise ValueError(f"{path}, line {line}: found a label that is no number ({error}), expected 0, 1 or "
                         "nothing") from error


def _manifest_items(path):
    items = []
    for line, row in _rows(path, required=("volume", "report")):
        split = row.get("split") or "train"
        if split not in SPLITS or not row["volume"]:
            raise ValueError(f"{path}, line {line}: found volume {row['volume']!r} and split {split!r}, expected a "
                             f"path and one of {SPLITS}")
        items.append(Item(row["volume"], path.parent / row["volume"], row["report"], split,
                          row.get("patient") or row["volume"], _labels(path, line, row), None))
    return items


def _ctrg_items(path):
    try:
        splits = json.loads(_utf8(path))
        rows = [(row, split) for split in ("train", "test", "val") for row in splits.get(split, [])]
        # The released file lists the same volumes as val and as test: they are test.
        tested = {row["image_path"] for row, split in rows if split == "test"}
        if silent := [(row["id"], split) for row, split in rows if "report" not in row]:
            raise KeyError("no report in the entry {} of {}".format(*silent[0]))
        return [Item(str(row["id"]), path.parent / row["image_path"], row["report"] or "",
                     "valid" if split == "val" else split, str(row["id"]), None, None)
                for row, split in rows if split != "val" or row["image_path"] not in tested]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: found {type(error).__name__}: {error}; expected CTRG-Chest's {{train, val, test: "
                         "[{id, report, image_path}]}") from error


def _ct_rate_items(folder):
    def volume_name(name):
        return Path(name).name.removesuffix(".gz").removesuffix(".nii").removesuffix(".npz")

    volumes, reports, labels, rescale, left_out = {}, {}, {}, {}, set()
    for file in sorted(folder.rglob("*")):
        if file.name.endswith((".nii.gz", ".npz")):
            first = volumes.setdefault(volume_name(file), file)
            if first != file:
                raise ValueError(f"{folder}: found {first} and {file}, expected each volume once")
        elif file.name.startswith("no_chest") and file.suffix == ".txt":
            left_out |= {volume_name(line.strip()) for line in _utf8(file).splitlines()}
        elif file.suffix == ".csv":
            for line, row in _rows(file):                   # a file is what its columns say
                name = volume_name(row.get("VolumeName", ""))
                if "Findings_EN" in row:
                    if name in reports:
                        raise ValueError(f"{file}, line {line}: found a second report of {name}, expected one")
                    parts = (row["Findings_EN"], row.get("Impressions_EN", ""))
                    reports[name] = "\n".join(part for part in parts if part.strip() not in ("", "Not given."))
                if (found := _labels(file, line, row)) is not None:
                    labels[name] = found
                if row.get("RescaleSlope") and row.get("RescaleIntercept"):
                    try:
                        rescale[name] = (float(row["RescaleSlope"]), float(row["RescaleIntercept"]))
                    except ValueError as error:
                        raise ValueError(f"{file}, line {line}: found a rescale that is no number ({error})") from error
    if not reports:
        raise ValueError(f"{folder}: found no CSV with the columns VolumeName, Findings_EN, Impressions_EN, expected a "
                         f"CT-RATE folder. {_KINDS}")
    names = [name for name in volumes if name in reports and name not in left_out]
    if len(names) < len(reports):       # most people have a part of CT-RATE on disk, with the CSVs of the whole
        log.warning("%s: %d of %d reports have a volume here that no_chest_*.txt does not leave out",
                    folder, len(names), len(reports))
    if unknown := [name for name in names if not name.startswith(("train", "val"))]:
        raise ValueError(f"{folder}: found the volume {unknown[0]}, expected names train_… and valid_…")
    return [Item(name, volumes[name], reports[name], "train" if name.startswith("train") else "valid",
                 "_".join(name.split("_")[:2]), labels.get(name), rescale.get(name)) for name in names]


_KINDS = ("Data are one of: a manifest .csv (volume,report[,split][,patient][,label columns]); a CT-RATE folder "
          "(train/…/*.nii.gz or .npz, reports, labels and metadata CSVs); a CTRG-Chest .json")


def _all_items(data, cache):
    data = write_demo(Path(cache) / "demo", DEMO_SIZE) if str(data) == "demo" else Path(data)
    if data.is_dir():
        return _ct_rate_items(data)
    if not data.is_file():
        raise ValueError(f"{data}: found nothing there, expected data. {_KINDS}")
    return (_ctrg_items if _utf8(data).lstrip().startswith("{") else _manifest_items)(data)


def load_items(data, cache="cache"):
    """A manifest .csv, a CT-RATE folder or a CTRG-Chest .json -> list of Item. What it is, is told from the content.

    "demo" stands for DEMO_SIZE phantoms, which are written to CACHE/demo at first.

    Items without a report, and up to 5 % without a file, are logged and left out. Raises ValueError for all else that
    is wrong: another thing, not UTF-8, a missing column, a volume twice, a patient in train and elsewhere, no item.
    """
    items = _all_items(data, cache)
    seen, split_of = {}, {}
    for item in items:
        if seen.setdefault(os.path.normpath(item.volume), item) is not item:
            raise ValueError(f"{data}: found the volume {item.volume} twice, expected it once")
        if (split_of.setdefault(item.patient, item.split) == "train") != (item.split == "train"):
            raise ValueError(f"{data}: found the patient {item.patient} in {split_of[item.patient]} and in "
                             f"{item.split}, expected train and the rest to share nobody")
    absent = [item for item in items if not item.volume.exists()]
    if len(absent) > 0.05 * len(items):
        raise ValueError(f"{data}: found no file for {len(absent)} of {len(items)} volumes, the first are "
                         f"{', '.join(str(item.volume) for item in absent[:3])}; expected at most 5 % to be missing")
    silent = [item for item in items if not any(map(str.isalnum, item.report))]
    for fault, faulty in (("no file", absent), ("an empty report", silent)):
        if faulty:
            log.warning("%s: left out %d of %d items that have %s: %s", data, len(faulty), len(items), fault,
                        ", ".join(item.id for item in faulty[:3]) + (" …" if len(faulty) > 3 else ""))
    left_out = {item.volume for item in absent + silent}
    items = [item for item in items if item.volume not in left_out]
    if not items:
        raise ValueError(f"{data}: found no item with a volume and a report, expected at least one. {_KINDS}")
    return items


# -------------------------------------------------------------------------------------------------- nine tasks
# A task is a row of TASKS and a records function: (folder, fold) -> items, whose split is None where the set has none.

def _cc_ccii_items(folder, fold):
    names = ("Normal", "CP", "NCP")
    scans, tables = {}, {}                                  # {(patient, scan): (path, label)}, {(fold, part): path}
    for root, folders, files in os.walk(folder):
        if label := re.fullmatch(r"(Normal|CP|NCP)(-\d+)?", Path(root).name):           # "CP", or "CP-20" from its zip
            patients = [name for name in folders if name not in names]                  # or "CP-20/CP"
            scans.update({(name, scan.name): (scan, label[1]) for name in patients
                          for scan in Path(root, name).iterdir() if scan.is_dir()})
            folders[:] = [name for name in folders if name in names]                    # 400,000 slices are not listed
        for file in files:
            if scan := re.fullmatch(r"p(\d+)-s(\d+)\.npy", file):
                scans[scan.groups()] = Path(root, file), None
            elif table := re.search(r"fold(\d+).*(train|valid).*\.csv$", file):
                tables[int(table[1]), table[2]] = Path(root, file)
    rows = []                                               # (key, label, split)
    for part, split in (("train", "train"), ("valid", "test")) if tables else ():      # the release reports its "valid"
        if (path := tables.get((fold, part))) is None:
            raise ValueError(f"{folder}: found the fold files {sorted(file.name for file in tables.values())}, "
                             f"expected also *fold{fold}*{part}*.csv")
        for line, row in _rows(path, required=("target", "label", "patient_id", "scan_id")):
            if (row["target"], row["label"]) not in (("0", "Normal"), ("1", "CP"), ("2", "NCP")):
                raise ValueError(f"{path}, line {line}: found target {row['target']!r} and label {row['label']!r}, "
                                 "expected 0 Normal, 1 CP or 2 NCP")
            rows.append(((row["patient_id"], row["scan_id"]), row["label"], split))
    for key, (path, label) in sorted(scans.items()) if not tables else ():
        if label is None:
            raise ValueError(f"{path}: found no *fold{fold}*train*.csv and *valid*.csv, expected them to tell its class")
        rows.append((key, label, None))
    return [Item("/".join(key), scans[key][0] if key in scans else folder / label / key[0] / key[1], "", split, key[0],
                 np.eye(3, dtype=np.float32)[names.index(label)], None) for key, label, split in rows]


def _luna16_items(folder, fold):
    files, subset_of = {}, {}
    for file in sorted(folder.rglob("*.mhd")):
        if subset := re.fullmatch(r"subset(\d)", file.parent.name):     # seg-lungs-LUNA16 has files of the same names
            files[file.stem], subset_of[file.stem] = file, int(subset[1])
    tables = sorted(folder.rglob("candidates_V2.csv")) or sorted(folder.rglob("candidates.csv"))
    if not files or not tables:
        raise ValueError(f"{folder}: found {len(files)} files subset?/*.mhd and {len(tables)} candidates_V2.csv or "
                         "candidates.csv, expected both")
    labels = {str(k): np.array([k], dtype=np.float32) for k in (0, 1)}  # one array for all of 750,000 candidates
    items, series, absent = [], set(), {}
    for line, row in _rows(tables[0], required=("seriesuid", "coordX", "coordY", "coordZ", "class")):
        name = row["seriesuid"]
        series.add(name)
        if name not in files:
            absent[name] = line
            continue
        split = "train" if subset_of[name] < 5 else "valid" if subset_of[name] < 7 else "test"
        try:
            centre = -float(row["coordX"]), -float(row["coordY"]), float(row["coordZ"])         # LPS -> RAS
            items.append(Item(f"{name}:{line}", files[name], "", split, name, labels[row["class"]], None, None, centre))
        except (ValueError, KeyError) as error:
            raise ValueError(f"{tables[0]}, line {line}: found {list(row.values())}, expected a seriesuid, three "
                             "numbers and the class 0 or 1") from error
    if absent:
        lacking = sorted(set(range(10)) - set(subset_of.values()))      # many people have some of the subsets
        message = (f"{tables[0]}: found no .mhd for {len(absent)} of {len(series)} series, the first are "
                   f"{', '.join(list(absent)[:3])}" + (f"; no file in the subsets {lacking}" if lacking else ""))
        if len(absent) > (0.05 + len(lacking) / 10) * len(series):
            raise ValueError(f"{message}; expected at most 5 % to be missing from the subsets that are here")
        log.warning("%s: their candidates are left out", message)
    return items


def _segment_items(folder, fold, patient, image=None, mask=None):
    """The cases of a JSON with the list "training", and without one all files that fit the pattern `image`.

    patient: pattern of the patient's name in a file name; mask: (part of an image's name, what the mask has there).
    """
    files, lists, cases = {}, [], []                        # cases: (image, mask, split)
    for file in sorted(folder.rglob("*.nii*")):
        for n in (1, 2):                                    # found by "lung_001.nii.gz" and "imagesTr/lung_001.nii.gz"
            files.setdefault(file.parts[-n:], file)

    def case(row, split):
        if not {"image", "label"} <= row.keys():
            raise KeyError(f"no image or no label in {row}")
        return *(files.get(Path(row[key]).parts[-2:], folder / row[key]) for key in ("image", "label")), split

    try:
        for path in sorted(folder.rglob("*.json")):
            content = json.loads(_utf8(path))
            if "training" in content:
                folds = {row["fold"] for row in content["training"] if "fold" in row}
                lists.append((path, content["training"], content.get("validation", []), folds))
        lists = [one for one in lists if one[3]] or lists   # the file with folds beside a dataset.json without
        for path, training, validation, folds in lists:
            own = "train" if validation else None
            cases += [case(row, ("test" if row["fold"] == fold else "train") if folds else own) for row in training]
            cases += [case(row, "test") for row in validation if not folds]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: found {type(error).__name__}: {error}; expected {{training: [{{image, label[, fold]"
                         "}], [validation: [{image, label}]]}") from error
    if len(lists) > 1:
        raise ValueError(f"{folder}: found the lists of cases {', '.join(str(one[0]) for one in lists)}, expected one")
    if lists and lists[0][3] and fold not in lists[0][3]:
        raise ValueError(f"{lists[0][0]}: found the folds {sorted(lists[0][3])}, expected fold {fold} among them")
    homes = {}                                              # without a list: {folder of a part of the set: its cases}
    for key, file in files.items():
        if not lists and image and len(key) == 1 and re.fullmatch(image, file.name):
            home = file.parents[1] if re.fullmatch(patient, file.parent.name) else file.parent
            own = "test" if "test" in os.path.relpath(home, folder).lower() else "train"
            homes.setdefault(home, []).append((file, file.with_name(file.name.replace(*mask)), own))
    with_masks = {home: some for home, some in homes.items() if any(case[1].exists() for case in some)} or homes
    if hidden := [f"{home} ({len(some)})" for home, some in homes.items() if home not in with_masks]:
        log.warning("%s: left out for want of any mask: the scans in %s", folder, ", ".join(hidden))
    cases += itertools.chain(*with_masks.values())

    items = []
    for path, label, split in cases:
        name = path.name.split(".nii")[0]
        found = re.search(patient, name)
        items.append(Item(name, path, "", split, found[0] if found else name, None, None, label))
    splits = {}
    for item in items:
        splits.setdefault(item.patient, set()).add(item.split)
    if shared := [name for name, some in splits.items() if len(some) > 1]:
        log.warning("%s: %d of %d patients have scans on both sides of the split of this set: split by patient instead",
                    folder, len(shared), len(splits))
    # `load_task` draws the split of a set whose own is not by patient or has one side only
    as_given = not shared and len({item.split for item in items}) > 1
    return items if as_given else [item._replace(split=None) for item in items]


def _stoic_items(folder, fold):
    path, items = folder / "metadata" / "reference.csv", []
    if not path.exists():
        raise ValueError(f"{folder}: found no metadata/reference.csv, expected it")
    for line, row in _rows(path, required=("PatientID", "probCOVID", "probSevere")):
        labels = [row["probCOVID"], row["probSevere"]]
        if not {"0", "1", "0.0", "1.0"}.issuperset(labels):
            raise ValueError(f"{path}, line {line}: found probCOVID and probSevere {labels}, expected 0 or 1")
        name = row["PatientID"]
        items.append(Item(name, folder / "data" / "mha" / f"{name}.mha", "", None, name, np.float32(labels), None))
    return items


def _ctrg_task_items(folder, fold):
    lists = [path for path in sorted(folder.glob("*.json")) if path.name != "recipe.json"] if folder.is_dir() else [folder]
    if len(lists) != 1:
        raise ValueError(f"{folder}: found {[path.name for path in lists]}, expected one .json")
    return load_items(lists[0])


def _ct_rate_task_items(folder, fold):
    items = load_items(folder)
    if any(item.split == "test" for item in items):         # a manifest may have one
        return items
    return [item._replace(split="test") if item.split == "valid" else item for item in items]


class Task(NamedTuple):
    """One of the nine tasks: what finetune.py and eval.py need to know of it. Sizes and spacings are (z, y, x)."""
    kind: str                       # classify, segment, report, prompt or retrieve
    view: str                       # how a scan becomes the input: whole, slices, cube, box or patch
    records: callable               # (folder, fold) -> list of Item
    layout: str                     # of the folder, in words
    classes: tuple                  # names; segment: without the background
    metric: str                     # picks the epoch and heads the result
    size: tuple                     # voxels that the network sees
    window: tuple | None            # what becomes 0 and 1; None: 0 stays, all else becomes its z-score (MR, no HU)
    spacing: tuple | None           # mm to which scans are resampled; None: as they are
    recipe: dict                    # epochs, warmup (epochs), batch_size, lr, lr_encoder, weight_decay, decay, clip_grad
    # flip (an axis), rot90, affine, zoom, scale, shift: probability; noise, brightness, contrast: strength
    augment: dict = {}
    exclusive: bool = False         # classify: softmax over the classes, not a sigmoid each
    patches: int = 1                # cut from a volume at a time
    overlap: float = 0.5            # of the sliding window


def _recipe(epochs, warmup, batch_size, lr, lr_encoder=None, weight_decay=0., decay="cosine", clip_grad=5.):
    return dict(epochs=epochs, warmup=warmup, batch_size=batch_size, lr=lr, lr_encoder=lr_encoder or lr,
                weight_decay=weight_decay, decay=decay, clip_grad=clip_grad)


# NOTE(paper): most settings are those of the released scripts. Given nowhere and ours: the recipe of ct-rate-retrieval
# (the rates of pre-training), the epochs of luna16, the batch of the segmentation tasks, the probabilities of rot90 and
# affine in luna16 and of affine and zoom in msd-lung, clip_grad but for msd-lung and covid-19-20. The foreground crop of
# msd-lung is left out; patches without foreground are drawn in the body instead. luna16 has the LayerNorm of the others.
_CASES = ", or a JSON {training: [{image, label[, fold]}][, validation: [...]]} anywhere in the folder"
_CT_RATE = "a CT-RATE folder (train/ and valid/ volumes, reports and labels CSVs) or a manifest .csv"
TASKS = {
    "cc-ccii": Task(
        "classify", "slices", _cc_ccii_items,
        "LABEL/PATIENT/SCAN/*.png or .jpg with LABEL Normal, CP or NCP, or p{patient}-s{scan}.npy; "
        "*fold0*train*.csv and *fold0*valid*.csv (target,label,patient_id,scan_id), needed for .npy",
        ("normal", "common pneumonia", "COVID-19"), "ACC", (32, 384, 384), (-1000., 1000.), None,
        _recipe(130, 30, 2, 3e-4, weight_decay=0.01), {"flip": .5, "brightness": .07, "contrast": .05}, exclusive=True),
    "luna16": Task(
        "classify", "cube", _luna16_items,
        "subset0 … subset9/*.mhd with their .raw; candidates_V2.csv or candidates.csv "
        "(seriesuid,coordX,coordY,coordZ,class). Subsets 0-4 are train, 5-6 valid, 7-9 test",
        ("nodule",), "AUC", (64, 64, 64), (-1000., 600.), None,
        _recipe(50, 0, 32, 1.5e-4), {"flip": .5, "rot90": .5, "affine": .5}),
    "msd-lung": Task(
        "segment", "patch", partial(_segment_items, patient=".+"),
        "dataset.json of the Decathlon, imagesTr/*.nii.gz, labelsTr/*.nii.gz; a second JSON of the same form may add folds",
        ("lung cancer",), "Dice", (96, 96, 96), (-175., 250.), (1.5, 1.5, 1.5),
        _recipe(1000, 50, 1, 1e-4, weight_decay=1e-5),
        {"flip": .5, "rot90": .3, "zoom": .15, "affine": .15, "scale": .1, "shift": .1}, patches=4),
    "covid-19-20": Task(
        "segment", "patch", partial(_segment_items, patient=r"(?<=-A-)\d+", image=r"volume-covid19-A-\d+_ct\.nii(\.gz)?",
                                    mask=("_ct.", "_seg.")),
        "volume-covid19-A-XXXX_ct.nii.gz and volume-covid19-A-XXXX_seg.nii.gz" + _CASES,
        ("COVID-19 lesion",), "Dice", (32, 192, 192), (-1000., 500.), (5., 1.25, 1.25),
        _recipe(1000, 50, 1, 7.5e-5, weight_decay=1e-5), {"flip": .5, "affine": .15, "noise": .01}, patches=3),
    "acdc": Task(
        "segment", "patch", partial(_segment_items, patient=r"patient\d+", image=r"patient\d+_frame\d+\.nii(\.gz)?",
                                    mask=(".nii", "_gt.nii")),
        "[training/ and testing/]patientXXX/patientXXX_frameYY.nii.gz and …_frameYY_gt.nii.gz" + _CASES,
        ("right ventricle", "myocardium", "left ventricle"), "Dice", (32, 192, 192), None, None,
        _recipe(300, 5, 1, 3e-4, weight_decay=1e-5), {"flip": .1}, patches=2, overlap=0.75),
    "stoic": Task(
        "classify", "box", _stoic_items,
        "data/mha/{PatientID}.mha; metadata/reference.csv (PatientID,probCOVID,probSevere)",
        ("COVID-19", "severe"), "AUC", (128, 128, 128), (-1100., 300.), None, _recipe(40, 0, 2, 5e-5)),
    "ctrg": Task(
        "report", "whole", _ctrg_task_items,
        "a .json {train, val, test: [{id, report, image_path}]}, or the folder around it; image_path as seen from there",
        (), "BLEU-4", SIZE, WINDOW, None, _recipe(30, 0, 2, 1e-4, lr_encoder=5e-5, decay="step")),
    "ct-rate-vocab": Task(
        "prompt", "whole", _ct_rate_task_items, _CT_RATE + " with all 18 labels", LABELS, "AUC", SIZE, WINDOW, None,
        _recipe(10, 0, 1, 1e-5, weight_decay=0.01)),
    "ct-rate-retrieval": Task(
        "retrieve", "whole", _ct_rate_task_items, _CT_RATE, LABELS, "Recall@50", SIZE, WINDOW, None,
        _recipe(10, 1, 4, 1e-4, lr_encoder=2e-5, weight_decay=0.01)),
}
FEW_SHOT_VOLUMES = 1000             # training volumes of the two CT-RATE tasks, drawn at random (the paper's number)


def _a_fifth(items, task, seed, fold=0):
    """Names of a seeded fifth of the patients of `items`, number `fold` of five; classify: a fifth of every class."""
    labels = {}
    for item in items:
        label = item.labels if task.kind == "classify" else np.zeros(1)
        labels[item.patient] = np.maximum(label, labels.get(item.patient, 0))       # of all scans of the patient
    groups, chosen = {}, set()
    for patient in sorted(labels):
        groups.setdefault(tuple(labels[patient]), []).append(patient)
    generator = np.random.default_rng(seed)
    for _, group in sorted(groups.items()):
        if len(group) > 1:                                  # one alone is needed to train on
            chosen |= {group[k] for k in np.array_split(generator.permutation(len(group)), 5)[fold]}
    return chosen


def load_task(name, folder, fold=0, seed=0):
    """The data of a task in its native layout (`TASKS[name].layout`) -> list of Item, each with its split.

    The set's own split or fold counts; otherwise a fifth of the patients, drawn with `seed`, is the test part. Without
    a valid part a fifth of the training patients becomes it. Up to 5 % of volumes without a file are logged and left
    out. Raises ValueError for all else that is wrong: no item, a scan twice, a patient in two splits, a case without
    mask, a class that is empty in a split.
    """
    if name not in TASKS:
        raise ValueError(f"found the task {name!r}, expected one of {', '.join(TASKS)}")
    task, folder = TASKS[name], Path(folder)
    if not folder.exists():
        raise ValueError(f"{folder}: found nothing there, expected {task.layout}")
    items = task.records(folder, fold)
    if not items:
        raise ValueError(f"{folder}: found nothing of {name}, expected {task.layout}")
    if fold and items[0].split and [item.split for item in items] == [item.split for item in task.records(folder, 0)]:
        raise ValueError(f"{folder}: found --fold {fold}, but one split of its own and no folds; expected no --fold")
    volumes = dict.fromkeys(item.volume for item in items)
    if absent := {volume: None for volume in volumes if not volume.exists()}:
        message = f"{folder}: found no file for {len(absent)} of {len(volumes)} scans: {', '.join(map(str, [*absent][:3]))}"
        if len(absent) > 0.05 * len(volumes):
            raise ValueError(f"{message}; expected at most 5 % to be missing")
        log.warning("%s: left out", message)
        items = [item for item in items if item.volume not in absent]
    if task.kind == "segment" and (bare := [item for item in items if not item.mask.exists()]):
        raise ValueError(f"{folder}: found no mask for {len(bare)} of {len(items)} cases: "
                         f"{', '.join(str(item.mask) for item in bare[:3])}; expected one for each")
    if task.kind == "prompt":
        for item in items:
            if item.labels is None or np.isnan(item.labels).any():
                lacking = LABELS if item.labels is None else np.array(LABELS)[np.isnan(item.labels)]
                raise ValueError(f"{folder}: found no label of {item.id} for {', '.join(lacking[:3])}, expected "
                                 "0 or 1 for all 18 names of LABELS")

    if items[0].split is None:
        if not 0 <= fold < 5:
            raise ValueError(f"{folder}: found no folds of its own and --fold {fold}, expected 0 to 4: a fifth of the patients is "
                             "drawn")
        test = _a_fifth(items, task, seed, fold)
        items = [item._replace(split="test" if item.patient in test else "train") for item in items]
    if not any(item.split == "valid" for item in items):
        valid = _a_fifth([item for item in items if item.split == "train"], task, seed)
        items = [item._replace(split="valid") if item.split == "train" and item.patient in valid else item for item in items]
    if task.kind in ("prompt", "retrieve"):
        generator = np.random.default_rng(seed)
        for split, n in (("train", FEW_SHOT_VOLUMES), ("valid", FEW_SHOT_VOLUMES // 4)):
            part = [item.id for item in items if item.split == split]
            kept = {part[k] for k in generator.permutation(len(part))[:n]}
            items = [item for item in items if item.split != split or item.id in kept]

    split_of, seen = {}, set()
    for item in items:
        if item.id in seen:
            raise ValueError(f"{folder}: found {item.id} twice, expected it once")
        seen.add(item.id)
        if split_of.setdefault(item.patient, item.split) != item.split:
            raise ValueError(f"{folder}: found the patient {item.patient} in {split_of[item.patient]} and in "
                             f"{item.split}, expected it in one of them")
    for split in SPLITS:
        part = [item for item in items if item.split == split]
        if not part and (split == "test" or "train" in split_of.values()):
            raise ValueError(f"{folder}: found {len(items)} items of {len(split_of)} patients and none for the part "
                             f"{split}, expected {task.layout}")
        if not part:
            log.warning("%s: found nothing for the part %s: this set can only be tested on", folder, split)
            continue
        for k, positive in enumerate(np.sum([item.labels for item in part], 0) if task.kind == "classify" else ()):
            if positive == 0 or positive == len(part) and not task.exclusive:
                raise ValueError(f"{folder}: found {positive:.0f} of {len(part)} items of the part {split} with the class "
                                 f"{task.classes[k]}, expected some with and some without it")
    return items


# ------------------------------------------------------------------------------------------------------- cache

def cache_path(cache, item, size=SIZE, hu="auto"):
    """Where the preprocessed volume of an item lies: it changes with the file and with every setting."""
    stat = item.volume.stat()
    key = (str(item.volume.resolve()), stat.st_size, stat.st_mtime_ns, tuple(size), CROP, WINDOW, hu, item.rescale)
    return Path(cache) / f"{hashlib.sha1(repr(key).encode()).hexdigest()}.npy"


def _in_processes(function, jobs, workers):
    """function(job) of each job, as they end, from `workers` processes. ValueError where one of them is killed."""
    pool = ProcessPoolExecutor(workers)
    try:
        for done in as_completed([pool.submit(function, job) for job in jobs]):
            yield done.result()
    except BrokenProcessPool:
        raise ValueError(f"{workers} workers: one was killed, probably for want of memory; expected fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)                  # after an error the jobs that wait are not begun


def _save_array(path, array):
    """An array into the cache, whole or not at all"""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            np.save(file, array)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_volume(item, cache=None, size=SIZE, hu="auto"):
    """The preprocessed volume of an item, float32 (1, D, H, W) in [0, 1], from the cache or made and put there.

    It is rounded to float16 with and without a cache, so that both give the same numbers. Raises ValueError.
    """
    path = cache_path(cache, item, size, hu) if cache and item.volume.exists() else None
    if path and path.exists():
        return torch.from_numpy(np.load(path, mmap_mode="r", allow_pickle=False).astype(np.float32))
    array, spacing, _ = read_volume(item.volume)
    array, _ = to_hounsfield(array, item.volume, hu, item.rescale)
    volume = preprocess(array, spacing, size).half()
    if path:
        _save_array(path, volume.numpy())
    return volume.float()


# ------------------------------------------------------------------------------------------- training examples

class VolumeReports(torch.utils.data.Dataset):
    """Masked volumes and masked reports; asked for (index, step), as `Batches` does.

    What is random comes from (seed, step, index) alone: neither the worker nor the number of processes matters.
    """

    def __init__(self, items, tokenizer, cache=None, size=SIZE, hu="auto", mask_size=16, mask_ratio=0.5,
                 mlm_prob=0.15, max_sentences=32, max_tokens=250, seed=0):
        self.items, self.tokenizer, self.cache, self.size, self.hu = items, tokenizer, cache, size, hu
        self.mask_size, self.mask_ratio, self.mlm_prob = mask_size, mask_ratio, mlm_prob
        self.max_sentences, self.max_tokens, self.seed = max_sentences, max_tokens, seed

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index_and_step):
        index, step = index_and_step
        generator = np.random.default_rng((self.seed, step, index))
        skipped = []
        for k in range(len(self.items)):                    # the next one stands in for a volume that is not readable
            item = self.items[(index + k) % len(self.items)]
            try:
                volume = load_volume(item, self.cache, self.size, self.hu)
                break
            except ValueError as error:
                log.warning("skipped %s: %s", item.id, error)
                skipped.append(item.id)
        else:
            raise ValueError(f"found none of {len(self.items)} volumes readable, expected at least one")
        report = tokenize_report(self.tokenizer, split_sentences(item.report), self.max_sentences, self.max_tokens)
        masked_ids, mlm_labels = mask_words(report["input_ids"], report["word_ids"], self.tokenizer, generator,
                                            self.mlm_prob)
        example = {
            "id": item.id,
            "skipped": skipped,
            "volume": volume,                                                       # (1, D, H, W)
            "volume_mask": mask_volume(self.size, self.mask_size, self.mask_ratio, generator),     # (1, D, H, W)
            "input_ids": torch.from_numpy(report["input_ids"]),                     # (L,)
            "sentence_ids": torch.from_numpy(report["sentence_ids"]),               # (L,)
            "masked_ids": torch.from_numpy(masked_ids),                             # (L,)
            "mlm_labels": torch.from_numpy(mlm_labels),                             # (L,)
            "single_ids": [torch.from_numpy(ids) for ids in report["single_ids"]],  # S of (L_s,)
        }
        if item.labels is not None:
            example["labels"] = torch.from_numpy(item.labels)                       # (18,)
        return example


def collate(batch, pad_id):
    """B examples -> one batch. Sentences encoded one by one come flat, those of patient 0 first: (ΣS, L_s)."""
    def padded(sequences, value):
        return pad_sequence(list(sequences), batch_first=True, padding_value=value)

    def column(name):
        return [example[name] for example in batch]

    single_ids = [ids for example in batch for ids in example["single_ids"]]
    out = {
        "ids": column("id"),
        "skipped": [i for skipped in column("skipped") for i in skipped],
        "volume": torch.stack(column("volume")),                                    # (B, 1, D, H, W)
        "volume_mask": torch.stack(column("volume_mask")),                          # (B, 1, D, H, W)
        "input_ids": padded(column("input_ids"), pad_id),                           # (B, L)
        "attention_mask": padded(map(torch.ones_like, column("input_ids")), 0),     # (B, L)
        "sentence_ids": padded(column("sentence_ids"), -1),                         # (B, L)
        "masked_ids": padded(column("masked_ids"), pad_id),                         # (B, L)
        "mlm_labels": padded(column("mlm_labels"), -100),                           # (B, L)
        "sentence_mask": padded([torch.ones(len(ids), dtype=torch.bool) for ids in column("single_ids")], False),
        "single_ids": padded(single_ids, pad_id),                                   # (ΣS, L_s)
        "single_mask": padded(map(torch.ones_like, single_ids), 0),                 # (ΣS, L_s)
    }
    if all("labels" in example for example in batch):
        out["labels"] = torch.stack(column("labels"))                               # (B, 18)
    return out


class Batches:
    """Batch sampler without end: lists of (index, step) for one of `world` processes, from step `start` on.
    NOTE(paper): several reconstructions of one scan are volumes like others; in one batch they are negatives of each other.

    An epoch is a permutation seeded by (seed, epoch), cut into global batches of batch_size · world; what is left
    over is dropped. W processes with batch B see, together and in rank order, what one sees with W·B.
    """

    def __init__(self, n, batch_size, rank=0, world=1, seed=0, start=0):
        if batch_size * world > n:
            raise ValueError(f"found {n} volumes for a global batch of {batch_size} x {world} = {batch_size * world}, "
                             "expected at least as many volumes")
        self.n, self.batch_size, self.rank, self.world, self.seed, self.start = n, batch_size, rank, world, seed, start

    def __iter__(self):
        order, order_epoch = None, None
        for step in itertools.count(self.start):
            epoch, batch = divmod(step, self.n // (self.batch_size * self.world))
            if epoch != order_epoch:
                order, order_epoch = np.random.default_rng((self.seed, epoch)).permutation(self.n), epoch
            first = (batch * self.world + self.rank) * self.batch_size
            yield [(int(index), step) for index in order[first:first + self.batch_size]]


# -------------------------------------------------------------------------------------- examples of the nine tasks
# A scan is prepared once (oriented, windowed, resampled; float16, cached and memory-mapped), then cut to what the network sees.

BOX = 384.                                      # mm, side of the box around the middle of a scan (view "box")


def _resize(array, size, mode):
    array = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None, None]         # (1, 1, z, y, x)
    flags = {"align_corners": False} if mode == "trilinear" else {}
    return F.interpolate(array, size=tuple(size), mode=mode, **flags)[0, 0].numpy()


def _read_mask(item, task, shape, affine):
    """The mask of a case, uint8 (z, y, x) in RAS. ValueError for another grid than the scan's and for unknown labels."""
    mask, _, mask_affine = to_ras(item.mask, *read_stored(item.mask), is_mask=True)
    if mask.shape != shape or not np.allclose(mask_affine, affine, atol=0.05):
        raise ValueError(f"{item.mask}: found a mask of {mask.shape} voxels (z, y, x) and affine "
                         f"{mask_affine[:3].round(3).tolist()}, expected the grid of {item.volume}: {shape} and "
                         f"{affine[:3].round(3).tolist()}")
    values = np.unique(mask)
    if unknown := sorted(set(values.tolist()) - set(range(len(task.classes) + 1))):
        raise ValueError(f"{item.mask}: found the label values {unknown[:5]}, expected 0 to {len(task.classes)} "
                         f"(background, {', '.join(task.classes)})")
    return mask.astype(np.uint8)


def prepare(item, task, cache="cache"):
    """A scan of a task, from the cache or made and put there: volume (z, y, x) float16, mask uint8 of its shape or None,
    affine 4×4 of its (x, y, z) index -> RAS world mm.

    Windowed to [0, 1], or z-scored but for zeros where the task has no window; resampled to the task's spacing (view "patch"),
    to the whole field of view (view "slices": 4/3 of the size in plane) or to a box of BOX mm padded with air (view "box").
    Raises ValueError.
    """
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in (item.volume, item.mask) if file]
    size = task.size if task.view in ("slices", "box") else None
    key = repr((stats, task.view, size, task.window, task.spacing, len(task.classes), item.rescale))
    path = Path(cache) / f"{task.view}-{hashlib.sha1(key.encode()).hexdigest()}.npy"
    mask_path, affine_path = path.with_suffix(".mask.npy"), path.with_suffix(".affine.npy")
    if not path.exists():                                   # it is written last: what lies beside it is complete
        array, spacing, affine = read_volume(item.volume)
        mask = _read_mask(item, task, array.shape, affine) if item.mask else None
        if task.window:
            array, _ = to_hounsfield(array, item.volume, "auto", item.rescale)
            if task.view == "box":
                n = [round(BOX / side) for side in spacing]
                before = [max(0, (k - m) // 2) for k, m in zip(n, array.shape)]
                array = np.pad(array, [(b, max(0, k - m - b)) for k, m, b in zip(n, array.shape, before)],
                               constant_values=task.window[0])
                corner = [(m - k) // 2 for k, m in zip(n, array.shape)]
                array = array[tuple(slice(c, c + k) for c, k in zip(corner, n))]
                affine[:3, 3] += affine[:3, :3] @ np.subtract(corner, before)[::-1]
            low, high = task.window
            array = (np.clip(array, low, high) - low) / (high - low)
        else:
            inside = array != 0
            array[inside] = (array[inside] - array[inside].mean()) / max(array[inside].std(), 1e-6)
        shape = array.shape
        if task.view == "box":
            shape = task.size
        elif task.view == "slices":
            shape = (task.size[0], *(round(side * 4 / 3) for side in task.size[1:]))
        elif task.spacing:
            shape = tuple(max(1, round(n * side / new)) for n, side, new in zip(array.shape, spacing, task.spacing))
        ratio = np.array(array.shape[::-1]) / shape[::-1]                           # (x, y, z) of old voxels in a new one
        affine = affine @ np.block([[np.diag(ratio), (ratio[:, None] - 1) / 2], [np.zeros((1, 3)), np.ones((1, 1))]])
        if shape != array.shape:
            array = _resize(array, shape, "trilinear")
            mask = None if mask is None else _resize(mask, shape, "nearest-exact").astype(np.uint8)
        for file, content in ((affine_path, affine), (mask_path, mask), (path, array.astype(np.float16))):
            if content is not None:
                _save_array(file, content)
    mask = np.load(mask_path, mmap_mode="r", allow_pickle=False) if item.mask else None
    return np.load(path, mmap_mode="r", allow_pickle=False), mask, np.load(affine_path, allow_pickle=False)


def candidate_voxel(item, shape, affine):
    """Where the candidate of an item lies in its scan: index (z, y, x). ValueError if it lies outside."""
    index = (np.linalg.inv(affine) @ [*item.centre, 1])[2::-1]
    if ((index < -0.5) | (index > np.array(shape) - 0.5)).any():
        raise ValueError(f"{item.volume}: found the candidate {item.id} at {np.round(item.centre, 1).tolist()} (RAS, mm), voxel "
                         f"{index.round(1).tolist()} (z, y, x), expected it inside the scan of {tuple(shape)} voxels")
    return np.rint(index).astype(int)


def _cut(array, corner, size):
    """A box of voxels, moved inside the array; a smaller array is filled up with 0: air, the background"""
    corner = [min(max(int(c), 0), max(0, n - k)) for c, n, k in zip(corner, array.shape, size)]
    box = np.asarray(array[tuple(slice(c, c + k) for c, k in zip(corner, size))])
    if box.shape == tuple(size):
        return box
    sides = [((k - n) // 2, k - n - (k - n) // 2) for n, k in zip(box.shape, size)]
    return np.pad(box, sides)


def _draw_place(volume, mask, foreground, generator):
    """A voxel of the mask or, for what is not foreground, one beside it in the body: any value but 0"""
    if foreground and len(places := np.flatnonzero(mask)):
        return np.unravel_index(generator.choice(places), mask.shape)
    for _ in range(20):                                     # most voxels will do
        place = tuple(generator.integers(0, mask.shape))
        if not mask[place] and volume[place] != 0:
            break
    return place


def cut_views(item, task, cache, generator=None):
    """What the network sees of an item: float32 (P, 1, D, H, W) and mask int64 (P, D, H, W) or None.

    With a `generator` places are drawn: crops of "slices", patches about a voxel of the mask and elsewhere in turns. Without,
    the middle is taken. A "cube" has its candidate in its middle either way, or as near to it as the scan reaches.
    """
    if task.view == "whole":
        return load_volume(item, cache, task.size)[None], None
    volume, mask, affine = prepare(item, task, cache)
    room = np.maximum(np.array(volume.shape) - task.size, 0)
    corners = [room // 2 if generator is None else generator.integers(0, room + 1)]
    if task.view == "cube":
        corners = [candidate_voxel(item, volume.shape, affine) - np.array(task.size) // 2]
    elif task.view == "patch" and generator is not None:
        first = generator.integers(2)                       # of an odd number of patches, now one more and now one less
        corners = [np.array(_draw_place(volume, mask, (i + first) % 2 == 0, generator)) - np.array(task.size) // 2
                   for i in range(task.patches)]
    volumes = torch.from_numpy(np.stack([_cut(volume, corner, task.size) for corner in corners])).float()[:, None]
    if mask is None:
        return volumes, None
    return volumes, torch.from_numpy(np.stack([_cut(mask, corner, task.size) for corner in corners])).long()


def network_input(item, task, cache="cache"):
    """What a network sees of an item in prediction, float32 (1, D, H, W): no chance in it."""
    return cut_views(item, task, cache)[0][0]


def augment(volume, mask, generator, settings):
    """One volume (1, D, H, W) and its mask (D, H, W) or None, changed by chance, the same way both. `settings` of the task:

    flip (of each axis), rot90 (in plane), affine (rotation up to π/15), zoom (size ±10 %), scale and shift (of values, ±0.1):
    probabilities; brightness, contrast: largest change; noise: standard deviation.
    """
    def chance(name):
        return generator.random() < settings.get(name, 0)
    axes = [axis for axis in (1, 2, 3) if chance("flip")]
    turns = generator.integers(1, 4) if chance("rot90") and volume.shape[2] == volume.shape[3] else 0
    volume = volume.flip(axes).rot90(turns, (2, 3))
    mask = None if mask is None else mask.flip([axis - 1 for axis in axes]).rot90(turns, (1, 2))
    turned, zoomed = chance("affine"), chance("zoom")
    if turned or zoomed:
        angles = generator.uniform(-math.pi / 15, math.pi / 15, 3) * turned
        size = generator.uniform(0.9, 1.1) if zoomed else 1
        shape = np.array(volume.shape[:0:-1], float)                                # (x, y, z), as grid_sample wants
        matrix = np.eye(3) / size
        for axis, angle in enumerate(angles):
            turn, (i, j) = np.eye(3), [(1, 2), (0, 2), (0, 1)][axis]
            turn[i, i] = turn[j, j] = math.cos(angle)
            turn[i, j], turn[j, i] = -math.sin(angle), math.sin(angle)
            matrix = matrix @ turn
        matrix = matrix * shape / shape[:, None]                                    # coordinates run from -1 to 1 on each axis
        theta = torch.from_numpy(np.c_[matrix, np.zeros(3)]).float()[None]
        grid = F.affine_grid(theta, (1, 1, *volume.shape[1:]), align_corners=False)
        volume = F.grid_sample(volume[None], grid, padding_mode="border", align_corners=False)[0]
        if mask is not None:
            mask = F.grid_sample(mask[None, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
            mask = mask[0, 0].long()
    if chance("scale"):
        volume = volume * generator.uniform(0.9, 1.1)
    if chance("shift"):
        volume = volume + generator.uniform(-0.1, 0.1)
    volume = volume + generator.uniform(-1, 1) * settings.get("brightness", 0)
    volume = (volume - volume.mean()) * (1 + generator.uniform(-1, 1) * settings.get("contrast", 0)) + volume.mean()
    if "noise" in settings:
        volume = volume + settings["noise"] * torch.from_numpy(generator.standard_normal(volume.shape, dtype=np.float32))
    return volume, mask


def report_words(report):
    """The words of a report in lower case, "0.5", "3-4mm" and "low-density" whole: what a generator learns and BLEU compares"""
    return re.findall(r"\w+(?:-\w+|(?<=\d)\.\d\w*)*", report.lower())


def build_vocabulary(reports, min_count=3):
    """Words that stand at least min_count times in the training reports, after 4 special ones. ValueError if there is none."""
    count = Counter(word for report in reports for word in report_words(report))
    words = sorted(word for word, times in count.items() if times >= min_count)
    if not words:
        raise ValueError(f"found no word that stands {min_count} times or more in {len(reports)} training reports, expected a "
                         "vocabulary; are the reports empty?")
    return ["<pad>", "<bos>", "<eos>", "<unk>", *words]


class TaskDataset(torch.utils.data.Dataset):
    """Training examples of a task; asked for (index, step), as `Batches` does. Chance comes from (seed, step, index) alone.

    Of "cube" tasks with far more negative than positive candidates, an epoch holds all positives and as many negatives, drawn
    anew for each. A dict: id; volume (P, 1, D, H, W); label (P, K), mask (P, D, H, W) or tokens (L,), by the kind of the task.
    """

    def __init__(self, items, task, cache="cache", seed=0, vocabulary=None, max_length=150):
        self.items, self.task, self.cache, self.seed, self.max_length = items, task, cache, seed, max_length
        self.word_ids = {word: i for i, word in enumerate(vocabulary or [])}
        self.negatives = []
        if task.view == "cube":
            self.items, self.negatives = ([item for item in items if item.labels[0] == label] for label in (1, 0))

    def __len__(self):
        return len(self.items) * (2 if self.negatives else 1)

    def __getitem__(self, index_and_step):
        index, step = index_and_step
        generator = np.random.default_rng((self.seed, step, index))
        item = self.items[index] if index < len(self.items) else self.negatives[generator.integers(len(self.negatives))]
        volumes, masks = cut_views(item, self.task, self.cache, generator)
        if self.task.augment and index < len(self.items):   # of candidates the positive ones alone
            changed = [augment(volume, None if masks is None else masks[i], generator, self.task.augment)
                       for i, volume in enumerate(volumes)]
            volumes = torch.stack([volume for volume, _ in changed])
            masks = None if masks is None else torch.stack([mask for _, mask in changed])
        example = {"id": item.id, "volume": volumes}
        if self.task.kind == "segment":
            example["mask"] = masks
        elif self.task.kind == "report":
            words = [self.word_ids.get(word, 3) for word in report_words(item.report)[:self.max_length]]
            example["tokens"] = torch.tensor([1, *words, 2])
        else:
            example["label"] = torch.from_numpy(item.labels)[None]
        return example


def collate_task(batch):
    """Examples of a task -> one batch: volumes, labels and masks one behind the other, tokens padded with 0, a list of ids"""
    out = {"ids": [example["id"] for example in batch]}
    for key in batch[0].keys() - {"id"}:
        column = [example[key] for example in batch]
        out[key] = pad_sequence(column, batch_first=True) if key == "tokens" else torch.cat(column)
    return out


def _prepare_job(job):
    torch.set_num_threads(1)
    items, task, cache = job
    try:
        if task.view == "whole":
            if not cache_path(cache, items[0], task.size).exists():
                load_volume(items[0], cache, task.size)
            return [], None
        volume, _, affine = prepare(items[0], task, cache)
        if task.view == "cube":
            for item in items:
                candidate_voxel(item, volume.shape, affine)
    except ValueError as error:
        return items, str(error)
    return [], None


def prepare_all(items, task, cache="cache", workers=1):
    """Prepare every scan of a task in `workers` processes -> the items that are good. A scan that is wrong is named and left
    out; ValueError where that happens to more than 5 %."""
    groups = {}
    for item in items:
        groups.setdefault(item.volume, []).append(item)
    bad, problems = set(), []
    task = task._replace(records=None)                      # which need not go to another process, and a lambda cannot
    done = _in_processes(_prepare_job, [(group, task, cache) for group in groups.values()], workers)
    for left_out, problem in tqdm(done, total=len(groups), desc="prepare", unit="scan", disable=None):
        if problem:
            problems.append(problem)
            bad.update(item.volume for item in left_out)
    if len(problems) > 0.05 * len(groups):
        raise ValueError("\n  ".join([f"{len(problems)} of {len(groups)} scans are wrong, more than 5 %:", *sorted(problems)[:5]]))
    for problem in sorted(problems):
        log.warning("left out %s", problem)
    return [item for item in items if item.volume not in bad]


def to_own_grid(probabilities, item):
    """Probabilities (K, D, H, W) on the prepared grid of an item -> label map uint8 (x, y, z) as its scan is stored, affine 4×4"""
    xyz, affine = read_stored(item.volume)
    orientation = nib.io_orientation(affine)
    xyz = xyz.reshape(xyz.shape[:3])
    size = nib.apply_orientation(np.broadcast_to(np.uint8(0), xyz.shape), orientation).shape[::-1]         # (z, y, x) in RAS
    labels = F.interpolate(probabilities[None].float(), size=size, mode="trilinear", align_corners=False)[0].argmax(0)
    back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), orientation)
    return nib.apply_orientation(labels.numpy().astype(np.uint8).T, back), affine


# ------------------------------------------------------------------------------------------------ demo phantoms
# A chest in its own frame: millimetres of a standard patient from the middle of the thorax, points as (x, y, z),
# x to the patient's right, y forward, z up. p (a namespace) holds one patient: its grid, voxels and random source.

PREVALENCE = (.18, .28, .25, .18, .28, .20, .25, .25, .30, .35, .33, .25, .28, .20, .22, .28, .22, .20)
LOBES = ((), ("right", "upper"), ("right", "middle"), ("right", "lower"), ("left", "upper"), ("left", "lower"))
SIDES = {"right": (1, 2, 3), "left": (4, 5), "bilateral": (1, 2, 3, 4, 5)}
ORDER = (2, 3, 13, 7, 10, 12, 17, 15, 8, 11, 14, 16, 9, 5, 6, 1, 4, 0)     # of drawing: from large to small and bright
BULKY = (15, 10, 8, 16, 9)                                 # each in a lobe of its own
BRONCHUS = np.tile(np.linspace(3.6, 2.2, 30), 4)           # mm, inner radius along the four bronchi of a lobe
STORED = ("LPS", "LAS", "RPS", "PIR")                      # orientations of the quarter that is not stored as RAS


def curve(points, step=2.5):
    """Points (P, 3) every `step` mm along the smooth line through `points`."""
    points = np.asarray(points, np.float32)
    at = np.r_[0, np.cumsum(np.linalg.norm(np.diff(points, axis=0), axis=1))]
    return make_interp_spline(at, points, k=min(3, len(points) - 1))(np.arange(0, at[-1], step)).astype(np.float32)


def fan(start, ends, bend):
    """Curved lines from one point to many: 30 points each, of one line after the other (number of ends * 30, 3)."""
    t = np.linspace(0, 1, 30, dtype=np.float32)[:, None]
    middle = (start + ends) / 2 + bend
    return ((1 - t) ** 2 * start + 2 * t * (1 - t) * middle[:, None] + t ** 2 * ends[:, None]).reshape(-1, 3)


def apart(points, centre):
    """Distances (P,) of points (P, 3) from one point."""
    d = points - np.float32(centre)
    return np.sqrt(np.einsum("ij,ij->i", d, d))


def to_index(p, points):
    """Points (P, 3) of the patient's frame -> fractional voxel indices (P, 3) as (z, y, x)."""
    x, y, z = np.asarray(points, np.float32).T
    return np.stack([z, p.sin * x + p.cos * y, p.cos * x - p.sin * y], 1) / p.step + p.middle


def soft(p, distance):
    """Signed distance in mm, positive inside -> share of the voxel that is inside (partial volume)."""
    return np.clip(distance / p.step.mean() + .5, 0, 1)


def tube(p, points, radius):
    """Box of voxels around a dense line of points (P, 3), and the share (z, y, x) of each voxel inside its radius."""
    f, radius = to_index(p, points), np.broadcast_to(np.float32(radius), len(points))
    base = np.rint(f).astype(np.int32)
    reach = np.ceil(radius.max() / p.step).astype(int)
    low = np.maximum(base.min(0) - reach, 0)
    high = np.minimum(base.max(0) + reach + 1, p.vol.shape)
    square, place = [], []
    for a in range(3):
        i = base[:, a, None] + np.arange(-reach[a], reach[a] + 1, dtype=np.int32)
        d = ((i - f[:, a, None]) * p.step[a]) ** 2
        square.append(np.where((i >= low[a]) & (i < high[a]), d, 1e9).astype(np.float32))
        place.append(np.clip(i, low[a], high[a] - 1) - low[a])
    d = square[0][:, :, None, None] + square[1][:, None, :, None] + square[2][:, None, None, :]
    n, h, w = high - low
    i = (place[0][:, :, None, None] * h + place[1][:, None, :, None]) * w + place[2][:, None, None, :]
    near = d < (radius[:, None, None, None] + p.step.mean() / 2) ** 2
    share = np.zeros(n * h * w, np.float32)
    radius = np.broadcast_to(radius[:, None, None, None], d.shape)
    np.maximum.at(share, i[near], soft(p, radius[near] - np.sqrt(d[near])))
    return tuple(slice(a, b) for a, b in zip(low, high)), share.reshape(n, h, w)


def ellipsoid(p, centre, radii, margin=4):
    """Box of voxels around an ellipsoid, and the signed distance (z, y, x) in mm to its surface, positive inside."""
    reach = np.max(radii) + margin
    at = to_index(p, [centre])[0]
    low = np.maximum(at - reach / p.step, 0).astype(int)
    high = np.minimum(np.ceil(at + reach / p.step).astype(int) + 1, p.vol.shape)
    box = tuple(slice(a, b) for a, b in zip(low, high))
    x, y, z = p.x[box[1:]] - centre[0], p.y[box[1:]] - centre[1], p.z[box[0]] - centre[2]
    q = np.sqrt((x / radii[0]) ** 2 + (y / radii[1]) ** 2 + (z / radii[2]) ** 2)
    return box, (1 - q) * np.min(radii)


def paint(p, box, share, value, low=-2000, high=4000):
    """Blends `value` HU into the voxels of a box whose HU lie in [low, high]."""
    v = p.vol[box]
    v += share * ((v >= low) & (v <= high)) * (value - v)


def ball(p, centre, radii, value, low=-2000, high=4000):
    """Paints an ellipsoid."""
    box, d = ellipsoid(p, centre, radii)
    paint(p, box, soft(p, d), value, low, high)


def paint_lung(p, share, value):
    """The same for the list of lung voxels, of which only those that still hold air change."""
    v = p.flat[p.lung]
    p.flat[p.lung] = v + share * (v < -200) * (value - v)


def along(p, direction):
    """Positions (K,) in mm of the lung voxels along a direction (3,); no matrix product, whose threads would fight."""
    return sum(p.at[:, i] * np.float32(direction[i]) for i in range(3))


def waves(p, length):
    """A smooth random texture (K,) over the lung voxels, about normal, with details of `length` mm."""
    turn = 2 * math.pi / length
    directions = [one / np.linalg.norm(one) for one in p.rng.standard_normal((6, 3))]
    return sum(np.cos(turn * along(p, one) + p.rng.uniform(0, 6.3)) for one in directions) / 3 ** .5


def spot(p, lobe, room=12.0):
    """A random point of a lobe that still holds air, `room` mm from walls and fissures if possible; and its room."""
    inside = np.flatnonzero((p.lobe == lobe) & (p.flat[p.lung] < -200))
    clear = p.clear[inside]
    i = p.rng.choice(inside[clear >= min(room, np.quantile(clear, .93))])
    return p.at[i], p.clear[i]


def draw_heart(p, size):
    """Heart with its fat, four chambers and coronary arteries; `size` 1 is normal. Sets p.heart and p.coronaries."""
    p.heart = np.array([-20, 18, -36]) + (size - 1) * np.array([-24, -8, -6]), np.array([48, 39, 44]) * size
    centre, radii = p.heart
    ball(p, centre, radii + 4, -90, high=0)
    ball(p, centre, radii, 65, high=0)
    for shift, r in (((-16, 0, -8), (21, 18, 24)), ((16, 16, -6), (19, 14, 25)), ((4, -22, 16), (25, 11, 15)),
                     ((28, -2, 4), (14, 17, 20))):
        ball(p, centre + np.multiply(shift, size), np.multiply(r, size), p.blood, low=0, high=p.blood)
    lines = np.array([[(.1, .6, .8), (-.25, .85, .45), (-.5, .85, 0), (-.7, .6, -.45)],     # left anterior descending
                      [(-.1, .3, .95), (-.65, .1, .75), (-.95, -.2, .2), (-.85, -.4, -.3)], # circumflex
                      [(.3, .6, .75), (.7, .7, .2), (.8, .45, -.4), (.5, .1, -.85)]])       # right
    lines /= np.linalg.norm(lines, axis=2, keepdims=True)
    p.coronaries = [curve(centre + line * (radii + 1)) for line in lines]
    paint(p, *tube(p, np.concatenate(p.coronaries), 1.5), p.blood, high=100)


def anatomy(rng):
    """A healthy patient: p.vol (z, y, x) float32 HU without noise, and everything that the findings need to know."""
    p = SimpleNamespace(rng=rng)
    size = rng.uniform(.94, 1.05)                                       # standard mm -> mm
    spacing = np.array([rng.uniform(3.6, 4.1), *[rng.uniform(3.6, 4.1)] * 2])               # (z, y, x)
    shape = tuple(np.rint(rng.uniform(322, 334, 3)[[0, 1, 1]] / spacing).astype(int))
    p.spacing, p.size, p.step = spacing, size, (spacing / size).astype(np.float32)
    p.middle = ((np.array(shape) - 1) / 2 + rng.uniform(-4, 4, 3) / spacing).astype(np.float32)
    z, y, x = ((np.arange(n, dtype=np.float32) - m) * s for n, m, s in zip(shape, p.middle, p.step))
    turn = rng.uniform(-.08, .08)
    p.cos, p.sin = np.float32(math.cos(turn)), np.float32(math.sin(turn))
    p.x, p.y, p.z = p.cos * x + p.sin * y[:, None], p.cos * y[:, None] - p.sin * x, z[:, None, None]
    x, y, z = p.x, p.y, p.z                                             # (H, W), (H, W), (D, 1, 1)
    p.blood = rng.uniform(130, 190)                                     # contrast medium
    # outer shape: skin, fat, muscle, mediastinal fat
    wide, deep, fat = rng.uniform(60, 68), rng.uniform(82, 90), rng.uniform(6, 16)
    u = np.abs(x) - wide + 4
    body = 1 - (np.abs(x / (wide * 2 + 22 + fat)) ** 2.5 + np.abs(y / (deep + 16 + fat * .6)) ** 2.5) ** .4
    body *= deep + 16
    flat = np.where(body > fat, 45, -100) + np.where((body > 0) & (body < 3), 90, 0)
    flat = np.where((np.abs(x) < 34) & (np.abs(y - 15) < 62), -85, flat)
    flat = flat * soft(p, body) - 1000 * (1 - soft(p, body))
    flat = np.where(np.abs(np.hypot(x, y + 330) - 208) < 3, -500, flat)                                 # table
    p.vol = np.ascontiguousarray(np.broadcast_to(flat.astype(np.float32), shape))
    p.flat = p.vol.reshape(-1)
    # diaphragm with liver and spleen under it, then the lungs: depth is the distance in mm to the lung surface
    oval = (u / wide) ** 2 + (y / deep) ** 2
    dome = rng.uniform(-104, -94) + rng.uniform(32, 44) * (1 - oval) + np.where(x > 0, np.float32(8), 0)
    q = np.sqrt(oval + (np.maximum(z - 15, 0) / 95) ** 2)
    abdomen = np.where(x + .3 * y > -22, 105, np.where(y < -10, 120, 40)).astype(np.float32)
    share = soft(p, np.minimum(dome - z, (1.03 - np.sqrt(oval)) * wide))
    p.vol += share * (abdomen - p.vol)
    depth = np.minimum((1 - q) * wide, np.abs(x) - 22 - 6 * np.cos(y / 40))
    np.minimum(depth, z - dome, out=depth)
    air = rng.uniform(-835, -805)
    p.vol += soft(p, depth) * (air - .25 * y - p.vol)
    # ribs wind around the lungs, falling towards the front
    i, j, k = np.unravel_index(np.flatnonzero((q > 1.02) & (q < 1.13) & (u > -48) & (np.abs(z + 25) < 95)), shape)
    bone = np.abs((z[i, 0, 0] + .5 * y[j, k] + rng.uniform(0, 23)) % 23 - 11.5) < 5.5
    p.vol[i[bone], j[bone], k[bone]] = 420
    # spine and sternum: flat shapes with a profile along z
    level = np.where((z[:, 0] + rng.uniform(0, 24)) % 24 < 19, 190, 70)           # vertebrae and discs
    body = np.hypot(x / 19, (y + 60) / 16)
    canal, process = np.hypot(x, y + 84), (np.abs(x) < 4) & (np.abs(y + 100) < 6)
    for where, value in ((body < 1, level), ((body > .8) & (body < 1), level * 2), (canal < 13, 330), (canal < 8, 25),
                         (process, level * 1.6), ((np.abs(np.abs(x) - 20) < 9) & (np.abs(y + 82) < 4), level * 1.5)):
        p.vol[:, where] = value
    paint(p, (slice(None),) * 3, (np.hypot(x / 19, (y - deep - 1) / 6) < 1) * (np.abs(z - 30) < 65), 200)
    draw_heart(p, rng.uniform(.88, 1.0))
    # great vessels
    top = rng.uniform(56, 66)
    p.aorta = curve([(0, 20, -10), (10, 24, 20), (4, 14, top - 12), (-10, -6, top), (-21, -28, top - 12),
                     (-23, -40, 20), (-20, -42, -60), (-12, -40, -165)])
    p.wide = rng.uniform(11.5, 13.5)
    paint(p, *tube(p, p.aorta, p.wide), p.blood)
    for radius, *line in ((10, (-14, 30, 0), (-18, 16, 18), (-26, -4, 24), (-40, -14, 14)),         # pulmonary arteries
                          (9, (-18, 14, 20), (4, 0, 22), (24, -4, 16), (40, -10, 8)),
                          (8, (20, 12, 120), (19, 12, 50), (20, 10, -8)),                           # superior vena cava
                          (5.5, (6, 10, top), (14, 12, 165)), (4.5, (-10, 4, top), (-14, 2, 165)),  # to head and arms
                          (4.5, (-18, -8, top), (-26, -6, 165))):
        paint(p, *tube(p, curve(line), radius), p.blood)
    for radius, value in ((7, 35), (2, -600)):                          # oesophagus
        paint(p, *tube(p, curve([(-2, -24, 165), (-4, -34, 20), (-6, -34, -50), (-14, -20, -110)]), radius), value)
    # the lung voxels as one list: position, lobe, room to the next wall or fissure
    p.lung = np.flatnonzero((depth > -2) & (p.vol < -200))
    i, j, k = np.unravel_index(p.lung, shape)
    p.at = np.stack([x[j, k], y[j, k], z[i, 0, 0]], 1)                  # (K, 3)
    oblique = p.at[:, 2] + rng.uniform(.75, .95) * p.at[:, 1] + rng.uniform(0, 12) + 2e-3 * p.at[:, 1] ** 2
    across = p.at[:, 2] - rng.uniform(8, 16) + .05 * p.at[:, 1]
    right = p.at[:, 0] > 0
    p.lobe = np.where(oblique < 0, np.where(right, 3, 5), np.where(right, np.where(across < 0, 2, 1), 4))
    fissure = np.minimum(np.abs(oblique) * .75, np.where(right & (oblique > 0), np.abs(across), 99))
    heart = apart(p.at, p.heart[0]) - p.heart[1].mean()
    p.deep = depth.reshape(-1)[p.lung]
    p.clear = np.minimum(np.minimum(p.deep, heart), fissure)
    p.flat[p.lung] += 130 * np.clip(1.5 - fissure / 2, 0, 1)
    # vessels and airways from the hila to random places of each lobe
    vessels, p.bronchi = [], {}
    for lobe in range(1, 6):
        side = 1 if lobe < 4 else -1
        ends = p.at[rng.choice(np.flatnonzero((p.lobe == lobe) & (p.clear > 7)), 26)]
        vessels.append(fan((side * 36, -8, 10), ends[:22], rng.standard_normal((22, 3)) * 7))
        p.bronchi[lobe] = fan((side * 34, -16, 14), ends[22:], rng.standard_normal((4, 3)) * 6)
    paint(p, *tube(p, np.concatenate(vessels), np.tile(np.linspace(3.4, 1, 30), 110)), 40, high=-200)
    for radius, value in ((1.2, -350), (-.3, -970)):
        paint(p, *tube(p, np.concatenate([*p.bronchi.values()]), np.tile(BRONCHUS + radius, 5)), value, high=-100)
    for radius, value in ((2, 40), (0, -985)):
        for r, *line in ((8.5, (1, -2, 165), (2, -8, 90), (1, -14, 34)),
                         (6.5, (1, -14, 36), (16, -16, 22), (36, -16, 14)),
                         (6, (1, -14, 36), (-18, -16, 22), (-38, -17, 14))):
            paint(p, *tube(p, curve(line), r + radius), value)
    return p


def lesion(side=None, lobe=None, mm=None, kind=None):
    """What a report may say of a lesion; kind: of medical material."""
    return {"side": side, "lobe": lobe, "size_mm": mm, "kind": kind}


def draw(p, k, lobe, side):
    """Draws finding k into p.vol, in `lobe` (1 to 5) or on `side` where it has one of these; returns its lesions."""
    rng, (x, y, z) = p.rng, p.at.T
    mine, where = np.isin(p.lobe, SIDES[side]), LOBES[lobe]
    name = LABELS[k]
    if name == "Medical material":
        kind, s, wide = (("pacemaker", -1, 22), ("port chamber", 1, 16))[rng.integers(2)]
        ball(p, (s * 74, 76, 78), (wide, 8, wide), 3000)
        line = curve([(s * 70, 72, 80), (s * 42, 50, 96), (s * 12, 24, 92), (19, 12, 50), (20, 12, 0),
                      p.heart[0] + ((-14, 4, -14) if s < 0 else (24, 2, 6))])
        paint(p, *tube(p, line, 2.6), 2600)
        return [lesion("left" if s < 0 else "right", kind=kind)]
    if name == "Arterial wall calcification":
        points = []
        for start in rng.integers(12, 76, 5):
            part = p.aorta[start:start + 10]
            a = np.cross(part[-1] - part[0], (1, .2, .3))
            b = np.cross(part[-1] - part[0], a)
            turn = rng.uniform(0, 6.3) + np.linspace(0, 2.6, 16)[:, None]
            ring = np.cos(turn) * a / np.linalg.norm(a) + np.sin(turn) * b / np.linalg.norm(b)
            points.append((part[:, None] + ring * p.wide).reshape(-1, 3))
        paint(p, *tube(p, np.concatenate(points), 2.4), 1100)
        return [lesion()]
    if name == "Cardiomegaly":
        draw_heart(p, rng.uniform(1.28, 1.4))
        return [lesion()]
    if name == "Pericardial effusion":
        mm = rng.uniform(12, 18)
        box, d = ellipsoid(p, p.heart[0], p.heart[1] + 3, margin=mm + 4)
        paint(p, box, soft(p, d + mm) * soft(p, -d), 8, high=0)
        return [lesion(mm=mm * p.size)]
    if name == "Coronary artery wall calcification":
        part = [line[a:a + 11] for line in p.coronaries for a in (rng.integers(1, 5), rng.integers(14, 18))]
        paint(p, *tube(p, np.concatenate(part), 3.0), 1300)
        return [lesion()]
    if name == "Hiatal hernia":
        r, c = rng.uniform(24, 31), np.array([rng.uniform(-12, 2), -28, -64])
        ball(p, c, (r * 1.15, r * .9, r), 50, high=100)
        ball(p, c + (0, r * .3, r * .15), (r * .7, r * .42, r * .6), -960, high=100)
        return [lesion(mm=2 * r * p.size)]
    if name == "Lymphadenopathy":
        r = rng.uniform(13, 16.5)
        for c in rng.permutation([(26, 4, 56), (4, -24, 14), (-32, 8, 42), (6, 44, 58), (38, 0, 6), (-40, -4, 2)])[:5]:
            ball(p, c + rng.uniform(-2, 2, 3), (r, r, r * 1.3), 75, low=-940, high=70)
        return [lesion(mm=2 * r * p.size)]
    if name == "Emphysema":
        paint_lung(p, mine * np.isin(p.lobe, (1, 4)) * (waves(p, 34) > -.45), -998)
        return [lesion(side, "upper")]
    if name == "Atelectasis":
        c, _ = spot(p, lobe)
        n = np.array([*rng.uniform(-.35, .35, 2), .95])
        off = along(p, n) - c @ n + 3 * waves(p, 90)
        near = np.hypot(x - c[0], y - c[1]) < 46
        paint_lung(p, (p.lobe == lobe) * near * (np.abs(off) < 26) * soft(p, 3.6 - np.abs((off + 8.5) % 17 - 8.5)), 40)
        return [lesion(*where)]
    if name == "Lung nodule":
        found = []
        for one in [lobe] + [lobe % 5 + 1] * (rng.random() < .3):
            r = rng.uniform(7.5, 15) / p.size
            c, room = spot(p, one, r + 1)
            r = min(r, max(room, 7))
            ball(p, c, (r, r, r), 80, high=70)
            found.append(lesion(*LOBES[one], 2 * r * p.size) | {"centre": to_index(p, [c])[0]})
        return found
    if name == "Lung opacity":
        c = [spot(p, one)[0] for one in ((3, 5) if side == "bilateral" else (lobe, lobe))]
        d = np.minimum(*[apart(p.at, one) for one in c]) + 6 * waves(p, 40)
        part = np.isin(p.lobe, (3, 5)) if side == "bilateral" else p.lobe == lobe
        paint_lung(p, part * soft(p, (rng.uniform(33, 42) - d) / 2), p.flat[p.lung] + 330)
        return [lesion("bilateral", "lower") if side == "bilateral" else lesion(*where)]
    if name == "Pulmonary fibrotic sequela":
        apex = mine & (z > 62)
        paint_lung(p, apex * soft(p, np.minimum(14, (z - 60) * .4) + 3 * waves(p, 30) - p.deep), 20)
        for s in (1, -1):
            ends = p.at[apex & (x * s > 0) & (p.deep < 8)]
            if len(ends):
                line = fan((s * 42, -8, 40), rng.choice(ends, 12), rng.standard_normal((12, 3)) * 5)
                paint(p, *tube(p, line, 2.6), 30, high=-200)
        return [lesion(side, "upper")]
    if name == "Pleural effusion":
        thick = rng.uniform(34, 60)
        level = y.min() + thick * np.clip((rng.uniform(45, 75) - z) / 110, 0, 1.15) + .5 * np.maximum(np.abs(x) - 90, 0)
        share = mine * soft(p, level - y)
        paint_lung(p, share, 8)
        column = np.unravel_index(p.lung[share > .5], p.vol.shape)
        column = np.bincount(column[0] * p.vol.shape[2] + column[2])                        # voxels from back to front
        return [lesion(side, mm=column.max() * p.spacing[1])]
    if name == "Mosaic attenuation pattern":
        paint_lung(p, mine, p.flat[p.lung] + np.where(waves(p, 70) > 0, 210, -130))
        return [lesion(side)]
    if name == "Peribronchial thickening":
        for part in SIDES[side]:
            for more, value in ((5.5, 30), (.6, -985)):
                paint(p, *tube(p, p.bronchi[part], BRONCHUS + more), value, high=60)
        return [lesion(side)]
    if name == "Consolidation":
        (c, _), r, line = spot(p, lobe), rng.uniform(32, 42), p.bronchi[lobe]
        paint_lung(p, (p.lobe == lobe) * soft(p, r - apart(p.at, c) - 5 * waves(p, 35)), 45)
        near = apart(line, c) < r
        if near.any():                                      # air bronchograms
            paint(p, *tube(p, line[near], BRONCHUS[near]), -940, high=60)
        return [lesion(*where)]
    if name == "Bronchiectasis":
        c, _ = spot(p, lobe)
        inside = p.at[(p.lobe == lobe) & (apart(p.at, c) < 44) & (p.deep > 4)]
        line = fan(c, rng.choice(inside, 9), rng.standard_normal((9, 3)) * 5).reshape(9, 30, 3)[:, 8:].reshape(-1, 3)
        for radius, value in ((8, 60), (4.8, -1000)):
            paint(p, *tube(p, line, radius), value, high=70)
        return [lesion(*where)]
    share, bend = np.zeros(len(p.lung), np.float32), 2.5 * waves(p, 60)       # Interlobular septal thickening
    for n in np.linalg.qr(rng.standard_normal((3, 3)))[0]:
        share = np.maximum(share, soft(p, 1.6 - np.abs((along(p, n) + bend) % 19 - 9.5)))
    paint_lung(p, share * (p.deep < 32) * np.isin(p.lobe, (3, 5)) * mine, -150)
    return [lesion(side, "lower")]


# Of each label: its name where it is denied | what a report says where it is present (`at` a place, `on` a side).
WORDS = """
medical device | A {kind} is seen on the {side} chest wall | There is a {kind} in the {side} anterior chest wall
aortic wall calcification | Calcific plaques are observed in the aorta | There are wall calcifications in the aorta
cardiomegaly | Heart size is increased | The heart is larger than normal | Cardiomegaly is present
pericardial effusion | Pericardial effusion of {mm} mm is observed | There is pericardial effusion up to {mm} mm thick
coronary calcification | Calcifications are observed in the coronary arteries | There are coronary calcific plaques
hiatal hernia | A hiatal hernia measuring {mm} mm is observed | There is a hiatal hernia with a diameter of {mm} mm
lymphadenopathy | Enlarged lymph nodes with a short axis of {mm} mm are seen | There is lymphadenopathy of {mm} mm
emphysema | Emphysematous changes are observed {at} | There is emphysema {at} | Centrilobular emphysema is seen {at}
atelectasis | Linear atelectasis is observed {at} | There are bands of atelectasis {at} | Plate atelectasis is seen {at}
pulmonary nodule | A nodule measuring {mm} mm is observed {at} | There is a {mm} mm solid nodule {at}
ground glass opacity | Ground glass opacity is observed {at} | There is an area of ground glass opacity {at}
fibrotic sequela | Pleuroparenchymal fibrotic sequela changes are observed {at} | There are fibrotic bands {at}
pleural effusion | Pleural effusion reaching {mm} mm is observed {on} | There is free pleural effusion of {mm} mm {on}
mosaic attenuation | Mosaic attenuation pattern is observed {at} | There is a mosaic attenuation pattern {at}
peribronchial thickening | Peribronchial thickening is observed {at} | There is peribronchial wall thickening {at}
consolidation | Consolidation with air bronchograms is observed {at} | There is an area of consolidation {at}
bronchiectasis | Bronchiectasis is observed {at} | There are bronchiectatic changes {at} | Bronchiectasis is seen {at}
interlobular septal thickening | Interlobular septal thickening is seen {at} | There is interlobular thickening {at}
""".strip().splitlines()
DENIALS = "no {} was detected | there is no {} | {} was not detected | no {} is seen"
BEFORE = ("Trachea and both main bronchi are open | The trachea is in the midline and both main bronchi are open",
          "Mediastinal vascular structures were evaluated with contrast | The caliber of the aorta is normal",
          "The esophagus is normal | The esophagus shows a normal course")
AFTER = ("The upper abdominal organs in the sections are normal | The liver and spleen are normal in the sections",
         "Bone structures in the study area are natural | Vertebral body heights are preserved")
MEDIASTINUM, LUNGS = (0, 2, 3, 1, 4, 6, 5), (15, 10, 9, 7, 8, 11, 13, 14, 16, 17, 12)      # order of the report


def write_report(lesions, rng):
    """A report (str) that names every lesion with its place and size and denies some of what is absent."""
    def pick(phrases):
        return rng.choice(phrases.split(" | "))

    absent = [k for k, label in enumerate(LABELS) if label not in [one["label"] for one in lesions]]
    denied = rng.permutation(absent)[:max(0, rng.integers(3, 11) - len(lesions))]
    text = [pick(phrases) for phrases in BEFORE]          # with AFTER 5 sentences; between them 3 to 10 or all lesions
    for order in (MEDIASTINUM, LUNGS):
        for k in np.array(order)[np.argsort(np.arange(len(order)) + rng.uniform(0, 2.5, len(order)))]:
            name, phrases = WORDS[k].split(" | ", 1)
            for one in lesions:
                if one["label"] == LABELS[k]:
                    side, lobe, both = one["side"], one["lobe"], one["side"] == "bilateral"
                    whole = "in both lungs" if both else f"in the {side} lung"
                    part = f"in both {lobe} lobes | in the {lobe} lobes of both lungs" if both else \
                        f"in the {side} {lobe} lobe | in the {lobe} lobe of the {side} lung"
                    text.append(pick(phrases).format(
                        at=pick(part) if lobe else whole, on="on both sides" if both else f"on the {side}", side=side,
                        mm=one["size_mm"] and round(one["size_mm"]), kind=one["kind"]))
            if k in denied:
                text.append(pick(DENIALS).format(name))
    text += [pick(phrases) for phrases in AFTER]
    return " ".join(one[0].upper() + one[1:] + "." for one in text)


def phantom(seed, index, findings=None, with_healthy=False):
    """One synthetic patient with a chest CT; the same arguments give the same voxels and words.

    findings: label numbers to draw, or None for a random set. Returns a dict: volume int16 HU (z, y, x) in RAS;
    spacing (z, y, x) mm; affine (4, 4) of the voxel indices (x, y, z); mask uint8 (z, y, x), k + 1 where finding k
    changed the voxels (the later in ORDER wins); labels float32 (18,); report; lesions: dicts of label, side, lobe,
    size_mm, kind and centre (z, y, x) in voxels; stored: the orientation in which `write_demo` writes it. with_healthy
    adds `healthy`, the volume of the same patient and noise without any finding.
    """
    anatomist, fate, noise, writer = (np.random.default_rng([seed, index, n]) for n in range(4))
    p = anatomy(anatomist)
    drawn = np.flatnonzero(fate.random(18) < PREVALENCE)
    lobes = 1 + fate.permutation(5)                         # so that the great lesions of one lobe do not meet
    grain = noise.standard_normal(p.vol.shape, dtype=np.float32) * np.float32(noise.uniform(12, 28))

    def scan():
        outside = 9000 * (np.hypot(p.x, p.y) > 172)         # the scanner's round field of view
        return np.clip(p.vol + grain - outside.astype(np.float32), -1024, 3071).astype(np.int16)
    healthy = scan() if with_healthy else None
    mask, lesions = np.zeros(p.vol.shape, np.uint8), []
    for k in ORDER:
        if k not in (drawn if findings is None else findings):
            continue
        p.rng = np.random.default_rng([seed, index, 4 + k])
        before = p.vol.copy()
        side = ("right", "left", "bilateral")[p.rng.choice(3, p=(.3, .3, .4))]
        found = draw(p, k, int(lobes[BULKY.index(k) if k in BULKY else 0]), side)
        changed = np.abs(p.vol - before) > 60
        mask[changed] = k + 1
        middle = np.mean(np.unravel_index(np.flatnonzero(changed), changed.shape), 1)
        lesions += [one | {"label": LABELS[k], "centre": one.get("centre", middle)} for one in found]
    labels = np.zeros(18, np.float32)
    labels[[LABELS.index(one["label"]) for one in lesions]] = 1
    affine = np.diag([*p.spacing[::-1], 1])
    affine[:3, 3] = np.round(writer.uniform((-170, -190, -900), (-150, -130, 200)), 1)
    out = dict(volume=scan(), spacing=p.spacing, affine=affine, mask=mask, labels=labels, lesions=lesions,
               report=write_report(lesions, writer), stored=STORED[index % 4] if fate.random() < .25 else "RAS")
    return out | {"healthy": healthy} if with_healthy else out


def save_nifti(path, array, affine, stored="LPS"):
    """Writes an array (z, y, x), whose (x, y, z) index `affine` takes to RAS mm, as .nii.gz in orientation `stored`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nib.Nifti1Image(array.transpose(2, 1, 0), affine)
    image.header.set_xyzt_units("mm")
    start, end = (nib.orientations.axcodes2ornt(codes) for codes in ("RAS", stored))
    image = image.as_reoriented(nib.orientations.ornt_transform(start, end))
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))             # no time: the same bytes


def write_phantom(out, seed, index):
    """Writes volume and mask of one phantom under `out`, in its stored orientation; returns its row of the manifest."""
    p = phantom(seed, index)
    names = f"volumes/demo_{index:04d}.nii.gz", f"masks/demo_{index:04d}.nii.gz"
    for name, array in zip(names, (p["volume"], p["mask"])):
        part = Path(out, name + ".part")
        save_nifti(part, array, p["affine"], p["stored"])
        os.replace(part, Path(out, name))
    return [names[0], p["report"], "train" if index % 10 < 7 else "test", f"demo-{seed}-{index:04d}",
            *p["labels"].astype(int).tolist(), names[1]]


def write_demo(out, n=64, seed=0, workers=None):
    """Writes n phantoms as NIfTI with masks and, last, the manifest; returns the path of OUT/manifest.csv.

    A complete folder of the same n and seed is left as it is. The bytes depend on seed and index only, not on n or
    `workers` (processes; default: one a core).
    """
    manifest, part = Path(out, "manifest.csv"), Path(out, "manifest.csv.part")
    if manifest.exists():
        with manifest.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        # the last report, too: another version of these functions would have written another
        if len(rows) == n and (rows[-1]["patient"], rows[-1]["report"]) == (
                f"demo-{seed}-{n - 1:04d}", phantom(seed, n - 1)["report"]) \
                and all(Path(out, row[key]).exists() for row in rows for key in ("volume", "mask")):
            return manifest
        manifest.unlink()
    for folder in ("volumes", "masks"):
        Path(out, folder).mkdir(parents=True, exist_ok=True)
    with multiprocessing.Pool(workers) as pool:
        rows = list(tqdm(pool.imap(partial(write_phantom, out, seed), range(n), chunksize=4), total=n, desc="phantoms"))
    with part.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["volume", "report", "split", "patient", *LABELS, "mask"], *rows])
    os.replace(part, manifest)
    return manifest


# --------------------------------------------------------------------------------- demo sets of the nine tasks
# A writer takes (out, seed, index), writes the files of one patient in the layout of its task, and returns what the
# index files say of them. Arrays are (z, y, x) in RAS, points and spacings (z, y, x) in mm.

def save_metaimage(path, array, affine):
    """The same without rotation as .mha or .mhd with its .raw; x runs to the left and y to the back, as ITK has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array[:, ::-1, ::-1])
    image.SetSpacing(np.diag(affine)[:3].tolist())
    last = affine @ [array.shape[2] - 1, array.shape[1] - 1, 0, 1]
    image.SetOrigin((last[:3] * (-1, -1, 1)).tolist())
    sitk.WriteImage(image, str(path), path.suffix == ".mha")


def save_csv(path, columns, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


def save_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def chest(seed, index):
    """The healthy patient of `phantom` to paint on, with a random source of its own, and its affine."""
    p = anatomy(np.random.default_rng([seed, index, 0]))
    p.rng = np.random.default_rng([seed, index, 100])
    affine = np.diag([*p.spacing[::-1], 1])
    affine[:3, 3] = np.round(p.rng.uniform((-170, -190, -900), (-150, -130, 200)), 1)
    return p, affine


def noisy(volume, rng):
    """HU with the noise of a scanner, int16."""
    grain = rng.standard_normal(volume.shape, dtype=np.float32) * np.float32(rng.uniform(12, 24))
    return np.clip(volume + grain, -1024, 3071).astype(np.int16)


def opacities(p):
    """Paints COVID-19 into the lungs: a hazy patch in each of the five lobes."""
    distance = np.min([apart(p.at, spot(p, lobe, 4)[0]) for lobe in range(1, 6)], 0) + 6 * waves(p, 40)
    paint_lung(p, soft(p, (p.rng.uniform(34, 44) - distance) / 2), p.flat[p.lung] + 380)


def consolidation(p, lobe):
    """Paints most of a lobe without air."""
    share = soft(p, p.rng.uniform(46, 60) - apart(p.at, spot(p, lobe)[0]) - 5 * waves(p, 35))
    p.flat[p.lung] += (p.lobe == lobe) * share * (45 - p.flat[p.lung])


def cc_ccii_demo(out, seed, index):
    """Normal: nothing; CP: consolidation of one lobe; NCP: opacities in both lungs. Every fourth patient has two scans."""
    (p, _), target, name = chest(seed, index), index % 3, ("Normal", "CP", "NCP")[index % 3]
    if target == 1:
        consolidation(p, int(p.rng.integers(1, 6)))
    elif target == 2:
        opacities(p)
    grey = (np.clip((noisy(p.vol, p.rng) + 1000) / 1400, 0, 1) * 255).astype(np.uint8)[:, ::-1, ::-1]    # -1000 … 400 HU
    patient, scans = 1000 + index, [2 * index + 1, 2 * index + 2][:2 if index // 3 % 4 == 0 else 1]
    for first, scan in enumerate(scans):
        folder = Path(out, name, str(patient), str(scan))
        folder.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(grey[first::2]):                                        # feet first
            sitk.WriteImage(sitk.GetImageFromArray(picture), str(folder / f"{i:04d}.png"))
    part = "valid" if index // 3 % 3 == 2 else "train"
    return [(part, f"{name}-{index // 30 + 1}.zip", target, name, patient, scan, len(grey[first::2]), len(scans), scans)
            for first, scan in enumerate(scans)]


def cc_ccii_index(out, rows):
    for part in ("train", "valid"):
        save_csv(Path(out, f"CC_CCII_fold0_{part}.csv"),
                 "zip_file target label patient_id scan_id n_slice scan_count all_scan_ids".split(),
                 [row[1:] for scans in rows for row in scans if row[0] == part])


def luna16_demo(out, seed, index):
    """Both lungs at 2.5 × 2 × 2 mm with four nodules of 9 to 20 mm; 16 other places: air, pleura, vessels."""
    p, _ = chest(seed, index)
    voxels = np.stack(np.unravel_index(p.lung, p.vol.shape), 1)                             # (K, 3)
    low, high = voxels.min(0) - 3, voxels.max(0) + 4
    box = p.vol[tuple(slice(a, b) for a, b in zip(low, high))]
    size = np.rint(box.shape * p.spacing / (2.5, 2, 2)).astype(int)
    volume = F.interpolate(torch.from_numpy(box)[None, None], size=size.tolist(), mode="trilinear")[0, 0].numpy()
    spacing = box.shape * p.spacing / size
    at = (voxels - low + .5) * p.spacing                                                    # mm from the box's corner
    z, y, x = np.ogrid[tuple(slice(0, n) for n in size)]
    value, rows, nodules = p.flat[p.lung], [], []

    def draw_place(allowed, away):
        far = [np.linalg.norm(at - one, axis=1) > away for one in nodules]
        return p.rng.choice(at[np.all([allowed, *far], axis=0)])
    air = (p.clear > 13) & (value < -600)
    for _ in range(4):
        centre, radius = draw_place(air, 32), p.rng.uniform(4.5, 10)
        nodules.append(centre)
        distance = np.sqrt(sum(((i + .5) * s - c) ** 2 for i, s, c in zip((z, y, x), spacing, centre)))
        volume += np.clip((radius - distance) / 2 + .5, 0, 1).astype(np.float32) * (p.rng.uniform(40, 120) - volume)
    others = (air,) * 6 + ((p.deep > 1) & (p.deep < 6),) * 5 + ((p.deep > 10) & (value > -300),) * 5
    places = [(one, 1) for one in nodules] + [(draw_place(allowed, 42), 0) for allowed in others]
    affine = np.diag([*spacing[::-1], 1])
    affine[:3, 3] = np.round(p.rng.uniform((-150, -140, -400), (-100, -60, -100)), 1)
    uid = f"1.3.6.1.4.1.14519.5.2.1.6279.6001.{10 ** 29 + 1000 * seed + index}"
    save_metaimage(Path(out, f"subset{index % 10}", uid + ".mhd"), noisy(volume, p.rng), affine)
    for place, positive in places:
        world = affine @ [*(place / spacing - .5)[::-1], 1]
        rows.append((uid, *np.round(world[:3] * (-1, -1, 1), 4).tolist(), positive))        # LPS
    return rows


def msd_lung_demo(out, seed, index):
    """A solid tumour of 30 to 50 mm in one lung; every 15th case is a test image without label."""
    p, affine = chest(seed, index)
    radius, mask = p.rng.uniform(15, 25), np.zeros(p.vol.shape, np.uint8)
    centre, _ = spot(p, int(p.rng.integers(1, 6)), radius + 2)
    share = soft(p, radius - apart(p.at, centre) - 2 * waves(p, 30))
    p.flat[p.lung] += share * (p.rng.uniform(40, 80) - p.flat[p.lung])
    mask.reshape(-1)[p.lung[share > .5]] = 1
    test, name = index % 15 == 14, f"lung_{index + 1:03d}.nii.gz"
    save_nifti(Path(out, "imagesTs" if test else "imagesTr", name), noisy(p.vol, p.rng), affine, STORED[index % 4])
    if test:
        return f"./imagesTs/{name}"
    save_nifti(Path(out, "labelsTr", name), mask, affine, STORED[index % 4])
    return {"fold": index % 5, "image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"}


def decathlon_index(file, name, lesion, out, rows):
    """The JSON of the Decathlon, with folds; a row that is a str is a test image."""
    training, test = ([row for row in rows if isinstance(row, kind)] for kind in (dict, str))
    save_json(Path(out, file), {"name": name, "description": "synthetic", "tensorImageSize": "3D", "modality": {"0": "CT"},
                                "labels": {"0": "background", "1": lesion}, "numTraining": len(training),
                                "numTest": len(test), "training": training, "test": test})


def covid_19_20_demo(out, seed, index):
    """Lung opacity, and in every other patient a consolidation with it."""
    p, name = phantom(seed, index, [10] if index % 2 else [10, 15]), f"volume-covid19-A-{index + 1:04d}"
    save_nifti(Path(out, f"{name}_ct.nii.gz"), p["volume"], p["affine"], STORED[index % 4])
    save_nifti(Path(out, f"{name}_seg.nii.gz"), (p["mask"] > 0).astype(np.uint8), p["affine"], STORED[index % 4])
    return {"fold": index % 5, "image": f"{name}_ct.nii.gz", "label": f"{name}_seg.nii.gz"}


def acdc_demo(out, seed, index):
    """Short-axis heart at end-diastole and end-systole: 1 right ventricle, 2 myocardium, 3 left ventricle."""
    rng, name = np.random.default_rng([seed, index]), f"patient{index + 1:03d}"
    slices, (height, width), step = int(rng.integers(9, 12)), rng.integers(64, 81, 2), rng.uniform(2.7, 3.2)
    y, x = ((np.arange(n) - (n - 1) / 2) * step for n in (height, width))
    y, level = y[:, None], np.arange(slices)[:, None, None]
    affine = np.diag([step, step, 10, 1])
    affine[:3, 3] = np.round(rng.uniform(-120, 20, 3), 1)
    # chest wall with its fat, lungs, liver at the lower right, spine
    body = np.hypot(x / (width * step / 2 - 5), y / (height * step / 2 - rng.uniform(5, 20)))
    tissue = np.where(body > 1, 6, np.where(body > .93, 230, 75.))
    lungs = np.minimum(np.hypot((np.abs(x) - 62) / 30, (y + 5) / 58), np.hypot(x / 70, (y + 42) / 18))
    tissue = np.where(lungs < 1, 22, tissue)
    tissue = np.where(np.hypot(x, y + 72) < 15, 120, tissue)
    tissue = np.where((level < 4) & (np.hypot(x - 62, y - 5) < 40), 110, tissue)            # (slices, H, W)
    waviness = sum(np.cos((x * one[0] + y * one[1] + level * 10 * one[2]) / 9 + one[3] * 6)
                   for one in rng.uniform(-1, 1, (6, 4)))
    bias = np.exp((x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1)) / 250) * np.exp(rng.uniform(-1, 1.5))
    centre, turn = rng.uniform(-12, 12, 2), rng.uniform(-.2, .7)
    u = (x - centre[0]) * math.cos(turn) + (y - centre[1]) * math.sin(turn)                # towards the right ventricle
    v = (y - centre[1]) * math.cos(turn) - (x - centre[0]) * math.sin(turn)
    cavity, wall, basal = rng.uniform(21, 27), rng.uniform(8, 11), 1 - (level - 1) / (slices - 3)     # 0 base, 1 apex
    end_systole = int(rng.integers(8, 15))
    for frame, small in ((1, 1), (end_systole, rng.uniform(.6, .72))):
        inner = cavity * small * np.sqrt(1 - .8 * np.clip(basal, 0, 1) ** 2)
        outer = inner + wall * (1 if frame == 1 else 1.25)
        right = np.hypot((u - outer * .8) / (cavity * 1.1 * small ** .6 * (1 - .7 * np.clip(basal, 0, 1))),
                         v / (outer * 1.1)) < 1
        label = np.where(np.hypot(u, v) < inner, 3, np.where(np.hypot(u, v) < outer, 2, right & (basal < .8)))
        label = (label * ((level > 0) & (level < slices - 1))).astype(np.uint8)
        image = np.choose(label, (tissue, 190, 85, 205)) * (1 + .04 * waviness) + 6 * rng.standard_normal(label.shape)
        stem = Path(out, "training", name, f"{name}_frame{frame:02d}")
        save_nifti(stem.with_name(stem.name + ".nii.gz"), np.clip(image * bias, 0, 3e4).astype(np.int16), affine)
        save_nifti(stem.with_name(stem.name + "_gt.nii.gz"), label, affine)
    Path(out, "training", name, "Info.cfg").write_text(
        f"ED: 1\nES: {end_systole}\nGroup: NOR\nHeight: {rng.uniform(155, 190):.1f}\nNbFrame: 30\n"
        f"Weight: {rng.uniform(55, 95):.1f}\n", encoding="utf-8")


def stoic_demo(out, seed, index):
    """A third negative, a third with opacities (COVID-19), a third with consolidations in both lungs as well (severe)."""
    (p, affine), covid, severe = chest(seed, index), index % 3 > 0, index % 3 == 2
    if covid:
        opacities(p)
        for lobe in (3, 5) if severe else ():
            consolidation(p, lobe)
    elif index // 3 % 2:                                                # emphysema, cardiomegaly or a nodule instead
        draw(p, (7, 2, 9)[index // 6 % 3], 1, "bilateral")
    save_metaimage(Path(out, "data/mha", f"{index + 1}.mha"), noisy(p.vol, p.rng), affine)
    return index + 1, int(covid), int(severe)


def ctrg_demo(out, seed, index):
    """Opacities and a large heart in every other patient, a consolidation of a lower lobe in two of three."""
    (p, affine), name = chest(seed, index), f"{index + 1}.nii.gz"
    haze, large, side = p.rng.random() < .5, p.rng.random() < .5, (None, "right", "left")[p.rng.integers(3)]
    if large:
        draw(p, 2, 1, "bilateral")
    if haze:
        opacities(p)
    if side:
        consolidation(p, 3 if side == "right" else 5)
    sentences = ("Thorax is symmetrical",
                 "Hazy opacities are scattered through both lungs" if haze else "Neither lung shows any ground glass",
                 f"Dense consolidation with air bronchograms fills the {side} lower lobe" if side else "No segment is airless",
                 "Marked enlargement of the cardiac silhouette is noted" if large else "The heart is of normal size and shape")
    findings = ["pneumonia"] * (haze or side is not None) + ["cardiomegaly"] * large
    save_nifti(Path(out, "volumes", name), noisy(p.vol, p.rng), affine, STORED[index % 4])
    return {"id": name, "report": ". ".join(sentences) + ".", "image_path": f"./volumes/{name}",
            "result": "; ".join(findings).capitalize() + "." if findings else "No abnormality.",
            "split": "train" if index % 10 < 7 else "val"}


def ctrg_index(out, rows):
    held_out = [row for row in rows if row["split"] == "val"]                               # val and test are the same
    save_json(Path(out, "ctrg_chest.json"), {"train": [row for row in rows if row["split"] == "train"],
                                             "val": held_out, "test": held_out})


def ct_rate_demo(out, seed, index):
    """Any of the 18, those that take much room more often; every sixth scan has a second, thicker reconstruction."""
    often = np.isin(np.arange(18), (0, 2, 3, 5, 7, 12, 13, 15))
    rng = np.random.default_rng([seed, index, 100])
    p = phantom(seed, index, np.flatnonzero(rng.random(18) < np.where(often, .35, .12)))
    split = "train" if index % 5 < 3 else "valid"
    name, rows = f"{split}_{index + 1}_a", []
    for number in (1, 2) if index % 6 == 0 else (1,):
        volume, affine = p["volume"], p["affine"].copy()
        if number == 2:             # slices in pairs, other noise, and stored with 1024 added, as CT-RATE v1 has them
            volume = noisy(volume[:len(volume) // 2 * 2].reshape(-1, 2, *volume.shape[1:]).mean(1), rng) + np.int16(1024)
            affine[2, 3] += affine[2, 2] / 2
            affine[2, 2] *= 2
        save_nifti(Path(out, split, name.removesuffix("_a"), name, f"{name}_{number}.nii.gz"), volume, affine, "LPS")
        spacing = np.diag(affine).round(4).tolist()
        impression = "\n".join(dict.fromkeys(found["label"] + "." for found in p["lesions"])) or "Not given."
        rows.append((split, f"{name}_{number}.nii.gz", ("Not given.", "Chest CT with contrast.", p["report"], impression),
                     p["labels"].astype(int).tolist(), (1, -1024, str(spacing[:2]), spacing[2])))
    return rows


def ct_rate_index(out, rows):
    for split, word in (("train", "train"), ("valid", "validation")):
        mine = [row for scan in rows for row in scan if row[0] == split]
        for k, (file, columns) in enumerate((
                (f"radiology_text_reports/{word}_reports.csv",
                 ["ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"]),
                (f"multi_abnormality_labels/{split}_predicted_labels.csv", list(LABELS)),
                (f"metadata/{word}_metadata.csv", ["RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"]))):
            save_csv(Path(out, file), ["VolumeName", *columns], [(row[1], *row[k + 2]) for row in mine])
        left_out = [row[1] for row in mine if row[1] == "train_1_a_2.nii.gz"]
        Path(out, f"metadata/no_chest_{split}.txt").write_text("".join(f"{one}\n" for one in left_out), encoding="utf-8")


TASK_DEMOS = {      # patients by default, what writes one of them, what writes the index files
    "cc-ccii": (72, cc_ccii_demo, cc_ccii_index),
    "luna16": (40, luna16_demo, lambda out, rows: save_csv(
        Path(out, "candidates_V2.csv"), "seriesuid coordX coordY coordZ class".split(), sum(rows, []))),
    "msd-lung": (30, msd_lung_demo, partial(decathlon_index, "dataset.json", "Lung", "cancer")),
    "covid-19-20": (30, covid_19_20_demo, partial(decathlon_index, "Covid19_20_folds.json", "Covidv2_1920", "lesion")),
    "acdc": (24, acdc_demo, lambda out, rows: None),
    "stoic": (150, stoic_demo, lambda out, rows: save_csv(
        Path(out, "metadata/reference.csv"), "PatientID probCOVID probSevere".split(), rows)),
    "ctrg": (160, ctrg_demo, ctrg_index),
    "ct-rate-vocab": (160, ct_rate_demo, ct_rate_index),
    "ct-rate-retrieval": (240, ct_rate_demo, ct_rate_index),
}
FAST = {"encoder": "swin_t", "lr": 1e-3, "lr_encoder": 1e-3, "warmup": 1}
DEMO_RECIPES = {    # flags of finetune.py with which a demo set is learned on two cores in minutes
    "cc-ccii": FAST | {"size": (32, 32, 32), "epochs": 40, "batch_size": 4, "lr": 3e-4, "lr_encoder": 3e-4},
    "luna16": FAST | {"size": (32, 32, 32), "epochs": 12, "batch_size": 8},
    "msd-lung": FAST | {"size": (32, 32, 32), "spacing": (6., 6., 6.), "epochs": 15, "batch_size": 1, "eval_every": 5},
    "covid-19-20": FAST | {"size": (32, 32, 32), "spacing": (6., 6., 6.), "epochs": 15, "batch_size": 1, "eval_every": 5},
    "acdc": FAST | {"size": (32, 32, 32), "spacing": (5., 4., 4.), "epochs": 12, "batch_size": 1, "eval_every": 4},
    "stoic": FAST | {"size": (32, 32, 32), "epochs": 6, "batch_size": 4},
    # A word decoder at 1e-3 drowns the image before it is heard: the loss then stays at what the words alone allow.
    "ctrg": FAST | {"size": (32, 32, 32), "epochs": 16, "batch_size": 4, "decay": "cosine", "eval_every": 4, "lr": 1e-4, "lr_encoder": 1e-4},
    "ct-rate-vocab": FAST | {"text_encoder": "demo", "embed_dim": 192, "size": (32, 32, 32), "epochs": 25, "batch_size": 4, "lr": 3e-4, "lr_encoder": 3e-4, "eval_every": 5},
    "ct-rate-retrieval": FAST | {"text_encoder": "demo", "embed_dim": 192, "size": (32, 32, 64), "epochs": 9, "batch_size": 8},
}


def write_task_demo(task, out, n=None, seed=0, workers=None):
    """Writes a synthetic set of one of the nine tasks in its native layout, n patients; returns what `--data` takes.

    The index files come last; beside them recipe.json, flags for finetune.py. The bytes of a patient depend on task,
    seed and index only, not on n or `workers` (processes; default: one a core).
    """
    count, write, write_index = TASK_DEMOS[task]
    n, out = n or count, Path(out)
    out.mkdir(parents=True, exist_ok=True)
    own_seed = 1000 * (1 + list(TASK_DEMOS).index(task)) + seed         # other patients than the phantoms of pre-training
    with multiprocessing.Pool(workers) as pool:
        rows = list(tqdm(pool.imap(partial(write, out, own_seed), range(n)), total=n, desc=task, unit="patient"))
    save_json(out / "recipe.json", DEMO_RECIPES[task])
    write_index(out, rows)
    return out


# ---------------------------------------------------------------------------------------------------- commands

def report_table(reports):
    """Print how many sentences and words the reports have, and what the limits of pre-training cut."""
    sentences = [split_sentences(report) for report in reports]
    rows = {"sentences a report": [len(split) for split in sentences],
            "words a report": [len(report.split()) for report in reports],
            "words a sentence": [len(sentence.split()) for split in sentences for sentence in split]}
    print(f"\n{'':20}{'min':>7}{'25 %':>7}{'median':>7}{'75 %':>7}{'max':>7}")
    for name, counts in rows.items():
        print(f"{name:20}" + "".join(f"{value:7.0f}" for value in np.quantile(counts or [0], (0, 0.25, 0.5, 0.75, 1))))
    pieces = [len(re.findall(r"\w+|[^\w\s]", report)) for report in reports]
    print(f"{len(reports)} reports: {sum(not split for split in sentences)} empty, "
          f"{sum(len(split) > 32 for split in sentences)} with more than 32 sentences, {sum(n > 248 for n in pieces)} "
          "with more than 250 tokens even if each word is one: there the last sentences are left out.")


def save_picture(volume, path):
    """Axial, coronal and sagittal middle slice of a volume (1, D, H, W) as PNG; the patient's right is on the left."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    volume = volume[0].numpy()[:, :, ::-1]
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.4))
    for k, (axis, name) in enumerate(zip(axes, ("axial", "coronal", "sagittal"))):
        axis.imshow(volume.take(volume.shape[k] // 2, k), cmap="gray", vmin=0, vmax=1, origin="lower", aspect="auto")
        axis.set_title(name)
        axis.axis("off")
    figure.savefig(path, bbox_inches="tight")
    plt.close(figure)


def check_task(args):
    """Print what the data of --task hold, and read the first --limit scans and masks; 1 if there is a problem."""
    task, problems = TASKS[args.task], 0
    try:
        items = load_task(args.task, args.data, args.fold)
    except ValueError as error:
        known = task.layout in str(error)
        raise ValueError(str(error) + ("" if known else f"\n{args.task} lies on disk as: {task.layout}")) from error
    print(f"{args.task}: {task.layout}")
    for split in SPLITS:
        part = [item for item in items if item.split == split]
        classes = [f"{np.sum([item.labels[k] == 1 for item in part])} {name}" for k, name in enumerate(task.classes)
                   ] if part and part[0].labels is not None else [f"{len(part)} with masks"] * (task.kind == "segment")
        print(f"{split:6} {len(part):7} items of {len({item.patient for item in part})} patients in "
              f"{len({item.volume for item in part})} scans" + (": " if classes else "") + ", ".join(classes))
    scans, candidates = list({item.volume: item for item in items}.values())[:args.limit], {}
    for item in items if task.view == "cube" else ():
        candidates.setdefault(item.volume, []).append(item)
    for item in tqdm(scans, unit="scan", disable=None):
        try:
            array, spacing, affine = read_volume(item.volume)
            note = to_hounsfield(array, item.volume, args.hu, item.rescale)[1] if task.window else "no CT: z-score"
            for one in candidates.get(item.volume, ()):
                candidate_voxel(one, array.shape, affine)
            if item.mask:
                values, counts = np.unique(_read_mask(item, task, array.shape, affine), return_counts=True)
                note += "; voxels " + ", ".join(f"{value:g}: {count}" for value, count in zip(values, counts))
        except ValueError as error:
            problems += 1
            tqdm.write(f"{item.volume.name[-32:]:32} PROBLEM {error}")
            continue
        tqdm.write(f"{item.volume.name[-32:]:32} {'x'.join(map(str, array.shape)):>13} "
                   f"{' '.join(f'{side:.2f}' for side in spacing):>17} {array.min():.0f}..{array.max():.0f}  {note}")
    print(f"{len(scans)} scans read, {problems} of them with a problem")
    return int(problems > 0)


def check(args):
    """Print the table of `data.py check`; the exit code is 1 if there is a problem."""
    if args.reports:
        text = _utf8(args.reports)
        if text.lstrip().startswith("{"):
            rows = [row for split, rows in json.loads(text).items() if split != "val" for row in rows]
        else:
            rows = [row for _, row in _rows(args.reports)]
        columns = [name for name in ("report_text", "report", "Findings_EN") if rows and name in rows[0]]
        if not columns:
            raise ValueError(f"{args.reports}: found no report, expected a column report_text, report or Findings_EN")
        report_table([row[columns[0]] for row in rows])
        return 0

    if args.task:
        return check_task(args)
    items = load_items(args.data, args.cache)
    problems = left_out = len(_all_items(args.data, args.cache)) - len(items)
    print(f"{'volume':32} {'z, y, x':>13} {'spacing (mm)':>17} {'axes':4} {'HU':>13} {'words':>5} {'sent.':>5}  note")
    for item in tqdm(items[:args.limit], unit="volume", disable=None):
        text = f"{len(item.report.split()):5} {len(split_sentences(item.report)):5}"
        try:
            xyz, stored_affine = read_stored(item.volume)
            array, spacing, _ = to_ras(item.volume, xyz, stored_affine)
            array, note = to_hounsfield(array, item.volume, args.hu, item.rescale)
            volume = preprocess(array, spacing, args.size)
        except ValueError as error:
            problems += 1
            tqdm.write(f"{item.id[-32:]:32} {'':50} {text}  PROBLEM {error}")
            continue
        tqdm.write(f"{item.id[-32:]:32} {'x'.join(map(str, array.shape)):>13} "
                   f"{' '.join(f'{side:.2f}' for side in spacing):>17} {''.join(nib.aff2axcodes(stored_affine)):4} "
                   f"{f'{array.min():.0f}..{array.max():.0f}':>13} {text}  {note}")
        if args.pictures:
            args.pictures.mkdir(parents=True, exist_ok=True)
            save_picture(volume, args.pictures / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', item.id)}.png")
    report_table([item.report for item in items])
    counts = ", ".join(f"{sum(item.split == split for item in items)} {split}" for split in SPLITS)
    print(f"{len(items)} volumes ({counts}) of {len({item.patient for item in items})} patients, "
          f"{sum(item.labels is not None for item in items)} with labels; {len(items[:args.limit])} read, "
          f"{problems - left_out} of them with a problem; {left_out} left out for want of a report or a file.")
    return int(problems > 0)


def _fill_cache(job):
    torch.set_num_threads(1)
    item, cache, size, hu = job
    try:
        load_volume(item, cache, size, hu)
    except ValueError as error:
        return f"{item.id}: {error}"


def fill_cache(args):
    """Preprocess all volumes that the cache lacks; the exit code is 1 if more than 5 % cannot be read."""
    items = load_items(args.data, args.cache)
    todo = [item for item in items if not cache_path(args.cache, item, args.size, args.hu).exists()]
    args.cache.mkdir(parents=True, exist_ok=True)
    needed, free = len(todo) * math.prod(args.size) * 2, shutil.disk_usage(args.cache).free
    print(f"{len(items)} volumes, {len(items) - len(todo)} of them in {args.cache}; the rest takes "
          f"{needed / 1e9:.2f} GB of {free / 1e9:.2f} GB free")
    if needed > free:
        raise ValueError(f"{args.cache}: found {free / 1e9:.2f} GB free, expected {needed / 1e9:.2f} GB")
    failed = []
    jobs = [(item, args.cache, args.size, args.hu) for item in todo]
    for failure in tqdm(_in_processes(_fill_cache, jobs, args.workers), total=len(jobs), unit="volume"):
        if failure:
            failed.append(failure)
            tqdm.write(f"PROBLEM {failure}")
    print(f"{len(todo) - len(failed)} made, {len(failed)} cannot be read")
    return int(len(failed) > 0.05 * len(items))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    defaults_shown = {"formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--data", type=Path, help="manifest .csv, CT-RATE folder or CTRG-Chest .json")
    shared.add_argument("--cache", type=Path, default=Path("cache"), metavar="DIR",
                        help="where preprocessed volumes go (float16 .npy)")
    shared.add_argument("--size", type=int, nargs=3, default=SIZE, metavar=("D", "H", "W"), help="voxels (z, y, x)")
    shared.add_argument("--hu", choices=("auto", "header", "csv"), default="auto",
                        help="Hounsfield units: told from the values, as stored, or rescaled by the metadata CSV")

    command = commands.add_parser("check", parents=[shared], help="a table of volumes and reports; exits 1 on problems",
                                  **defaults_shown)
    command.add_argument("--task", choices=TASKS, help="--data is the folder of this task in its native layout")
    command.add_argument("--fold", type=int, default=0, help="fold of --task that is the test part")
    command.add_argument("--reports", type=Path, help="instead of --data: a CSV or JSON with reports alone")
    command.add_argument("--pictures", type=Path, metavar="DIR", help="write the middle slices of each volume as PNG")
    command.add_argument("--limit", type=int, metavar="N", help="read only the first N volumes")
    command.set_defaults(run=check)

    command = commands.add_parser("cache", parents=[shared], help="preprocess all volumes once", **defaults_shown)
    command.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    command.set_defaults(run=fill_cache)

    command = commands.add_parser("demo", help="write synthetic chest phantoms, or a synthetic set of a task",
                                  **defaults_shown)
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    command.add_argument("--task", choices=TASK_DEMOS, help="instead of phantoms with reports: a set of this task, in its "
                         "own layout")
    command.add_argument("--n", type=int, help="number of patients; by default 64, or as many as the task needs")
    command.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    command.set_defaults(run=lambda args: print(write_task_demo(args.task, args.out, args.n, args.seed) if args.task
                                                else write_demo(args.out, args.n or 64, args.seed)))

    args = parser.parse_args()
    if args.command != "demo" and not args.data and not getattr(args, "reports", None):
        parser.error("--data is required")
    try:
        sys.exit(args.run(args))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
