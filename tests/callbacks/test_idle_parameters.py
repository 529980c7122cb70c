"""Trainable parameters that no optimizer moves, on real runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Classifier, data, scalars, trainer
from torch import Tensor, nn

from dynwatch.callbacks import EarlyTermination
from dynwatch.callbacks.idle_parameters import IdleParameters
from dynwatch.rules import DeadLayers, Rule

IDLE = "stop/idle_parameters"
# 8 x 16 + 16 entries in the first layer, 16 x 4 + 4 in the last.
FIRST, LAST = 144, 68
SHARE = FIRST / (FIRST + LAST)


class Reader(Rule):
    """Keeps the shares that it is told, by step."""

    name = "reader"
    reads = (IDLE,)

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def update(self, step: int, readings: Any, notes: Any) -> None:
        if IDLE in readings:
            self.seen.append((step, readings[IDLE]))


class Partly(Classifier):
    """Leaves its first layer out in one of several ways, up to a step."""

    def __init__(self, how: str, until: int = 1000) -> None:
        super().__init__()
        self.how, self.until = how, until
        if how == "frozen":
            self.net[0].requires_grad_(False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        hidden = self.net[1](self.net[0](batch[0]))
        if self.how == "detached" and self.trainer.global_step < self.until:
            hidden = hidden.detach()
        return nn.functional.cross_entropy(self.net[2](hidden), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        parameters = self.net[2].parameters() if self.how == "forgotten" else self.parameters()
        return torch.optim.SGD(parameters, lr=0.1)


def fit(folder: Path, model: Partly, *rules: Rule, **settings: Any) -> EarlyTermination:
    stop = EarlyTermination(rules=list(rules))
    trainer(folder, [stop], **({"log_every_n_steps": 2} | settings)).fit(model, data())
    assert stop.off is None
    return stop


@pytest.mark.parametrize(
    ("model", "shares"),
    [
        (Partly("not at all"), [(1, 0.0)]),
        (Partly("frozen"), [(1, 0.0)]),
        (Partly("forgotten"), [(step, SHARE) for step in range(1, 16, 2)]),
        (Partly("detached"), [(step, SHARE) for step in range(1, 16, 2)]),
        (Partly("detached", until=6), [(1, SHARE), (3, SHARE), (5, SHARE), (7, 0.0)]),
    ],
    ids=["all_move", "frozen", "forgotten", "detached", "later"],
)
def test_the_share_that_is_not_moved(model: Partly, shares: list[tuple[int, float]], tmp_path: Path) -> None:
    """It is told as often as the Trainer logs, for the rules alone, and no more once all have moved."""
    fit(tmp_path, model, reader := Reader())
    assert reader.seen == [(step, pytest.approx(share)) for step, share in shares]
    assert IDLE not in scalars(tmp_path / "run")


@pytest.mark.parametrize(("how", "fires"), [("forgotten", True), ("detached", True), ("frozen", False)])
def test_the_verdict_names_the_layers(how: str, fires: bool, tmp_path: Path) -> None:
    """A layer that the optimizer was not given, or that gets no gradient, is named; a frozen one is meant so."""
    stop = fit(tmp_path, Partly(how), DeadLayers(patience=3))
    assert scalars(tmp_path / "run").get("stop/dead_layers") == ([(5, 5.0)] if fires else None)
    for action, verdict in stop.verdicts:
        assert action == "warn"
        assert verdict.reason.startswith(
            "68% of the trainable parameters have never been moved by an optimizer (net.0) at step 5"
        )


def test_accumulation_is_no_idleness(tmp_path: Path) -> None:
    """Only optimizer steps count, and at the first of them all parameters move."""
    fit(tmp_path, Partly("not at all"), reader := Reader(), accumulate_grad_batches=4, log_every_n_steps=1)
    assert reader.seen == [(0, 0.0)]


def test_the_first_layers_are_named() -> None:
    """Of many layers three are named and the others counted."""
    idle = IdleParameters(nn.Sequential(*(nn.Linear(2, 2) for _ in range(5))))
    assert idle.share == 1.0
    assert idle.where == "0, 1, 2 and 2 more layers"


def test_it_costs_nothing_once_all_have_moved() -> None:
    """The parameters are not even looked through any more."""
    module = nn.Linear(2, 2)
    idle = IdleParameters(module)
    idle.moved([module.weight])
    assert idle.share == pytest.approx(2 / 6)
    idle.moved([module.bias])

    def never() -> Any:
        raise AssertionError("looked through")
        yield

    idle.moved(never())
    assert idle.share == 0.0 and not IdleParameters(nn.ReLU()).share
