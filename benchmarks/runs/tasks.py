"""Data of the runs: real where Python or scikit-learn ships it, made by a rule elsewhere."""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from sklearn import datasets
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Split:
    """Training and validation rows."""

    train: Tensors
    val: Tensors

    def loaders(self, batch: int, seed: int, shuffle: bool = True) -> tuple[DataLoader[Any], DataLoader[Any]]:
        generator = torch.Generator().manual_seed(seed)
        return (
            DataLoader(TensorDataset(*self.train), batch, shuffle=shuffle, drop_last=True, generator=generator),
            DataLoader(TensorDataset(*self.val), batch_size=512),
        )

    def change(self, train: Callable[..., Tensors], val: Callable[..., Tensors] | None = None) -> Split:
        """The split with its training rows changed, and its validation rows if `val` is given."""
        return Split(train(*self.train), val(*self.val) if val else self.val)

    def change_both(self, both: Callable[..., Tensors]) -> Split:
        return self.change(both, both)


def split(rows: Tensors, n_train: int, seed: int, n_val: int | None = None) -> Split:
    """Rows in an order drawn by the seed; the first are for training."""
    order = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(seed))
    train, val = order[:n_train], order[n_train : n_train + n_val if n_val else None]
    return Split(tuple(row[train] for row in rows), tuple(row[val] for row in rows))


# --- shipped with scikit-learn


def digits(seed: int, n_train: int = 1400) -> Split:
    """Handwritten digits of 8 x 8 pixels in [0, 1]; always the last 397 for validation."""
    found = datasets.load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    whole = split((images, torch.tensor(found.target)), 1400, seed)
    return whole.change(lambda *rows: tuple(row[:n_train] for row in rows))


def diabetes(seed: int) -> Split:
    """Progress of a disease from 10 measurements; everything has mean 0 and variance 1."""
    x, y = datasets.load_diabetes(return_X_y=True)
    return split((_standard(torch.tensor(x)), _standard(torch.tensor(y)[:, None])), 340, seed)


def cancer(seed: int, standard: bool = True) -> Split:
    """Two kinds of tumours by 30 features; raw features are between 1e-3 and 4e3."""
    x, y = datasets.load_breast_cancer(return_X_y=True)
    raw = torch.tensor(x)
    return split((_standard(raw) if standard else raw.float(), torch.tensor(y)), 440, seed)


def _standard(x: Tensor) -> Tensor:
    return ((x - x.mean(0)) / x.std(0)).float()


# --- text that Python ships


@functools.cache
def _manual() -> Tensor:
    """Python's own manual as ASCII codes."""
    text = "".join(topics[name] for name in sorted(topics))
    return torch.frombuffer(bytearray(text.encode("ascii", "ignore")), dtype=torch.uint8).long()


@functools.cache
def _programs() -> Tensor:
    """Source of Python's library as ASCII codes."""
    library = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((library / f"{name}.py").read_text() for name in ("argparse", "ast", "inspect", "tarfile"))
    return torch.frombuffer(bytearray(text.encode("ascii", "ignore")), dtype=torch.uint8).long()


def text(seed: int, length: int = 32, n_train: int = 8000) -> Split:
    """Windows of Python's manual, each with one symbol more than `length`."""
    return split((_windows(_manual(), length + 1),), n_train, seed, n_val=256)


def which_text(seed: int, length: int = 48) -> Split:
    """Windows of prose (0) and of programs (1)."""
    parts = [_windows(source, length)[:4000] for source in (_manual(), _programs())]
    label = torch.arange(2).repeat_interleave(torch.tensor([len(part) for part in parts]))
    return split((torch.cat(parts), label), 6000, seed, n_val=400)


def _windows(symbols: Tensor, length: int) -> Tensor:
    return symbols[: len(symbols) // length * length].view(-1, length)


# --- made by a rule


def waves(seed: int, n_train: int = 2000, noise: float = 0.1) -> Split:
    """A smooth function of two variables, with noise."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(n_train + 400, 2, generator=draw) * 2 - 1
    y = (3 * x[:, :1]).sin() * (2 * x[:, 1:]).cos() + noise * torch.randn(len(x), 1, generator=draw)
    return split((x, y), n_train, seed)


def linear(seed: int, n_train: int, signal: float, width: int = 20) -> Split:
    """A linear function of which the share `signal` of the variance can be known; all variances are 1."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(n_train + 4000, width, generator=draw)
    direction = torch.randn(width, 1, generator=draw)
    noise = torch.randn(len(x), 1, generator=draw)
    return split((x, signal**0.5 * x @ (direction / direction.norm()) + (1 - signal) ** 0.5 * noise), n_train, seed)


def spirals(seed: int, n_train: int = 2000) -> Split:
    """Two spirals, wound into one another."""
    draw = torch.Generator().manual_seed(seed)
    turn = torch.rand(n_train + 400, generator=draw).sqrt() * 9 + 1
    label = torch.randint(2, (len(turn),), generator=draw)
    angle = turn + torch.pi * label
    x = torch.stack([turn * angle.cos(), turn * angle.sin()], 1) / 5
    return split((x + 0.03 * torch.randn(x.shape, generator=draw), label), n_train, seed)


def parity(seed: int, n_train: int, bits: int = 20, of: int = 3) -> Split:
    """Whether the number of ones among a few of many bits is odd."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(2, (n_train + 500, bits), generator=draw).float() * 2 - 1
    return split((x, (x[:, :of].prod(1) > 0).long()), n_train, seed)


def sums(seed: int, modulus: int, share: float) -> Split:
    """Pairs of numbers and their sum modulo `modulus`; a share of all pairs is for training."""
    pairs = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus))
    return split((pairs, pairs.sum(1) % modulus), int(share * modulus**2), seed)


def repeats(seed: int, n_train: int, length: int = 12, symbols: int = 16) -> Split:
    """Random sequences that are said twice; each has one symbol more than the model sees."""
    draw = torch.Generator().manual_seed(seed)
    half = torch.randint(symbols, (n_train + 256, length), generator=draw)
    return split((torch.cat([half, half], 1),), n_train, seed)


def ring(seed: int, n_train: int) -> Split:
    """Points near a circle, for generative models."""
    draw = torch.Generator().manual_seed(seed)
    angle = torch.rand(n_train + 500, generator=draw) * 2 * torch.pi
    x = torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn(len(angle), 2, generator=draw)
    return split((x,), n_train, seed)
