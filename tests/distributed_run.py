"""Runs on two ranks, as a program: `python distributed_run.py GROUP FOLDER` starts both and writes JSON by rank.

One launch runs all scenarios of a group, because starting processes takes longer than training them.
"""

from __future__ import annotations

import faulthandler
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import dynwatch.gradients
from dynwatch.callbacks import DynWatch, EarlyTermination, GradientNormMonitor
from dynwatch.rules import NonFinite, Rule, Verdict

SAMPLES, GLOBAL_BATCH, STEPS = 64, 8, 8
CLIP = 0.3


class Body(nn.Module):
    """Sizes that two ranks cannot halve: 17 rows, and a parameter of one entry, which leaves a rank without any."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 17)
        self.last = nn.Linear(17, 4)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.last(torch.tanh(self.first(x)))


class Net(pl.LightningModule):
    """`trouble(module, batch_idx, loss)` may change the loss or raise."""

    def __init__(self, trouble: Callable[[Net, int, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.rank_batch = 0
        torch.manual_seed(0)
        self.body = Body()
        self.trouble = trouble

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.body(x), y)
        return self.trouble(self, batch_idx, loss) if self.trouble else loss

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        # Lightning's own sampler would shuffle: then ranks together would not see the batches of one process.
        data: TensorDataset = TensorDataset(*samples())
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=self.rank_batch, sampler=sampler)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class ShardedNet(Net):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        fully_shard(self.body.first, mesh=mesh)
        fully_shard(self.body, mesh=mesh)


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, 8, generator=generator)
    return x, x[:, :4].argmax(1)


class Recorder(Logger):
    """Keeps what this rank logs; Lightning's own loggers write on the first rank only."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__()
        self.folder = folder
        self.readings: dict[str, dict[int, float]] = {}

    @property
    def save_dir(self) -> str | None:
        return str(self.folder) if self.folder else None

    @property
    def name(self) -> str:
        return "recorder"

    @property
    def version(self) -> str:
        return "0"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        for tag, value in metrics.items():
            self.readings.setdefault(tag, {})[step] = float(value)

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass


class Weights(pl.Callback):
    """A digest of the weights (of this rank's shards) before every batch, and of the run's end."""

    def __init__(self) -> None:
        self.before: list[str] = []
        self.end = ""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        self.before.append(_digest(pl_module, trainer))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end = _digest(pl_module, trainer)


def _digest(module: nn.Module, trainer: pl.Trainer) -> str:
    kept = [p.detach() for p in module.parameters()]
    kept += [v for o in trainer.optimizers for s in o.state.values() for v in s.values() if isinstance(v, Tensor)]
    local = [t.to_local() if hasattr(t, "to_local") else t for t in kept]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in local)).hexdigest()


def fit(
    callbacks: list[Any],
    strategy: str = "ddp",
    module: Net | None = None,
    rank_batch: int = 4,
    folder: Path | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Train for one epoch and return what there is to compare, as primitives.

    `strategy` is "ddp", "ddp_unused" (some parameters get no gradient) or "fsdp" for two ranks, "single" for one
    process; `folder` is the log folder.
    """
    strategies: dict[str, dict[str, Any]] = {
        "single": {"devices": 1},
        "ddp": {"devices": 2, "strategy": "ddp"},
        "ddp_unused": {"devices": 2, "strategy": "ddp_find_unused_parameters_true"},
        "fsdp": {
            "devices": 2,
            "strategy": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
            if strategy == "fsdp"
            else None,
        },
    }
    recorder, weights = Recorder(folder), Weights()
    trainer = pl.Trainer(
        **{
            "accelerator": "cpu",
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "logger": recorder,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
            "callbacks": [weights, *callbacks],
            **strategies[strategy],
            **settings,
        }
    )
    module = module or (ShardedNet if strategy == "fsdp" else Net)()
    module.rank_batch = rank_batch
    trainer.fit(module)
    stop = next((c for c in callbacks if isinstance(c, EarlyTermination)), None)
    watch = next((c for c in callbacks if isinstance(c, DynWatch)), None)
    verdict = stop.verdict if stop else watch.verdict if watch else None
    monitors = [m for c in callbacks for m in getattr(c, "monitors", [c]) if hasattr(m, "off")]
    return {
        "rank": trainer.global_rank,
        "ranks": trainer.world_size,
        "steps": trainer.global_step,
        "readings": recorder.readings,
        "weights_before": weights.before,
        "weights": weights.end,
        "verdict": verdict.to_dict() if verdict else None,
        "off": {type(m).__name__: m.off for m in monitors},
    }


def everything(norm_type: float = 2.0, **stop: Any) -> list[Any]:
    return [
        DynWatch(
            gradients=GradientNormMonitor(every_n_steps=1, norm_type=norm_type, update_ratio_every_n_steps=1),
            stop=EarlyTermination(**({"check_every_n_steps": 1} | stop)),
            report=False,
        )
    ]


# --- trouble on one rank


def nan_from(step: int, rank: int = 1) -> Callable[[Net, int, Tensor], Tensor]:
    return lambda module, i, loss: loss * math.nan if i >= step and module.global_rank == rank else loss


def raise_at(step: int, rank: int) -> Callable[[Net, int, Tensor], Tensor]:
    def trouble(module: Net, batch_idx: int, loss: Tensor) -> Tensor:
        if batch_idx == step and module.global_rank == rank:
            raise RuntimeError(f"the user's own error on rank {rank}")
        return loss

    return trouble


PLACES = ("begin", "measure_gradients", "end_step", "finish", "read", "after_flush")


def clumsy(base: type[Any], place: str, **arguments: Any) -> Any:
    """A monitor of a subclass that raises in one of its methods, on rank 1 and from its third call on."""
    calls = []

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(place)
        if os.environ["LOCAL_RANK"] == "1" and (place == "begin" or len(calls) > 2):
            raise ZeroDivisionError(f"clumsy in {place}")
        return getattr(base, place)(self, *args, **kwargs)

    return type(f"Clumsy{base.__name__}", (base,), {place: method})(**arguments)


class OneSided(Rule):
    """Fires on one rank only."""

    name = "one_sided"

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def update(self, step: int, readings: Any, notes: Any) -> Verdict | None:
        fires = step == 3 and os.environ["LOCAL_RANK"] == str(self.rank)
        return Verdict(self.name, step, "This rank has had enough.", "None.", weights_suspect=False) if fires else None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def with_failing(owner: Any, name: str, file: str, call: int, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run while one call of a function, among those that come from a source file, fails on rank 1."""
    whole, inherited = getattr(owner, name), name not in vars(owner)
    calls = []

    def failing(*args: Any, **kwargs: Any) -> Any:
        if sys._getframe(1).f_code.co_filename.endswith(file):
            calls.append(name)
            if len(calls) == call and os.environ["LOCAL_RANK"] == "1":
                raise MemoryError(f"call {call} of {name}")
        return whole(*args, **kwargs)

    setattr(owner, name, failing)
    try:
        return run()
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, whole)


# --- scenarios: each returns what `fit` returns

ACCUMULATED: dict[str, Any] = {"accumulate_grad_batches": 2, "rank_batch": 2}


def _folder() -> Path:
    return Path(sys.argv[2])


def _checkpoint(name: str) -> ModelCheckpoint:
    return ModelCheckpoint(_folder() / name, every_n_train_steps=1, save_top_k=-1)


def ddp_scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    gradients = {"every_n_steps": 1, "update_ratio_every_n_steps": 1}
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "norm_2": lambda: fit(everything(), gradient_clip_val=CLIP),
        "norm_inf": lambda: fit(everything(math.inf)),
        "norm_1": lambda: fit(everything(1.0)),
        "accumulated": lambda: fit(everything(), **ACCUMULATED),
        "bare": lambda: fit([]),
        "watched": lambda: fit(everything()),
        "nan_each_step": lambda: fit(everything(), module=Net(nan_from(3))),
        "nan_default_cadence": lambda: fit(
            everything(check_every_n_steps=None), module=Net(nan_from(3)), log_every_n_steps=5
        ),
        "one_sided": lambda: fit(
            [
                EarlyTermination([NonFinite(), OneSided(1)], check_every_n_steps=1),
                _checkpoint("one_sided"),
            ],
            enable_checkpointing=True,
        ),
    }
    for place in PLACES:
        found[f"clumsy_gradients_{place}"] = lambda place=place: fit(  # type: ignore[misc]
            [clumsy(GradientNormMonitor, place, **gradients), EarlyTermination(check_every_n_steps=2)]
        )
        if place != "after_flush":  # where the ranks agree on a stop, in one collective
            found[f"clumsy_stop_{place}"] = lambda place=place: fit(  # type: ignore[misc]
                [GradientNormMonitor(**gradients), clumsy(EarlyTermination, place, check_every_n_steps=2)]
            )
    return found


def fsdp_scenarios() -> dict[str, Callable[[], dict[str, Any]]]:
    from torch.distributed.tensor import DTensor

    found: dict[str, Callable[[], dict[str, Any]]] = {
        "norm_2": lambda: fit(everything(), "fsdp"),
        "norm_inf": lambda: fit(everything(math.inf), "fsdp"),
        "norm_1": lambda: fit(everything(1.0), "fsdp"),
        "bare": lambda: fit([], "fsdp"),
        "nan_each_step": lambda: fit(everything(), "fsdp", ShardedNet(nan_from(3))),
        "nan_default_cadence": lambda: fit(
            everything(check_every_n_steps=None), "fsdp", ShardedNet(nan_from(3)), log_every_n_steps=5
        ),
        "one_sided": lambda: fit(
            [EarlyTermination([NonFinite(), OneSided(1)], check_every_n_steps=1), _checkpoint("one_sided")],
            "fsdp",
            enable_checkpointing=True,
        ),
        "failing_search": lambda: with_failing(
            torch, "isfinite", "gradients.py", 1, lambda: fit(everything(), "fsdp", ShardedNet(nan_from(3)))
        ),
        "failing_copy": lambda: with_failing(DTensor, "clone", "after_step.py", 7, lambda: fit(everything(), "fsdp")),
    }
    # A step takes the norms of the gradients, of the weights before it, and of their change.
    for call in (4, 5, 6):
        found[f"failing_norm_{call}"] = lambda call=call: with_failing(  # type: ignore[misc]
            dynwatch.gradients, "_local_norms", "gradients.py", call, lambda: fit(everything(), "fsdp")
        )
    return found


def raising_scenarios(rank: int) -> dict[str, Callable[[], dict[str, Any]]]:
    return {"raising": lambda: fit(everything(), module=Net(raise_at(3, rank)))}


GROUPS: dict[str, Callable[[], dict[str, Callable[[], dict[str, Any]]]]] = {
    "ddp": ddp_scenarios,
    "fsdp": fsdp_scenarios,
    "raising_0": lambda: raising_scenarios(0),
    "raising_1": lambda: raising_scenarios(1),
}


if __name__ == "__main__":
    faulthandler.dump_traceback_later(100)  # shows where a run hangs
    torch.set_num_threads(1)
    for scenario, run in GROUPS[sys.argv[1]]().items():
        result = run()
        (_folder() / f"{scenario}.{result['rank']}.json").write_text(json.dumps(result))
