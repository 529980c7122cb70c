"""Runs here are tiny: a second thread only waits, and on a busy machine makes them five times slower."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread(_two_threads_and_a_seed: None) -> None:
    torch.set_num_threads(1)
