"""What the tests share: small chests, tables, tiny networks, real scans, ways to run a script."""
import csv
import hashlib
import locale
import os
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import nibabel as nib
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("MG3D_REAL_DATA", ROOT.parent / "shared" / "data"))
real_data = pytest.mark.skipif(not REAL.exists(), reason=f"no real data at {REAL}")
SMALL = (32, 32, 32)                            # voxels (z, y, x) of most tests
AFFINE = np.array([[1.5, 0, 0, -20], [0, 2, 0, 7], [0, 0, 3, 100], [0, 0, 0, 1.]])      # RAS, mm
REPORTS = ("The heart is large. There is effusion on the left.",
           "No nodule was seen. The heart is normal. The aorta is wide.")
CTYPE = locale.setlocale(locale.LC_CTYPE)

sys.path.insert(0, str(ROOT))                   # files of the project are imported below, where needed
os.environ["HF_HUB_OFFLINE"] = "1"              # nothing is downloaded by a test
torch.set_num_threads(1)                        # two threads wait for each other when the machine is busy
os.environ["OMP_NUM_THREADS"] = "1"             # likewise in the scripts that tests start


def pytest_runtest_setup():
    """ITK leaves the C locale behind, in which Python reads text as ASCII: start with the user's."""
    locale.setlocale(locale.LC_CTYPE, CTYPE)


# ----------------------------------------------------------------------------------------- files

def chest(shape=(20, 24, 28), seed=0):
    """A small chest in HU, int16 (z, y, x): air, body, two unequal lungs, a spine at the back (low y)."""
    z, y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    array = np.where((x / 0.9) ** 2 + (y / 0.7) ** 2 < 1, 40., -1000.)
    array[((x - 0.4) / 0.3) ** 2 + ((y + 0.2) / 0.4) ** 2 + (z / 0.9) ** 2 < 1] = -850
    array[((x + 0.4) / 0.27) ** 2 + ((y + 0.2) / 0.37) ** 2 + ((z - 0.1) / 0.8) ** 2 < 1] = -820
    array[(x / 0.15) ** 2 + ((y + 0.5) / 0.15) ** 2 < 1] = 400
    return (array + np.random.default_rng(seed).normal(0, 12, shape)).astype(np.int16)


def save_nifti(path, array, affine=AFFINE):
    """Write an array (z, y, x), or (x, y, z, …) of more than three axes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.T if array.ndim == 3 else array, affine), path)
    return path


def write_csv(path, columns, rows):
    """columns: a list, or a text with commas; rows: lists."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = columns.split(",") if isinstance(columns, str) else columns
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def load(path):
    return torch.load(path, weights_only=True)


def drawn(path):
    """A picture (rows, columns, RGB) that is not blank"""
    picture = matplotlib.image.imread(path)[..., :3]
    assert picture.std() > 0.02, f"{path} is blank"
    return picture


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub("owner/name", {name: file or folder}) lays copies into the hub's cache as its client does.

    In this process and in those that a test starts; without network. Returns the snapshot's folder.
    """
    import huggingface_hub.constants

    import model
    home = tmp_path / "hf"
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(home / "hub"))
    model.local_file.cache_clear()

    def lay(repository, files):
        root = home / "hub" / f"models--{repository.replace('/', '--')}"
        commit = hashlib.sha1(repository.encode()).hexdigest()
        (root / "refs").mkdir(parents=True)
        (root / "refs" / "main").write_text(commit)
        (root / "blobs").mkdir()
        for name, source in files.items():
            for file in [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]:
                content = file.read_bytes()
                blob = root / "blobs" / hashlib.sha256(content).hexdigest()
                blob.write_bytes(content)
                link = root / "snapshots" / commit / name / file.relative_to(source)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(os.path.relpath(blob, link.parent))
        return root / "snapshots" / commit
    return lay


# ---------------------------------------------------------------------------------- tiny networks

@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    """The demo's text encoder with the words of REPORTS"""
    import phantoms
    folder = tmp_path_factory.mktemp("text")
    phantoms.make_demo_text_encoder(folder, REPORTS)
    return folder


@pytest.fixture(scope="session")
def encoder():
    """An untrained swin_t"""
    import model
    torch.manual_seed(0)
    return model.build_encoder("swin_t")


def small_mg3d(text_folder, enabled=None, encoder="swin_t", **settings):
    """An MG3D of width 24 with all losses, or those enabled; a Swin has windows of 3."""
    import model
    torch.manual_seed(0)
    small = {"feature_size": 8} if encoder == "unet" else {"window_size": 3}
    text_encoder = model.TextEncoder(str(text_folder))
    network = model.build_encoder(encoder, **small)
    return model.MG3D(network, text_encoder, enabled or model.LOSSES, embed_dim=24, **settings)


# --------------------------------------------------------------------------------------- scripts

@pytest.fixture
def command(monkeypatch, capsys, caplog):
    """command("data.py", flags …) runs a script in this process, which need not import torch anew.

    Returns the exit code and all that the script says.
    """
    caplog.set_level("INFO")

    def run(script, *flags):
        capsys.readouterr()
        caplog.clear()
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        code = 0
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        error = ""
        if isinstance(code, str):               # as sys.exit prints it
            code, error = 1, code
        return code, "".join(capsys.readouterr()) + caplog.text + error
    return run


def python(*arguments, cwd=ROOT):
    """A Python of its own, as users start one -> CompletedProcess with its output as text"""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *map(str, arguments)], check=False, cwd=cwd, env=environment,
                          capture_output=True, encoding="utf-8", timeout=300)
