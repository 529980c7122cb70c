"""A Lightning module with a mixture of experts and its data, for tests of the monitor."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from moes import WIDTH, Net
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

CLASSES, LENGTH, SAMPLES = 5, 7, 48


class Texts(Dataset[dict[str, Any]]):
    """Sequences of vectors as long as a batch entry, with padding, labels and a domain."""

    def __init__(self, padded: bool = False, length: int = LENGTH) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(SAMPLES, length, WIDTH, generator=generator)
        lengths = torch.randint(2, length + 1, (SAMPLES,), generator=generator) if padded else [length] * SAMPLES
        self.mask = torch.stack([torch.arange(length) < n for n in lengths]).long()
        self.y = self.x[..., :CLASSES].argmax(-1).masked_fill(self.mask == 0, -100)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = {"x": self.x[i], "labels": self.y[i], "attention_mask": self.mask[i]}
        return item | {"domain": ("fruit", "trees", "roots")[i % 3]}


def texts(batch_size: int = 8, **options: Any) -> DataLoader[dict[str, Any]]:
    return DataLoader(Texts(**options), batch_size=batch_size)


class Model(pl.LightningModule):
    """Of tokens' classes; begins alike each time."""

    def __init__(self, style: str = "linear", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = Net(style, classes=CLASSES, **options)

    def step(self, batch: dict[str, Any]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch["x"]).flatten(0, 1), batch["labels"].flatten())

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return self.step(batch)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val_loss", self.step(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)
