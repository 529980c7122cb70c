"""Rules on two ranks, as a program: `python distributed_rules_run.py GROUP FOLDER` is one rank of a launch."""

from __future__ import annotations

import faulthandler
import functools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import distributed_run
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from distributed_run import Net, OneSided
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from dynwatch.callbacks import ActivationMonitor, DynWatch, EarlyTermination
from dynwatch.rules import DeadLayers, NonFinite, Overfitting, Rule, StopWhen, Verdict, default_rules

EXIT_CODE = 75
RISE_AT, LOG_EVERY = 26, 5
COLLECTIVES = ("all_reduce", "all_gather", "all_gather_object", "broadcast", "broadcast_object_list", "barrier")
COLLECTIVES += ("gather", "gather_object", "reduce", "scatter", "all_gather_into_tensor", "reduce_scatter_tensor")


class Odd(Net):
    """Says what it is told: a loss, metrics and a validation loss that differ between the ranks.

    Args:
        loss: Its loss by (step, rank); None takes the real one.
        metrics: Logs what it likes: `metrics(module, step)`.
        validation: Its validation loss by (epoch, rank).
    """

    def __init__(
        self,
        loss: Callable[[int, int], float] | None = None,
        metrics: Callable[[pl.LightningModule, int], None] | None = None,
        validation: Callable[[int, int], float] | None = None,
    ) -> None:
        super().__init__()
        self.loss, self.metrics, self.validation = loss, metrics, validation

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        step = self.trainer.global_step
        if self.metrics:
            self.metrics(self, step)
        return loss - loss.detach() + self.loss(step, self.global_rank) if self.loss else loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        if self.validation is not None:
            value = self.validation(self.current_epoch, self.global_rank)
            self.log("val_loss", value)
            if self.global_rank == 0:
                self.log("val_alone", value, rank_zero_only=True)

    def val_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*distributed_run.samples()), batch_size=8)


class Gated(Net):
    """Its gate has four units: one fires on rank 1's data only, one on rank 0's, one never and one always."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.ReLU()
        self.inner = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
        with torch.no_grad():
            self.inner[0].bias.sub_(1.5)  # some fire seldom

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        one = torch.ones_like(x[:, :1])
        self.gate(torch.cat([x[:, 7:], -x[:, 7:], -one, one], 1))
        return nn.functional.cross_entropy(self.body(x) + self.inner(x), y)

    def train_dataloader(self) -> Any:
        x, y = distributed_run.samples()
        x[:, 7] = torch.arange(len(x)) % 2 * 2.0 - 1
        sampler: Any = DistributedSampler(
            TensorDataset(x, y), self.trainer.world_size, self.trainer.global_rank, shuffle=False
        )
        return DataLoader(TensorDataset(x, y), batch_size=self.rank_batch, sampler=sampler)


class Forgetful(Net):
    """Has a backbone that is trainable and that the optimizer was not given (or that gets no gradient)."""

    def __init__(self, detached: bool = False) -> None:
        super().__init__()
        self.detached = detached
        self.backbone = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        features = self.backbone(x)
        return nn.functional.cross_entropy(self.body(features.detach() if self.detached else features), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        given = self.parameters() if self.detached else self.body.parameters()
        return torch.optim.SGD(given, lr=0.1)


def shard(module: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    mesh = module.device_mesh["data_parallel"]
    for part in ("backbone", "inner"):
        if hasattr(module, part):
            fully_shard(getattr(module, part), mesh=mesh)
    fully_shard(module.body, mesh=mesh)


def sharded(base: type[Net]) -> type[Any]:
    return type(f"Sharded{base.__name__}", (base,), {"configure_model": shard})


# --- rules of a user's own


class Breaks(Rule):
    """Raises on one rank at step 2; on the other one it may go on to fire."""

    name = "breaks"

    def __init__(self, rank: int, fires_at: float = math.inf) -> None:
        self.rank, self.fires_at = rank, fires_at

    def update(self, step: int, readings: Any, notes: Any) -> Verdict | None:
        if step == 2 and os.environ["LOCAL_RANK"] == str(self.rank):
            raise ZeroDivisionError("a rule of the user's own")
        return self.verdict(step, "Enough.", "None.") if step >= self.fires_at else None


class Answers(Rule):
    """Gives an answer of its own at step 3, on one rank or on both (None)."""

    name = "answers"

    def __init__(self, answer: Any, rank: int | None, action: Any = "warn") -> None:
        self.answer, self.rank, self.action = answer, rank, action

    def update(self, step: int, readings: Any, notes: Any) -> Any:
        here = self.rank is None or os.environ["LOCAL_RANK"] == str(self.rank)
        return self.answer if step == 3 and here else None


# --- counting


class Counted(pl.Callback):
    """Collectives in each training step, by name, and how often ranks agreed on a yes or no."""

    def __init__(self) -> None:
        self.by_step: list[dict[str, int]] = []
        self._now: Counter[str] = Counter()
        self._patches: list[Any] = []

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for owner, names in ((dist, COLLECTIVES), (trainer.strategy, ("reduce_boolean_decision",))):
            for name in names:
                whole = getattr(owner, name)
                self._patches.append(mock.patch.object(owner, name, functools.partial(self._count, name, whole)))
                self._patches[-1].start()

    def _count(self, name: str, whole: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._now[name] += 1
        return whole(*args, **kwargs)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step:
            self.by_step.append(dict(self._now))
        self._now.clear()

    def teardown(self, *args: Any, **kwargs: Any) -> None:
        while self._patches:
            self._patches.pop().stop()


# --- scenarios


def fit(stop: EarlyTermination | None, *others: Any, scenario: str, **settings: Any) -> dict[str, Any]:
    """As `distributed_run.fit`, with all verdicts, with what on_stop was told and with what was recorded."""
    told: list[str] = []
    if stop is not None:
        stop.on_stop, stop.prints = lambda trainer, verdict: told.append(verdict.rule), False
    folder = Path(sys.argv[2]) / scenario
    callbacks = [*others, *([stop] if stop is not None else [])]
    result = distributed_run.fit(callbacks, folder=folder, **settings)
    result["told"] = told
    result["verdicts"] = [[action, verdict.to_dict()] for action, verdict in stop.verdicts] if stop else []
    result["failed"] = sorted(stop._rulebook.failed) if stop else []
    result["counts"] = [count for c in callbacks if isinstance(c, Counted) for count in c.by_step]
    return result


def diverging(step: int, rank: int) -> float:
    """Bad on rank 1 only, and not for long enough to be found before 20 steps of it."""
    return 2.0 + 0.01 * (step % 3) + (1000.0 if rank == 1 and step >= RISE_AT else 0.0)


def counting(module: pl.LightningModule, step: int) -> None:
    """The mean of `both` over ranks is step + 2; `alone` is logged on the first rank only."""
    module.log("both", float(step + 4 * module.global_rank))
    if module.global_rank == 0:
        module.log("alone", float(step), rank_zero_only=True)


def conditions(last: str = "stop") -> list[Rule]:
    return [
        StopWhen("both >= 6", name="both_warns", action="warn"),
        StopWhen("alone >= 6", name="alone_notes", action="shadow"),
        StopWhen("both >= 13 and alone < 1000", name="both_stops", action=last),  # type: ignore[arg-type]
    ]


def overfitting(epoch: int, rank: int) -> float:
    """Over the ranks best at epoch 2; on rank 0 alone it falls all the time."""
    return 1.0 - 0.05 * epoch if rank == 0 else 1.0 + 0.4 * abs(epoch - 2)


def overfitted(stop: EarlyTermination, **settings: Any) -> Callable[..., dict[str, Any]]:
    module = Odd(lambda step, rank: 2.0 / (1 + step), validation=overfitting)
    return functools.partial(
        fit, stop, module=module, max_epochs=14, limit_train_batches=3, limit_val_batches=1, **settings
    )


def judges() -> EarlyTermination:
    return EarlyTermination([Overfitting(), StopWhen("val_alone <= 0.7", action="warn")], cooldown=10_000)


def long_run() -> dict[str, Any]:
    """64 steps, looked at every 5."""
    return {"rank_batch": 1, "max_epochs": 2, "log_every_n_steps": LOG_EVERY, "module": Odd(diverging)}


def gates() -> list[Any]:
    return [ActivationMonitor(every_n_steps=1, looks=3)]


def idle() -> EarlyTermination:
    return EarlyTermination([DeadLayers()])


def ddp_scenarios() -> dict[str, Callable[..., dict[str, Any]]]:
    often = {"check_every_n_steps": 1}
    counts: dict[str, Any] = {"rank_batch": 2, "log_every_n_steps": LOG_EVERY}
    unwritable = Verdict("answers", 3, "Enough.", "None.", {"x": [(object(), 1.0)]})  # type: ignore[list-item]
    return {
        "diverging": lambda **k: fit(EarlyTermination(), **long_run(), **k),
        "diverging_shadow": lambda **k: fit(EarlyTermination(actions="shadow"), **long_run(), **k),
        "conditions": lambda **k: fit(
            EarlyTermination(conditions(), **often), module=Odd(metrics=counting), rank_batch=2, **k
        ),
        "conditions_shadow": lambda **k: fit(
            EarlyTermination(conditions("shadow"), **often), module=Odd(metrics=counting), rank_batch=2, **k
        ),
        "overfitting": overfitted(judges()),
        "breaks": lambda **k: fit(EarlyTermination([Breaks(1)], **often), **k),
        "breaks_and_stops": lambda **k: fit(EarlyTermination([Breaks(1, fires_at=5)], **often), **k),
        "one_sided_0": lambda **k: fit(EarlyTermination([NonFinite(), OneSided(0)], **often), **k),
        "answers_a_text": lambda **k: fit(EarlyTermination([Answers("stop!", 1), NonFinite()], **often), **k),
        "unwritable": lambda **k: fit(EarlyTermination([Answers(unwritable, None), NonFinite()], **often), **k),
        "unwritable_stop": lambda **k: fit(
            EarlyTermination([Answers(unwritable, None, "stop"), NonFinite()], **often), **k
        ),
        "counts_bare": lambda **k: fit(None, Counted(), **counts, **k),
        "counts_stop": lambda **k: fit(EarlyTermination(default_rules()), Counted(), **counts, **k),
        "counts_warn": lambda **k: fit(EarlyTermination(actions="warn"), Counted(), **counts, **k),
        "counts_all": lambda **k: fit(None, Counted(), DynWatch(ska=False, report=False), **counts, **k),
        "gated": lambda **k: fit(None, *gates(), module=Gated(), **k),
        "forgotten": lambda **k: fit(idle(), module=Forgetful(), **k),
        "detached": lambda **k: fit(idle(), strategy="ddp_unused", module=Forgetful(detached=True), **k),
        "exit_code": lambda **k: fit(
            EarlyTermination(conditions(), exit_code=EXIT_CODE, **often),
            module=Odd(metrics=counting),
            rank_batch=2,
            **k,
        ),
    }


def fsdp_scenarios() -> dict[str, Callable[..., dict[str, Any]]]:
    often = {"check_every_n_steps": 1}
    fsdp = functools.partial(fit, strategy="fsdp")
    return {
        "gated": lambda **k: fsdp(None, *gates(), module=sharded(Gated)(), **k),
        "forgotten": lambda **k: fsdp(idle(), module=sharded(Forgetful)(), **k),
        "detached": lambda **k: fsdp(idle(), module=sharded(Forgetful)(detached=True), **k),
        "conditions": lambda **k: fsdp(
            EarlyTermination(conditions(), **often), module=sharded(Odd)(metrics=counting), rank_batch=2, **k
        ),
    }


GROUPS = {"ddp": ddp_scenarios, "fsdp": fsdp_scenarios}


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100)  # shows where a run hangs
    torch.set_num_threads(1)
    for name, run in GROUPS[sys.argv[1]]().items():
        ended: SystemExit | None = None
        try:
            result = run(scenario=name)
        except SystemExit as error:
            result, ended = {"rank": int(os.environ["LOCAL_RANK"]), "ranks": 2, "code": error.code}, error
        (Path(sys.argv[2]) / f"{name}.{result['rank']}.json").write_text(json.dumps(result, default=str))
        if ended is not None:
            raise ended
