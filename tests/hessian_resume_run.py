"""Runs with readings of curvature that are killed, as a program: `python hessian_resume_run.py FOLDER`."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import runs
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from resume_run import KILLED_AT, Killed, Net, ResumableBatches, healthy
from torch import Tensor, nn

from dynwatch.callbacks import HessianMonitor

EVERY, FULL_EVERY, SAVED_AT, EPOCHS, COSTS = 2, 3, 10, 3, {"reading": 250.0, "full": 900.0}


@dataclass
class Pair:
    """A batch of a kind that a checkpoint should not hold."""

    x: Tensor
    y: Tensor


class OfPairs(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch.x), batch.y)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch


class WithAdam(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Costs(pl.Callback):
    """Gives a budget costs as of a large model, at which no reading fits into so short a run."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        (mine,) = (c for c in trainer.callbacks if isinstance(c, HessianMonitor))  # type: ignore[attr-defined]
        assert mine._budget is not None
        mine._budget.costs.update(COSTS)


SCENARIOS: dict[str, tuple[type[Net], dict[str, Any]]] = {
    "sgd": (Net, {"every_n_steps": EVERY}),
    "adam": (WithAdam, {"every_n_steps": EVERY}),
    "current": (Net, {"every_n_steps": EVERY, "probe_batch": "current"}),
    "pairs": (OfPairs, {"every_n_steps": EVERY}),
    "budget": (Net, {}),
}


def train(name: str, folder: Path, version: str, killed: bool, checkpoint: Path | None = None) -> HessianMonitor:
    """Run a scenario with its event files in folder/version and checkpoints in folder/version/checkpoints."""
    net, arguments = SCENARIOS[name]
    monitor = HessianMonitor(full_every_n_readings=FULL_EVERY, **arguments)
    batches: list[Any] = list(runs.data(n=64, batch_size=8))
    saves = ModelCheckpoint(
        folder / version / "checkpoints", filename="{step}", save_top_k=-1, every_n_train_steps=SAVED_AT
    )
    extra = [Costs()] if name == "budget" and checkpoint is None else []
    trainer = runs.trainer(
        folder,
        [monitor, saves, *extra, *([Killed(KILLED_AT)] if killed else [])],
        logger=TensorBoardLogger(folder, name=None, version=version, default_hp_metric=False),
        enable_checkpointing=True,
        max_epochs=EPOCHS,
    )
    given = [Pair(*batch) for batch in batches] if net is OfPairs else batches
    trainer.fit(net(healthy), ResumableBatches(given), ckpt_path=checkpoint)
    return monitor


if __name__ == "__main__":
    torch.set_num_threads(1)
    for scenario in SCENARIOS:
        child = os.fork()
        if not child:
            train(scenario, Path(sys.argv[1]) / scenario, "killed", killed=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{scenario} {os.WTERMSIG(status) if os.WIFSIGNALED(status) else 'ended'}\n")
