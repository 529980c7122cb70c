"""Rules that read what the user logs: under its name, at its step, and without touching it."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from runs import Classifier, data, scalars, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from dynwatch.callbacks import DynWatch, EarlyTermination, GradientNormMonitor
from dynwatch.rules import Overfitting, Rule, StopWhen, default_rules

Readings = dict[str, list[tuple[int, float]]]

NAMES = (
    "train_loss",
    "both",
    "both_step",
    "both_epoch",
    "epoch_only",
    "accuracy",
    "accuracy_step",
    "accuracy_epoch",
    "val_loss",
    "val_accuracy",
)


class Reader(Rule):
    """Asks for names and keeps what it is given; never objects."""

    name = "reader"

    def __init__(self, *names: str) -> None:
        self.reads = names
        self.seen: Readings = {}

    def update(self, step: int, readings: Any, notes: Any) -> None:
        for name in self.reads:
            if name in readings:
                self.seen.setdefault(name, []).append((step, readings[name]))


class Logs(Classifier):
    """Logs in every way that Lightning has: values and a metric object, by step, by epoch, in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.val_accuracy = MulticlassAccuracy(4), MulticlassAccuracy(4)
        self.computed = 0
        compute = self.accuracy.compute

        def counted() -> Tensor:
            self.computed += 1
            return compute()

        self.accuracy.compute = counted

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("both", loss * 2, on_step=True, on_epoch=True)
        self.log("epoch_only", loss * 3, on_step=False, on_epoch=True)
        self.accuracy(self.net(batch[0]), batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self.net(batch[0])
        self.val_accuracy(logits, batch[1])
        self.log("val_loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log("val_accuracy", self.val_accuracy)


def fit(
    folder: Path, *callbacks: Any, model: pl.LightningModule | None = None, val: Any = None, **settings: Any
) -> tuple[pl.Trainer, Any]:
    """Train for two epochs of eight steps, with two batches of validation after each."""
    torch.manual_seed(4)
    model, run = model or Logs(), trainer(folder, list(callbacks), **settings)
    run.fit(model, data(), data(16) if val is None else val)
    return run, model


def near(readings: list[tuple[int, float]]) -> list[Any]:
    return [(step, pytest.approx(value, rel=1e-6)) for step, value in readings]


# --- what a rule sees


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate_grad_batches": 3}, {"val_check_interval": 3}, {"check_val_every_n_epoch": 2}],
    ids=["plain", "accumulation", "mid_epoch", "every_2_epochs"],
)
@pytest.mark.parametrize("every", [1, 5])
def test_a_rule_sees_what_the_event_file_has(settings: dict[str, Any], every: int, tmp_path: Path) -> None:
    """Under every name that Lightning gives a metric the rule gets the same values at the same steps."""
    reader = Reader(*NAMES)
    fit(tmp_path, EarlyTermination(rules=[reader], check_every_n_steps=every), **settings)
    events = scalars(tmp_path / "run")
    for name in NAMES:
        # A metric of both kinds is logged with endings, and its plain name is the value of the step.
        tag = f"{name}_step" if name in ("both", "accuracy") else name
        assert reader.seen[name] == near(events[tag]), name
    assert len(reader.seen["epoch_only"]) == 2


def test_a_metric_that_is_not_logged_at_every_step(tmp_path: Path) -> None:
    """Lightning repeats its last value in the event file; a rule sees each value once, when it is new."""

    class Seldom(Classifier):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx % 3 == 1:
                self.log("seldom", loss)
            return loss

    reader = Reader("seldom")
    fit(tmp_path, EarlyTermination(rules=[reader]), model=Seldom())
    assert [step for step, _ in reader.seen["seldom"]] == [1, 4, 7, 9, 12, 15]


def test_sanity_check_and_validate_are_no_readings(tmp_path: Path) -> None:
    """What the sanity check logs, and Trainer.validate after fit, reaches no rule."""
    reader = Reader("val_loss")
    watch = DynWatch(stop=EarlyTermination(rules=[reader, *default_rules()]), report=False)
    run, model = fit(tmp_path, watch, num_sanity_val_steps=2)
    assert [step for step, _ in reader.seen["val_loss"]] == [7, 15]
    run.validate(model, data(16), verbose=False)
    assert len(reader.seen["val_loss"]) == 2
    assert not any(monitor.off for monitor in watch.monitors)


def test_dynwatchs_own_readings(tmp_path: Path) -> None:
    """A rule can ask for a tag of another monitor; it gets it once, with the value of the event file."""
    reader = Reader("grad_norm/total", "update_ratio/net.2")
    gradients = GradientNormMonitor(every_n_steps=2, update_ratio_every_n_steps=4)
    fit(tmp_path, DynWatch(gradients, EarlyTermination(rules=[reader]), report=False))
    events = scalars(tmp_path / "run")
    assert [step for step, _ in reader.seen["grad_norm/total"]] == [1, 3, 5, 7, 9, 11, 13, 15]
    assert {name: near(events[name]) for name in reader.reads} == reader.seen


def test_several_validation_loaders(tmp_path: Path) -> None:
    """Each loader's metric has Lightning's name for it; with two losses the overfitting rule has none to judge."""
    names = ("val_loss/dataloader_idx_0", "val_loss/dataloader_idx_1")
    reader = Reader(*names, "stop/val_loss")
    stop = EarlyTermination(rules=[reader, Overfitting()])
    fit(tmp_path, stop, val=[data(16), data(8)])
    events = scalars(tmp_path / "run")
    assert reader.seen == {name: near(events[name]) for name in names}


# --- conditions on them


@pytest.mark.parametrize(
    ("expression", "name", "step"),
    [
        ("train_loss < 99 after 3 steps", "when_train_loss", 3),
        ("both_step > 0 for 4 readings", "when_both_step", 3),
        ("accuracy >= 0 after 2 steps", "when_accuracy", 2),
        ("accuracy_epoch >= 0", "when_accuracy_epoch", 7),
        ("epoch_only > 0", "when_epoch_only", 7),
        ("val_loss > 0 for 2 readings", "when_val_loss", 15),
        ("val_accuracy >= 0 and both_epoch > 0", "when_val_accuracy", 7),
        ('"grad_norm/total" > 0 after 5 steps', "when_grad_norm_total", 5),
    ],
)
def test_a_condition_fires_at_its_step(expression: str, name: str, step: int, tmp_path: Path) -> None:
    """As a warning, so that the run goes on: the record stands at the step of the metric."""
    gradients = GradientNormMonitor(every_n_steps=1)
    stop = EarlyTermination(rules=[StopWhen(expression, action="warn")])
    run, _ = fit(tmp_path, DynWatch(gradients, stop, report=False))
    assert [(verdict.rule, verdict.step) for _, verdict in stop.verdicts] == [(name, step)]
    assert scalars(tmp_path / "run")[f"stop/{name}"] == [(step, step)]
    assert run.global_step == 16


@pytest.mark.parametrize(("expression", "last"), [("val_loss > 0", 8), ("epoch_only > 0", 9), ("both > 0", 1)])
def test_a_condition_ends_the_run(expression: str, last: int, tmp_path: Path) -> None:
    """After validation at once; a training epoch's metric is known when the next epoch begins, so one batch later."""
    stop = EarlyTermination(rules=[StopWhen(expression)])
    run, _ = fit(tmp_path, stop)
    assert stop.verdict is not None and run.global_step == last


def test_a_metric_that_nobody_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning at the end names the rule and the tag that never came; rules that could judge are not named."""
    rules = [StopWhen("val_lost > 2 * train_loss"), StopWhen("both > 99", name="fine")]
    with caplog.at_level(logging.WARNING, "dynwatch"):
        fit(tmp_path, EarlyTermination(rules=rules))
    told = [r.getMessage() for r in caplog.records if r.name == "dynwatch"]
    assert len(told) == 1
    assert told[0].startswith(
        "The rule when_val_lost could not judge this run: nothing was logged or measured as val_lost."
    )


# --- non-interference


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3}, {"val_check_interval": 3}])
def test_the_users_logs_and_metrics_are_as_without_dynwatch(settings: dict[str, Any], tmp_path: Path) -> None:
    """Same tags, steps and values in the event files, same state and same number of computations of metric objects."""
    stop = EarlyTermination(rules=[StopWhen(f"{name} > 99", action="warn") for name in NAMES])
    bare_run, bare = fit(tmp_path / "bare", **settings)
    run, watched = fit(tmp_path / "watched", DynWatch(stop=stop, report=False), **settings)
    before, after = scalars(tmp_path / "bare" / "run"), scalars(tmp_path / "watched" / "run")
    assert {tag: after.get(tag) for tag in before} == before
    added = after.keys() - before.keys()
    for tag in added:
        steps = [step for step, _ in after[tag]]
        assert len(set(steps)) == len(steps), tag
    ours = ("stop/", "grad_norm/", "update_ratio/", "activation/", "ska/", "dynwatch/")
    assert all(tag.startswith(ours) for tag in added)
    for metric in ("accuracy", "val_accuracy"):
        one, other = getattr(bare, metric), getattr(watched, metric)
        assert one._update_count == other._update_count
        assert all(torch.equal(one.metric_state[key], other.metric_state[key]) for key in one.metric_state)
    assert bare.computed == watched.computed > 0
    kept = {tag: value.item() for tag, value in run.callback_metrics.items() if tag in bare_run.callback_metrics}
    assert kept == {tag: value.item() for tag, value in bare_run.callback_metrics.items()}


# --- overfitting


class Overfits(pl.LightningModule):
    """A large network on few points with random labels; its validation metrics have the names given."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names
        self.net = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        for name in self.names:
            self.log(name, loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def random_labels(seed: int) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(32, 8, generator=generator), torch.randint(4, (32,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


@pytest.mark.parametrize(
    ("names", "argument", "fires"),
    [
        (["val_loss"], None, True),
        (["val/loss"], None, True),
        (["val_box_loss", "val_accuracy"], None, True),
        (["val_box_loss", "val_class_loss"], None, False),
        (["val_box_loss", "val_class_loss"], "val_class_loss", True),
        (["validation_error"], None, False),
        (["error"], "error", True),
        (["error"], "eror", False),
    ],
    ids=["usual", "slash", "only_loss", "ambiguous", "named", "no_loss", "named_without_loss", "misspelt"],
)
def test_overfitting_finds_the_validation_loss(
    names: list[str], argument: str | None, fires: bool, tmp_path: Path
) -> None:
    """By its name, or as the only loss of validation, or as told; where that cannot be known the rule is silent."""
    torch.manual_seed(0)
    stop = EarlyTermination(validation_loss=argument)
    run = trainer(tmp_path, [stop], max_epochs=20, log_every_n_steps=4)
    run.fit(Overfits(*names), random_labels(1), random_labels(2))
    found = {verdict.rule: verdict for _, verdict in stop.verdicts}
    assert ("overfitting" in found) == fires
    assert ("stop/overfitting" in scalars(tmp_path / "run")) == fires
    assert run.global_step == 80
    if fires:
        reason, evidence = found["overfitting"].reason, found["overfitting"].evidence
        assert reason.startswith("The validation loss has risen from")
        assert {step for step, _ in evidence["stop/val_loss"]} <= set(range(3, 80, 4))


def test_a_validation_loss_that_nobody_logs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A misspelt name is told at the end of the run."""
    with caplog.at_level(logging.WARNING, "dynwatch"):
        fit(tmp_path, EarlyTermination(validation_loss="val_lost"))
    told = [r.getMessage() for r in caplog.records if r.name == "dynwatch"]
    assert told == ["validation_loss='val_lost': no validation of this run logged such a metric."]


@pytest.mark.parametrize("value", [5, ["val_loss"]])
def test_a_validation_loss_that_is_no_name(value: Any) -> None:
    """It is refused at construction with its value."""
    with pytest.raises(ValueError, match=re.escape(f"validation_loss={value!r} must be the name of a metric")):
        EarlyTermination(validation_loss=value)
