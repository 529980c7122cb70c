"""Runs that are killed, as a program: `python resume_run.py FOLDER` runs each scenario up to its SIGKILL.

Every scenario is a process of its own (a fork, which saves the imports) that kills itself as a scheduler would.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import runs
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn

from dynwatch.callbacks import DynWatch, EarlyTermination, GradientNormMonitor
from dynwatch.callbacks.optimizer_step import StepGradients
from dynwatch.rules import Divergence, NonFinite

STEPS_AN_EPOCH, EPOCHS, KILLED_AT = 8, 3, 12
BLOCKED = property(lambda self: False)


class ResumableBatches:
    """The same batches in the same order, which go on where a checkpoint was saved, also within an epoch."""

    def __init__(self, batches: list[list[Tensor]]) -> None:
        self.batches = batches
        self.position = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Tensor]]:
        for i in range(self.position, len(self.batches)):
            self.position = (i + 1) % len(self.batches)
            yield self.batches[i]

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Killed(pl.Callback):
    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == KILLED_AT:
            os.kill(os.getpid(), signal.SIGKILL)


class Net(runs.Classifier):
    def __init__(self, trouble: Callable[[int, Tensor], Tensor]) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.trouble = trouble

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self.trouble(self.trainer.global_step, nn.functional.cross_entropy(self.net(x), y))


def healthy(step: int, loss: Tensor) -> Tensor:
    return loss


def nan_at_9(step: int, loss: Tensor) -> Tensor:
    return loss * torch.nan if step == 9 else loss


def high_from_8(step: int, loss: Tensor) -> Tensor:
    return loss + 100 if step >= 8 else loss


@dataclass(frozen=True)
class Scenario:
    """A run with one checkpoint before `KILLED_AT`, after 10 steps (mid-epoch) or after the first epoch."""

    check_every_n_steps: int = 1
    mid_epoch: bool = True
    trouble: Callable[[int, Tensor], Tensor] = healthy
    looks: bool = True  # False: as on an accelerator, where a look at each step would cost a wait
    settings: dict[str, Any] = field(default_factory=dict)


# With a look at every 7th step, and at an epoch's end, steps 8 and 9 are unread in the checkpoint of step 10.
SCENARIOS = {
    "healthy_1": Scenario(),
    "healthy_7": Scenario(7),
    "healthy_1_epoch": Scenario(mid_epoch=False),
    "healthy_7_epoch": Scenario(7, mid_epoch=False),
    "accumulated_7": Scenario(7, settings={"accumulate_grad_batches": 2}),
    "diverging_1": Scenario(1, trouble=high_from_8),
    "diverging_7": Scenario(7, trouble=high_from_8),
    "diverging_7_epoch": Scenario(7, mid_epoch=False, trouble=high_from_8),
    "nan_7": Scenario(7, trouble=nan_at_9),
    "nan_7_without_looks": Scenario(7, trouble=nan_at_9, looks=False),
    "nan_1_delayed": Scenario(1, trouble=nan_at_9, settings={"min_steps": 20}),
}


def train(scenario: Scenario, folder: Path, version: str, killed: bool, checkpoint: Path | None = None) -> DynWatch:
    """Run a scenario with its event files in folder/version and checkpoints in folder/version/checkpoints."""
    watch = DynWatch(
        gradients=GradientNormMonitor(every_n_steps=2, update_ratio_every_n_steps=4),
        stop=EarlyTermination([NonFinite(), Divergence(patience=5, warm_up=5)], scenario.check_every_n_steps),
        report=False,
    )
    when = {"every_n_train_steps": 10} if scenario.mid_epoch else {"every_n_epochs": 1}
    saves = ModelCheckpoint(folder / version / "checkpoints", filename="{step}", save_top_k=-1, **when)
    accumulate = scenario.settings.get("accumulate_grad_batches", 1)
    batches = list(runs.data(n=32 * accumulate, batch_size=4))[: STEPS_AN_EPOCH * accumulate]
    trainer = runs.trainer(
        folder,
        [watch, saves, *([Killed()] if killed else [])],
        logger=TensorBoardLogger(folder, name=None, version=version, default_hp_metric=False),
        max_epochs=EPOCHS,
        log_every_n_steps=2,
        gradient_clip_val=0.5,
        enable_checkpointing=True,
        **scenario.settings,
    )
    looks = vars(StepGradients)["free_to_look"]
    if not scenario.looks:
        StepGradients.free_to_look = BLOCKED  # type: ignore[method-assign, assignment]
    try:
        trainer.fit(Net(scenario.trouble), ResumableBatches(batches), ckpt_path=checkpoint)
    finally:
        StepGradients.free_to_look = looks  # type: ignore[method-assign]
    return watch


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, scenario in SCENARIOS.items():
        child = os.fork()
        if not child:
            train(scenario, Path(sys.argv[1]) / name, "killed", killed=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{name} {os.WTERMSIG(status) if os.WIFSIGNALED(status) else 'ended'}\n")
