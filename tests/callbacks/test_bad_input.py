"""Promise 2: bad input, odd models, failing parts and interrupted runs: a clear message, and the run goes on."""

from __future__ import annotations

import csv
import gc
import logging
import math
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from runs import Classifier, data, scalars, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynwatch.callbacks import DynWatch, EarlyTermination, GradientNormMonitor
from dynwatch.callbacks import stream as stream_module
from dynwatch.callbacks.base import Monitor
from dynwatch.callbacks.stream import _streams
from dynwatch.rules import Rule

TOTAL = "grad_norm/total"


def every_step(**arguments: Any) -> GradientNormMonitor:
    return GradientNormMonitor(every_n_steps=1, update_ratio_every_n_steps=1, **arguments)


def everything() -> DynWatch:
    return DynWatch(gradients=every_step(), report=False)


@pytest.fixture
def told() -> Iterator[list[str]]:
    """What dynwatch says in the log, as it comes."""
    messages: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Collect(logging.WARNING)
    logging.getLogger("dynwatch").addHandler(handler)
    yield messages
    logging.getLogger("dynwatch").removeHandler(handler)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# --- arguments


NOT_A_CADENCE = [-1, 1.5, True, "10", math.nan]


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *((argument, value) for argument in ("every_n_steps", "update_ratio_every_n_steps") for value in NOT_A_CADENCE),
        *(("batch_size", value) for value in [0, *NOT_A_CADENCE]),
        *(("every_n_steps", value) for value in [0, None]),
    ],
)
def test_a_cadence_that_is_none(argument: str, value: Any) -> None:
    """The error names the argument, its value and what it should be."""
    with pytest.raises(ValueError, match=re.escape(f"{argument}={value!r} must be a whole number")):
        GradientNormMonitor(**{argument: value})


@pytest.mark.parametrize("value", [0, -2.0, math.nan, -math.inf, "nuclear", None])
def test_an_unknown_norm(value: Any) -> None:
    """The error names the value and what is allowed."""
    with pytest.raises(ValueError, match=re.escape(f"norm_type={value!r} must be a number above 0, or inf")):
        GradientNormMonitor(norm_type=value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "net"}, "layers='net' must be a list of regular expressions: layers=['net']"),
        ({"depth": 0}, "depth=0 must be a whole number, 1 or more"),
        ({"depth": 1.5}, "depth=1.5 must be a whole number, 1 or more"),
        ({"max_layers": 0}, "max_layers=0 must be a whole number, 1 or more"),
    ],
)
def test_layer_arguments_out_of_bounds(arguments: dict[str, Any], message: str) -> None:
    """They are refused at construction, not at the first step."""
    with pytest.raises(ValueError, match=re.escape(message)):
        GradientNormMonitor(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradients": "yes"}, "gradients='yes' must be True, False or an instance of GradientNormMonitor"),
        ({"stop": 5}, "stop=5 must be True, False or an instance of EarlyTermination"),
        ({"hessian": 0.5}, "hessian=0.5 must be True, False or an instance of HessianMonitor"),
        ({"max_overhead": 0}, "max_overhead=0 must be"),
        ({"max_overhead": 1.5, "hessian": False}, "max_overhead=1.5 must be"),
        ({"gradients": EarlyTermination()}, "must be True, False or an instance of GradientNormMonitor"),
    ],
)
def test_dynwatch_takes_its_own_kinds_only(arguments: dict[str, Any], message: str) -> None:
    """A part of another kind is refused where it is given, not at the first step."""
    with pytest.raises(ValueError, match=re.escape(message)):
        DynWatch(**arguments)


class Forgetful(Rule):
    """A rule of the user's whose state cannot be saved."""

    name = "forgetful"

    def update(self, step: int, readings: Any, notes: Any) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        raise KeyError("no memory")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise KeyError("no memory")


def test_a_state_that_cannot_be_saved_costs_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A rule whose state_dict raises is told in the log; the checkpoint is written and can be resumed from."""
    watched = DynWatch(stop=EarlyTermination(rules=[Forgetful()]), report=False)
    fit = trainer(tmp_path, [watched], max_epochs=1, enable_checkpointing=True)
    fit.fit(Classifier(), data())
    assert "The state of EarlyTermination in the checkpoint could not be saved: KeyError" in caplog.text
    path = fit.checkpoint_callback.best_model_path
    again = trainer(tmp_path, [DynWatch(report=False)], max_epochs=2)
    again.fit(Classifier(), data(), ckpt_path=path)
    assert again.global_step == 16


def test_a_state_of_another_version_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint whose state lacks what this version needs is resumed from, with a history that starts afresh."""
    fit = trainer(tmp_path, [DynWatch(report=False)], max_epochs=1, enable_checkpointing=True)
    fit.fit(Classifier(), data())
    path = fit.checkpoint_callback.best_model_path
    saved = torch.load(path, weights_only=True)
    (state,) = (state for key, state in saved["callbacks"].items() if "DynWatch" in key)
    del state["EarlyTermination"]["own"]["rulebook"]["rules"]["divergence"]["inside"]
    torch.save(saved, path)
    again = trainer(tmp_path, [DynWatch(report=False)], max_epochs=2)
    again.fit(Classifier(), data(), ckpt_path=path)
    assert again.global_step == 16
    assert "The state of EarlyTermination in the checkpoint does not fit: KeyError: 'inside'" in caplog.text


def test_a_failure_of_our_own_does_not_hide_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If reading values back fails too, as after a device error, it is the user's exception that comes out."""

    class Broken(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.global_step == 3:
                monkeypatch.setattr(stream_module, "_to_host", broken)
                raise RuntimeError("user error")
            return super().training_step(batch, batch_idx)

    def broken(tensors: Any) -> Any:
        raise RuntimeError("device error")

    watched = DynWatch(stop=EarlyTermination(check_every_n_steps=50), report=False)
    with pytest.raises(RuntimeError, match="user error"):
        trainer(tmp_path, [watched]).fit(Broken(), data())


def test_a_flush_that_fails_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readings that cannot be moved to the host switch the monitors off, and the run goes on."""

    def broken(tensors: Any) -> Any:
        raise RuntimeError("device error")

    monkeypatch.setattr(stream_module, "_to_host", broken)
    watched = DynWatch(report=False)
    fit = trainer(tmp_path, [watched])
    fit.fit(Classifier(), data())
    assert fit.global_step == 16
    assert all("device error" in (monitor.off or "") for monitor in watched.monitors)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("attn", "layers='attn' matches none of the 4 parameters. Names look like: net.0.weight, net.0.bias"),
        ("(", "layers='(' is not a regular expression"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: DynWatch(gradients=m)], ids=["alone", "dynwatch"])
def test_an_unknown_layer_pattern(pattern: str, message: str, wrap: Any, tmp_path: Path) -> None:
    """It ends the run before the first step, with the names that there are."""
    model = Classifier()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        trainer(tmp_path, [wrap(every_step(layers=["net", pattern]))]).fit(model, data())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_dynwatch_without_anything() -> None:
    """Leaving out all parts is refused."""
    with pytest.raises(ValueError, match="watches nothing: turn one on or leave it out"):
        off = dict.fromkeys(("gradients", "stop", "activations", "hessian", "step_radius", "moe", "ska"), False)
        DynWatch(**off)


def test_two_monitors_of_one_class(tmp_path: Path) -> None:
    """DynWatch and a monitor next to it would write the same tags: the error says where to put the second."""
    fit = trainer(tmp_path, [DynWatch(report=False), every_step()])
    with pytest.raises(ValueError, match=r"two GradientNormMonitor callbacks.*DynWatch already holds"):
        fit.fit(Classifier(), data())


def test_two_gradient_monitors(tmp_path: Path) -> None:
    """Two of them in one Trainer are refused, by Lightning's check of states or by ours."""
    with pytest.raises((ValueError, RuntimeError), match="GradientNormMonitor"):
        trainer(tmp_path, [every_step(), every_step()]).fit(Classifier(), data())


# --- loggers


@pytest.mark.parametrize("logger", [None, False])
def test_without_a_logger_readings_are_in_callback_metrics(
    logger: Any, tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """logger=False writes nothing; logger=None is Lightning's default logger, TensorBoard."""
    monkeypatch.chdir(tmp_path)
    fit = trainer(tmp_path, [everything()], logger=logger)
    fit.fit(Classifier(), data())
    assert fit.callback_metrics[TOTAL] > 0
    assert told == []
    if logger is False:
        assert files_in(tmp_path) == []
    else:
        assert len(scalars(Path(fit.logger.log_dir))[TOTAL]) == 16


def test_without_a_logger_a_verdict_has_its_json_file(tmp_path: Path, told: list[str]) -> None:
    """The record of a stop goes to the Trainer's own folder when there is no logger."""
    watch = everything()
    trainer(tmp_path, [watch], logger=False).fit(Classifier(bad_at=3), data())
    assert watch.verdict.step == 3
    assert files_in(tmp_path) == ["dynwatch.jsonl"]
    assert len(told) == 1


@pytest.mark.parametrize("bad_at", [None, 0])
def test_fast_dev_run_leaves_no_files(bad_at: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast_dev_run goes through, also with a verdict, and leaves nothing on the disk."""
    monkeypatch.chdir(tmp_path)
    watch = DynWatch(gradients=every_step())
    trainer(tmp_path, [watch], fast_dev_run=2).fit(Classifier(bad_at=bad_at), data())
    assert (watch.verdict is None) == (bad_at is None)
    assert not any(part.off for part in watch.monitors)
    assert files_in(tmp_path) == []


def test_csv_only(tmp_path: Path, told: list[str]) -> None:
    """Without TensorBoard the readings are in the CSV file, at their steps."""
    trainer(tmp_path, [everything()], logger=CSVLogger(tmp_path, name=None, version="csv")).fit(Classifier(), data())
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row[TOTAL]]
    assert [int(row["step"]) for row in rows] == list(range(16))
    assert all(float(row["update_ratio/net.0"]) > 0 for row in rows)
    assert told == []


def test_several_loggers_get_the_same(tmp_path: Path) -> None:
    """Each logger gets every reading, at the same steps."""
    loggers = [TensorBoardLogger(tmp_path, name=None, version=version) for version in ("a", "b")]
    loggers.append(CSVLogger(tmp_path, name=None, version="c"))
    trainer(tmp_path, [everything()], logger=loggers).fit(Classifier(), data())
    first, second = scalars(tmp_path / "a"), scalars(tmp_path / "b")
    assert len(first[TOTAL]) == 16 and first[TOTAL] == second[TOTAL]
    with (tmp_path / "c" / "metrics.csv").open() as file:
        values = [float(row[TOTAL]) for row in csv.DictReader(file) if row[TOTAL]]
    assert values == pytest.approx([value for _, value in first[TOTAL]], rel=1e-6)


class RefusesReadings(CSVLogger):
    """Takes the user's metrics and refuses others."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if TOTAL in metrics:
            raise ConnectionError("the tracking server is away")
        super().log_metrics(metrics, step)


def test_a_logger_that_raises_is_left_alone(tmp_path: Path, told: list[str]) -> None:
    """One warning; the other logger, the user's logs and the run go on."""
    loggers = [
        RefusesReadings(tmp_path, name=None, version="csv"),
        TensorBoardLogger(tmp_path, name=None, version="run"),
    ]
    fit = trainer(tmp_path, [everything()], logger=loggers)
    fit.fit(Classifier(), data())
    assert fit.global_step == 16
    assert told == [
        "dynwatch stops writing to RefusesReadings, which refused its readings at step 0: "
        "ConnectionError: the tracking server is away. The run goes on."
    ]
    assert len(scalars(tmp_path / "run")[TOTAL]) == 16
    with (tmp_path / "csv" / "metrics.csv").open() as file:
        assert sum(bool(row["train_loss"]) for row in csv.DictReader(file)) == 16


class Quiet(Classifier):
    """Logs nothing, so that Lightning itself does not write."""

    def log(self, *_: Any, **__: Any) -> None:
        pass


def test_a_folder_that_cannot_be_written(tmp_path: Path, told: list[str]) -> None:
    """A verdict that has no file is told in the log, with the path; the run ends regularly."""
    (tmp_path / "file").write_text("in the way")
    watch = everything()
    fit = trainer(tmp_path, [watch], logger=False, default_root_dir=tmp_path / "file" / "logs")
    fit.fit(Classifier(bad_at=3), data())
    assert watch.verdict.step == 3 and fit.should_stop
    (message,) = [m for m in told if "could not write" in m]
    assert str(tmp_path / "file" / "logs" / "dynwatch.jsonl") in message
    assert any(m.startswith("dynwatch ends this run (non_finite)") for m in told)


def _no_space(*_: Any, **__: Any) -> None:
    raise OSError(28, "No space left on device")


class FullDisk(TensorBoardLogger):
    """Was opened by Lightning, and can write nothing any more."""

    log_metrics = _no_space

    @property
    def experiment(self) -> Any:
        writer = super().experiment
        writer.add_text = writer.add_custom_scalars = _no_space
        return writer


def test_a_full_disk(tmp_path: Path, told: list[str]) -> None:
    """Panels, readings and the verdict each say once that they are not written; training goes on to the stop."""
    watch = everything()
    fit = trainer(tmp_path, [watch], logger=FullDisk(tmp_path, name=None, version="run"))
    fit.fit(Quiet(bad_at=3), data())
    assert watch.verdict.step == 3 and fit.global_step == 4
    assert not any(part.off for part in watch.monitors)
    for text in ("could not write its TensorBoard panels", "stops writing to FullDisk", "could not write its verdict"):
        (message,) = [m for m in told if text in m]
        assert "No space left on device" in message


# --- models


class NoParameters(pl.LightningModule):
    automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> None:
        return None


class Frozen(Classifier):
    """Has parameters, none of which is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.net.requires_grad_(False)
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.optimizers().step()
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])


@pytest.mark.parametrize("model_class", [NoParameters, Frozen])
def test_a_model_with_nothing_to_train(model_class: type[pl.LightningModule], tmp_path: Path, told: list[str]) -> None:
    """There is no norm to log, and nothing goes wrong."""
    watch = everything()
    trainer(tmp_path, [watch], max_epochs=1).fit(model_class(), data())
    assert not any(part.off for part in watch.monitors)
    assert TOTAL not in scalars(tmp_path / "run")
    expected = "EarlyTermination: training_step returned no loss, so only gradients are watched."
    assert told.pop(0).startswith("HessianMonitor measures nothing in this run: training_step steps the optimizers")
    assert told == ([expected] if model_class is NoParameters else [])


class Skips(Classifier):
    """Returns None on every third batch, which Lightning skips."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return None if batch_idx % 3 == 1 else super().training_step(batch, batch_idx)


def test_a_training_step_that_returns_none(tmp_path: Path) -> None:
    """A skipped batch has no reading; the others have theirs, at their own steps."""
    watch = everything()
    trainer(tmp_path, [watch], max_epochs=1).fit(Skips(), data())
    assert [step for step, _ in scalars(tmp_path / "run")[TOTAL]] == [0, 2, 3, 5, 6]
    assert watch.verdict is None and not any(part.off for part in watch.monitors)


class Detached(Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx).detach()


def test_a_loss_without_gradient(tmp_path: Path, told: list[str]) -> None:
    """PyTorch's own error reaches the user unchanged, and nothing of ours is added."""
    with pytest.raises(RuntimeError, match="does not require grad"):
        trainer(tmp_path, [everything()]).fit(Detached(), data())
    assert told == []


# --- monitors that fail


class Faulty(Monitor):
    """Raises in one of its hooks from step 3 on; counts its calls."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.calls = 0
        self.released = 0

    def _raise(self, hook: str, step: int) -> None:
        if hook == self.where and step >= 3:
            self.calls += 1
            raise ArithmeticError("no such luck")

    def begin(self, trainer: Any, pl_module: Any) -> None:
        self._raise("begin", 3)

    def measure_gradients(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._raise("measure_gradients", trainer.global_step)

    def end_step(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any) -> None:
        self._raise("end_step", trainer.global_step - 1)
        self._stream.emit(self, trainer.global_step - 1, ["faulty"], torch.ones(1))

    def finish(self, step: int, raw: Any) -> Any:
        self._raise("finish", step)
        return raw

    def read(self, step: int, readings: Any, notes: Any) -> Any:
        self._raise("read", step)
        return {}

    def after_flush(self, trainer: Any, pl_module: Any) -> None:
        self._raise("after_flush", trainer.global_step - 1)

    def release(self) -> None:
        self.released += 1
        self._raise("release", 3)


@pytest.mark.parametrize(
    "where", ["begin", "measure_gradients", "end_step", "finish", "read", "after_flush", "release"]
)
@pytest.mark.parametrize("first", [True, False])
def test_a_monitor_that_raises_is_switched_off(where: str, first: bool, tmp_path: Path, told: list[str]) -> None:
    """One warning with name and cause, released, never asked again; the run and the other monitors go on."""
    faulty, others = Faulty(where), everything()
    callbacks = [faulty, others] if first else [others, faulty]
    fit = trainer(tmp_path, callbacks)
    fit.fit(Classifier(), data())
    events = scalars(tmp_path / "run")
    assert fit.global_step == 16
    assert len(events[TOTAL]) == len(events["stop/loss"]) == 16
    assert not any(part.off for part in others.monitors)
    assert faulty.off == "ArithmeticError: no such luck"
    assert faulty.calls == (1 if where != "release" else faulty.released)
    assert faulty.released >= 1
    (message,) = told
    assert message.startswith("Faulty is off for the rest of this run; training goes on. Cause: ArithmeticError: no su")
    if where not in ("begin", "release"):
        assert [step for step, _ in events["faulty"]] == list(range(3 + (where in ("read", "after_flush"))))


def leftovers(model: nn.Module, *optimizers: torch.optim.Optimizer) -> int:
    """Hooks that are still on parameters and optimizers."""
    hooks = [hooks for p in model.parameters() for hooks in (p._backward_hooks, p._post_accumulate_grad_hooks)]
    for optimizer in optimizers:
        hooks += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    modules = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
    return sum(len(h) for h in hooks + modules if h)


def test_a_measurement_that_fails_leaves_no_hook(
    tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """GradientNormMonitor that fails after it has hooked into the coming update takes its hooks away at once."""
    monitor, found = every_step(), []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            found.append((leftovers(pl_module, optimizer), monitor.off is not None))
            monkeypatch.setattr(monitor._noise_pairs, "before_step", _no_space)  # for the next step

    model = Classifier()
    fit = trainer(tmp_path, [monitor, Look()], accumulate_grad_batches=2)
    fit.fit(model, data())
    assert found[:2] == [(1, False), (0, True)]
    assert fit.global_step == 8 and len(told) == 1
    assert leftovers(model, *fit.optimizers) == 0


# --- runs that are interrupted


class Raises(Classifier):
    """Raises in its training step, or between backward and step, at the fifth batch."""

    def __init__(self, error: BaseException, where: str) -> None:
        super().__init__()
        self.error, self.where = error, where

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.where == "training_step" and batch_idx == 5:
            raise self.error
        return super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.where == "on_before_optimizer_step" and self.trainer.global_step == 5:
            raise self.error


@pytest.mark.parametrize("where", ["training_step", "on_before_optimizer_step"])
@pytest.mark.parametrize("error", [RuntimeError("the user's own"), KeyboardInterrupt()], ids=["error", "ctrl_c"])
def test_an_interrupted_run_keeps_its_readings_and_no_hooks(
    error: BaseException, where: str, tmp_path: Path, told: list[str]
) -> None:
    """The user's exception comes through, readings up to it are on the disk, and no hook or stream is left."""
    model = Raises(error, where)
    # Flushed only every 50 steps: the readings were still on the way. The bound makes a hook after the step.
    watch = DynWatch(gradients=every_step(norm_type=1.0), stop=False, report=False)
    fit = trainer(tmp_path, [watch], log_every_n_steps=50, gradient_clip_val=0.1)
    before = signal.getsignal(signal.SIGINT)
    try:
        # Lightning turns Ctrl-C into an exit.
        with pytest.raises(SystemExit if isinstance(error, KeyboardInterrupt) else RuntimeError):
            fit.fit(model, data())
    finally:
        signal.signal(signal.SIGINT, before)
    assert [step for step, _ in scalars(tmp_path / "run")[TOTAL]] == [0, 1, 2, 3, 4]
    assert leftovers(model, *fit.optimizers) == 0
    assert fit not in _streams
    assert told == []


def test_an_interrupted_stop_gives_the_trainer_its_settings_back(tmp_path: Path) -> None:
    """An exception between the verdict and the end of the run leaves limit_val_batches as it was."""

    class RaisesAfter(pl.Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            assert trainer.limit_val_batches == 0  # the stop is under way
            raise RuntimeError("in the last epoch end")

    fit = trainer(tmp_path, [EarlyTermination(), RaisesAfter()], limit_val_batches=5)
    with pytest.raises(RuntimeError, match="in the last epoch end"):
        fit.fit(Classifier(bad_at=3), data())
    assert fit.limit_val_batches == 5


# --- the same callback again


def test_fit_twice_with_one_callback_and_one_trainer(tmp_path: Path, told: list[str]) -> None:
    """The second fit goes on at the next step, with everything still measured."""
    watch, model = everything(), Classifier()
    fit = trainer(tmp_path, [watch], max_epochs=1)
    fit.fit(model, data())
    fit.fit_loop.max_epochs = 2
    fit.fit(model, data())
    events = scalars(tmp_path / "run")
    for tag in (TOTAL, "stop/loss", "update_ratio/net.2"):
        assert [step for step, _ in events[tag]] == list(range(16))
    assert leftovers(model, *fit.optimizers) == 0 and told == []


def test_one_callback_for_two_models(tmp_path: Path, told: list[str]) -> None:
    """A second model of other layers has its own layers, and readings equal to those of a new callback."""

    class Wider(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 4))

    used = everything()
    trainer(tmp_path / "first", [used], accumulate_grad_batches=2, gradient_clip_val=0.1).fit(Classifier(), data())
    found = {}
    for name, watch in (("used", used), ("new", everything())):
        torch.manual_seed(5)
        trainer(tmp_path / name, [watch], accumulate_grad_batches=2, gradient_clip_val=2.0).fit(Wider(), data())
        found[name] = {t: v for t, v in scalars(tmp_path / name / "run").items() if t != "dynwatch/overhead"}
    assert "grad_norm/layer/net.4" in found["new"]
    assert found["used"].keys() == found["new"].keys()
    for tag, readings in found["new"].items():
        steps, values = zip(*readings, strict=True)
        assert tuple(step for step, _ in found["used"][tag]) == steps
        assert [value for _, value in found["used"][tag]] == pytest.approx(values, nan_ok=True), tag
    assert told == []


class AllStages(Classifier):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.net(batch[0])

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.net(batch[0])


def test_other_stages_are_silent(tmp_path: Path, told: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """validate, test and predict write no reading, print nothing of ours and leave no stream."""
    fit = trainer(tmp_path, [DynWatch()])
    model = AllStages()
    fit.validate(model, data(), verbose=False)
    fit.test(model, data(), verbose=False)
    fit.predict(model, data())
    assert not [t for t in scalars(tmp_path / "run") if t.startswith(("grad_norm/", "stop/", "dynwatch/"))]
    assert "dynwatch" not in capsys.readouterr().out
    assert fit not in _streams and told == []


def test_a_finished_run_holds_no_memory(tmp_path: Path) -> None:
    """After fit no copy of weights or gradients is held, although the callback still lives."""
    watch, model = everything(), Classifier()
    model.net = nn.Sequential(nn.Linear(8, 19), nn.Tanh(), nn.Linear(19, 4))  # 19: no other tensor has this shape
    fit = trainer(tmp_path, [watch])
    fit.fit(model, data())
    gc.collect()
    weight = model.net[0].weight
    known = {id(weight), id(weight.grad), id(fit.optimizers[0].state[weight]["momentum_buffer"])}
    held = {id(o) for o in gc.get_objects() if issubclass(type(o), Tensor) and o.shape == weight.shape}
    assert id(weight) in held
    assert held - known == set()


def test_a_dataset_without_batches(tmp_path: Path, told: list[str]) -> None:
    """A loader that yields nothing, which Lightning skips, is no failure."""
    watch = everything()
    trainer(tmp_path, [watch]).fit(Classifier(), DataLoader([]))
    assert not any(part.off for part in watch.monitors)
    assert told == []
