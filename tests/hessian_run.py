"""Readings of curvature on two ranks, as a program: `python hessian_run.py GROUP FOLDER` writes JSON by rank.

One launch runs all scenarios of a group, as in `distributed_run.py`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from distributed_run import Net, ShardedNet, fit, samples
from torch import Tensor, nn
from torch.utils.data import DataLoader

import dynwatch.operators
from dynwatch.callbacks import HessianMonitor, curvature, curvature_reading, hessian, replay
from dynwatch.stability import Unsupported

Scenario = Callable[[], dict[str, Any]]


class AdamNet(Net):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01, weight_decay=0.01)


class UnevenNet(Net):
    """Trains on 8 samples a step, 6 in the last: 4 and 2 of them on two ranks. Its weights hardly move."""

    def train_dataloader(self) -> DataLoader[Any]:
        x, y = samples()
        batches = [list(range(start, start + 8)) for start in range(0, 32, 8)] + [list(range(32, 38))]
        if self.trainer.world_size == 2:
            batches = [batch[:4] if self.trainer.global_rank == 0 else batch[4:] for batch in batches]
        return DataLoader([(x[batch], y[batch]) for batch in batches], batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-9)


class BesideNet(ShardedNet):
    """Has a parameter that is not sharded, and not trained, since nobody would average its gradient over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(-1.0, 1.0, 4))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.body(x) * self.shift.exp(), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.body.parameters(), lr=0.1, momentum=0.9)


class BesideNetWhole(BesideNet):
    def configure_model(self) -> None:
        pass


class KinkedBody(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 17)
        self.last = nn.Linear(17, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(torch.relu(self.first(x)))
        return result


class ShardedAdamNet(ShardedNet):
    configure_optimizers = AdamNet.configure_optimizers


class KinkedNet(ShardedNet):
    def __init__(self) -> None:
        super().__init__()
        self.body = KinkedBody()  # type: ignore[assignment]


def monitor(**arguments: Any) -> HessianMonitor:
    return HessianMonitor(**({"every_n_steps": 1, "full_every_n_readings": 2, "tol": 1e-4} | arguments))


def watched(strategy: str = "ddp", module: Net | None = None, fit_with: Any = (), **arguments: Any) -> dict[str, Any]:
    """Train with a HessianMonitor and tell what it found and how."""
    mine = monitor(**arguments)
    result = fit([mine], strategy, module, **dict(fit_with))
    assert mine._stream is not None
    return result | {
        "method": mine.way.method if mine.way else None,
        "why": mine.way.why if mine.way else None,
        "reasons": mine._stream.reasons,
        "remarks": mine._stream.remarks,
        "taken": mine._readings,
        "allowed": mine._allowed,
    }


# --- trouble on one rank

ERRORS: dict[str, Callable[[], Exception]] = {
    "error": lambda: RuntimeError("made to fail"),
    "memory": lambda: torch.OutOfMemoryError("made to fail"),
    "unsupported": lambda: Unsupported("made to fail."),
}
# Where: the owner and the name of a function, and the call of it that fails.
PLACES: dict[str, tuple[Any, str, int]] = {
    "keep": (hessian, "cloned", 1),
    "enter": (replay.Replay, "__enter__", 1),
    "enter_again": (replay.Replay, "__enter__", 2),
    "choose": (hessian, "choose", 1),
    "derive": (curvature, "exact", 1),
    "product": (dynwatch.operators, "unflatten", 6),  # choose() takes one, the product with the gradient another
    "stability": (curvature_reading, "stability", 1),
    "chunks": (curvature_reading, "exact", 2),
}
BATCHES_SEEN: list[int] = []


def on_rank(rank: int) -> bool:
    return os.environ.get("LOCAL_RANK", "0") == str(rank)


@contextlib.contextmanager
def failing_on_1(owner: Any, name: str, call: int) -> Iterator[None]:
    """Make one call of a function raise on rank 1."""
    whole, calls = getattr(owner, name), []

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if on_rank(1) and len(calls) == call:
            raise RuntimeError("made to fail")
        return whole(*args, **kwargs)

    setattr(owner, name, sometimes)
    try:
        yield
    finally:
        setattr(owner, name, whole)


@contextlib.contextmanager
def failing(place: str, error: str, rank: int) -> Iterator[None]:
    """Make one call of a function raise on one rank, or all of them if an answer is what it raises."""
    owner, name, call = PLACES[place]
    whole = getattr(owner, name)
    calls = []

    def sometimes(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if on_rank(rank) and (len(calls) == call or error == "unsupported"):
            raise ERRORS[error]()
        return whole(*args, **kwargs)

    setattr(owner, name, sometimes)
    try:
        yield
    finally:
        setattr(owner, name, whole)


FAILURES = [(place, "error", 1) for place in PLACES]
FAILURES += [(place, "error", 0) for place in ("enter_again", "derive", "product", "chunks")]
FAILURES += [(place, "memory", 1) for place in ("enter", "choose", "product", "chunks")]
FAILURES += [("stability", "unsupported", 0), ("stability", "unsupported", 1)]
# Flushes are rarer than readings, so that a monitor which has failed takes part in further readings.
SOME_STEPS = {"limit_train_batches": 4, "log_every_n_steps": 4}
SHARDED = {"fit_with": {"limit_train_batches": 4}, "tol": 1e-2, "every_n_steps": 2}
AT_LEAST_COST = {"full_every_n_readings": 1, "max_hvps": 6, "tol": 0.1}


def with_failure(place: str, error: str, rank: int) -> dict[str, Any]:
    with failing(place, error, rank):
        return watched(fit_with=SOME_STEPS, max_samples=4, **AT_LEAST_COST)


def raises_when_replayed(module: Net, batch_idx: int, loss: Tensor) -> Tensor:
    """As a step does that keeps account of its batches in a place out of the module's reach."""
    BATCHES_SEEN.append(batch_idx)
    if BATCHES_SEEN.count(batch_idx) > 1 and on_rank(1):
        raise ZeroDivisionError("called once too often")
    return loss


def nan_in_one(module: Net, batch_idx: int, loss: Tensor) -> Tensor:
    """In replays the batch has number 0, and the step is the run's."""
    return loss * math.nan if module.global_step == 2 and module.global_rank == 1 and batch_idx == 0 else loss


def none_in_one(module: Net, batch_idx: int, loss: Tensor) -> Tensor | None:
    return None if module.global_step == 2 and module.global_rank == 1 and batch_idx == 0 else loss


def ddp_scenarios() -> dict[str, Scenario]:
    return {
        "bare": lambda: fit([]),
        "sgd": watched,
        "adam": lambda: watched(module=AdamNet()),
        "bare_adam": lambda: fit([], module=AdamNet()),
        "uneven": lambda: watched(module=UnevenNet(), probe_batch="current", max_samples=None),
        "cut": lambda: watched(max_samples=2, fit_with=SOME_STEPS),
        "differences": lambda: watched(method="differences", fit_with=SOME_STEPS),
        "none_in_one": lambda: watched(module=Net(none_in_one)),  # type: ignore[arg-type]
        "nan_in_one": lambda: watched(module=Net(nan_in_one)),
        "raises_when_replayed": lambda: watched(module=Net(raises_when_replayed)),
    }


def failing_scenarios() -> dict[str, Scenario]:
    found: dict[str, Scenario] = {"bare_some": lambda: fit([], **SOME_STEPS)}
    for place, error, rank in FAILURES:
        found[f"{place}_{error}_{rank}"] = lambda p=place, e=error, r=rank: with_failure(p, e, r)  # type: ignore[misc]
    return found


def fsdp_scenarios() -> dict[str, Scenario]:
    return {
        "bare": lambda: fit([], "fsdp", limit_train_batches=4),
        "smooth": lambda: sharded(),
        "sharded_adam": lambda: sharded(ShardedAdamNet()),
        "beside": lambda: sharded(BesideNet()),
        "kinked": lambda: sharded(KinkedNet()),
        "exact": lambda: sharded(method="exact"),
        "enter_error_1": lambda: sharded_failure("enter"),
        "stability_error_1": lambda: sharded_failure("stability"),
    }


def sharded(module: Net | None = None, **arguments: Any) -> dict[str, Any]:
    return watched("fsdp", module, **(SHARDED | arguments))


def sharded_failure(place: str) -> dict[str, Any]:
    with failing(place, "error", 1):
        return watched("fsdp", fit_with=SOME_STEPS, **AT_LEAST_COST)


GROUPS: dict[str, Callable[[], dict[str, Scenario]]] = {
    "ddp": lambda: ddp_scenarios() | failing_scenarios(),
    "fsdp": fsdp_scenarios,
}


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100)  # shows where a run hangs
    torch.set_num_threads(1)
    for scenario, run in GROUPS[sys.argv[1]]().items():
        result = run()
        (Path(sys.argv[2]) / f"{scenario}.{result['rank']}.json").write_text(json.dumps(result))
