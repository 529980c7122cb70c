"""What a kind of run is, and the register of all kinds."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

# The modules that hold the kinds; importing one registers them.
FAMILIES = (
    "healthy_classifiers",
    "healthy_schedules",
    "healthy_sequences",
    "healthy_others",
    "poor_learning_rates",
    "poor_models",
    "poor_data",
    "poor_numbers",
)

VALIDATIONS = 16  # passes per run, about, so that early stopping has something to look at


@dataclass(frozen=True)
class Run:
    """Everything that a Trainer needs for one run.

    Attributes:
        module: What is trained; it logs `val_loss` in its validation.
        train: Training batches.
        val: Validation batches.
        epochs: Passes over the training batches.
        settings: More arguments of the Trainer.
    """

    module: pl.LightningModule
    train: DataLoader[Any]
    val: DataLoader[Any]
    epochs: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def trainer_settings(self) -> dict[str, Any]:
        """Arguments of the Trainer, with validations spread evenly over the run."""
        per_epoch = math.ceil(VALIDATIONS / self.epochs)
        return {
            "max_epochs": self.epochs,
            "val_check_interval": len(self.train) // per_epoch,
            "check_val_every_n_epoch": max(1, round(self.epochs / VALIDATIONS)),
            **self.settings,
        }


@dataclass(frozen=True)
class Goal:
    """What a run must reach at its end to be called good; NaN never is.

    Example:
        >>> Goal("val_accuracy", at_least=0.9).reached({"val_accuracy": 0.95})
        True
    """

    metric: str
    at_least: float = -math.inf
    at_most: float = math.inf

    def reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether the metrics of the last validation are good enough."""
        return self.at_least <= metrics.get(self.metric, math.nan) <= self.at_most

    def __str__(self) -> str:
        bound = f">= {self.at_least:g}" if self.at_least > -math.inf else f"<= {self.at_most:g}"
        return f"{self.metric} {bound}"


@dataclass(frozen=True)
class Kind:
    """A kind of run that is known to be healthy or poor.

    Attributes:
        name: Unique.
        healthy: Whether it should be let alone.
        build: Makes the run for a seed; the global random generators have been seeded before.
        what: One sentence on what happens.
        goal: What a healthy run of this task reaches: a healthy kind must, a poor one must not.
    """

    name: str
    healthy: bool
    build: Callable[[int], Run]
    what: str
    goal: Goal

    def as_labelled(self, metrics: Mapping[str, float]) -> bool:
        """Whether a run ended as its label says."""
        return self.goal.reached(metrics) == self.healthy


_KINDS: dict[str, Kind] = {}

Build = Callable[[int], Run]


def healthy(what: str, goal: Goal) -> Callable[[Build], Build]:
    """Register a function that builds a healthy run; the kind has its name."""
    return lambda build: _register(True, what, goal, build)


def poor(what: str, goal: Goal) -> Callable[[Build], Build]:
    """Register a function that builds a poor run; `goal` is what it would reach without its fault."""
    return lambda build: _register(False, what, goal, build)


def _register(is_healthy: bool, what: str, goal: Goal, build: Build) -> Build:
    name = build.__name__
    if name in _KINDS:
        raise ValueError(f"There are two kinds of the name {name}.")
    _KINDS[name] = Kind(name, is_healthy, build, what, goal)
    return build


def kinds() -> dict[str, Kind]:
    """All kinds by name, healthy ones first."""
    for family in FAMILIES:
        importlib.import_module(family)
    return dict(_KINDS)
