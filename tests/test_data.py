"""data.py: files, Hounsfield units, reports, sets, cache, sampler, commands."""
import collections
import csv
import functools
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
from conftest import AFFINE, REAL, ROOT, SMALL, chest, python, real_data, save_nifti, write_csv

import data
from data import split_sentences


def itk_image(array):
    """The chest with AFFINE as an ITK image: ITK's world is LPS, so the x and y axes point backwards."""
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.5, 2, 3))
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))
    image.SetOrigin((20, -7, 100))
    return image


# ------------------------------------------------------------------------------------------ volumes

ORIENTATIONS = ("RAS", "LPS", "LAS", "RPI", "PIR", "SAR", "ASL", "IRP")


def test_eight_orientations_give_one_volume(tmp_path, caplog):
    for codes in ORIENTATIONS:
        image = nib.Nifti1Image(chest().T, AFFINE)
        orientation = nib.orientations.axcodes2ornt(codes)
        turn = nib.orientations.ornt_transform(nib.io_orientation(AFFINE), orientation)
        path = tmp_path / f"{codes}.nii.gz"
        nib.save(image.as_reoriented(turn), path)
        assert "".join(nib.aff2axcodes(nib.load(path).affine)) == codes
        check_read(path)
    assert not caplog.text


def test_oblique_affine_goes_to_the_nearest_axes(tmp_path):
    angle = np.deg2rad(20)
    turned = AFFINE.copy()
    rotation = [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    turned[:3, :3] = rotation @ AFFINE[:3, :3]
    mirror = np.array([[-1, 0, 0, 27], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    image = nib.Nifti1Image(chest().T[::-1], turned @ mirror)
    nib.save(image, tmp_path / "a.nii")
    array, spacing, affine = data.read_volume(tmp_path / "a.nii")
    np.testing.assert_array_equal(array, chest())
    np.testing.assert_allclose(affine, turned, atol=1e-5)
    assert spacing == pytest.approx((3, 2, 1.5))


def check_read(path):
    """It is read as the chest with AFFINE."""
    array, spacing, affine = data.read_volume(path)
    np.testing.assert_array_equal(array, chest())
    assert array.dtype == np.float32 and spacing == pytest.approx((3, 2, 1.5))
    np.testing.assert_allclose(affine, AFFINE, atol=1e-5)


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nii", "a.nii.gz"])
def test_formats_written_by_itk(tmp_path, name):
    sitk.WriteImage(itk_image(chest()), str(tmp_path / name))
    check_read(str(tmp_path / name))


def test_nifti_with_slope_and_trailing_axis(tmp_path):
    image = nib.Nifti1Image(chest().T[..., None].astype(np.float32), AFFINE)
    image.header.set_data_dtype(np.uint8)                       # nibabel then writes a slope and an intercept
    nib.save(image, tmp_path / "a.nii.gz")
    array, _, _ = data.read_volume(tmp_path / "a.nii.gz")
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, nib.load(tmp_path / "a.nii.gz").get_fdata()[..., 0].T, atol=1e-3)
    assert abs(array - chest()).max() < 8


def write_slice(path, array, position=(20, -7, 100), orientation=(-1, 0, 0, 0, -1, 0), **tags):
    """One DICOM slice of 1.5 x 2 mm in HU, by default as AFFINE has it; tags: t0008_0060="CT" and so on."""
    piece = sitk.GetImageFromArray(array)
    piece.SetSpacing((1.5, 2))
    tags = {"t0008_0060": "CT", "t0020_000d": "1.2.3", "t0020_000e": "1.2.3.4",
            "t0008_0018": f"1.2.{path.stem}", "t0020_0037": "\\".join(map(str, orientation)),
            "t0020_0032": "\\".join(map(str, position))} | tags
    for tag, value in tags.items():
        piece.SetMetaData(tag[1:].replace("_", "|"), value)
    path.parent.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    writer.SetFileName(str(path))
    writer.Execute(piece)


def write_series(folder, array=None, heights=None, **tags):
    """A DICOM folder, the files not named in the order of slices; by default the chest with AFFINE"""
    array = chest() if array is None else array
    heights = [100 + 3 * z for z in range(len(array))] if heights is None else heights
    for z, height in enumerate(heights):
        write_slice(folder / f"{z * 7 % len(array)}.dcm", array[z], (20, -7, height), **tags)
    return folder


def test_dicom_folder(tmp_path, caplog):
    check_read(write_series(tmp_path))
    assert not caplog.text
    for file in tmp_path.glob("*.dcm"):
        file.rename(tmp_path / f"IM{file.stem}")
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5), np.uint8)), str(tmp_path / "preview.jpg"))
    check_read(tmp_path)


def test_dicom_slices_have_their_own_rescale(tmp_path):
    """The first slice holds whole numbers, the others do not."""
    tags = {"t0028_1053": "1", "t0028_1052": "0"}
    for z, array in enumerate(chest()):
        path = tmp_path / f"{z:02}.dcm"
        write_slice(path, 2 * array + np.int16(2048), (20, -7, 100 + 3 * z), **tags)
        content = path.read_bytes()
        for old, new in ((b"\x28\0\x53\x10\x02\0\0\x001 ", b"\x28\0\x53\x10\x04\0\0\x000.5 "),
                         (b"\x28\0\x52\x10\x02\0\0\x000 ", b"\x28\0\x52\x10\x08\0\0\x00-1023.75")):
            assert content.count(old) == 1
            content = content.replace(old, new)
        if z:
            path.write_bytes(content)
    array, _, _ = data.read_volume(tmp_path)
    np.testing.assert_array_equal(array[1:], chest()[1:] + 0.25)
    np.testing.assert_array_equal(array[0], 2 * chest()[0] + 2048)


def test_dicom_slice_that_stands_twice(tmp_path):
    write_series(tmp_path)
    (tmp_path / "copy.dcm").write_bytes((tmp_path / "14.dcm").read_bytes())
    check_read(tmp_path)
    write_slice(tmp_path / "copy.dcm", chest()[2] + np.int16(50), (20, -7, 106))        # contrast medium
    with pytest.raises(ValueError, match=r"0.00 to 3.00 mm apart, see behind 14.dcm"):
        data.read_volume(tmp_path)


def test_dicom_without_positions(tmp_path):
    write_series(tmp_path, heights=[100] * 20)
    with pytest.raises(ValueError, match="0.00 to 0.00 mm apart"):
        data.read_volume(tmp_path)


GAPS = {
    "inside": ([100 + 3 * z for z in range(20) if z not in (7, 8)], "3.00 to 9.00 mm apart, see behind 2.dcm"),
    "one of five": ([100, 103, 106, 112], "3.00 to 6.00 mm apart, see behind 14.dcm"),
    "one of four": ([100, 103, 109], "3.00 to 6.00"),
    "in the middle of five": ([100, 103, 109, 112], "3.00 to 6.00"),
    "before the last": ([*range(100, 118), 119], "1.00 to 2.00"),
    "thick, then thin": ([*range(100, 150, 5), *(145 + 1.25 * z for z in range(1, 10))], "1.25 to 5.00"),
    "a drift": ([100 + 3 * z + 0.05 * z * z for z in range(20)], "3.05 to 4.85"),
}


@pytest.mark.parametrize("heights, words", GAPS.values(), ids=GAPS)
def test_dicom_gaps(tmp_path, heights, words):
    write_series(tmp_path, heights=heights)
    with pytest.raises(ValueError, match=f"{tmp_path}: .*{words}"):
        data.read_volume(tmp_path)


@pytest.mark.parametrize("place", [0, 9, 19])
def test_broken_dicom_slice(tmp_path, place):
    write_series(tmp_path)
    broken = tmp_path / f"{place * 7 % 20}.dcm"
    for size in (0, 300, len(broken.read_bytes()) - 10):
        broken.write_bytes(broken.read_bytes()[:size] or b"")
        with pytest.raises(ValueError, match=f"{tmp_path}: .*{broken.name} is broken"):
            data.read_volume(tmp_path)


def test_dicom_positions_may_be_rounded(tmp_path):
    array = chest((40, 8, 10))
    write_series(tmp_path, array, [round(100 + 1.25 * z, 1) for z in range(40)])
    got, spacing, affine = data.read_volume(tmp_path)
    np.testing.assert_array_equal(got, array)
    assert spacing == pytest.approx((1.25, 2, 1.5), abs=0.002) and affine[2, 3] == pytest.approx(100)


def test_dicom_beside_other_files(tmp_path, caplog):
    """A scout, a second series, previews and the files of a viewer are not of the stack, which is named."""
    write_series(tmp_path)
    write_slice(tmp_path / "scout.dcm", chest()[0], (0, 0, 0), (1, 0, 0, 0, 0, -1))
    write_slice(tmp_path / "large.dcm", chest((20, 30, 30))[0], (20, -7, 97))
    write_slice(tmp_path / "localizer.dcm", chest()[0], (20, -7, 300), t0008_0008="ORIGINAL\\LOCALIZER")
    for z in range(3):
        write_slice(tmp_path / f"other{z}.dcm", chest()[0], (20, -7, 100 + 3 * z), t0020_000e="1.2.3.9")
    for z in range(30):
        sitk.WriteImage(sitk.GetImageFromArray(np.full((4, 5), 8 * z, np.uint8)), str(tmp_path / f"{z}.png"))
    for name, kind in (("DICOMDIR", "1.2.840.10008.1.3.10"), ("structures.dcm", "1.2.840.10008.5.1.4.1.1.481.3")):
        other = pydicom.Dataset()
        other.file_meta = pydicom.dataset.FileMetaDataset()
        other.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        other.SOPClassUID, other.SOPInstanceUID = kind, "1.2.3"
        other.save_as(tmp_path / name, enforce_file_format=True)
    (tmp_path / "._0.dcm").write_bytes(b"Mac")
    (tmp_path / "notes.txt").write_text("fine")
    check_read(tmp_path)
    array, _, _ = data.read_volume(tmp_path)
    assert data.to_hounsfield(array, tmp_path)[1] == "as stored"            # not: pictures
    assert caplog.text.count(f"{tmp_path}: took 20 slices of 1.2.3.4, not 1 of 1.2.3.4, ") == 1
    assert "3 of 1.2.3.9" in caplog.text


def test_dicom_of_nothing_but_localizers_or_one_slice(tmp_path):
    write_slice(tmp_path / "0.dcm", chest()[0])
    with pytest.raises(ValueError, match="neither two DICOM slices"):
        data.read_volume(tmp_path)
    write_slice(tmp_path / "1.dcm", chest()[1], (20, -7, 104))
    assert data.read_volume(tmp_path)[1] == pytest.approx((4, 2, 1.5))
    write_series(tmp_path, t0008_0008="ORIGINAL\\PRIMARY\\LOCALIZER")
    with pytest.raises(ValueError, match="localisers aside"):
        data.read_volume(tmp_path)


def test_dicom_of_a_tilted_and_of_a_turned_gantry(tmp_path):
    a, b = np.cos(0.3), np.sin(0.3)
    for z, array in enumerate(chest()):
        write_slice(tmp_path / "tilted" / f"{z}.dcm", array, (20, round(-7 - 0.9 * z, 4), 100 + 3 * z))
        rounded = 6 if z == 0 else 3
        write_slice(tmp_path / "turned" / f"{z}.dcm", array, (20, -7, 100 + 3 * z),
                    tuple(np.round((-a, -b, 0, b, -a, 0), rounded)))
    array, _, affine = data.read_volume(tmp_path / "tilted")
    np.testing.assert_array_equal(array, chest())
    want = AFFINE.copy()
    want[1, 2] = 0.9
    np.testing.assert_allclose(affine, want, atol=1e-5)
    array, _, affine = data.read_volume(tmp_path / "turned")
    want = AFFINE.copy()
    want[:2, :2] = np.array([[a, -b], [b, a]]) * [1.5, 2]
    np.testing.assert_array_equal(array, chest())
    np.testing.assert_allclose(affine, want, atol=1e-5)


def test_dicom_file_of_many_frames(tmp_path, caplog):
    path = tmp_path / "frames" / "a.dcm"
    path.parent.mkdir()
    array = chest()
    array[[4, 9]] = array[[9, 4]]                           # frames may stand in any order
    image = itk_image(array)
    image.SetMetaData("0008|0060", "CT")
    sitk.WriteImage(image, str(path))
    whole = path.read_bytes()
    fourth, ninth = (rb"20\-7\%d" % (100 + 3 * z) for z in (4, 9))
    path.write_bytes(whole.replace(fourth, b"later").replace(ninth, fourth).replace(b"later", ninth))
    check_read(path)
    check_read(path.parent)
    for old, new, words in ((rb"20\-7\157", rb"20\-7\188", "3.00 to 34.00 mm apart"),
                            (rb"20\-7\157", rb"20\-7\100", "0.00 to 3.00 mm apart"),
                            (rb"20\-7\157", rb"20\-7\x57", "a.dcm is broken")):
        assert whole.count(old) == 1
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(ValueError, match=words):
            data.read_volume(path)


def test_frames_of_several_rescales_are_refused(tmp_path):
    path = tmp_path / "a.dcm"
    image = itk_image(chest())
    image.SetMetaData("0008|0060", "CT")
    sitk.WriteImage(image, str(path))
    file = pydicom.dcmread(path)
    for frame in file.PerFrameFunctionalGroupsSequence:
        values = pydicom.Dataset()
        values.RescaleSlope, values.RescaleIntercept = 1, 0
        frame.PixelValueTransformationSequence = [values]
    file.save_as(path)
    check_read(path)
    values.RescaleIntercept = -1024
    file.save_as(path)
    with pytest.raises(ValueError, match="a.dcm is broken: its frames have several rescales"):
        data.read_volume(path)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_picture_folder_in_natural_order(tmp_path, suffix):
    for z in range(12):
        grey = np.full((6, 8), 20 * z, dtype=np.uint8)
        picture = sitk.GetImageFromArray(np.stack([grey] * 3, -1) if z % 2 else grey, isVector=bool(z % 2))
        sitk.WriteImage(picture, str(tmp_path / f"slice{z}.{suffix}"))
    array, spacing, _ = data.read_volume(tmp_path)
    assert array.shape == (12, 6, 8) and spacing == (1, 1, 1)
    np.testing.assert_allclose(array[:, 3, 4], np.arange(12) * 20 / 255 * 2000 - 1000, atol=9)
    array, note = data.to_hounsfield(array, tmp_path)
    assert "picture" in note
    grey = data.preprocess(array, spacing, (12, 6, 8), crop=(1, 1, 1))      # scaling gives grey / 255 back
    np.testing.assert_allclose(grey[0, :, 3, 4], np.arange(12) * 20 / 255, atol=0.005)


def test_a_picture_that_is_cut_off_and_masks_beside_slices_are_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64), np.uint8)
    for z in range(3):
        sitk.WriteImage(sitk.GetImageFromArray(noise), str(tmp_path / f"{z}.jpg"))
    assert data.read_volume(tmp_path)[0].shape == (3, 64, 64)
    whole = (tmp_path / "1.jpg").read_bytes()
    (tmp_path / "1.jpg").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="pictures that are cut off: 1.jpg"):
        data.read_volume(tmp_path)
    (tmp_path / "1.jpg").write_bytes(whole + bytes(40))                 # padded by a tool
    (tmp_path / "0.jpg").rename(tmp_path / "0.JPG")
    assert data.read_volume(tmp_path)[0].shape == (3, 64, 64)
    shutil.copyfile(tmp_path / "1.jpg", tmp_path / "1_mask.jpg")
    with pytest.raises(ValueError, match="pictures named #, #_mask, not slices alone"):
        data.read_volume(tmp_path)


@pytest.mark.parametrize("names, told", [
    (["IM-0001-0009", "IM-0001-0010", "IM-0001-0011"], ""), (["s10", "s20", "s30"], ""), (["1_z5", "2_z10", "3_z15"], ""),
    (["s1", "s2", "s40"], "the numbers of its slices leave gaps, which are closed"),
    (["IM-0001-0001", "IM-0001-0002", "IM-0002-0001"], None), (["1.9.77", "1.9.80", "1.12.3"], None),
    ([f"1.{10 ** 20 + 2}.3", f"1.{10 ** 20 + 1}.4"], None)])
def test_numbers_of_pictures_must_tell_their_order(tmp_path, caplog, names, told):
    for name in names:
        sitk.WriteImage(sitk.GetImageFromArray(np.eye(4, dtype=np.uint8)), str(tmp_path / f"{name}.png"))
    if told is None:
        with pytest.raises(ValueError, match=f"{names[-1]}.png.*: these numbers give no order of slices"):
            data.read_volume(tmp_path)
    else:
        assert data.read_volume(tmp_path)[0].shape == (3, 4, 4)
        assert (told in caplog.text) if told else not caplog.text


def test_sixteen_bit_pictures_are_refused(tmp_path):
    for z in range(3):
        picture = sitk.GetImageFromArray(np.full((4, 5), 1000 + z, np.uint16))
        sitk.WriteImage(picture, str(tmp_path / f"{z}.png"))
    with pytest.raises(ValueError, match="8-bit"):
        data.read_volume(tmp_path)


@pytest.mark.parametrize("axes", ["zyx", "zxy"])
def test_npz_of_ct_rate(tmp_path, axes):
    array = chest((24, 32, 32))
    stored = array[:, ::-1, ::-1]                               # x to the left, y to the back
    stored = stored if axes == "zyx" else stored.transpose(0, 2, 1)
    np.savez(tmp_path / "train_1_a_1.npz", (stored / 1000).astype(np.float32))
    got, spacing, _ = data.read_volume(tmp_path / "train_1_a_1.npz")
    np.testing.assert_allclose(got, array, atol=1e-3)           # in HU
    assert spacing == (1.5, 0.75, 0.75)


@real_data
@pytest.mark.parametrize("axes", ["zyx", "zxy"])
@pytest.mark.parametrize("name", ["lung2_half.nii.gz", "thorax_4dct_half.nii.gz", "cip_ct-64.nrrd"])
def test_npz_axes_are_told_on_real_scans(tmp_path, name, axes):
    array, _, _ = data.read_volume(REAL / "ct" / name)
    stored = array[:, ::-1, ::-1].clip(-1000, 1000) / 1000
    np.savez(tmp_path / "a.npz", stored if axes == "zyx" else stored.transpose(0, 2, 1))
    got, _, _ = data.read_volume(tmp_path / "a.npz")
    np.testing.assert_allclose(got, array.clip(-1000, 1000), atol=1e-3)


def broken_files(folder):
    """name -> (path, words of its error)"""
    whole = save_nifti(folder / "whole.nii.gz", chest()).read_bytes()
    (folder / "truncated.nii.gz").write_bytes(whole[:len(whole) // 2])
    (folder / "plain.nii.gz").write_bytes(gzip.decompress(whole))
    (folder / "text.nii.gz").write_text("hello")
    (folder / "empty.nii.gz").write_bytes(b"")
    save_nifti(folder / "flat.nii", chest()[0][None])
    save_nifti(folder / "four.nii", np.stack([chest().T] * 2, -1))
    bad = chest().astype(np.float32)
    bad[3, 4, 5] = np.nan
    save_nifti(folder / "nan.nii", bad)
    bad[3, 4, 5] = np.inf
    save_nifti(folder / "inf.nii", bad)
    save_nifti(folder / "constant.nii", np.full((5, 6, 7), -1000, np.int16))
    save_nifti(folder / "rgb.nii", np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]))
    header = nib.Nifti1Image(chest().T, AFFINE).header
    for key, value in {"sform_code": 1, "srow_x": 0, "srow_y": 0, "srow_z": 0}.items():
        header[key] = value
    (folder / "affine.nii").write_bytes(header.binaryblock + bytes(4) + chest().tobytes())
    sitk.WriteImage(itk_image(chest()), str(folder / "raw.mhd"))
    (folder / "raw.raw").unlink(missing_ok=True)
    (folder / "raw.zraw").unlink(missing_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(chest()[0]), str(folder / "two.mha"))
    sitk.WriteImage(itk_image(chest()), str(folder / "short.mha"), useCompression=False)
    (folder / "short.mha").write_bytes((folder / "short.mha").read_bytes()[:2000])
    np.savez(folder / "key.npz", other=chest())
    np.savez(folder / "code.npz", arr_0=np.array([print], dtype=object))
    (folder / "none").mkdir()
    (folder / "a.txt").write_text("hello")
    return {"missing.nii.gz": "No such file", "truncated.nii.gz": "whole", "plain.nii.gz": "whole",
            "text.nii.gz": "whole", "empty.nii.gz": "whole", "flat.nii": "3D", "four.nii": "3D",
            "nan.nii": "finite", "inf.nii": "finite", "constant.nii": "differ", "rgb.nii": "one real number",
            "affine.nii": "affine", "raw.mhd": r"\.raw", "two.mha": "3D",
            "short.mha": "whole", "key.npz": "arr_0", "code.npz": "allow_pickle", "none": "DICOM",
            "a.txt": "neither two DICOM slices"}


def test_broken_volumes_name_the_file(tmp_path):
    for name, words in broken_files(tmp_path).items():
        with pytest.raises(ValueError, match=words) as error:
            data.read_volume(tmp_path / name)
        assert str(tmp_path / name) in str(error.value) and "expected" in str(error.value), error.value


# ------------------------------------------------------------------------------------------ headers

def with_fields(path, affine=AFFINE, **fields):
    """The chest as NIfTI, the fields of its header overwritten byte by byte"""
    save_nifti(path, chest(), affine)
    content = path.read_bytes()
    header = nib.Nifti1Header(content[:348], check=False)
    for name, value in fields.items():
        header[name] = value
    path.write_bytes(header.binaryblock + content[348:])
    return path


MM_1 = {"srow_x": [1, 0, 0, 0], "srow_y": [0, 1, 0, 0], "srow_z": [0, 0, 1, 0]}     # an sform of 1 mm
HEADERS = {     # fields -> spacing (z, y, x), axes of the array as stored, words of the warning
    "ACDC": (MM_1 | {"qform_code": 1}, (3, 2, 1.5), "1. 1. 1.. mm in the sform"),
    "ACDC without qform": (MM_1, (3, 2, 1.5), r".1.5 2. +3. . in pixdim: took pixdim"),
    "2 % off": ({"srow_z": [0, 0, 3.06, 100]}, (3, 2, 1.5), "took pixdim"),
    "rounded": ({"srow_z": [0, 0, 3.02, 100]}, (3.02, 2, 1.5), None),
    "no sform": ({"sform_code": 0, "qform_code": 1} | MM_1, (3, 2, 1.5), None),
    "negative": ({"pixdim": [1, -1.5, -2, -3, 1, 1, 1, 1]}, (3, 2, 1.5), None),
    "negative, qform": ({"pixdim": [1, -1.5, 2, 3, 1, 1, 1, 1], "sform_code": 0, "qform_code": 1},
                        (3, 2, 1.5), None),
    "zero": ({"pixdim": [1, 0, 0, 0, 1, 1, 1, 1], "qform_code": 1}, (3, 2, 1.5), None),
    "one zero": (MM_1 | {"pixdim": [1, 1.5, 0, 3, 1, 1, 1, 1], "qform_code": 1}, (3, 1, 1.5), "took pixdim"),
    "nan": ({"pixdim": [1, np.nan, 2, 3, 1, 1, 1, 1]}, (3, 2, 1.5), None),
    "unset": ({"pixdim": [1, 1, 1, 1, 1, 1, 1, 1]}, (3, 2, 1.5), None),
    "metres": ({"xyzt_units": 1}, (3000, 2000, 1500), None),
    "microns": ({"xyzt_units": 3 + 8}, (0.003, 0.002, 0.0015), None),
    "no unit": ({"xyzt_units": 0}, (3, 2, 1.5), None),
    "turned": ({"srow_x": [-1.5, 0, 0, 40], "qform_code": 1}, (3, 2, 1.5), "turn the scan differently"),
}


@pytest.mark.parametrize("fields, spacing, words", HEADERS.values(), ids=HEADERS)
def test_nifti_header_that_contradicts_itself(tmp_path, caplog, fields, spacing, words):
    path = with_fields(tmp_path / "a.nii", **fields)
    array, got, affine = data.read_volume(path)
    data.read_volume(path)
    assert got == pytest.approx(spacing, rel=1e-5)
    assert np.linalg.norm(affine[:3, :3], axis=0) == pytest.approx(spacing[::-1], rel=1e-5)
    flipped = fields.get("srow_x", [1])[0] < 0
    np.testing.assert_array_equal(array, chest()[:, :, ::-1] if flipped else chest())
    if words is None:
        assert not [record for record in caplog.records if record.name == "mg3d"]
    else:
        assert caplog.text.count(f"{path}: ") == 1 and re.search(words, caplog.text.strip())


def test_qform_places_a_scan_whose_sform_has_other_lengths(tmp_path):
    path = with_fields(tmp_path / "a.nii", **MM_1, qform_code=1, qoffset_x=-20, qoffset_y=7, qoffset_z=100)
    np.testing.assert_allclose(data.read_volume(path)[2], AFFINE, atol=1e-5)


def test_nifti_of_another_byte_order(tmp_path):
    image = nib.Nifti1Image(chest().T, AFFINE)
    header = image.header.as_byteswapped()
    nib.save(nib.Nifti1Image(chest().T.astype(">i2"), AFFINE, header), tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes()[:4] == (348).to_bytes(4, "big")
    check_read(tmp_path / "a.nii")


@pytest.mark.parametrize("end, old, new", [
    ("mhd", "ElementSpacing", "ElementSize"),
    ("nhdr", "left-posterior-superior", "LPS"),
    ("nhdr", "space: left-posterior-superior", 'space: left-posterior-superior\nspace units: "mm" "mm" "mm"'),
    ("nhdr", "left-posterior-superior\nsizes: 28 24 20\nspace directions: (-1.5,0,0) (0,-2,0)",
     "right-anterior-superior\nsizes: 28 24 20\nspace directions: (1.5,0,0) (0,2,0)"),
])
def test_words_of_headers_that_itk_reads(tmp_path, end, old, new):
    path = tmp_path / f"a.{end}"
    sitk.WriteImage(itk_image(chest()), str(path))
    text = path.read_text()
    text = re.sub("space origin: .*\n", "", re.sub("Offset = .*", "Offset = 0 0 0", text))
    assert old in text
    path.write_text(text.replace(old, new))
    array, spacing, affine = data.read_volume(path)
    np.testing.assert_array_equal(array, chest())
    assert spacing == pytest.approx((3, 2, 1.5))
    np.testing.assert_allclose(affine[:3, :3], AFFINE[:3, :3], atol=1e-5)


@pytest.mark.parametrize("end, old, new", [
    ("mhd", "ElementSpacing", "DistanceUnits = cm\nElementSpacing"),
    ("nhdr", "space directions", 'space units: "um" "um" "um"\nspace directions')])
def test_other_lengths_than_mm_are_refused(tmp_path, end, old, new):
    path = tmp_path / f"a.{end}"
    sitk.WriteImage(itk_image(chest()), str(path))
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match="(cm|um), not mm"):
        data.read_volume(path)


def test_nrrd_without_a_space_in_other_lengths_is_refused(tmp_path):
    path = tmp_path / "a.nhdr"
    sitk.WriteImage(itk_image(chest()), str(path))
    text = re.sub("(?m)^space.*\n", "", path.read_text())
    path.write_text(text.replace("kinds:", 'spacings: 1.5 2 3\nunits: "cm" "cm" "cm"\nkinds:'))
    with pytest.raises(ValueError, match="cm, not mm"):
        data.read_volume(path)


@pytest.mark.parametrize("name", ["a.tif", "a.vtk"])
def test_kinds_without_a_known_grid_are_refused(tmp_path, name):
    sitk.WriteImage(itk_image(chest()), str(tmp_path / name))
    with pytest.raises(ValueError, match=f"{name}: cannot be read: neither two DICOM slices"):
        data.read_volume(tmp_path / name)


def test_colour_is_no_volume(tmp_path):
    for name, shape in (("a.mha", (6, 7, 3)), ("b.mha", (1, 6, 7, 3))):
        picture = sitk.GetImageFromArray(np.zeros(shape, np.uint8), isVector=True)
        sitk.WriteImage(picture, str(tmp_path / name))
        with pytest.raises(ValueError, match="one number a voxel"):
            data.read_volume(tmp_path / name)


BLANK = {"identity": (np.eye(4), {}), "no codes": (np.diag([0.8, 0.8, 2, 1]), {"sform_code": 0}),
         "ITK's identity": (np.diag([-1, -1, 1, 1]), {})}


@pytest.mark.parametrize("affine, fields", BLANK.values(), ids=BLANK)
def test_blank_header_is_told(tmp_path, caplog, affine, fields):
    path = with_fields(tmp_path / "a.nii", affine, **fields)
    item = data.load_items(write_csv(tmp_path / "data.csv", "volume,report", [["a.nii", "Fine."]]))[0]
    xyz, got = data.read_item(item)
    np.testing.assert_array_equal(xyz, chest().T)
    data.load_volume(item, None, SMALL)
    axes = "".join(nib.aff2axcodes(got))
    assert caplog.text.count(f"{path}: its header does not tell how it lies: took its axes as {axes}") == 1


def test_full_header_is_not_called_blank(tmp_path, caplog):
    for end in ("nii.gz", "mha", "nrrd"):
        sitk.WriteImage(itk_image(chest()), str(tmp_path / f"a.{end}"))
        data.read_item(data.Item("a", tmp_path / f"a.{end}", "", "train", "a"))
    save_nifti(tmp_path / "q.nii", chest())
    qform = with_fields(tmp_path / "q.nii", sform_code=0, qform_code=1)
    data.read_item(data.Item("a", qform, "", "train", "a"))
    np.save(tmp_path / "a.npy", np.arange(1000, dtype=np.uint8).reshape(10, 10, 10) // 4)
    data.read_item(data.Item("a", tmp_path / "a.npy", "", "train", "a"))
    assert not caplog.text


# --------------------------------------------------------------------------------- Hounsfield units

CTS = ("ct/lung1_full.nii.gz", "ct/lung2_half.nii.gz", "ct/thorax_4dct_half.nii.gz",
       "ct/totalsegmentator_ct.nii.gz", "ct/totalsegmentator_chest_crop.nii.gz",
       "ct/totalsegmentator_ct_small.nii.gz", "ct/cip_ct-64.nrrd", "ct/elastix_lung_small.mha", "dicom",
       "luna/LIDC-IDRI-0001_slab.nii.gz", "luna/LIDC-IDRI-0003_slab.nii.gz")
MASKS = ("ct/lung1_full_nodule.nii.gz", "ct/lung2_half_mass.nii.gz",
         "ct/totalsegmentator_ct_small_seg.nii.gz", "ct/cip_wholeLung-64.nrrd", "ct/elastix_lung_mask.mha")


def hounsfield_cases(hu, path):
    """Every way in which `hu` can lie in a file, and what each setting must make of it."""
    for rescale in ((1, -1024), (1, -8192), (1, 0), None):
        got, note = data.to_hounsfield(hu, path, "auto", rescale)               # v2: applied, not twice
        assert got is hu and note == "as stored"
    for slope, inter in ((1, -1024), (1, -8192), (0.5, -1000)):                 # v1: not applied
        stored = (hu - inter) / slope
        for mode in ("auto", "csv"):
            got, note = data.to_hounsfield(stored, path, mode, (slope, inter))
            np.testing.assert_allclose(got, hu, atol=0.01)
            assert "metadata" in note and got.dtype == np.float32
    got, note = data.to_hounsfield(hu + 1024, path)                             # no metadata: air at 24
    np.testing.assert_allclose(got, hu, atol=0.01)
    assert "-1024" in note
    for wrong, mode, rescale in ((hu, "csv", (1, -1024)), (hu + 1024, "header", None),
                                 (hu + 8192, "auto", None), (hu - 1024, "header", None),
                                 (hu / 1000, "auto", None)):
        with pytest.raises(ValueError, match="Hounsfield") as error:
            data.to_hounsfield(wrong, path, mode, rescale)
        assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="RescaleSlope"):
        data.to_hounsfield(hu, path, "csv", None)


@pytest.mark.parametrize("padding", [None, -1024, -2048, -3024])
def test_hounsfield_check(padding, caplog):
    hu = chest((40, 48, 56)).astype(np.float32)
    if padding:
        hu[:, :10] = padding
    data._warn_once.cache_clear()
    hounsfield_cases(hu, "scan.nii.gz")
    told = "Hounsfield units: rescale 1, -1024 (as is usual) applied to some volumes"
    assert told in caplog.text
    caplog.clear()
    data.to_hounsfield(hu + 1024, "another.nii")                                # once is enough
    assert not caplog.records


def test_air_and_tissue_must_both_be_there(tmp_path):
    hu = chest((40, 48, 56)).astype(np.float32)
    path = tmp_path / "train_1_a_1.npz"
    for values, is_good in ((hu, True), (hu - 1024, False)):            # rescaled twice: no tissue left
        np.savez(path, (values.clip(-1000, 1000) / 1000)[:, ::-1, ::-1])
        array, _, _ = data.read_volume(path)
        for mode, rescale in (("auto", (1, -1024)), ("auto", None), ("header", None)):
            if is_good:
                np.testing.assert_allclose(data.to_hounsfield(array, path, mode, rescale)[0], hu, atol=200)
            else:
                with pytest.raises(ValueError, match="air near -1000 and soft tissue near 0"):
                    data.to_hounsfield(array, path, mode, rescale)
    little = np.full(100_000, -1000.) + np.arange(100_000) % 50
    little[:4000] = 40                                                  # a small body in a large field of view
    padded = -980 - little                                              # a little air in tissue, padded
    padded[-1] = -3024
    for values in (little, little.clip(-900), padded):
        assert data.to_hounsfield(values, path, "header")[1] == "as stored"
    enclosed = little.copy()
    enclosed[-60_000:] = 2000
    below = little.copy()
    below[-60_000:] = np.arange(60_000) % 50 - 2000
    little[:2000] = -1000
    padded[:2000] = 0
    for values in (little, padded, enclosed, below, hu.clip(-160, 240), hu.clip(-1000, -700)):
        with pytest.raises(ValueError, match="air near -1000 and soft tissue near 0"):
            data.to_hounsfield(values, path)


@real_data
@pytest.mark.parametrize("name", CTS)
def test_hounsfield_of_real_scans_rescaled_twice(name):
    array, _, _ = data.read_volume(REAL / name)
    with pytest.raises(ValueError, match="soft tissue near 0"):
        data.to_hounsfield((array - 1024).clip(-1000, 1000), REAL / name, "auto", (1, -1024))


@real_data
@pytest.mark.parametrize("name", CTS)
def test_hounsfield_check_on_real_scans(name):
    array, spacing, _ = data.read_volume(REAL / name)
    hounsfield_cases(array, REAL / name)
    volume = data.preprocess(array, spacing, SMALL)
    assert volume.shape == (1, *SMALL) and 0 <= volume.min() < volume.max() <= 1


@real_data
@pytest.mark.parametrize("name", MASKS)
def test_real_masks_are_no_ct(name):
    array, _, _ = data.read_volume(REAL / name)
    with pytest.raises(ValueError, match="mask"):
        data.to_hounsfield(array, REAL / name)


@real_data
def test_real_header_without_its_raw():
    with pytest.raises(ValueError, match=r"header_only.mhd.*\.raw"):
        data.read_volume(REAL / "luna" / "header_only.mhd")


# --------------------------------------------------------------------------------------- preprocess

def naive_resize(array, size):
    out = np.zeros(size)
    def taps(i, n_in, n_out):
        place = min(max((i + 0.5) * n_in / n_out - 0.5, 0), n_in - 1)
        low = int(place)
        return ((low, 1 - (place - low)), (min(low + 1, n_in - 1), place - low))
    for index in np.ndindex(*size):
        for (z, a), (y, b), (x, c) in itertools.product(*map(taps, index, array.shape, size)):
            out[index] += a * b * c * array[z, y, x]
    return out


@pytest.mark.parametrize("size", [(5, 9, 4), (12, 6, 10)])
def test_preprocess_against_a_loop(size):
    array = np.random.default_rng(0).uniform(-3000, 3000, (10, 15, 9)).astype(np.float32)
    got = data.preprocess(array, (3, 1, 1), size)
    cropped = array[0:9, 2:12, 0:8]             # the middle: round(8.8), round(9.9), round(7.92) voxels
    want = naive_resize((cropped.clip(-1000, 1000) + 1000) / 2000, size)
    assert got.dtype == torch.float32 and got.shape == (1, *size)
    np.testing.assert_allclose(got[0], want, atol=1e-5)


def test_preprocess_window_and_spacing():
    array = chest().astype(np.float32)
    same = data.preprocess(array, (1, 1, 1), array.shape, crop=(1, 1, 1), window=(-500, 500))
    np.testing.assert_allclose(same[0], (array.clip(-500, 500) + 500) / 1000, atol=1e-6)
    assert data.preprocess(array, (1, 1, 1)).shape == (1, 128, 96, 128)


# ---------------------------------------------------------------------------------------- sentences

@pytest.mark.parametrize("text, want", [
    ("Heart is normal. No effusion.", ["Heart is normal.", "No effusion."]),
    ("One; two? Three! four", ["One;", "two?", "Three!", "four"]),
    ("Line one\nline two\r\nline three", ["Line one", "line two", "line three"]),
    ("The heart is normal in size and contour. No\r\npleural effusion is there.",
     ["The heart is normal in size and contour.", "No pleural effusion is there."]),
    ("A nodule of 5 mm lies in the right lower lobe, and\n  the heart is normal in size and in contour and\nNo mass",
     ["A nodule of 5 mm lies in the right lower lobe,", "and the heart is normal in size and in contour and", "No mass"]),
    ("the lungs are clear without any consolidation seen\nheart is normal in size",
     ["the lungs are clear without any consolidation seen", "heart is normal in size"]),
    ("A nodule of 5 mm lies in the right lower lobe of it\n\nthe heart", ["A nodule of 5 mm lies in the right lower lobe of it",
                                                                    "the heart"]),
    ("A nodule of 0.8 × 1.0 cm is seen.", ["A nodule of 0.8 × 1.0 cm is seen."]),
    ("A 13x9.3 mm lymph node.", ["A 13x9.3 mm lymph node."]),
    ("CT examination dated 03.02.2020. Trachea is open.",
     ["CT examination dated 03.02.2020.", "Trachea is open."]),
    ("Seen in the CT of January 7, 2020 as it was.", ["Seen in the CT of January 7, 2020 as it was."]),
    ("A nodule of 3,5 mm was seen in the right lung.", ["A nodule of 3,5 mm was seen in the right lung."]),
    ("In the 7th-8th intercostal space. No more.", ["In the 7th-8th intercostal space.", "No more."]),
    ("Nodule (SE6, IM225) in the lower lobe of the right lung.",
     ["Nodule (SE6, IM225) in the lower lobe of the right lung."]),
    ("Attenuation (small airway disease?, small vessel disease?). No mass.",
     ["Attenuation (small airway disease?, small vessel disease?).", "No mass."]),
    ("Wide (see note. It is old) aorta. No mass.", ["Wide (see note. It is old) aorta.", "No mass."]),
    ("Nodule (3 mm in the lung. No effusion. Fine.", ["Nodule (3 mm in the lung.", "No effusion.", "Fine."]),
    ("Nodule 3 mm) in the lung. No effusion.", ["Nodule 3 mm) in the lung.", "No effusion."]),
    ("Some nodules, e.g. on the left, approx. 5 mm. Dr. Smith saw them vs. None.",
     ["Some nodules, e.g. on the left,", "approx. 5 mm.", "Dr. Smith saw them vs. None."]),
    ("Node, no. 3, img. 12, max. 1.7 cm. long. No mass.",
     ["Node, no. 3, img. 12, max. 1.7 cm. long.", "No mass."]),
    ("Collapse of the T12. vertebra. It measures 5 mm. The lung is free.",
     ["Collapse of the T12. vertebra.", "It measures 5 mm.", "The lung is free."]),
    ("Both lungs are clear, no nodule is seen, and the heart is normal.",
     ["Both lungs are clear,", "no nodule is seen,", "and the heart is normal."]),
    ("Trachea, both main bronchi are open.", ["Trachea, both main bronchi are open."]),
    ("Mediastinal main vascular structures, heart contour, size are normal.",
     ["Mediastinal main vascular structures, heart contour, size are normal."]),
    ("Normal lungs. . Heart ... is fine. ?", ["Normal lungs. .", "Heart ...", "is fine. ?"]),
    (" .. Heart is fine.", [".. Heart is fine."]),
    ("1. Fatty liver. 2. Gallstone.", ["1. Fatty liver.", "2. Gallstone."]),
    ('Bones are normal. " Normal CT." "Cyst."', ["Bones are normal.", '" Normal CT."', '"Cyst."']),
    ("Lungs are clear.Heart is normal.", ["Lungs are clear.", "Heart is normal."]),
    ("大小 about 6.6cm。Dotted shadow。", ["大小 about 6.6cm。", "Dotted shadow。"]),
    ("Pneumonia", ["Pneumonia"]), ("12.", ["12."]), ("", []), (" \n ", []), (" .,;?! - () ...", []),
])
def test_sentences(text, want):
    assert split_sentences(text) == want


def squeezed(text):
    return "".join(text.split())


def check_sentences(text):
    sentences = split_sentences(text)
    alive = any(map(str.isalnum, text))
    assert squeezed("".join(sentences)) == (squeezed(text) if alive else "")    # nothing glued, lost or moved
    assert all(any(map(str.isalnum, sentence)) for sentence in sentences)
    return sentences


def test_sentences_of_random_text_lose_nothing():
    letters = random.Random(0)
    for _ in range(2000):
        check_sentences("".join(letters.choices("ab1 2.,;?!()\n\"-。 mm。Dr", k=letters.randrange(60))))


UNITS = ("word ", "a, ", "(", ".", "?(", "one two three, ", "\n", "x. ", '"', "( a ) ")


@pytest.mark.parametrize("unit", UNITS)
def test_ten_thousand_words_are_split(unit):
    check_sentences(unit * 10_000)


def real_reports():
    reports = []
    for name in ("ct_rate_800.csv", "ct_rate_200.csv"):
        with open(REAL / "reports" / name, newline="", encoding="utf-8") as file:
            reports += [row["report_text"] for row in csv.DictReader(file)]
    ctrg = json.loads((REAL / "reports" / "ctrg_chest.json").read_text(encoding="utf-8"))
    return reports + [row["report"] for split in ("train", "test") for row in ctrg[split]]


@real_data
def test_sentences_of_all_real_reports():
    reports = real_reports()
    assert len(reports) == 2804
    counts = []
    for report in reports:
        sentences = check_sentences(report)
        counts.append(len(sentences))
        assert sentences
        for left in sentences[:-1]:
            assert left.rstrip("\"”’'")[-1] in ".;?!,。", left
        for whole in re.findall(r"\([^()]*\)|\d+\.\d+ ?[x×X*] ?\d+(?:\.\d+)?", report):
            assert any(" ".join(whole.split()) in sentence for sentence in sentences), whole
    assert 12 <= np.median(counts) <= 20 and np.mean(np.array(counts) > 32) < 0.15


# ------------------------------------------------------------------------------- tokens and masking

REPORT = ("Trachea and both main bronchi are open. A 13x9.3 mm lymph node (SE6, IM225) is seen in the "
          "right lung; no pleural effusion was detected. Heart size is increased, and the aorta is "
          "calcified. Fatty liver.")


def tiny_tokenizer(kind, trim_offsets=True):
    """A small BERT- or RoBERTa-like fast tokenizer, trained here on REPORT."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    special = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]"]
    if kind == "roberta":
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    cls, pad, sep, unk, mask = special
    if kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token=unk))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False,
                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([REPORT] * 3, trainer)
    ends = (sep, tokenizer.token_to_id(sep)), (cls, tokenizer.token_to_id(cls))
    if kind == "bert":
        tokenizer.post_processor = processors.BertProcessing(*ends)
    else:
        tokenizer.post_processor = processors.RobertaProcessing(*ends, trim_offsets=trim_offsets,
                                                                add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, cls_token=cls, sep_token=sep, pad_token=pad,
                                   unk_token=unk, mask_token=mask)


@pytest.fixture(params=["bert", "roberta", "roberta with blanks"])
def tokenizer(request):
    return tiny_tokenizer(request.param.split()[0], trim_offsets="blanks" not in request.param)


def decoded(tokenizer, ids):
    return squeezed(tokenizer.decode(ids, skip_special_tokens=True).replace("##", "")).lower()


def test_tokens_know_their_sentence_and_word(tokenizer):
    sentences = split_sentences(REPORT)
    out = data.tokenize_report(tokenizer, sentences)
    assert len(sentences) == 6 and out["sentences"] == sentences and out["cut"] == 0
    assert out["input_ids"].tolist() == tokenizer(" ".join(sentences))["input_ids"]
    for name in ("sentence_ids", "word_ids"):
        assert out[name][0] == out[name][-1] == -1
    assert (np.diff(out["sentence_ids"][1:-1]) >= 0).all()
    for s, sentence in enumerate(sentences):
        assert decoded(tokenizer, out["input_ids"][out["sentence_ids"] == s]) == squeezed(sentence).lower()
        assert out["single_ids"][s].tolist() == tokenizer(sentence)["input_ids"]
    words = [decoded(tokenizer, out["input_ids"][out["word_ids"] == w])
             for w in range(out["word_ids"].max() + 1)]
    assert {"trachea", "bronchi", "lymph", "calcified", "effusion"} <= set(words)   # whole, of several pieces
    assert len(out["input_ids"]) > len(words) + 2


def test_tokens_are_cut_at_sentences(tokenizer):
    sentences = split_sentences(REPORT)
    lengths = [(data.tokenize_report(tokenizer, sentences)["sentence_ids"] == s).sum() for s in range(6)]
    for kept in range(1, 6):
        for spare in (0, lengths[kept] - 1):
            out = data.tokenize_report(tokenizer, sentences, max_tokens=sum(lengths[:kept]) + 2 + spare)
            assert out["sentences"] == sentences[:kept] and len(out["single_ids"]) == kept
            assert len(out["input_ids"]) == sum(lengths[:kept]) + 2
            assert out["input_ids"][-1] == tokenizer.sep_token_id
            assert set(out["sentence_ids"]) == {-1, *range(kept)}
            assert out["cut"] == len(squeezed(" ".join(sentences[kept:])))
    out = data.tokenize_report(tokenizer, sentences, max_sentences=2)
    assert out["sentences"] == sentences[:2] and out["cut"] == len(squeezed(" ".join(sentences[2:])))


@pytest.mark.parametrize("report", ["word " * 10_000, "pneumonia", REPORT * 200])
def test_tokens_of_extreme_reports(tokenizer, report):
    sentences = split_sentences(report)
    out = data.tokenize_report(tokenizer, sentences, max_tokens=20)
    assert len(out["input_ids"]) <= 20 and max(map(len, out["single_ids"])) <= 20
    assert set(out["sentence_ids"]) == {-1, *range(len(out["sentences"]))}
    kept, whole = " ".join(out["sentences"]), " ".join(sentences)
    assert whole.startswith(kept) and out["cut"] == len(squeezed(whole)) - len(squeezed(kept))
    assert decoded(tokenizer, out["input_ids"]) == squeezed(kept).lower()


def test_report_without_a_sentence_is_refused(tokenizer):
    with pytest.raises(ValueError, match="sentence"):
        data.tokenize_report(tokenizer, [])


@real_data
def test_tokens_of_real_reports(tokenizer):
    for report in real_reports()[::40]:
        out = data.tokenize_report(tokenizer, split_sentences(report))
        assert len(out["input_ids"]) <= 250
        assert set(out["sentence_ids"]) == {-1, *range(len(out["sentences"]))}


def test_whole_word_masking(tokenizer):
    out = data.tokenize_report(tokenizer, split_sentences(REPORT))
    ids, words = out["input_ids"], out["word_ids"]
    generator, fates, token_counts = np.random.default_rng(0), collections.Counter(), np.zeros(len(ids))
    for _ in range(1500):
        masked, labels = data.mask_words(ids, words, tokenizer, generator)
        chosen = np.unique(words[labels != -100])
        assert len(chosen) == round(0.15 * (words.max() + 1)) and chosen.min() >= 0
        assert (np.isin(words, chosen) == (labels != -100)).all()       # whole words, special tokens never
        assert (labels == np.where(labels != -100, ids, -100)).all() and (masked == ids)[labels == -100].all()
        token_counts += labels != -100
        for word in chosen:
            new, old = masked[words == word], ids[words == word]
            fate = "same" if (new == old).all() else "random"
            if (new == tokenizer.mask_token_id).all():
                fate = "mask"
            fates[fate] += 1
            if fate == "random":
                assert not np.isin(new, tokenizer.all_special_ids).any()
    share = {fate: count / fates.total() for fate, count in fates.items()}
    assert share["mask"] == pytest.approx(0.8, abs=0.02)
    assert share["random"] == pytest.approx(0.1, abs=0.02) and share["same"] == pytest.approx(0.1, abs=0.02)
    assert np.ptp(token_counts[1:-1]) < 0.1 * 1500                              # every word alike
    same = [data.mask_words(ids, words, tokenizer, np.random.default_rng(7)) for _ in range(2)]
    assert (same[0][0] == same[1][0]).all() and (same[0][1] == same[1][1]).all()


def test_one_word_is_masked_at_least(tokenizer):
    out = data.tokenize_report(tokenizer, ["Pneumonia"])
    generator = np.random.default_rng(0)
    _, labels = data.mask_words(out["input_ids"], out["word_ids"], tokenizer, generator, prob=0.01)
    assert (labels != -100).sum() == len(labels) - 2


def test_mask_volume():
    for ratio in (0, 0.3, 0.5, 1):
        mask = data.mask_volume((64, 32, 96), 16, ratio, np.random.default_rng(0))
        assert mask.shape == (1, 64, 32, 96) and mask.dtype == torch.bool
        blocks = mask[0].reshape(4, 16, 2, 16, 6, 16).float().mean((1, 3, 5))
        assert set(blocks.unique().tolist()) <= {0, 1} and blocks.sum() == round(ratio * 48)
    generator = np.random.default_rng(0)
    with pytest.raises(ValueError, match="multiples of mask_size 16"):
        data.mask_volume((64, 32, 90), 16, 0.5, generator)
    mean = torch.stack([data.mask_volume(SMALL, 8, 0.5, generator).float() for _ in range(300)]).mean(0)
    assert mean.min() > 0.35 and mean.max() < 0.65


# --------------------------------------------------------------------------------------------- sets

def manifest(folder, n=4, **columns):
    """n scans and a manifest; columns: name -> list of n texts."""
    for i in range(n):
        if not (folder / f"scan{i}.nii.gz").exists():
            save_nifti(folder / f"scan{i}.nii.gz", chest(seed=i))
    columns = {"volume": [f"scan{i}.nii.gz" for i in range(n)],
               "report": [f"Report, number {i}." for i in range(n)], **columns}
    return write_csv(folder / "data.csv", list(columns), zip(*columns.values()))


def test_manifest(tmp_path):
    items = data.load_items(manifest(tmp_path))
    assert [item.split for item in items] == ["train"] * 4 and len({item.patient for item in items}) == 4
    assert items[1] == data.Item("scan1.nii.gz", tmp_path / "scan1.nii.gz", "Report, number 1.", "train",
                                 "scan1.nii.gz", None, None)
    columns = {"split": ["train", "", "valid", "test"], "patient": ["a", "a", "b", "b"],
               "Lung nodule": ["1", "0", "", "1.0"], "mask": list("xyzw")}
    items = data.load_items(str(manifest(tmp_path, **columns)))
    assert [item.split for item in items] == ["train", "train", "valid", "test"]
    assert [item.patient for item in items] == ["a", "a", "b", "b"]
    labels = np.stack([item.labels for item in items])
    assert labels.shape == (4, 18) and labels.dtype == np.float32
    np.testing.assert_array_equal(labels[:, 9], [1, 0, np.nan, 1])
    assert np.isnan(np.delete(labels, 9, 1)).all()


@pytest.mark.parametrize("name", ["patient", "patient_id", "PatientID", "Subject", "subject_id"])
def test_names_of_the_column_of_patients(tmp_path, caplog, name):
    cells = ["p1", "p1", "nan", ""]
    items = data.load_items(manifest(tmp_path, split=["train", "train", "test", "test"], **{name: cells}))
    assert [item.patient for item in items] == ["p1", "p1", "scan2.nii.gz", "scan3.nii.gz"]
    told = f"data.csv: 2 of 4 volumes without a patient (column {name}): each counts as another"
    assert told in caplog.text
    with pytest.raises(ValueError, match="patient p1 in test and in train"):
        data.load_items(manifest(tmp_path, split=["test", "train", "train", "train"], **{name: cells}))


def test_columns_that_are_not_read_are_told(tmp_path, caplog):
    caplog.set_level("INFO")
    data.load_items(manifest(tmp_path, set=["train", "train", "test", "test"], **{"Lung nodul": list("0101")}))
    assert "data.csv: other columns, read as labels of a task or not at all: Lung nodul, set" in caplog.text
    assert "data.csv: 4 of 4 volumes without a patient (column patient): each counts as another" in caplog.text
    caplog.clear()
    data.load_items(manifest(tmp_path, patient=list("abcd"), **{"Lung nodule": list("0101")}))
    assert not caplog.text


@pytest.mark.parametrize("one, other, told", [("001", "1", True), ("p7", "P7", True), ("12", "12.0", True),
                                              ("p1", "p01", False), ("1", "2", False)])
def test_one_patient_in_two_spellings_is_told(tmp_path, caplog, one, other, told):
    patients = [one, "3", other, "4"]
    data.load_items(manifest(tmp_path, split=["train", "train", "test", "test"], patient=patients))
    both = " and ".join(sorted([one, other]))
    assert (f"data.csv: 1 patients of two parts may be one: {both}" in caplog.text) == told
    caplog.clear()
    data.load_items(manifest(tmp_path, split=["train"] * 4, patient=patients))
    assert "may be one" not in caplog.text


def test_a_patient_that_a_spreadsheet_rounded_off_is_refused(tmp_path):
    path = manifest(tmp_path, patient=["20230115", "1E5", "p", "2.02301E+11"])
    with pytest.raises(ValueError, match=r"line 5: found patient 2.02301E\+11, expected all digits"):
        data.load_items(path)


def test_the_column_of_that_name_tells_the_patient(tmp_path, caplog):
    path = manifest(tmp_path, subject=["chest"] * 4, patient=["a", "N/A", r"b\n1", "c"])
    caplog.set_level("INFO")
    assert [item.patient for item in data.load_items(path)] == ["a", "scan1.nii.gz", r"b\n1", "c"]
    assert "other columns, read as labels of a task or not at all: subject" in caplog.text


def test_errors_of_a_spreadsheet_are_no_report(tmp_path, caplog):
    items = data.load_items(manifest(tmp_path, report=["#N/A", "#NAME?", "<NA>", "Heart normal."]))
    assert [item.report for item in items] == ["Heart normal."]
    assert "left out 3 with an empty report" in caplog.text


def test_line_ends_as_other_tools_write_them(tmp_path):
    texts = [r"Heart normal.\nNo effusion\r\nCyst", "Heart normal.<br>No effusion<br />Cyst",
             "Heart normal._x000D_\nNo effusion\nCyst", "Heart normal.\r\nNo effusion\rCyst",
             r"Heart normal.\.br\No effusion\.br\Cyst", "Heart normal.<BR>No effusion\x0bCyst",
             "Heart normal.\u2028No effusion\x85Cyst"]
    items = data.load_items(manifest(tmp_path, report=texts))
    assert {tuple(split_sentences(item.report)) for item in items} == {("Heart normal.", "No effusion", "Cyst")}


@pytest.mark.parametrize("columns, words", [
    ({"volume": ["scan0.nii.gz", "scan1.nii.gz", "./scan0.nii.gz", "scan2.nii.gz"]},
     r"\./scan0.nii.gz \(.*scan0.nii.gz\) twice"),
    ({"split": ["train", "valid", "test", "tran"]}, "line 5: found volume 'scan3.nii.gz' and split 'tran'"),
    ({"volume": ["", "scan1.nii.gz", "scan2.nii.gz", "scan3.nii.gz"]}, "line 2"),
    ({"split": ["train", "valid", "test", "test"], "patient": ["a", "b", "c", "a"]},
     "patient a in train and in (test|valid)"),
    ({"split": ["valid", "train", "test", "test"], "patient": ["a", "a", "c", "d"]},
     "patient a in (test|valid) and in train"),
    ({"Lung nodule": ["1", "yes", "0", "0"]}, "line 3: found Lung nodule 'yes', expected 0, 1 or"),
    ({"volume": [f"gone{i}.nii.gz" for i in range(4)]}, "no file for 4 of 4"),
    ({"report": ["", " ", "...", "-"]}, "no item"),
])
def test_bad_manifests(tmp_path, columns, words):
    path = manifest(tmp_path, **columns)
    with pytest.raises(ValueError, match=words) as error:
        data.load_items(path)
    assert str(path) in str(error.value) and "expected" in str(error.value)


def test_bad_text_files(tmp_path):
    path = tmp_path / "data.csv"
    for content, words in ((b"volume,report\na.nii,ok\nb.nii,\xe9t\xe9\n", "0xe9.*UTF-8"),
                           (b"volume,text\na.nii,ok\n", "text.*expected.*report"),
                           (b"volume,report\na.nii,one, two\n", "line 2: found 3 fields, expected 2"),
                           (b"", "expected"), (b"volume,report\n", "no item"),
                           (b"{\"train\": [{\"id\": 1}]}", "image_path"), (b"{\"train\": ", "JSON"),
                           (b"{\"images\": []}", "no item")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=words) as error:
            data.load_items(path)
        assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="manifest .csv.*CT-RATE folder.*CTRG-Chest .json"):
        data.load_items(tmp_path)
    with pytest.raises(FileNotFoundError, match="none.csv"):
        data.load_items(tmp_path / "none.csv")


def test_empty_reports_and_a_few_missing_volumes_are_counted_skips(tmp_path, caplog):
    n = 25
    path = manifest(tmp_path, n, report=["", "..."] + ["Fine."] * (n - 2))
    (tmp_path / "scan7.nii.gz").unlink()
    items = data.load_items(path)
    left_out = {"scan0.nii.gz", "scan1.nii.gz", "scan7.nii.gz"}
    assert len(items) == n - 3 and not left_out & {item.id for item in items}
    message = f"{path}: left out 2 with an empty report: scan0.nii.gz, scan1.nii.gz"
    assert message in caplog.text               # of those that have a file
    assert re.search(f"{path}: found no file for 1 of 25 volumes: .*scan7.nii.gz; left out", caplog.text)
    (tmp_path / "scan8.nii.gz").unlink()
    with pytest.raises(ValueError, match="2 of 25.*scan7.nii.gz.*scan8.nii.gz.*5 %"):
        data.load_items(path)


def ct_rate(folder, names, kind="nii.gz"):
    for i, name in enumerate(names):
        split, patient, study, _ = name.split("_")
        path = folder / split / f"{split}_{patient}" / f"{split}_{patient}_{study}" / f"{name}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "npz":
            np.savez(path, chest(seed=i).astype(np.float32) / 1000)
        else:
            save_nifti(path, chest(seed=i))
    for split in ("train", "valid"):
        files = [f"{name}.nii.gz" for name in names if name.startswith(split)]
        write_csv(folder / "reports" / f"{split}.csv",
                  "VolumeName,ClinicalInformation_EN,Technique_EN,Findings_EN,Impressions_EN",
                  [[file, "Cough.", "CT.", f"Finding of {file}", "Not given." if k else "Normal."]
                   for k, file in enumerate(files)])
        write_csv(folder / "labels" / f"{split}.csv", ["VolumeName", *data.LABELS],
                  [[file, *np.eye(18, dtype=int)[k]] for k, file in enumerate(files)])
        write_csv(folder / "metadata" / f"{split}.csv",
                  "VolumeName,RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing",
                  [[file, 1, -1024, "[0.75, 0.75]", 1.5] for file in files[1:]])
    return folder


@pytest.mark.parametrize("kind", ["nii.gz", "npz"])
def test_ct_rate_folder(tmp_path, kind, caplog):
    names = ["train_1_a_1", "train_1_a_2", "train_2_a_1", "train_3_a_1", "valid_1_a_1"]
    ct_rate(tmp_path, names, kind)
    (tmp_path / "no_chest_train.txt").write_text("train/train_3/train_3_a/train_3_a_1.nii.gz\n")
    items = {item.id: item for item in data.load_items(tmp_path)}
    assert set(items) == set(names) - {"train_3_a_1"} and not caplog.records
    assert [items[name].patient for name in names[:3]] == ["train_1", "train_1", "train_2"]
    assert items["valid_1_a_1"].split == "valid" and items["train_2_a_1"].split == "train"
    assert items["train_1_a_1"].report == "Finding of train_1_a_1.nii.gz\nNormal."
    assert items["train_1_a_2"].report == "Finding of train_1_a_2.nii.gz"
    assert items["train_1_a_1"].rescale is None and items["train_1_a_2"].rescale == (1, -1024)
    np.testing.assert_array_equal(items["train_2_a_1"].labels, np.arange(18) == 2)
    assert torch.isfinite(data.load_volume(items["train_1_a_2"], None, SMALL)).all()


def test_a_manifest_may_tell_the_rescale(tmp_path):
    path = manifest(tmp_path, n=3, RescaleSlope=[1, "", 1], RescaleIntercept=[-1024, "", 0])
    save_nifti(tmp_path / "scan0.nii.gz", chest(seed=0) + np.int16(1024))
    items = data.load_items(path)
    assert [item.rescale for item in items] == [(1, -1024), None, (1, 0)]
    assert torch.equal(data.load_volume(items[0], None, SMALL, "csv"),
                       data.load_volume(items[0], None, SMALL, "auto"))
    with pytest.raises(ValueError, match="RescaleSlope"):
        data.load_volume(items[1], None, SMALL, "csv")


def test_a_folder_of_phantoms_replaces_no_other_manifest(tmp_path, command):
    path = manifest(tmp_path, n=1).rename(tmp_path / "manifest.csv")
    before = path.read_bytes()
    code, text = command("data.py", "demo", "--out", tmp_path, "--n", 1)
    assert code == 1 and f"{path}: found a manifest of others" in text and path.read_bytes() == before


def test_ct_rate_volumes_without_report_and_reports_without_volume(tmp_path, caplog):
    ct_rate(tmp_path, ["train_1_a_1", "train_2_a_1", "train_3_a_1", "valid_1_a_1"])
    (tmp_path / "no_chest_train.txt").write_text("train/train_3/train_3_a/train_3_a_1.nii.gz\n")
    for name in ("train_4_a_1", "valid_2_a_1"):
        save_nifti(tmp_path / f"{name}.nii.gz", chest())
    (tmp_path / "train" / "train_2" / "train_2_a" / "train_2_a_1.nii.gz").unlink()
    assert {item.id for item in data.load_items(tmp_path)} == {"train_1_a_1", "valid_1_a_1"}
    assert f"{tmp_path}: left out 2 volumes without a report: train_4_a_1, valid_2_a_1" in caplog.text
    assert f"{tmp_path}: 2 of 3 reports have a volume here" in caplog.text


AXIAL, CORONAL = "[1.0, 0.0, 0.0, 0.0, 1.0, 0.0]", "[1, 0, 0, 0, 0, -1]"
OBLIQUE = "[0.99, 0.141067, 0, -0.141067, 0.99, 0]"


def ct_rate_v1(folder, stored, affine=None, **geometry):
    """A CT-RATE folder of one scan (columns, rows, slices), its header blank or with an affine"""
    path = folder / "train" / "train_1" / "train_1_a" / "train_1_a_1.nii.gz"
    path.parent.mkdir(parents=True)
    nib.save(nib.Nifti1Image(stored, np.eye(4) if affine is None else affine), path)
    write_csv(folder / "reports.csv", "VolumeName,Findings_EN", [[path.name, "Fine."]])
    row = {"RescaleSlope": 1, "RescaleIntercept": -1024} | geometry
    write_csv(folder / "metadata.csv", ["VolumeName", *row], [[path.name, *row.values()]])
    return data.load_items(folder)[0]


@pytest.mark.parametrize("orientation, axes", [
    (AXIAL, [[-1, 0, 0], [0, -1, 0], [0, 0, 1]]), (CORONAL, [[-1, 0, 0], [0, 0, -1], [0, -1, 0]]),
    (OBLIQUE, [[-0.99, 0.141067, 0], [-0.141067, -0.99, 0], [0, 0, 1]])], ids=["axial", "coronal", "oblique"])
def test_ct_rate_with_blank_headers(tmp_path, orientation, axes):
    """axes: where columns, rows and slices run in RAS, as columns of a matrix"""
    affine = np.eye(4)
    affine[:3, :3] = np.array(axes) * [0.75, 0.75, 1.5]
    truth = chest()                                                 # (z, y, x) in RAS
    turn = nib.orientations.ornt_transform(nib.io_orientation(np.eye(4)), nib.io_orientation(affine))
    stored = np.ascontiguousarray(nib.apply_orientation(truth.T, turn))
    geometry = {"XYSpacing": "[0.75, 0.75]", "ZSpacing": "1.5", "ImageOrientationPatient": orientation}
    first = ct_rate_v1(tmp_path / "v1", stored + np.int16(1024), **geometry)
    second = ct_rate_v1(tmp_path / "v2", stored, affine, **geometry)
    assert first.geometry == (f"{tmp_path / 'v1' / 'metadata.csv'}, line 2", *geometry.values())
    want = data.preprocess(truth.astype(np.float32), None, SMALL).half().float()
    assert torch.equal(data.load_volume(first, None, SMALL), want)
    assert torch.equal(data.load_volume(second, None, SMALL), want)
    np.testing.assert_allclose(data.read_item(first)[1], affine, atol=1e-5)


def test_ct_rate_header_counts_unless_it_is_blank(tmp_path, command):
    """Metadata without orientation will do for v2, and spacings may be written in several ways."""
    item = ct_rate_v1(tmp_path / "v2", chest().T, AFFINE, XYSpacing="?")
    np.testing.assert_array_equal(data.read_item(item)[1], AFFINE)
    for i, (xy, z) in enumerate((("(0.7, 0.8)", "1.5"), ("['0.7', '0.8']", "[1.5]"), ("0.7\\0.8", " 1.5e0"))):
        item = ct_rate_v1(tmp_path / f"v1_{i}", chest().T, XYSpacing=xy, ZSpacing=z,
                          ImageOrientationPatient=AXIAL)
        np.testing.assert_allclose(data.read_item(item)[1], np.diag([-0.7, -0.8, 1.5, 1]))
    code, text = command("data.py", "check", "--data", tmp_path / "v1_0")
    assert code == 0 and re.search("1.50 0.80 0.70 +LPS", text)


@pytest.mark.parametrize("column, value", [
    ("XYSpacing", ""), ("XYSpacing", "0.75"), ("XYSpacing", "[0.75, 0]"), ("XYSpacing", "[0.75, x]"),
    ("XYSpacing", "[nan, nan]"), ("XYSpacing", "[0.75, -0.75]"), ("ZSpacing", "0"), ("ZSpacing", "inf"),
    ("ZSpacing", "thick"), ("ImageOrientationPatient", "[1, 0, 0, 0, 1]"), ("ImageOrientationPatient", ""),
    ("ImageOrientationPatient", "[1, 0, 0, 1, 0, 0]"), ("ImageOrientationPatient", "[0, 0, 0, 0, 0, 0]"),
    ("ImageOrientationPatient", "[nan, 0, 0, 0, 1, 0]"), ("ImageOrientationPatient", None)])
def test_bad_geometry_in_the_metadata_of_ct_rate(tmp_path, column, value):
    geometry = {"XYSpacing": "[0.75, 0.75]", "ZSpacing": "1.5", "ImageOrientationPatient": AXIAL}
    geometry[column] = value
    if value is None:
        del geometry[column]
    item = ct_rate_v1(tmp_path, chest().T, **geometry)
    where, pair = re.escape(f"{tmp_path / 'metadata.csv'}, line 2: found"), re.escape(f"{column!r}: {value or ''!r}")
    words = f"{where} .*{pair}.*, expected geometry: the header of {item.volume} is blank"
    with pytest.raises(ValueError, match=words):
        data.load_volume(item, None, SMALL)


def test_blank_header_without_metadata_of_ct_rate(tmp_path):
    item = ct_rate_v1(tmp_path, chest().T)
    (tmp_path / "metadata.csv").unlink()
    for one in (item, data.load_items(tmp_path)[0]):
        with pytest.raises(ValueError, match=f"{tmp_path}, metadata of train_1_a_1: found .'XYSpacing': ''"):
            data.load_volume(one, None, SMALL)


def test_ct_rate_folder_with_a_volume_twice(tmp_path):
    ct_rate(tmp_path, ["train_1_a_1", "valid_1_a_1"])
    twice = tmp_path / "train_fixed" / "train_1_a_1.nii.gz"
    twice.parent.mkdir()
    save_nifti(twice, chest())
    with pytest.raises(ValueError, match="train_1_a_1.nii.gz.*twice.*train_1_a_1.nii.gz"):
        data.load_items(tmp_path)


def ctrg(folder, **splits):
    rows = {split: [{"id": f"{i}.nii.gz", "report": f"Report {i}.", "result": "Cyst.",
                     "image_path": f"./ct/{i}.nii.gz", "split": split} for i in numbers]
            for split, numbers in splits.items()}
    for i in {i for numbers in splits.values() for i in numbers}:
        save_nifti(folder / "ct" / f"{i}.nii.gz", chest(seed=i))
    (folder / "ctrg.json").write_text(json.dumps(rows))
    return folder / "ctrg.json"


def test_ctrg_json(tmp_path):
    items = data.load_items(ctrg(tmp_path, train=[1, 2, 3], val=[4, 5], test=[4, 5]))
    assert [item.id for item in items] == [f"{i}.nii.gz" for i in (1, 2, 3, 4, 5)]
    assert [item.split for item in items] == ["train"] * 3 + ["test"] * 2       # not also as valid
    assert items[3].volume == tmp_path / "ct" / "4.nii.gz" and items[3].report == "Report 4.\nCyst."
    generation = data.load_task("ctrg", tmp_path)
    assert {item.report for item in generation} == {f"Report {i}." for i in range(1, 6)}
    with pytest.raises(ValueError, match=r"found 1.nii.gz \(.*ct/1.nii.gz\) twice"):
        data.load_items(ctrg(tmp_path, train=[1, 2], test=[1]))


@real_data
def test_real_ctrg_json(tmp_path):
    path = tmp_path / "ctrg.json"
    path.write_bytes((REAL / "reports" / "ctrg_chest.json").read_bytes())
    with pytest.raises(ValueError, match="no file for 1804 of 1804"):
        data.load_items(path)
    (tmp_path / "Chest_New_nitfy_2").mkdir()
    for row in itertools.chain(*json.loads(path.read_text()).values()):
        (tmp_path / row["image_path"]).touch()
    items = data.load_items(path)
    assert collections.Counter(item.split for item in items) == {"train": 1444, "test": 360}


# --------------------------------------------------------------- what other tools write and leave behind

@pytest.mark.parametrize("text, line, words", [
    ('volume,report\na,Fine.\nb,"A nodule.\nc,Fine.\nd,Fine.\n', 3, "unexpected end"),
    ('volume,report\na,"A nodule.\nb,"Fine, too."\n', 2, "expected after"),
    ('volume,report\na,Fine.\n\nb,"A nodule.\n' + 9000 * "c,Fine as this one.\n", 4, "field limit"),
    ('volume,report,split\na,"Two\nlines.",train\nb,Fine.\n', 4, "2 fields")])
def test_a_broken_row_is_named_by_its_first_line(tmp_path, text, line, words):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ValueError, match=f"m.csv, line {line}: found .*{words}.* expected .*quotes"):
        data.load_items(tmp_path / "m.csv")


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_as_other_tools_write_them(tmp_path, separator):
    """A byte order mark, names in other case and with blanks, an empty row, parts under other names"""
    manifest(tmp_path)
    rows = [["Volume ", " REPORT", "Lung_Nodule", "split"], ["scan0.nii.gz ", '"Fine, well; good."', "True", "Training"],
            [".\\\\scan1.nii.gz", "nan", "False", "val"], ["scan2.nii.gz", "Fine.", "NA", " Validation"],
            ["", "", "", ""], ["scan3.nii.gz", "Fine.", " 1", "TESTING"]]
    text = "\r\n".join(separator.join(row) for row in rows).replace("\\\\", "\\")
    (tmp_path / "m.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    items = data.read_items(tmp_path / "m.csv")
    assert [item.split for item in items] == ["train", "valid", "valid", "test"]
    assert [item.report for item in items] == ["Fine, well; good.", "", "Fine.", "Fine."]
    assert all(item.volume.exists() for item in items)
    np.testing.assert_array_equal([item.labels[9] for item in items], [1, 0, np.nan, 1])


def test_a_column_twice_is_refused(tmp_path):
    (tmp_path / "m.csv").write_text("volume,report,Report\na,b,c\n")
    with pytest.raises(ValueError, match=r"m.csv: found the columns .* expected \['report'\] once"):
        data.load_items(tmp_path / "m.csv")


@pytest.mark.parametrize("value", ["2", "0.5", "inf", "-inf", "-2", "yes", "1e400"])
def test_labels_are_0_or_1_or_unknown(tmp_path, value):
    path = manifest(tmp_path, **{"Lung nodule": ["1", "", value, "0"]})
    message = f"data.csv, line 4: found Lung nodule '{value}', expected 0, 1 or, where it is unknown, -1"
    with pytest.raises(ValueError, match=message):
        data.load_items(path)


def test_uncertain_labels_are_unknown(tmp_path, caplog):
    path = manifest(tmp_path, Emphysema=["1", "-1", "-1.0", "0"], Atelectasis=["-1", "", "nan", "1"])
    labels = np.stack([item.labels for item in data.load_items(path)])
    np.testing.assert_array_equal(labels[:, 7:9], [[1, np.nan], [np.nan] * 2, [np.nan] * 2, [0, 1]])
    assert caplog.text.count("data.csv: labels of -1 are taken as unknown") == 1


def test_numbers_are_no_text(tmp_path):
    ct_rate(tmp_path, ["train_1_a_1", "train_2_a_1", "valid_1_a_1"])
    table = tmp_path / "metadata" / "train.csv"
    table.write_text(table.read_text().replace("-1024", "x"))
    with pytest.raises(ValueError, match="train.csv, line 2: found .* 'x', expected a number$"):
        data.load_items(tmp_path)


def test_hidden_files_are_no_data_and_links_are_followed(tmp_path):
    """train/ lies on another disk; each folder counts once, whatever links lead to it."""
    names = ["train_1_a_1", "train_2_a_1", "valid_1_a_1"]
    folder, disk = ct_rate(tmp_path / "set", names), tmp_path / "disk"
    (folder / "train").rename(disk)
    for link, target in (("a", disk), ("train", disk), ("up", folder), ("labels/up", folder), ("gone", tmp_path / "no")):
        (folder / link).symlink_to(target)
    for copy in (".ipynb_checkpoints", "__MACOSX"):
        (folder / copy).mkdir()
        (folder / copy / "train.csv").write_bytes((folder / "reports" / "train.csv").read_bytes())
    (folder / "reports" / "._train.csv").write_bytes(b"\0\5\x16\7")
    (folder / "._no_chest_train.txt").write_text("train_1_a_1")
    assert sorted(item.id for item in data.load_items(folder)) == names
    found = data.find(folder, r"train.*\.NII\.GZ")
    assert [path.name for path in found] == ["train_1_a_1.nii.gz", "train_2_a_1.nii.gz"]
    pictures = tmp_path / ".slices" / "scan"                # hidden is what lies below, not where it lies
    for z in range(4):
        pictures.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(sitk.GetImageFromArray(chest()[z].astype(np.uint8)), str(pictures / f"{z}.png"))
        (pictures / f"._{z}.png").write_bytes(b"\0\5\x16\7")
    assert data.read_volume(pictures)[0].shape[0] == 4


def test_ct_rate_tables_that_contradict_each_other(tmp_path):
    ct_rate(tmp_path, ["train_1_a_1", "train_2_a_1", "valid_1_a_1"])
    for name, line, old, new in (("labels", 2, ",1,0", ",0,1"), ("metadata", 2, "-1024", "0")):
        table, copy = tmp_path / name / "train.csv", tmp_path / name / "z.csv"
        copy.write_text(table.read_text())
        assert len(data.load_items(tmp_path)) == 3          # a copy says the same
        copy.write_text(table.read_text().replace(old, new))
        with pytest.raises(ValueError, match=rf"z.csv, line {line}: found .* of train_.*{name}/train.csv, line {line}"):
            data.load_items(tmp_path)
        copy.unlink()
    (tmp_path / "reports" / "z.csv").write_text((tmp_path / "reports" / "train.csv").read_text().replace("Normal", "Ill"))
    with pytest.raises(ValueError, match="z.csv, line 2: found .* of train_1_a_1, .*/train.csv, line 2"):
        data.load_items(tmp_path)


def test_ct_rate_is_walked_once_and_other_tables_do_not_matter(tmp_path, monkeypatch):
    """A table without VolumeName may have columns of the metadata; its rows are of no volume."""
    names = ["train_1_a_1", "train_2_a_1", "valid_1_a_1"]
    ct_rate(tmp_path, names)
    write_csv(tmp_path / "other.csv", "Scanner,RescaleSlope,RescaleIntercept,XYSpacing",
              [["A", 1, 0, "[1, 1]"], ["B", 2, -1024, "[2, 2]"]])
    walks, walk = [], data.walk
    monkeypatch.setattr(data, "walk", lambda folder: walks.append(folder) or walk(folder))
    items = data.load_items(tmp_path)
    assert [item.id for item in items] == names and walks == [tmp_path]
    assert items[1].rescale == (1, -1024)


def test_grey_array_with_its_ending_in_capitals(tmp_path, caplog):
    grey = np.arange(1000).reshape(10, 10, 10) // 4
    with open(tmp_path / "A.NPY", "wb") as file:
        np.save(file, grey.astype(np.uint8))
    item = data.Item("A", tmp_path / "A.NPY", "", "train", "A")
    xyz, _ = data.read_item(item)
    array, note = data.to_hounsfield(xyz, item.volume)
    np.testing.assert_allclose(array, grey.T / 255 * 2000 - 1000, atol=1e-3)
    assert note.startswith("pictures") and not caplog.text


def test_ctrg_json_as_other_tools_write_it(tmp_path):
    path = ctrg(tmp_path, train=[1, 2], validation=[3], Testing=[4, 5])
    assert [item.split for item in data.load_items(path)] == ["train"] * 2 + ["test"] * 2 + ["valid"]
    content = json.loads(path.read_text())
    content["train"][0] |= {"report": ["No effusion.", None, "Heart normal."], "image_path": ["ct\\1.nii.gz"]}
    content["train"][1] |= {"report": float("nan"), "result": None}
    content["validation"][0] |= {"report": None}
    path.write_text(json.dumps(content))
    items = {item.id[0]: item for item in data.load_items(path)}
    assert set(items) == {"1", "3", "4", "5"} and items["3"].report == "Cyst."
    assert items["1"].report == "No effusion.\nHeart normal.\nCyst." and items["1"].volume == tmp_path / "ct" / "1.nii.gz"
    for part, change, message in (("train", {"report": 5}, "expected string or bytes-like object, got .int."), ("train", {"image_path": None}, "AttributeError"),
                                  ("train", {"image_path": ["a", "b"]}, "too many values"), ("holdout", {}, "the part 'holdout'")):
        path.write_text(json.dumps({part: [content["train"][0] | change]}))
        with pytest.raises(ValueError, match=f"ctrg.json: found .*{message}.*, expected CTRG-Chest's"):
            data.load_items(path)


# -------------------------------------------------------------------------------------------- cache

def test_cache(tmp_path, monkeypatch):
    item = data.load_items(manifest(tmp_path))[0]
    cache = tmp_path / "cache"
    fresh = data.load_volume(item, None, SMALL)
    assert fresh.dtype == torch.float32 and fresh.shape == (1, *SMALL) and not cache.exists()
    array, spacing, _ = data.read_volume(item.volume)
    assert (fresh - data.preprocess(array, spacing, SMALL)).abs().max() < 1e-3
    assert torch.equal(data.load_volume(item, cache, SMALL), fresh)
    path = data.volume_file(item, cache, SMALL)
    assert [file.name for file in cache.iterdir()] == [path.name]               # nothing temporary is left
    stored = np.load(path, mmap_mode="r")
    assert stored.dtype == np.float16 and stored.shape == (1, *SMALL)

    reads = []
    read_stored = data.read_stored
    monkeypatch.setattr(data, "read_stored", lambda path: reads.append(path) or read_stored(path))
    assert torch.equal(data.load_volume(item, str(cache), SMALL), fresh) and not reads
    paths = {path, data.volume_file(item, cache), data.volume_file(item, cache, SMALL, "header"),
             data.volume_file(item._replace(rescale=(1, -1024)), cache, SMALL),
             data.volume_file(item._replace(volume=tmp_path / "scan1.nii.gz"), cache, SMALL)}
    assert len(paths) == 5
    os.utime(item.volume, ns=(1, 1))
    assert data.volume_file(item, cache, SMALL) not in paths
    save_nifti(item.volume, chest(seed=99))
    assert not torch.equal(data.load_volume(item, cache, SMALL), fresh) and len(reads) == 1


def many_files(folder, end):
    """A volume of several files -> its path, and one of its files"""
    path = folder / f"a.{end}"
    if end == "dicom":
        return write_series(path), path / "7.dcm"
    if end == "png":
        path.mkdir()
        for z in range(4):
            sitk.WriteImage(sitk.GetImageFromArray(np.full((4, 5), 60 * z, np.uint8)), str(path / f"{z}.png"))
        return path, path / "3.png"
    sitk.WriteImage(itk_image(chest()), str(path), useCompression=False)
    return path, folder / "a.raw"


@pytest.mark.parametrize("end", ["mhd", "nhdr", "dicom", "png"])
def test_cache_knows_every_file_of_a_volume(tmp_path, end):
    path, part = many_files(tmp_path, end)
    item = data.Item("a", path, "", "train", "a")
    before = data.volume_file(item, tmp_path)
    assert data.volume_file(item, tmp_path) == before
    stat = part.stat()
    part.write_bytes(part.read_bytes())
    os.utime(part, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    after = data.volume_file(item, tmp_path)
    part.rename(part.with_name("b" + part.name))
    assert len({before, after, data.volume_file(item, tmp_path)}) == 3


@pytest.mark.parametrize("end, key, value", [
    ("mhd", "ElementDataFile = ", "LIST\n" + "\n".join(f"s{z}.raw" for z in range(20))),
    ("mhd", "ElementDataFile = ", "s%d.raw 0 19 1"),
    ("nhdr", "data file: ", "LIST\n" + "\n".join(f"s{z}.raw" for z in range(20))),
    ("nhdr", "data file: ", "./s%d.raw 0 19 1"), ("nhdr", "datafile: ", "./s%d.raw 0 19 1")])
def test_header_with_a_data_file_a_slice(tmp_path, end, key, value):
    path = tmp_path / f"a.{end}"
    sitk.WriteImage(itk_image(chest()), str(path), useCompression=False)
    content = (tmp_path / "a.raw").read_bytes()
    for z in range(20):
        (tmp_path / f"s{z}.raw").write_bytes(content[z * 1344:(z + 1) * 1344])
    lines = [line for line in path.read_text().splitlines() if "a.raw" not in line]
    path.write_text("\n".join([*lines, key + value + "\n"]))
    check_read(path)
    assert sorted(data.files_of(path)) == sorted([path, *tmp_path.glob("s*.raw")])


def test_cache_of_prepared_scans_knows_the_data_of_a_mask(tmp_path):
    sitk.WriteImage(itk_image(chest()), str(tmp_path / "a.mhd"))
    item = data.Item("a", tmp_path / "a.mhd", "", "train", "a", mask=tmp_path / "mask.mhd")
    task = data.TASKS["msd-lung"]
    for z in (5, 15):
        mask = np.zeros((20, 24, 28), np.uint8)
        mask[z] = 1
        sitk.WriteImage(itk_image(mask), str(item.mask))
        os.utime(item.mask, ns=(1, 1))                              # the header stays as it is
        _, prepared, _ = data.prepare(item, task, tmp_path / "cache")
        assert np.flatnonzero(prepared.any((1, 2))).mean() == pytest.approx(2 * z + 0.5)


def test_cache_depends_on_the_geometry_of_the_metadata(tmp_path):
    item = data.load_items(manifest(tmp_path))[0]
    keys = {data.volume_file(item._replace(geometry=geometry), tmp_path) for geometry in (
        None, ("line 2", "[1, 1]", "1", AXIAL), ("line 2", "[1, 1]", "1", CORONAL),
        ("line 3", "[1, 1]", "1", AXIAL))}
    assert len(keys) == 3                                           # where the metadata stand does not matter


def test_cache_is_atomic(tmp_path, monkeypatch):
    item = data.load_items(manifest(tmp_path))[0]
    def full_disk(file, array):
        file.write(b"half")
        raise OSError("No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full_disk)
        with pytest.raises(OSError, match="space"):
            data.load_volume(item, tmp_path / "cache", SMALL)
    assert not list((tmp_path / "cache").iterdir())
    assert data.load_volume(item, tmp_path / "cache", SMALL).shape == (1, *SMALL)


# ------------------------------------------------------------------------------------- cache folders

def many(folder, n=10):
    """A manifest of n scans in folders, of which two have names that a careless encoding would mix up"""
    names = ["a/0.nii.gz", "a%2F0.nii.gz", *(f"b/{i}.nii.gz" for i in range(2, n))]
    for i, name in enumerate(names):
        save_nifti(folder / name, chest(seed=i))
    return manifest(folder, n, volume=names, split=["train"] * (n - 2) + ["valid", "test"],
                    patient=[f"P{i // 2}" for i in range(n)],
                    **{"Lung nodule": ["1", "0", ""] + ["0"] * (n - 3)})


def cache_flags(path, out, *more):
    return "data.py", "cache", "--data", path, "--out", out, "--size", *SMALL, "--workers", 2, *more


def cached_rows(out):
    return [json.loads(line) for path in sorted(out.glob("manifest-*.jsonl"))
            for line in path.read_text().splitlines()]


def is_whole(out, ids):
    """One row and one volume for each id, and nothing else"""
    names = {file.name for file in out.iterdir()}
    volumes = {name for name in names if name.endswith(".npy")}
    assert {name for name in names - volumes if not name.startswith("manifest-")} == {"cache.json"}
    assert sorted(row["id"] for row in cached_rows(out)) == sorted(ids)
    assert volumes == {data.cache_name(name) for name in ids} and len(volumes) == len(ids)
    return True


def test_cache_folder_stands_alone(tmp_path, command):
    path, out = many(tmp_path / "raw"), tmp_path / "made"
    before = {item.id: item for item in data.load_items(path)}
    volumes = {name: data.load_volume(item, None, SMALL) for name, item in before.items()}
    code, text = command(*cache_flags(path, out))
    assert code == 0 and is_whole(out, before)
    assert "shard 1/1: 10 volumes to make, 0.00 of " in text
    assert f"{out}: 10 of 10 of all shards; 0 still lack" in text and "metadata now" not in text
    for row in cached_rows(out):
        file = before[row["id"]].volume
        assert row["source"] == {"path": str(file), "size": file.stat().st_size, "mtime_ns": file.stat().st_mtime_ns,
                                 "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    made = json.loads((out / "cache.json").read_text())
    assert made == {"version": 1, "size": [32, 32, 32], "hu": "auto", "crop": [0.88, 0.66, 0.88],
                    "window": [-1000, 1000], "dtype": "float16", "volumes": 10}
    stored = np.load(out / data.cache_name("a/0.nii.gz"))
    assert stored.dtype == np.float16 and stored.shape == (1, *SMALL)

    shutil.rmtree(tmp_path / "raw")
    moved = out.rename(tmp_path / "elsewhere")
    items = data.load_items(moved)
    assert [item.id for item in items] == sorted(before)
    for item in items:
        old = before[item.id]
        assert (item.report, item.split, item.patient) == (old.report, old.split, old.patient)
        np.testing.assert_array_equal(item.labels, old.labels)
        for one in (item, pickle.loads(pickle.dumps(item)), item._replace(split="test", report="Another.")):
            assert torch.equal(data.load_volume(one, tmp_path / "unused", SMALL), volumes[item.id])
        assert one.report == "Another." and one.split == "test"
    assert not (tmp_path / "unused").exists()
    code, text = command("data.py", "check", "--data", moved)
    assert code == 0 and len(re.findall("32x32x32 .* preprocessed; 3 words", text)) == 10


def test_volumes_of_a_cache_folder_that_are_listed_no_more_are_told(tmp_path, command, caplog):
    path, out = manifest(tmp_path), tmp_path / "made"
    assert command(*cache_flags(path, out))[0] == 0 and "does not list" not in caplog.text
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert command(*cache_flags(path, out))[0] == 0
    assert f"{out}: holds 1 volumes that {path} does not list: scan3.nii.gz; to leave them out" in caplog.text


def test_a_cache_folder_refuses_other_preprocessing(tmp_path, command, monkeypatch):
    path, out = many(tmp_path), tmp_path / "made"
    assert command(*cache_flags(path, out, "--hu", "header"))[0] == 0
    items = data.load_items(out)
    for size, hu, found, expected in ((data.SIZE, "header", "--size 32 32 32", "--size 128 96 128"),
                                      (SMALL, "auto", "--hu header", "--hu auto"),
                                      (data.SIZE, "csv", "--size 32 32 32", "--size 128 96 128")):
        task = data.TASKS["ct-rate-retrieval"]._replace(size=size, hu=hu)
        words = re.escape(f"{out}: found a cache made with {found}, expected {expected}")
        for refused in (lambda: data.load_volume(items[0], None, size, hu),
                        lambda: data.prepare_all(items, None, 1, task)):
            with pytest.raises(ValueError, match=words):
                refused()
    code, text = command(*cache_flags(path, out))
    assert code == 1 and f"{out}: found a cache made with --hu header, expected --hu auto" in text
    task = data.with_classes(data.TASKS["ct-rate-retrieval"]._replace(size=SMALL), items)
    assert task.hu == "header" and data.prepare_all(items, None, 1, task) == items
    assert torch.equal(data.network_input(items[0], task), data.load_volume(items[0], None, SMALL, "header"))
    monkeypatch.setattr(data, "WINDOW", (-500., 500.))
    data.check_settings.cache_clear()
    with pytest.raises(ValueError, match="window -1000.0 1000.0, expected window -500.0 500.0"):
        data.load_volume(items[1], None, [32, 32, 32], "header")
    (out / "cache.json").write_text('{"version": 2}')
    for refused in (command(*cache_flags(path, out))[1], command("data.py", "check", "--data", out)[1]):
        assert f"{out}: found a cache of version 2, expected version 1" in refused
    assert len(cached_rows(out)) == len(list(out.glob("*.npy"))) == 10


def test_every_volume_has_one_shard():
    assert [data.read_shard(f"{k}/16") for k in (1, 16)] == [(1, 16), (16, 16)]
    for n in (1, 2, 7, 16):
        counts = collections.Counter(data.shard_of(f"train_{i}_a_1", n) for i in range(1000))
        assert sorted(counts) == list(range(1, n + 1)) and min(counts.values()) > 500 / n


@pytest.mark.parametrize("shard", ["0/4", "5/4", "x", "1/0", "1.5/4", "1/4/2"])
def test_bad_shards_make_nothing(tmp_path, command, shard):
    code, text = command(*cache_flags(manifest(tmp_path), tmp_path / "made", "--shard", shard))
    assert code == 1 and f"--shard: found {shard}, expected a shard from 1/n to n/n" in text
    assert not (tmp_path / "made").exists()


def test_what_cannot_be_cached_is_refused(tmp_path, command):
    path, out = manifest(tmp_path / "raw"), tmp_path / "made"
    code, text = command(*cache_flags(path, path.parent))           # it would become a cache itself
    assert code == 1 and "found other files" in text and not data.is_cache(path.parent)
    code, text = command(*cache_flags(path, out, "--size", 32000, 32000, 32000))
    assert code == 1 and "GB free, expected" in text
    shutil.rmtree(out)
    command(*cache_flags(path, out))
    code, text = command(*cache_flags(out, tmp_path / "again"))
    assert code == 1 and f"{out}: found a cache folder, expected raw volumes" in text
    for name in ("msd-lung", "stoic"):
        with pytest.raises(ValueError, match=f"found nothing of {name}, expected"):
            data.load_task(name, out)
    for volume in path.parent.glob("*.nii.gz"):
        volume.write_bytes(b"broken")
    shutil.rmtree(out)
    code, text = command(*cache_flags(path, out))
    assert code == 1 and "1 of 4 scans are wrong, more than 5 %" in text and ".nii.gz: cannot be read" in text
    for volume in path.parent.glob("*.nii.gz"):
        volume.unlink()
    code, text = command(*cache_flags(path, out))
    assert code == 0 and "0 volumes to make" in text and "0 of 4 of all shards; 4 still lack" in text


def test_slices_that_are_links_to_nothing_are_refused(tmp_path):
    for z in range(4):
        sitk.WriteImage(sitk.GetImageFromArray(np.eye(4, dtype=np.uint8)), str(tmp_path / f"{z}.png"))
    assert data.read_volume(tmp_path)[0].shape == (4, 4, 4)
    (tmp_path / "4.png").symlink_to("absent.png")
    with pytest.raises(ValueError, match=f"{tmp_path}: .*links to nothing: 4.png"):
        data.read_volume(tmp_path)


def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)
    assert data.find(tmp_path, "x") == data.find(tmp_path / "none", "x") == []
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match="/b"):
        data.find(tmp_path, "x")


def test_data_of_a_header_may_have_any_name(tmp_path):
    (tmp_path / "a.mhd").write_text("ElementDataFile = M\u00fcller.raw\n", encoding="utf-8")
    (tmp_path / "M\u00fcller.raw").touch()
    assert data.files_of(tmp_path / "a.mhd") == [tmp_path / "a.mhd", tmp_path / "M\u00fcller.raw"]


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    [item] = data.load_items(manifest(tmp_path, n=1))

    def denied(volume):
        raise PermissionError(13, "Permission denied", str(volume))
    monkeypatch.setattr(data, "_source", denied)
    with pytest.raises(ValueError, match="scan0.nii.gz: found .*Permission denied.*, expected files that may be read"):
        data._cache_volume(item, tmp_path, "1-of-1", SMALL, "auto")


def test_broken_volumes_of_a_cache_folder_are_named(tmp_path, command):
    out = tmp_path / "made"
    command(*cache_flags(manifest(tmp_path, 20), out))
    items = data.load_items(out)
    for item, content in zip(items, (b"", b"\x93NUMPY", items[2].volume.read_bytes()[:5000])):
        item.volume.write_bytes(content)
    np.save(items[3].volume, np.zeros((1, 32, 32, 64), np.float16))
    np.save(items[4].volume, np.zeros((1, *SMALL), np.float32))
    for item in items[:5]:
        with pytest.raises(ValueError, match=re.escape(f"{item.volume}: found ") + ".*, expected a preprocessed"):
            data.load_volume(item, None, SMALL)
    items[0].volume.unlink()
    assert [item.id for item in data.load_items(out)] == [item.id for item in items[1:]]
    items[1].volume.unlink()
    with pytest.raises(ValueError, match=f"{out}: found no file for 2 of 20 volumes: scan0.*expected at most 5 %"):
        data.load_items(out)
    os.truncate(items[2].volume, 0)
    code, text = command(*cache_flags(tmp_path / "data.csv", out))
    assert code == 0 and "18 of 20 of all shards" in text and "2 volumes to make" in text      # made again
    assert len(data.load_items(out)) == 20


@pytest.mark.parametrize("end", ["mhd", "dicom"])
def test_the_source_of_a_cached_volume_is_all_its_files(tmp_path, end):
    path, _ = many_files(tmp_path, end)
    row = data._cache_volume(data.Item("a", path, "Fine.", "train", "a"), tmp_path / "made", "", SMALL, "header")
    files = sorted(path.iterdir()) if path.is_dir() else [path, tmp_path / "a.raw"]
    assert row["source"]["size"] == sum(file.stat().st_size for file in files)
    assert row["source"]["sha256"] == hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def start(*flags):
    """A script that goes on in the background, in a forked process, which need not import torch anew"""
    def execute():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        sys.argv = list(map(str, flags))
        runpy.run_path(str(ROOT / "data.py"), run_name="__main__")
    process = multiprocessing.get_context("fork").Process(target=execute)
    process.start()
    return process


@pytest.mark.parametrize("shards", [["1/1"], ["1/2", "2/2"]])
def test_killed_in_the_midst_nothing_is_lost_or_doubled(tmp_path, command, shards):
    path, out = manifest(tmp_path, 40), tmp_path / "made"
    running = [start(*cache_flags(path, out, "--shard", shard)) for shard in shards]
    end = time.time() + 100
    names = [out / f"manifest-{shard.replace('/', '-of-')}.jsonl" for shard in shards]
    waiting = list(zip(names, running))
    while waiting:
        for name, process in list(waiting):
            assert time.time() < end and process.is_alive()
            if name.exists() and name.stat().st_size > 500:
                process.kill()
                waiting.remove((name, process))
        time.sleep(0.002)
    for process in running:
        process.join()
        assert process.exitcode == -signal.SIGKILL
    before = cached_rows(out)
    assert 2 <= len(before) < 40
    with open(names[0], "a") as rows:                               # as if the kill had come while it wrote
        rows.write('{"id": "scan')
    items = data.load_items(out)                                    # what is there can be used
    assert {item.id for item in items} == {row["id"] for row in before}
    stamps = {item.id: item.volume.stat().st_mtime_ns for item in items}
    (out / f"x.npy.{names[0].stem[9:]}.0.part").write_bytes(b"half")
    (out / "x.npy.9-of-9.0.part").write_bytes(b"of a shard that may be running")
    for shard in shards:
        code, text = command(*cache_flags(path, out, "--shard", shard))
        assert code == 0
    assert "40 of 40 of all shards; 0 still lack" in text
    (out / "x.npy.9-of-9.0.part").unlink()                          # which nobody else may do
    assert is_whole(out, [f"scan{i}.nii.gz" for i in range(40)])
    for item in data.load_items(out):
        assert stamps.get(item.id, 0) in (0, item.volume.stat().st_mtime_ns)        # none was made again
        raw = data.Item("", tmp_path / item.id, "", "train", "")
        assert torch.equal(data.load_volume(item, None, SMALL), data.load_volume(raw, None, SMALL))


def test_shards_of_several_divisions_may_overlap(tmp_path, command):
    path, out = manifest(tmp_path, 20), tmp_path / "made"
    for shards in (["1/2", "2/3"], ["1/1"]):                        # two at once, then all
        running = [start(*cache_flags(path, out, "--shard", shard)) for shard in shards]
        for process in running:
            process.join()
            assert process.exitcode == 0
    assert [item.id for item in data.load_items(out)] == sorted(f"scan{i}.nii.gz" for i in range(20))
    assert len(list(out.glob("*.npy"))) == 20 and not list(out.glob(".*"))


def test_download_a_part_cache_it_delete_it(tmp_path, command, caplog):
    names = [f"train_{i}_a_1" for i in range(1, 5)] + ["valid_1_a_1", "valid_2_a_1"]
    ct_rate(tmp_path / "all", names)
    files, part, out = {path.name: path for path in (tmp_path / "all").rglob("*.nii.gz")}, tmp_path / "part", tmp_path / "made"
    for table in (tmp_path / "all").rglob("*.csv"):
        (part / table.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(table, part / table.parent.name)
    for k, chosen in enumerate((names[:3], names[3:4], names[4:])):
        for name in chosen:
            shutil.copy(files[f"{name}.nii.gz"], part)
        code, text = command(*cache_flags(part, out))
        done = (3, 4, 6)[k]
        assert code == 0 and f"{done} of 6 of all shards; {6 - done} still lack" in text
        assert f"{len(chosen)} volumes to make" in text
        for name in chosen:
            (part / f"{name}.nii.gz").unlink()
        caplog.clear()
        assert len(data.load_items(out)) == done
        assert (f"{out}: holds {done} of 6 volumes" in caplog.text) == (done < 6)
    assert is_whole(out, names)
    assert "metadata now" not in text
    for tables in (part, tmp_path / "all"):
        write_csv(tables / "metadata" / "valid.csv", "VolumeName,RescaleSlope,RescaleIntercept",
                  [["valid_1_a_1.nii.gz", 1, -1000]])                       # the voxels would be others
    code, text = command(*cache_flags(part, out))
    assert "2 volumes have another file, report, split, patient, label or metadata now: " \
           "valid_1_a_1, valid_2_a_1; to make them anew, delete their rows" in text
    whole = {item.id: item for item in data.load_items(tmp_path / "all")}
    for item in data.load_items(out):
        old = whole[item.id]
        assert (item.report, item.split, item.patient) == (old.report, old.split, old.patient)
        assert torch.equal(data.load_volume(item, None, SMALL), data.load_volume(old, None, SMALL))
    for name in ("ctrg", "ct-rate-retrieval"):
        items, old = data.load_task(name, out), data.load_task(name, tmp_path / "all")
        assert {(item.id, item.report) for item in items} == {(item.id, item.report) for item in old}
    shutil.rmtree(tmp_path / "all")
    assert {item.split for item in items} == {"train", "valid", "test"} and len(items) == 6
    task = data.TASKS["ct-rate-retrieval"]._replace(size=SMALL)
    assert data.prepare_all(items, tmp_path / "unused", 1, task) == items
    assert data.network_input(items[0], task).shape == (1, *SMALL)
    with pytest.raises(ValueError, match="found a cache made with --size 32 32 32, expected --size 128 96 128"):
        data.prepare_all(items, tmp_path / "unused", 1, data.TASKS["ct-rate-vocab"])


def test_a_changed_source_is_told(tmp_path, command, monkeypatch, caplog):
    path, out = manifest(tmp_path, 20), tmp_path / "made"
    command(*cache_flags(path, out))
    read, honest = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or honest(path))

    def hashed():
        read.clear()
        data.load_items(out)
        return sorted(name for name in read if name.startswith("scan"))
    caplog.clear()
    assert hashed() == [] and "changed" not in caplog.text
    for name in ("scan1", "scan2"):                                 # touched; another content
        file = tmp_path / f"{name}.nii.gz"
        content = file.read_bytes()
        file.write_bytes(content if name == "scan1" else content[:-1] + b"x")
        os.utime(file, ns=(1, 1))
    save_nifti(tmp_path / "scan3.nii.gz", chest((20, 24, 30)))      # another size
    assert hashed() == ["scan1.nii.gz", "scan2.nii.gz", "scan3.nii.gz"]
    assert f"{out}: raw volumes have changed: {tmp_path / 'scan2.nii.gz'}, {tmp_path / 'scan3.nii.gz'}" in caplog.text
    code, text = command(*cache_flags(path, out))
    assert code == 0 and f"{out}: 2 volumes have another file" in text
    assert "metadata now: scan2.nii.gz, scan3.nii.gz; to make them anew, delete their rows" in text
    monkeypatch.setenv("RANK", "1")                                 # one process is enough
    assert hashed() == []
    monkeypatch.delenv("RANK")
    save_nifti(tmp_path / "scan2.nii.gz", chest(seed=99))
    [rows] = out.glob("manifest-*.jsonl")
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join(line for line in lines if '"id": "scan2' not in line and '"id": "scan3' not in line))
    code, text = command(*cache_flags(path, out))
    items = {item.id: item for item in data.load_items(out)}        # of two rows the last counts
    assert code == 0 and "2 volumes to make" in text and "have changed" not in caplog.text and len(items) == 20
    raw = data.Item("", tmp_path / "scan2.nii.gz", "", "train", "")
    assert torch.equal(data.load_volume(items["scan2.nii.gz"], None, SMALL), data.load_volume(raw, None, SMALL))


def test_jobs_that_cannot_travel_are_no_endless_wait():
    code = "import data; list(data.in_processes(lambda x: x, range(20), 1, 'jobs'))"
    done = python("-c", code)
    assert done.returncode == 1 and "pickle" in done.stderr


def test_two_sources_with_one_id(tmp_path, command):
    a, b, out = manifest(tmp_path / "a"), manifest(tmp_path / "b"), tmp_path / "made"
    command(*cache_flags(a, out))
    code, text = command(*cache_flags(b, out))                      # the same files, copied
    assert code == 0 and "0 volumes to make" in text
    save_nifti(tmp_path / "b" / "scan1.nii.gz", chest(seed=99))
    code, text = command(*cache_flags(b, out))
    assert code == 1 and f"{tmp_path / 'b' / 'scan1.nii.gz'}: found another content, expected that of " \
                         f"{tmp_path / 'a' / 'scan1.nii.gz'}" in text and is_whole(out, [f"scan{i}.nii.gz" for i in range(4)])
    code, text = command(*cache_flags(manifest(tmp_path / "b", volume=["scan0.nii.gz"] * 4), tmp_path / "new"))
    assert code == 1 and "twice, expected it once" in text
    manifest(tmp_path / "a", report=["Fine."] * 4)
    code, text = command(*cache_flags(a, out))
    assert f"{out}: 4 volumes have another file, report, split, patient, label or metadata now" in text
    rows = cached_rows(out)                                         # two folders, put together
    rows[2]["source"]["sha256"] = "0"
    (out / "manifest-2-of-2.jsonl").write_text(json.dumps(rows[2]) + "\n")
    with pytest.raises(ValueError, match=rf"manifest-2-of-2.jsonl: found {rows[2]['id']} of .*, expected its source in"):
        data.load_items(out)


def test_check_in_processes_prints_what_one_prints(tmp_path, command):
    path = manifest(tmp_path, 6)
    (tmp_path / "scan3.nii.gz").write_bytes(b"broken")
    one, three = (command("data.py", "check", "--data", path, "--workers", n) for n in (1, 3))
    assert one[0] == three[0] == 1
    lines = [[line for line in text.splitlines() if line.startswith("scan")] for _, text in (one, three)]
    assert lines[0] == lines[1] and [line[:5] for line in lines[0]] == [f"scan{i}" for i in range(6)]


# ------------------------------------------------------------------------------------------ dataset

def examples(folder, tokenizer, seed=0):
    reports = ["Heart is normal. No effusion. Fatty liver.", "Pneumonia.", "A cyst, and all is clear.",
               "Fine. Good."]
    items = data.load_items(manifest(folder, report=reports))
    make = functools.partial(data.pretraining_example, tokenizer=tokenizer, size=SMALL, mask_size=8)
    return data.Examples(items, make, seed)


def equal(a, b):
    """Are two examples or batches the same in everything?"""
    def same(x, y):
        if isinstance(x, list):
            return len(x) == len(y) and all(map(same, x, y))
        return torch.equal(x, y) if torch.is_tensor(x) else x == y
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)


def test_dataset_and_collate(tmp_path, tokenizer):
    dataset = examples(tmp_path, tokenizer)
    batch = data.collate([dataset[i, 5] for i in (0, 1, 2)], tokenizer.pad_token_id)
    counts = [3, 1, 1]
    length = max(len(data.tokenize_report(tokenizer, split_sentences(item.report))["input_ids"])
                 for item in dataset.items[:3])
    assert batch["ids"] == ["scan0.nii.gz", "scan1.nii.gz", "scan2.nii.gz"] and batch["skipped"] == []
    assert batch["volume"].shape == batch["volume_mask"].shape == (3, 1, *SMALL)
    assert batch["volume_mask"].dtype == torch.bool and batch["volume_mask"].float().mean() == 0.5
    real = batch["attention_mask"].bool()
    for name, pad in (("input_ids", tokenizer.pad_token_id), ("masked_ids", tokenizer.pad_token_id),
                      ("sentence_ids", -1), ("mlm_labels", -100)):
        assert batch[name].shape == (3, length) and batch[name].dtype == torch.int64
        assert (batch[name][~real] == pad).all() and not real.all()
    assert (batch["masked_ids"] == batch["input_ids"])[batch["mlm_labels"] == -100].all()
    assert batch["sentence_mask"].sum(1).tolist() == counts and batch["sentence_mask"].shape == (3, 3)
    assert [int(row.max()) + 1 for row in batch["sentence_ids"]] == counts
    assert len(batch["single_ids"]) == sum(counts) and batch["single_ids"].shape == batch["single_mask"].shape
    pneumonia = batch["single_ids"][3][batch["single_mask"][3].bool()]
    assert pneumonia.tolist() == tokenizer("Pneumonia.")["input_ids"]


def test_padding_of_a_batch():
    """Every kind of sequence has its own padding value, and of patches the batch is a row."""
    padding = {"input_ids": 7, "masked_ids": 7, "tokens": 0, "attention_mask": 0, "sentence_ids": -1,
               "mlm_labels": -100}
    examples = []
    for length, patches in ((2, 1), (4, 3)):
        example = {key: torch.full((length,), 5) for key in padding}
        example["sentence_mask"] = torch.ones(length, dtype=torch.bool)
        single_ids = [torch.full((n,), 5) for n in range(1, length)]        # of 1, and of 1, 2, 3 tokens
        example |= {"single_ids": single_ids, "single_mask": [torch.ones_like(ids) for ids in single_ids]}
        example |= {"volume": torch.full((patches, 1, 2, 2, 2), float(patches)),
                    "mask": torch.full((patches, 2, 2, 2), patches), "label": torch.full((1, 3), patches)}
        examples.append(example | {"id": f"of {length}", "skipped": ["x"] * patches})
    batch = data.collate(examples, pad_id=7)
    for key, pad in padding.items():
        assert batch[key].tolist() == [[5, 5, pad, pad], [5] * 4], key
    assert batch["sentence_mask"].tolist() == [[True, True, False, False], [True] * 4]
    assert batch["single_ids"].tolist() == [[5, 7, 7], [5, 7, 7], [5, 5, 7], [5, 5, 5]]
    assert batch["single_mask"].tolist() == [[1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert batch["volume"].shape == (4, 1, 2, 2, 2) and batch["mask"].shape == (4, 2, 2, 2)
    assert batch["volume"].mean((1, 2, 3, 4)).tolist() == [1, 3, 3, 3]
    assert batch["label"].tolist() == [[1] * 3, [3] * 3]
    assert batch["ids"] == ["of 2", "of 4"] and batch["skipped"] == ["x"] * 4 and "id" not in batch


def test_dataset_depends_on_seed_step_and_index_alone(tmp_path, tokenizer):
    dataset = examples(tmp_path, tokenizer)
    assert equal(dataset[0, 3], examples(tmp_path, tokenizer)[0, 3])
    assert not torch.equal(dataset[0, 3]["volume_mask"], dataset[0, 4]["volume_mask"])
    assert not torch.equal(dataset[0, 3]["volume_mask"], dataset[1, 3]["volume_mask"])
    assert not equal(dataset[0, 3], examples(tmp_path, tokenizer, seed=1)[0, 3])


def test_unreadable_volume_is_replaced_and_named(tmp_path, tokenizer, caplog):
    dataset = examples(tmp_path, tokenizer)
    for i in (3, 0):
        (tmp_path / f"scan{i}.nii.gz").write_bytes(b"broken")
    example = dataset[3, 0]
    assert example["id"] == "scan1.nii.gz" and example["skipped"] == ["scan3.nii.gz", "scan0.nii.gz"]
    assert "skipped scan3.nii.gz" in caplog.text and "cannot be read" in caplog.text
    assert data.collate([example, dataset[1, 0]])["skipped"] == ["scan3.nii.gz", "scan0.nii.gz"]
    for i in (1, 2):
        (tmp_path / f"scan{i}.nii.gz").unlink()
    with pytest.raises(ValueError, match="none of 4 volumes readable, expected"):
        dataset[0, 0]


def test_loader_with_workers_gives_what_none_gives(tmp_path):
    dataset = examples(tmp_path, tiny_tokenizer("bert"))
    def first(workers):
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=data.Batches(4, 2), num_workers=workers,
                                             collate_fn=lambda batch: data.collate(batch, 1))
        return list(itertools.islice(loader, 3))
    assert all(equal(a, b) for a, b in zip(first(0), first(2)))


def take(n, *args, **kwargs):
    return list(itertools.islice(data.Batches(*args, **kwargs), n))


def test_batches():
    whole = take(9, 13, 4, seed=3)
    assert [step for batch in whole for _, step in batch] == [s for s in range(9) for _ in range(4)]
    for epoch in range(3):                                      # 3 full batches an epoch, one index left over
        indices = [index for batch in whole[3 * epoch:3 * epoch + 3] for index, _ in batch]
        assert len(set(indices)) == 12 and set(indices) <= set(range(13))
    assert [i for b in whole[:3] for i, _ in b] != [i for b in whole[3:6] for i, _ in b]
    ranks = [take(9, 13, 2, rank=rank, world=2, seed=3) for rank in (0, 1)]
    assert [a + b for a, b in zip(*ranks)] == whole             # two processes see what one sees
    assert take(4, 13, 4, seed=3, start=5) == whole[5:]         # and a resumed run goes on
    assert take(9, 13, 4, seed=4) != whole
    with pytest.raises(ValueError, match="13.*7 x 2 = 14"):
        data.Batches(13, 7, world=2)
    assert take(9, 13, 4, seed=3, patients="abcdefghijklm") == whole    # nothing to keep apart


def test_patients_are_kept_apart():
    """Against the smallest number of volumes that cannot be alone: those of a patient with more than batches,
    less what is dropped"""
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(4, 40))
        size, patients = int(rng.integers(2, min(n, 8) + 1)), rng.integers(0, rng.integers(2, n + 1), n)
        before, kept = rng.permutation(n), n // size * size
        order = data.keep_apart(before, patients, size, rng)
        assert len(set(order)) == len(order) >= kept and set(order) <= set(range(n))
        alone = [sum(len(set(row)) for row in patients[one[:kept]].reshape(-1, size)) for one in (before, order)]
        least = np.maximum(np.bincount(patients) - n // size, 0).sum() - (n - kept)
        assert kept - alone[1] == max(0, least)
        assert alone[0] < kept or np.array_equal(order, before)     # nothing to keep apart


def test_64_processes_see_each_volume_once_and_no_patient_twice_in_a_step():
    patients = [f"P{i // 3}" for i in range(576)]
    settings = {"world": 64, "seed": 1, "patients": patients}
    ranks = [take(18, 576, 1, rank=rank, **settings) for rank in range(64)]         # two epochs of nine steps
    for epoch in (0, 1):
        seen = [index for batches in ranks for batch in batches[9 * epoch:9 * epoch + 9] for index, _ in batch]
        assert sorted(seen) == list(range(576))
    for step in range(18):
        assert len({patients[index] for batches in ranks for index, _ in batches[step]}) == 64
    for rank in (0, 37):
        assert take(5, 576, 1, rank=rank, start=13, **settings) == ranks[rank][13:]


# ----------------------------------------------------------------------------------------- commands

def test_check_command(tmp_path, command):
    path = manifest(tmp_path)
    code, text = command("data.py", "check", "--data", path)
    assert code == 0
    line = next(line for line in text.splitlines() if line.startswith("scan2"))
    for words in ("20x24x28", "3.00 2.00 1.50", "RAS", "as stored", "3 words in 1 sentences"):
        assert words in line
    (tmp_path / "scan1.nii.gz").write_bytes(b"broken")
    code, text = command("data.py", "check", "--data", path)
    assert code == 1 and re.search("scan1.*PROBLEM", text) and re.search("scan3.*as stored", text)
    assert "4 volumes read, 1 of them with a problem" in text
    assert command("data.py", "check", "--data", path, "--limit", 1)[0] == 0
    manifest(tmp_path, report=["Fine.", "Fine.", "", "Fine."])
    code, text = command("data.py", "check", "--data", path, "--limit", 1)
    assert code == 1 and "1 left out" in text
    code, text = command("data.py", "cache", "--data", path, "--out", tmp_path / "made", "--size", 32, 48, 32)
    assert code == 1 and "--size 32 48 32: every side must be a multiple of 32" in text
    assert not (tmp_path / "made").exists()
    path.write_text("volume\n")
    code, text = command("data.py", "check", "--data", path)
    assert code == 1 and f"{path}: " in text and "expected also ['report']" in text


def test_from_the_shell(tmp_path):
    done = python("data.py", "check", "--data", tmp_path / "none.csv")
    assert done.returncode == 1 and "none.csv" in done.stderr and "Traceback" not in done.stderr


def test_help_and_usage(command):
    assert command("data.py", "--help")[0] == 0 and command("data.py")[0] == 2
    for flags, lacking in ((["check"], "--data"), (["cache"], "--data"), (["cache", "--data", "x"], "--out"), (["demo"], "--out")):
        code, text = command("data.py", *flags)
        assert code == 1 and f"found no {lacking}" in text


def test_permuted_reports_are_those_of_others():
    items = [data.Item(f"{p}_{k}", f"{p}.nii.gz", f"report of {p}", "train", p) for p in "abcdefg" for k in range(2)]
    permuted = data.permute_reports(items, 3)
    for item, other in zip(items, permuted, strict=True):
        assert other._replace(report=item.report) == item and other.report != item.report
    assert sorted(item.report for item in permuted) == sorted(item.report for item in items)
    by_patient = {item.patient: item.report for item in permuted}
    assert all(by_patient[item.patient] == item.report for item in permuted)
    assert permuted == data.permute_reports(items, 3) != data.permute_reports(items, 4)
    with pytest.raises(ValueError, match="found 1 patient .*expected two"):
        data.permute_reports(items[:2], 0)
