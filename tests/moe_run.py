"""Mixtures of experts on two ranks, as a program: `python moe_run.py GROUP FOLDER` writes JSON by rank."""

from __future__ import annotations

import faulthandler
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moes
import torch
from distributed_run import SAMPLES, Net, fit
from hessian_run import failing_on_1
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from dynwatch.callbacks import MoEPathwayMonitor, moe_health, moe_pathways

Scenario = Callable[[], dict[str, Any]]


class Sequences(Dataset[dict[str, Any]]):
    """Padded sequences with a domain."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randn(SAMPLES, 7, moes.WIDTH, generator=generator)
        self.mask = (torch.arange(7) < torch.randint(3, 8, (SAMPLES, 1), generator=generator)).long()
        self.y = self.x[..., :5].argmax(-1)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> dict[str, Any]:
        item = {"x": self.x[i], "labels": self.y[i], "attention_mask": self.mask[i]}
        return item | {"domain": ("fruit", "trees")[i // 3 % 2]}


class MixtureNet(Net):
    style = "linear"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = moes.Net(self.style)  # type: ignore[assignment]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:  # type: ignore[override]
        return nn.functional.cross_entropy(self.body(batch["x"]).flatten(0, 1), batch["labels"].flatten())

    def train_dataloader(self) -> DataLoader[Any]:  # type: ignore[override]
        data = Sequences()
        sampler = DistributedSampler(data, self.trainer.world_size, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, batch_size=self.rank_batch, sampler=sampler)


class DroppingNet(MixtureNet):
    style = "dispatch"


class ShardedMixtureNet(MixtureNet):
    style = "stacked"

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        mesh = self.device_mesh["data_parallel"]
        for block in self.body.blocks:  # type: ignore[union-attr]
            fully_shard(block, mesh=mesh)
        fully_shard(self.body, mesh=mesh)


class StackedNet(MixtureNet):
    style = "stacked"


def watched(strategy: str = "ddp", module: Net | None = None, fit_with: Any = (), **arguments: Any) -> dict[str, Any]:
    options = {"every_n_steps": 1, "probe_every_n_steps": 3, "max_samples": 8, "memorized": True} | arguments
    monitor = MoEPathwayMonitor(**options)
    result = fit([monitor], strategy, module or MixtureNet(), **dict(fit_with))
    stream = monitor._stream
    return result | {"reasons": stream.reasons if stream else {}}


def failing(owner: Any, name: str, call: int) -> dict[str, Any]:
    with failing_on_1(owner, name, call):
        return watched()


def ddp_scenarios() -> dict[str, Scenario]:
    return {
        "bare": lambda: fit([], module=MixtureNet()),
        "linear": watched,
        "dispatch": lambda: watched(module=DroppingNet()),
        "accumulated": lambda: watched(fit_with={"accumulate_grad_batches": 2}),
        "failing_count": lambda: failing(moe_health.HealthTally, "add", 20),
        "failing_look": lambda: failing(moe_pathways, "sample_gates", 4),
    }


def fsdp_scenarios() -> dict[str, Scenario]:
    return {
        "bare": lambda: fit([], "fsdp", ShardedMixtureNet()),
        "stacked": lambda: watched("fsdp", ShardedMixtureNet()),
    }


GROUPS: dict[str, Callable[[], dict[str, Scenario]]] = {"ddp": ddp_scenarios, "fsdp": fsdp_scenarios}

if __name__ == "__main__":
    faulthandler.dump_traceback_later(100)  # shows where a run hangs
    torch.set_num_threads(1)
    for scenario, run in GROUPS[sys.argv[1]]().items():
        result = run()
        (Path(sys.argv[2]) / f"{scenario}.{result['rank']}.json").write_text(json.dumps(result))
