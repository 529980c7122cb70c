"""Promise 1: a seeded run with a monitor ends with the same bits as without it.

A new monitor joins with one line in `MONITORS`.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from runs import scalars, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from dynwatch.callbacks import ActivationMonitor, DynWatch, EarlyTermination, GradientNormMonitor
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
    "accumulation": (Convolutional, lambda: {"accumulate_grad_batches": 4}),  # windows of 4 and 2
    "manual": (Manual, dict),
    "bf16": (Transformer, lambda: {"precision": "bf16-mixed"}),
    "fp16": (Transformer, _fp16),
    "clip_norm": (Transformer, lambda: {"gradient_clip_val": 0.1}),
    "clip_value": (Convolutional, lambda: {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}),
}


class Recorder(pl.Callback):
    """Notes after every batch what a monitor could disturb in passing; added after the monitor."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.logged: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        seen = {"rng": _generators(), "metrics": _metric_states(pl_module), "modes": _modes(pl_module)}
        seen["gradients"] = {name: p.grad for name, p in pl_module.named_parameters()}
        self.batches.append(_bits(seen))
        self.logged.append(dict(trainer.logged_metrics))


def _generators() -> dict[str, Any]:
    return {"torch": torch.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate()}


def _metric_states(module: nn.Module) -> dict[str, Any]:
    metrics = [(name, metric) for name, metric in module.named_modules() if isinstance(metric, Metric)]
    return {name: (metric.metric_state, metric._update_count) for name, metric in metrics}


def _modes(module: nn.Module) -> dict[str, Any]:
    modes = {name: child.training for name, child in module.named_modules()}
    return modes | {f"{name} requires_grad": p.requires_grad for name, p in module.named_parameters()}


def train(run: str, folder: Path, *callbacks: pl.Callback) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Train a seeded run; returns the bits of everything it ends with, and the user-visible logs."""
    model_class, settings = RUNS[run]
    pl.seed_everything(3, verbose=False)
    images = torch.randn(48, 1, 8, 8)
    images_and_labels = TensorDataset(images, images[:, 0, 0, :3].argmax(1))
    model, recorder = model_class(), Recorder()
    fit = trainer(folder, [*callbacks, recorder], log_every_n_steps=2, **settings())
    fit.fit(
        model, DataLoader(images_and_labels, batch_size=8, shuffle=True), DataLoader(images_and_labels, batch_size=16)
    )
    checkpoint = fit._checkpoint_connector.dump_checkpoint()
    del checkpoint["callbacks"]  # the monitor's own state
    state = {
        "rng": _generators(),
        "checkpoint": checkpoint,  # weights, buffers, optimizers, schedules, loops, scaler
        "batches": recorder.batches,
    }
    logs = {
        "events": scalars(folder / "run"),
        "callback_metrics": fit.callback_metrics,
        "progress_bar_metrics": fit.progress_bar_metrics,
        "logged_metrics": recorder.logged,
    }
    return _bits(state), logs


def _bits(value: Any, path: str = "") -> dict[str, bytes]:
    """Every leaf of a nested structure as the bytes that it consists of."""
    if isinstance(value, dict):
        return {p: b for key, item in value.items() for p, b in _bits(item, f"{path}/{str(key).lstrip('/')}").items()}
    if isinstance(value, (list, tuple)):
        return {p: b for i, item in enumerate(value) for p, b in _bits(item, f"{path}/{i}").items()}
    if isinstance(value, Tensor):
        kind = f"{value.dtype}{tuple(value.shape)}".encode()
        return {path: kind + value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()}
    if isinstance(value, np.ndarray):
        return {path: f"{value.dtype}{value.shape}".encode() + value.tobytes()}
    return {path: repr(value).encode()}


def differences(
    bare: tuple[dict[str, bytes], dict[str, Any]], watched: tuple[dict[str, bytes], dict[str, Any]]
) -> list[str]:
    """Paths at which two runs differ; in the logs, what the watched run has in addition does not count."""
    found = [path for path in bare[0].keys() | watched[0].keys() if bare[0].get(path) != watched[0].get(path)]
    for kind in bare[1]:
        theirs, ours = bare[1][kind], watched[1][kind]
        if isinstance(theirs, dict):
            theirs, ours = [theirs], [ours]
        for i, (before, after) in enumerate(zip(theirs, ours, strict=True)):
            missing = before.keys() - after.keys()
            kept = {tag: after[tag] for tag in before.keys() - missing}
            bits = _bits({tag: before[tag] for tag in kept}), _bits(kept)
            changed = [path for path in bits[0].keys() | bits[1].keys() if bits[0].get(path) != bits[1].get(path)]
            found += [f"/{kind}/{i}/{tag} missing" for tag in missing] + [f"/{kind}/{i}{path}" for path in changed]
    return sorted(found)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Each run without any monitor, trained once."""
    return functools.cache(lambda run: train(run, tmp_path_factory.mktemp(run)))


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("monitor", MONITORS)
def test_a_monitor_changes_no_bit(run: str, monitor: str, bare: Callable[[str], Any], tmp_path: Path) -> None:
    """Weights, buffers, optimizers, random streams, metrics and the user's logs are those of the bare run."""
    watch = MONITORS[monitor]()
    watched = train(run, tmp_path, watch)
    assert differences(bare(run), watched) == []
    for part in getattr(watch, "monitors", [watch]):
        assert part.off is None
    # It did measure: otherwise the comparison would be idle.
    assert watched[1]["events"].keys() - bare(run)[1]["events"].keys()


def _flip_a_bit(model: Convolutional) -> None:
    with torch.no_grad():
        model.head.bias.view(torch.int32)[0] ^= 1


def _nudge_momentum(model: Convolutional) -> None:
    next(iter(model.optimizers().state.values()))["exp_avg"].view(torch.int32).view(-1)[0] ^= 1


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
