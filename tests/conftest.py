"What all tests share. Generated from nbs/22b_made.ipynb: edit that, then run pythia_book build."
import os

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")
settings.register_profile("book", deadline=None)
settings.load_profile("book")


def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU, and torch sees none")


def pytest_pycollect_makeitem(collector, name, obj):
    if name.startswith("test") and getattr(obj, "__module__", collector.module.__name__) != collector.module.__name__:
        return []  # imported, not defined here
