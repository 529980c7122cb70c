"""A run with the step radius that is killed, as a program: `python step_radius_resume_run.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytorch_lightning as pl
import runs
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from resume_run import KILLED_AT, Killed, Net, ResumableBatches, healthy
from torch import Tensor

from dynwatch.callbacks import StepRadiusController, StepRadiusMonitor

SAVED_AT, EPOCHS = 10, 3
JUMPS = (6, 10, 15)  # steps at which the learning rate is many times as large


class Jumping(Net):
    def on_train_batch_start(self, batch: list[Tensor], batch_idx: int) -> None:
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = 300.0 if self.trainer.global_step in JUMPS else 0.1


def train(folder: Path, version: str, killed: bool, checkpoint: Path | None = None) -> StepRadiusController:
    """Train with event files in folder/version and checkpoints in folder/version/checkpoints."""
    controller = StepRadiusController(every_n_steps=100, lr_jump=2.0, alert=1.0)
    saves = ModelCheckpoint(
        folder / version / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=SAVED_AT
    )
    end: list[pl.Callback] = [Killed(KILLED_AT)] if killed else []
    trainer = runs.trainer(
        folder,
        [controller, StepRadiusMonitor(every_n_steps=3), saves, *end],
        logger=TensorBoardLogger(folder, name=None, version=version, default_hp_metric=False),
        enable_checkpointing=True,
        max_epochs=EPOCHS,
    )
    trainer.fit(Jumping(healthy), ResumableBatches(list(runs.data(n=64, batch_size=8))), ckpt_path=checkpoint)
    return controller


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), "killed", killed=True)
