"""Runs compared bit for bit, with and without something that watches."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from runs import scalars, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Metric


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


def train_model(
    model_class: Callable[[], pl.LightningModule], settings: dict[str, Any], folder: Path, *callbacks: pl.Callback
) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Train a seeded run on images; returns the bits of everything it ends with, and the user-visible logs."""
    pl.seed_everything(3, verbose=False)
    images = torch.randn(48, 1, 8, 8)
    images_and_labels = TensorDataset(images, images[:, 0, 0, :3].argmax(1))
    model, recorder = model_class(), Recorder()
    fit = trainer(folder, [*callbacks, recorder], log_every_n_steps=2, **settings)
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
