"""Replays on real runs of a batch or two, for the tests of what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from runs import trainer
from torch import Tensor
from torch.utils.data import DataLoader

from dynwatch.callbacks.replay import Replay


class AtEnd(pl.Callback):
    """Calls a function with a replay at the end of each batch, or notes what entering it raised."""

    def __init__(self, see: Callable[[Replay, Any], None], **settings: Any) -> None:
        self.see = see
        self.settings = settings
        self.calls = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with Replay(trainer, pl_module, batch, batch_idx, **self.settings) as replay:
            self.see(replay, pl_module)
        self.calls += 1


def run(
    model: Any,
    folder: Path,
    see: Callable[[Replay, Any], None],
    batch: Any = None,
    replay_settings: dict[str, Any] | None = None,
    **settings: Any,
) -> AtEnd:
    """Train on one batch, twice, and call `see(replay, module)` after each."""
    at_end = AtEnd(see, **(replay_settings or {}))
    given = (torch.randn(8, 5), torch.arange(8) % 3) if batch is None else batch
    loader: DataLoader[Any] = DataLoader([given], batch_size=None)
    trainer(folder, [at_end], **({"logger": False} | settings)).fit(model, loader)
    assert at_end.calls == 2
    return at_end


class Model(pl.LightningModule):
    """Any net, with cross entropy or a loss of its own."""

    def __init__(self, net: Any, loss: Callable[[Any, Tensor, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.net = net
        self.own_loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        if self.own_loss is not None:
            return self.own_loss(self, x, y)
        return torch.nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)
