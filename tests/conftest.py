import locale
import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"              # nothing is downloaded by a test
torch.set_num_threads(1)                        # two threads wait for each other when the machine is busy

CTYPE = locale.setlocale(locale.LC_CTYPE)


def pytest_runtest_setup():
    """ITK leaves the C locale behind, in which Python reads text as ASCII; every test starts with the user's."""
    locale.setlocale(locale.LC_CTYPE, CTYPE)
