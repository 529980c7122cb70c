"""The summary in the terminal."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import runs
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch import nn

from dynwatch.callbacks import DynWatch, EarlyTermination, GradientNormMonitor
from dynwatch.callbacks.panels import pinned_link
from dynwatch.callbacks.stream import Stream


class Failing(GradientNormMonitor):
    """A monitor that fails at its third step."""

    def measure_gradients(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if Stream.step(trainer) == 2:
            raise RuntimeError("no such thing")
        super().measure_gradients(trainer, pl_module, optimizer)


class LinkKeeper(pl.Callback):
    """Notes the link to this run's charts while they are known."""

    link = ""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.link = pinned_link(Stream.of(trainer).charts())


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def every_step(monitor: type[GradientNormMonitor] = GradientNormMonitor) -> GradientNormMonitor:
    return monitor(every_n_steps=1, update_ratio_every_n_steps=1)


def printed(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    watch: DynWatch,
    model: pl.LightningModule | None = None,
    **settings: Any,
) -> str:
    """What a run with these callbacks prints."""
    runs.trainer(folder, [watch], **settings).fit(model or runs.Classifier(), runs.data())
    return capsys.readouterr().out


def in_one_line(text: str) -> str:
    return " ".join(text.split())


def is_to_copy(line: str) -> bool:
    """Whether a line must not be wrapped because one copies it."""
    return line.strip().startswith(("tensorboard --logdir", "http://"))


def test_a_good_run_ends_with_its_readings_and_no_objection(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The summary names what was watched, each main tag with four figures and a curve, the cost and the verdict."""
    out = printed(capsys, tmp_path, DynWatch(every_step()))
    watched = "GradientNormMonitor, HessianMonitor, StepRadiusMonitor, SKAMonitor, EarlyTermination"
    assert f"dynwatch watches this run: {watched}." in in_one_line(out)
    for tag in ("grad_norm/total", "grad_norm/clipped", "stop/loss", "grad_norm/layer/net.0", "update_ratio/net.2"):
        assert re.search(rf"^ *{tag} +\S+ +\S+ +\S+ +[▁▂▃▄▅▆▇█]+ *$", out, re.MULTILINE), tag
    assert re.search(r"Verdict: nothing to object to\. Own cost: \d+\.\d% of the run's time\.", in_one_line(out))
    assert "switched off" not in out


def test_the_figures_of_a_row_are_those_of_the_event_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Last, smallest and largest total norm are what TensorBoard shows."""
    out = printed(capsys, tmp_path, DynWatch(every_step()))
    norms = [value for _, value in runs.scalars(tmp_path / "run")["grad_norm/total"]]
    row = re.search(r"grad_norm/total +(\S+) +(\S+) +(\S+)", out)
    assert row is not None
    assert [float(figure) for figure in row.groups()] == pytest.approx([norms[-1], min(norms), max(norms)], rel=0.01)


def test_a_poor_run_ends_with_its_rule_and_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The verdict in the summary is that of the panel above it, which has the reason."""
    out = in_one_line(printed(capsys, tmp_path, DynWatch(every_step()), runs.Classifier(bad_at=3)))
    assert "dynwatch ended this run: non_finite" in out
    assert "The loss is nan at step 3" in out
    assert "Verdict: stopped by non_finite at step 3." in out
    assert "nothing to object to" not in out


def test_command_and_link_can_be_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At the start and at the end stand the command, right also for a folder with spaces and quotes, and the link."""
    folder = tmp_path / "my run's logs"
    logger = TensorBoardLogger(folder, name="digits", version=0)
    keeper = LinkKeeper()
    runs.trainer(folder, [DynWatch(), keeper], logger=logger).fit(runs.Classifier(), runs.data())
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if is_to_copy(line)]
    command, link, *again = lines
    program, option, path = shlex.split(command)
    assert (program, option) == ("tensorboard", "--logdir")
    assert Path(path).resolve() == (folder / "digits").resolve()
    assert link == keeper.link
    assert "grad_norm%2Ftotal" in link
    assert again == [command, link]


@pytest.mark.parametrize("kind", ["csv", "none"])
def test_without_tensorboard_no_command_is_offered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """With another logger or none the summary stands without command and link."""
    out = printed(capsys, tmp_path, DynWatch(), logger=CSVLogger(tmp_path) if kind == "csv" else False)
    assert "Verdict: nothing to object to." in out
    assert not [line for line in out.splitlines() if is_to_copy(line)]


def test_a_reading_that_is_out_of_reach_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The noise scale of one batch per step has no row, and the reason and remedy stand below the table."""
    out = printed(capsys, tmp_path, DynWatch(every_step()))
    assert (
        "grad_norm/noise_scale: not available: it needs gradients of two batch sizes: "
        "accumulate gradients (accumulate_grad_batches) or use DDP."
    ) in in_one_line(out)
    assert not re.search(r"^ *grad_norm/noise_scale +(\S+) ", out, re.MULTILINE)


def test_a_reading_within_reach_has_no_excuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With accumulated gradients the noise scale has a row and no reason."""
    out = printed(capsys, tmp_path, DynWatch(every_step()), accumulate_grad_batches=2)
    assert re.search(r"^ *grad_norm/noise_scale +\S+ ", out, re.MULTILINE)
    assert "grad_norm/noise_scale: not available" not in out


def test_a_monitor_that_failed_is_named_with_its_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The summary says which monitor was switched off, and why; what it read before still has its row."""
    out = in_one_line(printed(capsys, tmp_path, DynWatch(every_step(Failing))))
    assert "Failing was switched off: RuntimeError: no such thing" in out
    assert "EarlyTermination was switched off" not in out
    assert "grad_norm/total" in out


@pytest.mark.parametrize("bad_at", [None, 3])
def test_nothing_is_printed_where_it_is_not_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad_at: int | None
) -> None:
    """With report=False neither a good run nor a stopped one prints anything; the verdict is still there to ask for."""
    watch = DynWatch(every_step(), report=False)
    assert printed(capsys, tmp_path, watch, runs.Classifier(bad_at=bad_at)) == ""
    assert (watch.verdict is None) == (bad_at is None)


def test_nothing_is_printed_on_other_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank other than the first prints neither the summary nor a verdict."""
    monkeypatch.setattr(pl.Trainer, "is_global_zero", False)
    watch = DynWatch(every_step())
    assert printed(capsys, tmp_path, watch, runs.Classifier(bad_at=3), logger=False) == ""
    assert watch.verdict is not None


def test_a_report_fits_into_eighty_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with long layer names and a verdict, only the command and the link are longer."""
    model = runs.Classifier(bad_at=3)
    model.net = nn.Sequential()
    model.net.add_module("a_rather_long_name_for_a_block_of_layers_in_a_model_of_some_depth", nn.Linear(8, 16))
    model.net.add_module("another_long_name_for_the_head_of_the_same_model_of_some_depth", nn.Linear(16, 4))
    out = printed(capsys, tmp_path, DynWatch(every_step(), EarlyTermination()), model)
    lines = [line for line in out.splitlines() if not is_to_copy(line)]
    assert "a_rather_long_name" in out
    assert max(len(line) for line in lines) <= 80
