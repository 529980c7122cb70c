"""Trains several fits in lockstep, one step each in turn, so that they can be compared on a machine that drifts."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from greenlet import getcurrent, greenlet
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader


class Turn(pl.Callback):
    """First of a trainer's callbacks: times a step with all callbacks and logging, then lets the next fit run."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start: float | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        if self._start is not None:
            self.seconds.append(time.perf_counter() - self._start)
        getcurrent().parent.switch()
        self._start = time.perf_counter()


def lockstep(
    variants: Mapping[str, Callable[[], list[pl.Callback]]],
    module: Callable[[], pl.LightningModule],
    loader: Callable[[], DataLoader[Any]],
    rounds: int,
    settings: Mapping[str, dict[str, Any]],
) -> dict[str, list[float]]:
    """Seconds of each step of each variant; the k-th entries of all were measured within one round.

    Args:
        variants: Callbacks by name.
        module: Makes the module; every variant trains one, from the same seed.
        loader: Makes the data, of more than `rounds` batches.
        rounds: Steps of each variant.
        settings: More Trainer arguments by variant.
    """
    turns = {name: Turn() for name in variants}

    def fit(name: str) -> None:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            trainer = pl.Trainer(
                max_steps=rounds + 2,
                accelerator="auto",
                devices=1,
                logger=TensorBoardLogger(folder),
                callbacks=[turns[name], *variants[name]()],
                enable_progress_bar=False,
                enable_model_summary=False,
                enable_checkpointing=False,
                **settings.get(name, {}),
            )
            trainer.fit(module(), loader())

    # Greenlets share one thread, and with it torch's thread pool: what waits costs nothing.
    fits = {name: greenlet(lambda name=name: fit(name)) for name in variants}
    while not all(fit.dead for fit in fits.values()):
        for one in fits.values():
            if not one.dead:
                one.switch()
    return {name: turn.seconds[:rounds] for name, turn in turns.items()}
