"""Settings for every test: two threads, no progress bars, no network."""

from __future__ import annotations

import logging
import os

import pytest
import torch

os.environ.setdefault("TORCH_NUM_THREADS", "2")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.fixture(autouse=True)
def _two_threads_and_a_seed() -> None:
    torch.set_num_threads(2)
    torch.manual_seed(0)
