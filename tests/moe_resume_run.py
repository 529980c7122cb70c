"""A run with a mixture of experts that is killed, as a program: `python moe_resume_run.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import runs
import torch
from moe_run import MixtureNet, Sequences
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from resume_run import KILLED_AT, Killed, ResumableBatches
from torch.utils.data import DataLoader

from dynwatch.callbacks import DynWatch, MoEPathwayMonitor

SAVED_AT, EPOCHS = 10, 3


class Whole(MixtureNet):
    train_dataloader = pl.LightningModule.train_dataloader  # type: ignore[assignment]


def train(folder: Path, version: str, killed: bool, checkpoint: Path | None = None) -> None:
    """Train with event files in folder/version and checkpoints in folder/version/checkpoints."""
    saves = ModelCheckpoint(
        folder / version / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=SAVED_AT
    )
    monitor = MoEPathwayMonitor(every_n_steps=3, probe_every_n_steps=4, max_samples=12, memorized=True, dead_window=3)
    end: list[pl.Callback] = [Killed(KILLED_AT)] if killed else []
    trainer = runs.trainer(
        folder,
        [DynWatch(moe=monitor, hessian=False, step_radius=False, stop=False, report=False), saves, *end],
        logger=TensorBoardLogger(folder, name=None, version=version, default_hp_metric=False),
        log_every_n_steps=4,  # so that readings wait in the checkpoint
        enable_checkpointing=True,
        max_epochs=EPOCHS,
    )
    batches: Any = ResumableBatches(list(DataLoader(Sequences(), batch_size=8)))
    trainer.fit(Whole(), batches, ckpt_path=checkpoint)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), "killed", killed=True)
