"""`lightning` and `pytorch_lightning`: Trainers and CLIs of both take the callbacks, with both or one installed."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import runs
import torch
from torch import Tensor, nn

from dynwatch.callbacks import DynWatch, EarlyTermination, GradientNormMonitor, HessianMonitor
from dynwatch.rules import Divergence

NAMESPACES = ["pytorch_lightning", "lightning.pytorch"]
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": 1,
    "log_every_n_steps": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


@pytest.fixture(params=NAMESPACES)
def pl(request: pytest.FixtureRequest) -> ModuleType:
    """One of the two namespaces."""
    return pytest.importorskip(request.param)


def module_class(pl: ModuleType) -> type[Any]:
    """A LightningModule of a namespace; the two have separate classes."""

    class Net(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 4)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Net


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("make", "tag"),
    [
        (lambda: DynWatch(GradientNormMonitor(every_n_steps=1), report=False), "grad_norm/total"),
        (lambda: GradientNormMonitor(every_n_steps=1), "grad_norm/total"),
        (EarlyTermination, "stop/loss"),
        (lambda: HessianMonitor(every_n_steps=1), "hessian/lambda_max"),
    ],
    ids=["DynWatch", "GradientNormMonitor", "EarlyTermination", "HessianMonitor"],
)
def test_both_trainers_take_each_callback(pl: ModuleType, tmp_path: Path, make: Any, tag: str) -> None:
    """A Trainer of either namespace accepts the callback as its own, and its TensorBoardLogger gets the readings."""
    callback = make()
    assert isinstance(callback, pl.Callback)
    loggers = importlib.import_module(f"{pl.__name__}.loggers")
    logger = loggers.TensorBoardLogger(tmp_path, name=None, version="run")
    trainer = pl.Trainer(callbacks=[callback], logger=logger, default_root_dir=tmp_path, **QUIET)
    trainer.fit(module_class(pl)(), runs.data())
    assert [step for step, _ in runs.scalars(tmp_path / "run")[tag]] == list(range(8))
    assert tag in trainer.callback_metrics


def command_line(tmp_path: Path, *arguments: str) -> list[str]:
    settings = [f"--trainer.{name}={value}".replace("=True", "=true") for name, value in QUIET.items()]
    return [*settings, f"--trainer.default_root_dir={tmp_path}", *arguments]


def build(pl: ModuleType, tmp_path: Path, *arguments: str) -> Any:
    """What LightningCLI makes of a command line."""
    pytest.importorskip("jsonargparse")
    cli = importlib.import_module(f"{pl.__name__}.cli")
    return cli.LightningCLI(
        module_class(pl), args=command_line(tmp_path, *arguments), run=False, save_config_callback=None
    )


def the_watch(cli: Any) -> DynWatch:
    (watch,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, DynWatch))
    return watch


def test_command_line(pl: ModuleType, tmp_path: Path) -> None:
    """LightningCLI adds DynWatch from two arguments, and the run that it builds is watched."""
    cli = build(pl, tmp_path, "--trainer.callbacks+=dynwatch.callbacks.DynWatch", "--trainer.callbacks.report=false")
    assert the_watch(cli).report is False
    cli.trainer.fit(cli.model, runs.data())
    assert "stop/loss" in cli.trainer.callback_metrics


def test_yaml(pl: ModuleType, tmp_path: Path) -> None:
    """A YAML file gives DynWatch monitors of its own, down to the arguments of a stop rule."""
    config = tmp_path / "config.yaml"
    config.write_text(
        """
trainer:
  callbacks:
    - class_path: dynwatch.callbacks.DynWatch
      init_args:
        report: false
        gradients:
          class_path: dynwatch.callbacks.GradientNormMonitor
          init_args:
            every_n_steps: 3
            norm_type: .inf
            layers: [net]
        hessian:
          class_path: dynwatch.callbacks.HessianMonitor
          init_args:
            every_n_steps: 2
            probe_batch: current
            tol: 0.05
            method: exact
            storage: bfloat16
            batch_sizes: [4, 1024]
        step_radius:
          class_path: dynwatch.callbacks.StepRadiusMonitor
          init_args:
            every_n_steps: 2
            b2: true
            method: reverse
        controller:
          class_path: dynwatch.callbacks.StepRadiusController
          init_args:
            r_max: .inf
            lr_jump: 10
        moe:
          class_path: dynwatch.callbacks.MoEPathwayMonitor
          init_args:
            every_n_steps: 20
            probe: validate
            group_by: language
            routers: [gate$]
            padding_mask: hidden
        ska:
          class_path: dynwatch.callbacks.SKAMonitor
          init_args:
            layers: [net]
            time: steps
        stop:
          class_path: dynwatch.callbacks.EarlyTermination
          init_args:
            min_steps: 7
            actions:
              divergence: shadow
              plateau: off
            rules:
              - class_path: dynwatch.rules.Plateau
              - class_path: dynwatch.rules.SKAEquilibrium
              - class_path: dynwatch.rules.StopWhen
                init_args:
                  expression: val_loss > 3 for 2 readings
              - class_path: dynwatch.rules.Divergence
                init_args:
                  patience: 50
"""
    )
    cli = build(pl, tmp_path, f"--config={config}")
    watch = the_watch(cli)
    controller, gradients, _, hessian, radius, moe, ska, stop = watch.monitors
    assert (moe.every_n_steps, moe.group_by, moe.routers) == (20, "language", ["gate$"])
    assert (ska.layers, ska.time, ska.every_n_steps) == (["net"], "steps", 50)
    assert (controller.r_max, controller.lr_jump, controller.every_n_steps) == (float("inf"), 10, 1)
    assert (radius.every_n_steps, radius.b2, radius._look.method) == (2, True, "reverse")
    assert isinstance(gradients, GradientNormMonitor) and isinstance(stop, EarlyTermination)
    assert (gradients.every_n_steps, gradients.norm_type, gradients.layers) == (3, float("inf"), ["net"])
    assert isinstance(hessian, HessianMonitor)
    assert (hessian.every_n_steps, hessian.probe_batch, hessian.batch_sizes) == (2, "current", [4, 1024])
    assert (hessian.method, hessian.max_samples) == ("exact", 128)
    assert stop.min_steps == 7
    settled, condition, rule = stop.rules  # YAML reads off as False, and the plateau rule is left out all the same
    assert settled.name == "ska_equilibrium" and settled.action == "warn"
    assert condition.name == "when_val_loss" and condition.action == "stop"
    assert isinstance(rule, Divergence) and rule.patience == 50 and rule.action == "shadow"
    cli.trainer.fit(cli.model, runs.data())
    assert "grad_norm/layer/net" in cli.trainer.callback_metrics
    assert "hessian/lambda_max" in cli.trainer.callback_metrics


def test_command_line_refuses_a_wrong_type(pl: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The type hints are those that the CLI checks: a word is no cadence."""
    with pytest.raises(SystemExit):
        build(
            pl,
            tmp_path,
            "--trainer.callbacks+=dynwatch.callbacks.GradientNormMonitor",
            "--trainer.callbacks.every_n_steps=often",
        )
    assert "every_n_steps" in capsys.readouterr().err


BLOCK = """
import sys
from importlib.abc import MetaPathFinder

class Block(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
"""

FIT = """
import importlib
import torch
from torch.utils.data import DataLoader, TensorDataset
from dynwatch.callbacks import DynWatch, GradientNormMonitor

pl = importlib.import_module({name!r})

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 4)
    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

trainer = pl.Trainer(callbacks=[DynWatch(GradientNormMonitor(every_n_steps=1))], **{quiet!r})
trainer.fit(Net(), DataLoader(TensorDataset(torch.randn(32, 8)), batch_size=8))
roots = {{base.__module__.split(".")[0] for base in DynWatch.__mro__}} & {{"lightning", "pytorch_lightning"}}
print("bases in", *roots, "with", *sorted(trainer.callback_metrics))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "other"), [NAMESPACES, NAMESPACES[::-1]])
def test_with_one_namespace_installed(tmp_path: Path, name: str, other: str) -> None:
    """Where only one of the two can be imported, its Trainer fits with DynWatch and nothing asks for the other."""
    ended = python(BLOCK.format(blocked={other.split(".")[0]}) + FIT.format(name=name, quiet=QUIET), tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert f"bases in {name.split('.')[0]} with " in ended.stdout
    assert "grad_norm/total" in ended.stdout and "stop/loss" in ended.stdout


@pytest.mark.slow
def test_without_lightning(tmp_path: Path) -> None:
    """With neither installed the engine imports, and the callbacks say what to install."""
    blocked = BLOCK.format(blocked={"lightning", "pytorch_lightning"})
    ended = python(blocked + "import dynwatch.gradients\nprint('engine')\nimport dynwatch.callbacks", tmp_path)
    assert ended.stdout == "engine\n"
    assert "ImportError: dynwatch.callbacks needs PyTorch Lightning" in ended.stderr
    assert "pip install pytorch-lightning" in ended.stderr


@pytest.mark.slow
def test_a_broken_lightning_is_not_taken_for_a_missing_one(tmp_path: Path) -> None:
    """An installed Lightning that lacks a dependency of its own fails with that dependency's name."""
    (tmp_path / "pytorch_lightning.py").write_text("import its_own_dependency\n")
    ended = python("import dynwatch.callbacks", tmp_path)
    assert "ModuleNotFoundError: No module named 'its_own_dependency'" in ended.stderr
