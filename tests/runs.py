"""Small real models, data and trainers that the tests of callbacks share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Classifier(pl.LightningModule):
    """A small multilayer perceptron on 8 features and 4 classes."""

    def __init__(self, lr: float = 0.1, bad_at: int | None = None) -> None:
        super().__init__()
        self.lr = lr
        self.bad_at = bad_at  # batch at which the loss becomes NaN
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        if self.bad_at is not None and self.trainer.global_step >= self.bad_at:
            loss = loss * torch.nan
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def data(n: int = 64, batch_size: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    """Separable classes, always in the same order."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :4].argmax(1)), batch_size=batch_size)


def trainer(folder: Path, callbacks: list[Any], **settings: Any) -> pl.Trainer:
    """A quiet CPU trainer that logs to TensorBoard in `folder`; `settings` override everything."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "log_every_n_steps": 1,
        "logger": TensorBoardLogger(folder, name=None, version="run", default_hp_metric=False),
        "default_root_dir": folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "callbacks": callbacks,
    }
    return pl.Trainer(**(defaults | settings))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All scalars of an event-file folder as (step, value) lists, read back by TensorBoard's own reader."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
