"""SKAMonitor on two ranks, as a program: `python ska_run.py GROUP FOLDER`."""

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
from hessian_run import BesideNet, failing_on_1, on_rank
from torch import Tensor

from dynwatch.callbacks import SKAMonitor, probe, ska

Scenario = Callable[[], dict[str, Any]]
# Flushes are rarer than probes, so that a monitor which has failed takes part in further ones.
SOME_STEPS = {"limit_train_batches": 5, "log_every_n_steps": 5}


def watched(strategy: str = "ddp", module: Net | None = None, fit_with: Any = (), **arguments: Any) -> dict[str, Any]:
    monitor = SKAMonitor(**({"every_n_steps": 1, "include_last": True} | arguments))
    result = fit([monitor], strategy, module, **dict(fit_with))
    assert monitor._stream is not None
    return result | {"reasons": monitor._stream.reasons, "remarks": monitor._stream.remarks}


PLACES: dict[str, tuple[Any, str, int]] = {
    "keep": (ska, "cloned", 1),
    "enter": (probe.ProbePass, "__enter__", 1),
    "enter_later": (probe.ProbePass, "__enter__", 4),
    "look": (ska, "fixed_part", 5),
    "choose": (ska, "matching", 2),
}


def with_failure(place: str, strategy: str = "ddp") -> dict[str, Any]:
    with failing_on_1(*PLACES[place]):
        return watched(strategy, fit_with=SOME_STEPS)


class SkipsOnOne(Net):
    """Skips its first batch, in probes as well, on rank 1."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        if on_rank(1) and not self.training and self.trainer.fit_loop.epoch_loop._batches_that_stepped == 0:
            return None
        return super().training_step(batch, batch_idx)


def nan_in_one(module: Net, batch_idx: int, loss: Tensor) -> Tensor:
    if on_rank(1) and not module.training and module.trainer.fit_loop.epoch_loop._batches_that_stepped == 2:
        module.body.last(torch.full((4, 17), math.nan))
    elif not module.training:
        module.body.last(torch.ones(4, 17))
    return loss


def ddp_scenarios() -> dict[str, Scenario]:
    found: dict[str, Scenario] = {
        "bare": lambda: fit([]),
        "plain": watched,
        "budget": lambda: watched(every_n_steps=None, fit_with={"max_epochs": 8}),
        "given": lambda: watched(probe=[torch.ones(2, 8), torch.zeros(2, dtype=torch.long)]),
        "nan_in_one": lambda: watched(module=Net(nan_in_one), fit_with=SOME_STEPS),
        "skips_on_one": lambda: watched(module=SkipsOnOne(), fit_with=SOME_STEPS),
        "one_layer": lambda: watched(layers=["last"], include_last=False, fit_with=SOME_STEPS),
    }
    for place in PLACES:
        found[f"failing_{place}"] = lambda place=place: with_failure(place)  # type: ignore[misc]
    return found


def fsdp_scenarios() -> dict[str, Scenario]:
    return {
        "bare": lambda: fit([], "fsdp"),
        "plain": lambda: watched("fsdp"),
        "beside": lambda: watched("fsdp", BesideNet()),
        "failing_enter_later": lambda: with_failure("enter_later", "fsdp"),
        "failing_look": lambda: with_failure("look", "fsdp"),
    }


GROUPS: dict[str, Callable[[], dict[str, Scenario]]] = {"ddp": ddp_scenarios, "fsdp": fsdp_scenarios}

if __name__ == "__main__":
    faulthandler.dump_traceback_later(100)  # shows where a run hangs
    torch.set_num_threads(1)
    for scenario, run in GROUPS[sys.argv[1]]().items():
        result = run()
        (Path(sys.argv[2]) / f"{scenario}.{result['rank']}.json").write_text(json.dumps(result))
