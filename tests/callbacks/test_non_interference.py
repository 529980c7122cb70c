"""Promise 1: a seeded run with a monitor ends with the same bits as without it.

A new monitor joins with one line in `MONITORS`.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from bits import differences, train_model
from moes import WIDTH, NoisyTopK
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from dynwatch.callbacks import (
    ActivationMonitor,
    DynWatch,
    EarlyTermination,
    GradientNormMonitor,
    HessianMonitor,
    MoEPathwayMonitor,
    SKAMonitor,
    StepRadiusController,
    StepRadiusMonitor,
)
from dynwatch.rules import StopWhen

# Metrics of the user's that rules ask for: by step, by epoch, a metric object, and of validation.
CONDITIONS = {
    "value": "train_loss_step > 0",
    "object": "train_accuracy >= 0",
    "epoch": "train_accuracy_epoch >= 0 and train_loss_epoch > 0",
    "validation": "val_loss > 0 and val_accuracy >= 0",
}

MONITORS: dict[str, Callable[[], pl.Callback]] = {
    "gradients": lambda: GradientNormMonitor(every_n_steps=1, update_ratio_every_n_steps=1),
    "activations": lambda: ActivationMonitor(every_n_steps=1),
    "hessian": lambda: HessianMonitor(every_n_steps=2, full_every_n_readings=2),
    "step_radius": lambda: StepRadiusMonitor(every_n_steps=1, b2=True),
    "controller": lambda: StepRadiusController(r_max=math.inf),
    "moe": lambda: MoEPathwayMonitor(every_n_steps=1, probe_every_n_steps=1, memorized=True),
    "ska": lambda: SKAMonitor(every_n_steps=1, include_last=True),
    "early_termination": EarlyTermination,
    "user_metrics": lambda: EarlyTermination([StopWhen(c, name, action="warn") for name, c in CONDITIONS.items()]),
    "dynwatch": DynWatch,
}


class _Base(pl.LightningModule):
    """Draws from all three random generators and logs in every way that Lightning offers."""

    def __init__(self) -> None:
        super().__init__()
        self.train_accuracy = MulticlassAccuracy(3)
        self.val_accuracy = MulticlassAccuracy(3)

    def _loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        if random.random() < 0.5:
            x = x.flip(-1)
        logits = self(x + 0.01 * float(np.random.standard_normal()) + 0.01 * torch.randn_like(x))
        self.train_accuracy(logits, y)
        loss = nn.functional.cross_entropy(logits, y)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("train_accuracy", self.train_accuracy, on_step=True, on_epoch=True)
        return loss

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        logits = self(x)
        self.val_accuracy(logits, y)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))
        self.log("val_accuracy", self.val_accuracy)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Convolutional(_Base):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3))
        self.head = nn.Linear(4 * 6 * 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Transformer(_Base):
    """Reads the rows of an image as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.TransformerEncoderLayer(8, 2, 16, 0.1, nn.ReLU(), batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x.squeeze(1)).mean(1))


class Mixture(_Base):
    """Reads rows as tokens too; its routers draw noise, and experts have dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, WIDTH)
        self.body = nn.Sequential(*(NoisyTopK() for _ in range(3)), nn.ReLU(), nn.Dropout(0.1), nn.BatchNorm1d(8))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.embed(x.squeeze(1))).mean(1))


class Manual(Convolutional):
    """Two optimizers, the second with the user's own clipping."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        body, head = self.optimizers()
        self.manual_backward(self._loss(batch))
        body.step()
        body.zero_grad()
        self.clip_gradients(head, gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        head.step()
        head.zero_grad()

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.body.parameters()), torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9)


def _fp16() -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)  # large: the first steps overflow
    return {"plugins": [MixedPrecision(precision="16-mixed", device="cpu", scaler=scaler)]}


RUNS: dict[str, tuple[type[pl.LightningModule], Callable[[], dict[str, Any]]]] = {
    "cnn": (Convolutional, dict),
    "transformer": (Transformer, dict),
    "mixture": (Mixture, dict),
    "accumulation": (Convolutional, lambda: {"accumulate_grad_batches": 4}),  # windows of 4 and 2
    "manual": (Manual, dict),
    "bf16": (Transformer, lambda: {"precision": "bf16-mixed"}),
    "fp16": (Transformer, _fp16),
    "clip_norm": (Transformer, lambda: {"gradient_clip_val": 0.1}),
    "clip_value": (Convolutional, lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
}


def train(run: str, folder: Path, *callbacks: pl.Callback) -> tuple[dict[str, bytes], dict[str, Any]]:
    model_class, settings = RUNS[run]
    return train_model(model_class, settings(), folder, *callbacks)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Each run without any monitor, trained once."""
    return functools.cache(lambda run: train(run, tmp_path_factory.mktemp(run)))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("monitor", MONITORS)
def test_a_monitor_changes_no_bit(run: str, monitor: str, bare: Callable[[str], Any], tmp_path: Path) -> None:
    """Weights, buffers, optimizers, random streams, metrics and the user's logs are those of the bare run."""
    watch = MONITORS[monitor]()
    for part in getattr(watch, "monitors", [watch]):
        if isinstance(part, HessianMonitor) and RUNS[run][0] is Manual:
            part.loss = lambda module, batch: module._loss(batch)
        if isinstance(part, (StepRadiusMonitor, StepRadiusController)) and RUNS[run][0] is Manual:
            part._look.logits = lambda module, batch: module(batch[0])
        if isinstance(part, SKAMonitor) and RUNS[run][0] is Manual:
            part.forward = lambda module, batch: module._loss(batch)
    watched = train(run, tmp_path, watch)
    assert differences(bare(run), watched) == []
    for part in getattr(watch, "monitors", [watch]):
        assert part.off is None
    if monitor == "moe" and run != "mixture":
        return  # nothing to watch
    # It did measure: otherwise the comparison would be idle.
    assert watched[1]["events"].keys() - bare(run)[1]["events"].keys()


def _flip_a_bit(model: Convolutional) -> None:
    with torch.no_grad():
        model.head.bias.view(torch.int32)[0] ^= 1


def _nudge_momentum(model: Convolutional) -> None:
    next(iter(model.optimizers().state.values()))["exp_avg"].view(torch.int32).view(-1)[0] ^= 1


class Keeping(Convolutional):
    """Keeps a list, a queue in a buffer and its place in it; may raise at the end of a step that is run again."""

    fails_at = 1000

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []
        self.register_buffer("queue", torch.zeros(5))
        self.place = 0

    def _loss(self, batch: list[Tensor]) -> Tensor:
        loss = super()._loss(batch)
        self.losses.append(loss.detach())
        self.queue[self.place % 5] = loss.detach() + random.random() + np.random.rand()
        self.place += 1
        step = self.trainer.fit_loop.epoch_loop._batches_that_stepped
        again, _last_step[0] = _last_step[0] == step, step
        if again and step >= self.fails_at:
            self.body.eval()
            raise RuntimeError("in the middle of a replay")
        return loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["kept"] = {"losses": self.losses, "place": self.place}


_last_step = [-1]  # out of a replay's reach


class Failing(Keeping):
    fails_at = 6


@pytest.mark.parametrize("fails", [False, True])
def test_a_module_that_keeps_things_is_left_as_it_was(fails: bool, tmp_path: Path) -> None:
    """With replays at every step, also where one of them raises at its end, after which the monitor is off."""
    model_class, runs = Failing if fails else Keeping, []
    monitor = HessianMonitor(every_n_steps=1, full_every_n_readings=2, max_hvps=4)
    for name, callbacks in (("bare", []), ("watched", [monitor])):
        _last_step[0] = -1
        runs.append(train_model(model_class, {}, tmp_path / name, *callbacks))
    assert differences(*runs) == []
    assert any(path.startswith("/checkpoint/kept/losses/11") for path in runs[0][0])
    assert monitor.off == ("RuntimeError: in the middle of a replay" if fails else None)
    assert monitor._readings == (7 if fails else 12)


INTERFERENCES: dict[str, tuple[Callable[[Convolutional], Any], str]] = {
    "weight": (_flip_a_bit, "/checkpoint/state_dict/head.bias"),
    "optimizer": (_nudge_momentum, "/checkpoint/optimizer_states/0/state/0/exp_avg"),
    "buffer": (lambda model: model.body[1].running_mean.add_(1e-6), "/checkpoint/state_dict/body.1.running_mean"),
    "gradient": (lambda model: model.head.bias.grad.mul_(2), "/batches/11/gradients/head.bias"),
    "torch": (lambda model: torch.rand(1), "/rng/torch"),
    "numpy": (lambda model: np.random.rand(), "/rng/numpy/2"),
    "random": (lambda model: random.random(), "/rng/random/1/624"),
    "metric": (lambda model: model.train_accuracy.tp.add_(1), "/batches/11/metrics/train_accuracy/0/tp"),
    "mode": (lambda model: model.body.eval(), "/batches/11/modes/body"),
    "log": (lambda model: model.logger.log_metrics({"train_loss_step": 0.5}, step=99), "/events/0/train_loss_step/6/0"),
}


@pytest.mark.parametrize("kind", INTERFERENCES)
def test_the_comparison_finds_an_interference(kind: str, bare: Callable[[str], Any], tmp_path: Path) -> None:
    """One disturbed bit, draw, state or log entry at the last batch is found where it was made."""
    disturb, path = INTERFERENCES[kind]

    class Interfering(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            if trainer.fit_loop.epoch_loop._batches_that_stepped == 11:
                disturb(pl_module)

    assert path in differences(bare("cnn"), train("cnn", tmp_path, Interfering()))
