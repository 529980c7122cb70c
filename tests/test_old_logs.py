"""Rules on logs of past runs: they fire where they would have fired, whoever wrote the log and however it ended."""

from __future__ import annotations

import io
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from rich.console import Console
from runs import Classifier, data, scalars, trainer
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from dynwatch.callbacks import DynWatch, EarlyTermination
from dynwatch.rules import Divergence, NonFinite, Rule, Verdict
from dynwatch.rules.log_tags import map_tags
from dynwatch.rules.old_logs import Replayed, replay
from dynwatch.rules.replaying import PastRun, replay_readings
from dynwatch.rules.stop_when import StopWhen

Curve = list[tuple[int, float]]
UP = [2.3] * 20 + [500.0] * 40  # Divergence(patience=3) fires at step 22


class Diverging(Classifier):
    """A run whose loss is larger by 500 from a given step on, with a validation loss and a decaying rate."""

    def __init__(self, rise_at: float = math.inf) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.rise_at = rise_at

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        if self.trainer.global_step >= self.rise_at:
            loss = loss + 500
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "epoch"}}


def fit(
    folder: Path, model: Classifier, *callbacks: Any, version: str = "run", resume: Path | None = None, **settings: Any
) -> None:
    """Train for five epochs of eight steps, with a log of its own that has Lightning's `hp_metric`, too."""
    logger = TensorBoardLogger(folder, name=None, version=version)
    run = trainer(
        folder, list(callbacks), **({"max_epochs": 5, "logger": logger, "num_sanity_val_steps": 0} | settings)
    )
    run.fit(model, data(), data(8), ckpt_path=resume)


def write(folder: Path, curves: Mapping[str, list[float] | Curve], start: float = 1000.0, **how: Any) -> Path:
    """An event file with given scalars: values at steps 0, 1, … or (step, value) pairs."""
    with SummaryWriter(str(folder), filename_suffix=f".{start:g}") as writer:
        for tag, values in curves.items():
            pairs = [value if isinstance(value, tuple) else (i, value) for i, value in enumerate(values)]
            for i, (step, value) in enumerate(pairs):
                writer.add_scalar(tag, value, step, walltime=start + i, **how)
    return folder


def rules() -> list[Rule]:
    return [NonFinite(), Divergence(patience=3)]


def steps(replayed: Replayed) -> dict[tuple[str, str], int | None]:
    return {(outcome.run, outcome.rule): outcome.step for outcome in replayed}


def printed(replayed: Replayed, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as drawn:
        console.print(replayed)
    return drawn.get()


class Kept(Rule):
    """Fires never and keeps what it was given."""

    name = "kept"

    def __init__(self, seen: list[tuple[int, dict[str, float]]]) -> None:
        self.seen = seen

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return self

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        self.seen.append((step, dict(readings)))
        return None


# --- readings, without files


def test_each_step_is_one_update_in_order() -> None:
    """Curves and unordered pairs alike become one update a step, with the spent share of the budget."""
    expected = [(0, {"a": 1.0, "stop/progress": 0.25}), (3, {"a": 2.0, "b": 5.0, "stop/progress": 1.0})]
    for readings in (
        {"a": [(3, 2.0), (0, 1.0)], "b": [(3, 5.0)]},
        [(3, {"a": 9.0, "b": 5.0}), (0, {"a": 1.0}), (3, {"a": 2.0})],
    ):
        seen: list[tuple[int, dict[str, float]]] = []
        replay_readings(readings, [Kept(seen)])
        assert seen == expected


def test_progress_alone_is_no_update() -> None:
    """Progress that was logged is handed on beside another reading, and never by itself."""
    seen: list[tuple[int, dict[str, float]]] = []
    logged = {"stop/progress": [(0, 0.1), (1, 0.2)], "a": [(1, 7.0)]}
    replay_readings(logged, [Kept(seen)])
    assert seen == [(1, {"a": 7.0, "stop/progress": 0.2})]
    seen.clear()
    replay_readings(logged, [Kept(seen)], planned_steps=8)
    assert seen == [(1, {"a": 7.0, "stop/progress": 0.25})]


@pytest.mark.parametrize(("planned", "saved"), [(None, 1 - 23 / 60), (100, 0.77), (10, 0.0)])
def test_saved_is_a_share_of_the_budget(planned: int | None, saved: float) -> None:
    """By default of the log's own length; never below zero, also where the run was longer than planned."""
    (outcome,) = replay_readings({"stop/loss": list(enumerate(UP))}, [Divergence(patience=3)], planned)
    assert (outcome.step, outcome.fired) == (22, 38)
    assert outcome.saved == pytest.approx(saved)
    assert outcome.verdict is not None and outcome.verdict.step == 22


def test_the_callers_rules_stay_as_they_are(tmp_path: Path) -> None:
    """Two replays of one rule object over two runs agree, and its state is the one that it had."""
    for run in "ab":
        write(tmp_path / run, {"loss": UP})
    rule = Divergence(patience=3)
    before = repr(rule.state_dict())
    first, second = replay(tmp_path, [rule]), replay(tmp_path, [rule])
    assert repr(rule.state_dict()) == before
    assert steps(first) == {("a", "divergence"): 22, ("b", "divergence"): 22}
    assert first == second and printed(first) == printed(second)


def test_a_rule_without_readings_is_told_from_one_that_never_fires() -> None:
    """Missing tags are listed; a tag that ends in a slash stands for those below it."""

    class Ratios(Kept):
        name = "ratios"
        reads = ("update_ratio/", "stop/progress")

    readings = {"stop/loss": [(0, 2.3)], "update_ratio_of_none": [(0, 1.0)]}
    calm, blind = replay_readings(readings, [Divergence(), Ratios([])])
    assert (calm.missing, calm.nothing_to_read) == ((), False)
    assert (blind.missing, blind.nothing_to_read) == (("update_ratio/",), True)
    (sees,) = replay_readings({"update_ratio/net.0": [(0, 1e-3)]}, [Ratios([])])
    assert (sees.missing, sees.nothing_to_read) == ((), False)


def test_settings_of_one_rule_can_be_compared() -> None:
    """Rules of one name are numbered, in their order."""
    outcomes = replay_readings({"stop/loss": list(enumerate(UP))}, [Divergence(patience=3), Divergence(patience=9)])
    assert [(o.rule, o.step) for o in outcomes] == [("divergence", 22), ("divergence #2", 28)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rules": []}, "rules is empty; pass at least one rule"),
        ({"rules": [Divergence]}, "must be an instance of Rule"),
        ({"rules": [Divergence()], "planned_steps": 0}, "planned_steps=0 must be a whole number"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    """The error says which argument, its value and its bound."""
    with pytest.raises(ValueError, match=message):
        replay_readings({"stop/loss": [(0, 1.0)]}, **arguments)


# --- which tag is which reading


def test_learning_rates_are_found_and_the_future_is_known() -> None:
    """The largest of LearningRateMonitor's rates, without its momentum and weight decay, and the lowest to come."""
    log: dict[str, Curve] = {
        "lr-SGD/pg1": [(0, 0.1), (1, 0.2), (2, 0.05)],
        "lr-SGD/pg2": [(0, 0.3), (1, 0.1)],
        "lr-SGD/pg1-momentum": [(0, 0.9)],
        "lr-SGD/pg1-weight_decay": [(0, 5.0)],
        "lrs": [(0, 7.0)],
    }
    readings, mapped = map_tags(log)
    assert readings["stop/lr"] == [(0, 0.3), (1, 0.2), (2, 0.05)]
    assert readings["stop/lr_low"] == [(0, 0.05), (1, 0.05), (2, 0.05)]
    assert mapped == {"stop/lr": "lr-SGD/pg1, lr-SGD/pg2", "stop/lr_low": "lr-SGD/pg1, lr-SGD/pg2"}


def test_a_logs_own_readings_go_first_and_chosen_tags_before_all() -> None:
    """`stop/loss` of the log is taken, although `loss` names another, unless `chosen` says so; that is told."""
    one, two = [(0, 1.0)], [(0, 2.0)]
    log = {"stop/loss": one, "my_loss": two, "grad_2.0_norm_total": two}
    assert map_tags(log)[1] == {"stop/grad_norm": "grad_2.0_norm_total"}
    readings, mapped = map_tags(log, loss="my_loss")
    assert (readings["stop/loss"], mapped["stop/loss"]) == (one, "stop/loss")
    readings, mapped = map_tags(log, {"stop/loss": "my_loss"})
    assert (readings["stop/loss"], mapped["stop/loss"]) == (two, "my_loss")
    assert "stop/loss" not in map_tags(log, {"stop/loss": "elsewhere"})[0]


# --- logs of real runs


def test_a_run_without_dynwatch_would_have_been_stopped_where_a_live_rule_stops_it(tmp_path: Path) -> None:
    """The same seeded run, once with a plain log and once with EarlyTermination: one rule, one step."""
    live = EarlyTermination(rules=[NonFinite(), Divergence(patience=3)], check_every_n_steps=1)
    fit(tmp_path / "live", Diverging(rise_at=24), live)
    fit(tmp_path / "bare", Diverging(rise_at=24), LearningRateMonitor("step"))
    replayed = replay(tmp_path / "bare", rules())
    assert live.verdict is not None
    assert steps(replayed) == {("run", "non_finite"): None, ("run", "divergence"): live.verdict.step}
    assert live.verdict.step == 26
    assert replayed[1].saved == pytest.approx(1 - 27 / 40)
    assert replayed.runs["run"].mapped == {
        "stop/loss": "train_loss",
        "stop/val_loss": "val_loss",
        "stop/lr": "lr-SGD",
        "stop/lr_low": "lr-SGD",
    }
    assert replayed.runs["run"].loss_every == 1


def test_a_run_with_dynwatch_is_replayed_from_its_own_readings(tmp_path: Path) -> None:
    """Its `stop/loss` is used, the mark that its stop left behind harms nothing, and the same step comes out."""
    watch = DynWatch(stop=EarlyTermination(rules=rules()), report=False)
    fit(tmp_path, Diverging(rise_at=24), watch)
    assert scalars(tmp_path / "run")["stop/divergence"] == [(26, 26.0)]
    replayed = replay(tmp_path, rules(), planned_steps=40)
    assert steps(replayed)["run", "divergence"] == 26
    assert replayed[1].saved == pytest.approx(1 - 27 / 40)
    assert "stop/loss" not in replayed.runs["run"].mapped


def test_a_resumed_run_is_one_run(tmp_path: Path) -> None:
    """Two event files; the values of the resumed part count where both have some."""
    saves = ModelCheckpoint(tmp_path / "kept", filename="{step}", every_n_train_steps=22, save_top_k=-1)
    on = {"enable_checkpointing": True}
    fit(tmp_path / "logs", Diverging(rise_at=22), saves, max_epochs=4, **on)  # 500 more at steps 22 to 31
    fit(tmp_path / "logs", Diverging(rise_at=36), resume=tmp_path / "kept" / "step=22.ckpt", max_epochs=6, **on)
    assert len(list((tmp_path / "logs" / "run").glob("*tfevents*"))) == 2
    replayed = replay(tmp_path / "logs", rules())
    assert steps(replayed)["run", "divergence"] == 38
    assert replayed.runs["run"].planned_steps == 48


def test_the_later_written_value_of_a_step_counts(tmp_path: Path) -> None:
    """Whatever the order of the files' names, and in steps that are in order again."""
    write(tmp_path, {"loss": [(2, 5.0), (3, 6.0)]}, start=2000.0)
    write(tmp_path, {"loss": [(0, 1.0), (1, 2.0), (2, 3.0), (3, 4.0), (4, 7.0)]}, start=1000.0)
    seen: list[tuple[int, dict[str, float]]] = []
    replay(tmp_path, [Kept(seen)])
    assert [(step, readings["stop/loss"]) for step, readings in seen] == [
        (0, 1.0),
        (1, 2.0),
        (2, 5.0),
        (3, 6.0),
        (4, 7.0),
    ]


def test_a_nan_comes_through(tmp_path: Path) -> None:
    """NonFinite fires at the step at which the log has it."""
    fit(tmp_path, Classifier(bad_at=13), max_epochs=2)
    assert steps(replay(tmp_path, rules()))["run", "non_finite"] == 13


@pytest.mark.parametrize("how", [{"new_style": True}, {"new_style": True, "double_precision": True}])
def test_scalars_that_were_written_as_tensors_are_read(tmp_path: Path, how: dict[str, bool]) -> None:
    """As TensorFlow 2 and `add_scalar(new_style=True)` write them, also beside texts and histograms."""
    write(tmp_path, {"train_loss": [*UP, math.inf]}, **how)
    with SummaryWriter(str(tmp_path), filename_suffix=".more") as writer:
        writer.add_text("notes", "none", 0)
        writer.add_histogram("weights", torch.randn(9), 0)
    seen: list[tuple[int, dict[str, float]]] = []
    replayed = replay(tmp_path, [*rules(), Kept(seen)])
    assert steps(replayed)[".", "divergence"] == 22
    assert steps(replayed)[".", "non_finite"] == 60
    assert seen[0][1].keys() == {"train_loss", "stop/loss", "stop/progress"}


def test_every_folder_with_event_files_is_a_run(tmp_path: Path) -> None:
    """At any depth, in the order of their numbers; one folder or one file can be asked for alone."""
    for name in ("", "net/version_10", "net/version_9"):
        write(tmp_path / name, {"train_loss": UP})
    assert list(replay(tmp_path, rules()).runs) == [".", "net/version_9", "net/version_10"]
    one = tmp_path / "net" / "version_9"
    (file,) = one.iterdir()
    for logdir in (one, str(one), file):
        replayed = replay(logdir, rules())
        assert steps(replayed) == {(".", "non_finite"): None, (".", "divergence"): 22}
        assert len(replayed) == 2 and replayed[0] in replayed.outcomes


def test_metrics_of_the_log_can_be_asked_for_by_name(tmp_path: Path) -> None:
    """All scalars keep their names, Lightning's placeholder aside; conditions in words see them."""
    fit(tmp_path, Diverging(rise_at=20))
    seen: list[tuple[int, dict[str, float]]] = []
    condition = StopWhen("train_loss > 400 for 2 readings")
    replayed = replay(tmp_path, [condition, StopWhen("hp_metric < 0"), Kept(seen)])
    assert replayed[0].step == 21
    assert replayed[1].missing == ("hp_metric",) and replayed[1].nothing_to_read
    assert {tag for _, readings in seen for tag in readings} >= {"train_loss", "val_loss", "epoch"}


def test_the_default_rules_are_asked_by_default(tmp_path: Path) -> None:
    """Without rules the default ones answer, among them the two that stop."""
    asked = {outcome.rule for outcome in replay(write(tmp_path, {"loss": UP}))}
    assert {"non_finite", "divergence"} < asked


# --- names and files that are not there


def test_a_named_tag_that_no_run_has_is_an_error(tmp_path: Path) -> None:
    """It lists what there is and suggests what is close."""
    write(tmp_path, {"train_loss": UP, "val_loss": UP})
    for arguments, argument in (
        ({"loss": "trainloss"}, "loss"),
        ({"val_loss": "trainloss"}, "val_loss"),
        ({"tags": {"stop/lr": "trainloss"}}, r"tags\['stop/lr'\]"),
    ):
        message = (
            f"^{argument}='trainloss' is in no run; did you mean 'train_loss'\\? There are: train_loss, val_loss.$"
        )
        with pytest.raises(ValueError, match=message):
            replay(tmp_path, rules(), **arguments)  # type: ignore[arg-type]


def test_a_named_tag_is_missing_where_only_other_runs_have_it(tmp_path: Path) -> None:
    """Nothing else is taken in its place."""
    write(tmp_path / "a", {"objective": UP})
    write(tmp_path / "b", {"loss": UP})
    replayed = replay(tmp_path, [Divergence(patience=3)], loss="objective")
    assert steps(replayed) == {("a", "divergence"): 22, ("b", "divergence"): None}
    assert replayed[1].missing == ("stop/loss",)


def test_a_logdir_without_logs_is_an_error(tmp_path: Path) -> None:
    """A missing folder, one without event files and a file of another kind are told apart, each with what to pass."""
    with pytest.raises(ValueError, match=r"no_such' does not exist; pass the folder that `tensorboard --logdir` shows"):
        replay(tmp_path / "no_such")
    with pytest.raises(ValueError, match=r"has no event files .* at any depth; pass the folder"):
        replay(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"notes.txt' is no event file"):
        replay(tmp_path / "notes.txt")


@pytest.mark.parametrize(
    "content", [b"", b"ab", b"no record at all" * 9, bytes(100)], ids=["empty", "short", "text", "zeros"]
)
def test_a_spoilt_file_is_a_run_without_readings(tmp_path: Path, content: bytes) -> None:
    """It is named under the table, and the other runs are replayed."""
    write(tmp_path / "good", {"loss": UP})
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "events.out.tfevents.1").write_bytes(content)
    replayed = replay(tmp_path, rules(), planned_steps=100)
    assert steps(replayed)["good", "divergence"] == 22
    assert all(o.nothing_to_read for o in replayed if o.run == "bad")
    assert replayed.runs["bad"].planned_steps is None
    text = printed(replayed)
    assert "bad: events.out.tfevents.1 has no event that can be read." in text
    assert "bad   -" in text and "no rule had anything to read" in text


def test_a_file_that_the_reader_fails_on_is_a_run_without_readings(tmp_path: Path) -> None:
    """Sound records that hold no events: the cause is told, and the other runs are replayed."""
    write(tmp_path / "good", {"loss": UP})
    (tmp_path / "bad").mkdir()
    with (tmp_path / "bad" / "events.out.tfevents.1").open("wb") as file:
        RecordWriter(file).write(b"no event")
    replayed = replay(tmp_path, rules())
    assert steps(replayed)["good", "divergence"] == 22
    assert "The log cannot be read (DecodeError: " in printed(replayed, 200)


def test_a_file_that_was_cut_off_is_read_up_to_there(tmp_path: Path) -> None:
    """As a killed run leaves it."""
    (file,) = write(tmp_path, {"loss": UP}).iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    assert steps(replay(tmp_path, rules()))[".", "divergence"] == 22


# --- what is printed


def test_the_table_and_its_notes(tmp_path: Path) -> None:
    """Rules that fire, in the order of their steps, those that never do, and where the readings are from."""
    write(tmp_path / "calm", {"train_loss": [(10 * i, 2.3) for i in range(30)]})
    write(tmp_path / "poor", {"train_loss": [*UP, math.nan]})
    warns = StopWhen("train_loss > 100", name="high", action="warn")
    lines = printed(replay(tmp_path, [*rules(), warns, StopWhen("none > 1")])).splitlines()
    rows = [line.split() for line in lines]
    assert rows[1] == ["run", "rule", "action", "at", "step", "saved", "reason"]
    assert next(row for row in rows if row[:1] == ["calm"]) == ["calm", "never", "non_finite,", "divergence,", "high"]
    assert next(row for row in rows if row[:1] == ["poor"])[:5] == ["poor", "high", "warn", "20", "-"]
    text = " ".join(" ".join(lines).split())
    assert text.index("divergence stop 22 62% The loss is 500") < text.index("non_finite stop 60 0% The loss is nan")
    assert " Read stop/loss from train_loss." in text
    assert "calm: The loss stands in the log each 10 steps: a rule in a run may see more of it." in text
    assert "Nothing to read: when_none (without none)." in text
    assert "Not all to read: non_finite (without stop/grad_norm, stop/weight_norm, stop/scaler)." in text
    assert "poor: Saved is a share of 61 planned steps." in text
    assert max(map(len, lines)) <= 100


def test_brackets_in_names_are_printed_as_they_are(tmp_path: Path) -> None:
    """The name of a run or a folder is no markup."""
    write(tmp_path / "[red]logs" / "[bold]run", {"train_loss": UP})
    text = printed(replay(tmp_path / "[red]logs", rules()), 200)
    assert "[red]logs" in text and "[bold]run" in text


def test_the_command_prints_the_table(tmp_path: Path) -> None:
    """`python -m dynwatch.rules`, with default rules, a named loss and a condition; a bad name is a short error."""
    write(tmp_path / "poor", {"objective": UP, "val_accuracy": [0.1] * 60})

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dynwatch.rules", str(tmp_path), *arguments]
        wide = {**os.environ, "COLUMNS": "100"}
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=wide)

    done = run("--loss", "objective", "--planned-steps", "100", "--when", "val_accuracy < 0.2 after 30 steps")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "divergence stop 39 60% The loss is 500" in text
    assert "when_val_accuracy stop 30 69% val_accuracy < 0.2 after 30 steps" in text
    wrong = run("--loss", "objektive")
    assert wrong.returncode == 2
    assert "error: loss='objektive' is in no run; did you mean 'objective'?" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def test_a_rule_that_raises_is_told_and_the_others_go_on() -> None:
    """As in a run: it is not asked any more, and the notes say why."""

    class Broken(Rule):
        name = "broken"

        def update(self, step: int, readings: Any, notes: Any) -> None:
            raise ZeroDivisionError("no such luck")

    broken, sound = replay_readings({"stop/loss": [(0, 1.0), (1, math.nan)]}, [Broken(), NonFinite()])
    assert broken.failed == "ZeroDivisionError: no such luck" and broken.step is None
    assert sound.step == 1 and not sound.failed
    assert "broken was not asked any more, because it raised Zero" in " ".join(
        PastRun((broken,), planned_steps=2).notes()
    )


def test_few_losses_and_verdicts_of_the_run_itself_are_told() -> None:
    """A rule that is still waiting, or that a thinned log does not show, must not look like one that was content."""
    notes = list(PastRun(planned_steps=9, losses=6, recorded=("divergence at step 53",)).notes())
    assert "The log holds 6 losses only: rules that wait for more of them cannot fire." in notes
    assert "Verdicts of the run itself: divergence at step 53." in notes
