"""The callbacks of the step radius on two ranks, as a program: `python step_radius_run.py GROUP FOLDER`."""

from __future__ import annotations

import faulthandler
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from distributed_run import Net, fit
from hessian_run import AdamNet, BesideNet, ShardedAdamNet, failing_on_1, on_rank
from torch import Tensor, nn

from dynwatch.callbacks import StepRadiusController, StepRadiusMonitor, step_look

Scenario = Callable[[], dict[str, Any]]
SOME_STEPS = {"limit_train_batches": 4, "log_every_n_steps": 4}
R_MAX = 0.05  # the nets below have r of 0.1 to 1


class FlatNet(Net):
    """Without a cross entropy."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, _ = batch
        return self.body(x).square().mean()


class FlatOnOne(Net):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return self.body(x).square().mean() if on_rank(1) else nn.functional.cross_entropy(self.body(x), y)


class ManualNet(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()


def watched(strategy: str = "ddp", module: Net | None = None, fit_with: Any = (), **arguments: Any) -> dict[str, Any]:
    monitor = StepRadiusMonitor(**({"every_n_steps": 1} | arguments))
    result = fit([monitor], strategy, module, **dict(fit_with))
    assert monitor._stream is not None
    return result | {"way": monitor._look.state(), "reasons": monitor._stream.reasons}


def controlled(
    strategy: str = "ddp", module: Net | None = None, fit_with: Any = (), **arguments: Any
) -> dict[str, Any]:
    controller = StepRadiusController(**({"r_max": R_MAX} | arguments))
    after = StepRadiusMonitor(every_n_steps=1)
    result = fit([controller, after], strategy, module, **dict(fit_with))
    return result | {"capped": controller.capped_steps}


def none_in_one(module: Net, batch_idx: int, loss: Tensor) -> Tensor | None:
    return None if module.global_step == 2 and on_rank(1) and batch_idx == 1 else loss


def nan_in_one(module: Net, batch_idx: int, loss: Tensor) -> Tensor:
    return loss * math.nan if module.global_step == 2 and on_rank(1) else loss


def failing(name: str, run: Scenario, call: int = 2) -> dict[str, Any]:
    """Make one call of a function of step_look raise on rank 1."""
    with failing_on_1(step_look, name, call):
        return run()


def of_batch(module: Any, batch: Any) -> Any:
    return module.body(batch[0]), batch[1]


def ddp_scenarios() -> dict[str, Scenario]:
    return {
        "bare": lambda: fit([]),
        "sgd": watched,
        "adam": lambda: watched(module=AdamNet(), b2=True),
        "differences": lambda: watched(method="differences"),
        "manual": lambda: watched(module=ManualNet(), logits=of_batch),
        "controlled": controlled,
        "inf": lambda: controlled(r_max=math.inf),
        "nan_in_one": lambda: watched(module=Net(nan_in_one)),
        "nan_controlled": lambda: controlled(module=Net(nan_in_one)),
        "flat": lambda: watched(module=FlatNet(), fit_with=SOME_STEPS),
        "flat_on_one": lambda: watched(module=FlatOnOne(), fit_with=SOME_STEPS),
        "failing": lambda: failing("look", lambda: watched(fit_with=SOME_STEPS)),
        "failing_choice": lambda: failing("choose", lambda: watched(fit_with=SOME_STEPS), 1),
        "failing_control": lambda: failing("look", lambda: controlled(fit_with=SOME_STEPS), 3),
    }


def fsdp_scenarios() -> dict[str, Scenario]:
    return {
        "bare": lambda: fit([], "fsdp"),
        "sgd": lambda: watched("fsdp"),
        "adam": lambda: watched("fsdp", ShardedAdamNet(), b2=True),
        "beside": lambda: watched("fsdp", BesideNet()),
        "forward": lambda: watched("fsdp", method="forward", fit_with=SOME_STEPS),
        "controlled": lambda: controlled("fsdp"),
        "inf": lambda: controlled("fsdp", r_max=math.inf),
    }


GROUPS: dict[str, Callable[[], dict[str, Scenario]]] = {"ddp": ddp_scenarios, "fsdp": fsdp_scenarios}

if __name__ == "__main__":
    faulthandler.dump_traceback_later(100)  # shows where a run hangs
    torch.set_num_threads(1)
    for scenario, run in GROUPS[sys.argv[1]]().items():
        result = run()
        (Path(sys.argv[2]) / f"{scenario}.{result['rank']}.json").write_text(json.dumps(result))
