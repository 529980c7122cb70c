"""Probe passes: what the step sees in them, and that nothing is left behind."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from bits import differences, train_model
from runs import Classifier, data, trainer
from torch import Tensor, nn

from dynwatch.callbacks.probe import ProbePass
from dynwatch.callbacks.snapshot import CannotReplayError


class Noisy(Classifier):
    """Has dropout and running statistics, and draws in its step; notes what it saw in a list from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        x += 0.1 * torch.randn_like(x) + random.random() + float(np.random.rand())
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val", self.net(batch[0]).mean())


class Images(Noisy):
    """The same for the images of `bits`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.3), nn.Flatten(), nn.Linear(144, 3)
        )


class Seen:
    """What a pass shows: out of the reach of what puts lists back after it."""

    items: ClassVar[list[Any]] = []


@pytest.fixture(autouse=True)
def _nothing_seen() -> None:
    Seen.items.clear()


class At(pl.Callback):
    """Does something at the end of some batches."""

    def __init__(self, action: Callable[[pl.Trainer, Any, Any], object], at: tuple[int, ...] = (1, 3)) -> None:
        self.action, self.at = action, at

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self.at:
            self.action(trainer, pl_module, batch)


def test_two_passes_differ_by_the_weights_alone(tmp_path: Path) -> None:
    """The step draws the same, dropout is off, and the batch is as it was, whatever was drawn in between."""
    model, seen = Noisy(), []

    def probe(trainer: pl.Trainer, module: Any, batch: Any) -> None:
        before = [t.clone() for t in batch]
        with ProbePass(trainer, module, [batch]) as run:
            first = run.run(batch)
            torch.rand(3)
            assert torch.equal(run.run(batch), first)
            assert not module.training and not module.net[2].training and not first.requires_grad
        assert module.training and module.net[2].training
        assert all(torch.equal(a, b) for a, b in zip(before, batch, strict=True))
        seen.append(first)

    trainer(tmp_path, [At(probe)], max_epochs=1).fit(model, data())
    assert len(seen) == 2 and not torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_a_run_with_probes_has_the_same_bits(training: bool, fails: bool, tmp_path: Path) -> None:
    """In both modes, also where the pass raises in the middle."""

    def probe(trainer: pl.Trainer, module: Any, batch: Any) -> None:
        def forward(module: Any, batch: Any) -> None:
            module.training_step(batch, 0)
            if fails:
                raise RuntimeError("in the middle")

        try:
            with ProbePass(trainer, module, [batch], forward=forward, training=training) as run:
                run.run(batch)
        except RuntimeError as error:
            assert fails and str(error) == "in the middle"

    bare = train_model(Images, {}, tmp_path / "bare")
    assert differences(bare, train_model(Images, {}, tmp_path / "probed", At(probe))) == []


def test_in_training_mode_it_is_what_the_step_will_do(tmp_path: Path) -> None:
    """Dropout and draws are those of the step on the same batch, which comes after it."""
    losses: list[Tensor] = []

    class Before(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            with ProbePass(trainer, pl_module, [batch], training=True) as run:
                losses.append(run.run(batch))

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, i: int) -> None:
            assert torch.equal(outputs["loss"], losses[-1])

    trainer(tmp_path, [Before()], max_epochs=1).fit(Noisy(), data())
    assert len(losses) == 8


def test_a_validation_step_runs_and_logs_nothing(tmp_path: Path) -> None:
    """self.log would raise outside of a validation loop."""

    def probe(trainer: pl.Trainer, module: Any, batch: Any) -> None:
        hook = module.net.register_forward_hook(lambda m, a, output: Seen.items.append(output))
        with ProbePass(trainer, module, [batch], stage="validate") as run:
            run.run(batch)
        hook.remove()

    fit = trainer(tmp_path, [At(probe, (1,))], max_epochs=1)
    fit.fit(Noisy(), data())
    assert len(Seen.items) == 1 and "val" not in fit.callback_metrics


def test_manual_optimization_needs_a_forward(tmp_path: Path) -> None:
    """The error says what to pass, and with it the pass runs."""
    errors = []

    class Manual(Noisy):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

    def probe(trainer: pl.Trainer, module: Any, batch: Any) -> None:
        with pytest.raises(CannotReplayError, match=r"manual optimization.*Pass forward=") as error:
            ProbePass(trainer, module, [batch])
        errors.append(error)
        with ProbePass(trainer, module, [batch], forward=lambda module, batch: module.net(batch[0])) as run:
            Seen.items.append(run.run(batch).shape)

    trainer(tmp_path, [At(probe, (1,))], max_epochs=1).fit(Manual(), data())
    assert len(errors) == 1 and Seen.items == [(8, 4)]


@pytest.mark.parametrize("how", ["module", "part", "function"])
def test_hooks_fire_in_compiled_modules(how: str, tmp_path: Path) -> None:
    """Those that were registered after the first compiled call, too."""
    model = Noisy()
    if how == "part":
        model.net = torch.compile(model.net, backend="eager")
    if how == "function":
        model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]

    def probe(trainer: pl.Trainer, module: Any, batch: Any) -> None:
        hooks = [
            m.register_forward_hook(lambda *_: Seen.items.append(1)) for m in module.modules() if type(m) is nn.ReLU
        ]
        with ProbePass(trainer, module, [batch]) as run:
            run.run(batch)
        hooks[0].remove()

    whole: Any = torch.compile(model, backend="eager") if how == "module" else model
    trainer(tmp_path, [At(probe, (2,))], max_epochs=1).fit(whole, data())
    assert Seen.items == [1]
