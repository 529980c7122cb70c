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

from dynwatch.callbacks import ActivationMonitor, DynWatch, EarlyTermination, GradientNormMonitor
from dynwatch.callbacks.optimizer_step import StepGradients
from dynwatch.rules import Divergence, LossSpike, NoLearning, NonFinite, Plateau, Rule, StopWhen, default_rules

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


def kill(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killed(pl.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.at:
            kill()


class Net(runs.Classifier):
    def __init__(self, trouble: Callable[[int, Tensor], Tensor]) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.trouble = trouble

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self.trouble(self.trainer.global_step, nn.functional.cross_entropy(self.net(x), y))


class Judged(Net):
    """Has ReLU units of which some never fire, a learning rate that drops, and losses and a metric as told."""

    def __init__(self, trouble: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__(trouble)
        self.net[1] = nn.ReLU()
        with torch.no_grad():
            self.net[0].bias.sub_(torch.linspace(0.0, 4.0, 16))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        step = self.trainer.global_step
        self.log("mine", float(step % 30))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", 1.0 + 0.1 * abs(self.current_epoch - 2))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.MultiStepLR(optimizer, [2], gamma=0.4)]


def told(curve: Callable[[int], float]) -> Callable[[int, Tensor], Tensor]:
    """A loss with the value of a curve, a little noise, and the gradient of the real one."""
    return lambda step, loss: loss - loss.detach() + curve(step) + 0.01 * (step * 7 % 5)


def healthy(step: int, loss: Tensor) -> Tensor:
    return loss


def nan_at_9(step: int, loss: Tensor) -> Tensor:
    return loss * torch.nan if step == 9 else loss


def high_from_8(step: int, loss: Tensor) -> Tensor:
    return loss + 100 if step >= 8 else loss


@dataclass(frozen=True)
class Scenario:
    """A run with one checkpoint before it is killed, after `saved_at` steps (mid-epoch) or after the first epoch."""

    check_every_n_steps: int = 1
    mid_epoch: bool = True
    trouble: Callable[[int, Tensor], Tensor] = healthy
    looks: bool = True  # False: as on an accelerator, where a look at each step would cost a wait
    settings: dict[str, Any] = field(default_factory=dict)
    net: type[Net] = Net
    rules: Callable[[], list[Rule]] = lambda: [NonFinite(), Divergence(patience=5, warm_up=5)]
    stop: dict[str, Any] = field(default_factory=dict)
    saved_at: int = 10
    killed_at: int | None = KILLED_AT  # None: in on_stop


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


def judged(rules: Callable[[], list[Rule]], curve: Callable[[int], float], every: int = 1, **stop: Any) -> Scenario:
    """80 steps, with verdicts before the checkpoint of step 44 and after the kill."""
    return Scenario(
        every, trouble=told(curve), settings={"max_epochs": 10}, net=Judged, rules=rules, stop=stop, saved_at=44,
        killed_at=47,
    )  # fmt: skip


def some_conditions() -> list[Rule]:
    return [
        StopWhen("mean(mine, 5) > 12 for 8 steps", name="mean"),
        StopWhen("median(mine, 9) > 16 and mine < max(mine, 9) for 3 readings", name="median"),
        StopWhen("val_loss > 1.1 * min(val_loss, 3) or mine == 1", name="mixed"),
        StopWhen("mine > 8 for 9 readings", name="over_the_kill"),
        StopWhen("mine > 3 for 9 readings after 60 steps", name="last", action="stop"),
    ]


def a_short_patience() -> list[Rule]:
    return [LossSpike(patience=6, window=10)]


NOT_LAST = {"mean": "warn", "median": "warn", "over_the_kill": "warn", "mixed": "shadow"}
JUDGED = {
    "no_learning": judged(lambda: [NoLearning(min_readings=32)], lambda step: 2.3, actions="shadow", cooldown=13),
    "plateau": judged(lambda: [Plateau(min_readings=32)], lambda step: max(1.0, 2.3 - step / 10), 3, cooldown=9),
    "spike_1": judged(a_short_patience, lambda step: 2.2 if step >= 41 else 1.0 / (1 + step), cooldown=9),
    "spike_7": judged(a_short_patience, lambda step: 2.2 if step >= 37 else 1.0 / (1 + step), 7, cooldown=9),
    "conditions_1": judged(some_conditions, lambda step: 1.0, actions=NOT_LAST, cooldown=4),
    "conditions_7": judged(some_conditions, lambda step: 1.0, 7, actions=NOT_LAST, cooldown=4),
    "defaults": judged(default_rules, lambda step: 2.3 / (1 + step), cooldown=17),
}
ENDED = {"in_on_stop": Scenario(trouble=high_from_8, killed_at=None)}


def train(scenario: Scenario, folder: Path, version: str, killed: bool, checkpoint: Path | None = None) -> DynWatch:
    """Run a scenario with its event files in folder/version and checkpoints in folder/version/checkpoints."""
    watch = DynWatch(
        gradients=GradientNormMonitor(every_n_steps=2, update_ratio_every_n_steps=4),
        stop=EarlyTermination(
            scenario.rules(),
            scenario.check_every_n_steps,
            on_stop=kill if killed and scenario.killed_at is None else None,
            **scenario.stop,
        ),
        activations=ActivationMonitor(every_n_steps=2, looks=25),
        report=False,
    )
    when = {"every_n_train_steps": scenario.saved_at} if scenario.mid_epoch else {"every_n_epochs": 1}
    saves = ModelCheckpoint(folder / version / "checkpoints", filename="{step}", save_top_k=-1, **when)
    accumulate = scenario.settings.get("accumulate_grad_batches", 1)
    batches = list(runs.data(n=32 * accumulate, batch_size=4))[: STEPS_AN_EPOCH * accumulate]
    trainer = runs.trainer(
        folder,
        [watch, saves, *([Killed(scenario.killed_at)] if killed and scenario.killed_at is not None else [])],
        logger=TensorBoardLogger(folder, name=None, version=version, default_hp_metric=False),
        log_every_n_steps=2,
        gradient_clip_val=0.5,
        enable_checkpointing=True,
        **{"max_epochs": EPOCHS} | scenario.settings,
    )
    looks = vars(StepGradients)["free_to_look"]
    if not scenario.looks:
        StepGradients.free_to_look = BLOCKED  # type: ignore[method-assign, assignment]
    try:
        model = scenario.net(scenario.trouble)
        validation = ResumableBatches(batches[:1]) if scenario.net is Judged else None
        trainer.fit(model, ResumableBatches(batches), validation, ckpt_path=checkpoint)
    finally:
        StepGradients.free_to_look = looks  # type: ignore[method-assign]
    return watch


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, scenario in (SCENARIOS | JUDGED | ENDED).items():
        child = os.fork()
        if not child:
            train(scenario, Path(sys.argv[1]) / name, "killed", killed=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{name} {os.WTERMSIG(status) if os.WIFSIGNALED(status) else 'ended'}\n")
