"""A run with SKAMonitor that is killed, as a program: `python ska_resume_run.py FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

import runs
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from resume_run import KILLED_AT, Killed, Net, ResumableBatches, healthy

from dynwatch.callbacks import EarlyTermination, SKAMonitor
from dynwatch.rules import SKAEquilibrium

SAVED_AT, EPOCHS = 10, 5


class Fading(Net):
    """Comes to rest, because its learning rate fades."""

    def configure_optimizers(self) -> object:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(folder: Path, version: str, killed: bool, checkpoint: Path | None = None) -> EarlyTermination:
    """Train with event files in folder/version and checkpoints in folder/version/checkpoints."""
    stop = EarlyTermination([SKAEquilibrium(action="stop", patience=3, min_steps=20)], check_every_n_steps=7)
    saves = ModelCheckpoint(
        folder / version / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=SAVED_AT
    )
    end = [Killed(KILLED_AT)] if killed else []
    trainer = runs.trainer(
        folder,
        # Every third step, and looked at each seventh: the checkpoint lies between a probe and its flush.
        [SKAMonitor(every_n_steps=3, include_last=True, time="steps"), stop, saves, *end],
        logger=TensorBoardLogger(folder, name=None, version=version, default_hp_metric=False),
        log_every_n_steps=7,
        enable_checkpointing=True,
        max_epochs=EPOCHS,
    )
    trainer.fit(Fading(healthy), ResumableBatches(list(runs.data(n=64, batch_size=8))), ckpt_path=checkpoint)
    return stop


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]), "killed", killed=True)
