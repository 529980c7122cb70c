"""What watching a mixture of experts costs: health on a step that is due, on one that is not, and a look at pathways.

    python benchmarks/moe.py [--rounds 150]

* Health: fits in lockstep (`lockstep.py`), one bare, one read at every step, one never. The monitor's own time on a
  step, beside it, is what it spends in its hooks; watching the operations of a block comes on top of that.
* A look at pathways: its time over that of a training step and of a bare forward pass of the same samples, the
  distances of pathways alone, and the share of a run at the default cadence.

The models are the one of `examples/moe_language_model.py`, and the GPT of the other benchmarks with a mixture of 16
experts in each of its six layers, of which a token gets 2.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from gpt import GPT, WIDTH, loader
from lockstep import lockstep
from torch import Tensor, nn
from torch.utils.data import DataLoader

from dynwatch.callbacks import MoEPathwayMonitor
from dynwatch.pathways import pathway_distance, pathways

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import moe_language_model as example

NEVER = 10**9


class Timed(MoEPathwayMonitor):
    """Times its own work on each step, and a forward pass of the probe beside each look at it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.own: list[float] = []
        self.looks: list[float] = []
        self.forwards: list[float] = []
        self._inside = False
        self._now = 0.0

    def guarded(self, trainer: Any, action: Any, *args: Any, **kwargs: Any) -> Any:
        if self._inside:
            return super().guarded(trainer, action, *args, **kwargs)
        self._inside, began = True, time.perf_counter()
        try:
            return super().guarded(trainer, action, *args, **kwargs)
        finally:
            self._inside = False
            self._now += time.perf_counter() - began

    def on_train_batch_start(self, *args: Any) -> None:
        self.own.append(self._now)
        self._now = 0.0
        super().on_train_batch_start(*args)

    def _look_at_pathways(self, trainer: Any, pl_module: Any) -> None:
        began = time.perf_counter()
        super()._look_at_pathways(trainer, pl_module)
        self.looks.append(time.perf_counter() - began)
        with torch.no_grad():
            began = time.perf_counter()
            for batch, _ in self._reader.probe.batches:
                pl_module.training_step(batch, 0)
            self.forwards.append(time.perf_counter() - began)


class Mixture(nn.Module):
    """Feed-forward experts with a linear gate."""

    def __init__(self, experts: int = 16, top_k: int = 2) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH)) for _ in range(experts)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.gate(flat).softmax(-1).topk(self.top_k)
        mixed = torch.zeros_like(flat)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            mixed = mixed.index_add(0, token, expert(flat[token]) * weights[token, slot, None])
        return mixed.view_as(x)


class MixtureGPT(GPT):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp = Mixture()


def example_loader() -> DataLoader[Any]:
    return DataLoader(example.library() * 3, batch_size=example.BATCH)


Make = tuple[Callable[[], pl.LightningModule], Callable[[], DataLoader[Any]]]
MODELS: dict[str, Make] = {
    "example, 3 x 2 of 8": (lambda: example.Writer(example.RUNS[0]), example_loader),
    "GPT, 6 x 2 of 16": (MixtureGPT, lambda: loader(500)),
}


def health(rounds: int) -> None:
    print(f"Health, {rounds} steps of each in lockstep")
    print(f"{'':28}{'step, ms':>10}{'never due':>11}{'each step':>11}{'own, ms':>9}{'own share':>11}")
    for name, (module, data) in MODELS.items():
        timed = Timed(every_n_steps=1, probe_every_n_steps=NEVER)
        seconds = lockstep(
            {
                "bare": list,
                "never": lambda: [MoEPathwayMonitor(every_n_steps=NEVER, probe_every_n_steps=NEVER)],
                "each": lambda timed=timed: [timed],
            },
            module,
            data,
            rounds,
            {},
        )
        bare = seconds["bare"][10:]
        over = {
            kind: statistics.median(a / b for a, b in zip(seconds[kind][10:], bare, strict=True)) - 1
            for kind in ("never", "each")
        }
        step, own = statistics.median(bare), statistics.median(timed.own[11:])
        print(
            f"{name:28}{1e3 * step:10.1f}{over['never']:+11.1%}{over['each']:+11.1%}{1e3 * own:9.2f}{own / step:11.1%}"
        )


def looks(rounds: int) -> None:
    print("\nA look at the pathways of 64 samples")
    print(f"{'':28}{'look, ms':>10}{'in steps':>10}{'in forwards':>13}{'distances, ms':>15}{'of a run':>10}")
    for name, (module, data) in MODELS.items():
        torch.manual_seed(0)
        timed = Timed(every_n_steps=NEVER, probe_every_n_steps=10)
        steps: list[float] = []

        class Clock(pl.Callback):
            def on_train_batch_start(self, *_: Any, steps: list[float] = steps) -> None:
                steps.append(time.perf_counter())

            def on_before_zero_grad(self, *_: Any, steps: list[float] = steps) -> None:
                steps[-1] = time.perf_counter() - steps[-1]

        trainer = pl.Trainer(
            max_steps=max(rounds // 2, 30),
            accelerator="cpu",
            devices=1,
            logger=False,
            callbacks=[timed, Clock()],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module(), data())
        look, forward = statistics.median(timed.looks[1:]), statistics.median(timed.forwards[1:])
        step = statistics.median(s for s in steps[5:] if s < 1e3)
        gates = [nn.functional.softmax(torch.randn(64, 32), -1) for _ in range(3)]
        began = time.perf_counter()
        pathway_distance(pathways(gates))
        distances = time.perf_counter() - began
        print(
            f"{name:28}{1e3 * look:10.1f}{look / step:10.1f}{look / forward:13.2f}{1e3 * distances:15.1f}"
            f"{look / (look + 100 * step):10.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="What watching a mixture of experts costs.")
    parser.add_argument("--rounds", type=int, default=150, help="steps of each fit")
    rounds = parser.parse_args().rounds
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    health(rounds)
    looks(rounds)


if __name__ == "__main__":
    main()
