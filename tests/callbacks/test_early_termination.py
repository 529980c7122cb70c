"""EarlyTermination on real runs that go wrong at a known step."""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from runs import Classifier, data, scalars, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from dynwatch.callbacks import DynWatch, EarlyTermination
from dynwatch.callbacks.optimizer_step import StepGradients
from dynwatch.rules import Divergence, NonFinite, Rule, Verdict, default_rules


class Poor(Classifier):
    """Goes wrong at given training batches (counted over the run); counts its validation batches.

    Args:
        gradient_at: Where the gradient of `net.2.weight` becomes NaN, with a finite loss.
        loss_at: Where the loss becomes NaN.
        rise_at: From where on the loss is larger by 100.
        infinite_lr_at: Where the learning rate is infinite, so that the update spoils the weights.
    """

    def __init__(
        self,
        gradient_at: tuple[int, ...] = (),
        loss_at: tuple[int, ...] = (),
        rise_at: float = math.inf,
        infinite_lr_at: int | None = None,
        plateau: bool = False,
    ) -> None:
        super().__init__()
        self.gradient_at, self.loss_at, self.rise_at, self.infinite_lr_at = (
            gradient_at,
            loss_at,
            rise_at,
            infinite_lr_at,
        )
        self.plateau = plateau
        self.batches = -1
        self.validated = 0
        self.losses: list[float] = []
        self.net[2].weight.register_hook(lambda g: g * math.nan if self.batches in self.gradient_at else g)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.batches += 1
        loss = super().training_step(batch, batch_idx)
        if self.batches >= self.rise_at:
            loss = loss + 100
        if self.batches in self.loss_at:
            loss = loss * math.nan
        if self.batches == self.infinite_lr_at:
            self.optimizers().param_groups[0]["lr"] = math.inf
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validated += 1
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        if not self.plateau:
            return optimizer
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


VALIDATION = {"num_sanity_val_steps": 0}  # one batch of validation an epoch, eight of training
ALL_STEPS = tuple(range(5, 1000))


def fit(folder: Path, model: pl.LightningModule, *callbacks: Any, **settings: Any) -> pl.Trainer:
    """Train for at most three epochs of eight batches, with a validation batch after each."""
    run = trainer(folder, list(callbacks), **({"max_epochs": 3} | VALIDATION | settings))
    run.fit(model, data(), data(8))
    return run


def quick() -> EarlyTermination:
    return EarlyTermination(rules=[NonFinite(), Divergence(patience=3, warm_up=5)])


def records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "run" / "dynwatch.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def same_bits(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(
            a.view(torch.int32) if a.is_floating_point() else a, b.view(torch.int32) if b.is_floating_point() else b
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return bool(a == b)


# --- non-finite


@pytest.mark.parametrize("kind", ["gradient_at", "loss_at"])
@pytest.mark.parametrize(
    ("settings", "bad_batch", "step"),
    [
        ({}, 5, 5),
        ({}, 7, 7),  # the last batch of the epoch
        ({"accumulate_grad_batches": 3}, 4, 1),  # in the middle of the window of batches 3 to 5
        ({"accumulate_grad_batches": 3}, 7, 2),  # in the short last window
        ({"gradient_clip_val": 0.5}, 5, 5),
    ],
    ids=["plain", "last_batch", "mid_window", "short_window", "clipping"],
)
def test_a_non_finite_update_is_thrown_away(
    kind: str, settings: dict[str, Any], bad_batch: int, step: int, tmp_path: Path
) -> None:
    """Weights and optimizer state are, bit for bit, those of a run that ended before the bad step."""
    sound, bad, stop = Poor(), Poor(**{kind: (bad_batch,)}), EarlyTermination()
    bad.load_state_dict(sound.state_dict())
    before = fit(tmp_path / "sound", sound, max_steps=step, **settings)
    after = fit(tmp_path / "bad", bad, stop, **settings)
    assert same_bits(dict(sound.state_dict()), dict(bad.state_dict()))
    assert same_bits(before.optimizers[0].state_dict(), after.optimizers[0].state_dict())
    assert after.global_step == step + 1 and bad.batches < 8
    assert stop.verdict is not None and (stop.verdict.rule, stop.verdict.step) == ("non_finite", step)
    assert not stop.verdict.weights_suspect
    assert "All weights are finite." in stop.verdict.reason


def test_the_verdict_names_the_first_bad_layer(tmp_path: Path) -> None:
    """Only net.2.weight has a bad gradient, so it is named, not the network's first layer."""
    stop = EarlyTermination()
    fit(tmp_path, Poor(gradient_at=(5,)), stop)
    assert "The gradient is not finite at step 5: gradient of net.2.weight first, 1 of 4 tensors" in stop.verdict.reason
    assert "Learning rate when it was stopped: 0.1." in stop.verdict.reason


def test_a_nan_loss_is_named_as_such(tmp_path: Path) -> None:
    """A NaN loss is the reason, and where its gradient is bad is added."""
    stop = EarlyTermination()
    fit(tmp_path, Poor(loss_at=(5,)), stop)
    assert stop.verdict.reason.startswith("The loss is nan at step 5: gradient of net.0.weight first, 4 of 4 tensors")


@pytest.mark.parametrize("on_host", [True, False], ids=["host", "device"])
def test_a_later_look_names_the_right_step_and_layer(
    on_host: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Looked at every 7 steps, the verdict is that of the first bad step, although later ones are worse."""
    monkeypatch.setattr(StepGradients, "free_to_look", property(lambda _: on_host))
    stop = EarlyTermination(check_every_n_steps=7)
    run = fit(tmp_path, Poor(gradient_at=(3,)), stop)
    assert stop.verdict.step == 3
    assert "gradient of net.2.weight first" in stop.verdict.reason
    assert "Weights are not finite: net.0.weight first" in stop.verdict.reason  # the update could not be held back
    assert run.global_step == 7
    (record,) = records(tmp_path)
    assert (record["step"], record["stopped_after_step"], record["update_discarded_at_step"]) == (3, 6, 6)
    assert "thrown away" not in capsys.readouterr().out  # true of step 6, but no comfort


class TwoOptimizers(Classifier):
    """Steps the first layer and then the last, by hand; the first layer's gradient is NaN at batch 2."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.manual_backward(loss)
        if batch_idx == 2:
            self.net[0].bias.grad.fill_(math.nan)
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


def test_a_later_look_names_the_layer_of_the_right_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is looked at, a bad gradient of the first of two optimizers is not blamed on the second."""
    monkeypatch.setattr(StepGradients, "free_to_look", property(lambda _: False))
    stop = EarlyTermination(check_every_n_steps=5)
    trainer(tmp_path, [stop]).fit(TwoOptimizers(), data())
    assert stop.verdict is not None and stop.verdict.step == 2
    assert "gradient of net.0.bias first" in stop.verdict.reason


def test_readings_are_looked_at_when_an_epoch_ends(tmp_path: Path) -> None:
    """With a cadence longer than the epoch the stop comes at its end."""
    stop = EarlyTermination(check_every_n_steps=1000)
    run = fit(tmp_path, Poor(gradient_at=(3,)), stop)
    assert run.global_step == 8 and stop.verdict.step == 3


def test_weights_that_the_last_update_spoilt_are_found(tmp_path: Path) -> None:
    """No later loss tells of the last update, so the weights themselves are looked at when training ends."""
    stop = EarlyTermination()
    fit(tmp_path, Poor(infinite_lr_at=4), stop, max_steps=5)
    assert stop.verdict.reason.startswith("The weights are not finite after step")
    assert "Weights are not finite: net.0.weight first" in stop.verdict.reason
    (record,) = records(tmp_path)
    assert record["rule"] == "non_finite" and record["weights_suspect"]


def test_spoilt_buffers_count_as_spoilt_weights(tmp_path: Path) -> None:
    """A NaN in the input leaves BatchNorm's running mean NaN although the update is thrown away."""

    class Normed(Poor):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x = batch[0] * math.nan if self.trainer.global_step == 5 else batch[0]
            return super().training_step([self.norm(x), batch[1]], batch_idx)

    stop, model = EarlyTermination(), Normed()
    fit(tmp_path, model, stop)
    assert model.norm.running_mean.isnan().all()
    assert stop.verdict.weights_suspect
    assert "not finite: norm.running_mean first" in stop.verdict.reason


class Manual(Poor):
    """Each layer has an optimizer of its own, stepped by hand."""

    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        return loss

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]


def test_manual_optimization(tmp_path: Path) -> None:
    """A bad gradient of the second of two optimizers ends the run, with all weights finite."""
    stop, model = EarlyTermination(), Manual(gradient_at=(5,))
    fit(tmp_path, model, stop)
    assert stop.verdict.step == 5 and model.batches == 5
    assert "gradient of net.2.weight first" in stop.verdict.reason
    assert all(p.isfinite().all() for p in model.parameters())


def test_min_steps_counts_batches_that_stepped_in_manual_optimization(tmp_path: Path) -> None:
    """Before min_steps no update is thrown away, also where each batch has two optimizer steps."""
    stop, model = EarlyTermination(min_steps=8), Manual(gradient_at=(5,))
    fit(tmp_path, model, stop)
    assert stop.verdict.step == 7
    assert model.net[2].weight.isnan().all()  # the update of step 5 was let through


def _fp16(scale: float) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return {"plugins": [MixedPrecision(precision="16-mixed", device="cpu", scaler=scaler)]}


def test_many_overflows_in_a_row_end_a_run(tmp_path: Path) -> None:
    """A gradient that no loss scale makes finite is a failure after scaler_patience skipped steps."""
    stop = EarlyTermination(rules=[NonFinite(scaler_patience=4)])
    run = fit(tmp_path, Poor(gradient_at=ALL_STEPS), stop, **_fp16(256.0))
    assert "The gradient scaler has skipped 4 steps in a row, up to step 8" in stop.verdict.reason
    assert run.global_step == 9


# --- divergence


def test_divergence(tmp_path: Path) -> None:
    """A loss that stays above its band ends the run at the third such step, with the losses as evidence."""
    stop, model = quick(), Poor(rise_at=6)
    run = fit(tmp_path, model, stop)
    assert (stop.verdict.rule, stop.verdict.step, run.global_step) == ("divergence", 8, 9)
    assert stop.verdict.weights_suspect
    steps, losses = zip(*stop.verdict.evidence["stop/loss"], strict=True)
    assert steps == tuple(range(9)) and losses == pytest.approx(model.losses)


def test_a_sound_run_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No verdict, no record, no text, all steps and all validation."""
    stop, model = quick(), Poor()
    run = fit(tmp_path, model, stop)
    assert stop.verdict is None and run.global_step == 24 and model.validated == 3
    assert records(tmp_path) == []
    assert capsys.readouterr().out == ""


class Budget(Rule):
    """Fires at step 4."""

    name = "budget"

    def update(self, step: int, readings: Any, notes: Any) -> Verdict | None:
        return Verdict(self.name, step, "Spent.", "Buy more.", weights_suspect=False) if step >= 4 else None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_a_rule_of_the_users_own(tmp_path: Path) -> None:
    """Any Rule can end a run, and its name is the tag."""
    stop = EarlyTermination(rules=[Budget()])
    run = fit(tmp_path, Poor(), stop)
    assert run.global_step == 5
    assert scalars(tmp_path / "run")["stop/budget"] == [(4, 4.0)]


# --- what is written


def test_the_verdict_is_written_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """One JSON line, TensorBoard text, a scalar at its step, callback_metrics, the log, and one panel."""
    with caplog.at_level(logging.WARNING, "dynwatch"):
        run = fit(tmp_path, Poor(gradient_at=(5,)), EarlyTermination())
    (record,) = records(tmp_path)
    assert {key: record[key] for key in ("action", "rule", "step", "epoch", "update_discarded_at_step")} == {
        "action": "stop",
        "rule": "non_finite",
        "step": 5,
        "epoch": 0,
        "update_discarded_at_step": 5,
    }
    assert record["evidence"]["stop/grad_norm"][-1] == [5, "nan"]
    assert scalars(tmp_path / "run")["stop/non_finite"] == [(5, 5.0)]
    assert run.callback_metrics["stop/non_finite"].item() == 5
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"tensors": 0}).Reload()
    (text,) = events.Tensors("stop/verdict/text_summary")
    written = text.tensor_proto.string_val[0].decode()
    assert text.step == 5
    for part in (
        "**non_finite** at step 5",
        record["reason"],
        record["advice"],
        "The update of step 5 was thrown away",
    ):
        assert part in written
    (message,) = [r.getMessage() for r in caplog.records if r.name == "dynwatch"]
    assert message == f"dynwatch ends this run (non_finite): {record['reason']} {record['advice']}"
    assert capsys.readouterr().out.count("dynwatch ended this run: non_finite") == 1


def test_stop_loss_is_the_mean_over_the_window(tmp_path: Path) -> None:
    """With accumulation stop/loss is the mean of the micro-batch losses, also in a short last window."""
    model = Poor()
    fit(tmp_path, model, quick(), accumulate_grad_batches=3, max_epochs=1)
    windows = [model.losses[i : i + 3] for i in (0, 3, 6)]
    expected = [(step, pytest.approx(sum(w) / len(w), rel=1e-5)) for step, w in enumerate(windows)]
    assert scalars(tmp_path / "run")["stop/loss"] == expected


def test_readings_are_shown_as_often_as_the_trainer_logs(tmp_path: Path) -> None:
    """Rules see every step; TensorBoard gets every fourth, and the step of the verdict."""
    fit(tmp_path, Poor(rise_at=7), quick(), log_every_n_steps=4)
    events = scalars(tmp_path / "run")
    assert [step for step, _ in events["stop/loss"]] == [3, 7, 9]
    assert [step for step, _ in events["stop/loss_limit"]] == [7, 9]  # five losses make its start


def test_every_tag_of_the_docstring_is_in_the_event_file(tmp_path: Path) -> None:
    """Each promised tag is written, and each written one is promised."""
    fit(tmp_path / "a", Poor(gradient_at=(5,)), quick())
    fit(tmp_path / "b", Poor(rise_at=6), quick())
    found = scalars(tmp_path / "a" / "run").keys() | scalars(tmp_path / "b" / "run").keys()
    promised = set(re.findall(r"`(stop/[a-z_]+)`", EarlyTermination.__doc__ or "")) - {"stop/verdict"}
    rules = {f"stop/{rule.name}" for rule in default_rules()}
    assert promised == {"stop/loss", "stop/loss_limit"} | rules
    seen = {"stop/non_finite", "stop/divergence"}  # the others are each seen in test_rules_on_real_runs.py
    assert {tag for tag in found if tag.startswith("stop/")} == promised - rules | seen


# --- delay


def test_min_steps_of_the_callback(tmp_path: Path) -> None:
    """Before its own min_steps there is no verdict and nothing is thrown away; then the first bad step counts."""
    stop, model = EarlyTermination(min_steps=10), Poor(gradient_at=ALL_STEPS)
    run = fit(tmp_path, model, stop)
    assert stop.verdict.step == 9 and run.global_step == 10
    assert model.net[2].weight.isnan().all()


@pytest.mark.parametrize(("settings", "last"), [({"min_steps": 11}, 11), ({"min_epochs": 2}, 16)])
def test_the_trainers_minimum_delays_a_stop(
    settings: dict[str, int], last: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The verdict of step 5 is told once at once, and ends the run as soon as the Trainer allows."""
    stop = EarlyTermination()
    with caplog.at_level(logging.WARNING, "dynwatch"):
        run = fit(tmp_path, Poor(gradient_at=(5,)), stop, **settings)
    assert stop.verdict.step == 5 and run.global_step == last
    told = [r.getMessage() for r in caplog.records if "The run goes on until Trainer(min_steps=" in r.getMessage()]
    assert len(told) == 1
    assert len(records(tmp_path)) == 1


def test_the_same_callback_can_stop_again(tmp_path: Path) -> None:
    """A callback that has ended one run starts the next without a verdict, and can end it too."""
    stop = quick()
    fit(tmp_path / "a", Poor(gradient_at=(5,)), stop)
    assert stop.verdict.step == 5
    assert fit(tmp_path / "b", Poor(), stop).global_step == 24
    assert stop.verdict is None
    fit(tmp_path / "c", Poor(gradient_at=(3,)), stop)
    assert stop.verdict.step == 3
    assert len(records(tmp_path / "c")) == 1


def test_a_new_run_is_not_judged_by_the_history_of_another(tmp_path: Path) -> None:
    """A loss that is usual for a second model does not end it because the first one's was lower."""
    stop = quick()
    fit(tmp_path / "a", Poor(rise_at=6), stop)
    assert stop.verdict.rule == "divergence"
    assert fit(tmp_path / "b", Poor(rise_at=0), stop).global_step == 24  # its loss is above 100 from the start
    assert stop.verdict is None


# --- validation, schedules, checkpoints


@pytest.mark.parametrize(("bad", "passes"), [(5, 0), (7, 0), (8, 1), (11, 1)])
@pytest.mark.parametrize("final", [False, True])
def test_the_final_validation_pass(final: bool, bad: int, passes: int, tmp_path: Path) -> None:
    """It is skipped unless asked for, also after an epoch's last batch, and limit_val_batches is put back."""
    model = Poor(gradient_at=(bad,))
    run = fit(tmp_path, model, EarlyTermination(final_validation=final), limit_val_batches=3)
    assert model.validated == passes + final
    assert run.limit_val_batches == 3
    assert run.should_stop


@pytest.mark.parametrize(("bad", "passes"), [(5, 1), (11, 1)])
def test_a_plateau_schedule_on_a_validation_metric(bad: int, passes: int, tmp_path: Path) -> None:
    """A stop in the first epoch lets validation run, because the schedule needs its metric; later not."""
    model = Poor(gradient_at=(bad,), plateau=True)
    stop = EarlyTermination()
    fit(tmp_path, model, stop)
    assert stop.verdict.step == bad and model.validated == passes


@pytest.mark.parametrize("at_train_epoch_end", [None, True])
def test_early_stopping_on_a_validation_metric(at_train_epoch_end: bool | None, tmp_path: Path) -> None:
    """Lightning's own EarlyStopping next to it does not raise for a missing metric after a stop in epoch 1."""
    stop = EarlyTermination()
    early = EarlyStopping("val_loss", check_on_train_epoch_end=at_train_epoch_end)
    fit(tmp_path, Poor(gradient_at=(5,)), stop, early)
    assert stop.verdict.step == 5


def saved_steps(folder: Path) -> dict[str, int]:
    """The global step in each checkpoint, by file name; all its weights must be finite."""
    found = {}
    for file in folder.glob("*.ckpt"):
        checkpoint = torch.load(file, weights_only=False)
        assert all(t.isfinite().all() for t in checkpoint["state_dict"].values()), file
        found[file.name] = checkpoint["global_step"]
    return found


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"filename": "best", "save_last": True}, {"best.ckpt": 8, "last.ckpt": 8}),
        ({"filename": "best", "save_last": "link"}, {"best.ckpt": 8, "last.ckpt": 8}),
        ({"filename": "best", "monitor": "val_loss", "save_last": True}, {"best.ckpt": 8, "last.ckpt": 8}),
        ({"filename": "best", "every_n_train_steps": 5, "save_last": True}, {"best.ckpt": 5, "last.ckpt": 5}),
    ],
    ids=["epoch", "link", "monitored", "steps"],
)
def test_the_last_good_checkpoint_is_kept(arguments: dict[str, Any], expected: dict[str, int], tmp_path: Path) -> None:
    """Weights that update 8 spoilt, seen by the loss of step 9, replace no checkpoint."""
    folder = tmp_path / "checkpoints"
    keep = ModelCheckpoint(folder, enable_version_counter=False, **arguments)
    stop, model = EarlyTermination(), Poor(infinite_lr_at=8)
    fit(tmp_path, model, stop, keep, enable_checkpointing=True)
    assert stop.verdict.step == 9 and stop.verdict.weights_suspect
    assert not all(p.isfinite().all() for p in model.parameters())
    assert saved_steps(folder) == expected
    (record,) = records(tmp_path)
    assert Path(record["last_checkpoint"]).name in expected


def test_sound_weights_are_saved_at_the_stop(tmp_path: Path) -> None:
    """Where the bad update was thrown away the epoch-end checkpoint is as good as any, and saved."""
    folder = tmp_path / "checkpoints"
    fit(
        tmp_path,
        Poor(gradient_at=(11,)),
        EarlyTermination(),
        ModelCheckpoint(folder, filename="best", enable_version_counter=False),
        enable_checkpointing=True,
    )
    assert saved_steps(folder) == {"best.ckpt": 12}


def test_a_resumed_run_that_fails_at_once_keeps_the_checkpoint_it_came_from(tmp_path: Path) -> None:
    """ModelCheckpoint(save_last=True) writes when training ends if it saved nothing before: not after a stop."""
    folder = tmp_path / "checkpoints"
    fit(tmp_path / "a", Poor(), ModelCheckpoint(folder, save_last=True, save_top_k=0), enable_checkpointing=True)
    assert saved_steps(folder) == {"last.ckpt": 24}
    run = trainer(
        tmp_path / "b",
        [EarlyTermination(), ModelCheckpoint(folder, save_last=True, save_top_k=0)],
        max_epochs=6,
        enable_checkpointing=True,
        **VALIDATION,
    )
    run.fit(Poor(infinite_lr_at=0), data(), data(8), ckpt_path=folder / "last.ckpt", weights_only=False)
    assert run.should_stop and run.global_step == 26
    assert saved_steps(folder) == {"last.ckpt": 24}


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"check_every_n_steps": 0}, "check_every_n_steps=0 must be a whole number of steps, 1 or more"),
        ({"check_every_n_steps": 2.5}, "check_every_n_steps=2.5 must be a whole number of steps, 1 or more"),
        ({"min_steps": -1}, "min_steps=-1 must be a whole number, 0 or more"),
        ({"min_steps": "a"}, "min_steps='a' must be a whole number, 0 or more"),
        ({"rules": ["nonfinite"]}, "rules has 'nonfinite', which must be an instance of Rule, such as NonFinite()"),
        ({"rules": [Budget(), Budget()]}, "rules has two rules of one name: budget, budget. Keep one of each"),
    ],
)
def test_arguments_out_of_bounds(arguments: dict[str, Any], message: str) -> None:
    """Each is refused with its name, its value and the bound."""
    with pytest.raises(ValueError, match=re.escape(message)):
        EarlyTermination(**arguments)


def test_dynwatch_has_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one-liner stops too; its verdict is an attribute and in the summary."""
    watch = DynWatch()
    fit(tmp_path, Poor(gradient_at=(5,)), watch)
    assert watch.verdict.step == 5
    assert "Verdict: stopped by non_finite at step 5." in capsys.readouterr().out
