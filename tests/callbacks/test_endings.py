"""What a stop tells the outside: a function of the user's, an exit status, a pruned Optuna trial."""

from __future__ import annotations

import builtins
import json
import logging
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import optuna
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from runs import Classifier, data, scalars, trainer

from dynwatch.callbacks import DynWatch, EarlyTermination
from dynwatch.callbacks.stream import _streams
from dynwatch.rules import NonFinite, Rule, Verdict

TESTS = Path(__file__).parents[1]


class Fussy(Rule):
    """Objects to every loss from the third step on."""

    name = "fussy"
    action = "warn"

    def update(self, step: int, readings: Any, notes: Any) -> Verdict | None:
        return self.verdict(step, "Hm.", "Look.") if step >= 2 and "stop/loss" in readings else None


class Hooks(pl.Callback):
    """Notes in which order a fit ends for any other callback."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def on_train_end(self, *_: Any) -> None:
        self.called.append("on_train_end")

    def on_fit_end(self, *_: Any) -> None:
        self.called.append("on_fit_end")

    def teardown(self, *_: Any, **__: Any) -> None:
        self.called.append("teardown")


class Model(Classifier):
    """Notes its own teardown."""

    torn_down = 0

    def teardown(self, stage: str) -> None:
        self.torn_down += 1


def records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "run" / "dynwatch.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def hooks_on(model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> int:
    """Hooks that are on modules, parameters and optimizers."""
    found = [h for m in model.modules() for h in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks)]
    found += [h for p in model.parameters() for h in (p._backward_hooks, p._post_accumulate_grad_hooks)]
    found += [h for o in optimizers for h in (o._optimizer_step_pre_hooks, o._optimizer_step_post_hooks)]
    return sum(len(hooks) for hooks in found if hooks)


# --- on_stop


def test_on_stop_is_called_once_with_the_trainer_and_the_verdict(tmp_path: Path) -> None:
    """The stop is decided and its record is on the disk by then; warnings do not call it."""
    calls: list[Any] = []

    def tell(run: pl.Trainer, verdict: Verdict) -> None:
        calls.append((run, verdict, run.should_stop, [record["action"] for record in records(tmp_path)]))

    stop = EarlyTermination(rules=[Fussy(), NonFinite()], on_stop=tell, cooldown=2)
    run = trainer(tmp_path, [stop])
    run.fit(Classifier(bad_at=5), data())
    assert calls == [(run, stop.verdict, True, ["warn", "warn", "stop"])]
    assert calls[0][1].rule == "non_finite"


@pytest.mark.parametrize("actions", ["warn", "shadow"])
def test_on_stop_is_not_called_without_a_stop(actions: str, tmp_path: Path) -> None:
    """A run with warnings alone, or in shadow mode, calls nothing."""
    calls: list[Any] = []
    stop = EarlyTermination(actions=actions, on_stop=lambda *told: calls.append(told))
    trainer(tmp_path, [stop]).fit(Classifier(bad_at=5), data())
    assert len(stop.verdicts) > 0 and calls == []


def test_on_stop_is_not_called_on_other_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first rank sends an alert."""
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    calls: list[Any] = []
    stop = EarlyTermination(on_stop=lambda *told: calls.append(told))
    trainer(tmp_path, [stop], logger=False).fit(Classifier(bad_at=5), data())
    assert stop.verdict is not None and calls == []


def test_an_on_stop_that_raises_is_told_and_the_run_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its error stands in the log, dynwatch is not switched off, and fit returns as after any stop."""

    def tell(*_: Any) -> None:
        raise ConnectionError("no pager")

    stop = EarlyTermination(on_stop=tell)
    run = trainer(tmp_path, [stop])
    with caplog.at_level(logging.WARNING, "dynwatch"):
        run.fit(Classifier(bad_at=5), data())
    assert run.global_step == 6 and stop.off is None and len(records(tmp_path)) == 1
    told = [r.getMessage() for r in caplog.records if r.name == "dynwatch"]
    assert told[1:] == ["on_stop raised ConnectionError: no pager. The run ends all the same."]


# --- exit_code


@pytest.mark.parametrize("wrap", [lambda stop: stop, lambda stop: DynWatch(stop=stop)], ids=["alone", "dynwatch"])
def test_a_stop_raises_when_all_is_torn_down(wrap: Any, tmp_path: Path) -> None:
    """The status comes out of fit after every other callback's and the module's own end, with all files whole."""
    stop, before, after, model = EarlyTermination(exit_code=75), Hooks(), Hooks(), Model(bad_at=10)
    keep = ModelCheckpoint(tmp_path / "kept", save_last=True, enable_version_counter=False)
    run = trainer(tmp_path, [before, wrap(stop), after, keep], enable_checkpointing=True)
    callbacks = list(run.callbacks)
    with pytest.raises(SystemExit) as raised:
        run.fit(model, data())
    assert raised.value.code == 75
    assert before.called == after.called == ["on_train_end", "on_fit_end", "teardown"]
    assert model.torn_down == 1
    assert (stop.verdict.rule, stop.verdict.step) == ("non_finite", 10)
    assert hooks_on(model, *run.optimizers) == 0 and run not in _streams
    assert run.callbacks == callbacks
    assert scalars(tmp_path / "run")["stop/non_finite"] == [(10, 10.0)]
    assert Path(keep.last_model_path).exists() and Path(keep.best_model_path).exists()
    state = torch.load(keep.last_model_path, weights_only=False)
    assert any("ModelCheckpoint" in name for name in state["callbacks"])
    assert all(weight.isfinite().all() for weight in state["state_dict"].values())


def test_a_run_without_a_stop_returns(tmp_path: Path) -> None:
    """exit_code says nothing about sound runs, nor about warnings."""
    stop = EarlyTermination(rules=[Fussy(), NonFinite()], exit_code=75)
    run = trainer(tmp_path, [stop])
    run.fit(Classifier(), data())
    assert run.global_step == 16 and len(stop.verdicts) == 1


def test_a_callback_that_has_exited_can_be_used_again(tmp_path: Path) -> None:
    """After an exit the same callback and the same trainer fit a sound run to its end, and exit again where due."""
    watch = DynWatch(stop=EarlyTermination(exit_code=3), report=False)
    run = trainer(tmp_path / "a", [watch])
    with pytest.raises(SystemExit):
        run.fit(Classifier(bad_at=5), data())
    run.fit(Classifier(), data())  # its second epoch, after 6 steps of the first
    assert run.global_step == 14 and watch.verdict is None
    again = trainer(tmp_path / "b", [watch])
    with pytest.raises(SystemExit) as raised:
        again.fit(Classifier(bad_at=3), data())
    assert raised.value.code == 3 and watch.verdict.step == 3


def test_a_teardown_that_raises_comes_first(tmp_path: Path) -> None:
    """Where another callback's teardown fails, its error comes out, and the next fit is not ended by the old stop."""

    class Fails(pl.Callback):
        def teardown(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("the user's own")

    watch = EarlyTermination(exit_code=75)
    run = trainer(tmp_path, [watch, Fails()])
    with pytest.raises(RuntimeError, match="the user's own"):
        run.fit(Classifier(bad_at=5), data())
    assert [type(callback) for callback in run.callbacks] == [EarlyTermination, Fails]


SCRIPT = """
    import sys
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    from pathlib import Path
    from runs import Classifier, data, trainer
    from dynwatch.callbacks import DynWatch, EarlyTermination
    folder, bad_at = Path(sys.argv[1]), int(sys.argv[2])
    watch = DynWatch(stop=EarlyTermination(exit_code=75))
    trainer(folder, [watch]).fit(Classifier(bad_at=bad_at), data())
    print("fit has returned")
"""


@pytest.mark.parametrize(("bad_at", "status"), [(5, 75), (1000, 0)])
def test_the_exit_status_of_a_process(bad_at: int, status: int, tmp_path: Path) -> None:
    """A script that is stopped ends with the code and no traceback, a sound one with 0; the event file is whole."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SCRIPT).format(tests=str(TESTS)))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(bad_at)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=200,
    )
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert ("fit has returned" in done.stdout) == (status == 0)
    assert ("dynwatch ended this run: non_finite" in done.stdout) == (status == 75)
    events = scalars(tmp_path / "run")
    assert len(events["stop/loss"]) == (6 if status else 16)
    assert ("stop/non_finite" in events) == bool(status)


@pytest.mark.parametrize("value", [0, 256, -1, True, "75", 1.0])
def test_an_exit_code_out_of_bounds(value: Any) -> None:
    """0 would mean success; the error says the bounds and a usual choice."""
    message = f"exit_code={value!r} must be a whole number from 1 to 255, or None"
    with pytest.raises(ValueError, match=re.escape(message)):
        EarlyTermination(exit_code=value)


@pytest.mark.parametrize("value", ["print", 5])
def test_an_on_stop_that_is_no_function(value: Any) -> None:
    """It is refused at construction, not when the run is ended."""
    with pytest.raises(ValueError, match=re.escape(f"on_stop={value!r} must be a function of the trainer and the ver")):
        EarlyTermination(on_stop=value)


# --- Optuna


@pytest.mark.parametrize("wrap", [lambda stop: stop, lambda stop: DynWatch(stop=stop)], ids=["alone", "dynwatch"])
def test_a_study_has_its_diverging_trials_pruned(wrap: Any, tmp_path: Path) -> None:
    """Trials whose learning rate destroys the weights are PRUNED and say why; the others are COMPLETE."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rates = [0.1, 1e38, 0.01, 3e38]

    def objective(trial: optuna.Trial) -> float:
        lr = rates[trial.suggest_int("rate", 0, 3)]
        watch = wrap(EarlyTermination(trial=trial))
        if isinstance(watch, DynWatch):
            watch.early_termination.prints = watch.report = False
        run = trainer(tmp_path / str(trial.number), [watch])
        run.fit(Classifier(lr=lr), data())
        return float(run.callback_metrics["train_loss"])

    study = optuna.create_study()
    for number in range(4):
        study.enqueue_trial({"rate": number})
    study.optimize(objective, n_trials=4)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED", "COMPLETE", "PRUNED"]
    assert study.best_trial.number in (0, 2)
    for trial in study.trials:
        if trial.state.name == "COMPLETE":
            assert trial.user_attrs == {}
            continue
        (record,) = records(tmp_path / str(trial.number))
        assert trial.user_attrs == {f"dynwatch/{key}": record[key] for key in ("rule", "step", "reason")}
        assert trial.user_attrs["dynwatch/rule"] == "non_finite"


def test_a_pruned_trial_says_why_in_its_error(tmp_path: Path) -> None:
    """The error that fit raises is Optuna's own, with rule, step and reason; an exit code beside it is refused."""
    trial = optuna.create_study().ask()
    with pytest.raises(ValueError, match=r"^exit_code=75 and trial= exclude each other"):
        EarlyTermination(trial=trial, exit_code=75)
    stop, after = EarlyTermination(trial=trial), Hooks()
    with pytest.raises(optuna.TrialPruned, match=r"dynwatch: non_finite at step 5: The loss is nan at step 5"):
        trainer(tmp_path, [stop, after]).fit(Classifier(bad_at=5), data())
    assert after.called[-1] == "teardown"


def test_a_storage_that_fails_does_not_hinder_the_stop(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A trial that takes no attributes is told in the log, and is pruned all the same."""

    class Unreachable(optuna.trial.FixedTrial):
        def set_user_attr(self, key: str, value: Any) -> None:
            raise ConnectionError("the storage is away")

    with pytest.raises(optuna.TrialPruned):
        trainer(tmp_path, [EarlyTermination(trial=Unreachable({}))]).fit(Classifier(bad_at=5), data())
    assert "could not be told why it ends: ConnectionError: the storage is away" in caplog.text


@pytest.mark.parametrize("value", [5, "trial", optuna.create_study])
def test_a_trial_of_another_type(value: Any) -> None:
    """The error says what is meant."""
    with pytest.raises(ValueError, match=re.escape(f"trial={value!r} must be the optuna.Trial that the objective was")):
        EarlyTermination(trial=value)


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Optuna is not installed, a trial is refused with the command that installs it; nothing else needs it."""
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "optuna":
            raise ModuleNotFoundError("No module named 'optuna'", name="optuna")
        return real(name, *rest)

    trial = optuna.create_study().ask()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=re.escape("trial= needs Optuna: pip install 'dynwatch[optuna]'.")):
        EarlyTermination(trial=trial)
    assert EarlyTermination().trial is None
