"""Files to tensors: the only file that knows a file format or a data set.

    python data.py check --data X                    a table of volumes; exits 1 on a problem
    python data.py check --task T --data DIR         the same for one of the tasks
    python data.py cache --data X --out DIR          preprocess every volume: DIR is a new data set
    python data.py demo --out DIR --n 64             write synthetic chests with reports
    python data.py demo --task luna16 --out DIR      write a synthetic set in that task's own layout

X is a manifest .csv (`volume,report[,split][,patient][,label columns]`, paths relative to it), a
CT-RATE folder, a CTRG-Chest .json or a folder of `cache --out`. Bad files raise ValueError.
"""
import argparse
import contextlib
import csv
import functools
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
import signal
import sys
import threading
import uuid
from collections import Counter, defaultdict, namedtuple
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import phantoms

log = logging.getLogger("mg3d")
_warn_once = functools.cache(log.warning)

LABELS = tuple(phantoms.FINDINGS)  # the 18 columns of CT-RATE's label files, in their order
SIZE = (128, 96, 128)           # voxels (z, y, x) that the network sees
CROP = (0.88, 0.66, 0.88)       # part of the scan (z, y, x) that the centre crop keeps
WINDOW = (-1000., 1000.)        # HU that become 0 and 1. NOTE(paper): not given
SPLITS = ("train", "valid", "test")
GEOMETRY = ("XYSpacing", "ZSpacing", "ImageOrientationPatient")  # columns of CT-RATE's metadata
SPLIT_NAMES = {"train": "train", "training": "train", "val": "valid", "valid": "valid",
               "validation": "valid", "test": "test", "testing": "test"}
NO_TEXT = ("", "nan", "none", "null", "nil", "na", "n/a", "<na>", "not given", "not given.",
           "#n/a", "#name?", "#ref!", "#value!")     # the last four are errors of a spreadsheet
LPS_TO_RAS = np.diag([-1, -1, 1, 1])  # from the axes of DICOM and ITK
ENDING = re.compile(r"\.(nii|nii\.gz|mha|mhd|nrrd|nhdr|npz|npy)$", re.IGNORECASE)  # of a volume
CACHE_VERSION = 1               # of the folders that `data.py cache --out` writes
BAR_SECONDS = 0.1 if sys.stderr.isatty() else 60        # between two states of a progress bar
DEMO_SIZE = 1430                # phantoms of --data demo: 1001 to train on, 429 held out


def wrong(where, found, expected):
    """The form of every error that a file causes"""
    return ValueError(f"{where}: found {found}, expected {expected}")


def is_hidden(name):
    return name.startswith(".") or name in ("__MACOSX", "@eaDir")  # ._1.nii.gz, .ipynb_checkpoints …


RANGES = (                      # of the numbers that the flags of all scripts take; NaN is in none
    ("at least 1", lambda n: 1 <= n < math.inf,
     {"accumulate", "batch_size", "embed_dim", "epochs", "eval_every", "limit", "log_every", "mask_size",
      "min_count", "n", "repeats", "save_every", "size", "steps"}),
    ("at least 0", lambda n: 0 <= n < math.inf,
     {"clip_grad", "few", "fold", "lambda_a", "lambda_b", "lambda_g", "lr", "lr_encoder", "seed", "warmup",
      "weight_decay", "workers"}),
    ("a number above 0", lambda n: 0 < n < math.inf, {"spacing", "temperature"}),
    ("a number above 0 and up to 1", lambda n: 0 < n <= 1, {"fraction", "mask_ratio", "mlm_prob"}))


def check_numbers(args):
    """ValueError, naming the flag, for a number that is out of its range"""
    for expected, is_good, names in RANGES:
        for name in sorted(names & vars(args).keys()):
            value = getattr(args, name)
            numbers = [] if value is None else np.ravel(value).tolist()
            if not all(map(is_good, numbers)):
                raise ValueError(f"--{name} {' '.join(map(str, numbers))}: expected {expected}")


def check_size(size, multiple=32):
    if any(side % multiple for side in size):
        found = " ".join(map(str, size))
        raise ValueError(f"--size {found}: every side must be a multiple of {multiple}")


# --------------------------------------------------------------------------------------- volumes
def _visible_files(folder):
    files = [one for one in os.scandir(folder) if not one.is_dir() and not is_hidden(one.name)]
    lost = sorted(one.name for one in files if one.is_symlink() and not os.path.exists(one))
    if lost:
        raise wrong(folder, f"links to nothing: {shorten(lost)}", "files")
    return sorted(map(Path, files))


def is_dicom(file):
    with open(file, "rb") as stream:
        return stream.read(132)[128:] == b"DICM" or file.suffix.lower() == ".dcm"


def _grey_files(path):
    """A .npy, or PNG and JPEG of a folder, slice 10 behind 9; none beside DICOM, whose previews they are"""
    if not path.is_dir():
        return [path] if path.suffix.lower() == ".npy" else []
    files = _visible_files(path)
    if any(map(is_dicom, files)):
        return []
    pictures = [file for file in files if file.suffix.lower() in (".png", ".jpg", ".jpeg")]
    return sorted(pictures, key=lambda file: re.sub(r"\d+", lambda n: n[0].zfill(30), file.name))


def _read_grey(path):
    files = _grey_files(path)
    forms = sorted({re.sub(r"\d+", "#", file.stem) for file in files})
    if len(forms) > 1:
        raise ValueError(f"pictures named {shorten(forms)}, not slices alone")
    numbers = np.array([[int(part) for part in re.findall(r"\d+", file.stem)] for file in files], object)
    steps = np.diff(numbers[:, (numbers != numbers[:1]).any(0)], axis=0)
    if (steps <= 0).any():
        raise ValueError(f"{shorten([file.name for file in files])}: these numbers give no order of slices")
    if (steps != steps[:1]).any():
        _warn_once(f"{path}: the numbers of its slices leave gaps, which are closed")
    if files == [path]:
        array = np.load(path, allow_pickle=False)
    else:  # colour becomes grey
        contents = ((file.name, file.read_bytes()) for file in files if file.suffix.lower() != ".png")
        torn = [name for name, jpeg in contents
                if jpeg[:2] == b"\xff\xd8" and b"\xff\xd9" not in jpeg[-4096:]]
        if torn:  # ITK makes the rest up
            raise ValueError(f"pictures that are cut off: {shorten(torn)}")
        array = sitk.GetArrayFromImage(sitk.ReadImage(list(map(str, files)), sitk.sitkUInt16))
    if array.ndim != 3 or array.dtype.kind != "u" or array.max() > 255:
        raise ValueError(f"{array.dtype} of shape {array.shape}, not uint8 (8-bit, 3D)")
    # Grey fills the window. 1 mm, rows front to back, columns right to left, slices feet to head.
    hu = array.T.astype(np.float32) / 255 * (WINDOW[1] - WINDOW[0]) + WINDOW[0]
    return hu, np.diag([-1., -1., 1., 1.])


def _read_nifti(path):
    image = nib.load(path)
    header, stored = image.header, image.dataobj
    xyz = stored.get_unscaled()
    if (stored.slope, stored.inter) != (1, 0):  # nibabel itself would use float64
        xyz = xyz.astype(np.float32) * np.float32(stored.slope) + np.float32(stored.inter)
    with image.file_map["image"].get_prepare_fileobj("rb") as file:  # nibabel mends what is 0 or below
        pixdim = abs(type(header).from_fileobj(file, check=False)["pixdim"][1:4])
    if header["sform_code"] == 0 and not pixdim.all():
        raise ValueError(f"voxels of {pixdim} mm")
    affine, qform = header.get_best_affine(), header.get_qform(coded=True)[0]
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if qform is None and (pixdim == 1).all():  # unset
        pixdim = lengths
    pixdim = np.where(np.isfinite(pixdim) & (pixdim > 0), pixdim, lengths)
    if lengths.all() and not np.allclose(lengths, pixdim, rtol=0.01, atol=0):  # some sforms say 1 mm
        _warn_once(f"{path}: voxels of {lengths} mm in the sform, {pixdim} in pixdim: took pixdim")
        affine = affine if qform is None else qform
        affine[:3, :3] *= pixdim / np.linalg.norm(affine[:3, :3], axis=0)
    elif qform is not None and nib.aff2axcodes(affine) != nib.aff2axcodes(qform):
        _warn_once(f"{path}: its sform and its qform turn the scan differently: took the sform")
    affine[:3] *= {1: 1000, 3: 0.001}.get(int(header["xyzt_units"]) % 8, 1)  # metres, microns
    return xyz, affine


def _header_text(path):
    with open(path, "rb") as file:
        return file.read(1 << 20).decode("utf-8", "surrogateescape")


def _read_itk(path):
    image = sitk.ReadImage(str(path))
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() > 1:
        raise ValueError("not 3D, one number a voxel")
    unit = re.search(r'(?im)^((space )?units: *"|DistanceUnits *= *)(?!mm|milli)\w+', _header_text(path))
    if unit:  # ITK does not look
        raise ValueError(f"{unit[0]}, not mm")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).T, LPS_TO_RAS @ affine


# Of a DICOM file, in mm and LPS. stack: what those of one have in common; axes (3, 2): steps to the next
# column and to the next row
Slice = namedtuple("Slice", "stack axes position pixels file")


def _dicom_slices(file):
    """The slices of a DICOM file, which may hold many; [] of localisers and of what is no scan"""
    names = ("ImageOrientationPatient", "PixelSpacing", "ImagePositionPatient")
    groups = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
    header = pydicom.dcmread(file, stop_before_pixels=True,
                             specific_tags=["SeriesInstanceUID", "ImageType", *names, *groups])
    kind = header.file_meta.MediaStorageSOPClassUID.name  # structures and reports lie beside slices
    is_scan = re.search(r"\b(CT|MR|PET|Tomography) Image", kind)
    if not is_scan or "LOCALIZER" in header.get("ImageType", ""):
        return []
    slices, rescales = [], set()
    shared, frames = header.get(groups[0], []), header.get(groups[1], [header])
    pixels = sitk.GetArrayFromImage(sitk.ReadImage(str(file), sitk.sitkFloat32))
    for frame, own in zip(pixels, frames, strict=True):
        tags = {tag.keyword: tag.value for group in (*shared, own) for tag in group.iterall()}
        axes, spacing, position = (np.array(tags[name], float) for name in names)
        rescales.add((tags.get("RescaleSlope"), tags.get("RescaleIntercept")))
        stack = header.SeriesInstanceUID, frame.shape, *axes.round(2), *spacing.round(4)
        axes = axes.reshape(2, 3).T
        axes = axes / np.linalg.norm(axes, axis=0) * spacing[::-1]  # spacing: of rows, of columns
        slices.append(Slice(stack, axes, position, frame, file.name))
    if len(rescales) > 1:  # ITK takes the first for all
        raise ValueError("its frames have several rescales")
    return slices


def _read_dicom(path):
    stacks = defaultdict(list)
    for file in filter(is_dicom, _visible_files(path) if path.is_dir() else [path]):
        try:
            slices = _dicom_slices(file)
        except Exception as error:
            raise ValueError(f"{file.name} is broken: {error}") from error
        for one in slices:
            stacks[one.stack].append(one)
    stack = max(stacks.values(), key=len, default=[])  # the first of equal ones
    if len(stack) < 2:
        raise ValueError("neither two DICOM slices, localisers aside, nor PNG or JPEG here")
    others = [f"{len(other)} of {other[0].stack[0]}" for other in stacks.values() if other is not stack]
    if others:
        _warn_once(f"{path}: took {len(stack)} slices of {stack[0].stack[0]}, not {shorten(others)}")
    right, down = stack[0].axes.T
    slices = []
    for one in sorted(stack, key=lambda one: np.dot(one.position, np.cross(right, down))):
        is_there = slices and np.allclose(one.position, slices[-1].position, atol=1e-3)
        if not (is_there and np.array_equal(one.pixels, slices[-1].pixels)):  # else a copy
            slices.append(one)
    positions = np.array([one.position for one in slices])
    regular = np.linspace(positions[0], positions[-1], len(slices))
    step = regular[1] - regular[0]
    if np.linalg.norm(positions - regular, axis=1).max() >= 0.2 * np.linalg.norm(step):  # not rounding
        gaps = np.linalg.norm(np.diff(positions, axis=0), axis=1)
        worst = slices[abs(gaps - np.median(gaps)).argmax()].file
        raise ValueError(f"slices {gaps.min():.2f} to {gaps.max():.2f} mm apart, see behind {worst}")
    affine = np.eye(4)
    affine[:3] = np.c_[right, down, step, positions[0]]
    return np.stack([one.pixels for one in slices]).T, LPS_TO_RAS @ affine


def _read_npz(path):
    with np.load(path, allow_pickle=False) as file:
        array = file["arr_0"] * np.float32(1000)  # CT-RATE's preprocessing stores HU / 1000
    # NOTE(compat): (z, y, x) or, from other versions of the script, (z, x, y). A body looks alike left and
    # right, not front and back: that tells which is which.
    few_slices = array[::8]
    asymmetry = [np.abs(few_slices - np.flip(few_slices, axis)).mean() for axis in (1, 2)]
    if asymmetry[0] < 0.8 * asymmetry[1]:
        array = array.transpose(0, 2, 1)  # (z, x, y) -> (z, y, x)
    return array.T, np.diag([-0.75, -0.75, 1.5, 1])  # CT-RATE: x to the left, y to the back


def read_stored(path):
    """Any volume as it is stored: array (x, y, z) in file units, affine 4×4 of the index to RAS mm"""
    path = Path(path)
    readers = {".nii": _read_nifti, ".gz": _read_nifti, ".npz": _read_npz, ".npy": _read_grey,
               ".mha": _read_itk, ".mhd": _read_itk, ".nrrd": _read_itk, ".nhdr": _read_itk}
    read = readers.get(path.suffix.lower(), _read_dicom)
    try:
        if path.is_dir() and _grey_files(path):
            read = _read_grey
        return read(path)
    except Exception as error:  # the libraries raise a dozen kinds for a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        whole = "a whole volume" + " with its .raw" * (path.suffix.lower() == ".mhd")
        raise ValueError(f"{path}: cannot be read: {reason}; expected {whole}") from error


def to_ras(path, xyz, affine, is_mask=False):
    """Turn a stored array (x, y, z) so that x runs to the right, y to the front, z to the head
    -> array (z, y, x) float32, spacing (z, y, x) mm, affine 4×4 of the turned (x, y, z) index to mm"""
    while xyz.ndim > 3 and xyz.shape[-1] == 1:
        xyz = xyz[..., 0]
    if xyz.ndim != 3 or min(xyz.shape) < 2 or xyz.dtype.kind not in "biuf":
        raise wrong(path, f"shape {xyz.shape} of type {xyz.dtype}", "3D, one real number a voxel")
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine) < 4:
        raise wrong(path, f"the affine {affine[:3].tolist()}", "three axes, spacing above 0")
    orientation = nib.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(orientation, xyz.shape)
    array = np.ascontiguousarray(nib.apply_orientation(xyz, orientation).T, dtype=np.float32)
    low, high = array.min(), array.max()
    if not np.isfinite([low, high]).all() or (low == high and not is_mask):
        raise wrong(path, f"values from {low} to {high}", "finite ones that differ")
    return array, tuple(np.linalg.norm(affine[:3, 2::-1], axis=0).tolist()), affine


def read_volume(path, is_mask=False):
    """Any volume in RAS -> array (z, y, x) float32 in file units, spacing (z, y, x) mm, affine 4×4"""
    return to_ras(path, *read_stored(path), is_mask)


def _metadata_affine(path, geometry):
    where, *texts = geometry
    xy, z, axes = (np.array(re.findall(r"[-+]?[\d.]+(?:e[-+]?\d+)?", text), float) for text in texts)
    is_good = (len(xy), len(z), len(axes)) == (2, 1, 6) and min(*xy, *z) > 0
    axes = np.resize(axes, (2, 3))
    if not is_good or not np.allclose(axes @ axes.T, np.eye(2), atol=0.01):
        raise wrong(where, dict(zip(GEOMETRY, texts)), f"geometry: the header of {path} is blank")
    affine = np.eye(4)
    affine[:3, :3] = np.c_[axes.T, np.cross(*axes)] * [*xy, *z]
    return LPS_TO_RAS @ affine


def read_item(item):
    """`read_stored` of the volume of an item. Where its header is blank, a unit matrix or a NIfTI that says
    so, CT-RATE's metadata tell the geometry; without them the array is taken as it lies, with a warning."""
    xyz, affine = read_stored(item.volume)
    is_blank = np.array_equal(abs(affine), np.eye(4)) and not _grey_files(item.volume)
    if ".nii" in item.volume.name.lower():
        header = nib.load(item.volume).header
        is_blank |= header["sform_code"] == 0 and header["qform_code"] == 0
    if is_blank and item.geometry:
        return xyz, _metadata_affine(item.volume, item.geometry)
    if is_blank:
        axes = "".join(nib.aff2axcodes(affine))
        _warn_once(f"{item.volume}: its header does not tell how it lies: took its axes as {axes}")
    return xyz, affine


def _likeness(values, lowest):
    """How much a sample looks like a chest in HU, 0 if impossible; the air may be `lowest`, which it lacks"""
    air_and_lung, soft_tissue, below, above = (
        ((values > low) & (values < high)).mean()
        for low, high in ((-1150, -400), (-200, 300), (-np.inf, -1200), (700, np.inf)))
    has_air = air_and_lung > 0.03 or -1150 < lowest < -400
    if not (has_air and soft_tissue >= 0.03):  # real scans 0.35, those rescaled twice at most 0.011
        return 0
    return air_and_lung + soft_tissue - 2 * below - 2 * above


def to_hounsfield(array, path, hu="auto", rescale=None):
    """Values of a file -> array in HU, a note on what was done. hu: "header" takes values as read, "csv"
    applies `rescale`, (slope, intercept) of the metadata CSV or None, "auto" decides from the values."""
    if hu == "csv" and rescale is None:
        raise wrong(path, "no RescaleSlope and RescaleIntercept for it", "them for --hu csv")
    if _grey_files(Path(path)):
        return array, "pictures: grey laid over the window"
    low, high = float(array.min()), float(array.max())
    sample = array.reshape(-1)[::array.size // 200_000 | 1]  # an odd stride follows no column
    sample = sample[sample > low]  # the lowest value may be padding: -1024 … -3024
    choices = [(1, 0), rescale or (1, -1024)]  # CT-RATE v1 files need it, v2 files have it applied
    choices = {"header": choices[:1], "csv": choices[1:], "auto": choices}[hu]
    likeness = [_likeness(sample * slope + inter, low * slope + inter) for slope, inter in choices]
    if max(likeness) <= 0:
        expected = "Hounsfield units, air near -1000 and soft tissue near 0; is it a mask?"
        raise wrong(path, f"values {low:g} to {high:g}", expected)
    slope, inter = choices[np.argmax(likeness)]  # the first wins a tie
    if (slope, inter) == (1, 0):
        return array, "as stored"
    note = f"rescale {slope:g}, {inter:g} {'of the metadata' if rescale else '(as is usual)'} applied"
    if hu == "auto":
        _warn_once(f"Hounsfield units: {note} to some volumes; `data.py check` tells to which")
    return array * np.float32(slope) + np.float32(inter), note


def scale(array, window):
    return (np.clip(array, *window) - window[0]) / (window[1] - window[0])


def cut(array, corner, size):
    """A box of voxels, moved inside the array; a smaller array is padded with 0, air"""
    corner = [min(max(int(c), 0), max(0, n - k)) for c, n, k in zip(corner, array.shape, size)]
    box = np.asarray(array[tuple(slice(c, c + k) for c, k in zip(corner, size))])
    missing = [k - n for n, k in zip(box.shape, size)]
    return np.pad(box, [(n // 2, n - n // 2) for n in missing]) if any(missing) else box


def resize(array, size, mode="trilinear"):
    """An array (z, y, x) -> float32 of another size, on voxel centres, without smoothing"""
    array = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None, None]
    return F.interpolate(array, tuple(size), mode=mode)[0, 0].numpy()


def centre_crop(array, crop=CROP):
    kept = [max(1, round(n * part)) for n, part in zip(array.shape, crop)]
    return cut(array, [(n - k) // 2 for n, k in zip(array.shape, kept)], kept)


def preprocess(array, spacing, size=SIZE, crop=CROP, window=WINDOW):
    """HU array (z, y, x) -> float32 tensor (1, D, H, W) in [0, 1], as Sec. IV.B of the paper"""
    # NOTE(paper): crop and resize ignore the millimetres of `spacing`; the kind of resize is not stated.
    return torch.from_numpy(resize(scale(centre_crop(array, crop), window), size))[None]


# --------------------------------------------------------------------------------------- reports
SENTENCE_END = re.compile(
    r"""(?<![.;?!])[.;?!]+["'”’]*(?=\s|$)   # punctuation before a blank, with its quotes
      | [;?!](?=\w) | \.(?=[A-Z][a-z])      # a forgotten blank
      | [。；？！]["”]* | [\r\n]""", re.VERBOSE)
WRAPPED = re.compile(r"(?<=[^\r\n]{40})(\r\n?|\n)(?=[ \t]*[a-zß-ÿ])")      # a line end amid a sentence
COMMA = re.compile(r"""((?<!\d)[,，]|[,，](?!\s*\d))["”]*""")
# Not cut: parentheses (one of over 300 letters was never closed), abbreviations, "T12. vertebra"
WHOLE = re.compile(
    r"""[(（](?:[^()（）]|[(（][^()（）]{0,300}[)）]){0,300}[)）]
      | (?<![^\s(,;])(?i:e\.?g|i\.?e|cf|dr|prof|assist|vs|approx|fig)\.(?=\s?\S)
      | (?<![^\s(,;])(?i:al|ca|cm|etc|ima?|img|lab|max|min|mm|no|nr|resp|se|[^\W\d_])\.(?=\s?[a-z\d])
      | \d\.(?=\s?[a-z])""", re.VERBOSE)
CHARACTER = re.compile("[\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


def has_words(text):
    return any(map(str.isalnum, text))


def split_sentences(text):
    """Split a report at . ; ? ! and line ends, then at commas between two clauses of at least 3 words, never
    in numbers, abbreviations or parentheses, nor where a long line goes on in lower case. Only white space
    is lost; [] without letters and digits."""
    # NOTE(paper): Sec. III.B only says "using punctuation", concise but complete; the rules are ours.
    def is_long(clause):
        return sum(map(has_words, clause.split())) >= 3
    text = text if text.islower() else WRAPPED.sub(" ", text)
    whole = {place for match in WHOLE.finditer(text) for place in range(*match.span())}
    ends, commas = ({match.end() for match in pattern.finditer(text) if match.start() not in whole}
                    for pattern in (SENTENCE_END, COMMA))
    starts = sorted({0, *ends, *commas, len(text)})
    clauses = [text[start:end] for start, end in itertools.pairwise(starts)]
    pieces = []
    for start, previous, clause in zip(starts, ["", *clauses], clauses):
        if start in commas and not (is_long(previous) and is_long(clause)):
            pieces[-1] += clause
        else:
            pieces.append(clause)
    sentences = [""]
    for piece in pieces:
        if has_words(piece) and any(map(str.isalpha, sentences[-1])):
            sentences.append(piece)
        else:  # behind a heading such as "2."
            sentences[-1] += piece
    if len(sentences) > 1 and not any(map(str.isalpha, sentences[-1])):
        sentences[-2:] = ["".join(sentences[-2:])]
    return [" ".join(sentence.split()) for sentence in sentences if has_words(sentence)]


def letters(texts):
    """The number of characters without blanks: Chinese has no words between blanks."""
    return sum(map(len, "".join(texts).split()))


def tokenize_report(tokenizer, sentences, max_sentences=32, max_tokens=250):
    """Tokenise the sentences of a report in a row; whole ones are kept as long as they fit, only a first
    one that is too long alone is cut. Returns input_ids, sentence_ids, word_ids (L,), the latter two -1 at
    special tokens; sentences, the S kept ones; single_ids, S arrays, each sentence tokenised alone; cut,
    the number of letters left out."""
    # NOTE(paper): no length is given; 250 tokens are the release's.
    if not sentences:
        raise ValueError("found a report without a sentence, expected at least one")
    kept = sentences[:max_sentences]
    text = " ".join(kept)
    encoding = tokenizer(text, return_offsets_mapping=True, verbose=False)
    word_ids = np.array([-1 if word is None else word for word in encoding.word_ids()])
    # A RoBERTa token may begin at the blank before its word: its last letter tells the sentence.
    last_letter = np.array(encoding["offset_mapping"])[:, 1] - 1
    starts = np.cumsum([0] + [len(sentence) + 1 for sentence in kept[:-1]])  # (S,)
    sentence_ids = np.searchsorted(starts, last_letter.clip(0), side="right") - 1
    sentence_ids[word_ids < 0] = -1
    is_word = word_ids >= 0
    capacity = max_tokens - (~is_word).sum()
    counts = np.bincount(sentence_ids[is_word], minlength=len(kept)).cumsum()  # tokens to each one's end
    n = max(1, (counts <= capacity).sum())  # sentences that fit
    fits = ~is_word | (is_word.cumsum() <= min(capacity, counts[n - 1]))
    kept = kept[:n] if counts[0] <= capacity else [text[:last_letter[fits].max() + 1]]
    single_ids = tokenizer(kept, truncation=True, max_length=max_tokens)["input_ids"]
    return {"input_ids": np.array(encoding["input_ids"])[fits], "sentence_ids": sentence_ids[fits],
            "word_ids": word_ids[fits], "sentences": kept, "single_ids": list(map(np.array, single_ids)),
            "cut": letters(sentences) - letters(kept)}


def some_reports(items):
    """The reports of 500 items at most, spread evenly"""
    return [item.report for item in items[::1 + len(items) // 500]]


def check_reports(text_encoder, texts, source):
    """Warns of words that are not read, unknown ones and ends of reports; ValueError if most are unknown"""
    tokenizer = text_encoder.tokenizer
    reports = [tokenize_report(tokenizer, split_sentences(text)) for text in texts]
    unknown = [np.count_nonzero(report["input_ids"] == tokenizer.unk_token_id) for report in reports]
    tokens = sum(np.count_nonzero(report["word_ids"] >= 0) for report in reports)
    if 2 * sum(unknown) > tokens:
        text_encoder.refuse(f"{sum(unknown)} unknown words among {tokens} of {source}", "one that knows most")
    lacking = list(itertools.compress(texts, unknown))
    if lacking:
        words = set()
        for text in lacking:
            found = tokenizer(text, return_offsets_mapping=True, verbose=False)
            places = zip(found["input_ids"], found["offset_mapping"])
            words |= {text[i:j] for number, (i, j) in places if number == tokenizer.unk_token_id}
        log.warning("warning: %s: in %d of %d texts there are words that the text encoder does not know: %s",
                    source, len(lacking), len(texts), shorten(sorted(words)))
    unread = sum(report["cut"] for report in reports) / letters(texts)
    if unread:
        log.warning("warning: %s: of %d reports looked at the ends, %.1f %% of their text, are not read: at "
                    "most 250 tokens and 32 sentences", source, len(texts), 100 * unread)


def mask_words(input_ids, word_ids, tokenizer, generator, prob=0.15):
    """Whole-word masking as in BERT -> masked_ids, labels (-100 where no word was chosen), both (L,). 80 %
    of the chosen words become the mask token, 10 % random tokens that are not special, 10 % stay."""
    words = np.unique(word_ids[word_ids >= 0])
    chosen = generator.choice(words, size=max(1, round(prob * len(words))), replace=False)
    draw = np.ones(word_ids.max() + 2)  # of each word; the last entry is that of special tokens, -1
    draw[chosen] = generator.random(len(chosen))
    draw = draw[word_ids]  # (L,): below 0.8 mask, below 0.9 random, below 1 as it is, 1 not chosen
    labels = np.where(draw < 1, input_ids, -100)
    masked_ids = np.where(draw < 0.8, tokenizer.mask_token_id, input_ids)
    is_random = (draw >= 0.8) & (draw < 0.9)
    ordinary = np.delete(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    masked_ids[is_random] = generator.choice(ordinary, size=is_random.sum())
    return masked_ids, labels


def mask_volume(size, mask_size, mask_ratio, generator):
    """Bool (1, D, H, W), True = masked: mask_ratio of the sub-volumes of mask_size³ voxels"""
    if any(side % mask_size for side in size):
        raise ValueError(f"found size {tuple(size)}, expected multiples of mask_size {mask_size}")
    grid = [side // mask_size for side in size]
    mask = generator.permutation(math.prod(grid)) < round(mask_ratio * math.prod(grid))
    return torch.from_numpy(np.kron(mask.reshape(grid), np.ones([mask_size] * 3, dtype=bool)))[None]


# ------------------------------------------------------------------------------------------ sets
LAYOUTS = "a manifest .csv, a CT-RATE folder, a CTRG-Chest .json or a folder of `data.py cache --out`"
NUMBERS = ("RescaleSlope", "RescaleIntercept", "coordX", "coordY", "coordZ")
CT_RATE_COLUMNS = ("Findings_EN", "Impressions_EN", *LABELS, *NUMBERS[:2], *GEOMETRY)
COLUMNS = (*CT_RATE_COLUMNS, *NUMBERS[2:], "VolumeName", "split", "patient", "mask")
LABEL = {"0": 0., "1": 1., "-1": math.nan, **dict.fromkeys(NO_TEXT, math.nan)}  # of a cell


class Item(NamedTuple):
    """One volume with its report"""
    id: str
    volume: Path
    report: str
    split: str | None           # one of SPLITS; None, as all train: drawn
    patient: str
    labels: np.ndarray | None = None  # (18,) float32, NaN where unknown; of other tasks (K,)
    rescale: tuple | None = None      # (slope, intercept) of the metadata
    mask: Path | None = None  # in the grid of `volume`: classes of the task; of phantoms see `lesions`
    centre: tuple | None = None       # (x, y, z) of a LUNA16 candidate, RAS mm
    geometry: tuple | None = None     # CT-RATE: the line of the metadata, and the texts of GEOMETRY there
    classes: tuple | None = None      # of a task whose classes its data tell


class CachedItem(Item):
    """An item of a cache folder. The fields `volume` and `report` hold the manifest and the place of
    a row there: of a million reports none is kept in memory."""
    __slots__ = ()

    @property
    def row(self):
        with open(self[1], "rb") as manifest:
            manifest.seek(self[2])
            return json.loads(manifest.readline())

    @property
    def volume(self):
        return self[1].parent / cache_name(self.id)

    @property
    def report(self):
        return self[2] if isinstance(self[2], str) else self.row["report"]  # text after `_replace`


def walk(folder):
    """As os.walk, but links are followed, each real folder once, what is hidden is left out, and a folder
    that cannot be listed is an OSError; nothing of a file or of what is not there"""
    def stop(error):
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise error
    seen, starts = set(), [folder]
    for start in starts:  # the links come last: a folder's own name counts, not that of a link to it
        for root, folders, files in os.walk(start, onerror=stop):
            real = os.path.realpath(root)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            folders[:] = sorted(name for name in folders if not is_hidden(name))
            yield Path(root), folders, [name for name in files if not is_hidden(name)]
            starts += [link for link in map(Path(root).joinpath, folders) if link.is_symlink()]


def find(folder, pattern):
    """The files below a folder whose whole name has the pattern in any case, sorted; see `walk`"""
    return sorted(root / name for root, _, files in walk(folder) for name in files
                  if re.fullmatch(pattern, name, re.IGNORECASE))


def stem(path):
    return ENDING.sub("", path.name)


def only(files, name):
    """The file that stands for a name; ValueError if there are two"""
    if len(files) > 1:
        raise wrong(files[0], f"also {files[1]} for {name}", "one of them")
    return files[0]


def by_stem(files):
    """{stem: its only file}"""
    groups = itertools.groupby(sorted(files, key=stem), stem)
    return {name: only(list(group), name) for name, group in groups}


@contextlib.contextmanager
def expecting(path, layout):
    """Name the file and the layout when its content has another structure."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise wrong(path, f"{type(error).__name__}: {error}", layout) from error


def read_text(path):
    with expecting(path, "text in UTF-8"):
        return Path(path).read_bytes().decode("utf-8-sig")


def _rows(path):
    """The rows of a CSV that hold anything: ("PATH, line N", cells without blanks around them)"""
    text = read_text(path)
    separator = max(",;\t", key=text.partition("\n")[0].count)
    table = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    line = 1  # where a row begins: in quotes it may have line ends
    try:
        for cells in table:
            cells = [cell.strip() for cell in cells]
            if any(cells):
                yield f"{path}, line {line}", cells
            line = table.line_num + 1
    except csv.Error as error:
        raise wrong(f"{path}, line {line}", error, "quotes in pairs, around text with commas") from None


@functools.cache
def _plain(text):
    """One of the spellings that tools have: "1" for "1.0" or "True", "lung nodule" for "Lung_Nodule "."""
    text = " ".join(text.lower().replace("_", " ").split())
    return {"true": "1", "false": "0"}.get(text, re.sub(r"\.0*$", "", text))


def read_table(path, *needed, labels=(), **choices):
    """The rows of a CSV: ("PATH, line N", {column: text, or float in LABELS and NUMBERS, NaN if unknown}).
    needed: columns that must be there; labels: more of them, read as LABELS are; choices: columns and the
    texts that they may hold. Case, blanks and _ do not matter in names of known columns and in choices."""
    rows = _rows(path)
    known = {_plain(name): name for name in (*COLUMNS, *needed, *labels, *choices)}
    columns = [known.get(_plain(name), name) for name in next(rows, (path, []))[1]]
    missing = [name for name in (*needed, *labels, *choices) if name not in columns]
    twice = [name for name in known.values() if columns.count(name) > 1]
    if missing or twice:
        raise wrong(path, f"the columns {columns}", f"also {missing}" if missing else f"{twice} once")
    choices = {name: {_plain(text): text for text in texts} for name, texts in choices.items()}
    choices |= {name: LABEL for name in (*LABELS, *labels) if name in columns}
    numbers = [name for name in NUMBERS if name in columns]
    table = []
    for where, cells in rows:
        if len(cells) != len(columns):
            raise wrong(where, f"{len(cells)} fields", f"{len(columns)}; quotes around text with commas")
        row = dict(zip(columns, cells))
        for name, values in choices.items():
            text = _plain(row[name])
            if text not in values:
                expected = "0, 1 or, where it is unknown, -1 or nothing"
                if values is not LABEL:
                    expected = f"one of {list(values.values())}"
                raise wrong(where, f"{name} {row[name]!r}", expected)
            if text == "-1":
                _warn_once(f"{path}: labels of -1 are taken as unknown")
            row[name] = values[text]
        try:
            row |= {name: float(row[name] or "nan") for name in numbers}
        except ValueError as error:
            raise wrong(where, error, "a number") from None
        table.append((where, row))
    return table


def _labels(row):
    """The 18 labels of a row, NaN where unknown; None if it has none of the columns"""
    if any(name in row for name in LABELS):
        return np.array([row.get(name, np.nan) for name in LABELS], dtype=np.float32)


def _text(value):
    """The text of a cell or of a JSON's entry, one or several; "" where a tool writes that there is none.
    Line ends of HL7, HTML, spreadsheets and escapes become \\n."""
    if isinstance(value, list):
        return "\n".join(filter(None, map(_text, value)))
    if str(value).strip().lower() in NO_TEXT:
        return ""
    return re.sub(r"\\\.br\\|\\r\\n|\\[nr]|<(?i:br) ?/?>|_x000D_|[\v\f\x85\u2028\u2029]", "\n", value)


def _path(value):
    """A path with / or \\, of a JSON perhaps the only one of a list"""
    [path] = value if isinstance(value, list) else [value]
    return path.replace("\\", "/")


def _rescale(row):
    """(slope, intercept) of a row of metadata, or None"""
    pair = tuple(row.get(column, math.nan) for column in NUMBERS[:2])
    return None if np.isnan(pair).any() else pair


PATIENT = ("patient", "patient id", "patientid", "subject", "subject id", "subjectid")  # names of a column


def _manifest_items(path, rows):
    items, columns = [], {_plain(name): name for name in rows[0][1]} if rows else {}
    patient_column = next((columns[name] for name in PATIENT if name in columns), None)
    others = sorted(set(columns.values()) - {*COLUMNS, patient_column, "volume", "report"})
    if others:
        log.info("%s: other columns, read as labels of a task or not at all: %s", path, ", ".join(others))
    for where, row in rows:
        volume, split = _path(row["volume"]), (row.get("split") or "train").lower()
        if not volume or split not in SPLIT_NAMES:
            raise wrong(where, f"volume {volume!r} and split {split!r}", f"a path and one of {SPLITS}")
        mask = path.parent / _path(row["mask"]) if row.get("mask") else None
        report, patient = _text(row.get("report")), row.get(patient_column, "")
        if re.fullmatch(r"\d(\.\d+)?E\+\d+", patient, re.IGNORECASE):
            raise wrong(where, f"patient {patient}", "all digits, which a spreadsheet has rounded off")
        patient = volume if patient.lower() in NO_TEXT else patient
        items.append(Item(volume, path.parent / volume, report, SPLIT_NAMES[split], patient,
                          _labels(row), _rescale(row), mask))
    alone = sum(item.patient == item.id for item in items)
    if alone:
        _warn_once(f"{path}: {alone} of {len(items)} volumes without a patient (column "
                   f"{patient_column or 'patient'}): each counts as another")
    return items


def read_labels(path, names):
    """{id: labels (K,), NaN where unknown} of any label columns of a manifest"""
    return {_path(row["volume"]): np.float32([row[name] for name in names])
            for _, row in read_table(path, "volume", labels=names)}


def _parts(content, key):
    """{split: entries} of a JSON. ValueError for a list of other name whose entries have the key"""
    parts = defaultdict(list)
    for name, rows in content.items():
        if name.lower() in SPLIT_NAMES:
            parts[SPLIT_NAMES[name.lower()]] += rows
        elif isinstance(rows, list) and any(isinstance(row, dict) and key in row for row in rows):
            raise ValueError(f"the part {name!r}")
    return parts


def _ctrg_items(path, with_result=True):
    """`result` is the impression. Pre-training reads it behind the report, generation has the report."""
    items = []
    with expecting(path, "CTRG-Chest's {train, val, test: [{id, report, image_path}]}"):
        parts = _parts(json.loads(read_text(path)), "image_path")
        # The released file lists the same volumes as val and as test: they are test.
        tested = {_path(row["image_path"]) for row in parts["test"]}
        for split in ("train", "test", "valid"):
            for row in parts[split]:
                name, volume = str(row["id"]), _path(row["image_path"])
                report = _text([row["report"], row.get("result") if with_result else None])
                if split != "valid" or volume not in tested:
                    items.append(Item(name, path.parent / volume, report, split, name))
    return items


def _ct_rate_tables(files):
    """{volume: {column: (value, where)}} of all tables; ValueError if two rows contradict each other"""
    told = defaultdict(dict)
    tables = (read_table(file) for file in files if file.suffix.lower() == ".csv")
    for where, row in itertools.chain.from_iterable(tables):
        name = Path(row.get("VolumeName", "")).name.split(".")[0]
        for column in CT_RATE_COLUMNS if name else ():
            if column in row:
                value, first = told[name].setdefault(column, (row[column], where))
                if str(value) != str(row[column]):  # NaN is not NaN
                    raise wrong(where, f"{column} {row[column]} of {name}", f"{value}, as in {first}")
    return told


def _ct_rate_items(folder, with_absent=False):
    files = find(folder, r".+\.(csv|nii|nii\.gz|npz)|no_chest.*\.txt")  # once: there are 50,000 folders
    told = _ct_rate_tables(files)
    reports = {name for name in told if "Findings_EN" in told[name]}
    no_chest = {Path(line).name.split(".")[0] for file in files if file.suffix.lower() == ".txt"
                for line in read_text(file).splitlines()}
    if with_absent:  # to be downloaded, or deleted
        files += [folder / f"{name}.nii.gz" for name in sorted(reports - set(map(stem, files)))]
    items, silent = [], []
    for file in files:
        name = stem(file)
        if name in no_chest or not ENDING.search(file.name):
            continue
        if name not in reports:
            silent.append(name)
            continue
        split = name.split("_")[0]
        if split not in SPLIT_NAMES:
            raise wrong(folder, f"the volume {name}", "names train_… and valid_…")
        row = {column: value for column, (value, _) in told[name].items()}
        report = _text([row["Findings_EN"], row.get("Impressions_EN", "")])
        where = told[name].get("XYSpacing", ("", f"{folder}, metadata of {name}"))[1]
        geometry = where, *(row.get(column, "") for column in GEOMETRY)
        patient = "_".join(name.split("_")[:2])
        items.append(Item(name, file, report, SPLIT_NAMES[split], patient, _labels(row), _rescale(row),
                          geometry=geometry))
    if silent:
        log.warning("%s: left out %d volumes without a report: %s", folder, len(silent), shorten(silent))
    wanted = len(reports - no_chest)
    if len(items) < wanted and not with_absent:  # most have all CSVs and a part of the volumes
        log.warning("%s: %d of %d reports have a volume here", folder, len(items), wanted)
    return items


def read_items(data, cache="cache", with_absent=False):
    """All that a data set lists, good or not; with_absent: of CT-RATE also what is not there"""
    data = phantoms.write_demo(Path(cache, "demo"), DEMO_SIZE) if str(data) == "demo" else Path(data)
    if is_cache(data):
        return _cache_items(data)
    if data.is_dir():
        return _ct_rate_items(data, with_absent)
    is_json = read_text(data).lstrip().startswith(("{", "["))
    return _ctrg_items(data) if is_json else _manifest_items(data, read_table(data, "volume", "report"))


def permute_reports(items, seed):
    """The control of pre-training: all scans of a patient get the report of one other patient."""
    report_of = {item.patient: item.report for item in items}
    patients = np.random.default_rng(seed).permutation(sorted(report_of))
    if len(patients) < 2:
        raise ValueError(f"--permute_reports: found {len(patients)} patient to train on, expected two")
    other = dict(zip(patients, np.roll(patients, 1)))                   # none keeps its own
    return [item._replace(report=report_of[other[item.patient]]) for item in items]


def patient_hashes(patients):
    """A set of short hashes: they tell whether a patient of a known name is among these."""
    return {hashlib.sha1(patient.encode()).hexdigest()[:12] for patient in patients}


def shorten(names):
    return ", ".join(map(str, names[:3])) + (" …" if len(names) > 3 else "")


def tell_absent(absent, n, source):
    """Name those of n volumes that have no file; more than 5 % are refused."""
    if absent:
        found = f"no file for {len(absent)} of {n} volumes: {shorten(absent)}"
        if len(absent) > 0.05 * n:
            raise wrong(source, found, "at most 5 % to be missing")
        log.warning("%s: found %s; left out", source, found)


def with_a_file(items, source):
    exists = {volume: volume.exists() for volume in dict.fromkeys(item.volume for item in items)}
    tell_absent([volume for volume in exists if not exists[volume]], len(exists), source)
    return [item for item in items if exists[item.volume]]


def check_identities(items, source, side_of):
    """Refuse an item or a volume that is there twice, and a patient on two sides of a split."""
    seen, first = {}, {}
    for item in items:
        is_told_by_id = item.centre or isinstance(item, CachedItem)
        for key in {item.id} if is_told_by_id else {item.id, os.path.normpath(item.volume)}:
            if key in seen:
                raise wrong(source, f"{item.id} ({item.volume}) twice", f"it once, {seen[key].volume}")
            seen[key] = item
        other = first.setdefault(item.patient, item)
        if side_of(other) != side_of(item):
            parts = f"{other.split} and in {item.split}"
            raise wrong(source, f"the patient {item.patient} in {parts}", "it in one of them")


def tell_spellings(items, source):
    """Warn of patients in two parts whose names are the same but for case, leading zeros or .0 at the end."""
    names = defaultdict(dict)
    for item in items:
        names[item.patient.lower().removesuffix(".0").lstrip("0")][item.split] = item.patient
    spelt = [sorted(set(one.values())) for one in names.values()]
    alike = [" and ".join(one) for one in spelt if len(one) > 1]
    if alike:
        _warn_once(f"{source}: {len(alike)} patients of two parts may be one: {shorten(alike)}")


def with_words(items, data):
    """The items that have a report; the number of others is told."""
    silent = [item.id for item in items if not has_words(item.report)]
    if silent:
        log.warning("%s: left out %d with an empty report: %s", data, len(silent), shorten(silent))
    return [item for item in items if has_words(item.report)]


def keep_good(items, data):
    check_identities(items, data, lambda item: item.split == "train")
    if not is_cache(data):  # which holds good ones alone
        items = with_words(with_a_file(items, data), data)
    if not items:
        raise wrong(data, "no item with a volume and a report", f"at least one in {LAYOUTS}")
    tell_spellings(items, data)
    return items


def load_items(data, cache="cache"):
    """LAYOUTS or "demo", drawn once -> list of Item; what lacks a report or a file is told and left out"""
    return keep_good(read_items(data, cache), data)


# -------------------------------------------------------------------------------- cache, examples
def files_of(path):
    """All files that a volume is read from: slices of a folder, a header and its data"""
    if path.is_dir():
        return _visible_files(path)
    if path.suffix.lower() not in (".mhd", ".nhdr"):
        return [path]
    data_file = re.split(r"(?im)^(?:ElementDataFile *=|data ?file *:)", _header_text(path))[-1]
    first, *names = map(str.strip, data_file.split("\n"))
    if "%" in first:  # a pattern of names, then numbers: s%03d.raw 0 19 1
        names = sorted(path.parent.glob(re.sub(r"%\d*d(\S*).*", r"*\1", first)))
    elif not first.startswith("LIST"):
        names = []
    return [path, *filter(Path.is_file, map(path.parent.joinpath, [first, *names]))]


def cache_file(cache, volumes, *settings):
    """Where what is made of these volumes lies: it changes with their files and all settings."""
    stats = []
    for volume in volumes:
        stats.append(str(volume.resolve()))
        for file in files_of(volume):
            stat = file.stat()
            stats.append((file.name, stat.st_size, stat.st_mtime_ns))
    return Path(cache) / f"{hashlib.sha1(repr((stats, settings)).encode()).hexdigest()}.npy"


@contextlib.contextmanager
def written_whole(path, shard=""):
    """A file to write. It becomes `path` whole or not at all; a kill may leave .NAME.SHARD.*.part"""
    part = path.with_name(f".{path.name}.{shard}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_array(path, array, shard=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path, shard) as file:
        np.save(file, array)


def volume_file(item, cache, size=SIZE, hu="auto"):
    """Where the preprocessed volume of an item lies in the cache"""
    return cache_file(cache, [item.volume], tuple(size), CROP, WINDOW, hu, item.rescale,
                      item.geometry and item.geometry[1:])


def _read_prepared(path, size):
    try:
        volume = np.load(path, mmap_mode="r", allow_pickle=False)
        if volume.shape != (1, *size) or volume.dtype != np.float16:
            raise ValueError(f"{volume.dtype} of shape {volume.shape}")
        return torch.from_numpy(volume.astype(np.float32))
    except (OSError, EOFError, ValueError) as error:
        raise wrong(path, error, f"a preprocessed volume, float16 of shape {(1, *size)}") from None


def make_volume(item, size=SIZE, hu="auto"):
    """A raw volume, preprocessed: float16 (1, D, H, W) in [0, 1]"""
    array, spacing, _ = to_ras(item.volume, *read_item(item))
    array, _ = to_hounsfield(array, item.volume, hu, item.rescale)
    return preprocess(array, spacing, size).half()


def load_volume(item, cache=None, size=SIZE, hu="auto"):
    """The preprocessed volume of an item, float32 (1, D, H, W) in [0, 1], from the cache or made.
    It is rounded to float16 with and without a cache, so that both give the same numbers."""
    if check_prepared([item], size, hu):
        return _read_prepared(item.volume, size)
    path = volume_file(item, cache, size, hu) if cache and item.volume.exists() else None
    if path and path.exists():
        return _read_prepared(path, size)
    volume = make_volume(item, size, hu)
    if path:
        save_array(path, volume.numpy())
    return volume.float()


# A cache folder is a data set of its own: `<id>.npy`, after each a row of manifest-K-of-N.jsonl, and
# cache.json, which tells how they were made.

def file_name(text):
    """A text as the name of a file: what a system may refuse there is percent-encoded"""
    return re.sub(r'[\x00-\x1f%/\\:*?"<>|]|^\.', lambda match: f"%{ord(match[0]):02X}", text)


def cache_name(name):
    name = file_name(name)
    if len(name.encode()) > 150:  # systems end at 255, temporary files have more behind
        name = f"{name[:30]}%-{hashlib.sha1(name.encode()).hexdigest()}"
    return f"{name}.npy"


def is_cache(data):
    return Path(data, "cache.json").exists()


def read_cache(folder):
    path = folder / "cache.json"
    with expecting(path, "JSON that `data.py cache` wrote"):
        made = json.loads(read_text(path))
        version = made["version"]
    if version != CACHE_VERSION:
        raise wrong(folder, f"a cache of version {version}", f"version {CACHE_VERSION}")
    return made


def preprocessing(size, hu):
    """What cache.json tells of how volumes were made"""
    return {"version": CACHE_VERSION, "size": list(size), "hu": hu, "crop": list(CROP),
            "window": list(WINDOW), "dtype": "float16"}


@functools.cache
def check_settings(folder, size, hu):
    """ValueError if the volumes of a cache folder were made in another way"""
    made, wanted = read_cache(folder), preprocessing(size, hu)
    for key in wanted:
        if made[key] != wanted[key]:
            found, expected = (" ".join(map(str, np.ravel(one[key]))) for one in (made, wanted))
            flag = "--" * (key in ("size", "hu")) + key
            raise wrong(folder, f"a cache made with {flag} {found}", f"{flag} {expected}")


def check_prepared(items, size, hu):
    """Are these items of a cache folder? ValueError if it was made in another way"""
    is_prepared = bool(items) and isinstance(items[0], CachedItem)
    if is_prepared:
        check_settings(items[0].volume.parent, tuple(size), hu)
    return is_prepared


def _cache_rows(folder):
    """All rows of a cache folder: (manifest, place of the row in it, row)"""
    for manifest in sorted(folder.glob("manifest-*.jsonl")):
        place = 0
        with open(manifest, "rb") as lines, expecting(manifest, "rows of JSON"):
            for line in lines:
                if line.endswith(b"\n"):  # else it is being written, or was cut off
                    yield manifest, place, json.loads(line)
                place += len(line)


def _stamp(volume):
    """Bytes of all files of a volume and the newest of their times"""
    stats = [file.stat() for file in files_of(volume)]
    return {"size": sum(stat.st_size for stat in stats),
            "mtime_ns": max((stat.st_mtime_ns for stat in stats), default=0)}


def _source(volume):
    """What tells a raw volume: path, bytes, newest time, sha256 of all its files in a row"""
    content = hashlib.sha256()
    for file in files_of(volume):
        content.update(file.read_bytes())
    return {"path": str(volume.resolve()), **_stamp(volume), "sha256": content.hexdigest()}


def was_touched(path, source):
    """Has a raw volume, if it is there, another size or time than the row of a cache folder notes?"""
    if not os.path.exists(path):
        return False
    stamp = _stamp(Path(path))
    return any(stamp[name] != source[name] for name in stamp)


def has_changed(path, source):
    """Has it another content, too?"""
    return was_touched(path, source) and _source(Path(path))["sha256"] != source["sha256"]


def _cache_items(folder):
    """The items of a cache folder, sorted by id. The last row of an id counts."""
    volumes, items, touched = read_cache(folder).get("volumes", 0), {}, {}
    is_first = os.environ.get("RANK", "0") == "0"  # one process is enough to look for the raw files
    for manifest, place, row in _cache_rows(folder):
        name, source, other = row["id"], row["source"], items.get(row["id"])
        if other and other[1] != manifest and other.row["source"]["sha256"] != source["sha256"]:
            raise wrong(manifest, f"{name} of {source['path']}", f"its source in {other[1]}")
        labels = row["labels"] and np.array(row["labels"], np.float32)  # None becomes NaN
        items[name] = CachedItem(name, manifest, place, row["split"], row["patient"], labels)
        raw = source["path"]
        touched.pop(raw, None)
        if is_first and was_touched(raw, source):
            touched[raw] = source
    few = itertools.islice(touched.items(), 100)  # to read them all would take long
    changed = sorted(raw for raw, source in few if has_changed(raw, source))
    if changed:
        log.warning("%s: raw volumes have changed: %s", folder, shorten(changed))
    if len(touched) > 100:
        log.warning("%s: %d more raw volumes may have changed", folder, len(touched) - 100)
    files = set(os.listdir(folder))  # to ask for each of a million would take long
    absent = sorted(name for name in items if cache_name(name) not in files)
    tell_absent(absent, len(items), folder)
    items = [items[name] for name in sorted(items.keys() - set(absent))]
    if len(items) < volumes:
        log.warning("%s: holds %d of %d volumes, the rest is to be made", folder, len(items), volumes)
    return items


def lesions(item, size):
    """Where the findings of a phantom lie in the preprocessed volume: bool (18, D, H, W) of any `size`. Its
    mask is k + 1 where finding k lies; other masks tell none. A place holds a finding if any voxel does."""
    if item.mask is None or not item.patient.startswith(f"demo{phantoms.VERSION}-"):
        return torch.zeros(len(LABELS), *size, dtype=torch.bool)
    mask = torch.from_numpy(centre_crop(read_volume(item.mask, is_mask=True)[0]))
    return torch.stack([F.adaptive_max_pool3d((mask == number).float()[None], size)[0].bool()
                        for number in range(1, len(LABELS) + 1)])


def _report_tensors(report):
    """What `MG3D.encode_text` takes, of a tokenised report: (L,) three times, sentence_mask (S,)"""
    return {"input_ids": torch.from_numpy(report["input_ids"]),
            "attention_mask": torch.ones(len(report["input_ids"]), dtype=torch.long),
            "sentence_ids": torch.from_numpy(report["sentence_ids"]),
            "sentence_mask": torch.ones(len(report["sentences"]), dtype=torch.bool)}


def text_batch(tokenizer, texts):
    """n reports or prompts as `MG3D.encode_text` takes them: three (n, L), sentence_mask (n, S)"""
    reports = [tokenize_report(tokenizer, split_sentences(text)) for text in texts]
    return collate([_report_tensors(report) for report in reports], tokenizer.pad_token_id)


def pretraining_example(item, generator, tokenizer, cache=None, size=SIZE, hu="auto", mask_size=16,
                        mask_ratio=0.5, mlm_prob=0.15):
    """A masked volume (1, 1, D, H, W) and a masked report (L,) for `collate` and `MG3D.forward`"""
    volume = load_volume(item, cache, size, hu)
    report = tokenize_report(tokenizer, split_sentences(item.report))
    masked_ids, labels = mask_words(report["input_ids"], report["word_ids"], tokenizer, generator,
                                    mlm_prob)
    single_ids = [torch.from_numpy(ids) for ids in report["single_ids"]]
    return _report_tensors(report) | {
        "volume": volume[None],
        "volume_mask": mask_volume(size, mask_size, mask_ratio, generator)[None],
        "masked_ids": torch.from_numpy(masked_ids),
        "mlm_labels": torch.from_numpy(labels),
        "single_ids": single_ids,
        "single_mask": [torch.ones_like(ids) for ids in single_ids]}


class Examples(torch.utils.data.Dataset):
    """Training examples, asked for (index, step). make(item, generator) gives a dict or raises
    ValueError: then the volume is named, its id goes into "skipped", and the next one stands in. An
    epoch holds as many of the `negatives` as items, drawn anew. All is drawn from (seed, step, index):
    neither the worker nor the number of processes matters."""

    def __init__(self, items, make, seed=0, negatives=()):
        self.items, self.make, self.seed, self.negatives = items, make, seed, negatives

    def __len__(self):
        return len(self.items) * (2 if self.negatives else 1)

    def __getitem__(self, index_and_step):
        index, step = index_and_step
        generator = np.random.default_rng((self.seed, step, index))
        items = self.items
        if index >= len(items):
            items = self.negatives
            index = int(generator.integers(len(items)))
        skipped = []
        for k in range(len(items)):
            item = items[(index + k) % len(items)]
            try:
                return self.make(item, generator) | {"id": item.id, "skipped": skipped}
            except ValueError as error:
                log.warning("skipped %s: %s", item.id, error)
                skipped.append(item.id)
        raise ValueError(f"found none of {len(items)} volumes readable, expected at least one")


def collate(examples, pad_id=0):
    """B examples -> one batch: lists "ids" and "skipped", else tensors. Sequences are padded; lists of
    them come flat, those of patient 0 first: (ΣS, L_s); all else, (P, ...), becomes (ΣP, ...)."""
    padding = {"input_ids": pad_id, "masked_ids": pad_id, "single_ids": pad_id, "tokens": 0,
               "attention_mask": 0, "single_mask": 0, "sentence_mask": False, "sentence_ids": -1,
               "mlm_labels": -100}
    batch = {}
    for key in examples[0]:
        values = [example[key] for example in examples]
        if isinstance(values[0], list):
            values = list(itertools.chain(*values))
        if key in padding:
            values = pad_sequence(values, batch_first=True, padding_value=padding[key])
        elif key not in ("id", "skipped"):
            values = torch.cat(values)
        batch["ids" if key == "id" else key] = values
    return batch


def keep_apart(order, patients, size, generator):
    """An epoch in which no batch holds two volumes of one patient, where that can be.

    order (n,): volumes, of which `size` in a row are a batch and the rest is dropped; patients (n,):
    numbers. If a batch has two of one, all volumes are dealt out anew to the batches: sorted by patient,
    the k-th goes to batch k modulo their number.
    """
    batches = len(order) // size
    who = np.sort(patients[order[:batches * size]].reshape(batches, size), 1)
    if (who[:, 1:] != who[:, :-1]).all():
        return order
    rank = generator.permutation(patients.max() + 1)
    order = order[np.argsort(rank[patients[order]], kind="stable")]  # those of a patient in a row
    who = patients[order]
    is_crowd = np.append(np.zeros(batches, bool), who[batches:] == who[:-batches])
    order = np.append(order[~is_crowd], order[is_crowd])  # more than there are batches: last
    return order[:batches * size].reshape(size, batches).T[generator.permutation(batches)].ravel()


class Batches:
    """Endless batch sampler from step `start`: lists of (index, step) for one of `world` processes.
    An epoch is a permutation seeded by (seed, epoch), cut into global batches of batch_size · world.
    W processes with batch B see, in rank order, what one sees with W·B. patients: of each volume."""
    # NOTE(paper): reconstructions of one scan are separate volumes. `keep_apart` keeps them from being
    # negatives of each other in a batch.

    def __init__(self, n, batch_size, rank=0, world=1, seed=0, start=0, patients=()):
        self.size = batch_size * world
        if self.size > n:
            raise ValueError(f"found {n} volumes, expected a batch, {batch_size} x {world} = {self.size}")
        self.n, self.batch_size, self.first = n, batch_size, rank * batch_size
        self.seed, self.start, numbers = seed, start, {}
        self.patients = np.array([numbers.setdefault(name, len(numbers)) for name in patients])

    def __iter__(self):
        steps = self.n // self.size  # of an epoch
        for epoch in itertools.count(self.start // steps):
            generator = np.random.default_rng((self.seed, epoch))
            order = generator.permutation(self.n)
            if len(self.patients):
                order = keep_apart(order, self.patients, self.size, generator)
            for step in range(max(self.start, epoch * steps), (epoch + 1) * steps):
                first = step % steps * self.size + self.first
                yield [(int(index), step) for index in order[first:first + self.batch_size]]


# ===================================================================================== the tasks
# A task is a row of TASKS and a records function: (folder, fold) -> items.

CC_CCII = ("Normal", "CP", "NCP")
CASES = "{training: [{image, label[, fold]}][, validation, test: the same]}"
NNUNET = r"(.*/)images(Tr|Ts)/(.+)_0000", r"\1labels\2/\3"  # patterns of an image and its mask
BOX = 384.  # mm, side of the box around the middle of a scan (view "box")
FEW_SHOT_VOLUMES = 1000  # training volumes of the two CT-RATE tasks, as in the paper
MOST_WORDS = 150        # and full stops of a generated report, as in the release; see ReportGenerator


def _cc_ccii_items(folder, fold):
    scans, told, tables = defaultdict(list), {}, []
    for root, folders, files in walk(folder):
        label = re.fullmatch(r"(Normal|CP|NCP)(-\d+)?", root.parent.name)
        if label and root.name not in CC_CCII:  # the folder of a patient, perhaps in CP-20/CP
            for name in folders:
                scans[root.name, name].append(root / name)
                told[root.name, name] = label[1]
            folders.clear()  # do not list 400,000 slices
        for name in files:
            array = re.fullmatch(r"p(\d+)-s(\d+)\.npy", name)
            if array:
                scans[array.groups()].append(root / name)
        tables += [root / name for name in files if re.fullmatch(r".*fold\d.*\.csv", name.lower())]
    scans = {key: only(found, "one scan") for key, found in scans.items()}
    rows = [(key, label, "train") for key, label in sorted(told.items())]
    if tables or len(scans) > len(told):  # fold files alone tell the class of an .npy
        rows = []
        for part in ("train", "val", "test"):
            found = [path for path in tables
                     if re.fullmatch(rf".*fold{fold}(?!\d).*{part}.*\.csv", path.name.lower())]
            if not found and part == "test":
                continue  # as in the released folds
            if not found:
                raise wrong(folder, sorted(path.name for path in tables), f"also *fold{fold}*{part}*.csv")
            for where, row in read_table(only(found, "a fold"), "patient_id", "scan_id",
                                         target=("0", "1", "2"), label=CC_CCII):
                label, key = row["label"], (row["patient_id"], row["scan_id"])
                if label != CC_CCII[int(row["target"])]:
                    raise wrong(where, f"target {row['target']} and label {label}",
                                f"0 to 2 for {', '.join(CC_CCII)}")
                if told.get(key, label) != label:
                    raise wrong(where, f"label {label!r}", f"{told[key]!r}, that of {scans[key]}")
                rows.append((key, label, SPLIT_NAMES[part]))
    items = []
    for key, label, split in rows:
        scan = scans.get(key, Path(folder, label, *key))
        labels = np.float32([label == name for name in CC_CCII])
        items.append(Item("/".join(key), scan, "", split, key[0], labels))
    return _with_test(items)


def _luna16_items(folder, fold):
    scans = by_stem(path for path in find(folder, r".+\.mhd")
                    if re.fullmatch(r"subset\d", path.parent.name, re.IGNORECASE))
    tables = find(folder, r"candidates_V2\.csv") or find(folder, r"candidates\.csv")
    rows = read_table(only(tables, "a table"), "seriesuid", "coordX", "coordY", "coordZ",
                      **{"class": ("0", "1")}) if tables else []
    series = {row["seriesuid"] for _, row in rows}
    absent = sorted(series - scans.keys())
    subsets = {path.parent.name for path in scans.values()}  # some may not be downloaded
    if absent:
        log.warning("%s: left out %d series without .mhd: %s", folder, len(absent), shorten(absent))
    share_without = 1 - len(subsets) / 10
    if len(absent) > (share_without + 0.05) * len(series):
        raise wrong(folder, f"no .mhd for {len(absent)} of {len(series)} series, of {sorted(subsets)}",
                    "at most 5 % to be missing from these")
    parts = ["train"] * 5 + ["valid"] * 2 + ["test"] * 3  # of subsets 0 to 9
    split_of = {name: parts[int(path.parent.name[-1])] for name, path in scans.items()}
    items = []
    for line, (_, row) in enumerate(rows, 2):
        name = row["seriesuid"]
        if name in scans:
            centre = -row["coordX"], -row["coordY"], row["coordZ"]  # LPS -> RAS
            items.append(Item(f"{name}:{line}", scans[name], "", split_of[name], name,
                              np.float32([row["class"]]), centre=centre))
    return items


def _listed_cases(folder, fold, files):
    """(image, mask, split) of every case of the only JSON like CASES, [] without one; whether it has folds"""
    lists = {}
    for path in find(folder, r".+\.json"):
        with expecting(path, CASES):
            content = json.loads(read_text(path))
            if path.name == "splits_final.json":
                log.warning("%s: folds of nnU-Net are not read, expected one for each case", path)
            parts = _parts(content, "label") if isinstance(content, dict) else {}
            if "train" in parts:
                lists[path] = parts, {int(row["fold"]) for row in parts["train"] if "fold" in row}
    lists = {path: lists[path] for path in lists if lists[path][1]} or lists  # folds win
    path = only([*lists] or [folder], "a list of cases")
    parts, folds = lists.get(path, ({}, ()))
    if folds and fold not in folds:
        raise wrong(path, f"the folds {sorted(folds)}", f"fold {fold} among them")

    def locate(name):
        """Where the list says, or else the file whose path ends so, perhaps with nnU-Net's _0000"""
        for place in (path.parent / name, folder / name):
            if place.exists():
                return place
        end = "/" + ENDING.sub("", "/".join(Path(name).parts[-2:]))
        found = [file for key in files if key.endswith((end, end + "_0000")) for file in files[key]]
        return only(found or [place], f"{name} of {path}")
    cases = []
    with expecting(path, CASES):
        others = [row for part in parts if part != "train" for row in parts[part] if "label" in row]
        if folds and others:
            log.warning("%s: its folds count: left out %d cases of other parts", path, len(others))
        for part in ("train",) if folds else parts:
            for row in parts[part]:
                if part == "test" and "label" not in row:
                    continue  # the Decathlon keeps these masks
                is_tested = folds and int(row["fold"]) == fold
                image, label = locate(_path(row["image"])), locate(_path(row["label"]))
                cases.append((image, label, "test" if is_tested else part))
    return cases, bool(folds)


def _named_cases(folder, files, names):
    """(image, mask, split) of every case told by its name; a folder without any mask is left out"""
    splits = SPLIT_NAMES | {"imagestr": "train", "imagests": "test"}
    tells = rf"(?<![a-z])({'|'.join(splits)})[^a-z/]*(?:set|data|part)?[^a-z/]*(?:/|$)"  # not "test-retest"
    parts, cases = defaultdict(list), []
    for key, found in files.items():
        for image, label in (NNUNET, names):
            match = re.fullmatch(image, key, re.IGNORECASE)
            if match:
                name, part = match.expand(label), found[0].parent
                masks = files.get(name, [Path(name + ".nii.gz")])
                if stem(found[0]).startswith(part.name):  # the folder of a patient
                    part = part.parent
                parts[part].append((only(found, key), only(masks, name)))
    for part, pairs in parts.items():
        if any(mask.exists() for _, mask in pairs):
            told = re.findall(tells, part.relative_to(folder).as_posix().lower())
            split = splits[told[-1]] if told else "train"
            cases += [(*pair, split) for pair in pairs]
        else:
            log.warning("%s: left out %d scans: none has a mask", part, len(pairs))
    return cases


def _segment_items(folder, fold, patient=r"(.+)", image="", mask=""):
    """Cases of a JSON like CASES, else told by names. Patterns: patient in the name of an image; image,
    a path without its ending; mask, what becomes of that"""
    files, folder = defaultdict(list), folder.absolute()  # by their paths without the ending
    for file in find(folder, r".+\.nii(\.gz)?"):
        files[ENDING.sub("", file.as_posix())].append(file)
    cases, has_folds = _listed_cases(folder, fold, files)
    cases = cases or _named_cases(folder, files, (image, mask))
    items = []
    for volume, label, split in cases:
        match = re.fullmatch(patient, stem(volume), re.IGNORECASE)
        if not match:
            _warn_once(f"{folder}: names without a patient, such as {volume.name}: each counts as another")
        items.append(Item(stem(volume), volume, "", split, match[1] if match else stem(volume), mask=label))
    if len({(item.patient, item.split) for item in items}) > len({item.patient for item in items}):
        log.warning("%s: patients on both sides of its split: split by patient instead", folder)
        return [item._replace(split="train") for item in items]
    if fold and not has_folds and {item.split for item in items} != {"train"}:
        raise wrong(folder, f"--fold {fold}, but no folds", "no --fold")
    return _with_test(items)


def _with_test(items):
    """The items; where a set has no test part, its valid part is the one to report on"""
    if any(item.split == "test" for item in items):
        return items
    if any(item.split == "valid" for item in items):
        log.info("no part test: the part valid is reported on")
    return [item._replace(split="test") if item.split == "valid" else item for item in items]


def _stoic_items(folder, fold):
    scans, items = by_stem(find(folder, r".+\.mha")), []
    for table in find(folder, r"reference\.csv"):
        for _, row in read_table(table, "PatientID", probCOVID=("0", "1"), probSevere=("0", "1")):
            name, labels = row["PatientID"], np.float32([row["probCOVID"], row["probSevere"]])
            scan = scans.get(name, folder / f"{name}.mha")
            items.append(Item(name, scan, "", "train", name, labels))
    return items


def _ctrg_task_items(folder, fold):
    lists = [folder] if folder.suffix.lower() == ".json" else sorted(folder.glob("[!.]*.json"))
    if is_cache(folder):
        log.warning("%s: reports as they were cached, of CTRG-Chest with the impression", folder)
    elif lists:
        return keep_good(_ctrg_items(only(lists, "the reports"), with_result=False), folder)
    return _ct_rate_task_items(folder, fold)


def _ct_rate_task_items(folder, fold):
    return _with_test(load_items(folder))


OWN_SPLIT = _luna16_items, _ctrg_task_items, _ct_rate_task_items  # of sets that must not be split anew


def with_labels(items, labels, source):
    """The items that have any of labels {id: (K,)}, each with its own; says how many lack."""
    labels = {name: row for name, row in labels.items() if not np.isnan(row).all()}
    silent = [item.id for item in items if item.id not in labels]
    if silent:
        log.warning("%s: left out %d of %d items without a label: %s", source, len(silent),
                    len(items), shorten(silent))
    return [item._replace(labels=labels[item.id]) for item in items if item.id in labels]


def _own_items(folder, fold, needed=()):
    """Items of a manifest; if no column is needed, those that have a label in any column of labels"""
    path = folder / "manifest.csv" if folder.is_dir() else folder
    rows = read_table(path, "volume", *needed)
    items = _with_test(_manifest_items(path, rows))
    splits = {item.split for item in items}
    if fold and splits != {"train"}:
        raise wrong(path, f"--fold {fold}, but no folds", "no --fold")
    if needed:
        return items
    classes = []  # columns most of whose cells are labels: `read_labels` refuses the others
    for name in rows[0][1] if rows else ():
        cells = Counter(_plain(str(row[name])) for _, row in rows)
        known = cells["0"] + cells["1"]
        unknown = sum(cells[text] for text in ("-1", *NO_TEXT))
        if (name in LABELS or name not in COLUMNS) and len(rows) - known - unknown < known:
            classes.append(name)
    if not classes:
        raise wrong(path, "no label column", "one at least: 0, 1, or nothing if unknown")
    log.info("%s: labels %s", path, ", ".join(classes))
    items = with_labels(items, read_labels(path, classes), path)
    lost = splits - {item.split for item in items}
    if lost:
        raise wrong(path, f"no label in the part {min(lost)}", "some in each part")
    return [item._replace(classes=tuple(classes)) for item in items]


def _mask_values(mask):
    return np.unique(read_volume(mask, is_mask=True)[0])


def _mask_classes(masks, folder, cache):
    """The classes "1" to "K", where K is the greatest value of all masks, which are read once"""
    path = cache_file(cache, masks, "values")
    if not path.exists():
        found = in_processes(_mask_values, masks, os.cpu_count(), "values of masks")
        save_array(path, np.unique(np.concatenate(list(found))))
    values = np.load(path, allow_pickle=False).tolist()
    if not 1 < len(values) <= 256 or values != [*range(len(values))]:
        raise wrong(folder, f"the values {values[:9]} in all masks", "0 (background) to K, none left out")
    return tuple(f"{value:.0f}" for value in values[1:])


def with_classes(task, items):
    """The task with what the data of its items tell: the classes, and the HU of a cache"""
    if isinstance(items[0], CachedItem):
        task = task._replace(hu=read_cache(items[0].volume.parent)["hu"])
    return task._replace(classes=items[0].classes or task.classes)


class Task(NamedTuple):
    """A row of TASKS. Sizes and spacings are (z, y, x)."""
    kind: str                   # classify, segment, report, prompt or retrieve
    view: str                   # how a scan becomes the input: whole, slices, cube, box or patch
    records: callable           # (folder, fold) -> list of Item
    layout: str                 # of the folder, in words
    classes: tuple              # without the background; (): the data tell, see `with_classes`
    metric: str                 # picks the epoch and heads the result
    size: tuple                 # voxels that the network sees
    window: tuple | None        # what becomes 0 and 1; None: z-score of all but 0 (MR)
    spacing: tuple | None       # mm to which scans are resampled; None: as they are
    recipe: dict                # flags of finetune.py
    demo: dict                  # the same for the drawn set: minutes on two cores
    augment: dict | None = None     # settings of `augment`
    exclusive: bool = False     # classify: softmax over the classes, not a sigmoid each
    among: str | None = None    # classify: the metric counts those who have this class
    patches: int = 1            # cut from a volume at a time
    overlap: float = 0.5        # of the sliding window
    hu: str = "auto"            # source of Hounsfield units

    def settings(self):
        """What best.pt keeps, so that an edited row does not re-interpret an old file"""
        left_out = ("records", "layout", "recipe", "demo")
        return {name: self._asdict()[name] for name in sorted(self._fields) if name not in left_out}


def _recipe(epochs, warmup, batch_size, lr, lr_encoder=None, weight_decay=0., decay="cosine"):
    return {"epochs": epochs, "warmup": warmup, "batch_size": batch_size, "lr": lr, "clip_grad": 5.,
            "lr_encoder": lr_encoder or lr, "weight_decay": weight_decay, "decay": decay}


def _demo(epochs, batch_size, size=(32, 32, 32), lr=1e-3, **more):
    return {"encoder": "swin_t", "size": size, "epochs": epochs, "warmup": 1,
            "batch_size": batch_size, "lr": lr, "lr_encoder": lr, **more}


# NOTE(paper): most settings are those of the released scripts. Ours: the recipe of ct-rate-retrieval (as
# pre-training), epochs and decay of luna16, batch of segmentation, probabilities of rot90 and affine
# (luna16), affine and zoom (msd-lung), angles of all affine ones, contrast about the mean (cc-ccii),
# clip_grad but for msd-lung and covid-19-20, LayerNorm and cubes of 64 of luna16, cross entropy beside
# Dice (msd-lung), and between a finding's two texts (ct-rate-vocab). msd-lung is not cropped to the
# foreground: patches beside a tumour lie in the body.
LISTED = f", a JSON {CASES} anywhere in it, or nnU-Net's imagesTr/*_0000, labelsTr/*"
CT_RATE = "a CT-RATE folder (volumes, CSVs of reports, labels), a cache folder or a manifest .csv"
MILD = {"affine": .3, "zoom": .3, "scale": .3, "shift": .3}
SEGMENT_DEMO = _demo(15, 1, spacing=(6., 6., 6.), eval_every=5)
TASKS = {
    "cc-ccii": Task("classify", "slices", _cc_ccii_items,
        "{Normal,CP,NCP}/PATIENT/SCAN/*.png|jpg or p{patient}-s{scan}.npy; *fold0*{train,valid}*.csv",
        ("normal", "common pneumonia", "COVID-19"), "ACC", (32, 384, 384), (-1000., 1000.), None,
        _recipe(130, 30, 2, 3e-4, weight_decay=0.01), _demo(40, 4, lr=3e-4),
        {"flip": (.5, 0, 0), "brightness": .07, "contrast": .05}, exclusive=True),
    "luna16": Task("classify", "cube", _luna16_items,
        "subset{0-9}/*.mhd (0-4 train, 5-6 valid, 7-9 test); candidates_V2.csv or candidates.csv",
        ("nodule",), "AUC", (64, 64, 64), (-1000., 600.), None,
        _recipe(50, 0, 32, 1.5e-4), _demo(40, 8), {"flip": .5, "rot90": .5, "affine": .5}),
    "msd-lung": Task("segment", "patch", _segment_items,
        "imagesTr/*.nii.gz, labelsTr/*.nii.gz and dataset.json of the Decathlon" + LISTED,
        ("lung cancer",), "Dice", (96, 96, 96), (-175., 250.), (1.5, 1.5, 1.5),
        _recipe(1000, 50, 1, 1e-4, weight_decay=1e-5), SEGMENT_DEMO,
        {"flip": .5, "rot90": .3, "zoom": .15, "affine": .15, "scale": .1, "shift": .1}, patches=4),
    "covid-19-20": Task("segment", "patch", partial(_segment_items, patient=r".*-A-(\d+).*",
            image=r"(.*/volume-covid19-A-\d+(?:_\d)?)_ct", mask=r"\1_seg"),
        "volume-covid19-A-XXXX_ct.nii.gz and volume-covid19-A-XXXX_seg.nii.gz" + LISTED,
        ("COVID-19 lesion",), "Dice", (32, 192, 192), (-1000., 500.), (5., 1.25, 1.25),
        _recipe(1000, 50, 1, 7.5e-5, weight_decay=1e-5), SEGMENT_DEMO,
        {"flip": .5, "affine": .15, "noise": .15}, patches=3),
    "acdc": Task("segment", "patch", partial(_segment_items, patient=r".*(patient\d+).*",
            image=r"(.*/(patient\d+)/\2_frame\d+)", mask=r"\1_gt"),
        "[training/, testing/]patientXXX/patientXXX_frameYY.nii.gz, …_frameYY_gt.nii.gz" + LISTED,
        ("right ventricle", "myocardium", "left ventricle"), "Dice", (32, 192, 192), None, None,
        _recipe(300, 5, 1, 3e-4, weight_decay=1e-5),
        _demo(12, 1, spacing=(5., 4., 4.), eval_every=4), {"flip": .1}, patches=2, overlap=0.75),
    "stoic": Task("classify", "box", _stoic_items,
        "data/mha/{PatientID}.mha, metadata/reference.csv (PatientID,probCOVID,probSevere)",
        ("COVID-19", "severe"), "AUC", (128, 128, 128), (-1100., 300.), None,
        _recipe(40, 0, 2, 5e-5), _demo(6, 4), among="COVID-19"),
    # A word decoder at 1e-3 learns to ignore the image: its loss is what the words alone allow.
    "ctrg": Task("report", "whole", _ctrg_task_items,
        "a .json {train, val, test: [{id, report, image_path}]} or its folder, " + CT_RATE,
        (), "BLEU-4", SIZE, WINDOW, None, _recipe(30, 0, 2, 1e-4, lr_encoder=5e-5, decay="step"),
        _demo(20, 4, lr=5e-4, decay="cosine", eval_every=4)),
    "ct-rate-vocab": Task("prompt", "whole", _ct_rate_task_items,
        CT_RATE + " with all 18 labels", LABELS, "AUC", SIZE, WINDOW, None,
        _recipe(10, 0, 1, 1e-5, weight_decay=0.01),
        _demo(25, 4, lr=3e-4, eval_every=5, text_encoder="demo", embed_dim=192)),
    "ct-rate-retrieval": Task("retrieve", "whole", _ct_rate_task_items,
        CT_RATE, LABELS, "Recall@50", SIZE, WINDOW, None,
        _recipe(10, 1, 4, 1e-4, lr_encoder=2e-5, weight_decay=0.01),
        _demo(20, 8, size=(32, 32, 64), text_encoder="demo", embed_dim=192)),
    # One's own data. No flips: a class may be of one side.
    "labels": Task("classify", "whole", _own_items,
        "a manifest .csv, or a folder with manifest.csv: columns of 0, 1 or nothing are labels",
        (), "AUC", SIZE, WINDOW, None, _recipe(40, 1, 2, 5e-5, weight_decay=0.01),
        _demo(20, 4, lr=5e-4, eval_every=4), MILD),
    "segment": Task("segment", "patch", partial(_own_items, needed=("mask",)),
        "a manifest .csv, or a folder with manifest.csv: masks of 0, 1 … K in the column mask",
        (), "Dice", (96, 96, 96), WINDOW, (1.5, 1.5, 1.5),
        _recipe(300, 10, 1, 1e-4, weight_decay=1e-5), SEGMENT_DEMO, MILD, patches=4),
}


def prompts(classes):
    """The two prompts of every class, in a row: [name 0, not name 0, name 1, …]"""
    return [prompt for name in classes for prompt in (f"{name}.", f"not {name}.")]


def demo_prompts():
    """The same of the 18 in the words of the demo's reports, which know no "not" """
    return [text for name in LABELS for text in phantoms.prompts(name)]


def _draw_fifth(items, task, seed, fold=0):
    """A random fifth of the patients, number `fold` of five; classify: a fifth of every class"""
    labels = {}
    for item in items:
        label = item.labels if task.kind == "classify" else np.zeros(1)
        labels[item.patient] = np.fmax(label, labels.get(item.patient, 0))  # unknown is 0
    groups = defaultdict(list)
    for patient in sorted(labels):
        groups[tuple(labels[patient])].append(patient)
    if not task.classes:  # of many labels few may share all: they are one group
        few = [key for key in groups if len(groups[key]) < 5]
        groups[()] = [*itertools.chain(*map(groups.pop, few))]
    drawn, generator = set(), np.random.default_rng(seed)
    for _, group in sorted(groups.items()):
        if len(group) > 1:  # a single one is needed to train on
            drawn |= {group[k] for k in np.array_split(generator.permutation(len(group)), 5)[fold]}
    return drawn


def _draw_splits(items, task, folder, fold, seed):
    if {item.split for item in items} <= {"train", None} and task.records not in OWN_SPLIT:
        if fold > 4:
            raise wrong(folder, f"--fold {fold}, but no folds", "0 to 4, a fifth that is drawn")
        test = _draw_fifth(items, task, seed, fold)
        log.info("%s: no parts: %d of %d patients are drawn to test on", folder, len(test),
                 len({item.patient for item in items}))
        items = [item._replace(split="test" if item.patient in test else "train") for item in items]
    if not any(item.split == "test" for item in items):
        raise wrong(folder, f"{len(items)} items and none for the part test", task.layout)
    if not any(item.split == "valid" for item in items):
        drawn = _draw_fifth([item for item in items if item.split == "train"], task, seed)
        items = [item._replace(split="valid") if item.patient in drawn else item for item in items]
    if task.kind in ("prompt", "retrieve"):  # few shots
        generator = np.random.default_rng(seed)
        for split, n in (("train", FEW_SHOT_VOLUMES), ("valid", FEW_SHOT_VOLUMES // 4)):
            ids = [item.id for item in items if item.split == split]
            drawn = {ids[k] for k in generator.permutation(len(ids))[:n]}
            items = [item for item in items if item.split != split or item.id in drawn]
    return items


def check_classes(items, task, source):
    """Refuse a part of a classification with a class that none or all have, of a manifest with no other."""
    if task.kind != "classify" or not items:
        return
    classes = items[0].classes or task.classes
    labels = np.array([item.labels for item in items])
    bad = [name for name, values in zip(classes, labels.T) if not {0, 1} <= set(values)]
    if bad and (task.classes or len(bad) == len(classes)):
        raise wrong(source, f"none or all with {bad[0]}", "some of both")
    if bad:
        log.warning("%s: none or all have %s", source, shorten(bad))


def load_task(name, folder, fold=0, seed=0, cache="cache", with_absent=False):
    """The data of a task in its native layout -> list of Item. The split or fold of the set counts; else a
    fifth of the patients, drawn with `seed`, is test. Without a valid part a fifth of the training patients
    becomes it. "demo" is drawn and cached once. with_absent: also what has no file, last. ValueError for a
    patient in two splits, a case without mask, over 5 % of volumes without a file, a class that none or all
    of a part have."""
    task, folder = TASKS[name], Path(folder)
    if str(folder) == "demo":
        folder = Path(cache, f"demo-{name}-{phantoms.VERSION}")
        if not folder.exists():
            phantoms.write_task_demo(name, folder.with_suffix(".part")).rename(folder)
    listed = task.records(folder, fold)
    items = with_a_file(listed, folder)
    if not items:
        raise wrong(folder, f"nothing of {name}", task.layout)
    if fold and task.records in OWN_SPLIT:
        raise wrong(folder, f"--fold {fold}, but no folds", "no --fold")
    if task.view == "whole" and (task.window, task.spacing) != (WINDOW, None):
        raise wrong(name, f"window {task.window} and spacing {task.spacing} of a whole scan",
                    f"{WINDOW} and None, as in pre-training")
    if task.kind == "segment":
        without = [item.mask or item.id for item in items if not (item.mask and item.mask.exists())]
        if without:
            raise wrong(folder, f"{len(without)} cases without mask: {shorten(without)}", "none")
        if not task.classes:
            classes = _mask_classes([item.mask for item in items], folder, cache)
            items = [item._replace(classes=classes) for item in items]
    unknown = [item.id for item in items if item.labels is None or np.isnan(item.labels).any()]
    if unknown and task.kind == "prompt":
        raise wrong(folder, f"unknown labels of {shorten(unknown)}", "0 or 1 for all 18 findings")
    check_identities(items, folder, lambda item: item.split)
    items = _draw_splits(items, task, folder, fold, seed)
    tell_spellings(items, folder)
    for split in SPLITS:
        check_classes([item for item in items if item.split == split], task, f"{folder}, part {split}")
    absent = [item for item in listed if not item.volume.exists()] if with_absent else []
    return items + absent


# -------------------------------------------------------------------- what a network sees of a scan
# A scan is prepared once (oriented, windowed, resampled; float16, cached, memory-mapped), then cut.

def read_mask(item, task, shape, affine):
    """The mask of a case, uint8 (z, y, x) in RAS, on the grid of its scan"""
    mask, _, mask_affine = read_volume(item.mask, is_mask=True)
    if mask.shape != shape or not np.allclose(mask_affine, affine, atol=0.05):
        raise wrong(item.mask, f"a mask of {mask.shape} voxels, affine {mask_affine.tolist()}",
                    f"the grid of {item.volume}, {shape}, {affine.tolist()}")
    unknown = sorted(set(np.unique(mask).tolist()) - set(range(len(task.classes) + 1)))
    if unknown:
        raise wrong(item.mask, f"the label values {unknown[:5]}", f"0 to {len(task.classes)}")
    return mask.astype(np.uint8)


def check_spacing(item, task, spacing):
    """Refuse what cannot be millimetres where a task resamples a scan or cuts it by millimetres."""
    if task and task.view != "whole" and not 0.05 < min(spacing) <= max(spacing) < 50:
        raise wrong(item.volume, f"a spacing of {spacing}", "millimetres, between 0.05 and 50")


def prepare(item, task, cache="cache"):
    """A scan of a task, cached: volume (z, y, x) float16, in [0, 1] or z-scored but for zeros; mask uint8 of
    its shape or None; affine 4×4 of the scan as it was. View "patch": resampled to the spacing of the
    task; "slices": to 4/3 of its size in plane; "box": its middle BOX mm, to its size."""
    size = task.size if task.view in ("slices", "box") else None
    hu = () if task.hu == "auto" else (task.hu,)  # so that older caches stay good
    view = f"box of {BOX} mm" if task.view == "box" else task.view
    path = cache_file(cache, filter(None, (item.volume, item.mask)), view, size, task.window,
                      task.spacing, len(task.classes), item.rescale, *hu)
    mask_path, affine_path = path.with_suffix(".mask.npy"), path.with_suffix(".affine.npy")
    if not path.exists():
        array, spacing, affine = to_ras(item.volume, *read_item(item))
        check_spacing(item, task, spacing)
        mask = read_mask(item, task, array.shape, affine) if item.mask else None
        if task.window:
            array, _ = to_hounsfield(array, item.volume, task.hu, item.rescale)
            array = scale(array, task.window)
        else:
            inside = array != 0
            array[inside] = (array[inside] - array[inside].mean()) / max(array[inside].std(), 1e-6)
        shape = array.shape
        if task.view == "box":
            side = [round(BOX / mm) for mm in spacing]
            array = cut(array, np.subtract(shape, side) // 2, side)
            shape = task.size
        elif task.view == "slices":  # the whole field of view, to be cropped
            shape = (task.size[0], *(round(side * 4 / 3) for side in task.size[1:]))
        elif task.spacing:
            shape = tuple(max(1, round(n * mm / new)) for n, mm, new in zip(shape, spacing, task.spacing))
        if shape != array.shape:
            array = resize(array, shape)
            mask = None if mask is None else resize(mask, shape, "nearest-exact").astype(np.uint8)
        save_array(affine_path, affine)
        if item.mask:
            save_array(mask_path, mask)
        save_array(path, array.astype(np.float16))  # last: then what lies beside it is complete
    load = partial(np.load, mmap_mode="r", allow_pickle=False)
    return load(path), load(mask_path) if item.mask else None, load(affine_path)


def candidate_voxel(item, shape, affine):
    """Where the candidate of an item lies in its scan: index (z, y, x)"""
    index = (np.linalg.inv(affine) @ [*item.centre, 1])[2::-1]
    if not ((index >= -0.5) & (index <= np.array(shape) - 0.5)).all():      # nor NaN
        raise wrong(item.volume, f"the candidate {item.id} at {list(item.centre)} (RAS, mm)",
                    f"it inside {shape} voxels")
    return np.rint(index).astype(int)


def _draw_place(volume, mask, foreground, generator):
    """A voxel of the mask or, if not `foreground`, one in the body beside it: any value but 0"""
    places = np.flatnonzero(mask) if foreground else ()
    if len(places):
        return np.unravel_index(generator.choice(places), mask.shape)
    for _ in range(20):  # most voxels will do
        place = tuple(generator.integers(0, mask.shape))
        if not mask[place] and volume[place] != 0:
            break
    return place


def cut_views(item, task, cache, generator=None):
    """What the network sees of an item: float32 (P, 1, D, H, W) and mask int64 (P, D, H, W) or None. With
    a `generator` places are drawn: crops of "slices", patches around a voxel of the mask and elsewhere
    in turn. A "cube" lies around its candidate."""
    if task.view == "whole":
        return load_volume(item, cache, task.size, task.hu)[None], None
    volume, mask, affine = prepare(item, task, cache)
    half = np.array(task.size) // 2
    room = np.maximum(np.array(volume.shape) - task.size, 0)
    corners = [room // 2 if generator is None else generator.integers(0, room + 1)]
    if task.view == "cube":
        corners = [candidate_voxel(item, volume.shape, affine) - half]
    elif task.view == "patch" and generator is not None:
        first = generator.integers(2)  # which kind an odd number of patches has more of
        corners = [np.array(_draw_place(volume, mask, (i + first) % 2 == 0, generator)) - half
                   for i in range(task.patches)]

    def boxes(array):
        return torch.from_numpy(np.stack([cut(array, corner, task.size) for corner in corners]))
    return boxes(volume).float()[:, None], None if mask is None else boxes(mask).long()


def network_input(item, task, cache="cache"):
    """What a network sees of an item in prediction, float32 (1, D, H, W), nothing drawn"""
    return cut_views(item, task, cache)[0][0]


def augment(volume, mask, generator, settings, spacing=(1, 1, 1)):
    """A volume (1, D, H, W) and its mask (D, H, W) or None, changed alike. settings: probability of flip
    (each axis, or of one each), rot90 (in plane), affine (rotation up to π/15), zoom (±10 %), scale and
    shift (of values, ±0.1), noise (of 0.01); largest change for brightness, contrast."""
    def happens(name):
        return generator.random() < settings.get(name, 0)
    flips = np.broadcast_to(settings.get("flip", 0), 3)
    axes = [axis for axis, probability in zip((-3, -2, -1), flips) if generator.random() < probability]
    _, _, height, width = volume.shape
    turns = generator.integers(1, 4) if happens("rot90") and height == width else 0
    volume = volume.flip(axes).rot90(turns, (-2, -1))
    if mask is not None:
        mask = mask.flip(axes).rot90(turns, (-2, -1))
    is_turned, is_zoomed = happens("affine"), happens("zoom")
    if is_turned or is_zoomed:
        angles = generator.uniform(-math.pi / 15, math.pi / 15, 3) * is_turned  # (x, y, z)
        matrix = Rotation.from_euler("XYZ", angles * [1, -1, 1]).as_matrix()
        matrix /= generator.uniform(0.9, 1.1) if is_zoomed else 1
        sides = np.multiply(volume.shape[1:], spacing)[::-1]  # mm (x, y, z), as grid_sample wants
        matrix = matrix * sides / sides[:, None]  # coordinates run from -1 to 1 on each axis
        theta = torch.from_numpy(np.c_[matrix, np.zeros(3)]).float()[None]
        grid = F.affine_grid(theta, (1, *volume.shape), align_corners=False)
        sample = partial(F.grid_sample, grid=grid, padding_mode="border", align_corners=False)
        volume = sample(volume[None])[0]
        if mask is not None:
            mask = sample(mask[None, None].float(), mode="nearest")[0, 0].long()
    if happens("scale"):
        volume = volume * generator.uniform(0.9, 1.1)
    if happens("shift"):
        volume = volume + generator.uniform(-0.1, 0.1)
    volume = volume + generator.uniform(-1, 1) * settings.get("brightness", 0)
    contrast = 1 + generator.uniform(-1, 1) * settings.get("contrast", 0)
    volume = (volume - volume.mean()) * contrast + volume.mean()
    if "noise" in settings and happens("noise"):
        noise = generator.standard_normal(volume.shape, dtype=np.float32)
        volume = volume + 0.01 * torch.from_numpy(noise)
    return volume, mask


def space_out(text):
    """Chinese and Japanese are written without blanks: put some around every character."""
    return CHARACTER.sub(r" \g<0> ", text)


def report_words(report, with_stops=False):
    """The words of a report in lower case; "0.5", "3-4mm" and "low-density" are one, every Chinese
    character is one, and so, if asked for, is a full stop"""
    stops = "|[.。]" if with_stops else ""
    return re.findall(r"\w+(?:-\w+|(?<=\d)\.\d\w*)*" + stops, space_out(report.lower()))


def build_vocabulary(reports, min_count=3):
    """4 special words, then those at least min_count times in the reports. Warns of words that no report of
    the generator has room for."""
    reports = [report_words(report, with_stops=True) for report in reports]
    count = Counter(itertools.chain(*reports))
    beyond = sum(len(words[MOST_WORDS:]) for words in reports)
    if beyond:
        log.warning("warning: %.1f %% of the words of the reports, the ends of long ones, are not learned: a "
                    "generated report has at most %d", 100 * beyond / count.total(), MOST_WORDS)
    words = sorted(word for word, times in count.items() if times >= min_count)
    if not words:
        raise ValueError(f"found no word {min_count} times in the reports, expected a vocabulary")
    return ["<pad>", "<bos>", "<eos>", "<unk>", *words]


def task_example(item, generator, task, cache="cache", vocabulary=(), max_length=MOST_WORDS, tokenizer=None):
    """A training example: volume (P, 1, D, H, W) and label (P, K), mask (P, D, H, W), tokens (L,) or what
    `MG3D.encode_text` takes. vocabulary: {word: number}"""
    volumes, masks = cut_views(item, task, cache, generator)
    if task.augment and not (task.view == "cube" and item.labels[0] == 0):  # no negative candidate
        for i, volume in enumerate(volumes):
            mask = None if masks is None else masks[i]
            volumes[i], mask = augment(volume, mask, generator, task.augment, task.spacing or (1, 1, 1))
            if masks is not None:
                masks[i] = mask
    if task.kind == "segment":
        return {"volume": volumes, "mask": masks}
    if task.kind == "report":
        words = ["<bos>", *report_words(item.report, with_stops=True), "<eos>"]
        # A report that is longer has no <eos>: it does not end there.
        tokens = [vocabulary.get(word, vocabulary["<unk>"]) for word in words[:max_length + 2]]
        return {"volume": volumes, "tokens": torch.tensor(tokens)}
    if task.kind == "retrieve":
        report = tokenize_report(tokenizer, split_sentences(item.report))
        return {"volume": volumes} | _report_tensors(report)
    return {"volume": volumes, "label": torch.from_numpy(item.labels)[None]}


def to_own_grid(probabilities, item):
    """Probabilities (K, D, H, W) as prepared -> label map uint8 (x, y, z) as stored, affine"""
    xyz, affine = read_stored(item.volume)
    size = to_ras(item.volume, xyz, affine)[0].shape
    probabilities = F.interpolate(probabilities[None].float(), size, mode="trilinear")
    labels = probabilities[0].argmax(0).numpy().astype(np.uint8)  # (z, y, x) in RAS
    back = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], nib.io_orientation(affine))
    return nib.apply_orientation(labels.T, back), affine


# -------------------------------------------------------------------------------------- commands
def by_volume(items):
    groups = defaultdict(list)
    for item in items:
        groups[item.volume].append(item)
    return groups


def outlive_signals(worker):
    """Begin a loader's worker, which SIGTERM ends only if the run itself sends it, and Ctrl-C never: one to
    all processes, as of torchrun, SLURM and a terminal, would else end the run before it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run = multiprocessing.parent_process().pid

    def wait():
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != run:
            pass
        os._exit(0)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=wait, daemon=True).start()


def _begin_worker():
    """One thread is enough for a worker, and without its main process it would wait for ever."""
    def end():
        multiprocessing.parent_process().join()
        os._exit(1)
    torch.set_num_threads(1)
    threading.Thread(target=end, daemon=True).start()


def in_processes(job, jobs, workers, name, ordered=True):
    """Yield job(x) for each of `jobs`, in order or as they come, from `workers` processes"""
    with ProcessPoolExecutor(max(1, workers), initializer=_begin_worker) as pool:
        futures = [pool.submit(job, x) for x in jobs]
        try:
            done = futures if ordered else as_completed(futures)
            for future in tqdm(done, name, total=len(futures), unit="scan", mininterval=BAR_SECONDS):
                yield future.result()
        except BrokenProcessPool:
            killed = "that one was killed, probably for want of memory"
            raise wrong(f"--workers {workers}", killed, "fewer") from None
        finally:
            for future in futures:  # `shutdown` with cancel_futures may wait for ever
                future.cancel()


def _tried(job, x):
    """job(x), or the ValueError that it raises"""
    try:
        return job(x)
    except ValueError as error:
        return error


def good_results(job, jobs, n, workers, name):
    """Yield job(x) as they come. A ValueError is logged, x left out; more than 5 % of n are refused."""
    problems = 0
    for result in in_processes(partial(_tried, job), jobs, workers, name, ordered=False):
        if not isinstance(result, ValueError):
            yield result
            continue
        log.warning("left out %s", result)
        problems += 1
        if problems > 0.05 * n:
            raise ValueError(f"{problems} of {n} scans are wrong, more than 5 %:\n  {result}")


def _prepare_scan(items, task, cache):
    """Put the volume of these items into the cache -> its path"""
    if task.view == "whole":
        if not volume_file(items[0], cache, task.size, task.hu).exists():
            load_volume(items[0], cache, task.size, task.hu)
    else:
        volume, _, affine = prepare(items[0], task, cache)
        for item in items:
            if item.centre:
                candidate_voxel(item, volume.shape, affine)
    return items[0].volume


def prepare_all(items, cache, workers, task):
    """Put the scans of a task into the cache, in `workers` processes -> the items that are good"""
    if check_prepared(items, task.size, task.hu):
        return items
    scans = by_volume(items)
    task = task._replace(records=None)  # other processes need not know this function
    job = partial(_prepare_scan, task=task, cache=cache)
    good = set(good_results(job, scans.values(), len(scans), workers, "prepare"))
    return [item for item in items if item.volume in good]


def read_shard(text):
    """"3/16" -> (3, 16)"""
    k, _, n = text.partition("/")
    if not (k.isdecimal() and n.isdecimal() and 1 <= int(k) <= int(n)):
        raise wrong("--shard", text, "a shard from 1/n to n/n, such as 3/16")
    return int(k), int(n)


def shard_of(name, n):
    """The shard, 1 to n, of an id: it alone tells, whatever else is listed, in whatever order."""
    return 1 + int(hashlib.sha1(name.encode()).hexdigest(), 16) % n


def begin_cache(folder, size, hu, volumes):
    """Make a cache folder for so many volumes, or see that one was begun in the same way."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [name for name in os.listdir(folder) if not is_hidden(name)]
    if is_cache(folder):  # asked for last: another shard may begin at this moment
        check_settings(folder, size, hu)
        volumes = max(volumes, read_cache(folder).get("volumes", 0))
    elif files:
        raise wrong(folder, f"other files, such as {files[0]}", "a new folder or a cache")
    with written_whole(folder / "cache.json") as file:
        file.write(json.dumps(preprocessing(size, hu) | {"volumes": volumes}, indent=1).encode())


def _described(item):
    """What a row of a cache folder says of an item beside its source"""
    labels = item.labels
    if labels is not None:
        labels = [None if math.isnan(value) else value for value in labels.tolist()]
    return {"id": item.id, "split": item.split, "patient": item.patient, "labels": labels,
            "rescale": item.rescale and list(item.rescale),
            "geometry": item.geometry and list(item.geometry[1:]), "report": item.report}


def _cache_volume(item, folder, shard, size, hu):
    """Put a volume into a cache folder -> its row of the manifest"""
    try:  # before the volume is read: a file that is exchanged in between is found out later
        row = {"source": _source(item.volume)} | _described(item)
    except OSError as error:
        raise wrong(item.volume, error, "files that may be read") from None
    volume = make_volume(item, size, hu)
    save_array(folder / cache_name(item.id), volume.numpy(), shard)
    return row


def _made_rows(folder, items):
    """{id: row} of the volumes that a cache folder holds; says how many of `items` it lacks"""
    files = set(os.listdir(folder))
    rows = {row["id"]: row for _, _, row in _cache_rows(folder) if cache_name(row["id"]) in files}
    done = sum(item.id in rows for item in items)
    print(f"{folder}: {done} of {len(items)} of all shards; {len(items) - done} still lack", flush=True)
    return rows


def _compare(items, rows, folder):
    """Tell which items differ from their rows; ValueError for another source of an id."""
    differ = []
    for item in tqdm(items, "compare", unit="scan", disable=None):
        row, raw = rows[item.id], item.volume
        is_new = has_changed(raw, row["source"])
        if is_new and str(raw.resolve()) != row["source"]["path"]:
            raise wrong(raw, "another content", f"that of {row['source']['path']}, which has its id")
        if is_new or row != row | _described(item):
            differ.append(item.id)
    if differ:
        log.warning("%s: %d volumes have another file, report, split, patient, label or metadata now: %s; "
                    "to make them anew, delete their rows in the manifest-*.jsonl", folder, len(differ),
                    shorten(differ))


def make_cache(args):
    """Add to OUT what it lacks of a shard. A wrong volume is named and left out."""
    k, n = read_shard(args.shard)
    shard, folder, size = f"{k}-of-{n}", args.out, tuple(args.size)
    if is_cache(args.data):
        raise wrong(args.data, "a cache folder", "raw volumes")
    items = with_words(read_items(args.data, args.cache, with_absent=True), args.data)
    if not items:
        raise wrong(args.data, "no item with a report", LAYOUTS)
    check_identities(items, args.data, lambda item: item.split == "train")
    begin_cache(folder, size, args.hu, len(items))
    mine = [item for item in items if shard_of(item.id, n) == k]
    rows = _made_rows(folder, items)
    strangers = sorted(rows.keys() - {item.id for item in items})
    if strangers:
        log.warning("%s: holds %d volumes that %s does not list: %s; to leave them out, delete their rows in "
                    "the manifest-*.jsonl", folder, len(strangers), args.data, shorten(strangers))
    _compare([item for item in mine if item.id in rows], rows, folder)
    lacking = [item for item in mine if item.id not in rows]
    todo = [item for item in lacking if item.volume.exists()]
    if len(todo) < len(lacking) and args.data.is_file():  # of CT-RATE people have parts
        absent = [item.volume for item in lacking if not item.volume.exists()]
        log.warning("%s: no file for %d volumes of this shard: %s", args.data, len(absent), shorten(absent))
    needed = len(todo) * math.prod(size) * 2 / 1e9  # GB
    free = shutil.disk_usage(folder).free / 1e9
    print(f"shard {args.shard}: {len(todo)} volumes to make, {needed:.2f} of {free:.2f} GB", flush=True)
    if needed > free:
        raise wrong(folder, f"{free:.2f} GB free", f"{needed:.2f} GB")
    for part in folder.glob(f"*.{shard}.*.part"):  # a kill left it
        part.unlink()
    job = partial(_cache_volume, folder=folder, shard=shard, size=size, hu=args.hu)
    path = folder / f"manifest-{shard}.jsonl"
    with open(path, "ab") as manifest:
        manifest.truncate(path.read_bytes().rfind(b"\n") + 1)  # a kill may have cut off a row
        for row in good_results(job, todo, len(mine), args.workers, "cache"):
            manifest.write(json.dumps(row).encode() + b"\n")
            manifest.flush()
            os.fsync(manifest.fileno())
    _made_rows(folder, items)


def _check_scan(items, task, hu):
    """A line of the table of `check`, for the items of one volume"""
    item = items[0]
    if isinstance(item, CachedItem):
        made = read_cache(item.volume.parent)
        array, spacing = load_volume(item, None, made["size"], made["hu"])[0].numpy(), ()
        axes, note = "", "preprocessed"
    else:
        xyz, stored_affine = read_item(item)
        array, spacing, affine = to_ras(item.volume, xyz, stored_affine)
        check_spacing(item, task, spacing)
        axes, note = "".join(nib.aff2axcodes(stored_affine)), "no CT: z-score"
        if task is None or task.window:
            array, note = to_hounsfield(array, item.volume, hu, item.rescale)
    for candidate in items:
        if candidate.centre:
            candidate_voxel(candidate, array.shape, affine)
    if item.mask and task and task.kind == "segment":
        values, counts = np.unique(read_mask(item, task, array.shape, affine), return_counts=True)
        note += "; voxels " + ", ".join(f"{value}: {count}" for value, count in zip(values, counts))
    if item.report:
        note += f"; {len(item.report.split())} words in {len(split_sentences(item.report))} sentences"
    shape, mm = "x".join(map(str, array.shape)), " ".join(f"{side:.2f}" for side in spacing)
    return f"{shape:>13} {mm:>17} {axes:4} {f'{array.min():.0f}..{array.max():.0f}':>13}  {note}"


def check(args):
    """Print a line for each of the first --limit volumes, and what the data hold -> problems"""
    task = TASKS.get(args.task)
    if task:
        print(f"{args.task} lies on disk as: {task.layout}")
        listed = load_task(args.task, args.data, args.fold, cache=args.cache, with_absent=True)
        items = [item for item in listed if item.volume.exists()]
        task = with_classes(task, items)
    else:
        listed = read_items(args.data, args.cache)
        items = keep_good(listed, args.data)
    print(f"{'volume':32} {'z, y, x':>13} {'spacing (mm)':>17} {'axes':4} {'values':>13}  note")
    scans = list(by_volume(items).values())[:args.limit]
    problems = 0
    job = partial(_tried, partial(_check_scan, task=task and task._replace(records=None),
                                  hu=task.hu if task else args.hu))
    for scan, line in zip(scans, in_processes(job, scans, args.workers, "check")):
        if isinstance(line, ValueError):
            problems += 1
            line = f"PROBLEM {line}"
        tqdm.write(f"{(scan[0].volume.name if task else scan[0].id)[-32:]:32} {line}")
    for split in SPLITS:
        part = [item for item in items if item.split == split]
        patients, volumes = {item.patient for item in part}, {item.volume for item in part}
        print(f"{split:6} {len(part):7} items of {len(patients)} patients in {len(volumes)} volumes")
        labels = np.array([item.labels for item in part if item.labels is not None])
        if len(labels):
            counts = zip((labels == 1).sum(0), task.classes if task else LABELS)
            print(f"{'':14} {', '.join(f'{count} {name}' for count, name in counts)}")
    left_out = len(listed) - len(items)
    print(f"{len(scans)} volumes read, {problems} of them with a problem; {left_out} left out")
    return problems + left_out


def main():
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("command", choices=("check", "cache", "demo"))
    add("--data", type=Path, help="manifest .csv, CT-RATE or cache folder, CTRG-Chest .json, or demo")
    add("--task", choices=TASKS, help="--data is the folder of this task in its native layout")
    add("--fold", type=int, default=0, help="fold of --task that is the test part")
    add("--cache", type=Path, default=Path("cache"), metavar="DIR", help="where --data demo lies")
    add("--size", type=int, nargs=3, default=SIZE, metavar=("D", "H", "W"), help="voxels (z, y, x)")
    add("--hu", choices=("auto", "header", "csv"), default="auto",
        help="Hounsfield units: told from the values, as stored, or rescaled by the metadata CSV")
    add("--limit", type=int, metavar="N", help="check: read only the first N volumes")
    add("--workers", type=int, default=os.cpu_count(), help="cache, check: processes")
    add("--out", type=Path, metavar="DIR", help="cache, demo: the folder to write")
    add("--shard", default="1/1", metavar="K/N", help="cache: make part K of N alone")
    add("--n", type=int, help="demo: patients; by default 64, or as many as the task needs")
    add("--seed", type=int, default=0, help="demo: the same seed gives the same bytes")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        check_numbers(args)
        for name in {"check": ["data"], "cache": ["data", "out"], "demo": ["out"]}[args.command]:
            if getattr(args, name) is None:
                raise wrong(args.command, f"no --{name}", "it")
        if args.command == "check":
            sys.exit(int(check(args) > 0))
        elif args.command == "cache":
            check_size(args.size)
            make_cache(args)
        elif args.task:
            print(phantoms.write_task_demo(args.task, args.out, args.n, args.seed))
        else:
            print(phantoms.write_demo(args.out, args.n or 64, args.seed))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
