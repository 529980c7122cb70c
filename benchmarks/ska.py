"""What a probe of `SKAMonitor` costs: time in forward passes of the probe batch, and what it holds in memory.

    python benchmarks/ska.py [--rounds 40]

A probe in a run is all that the monitor does at a step that is due, with its defaults; beside each one forward pass of
the same samples is timed (the module's step without a graph). "Formulas" is `LayerKnowledge.measure` on what the pass
gave, by itself. The first probe, which runs the batch twice, stands apart. In a small net the rest is Python: putting
back all that a step might change takes some milliseconds, whatever the net.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from gpt import CONTEXT, GPT, loader
from hessian import Digits, digits, nets
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dynwatch.callbacks import SKAMonitor
from dynwatch.callbacks.knowledge import fixed_part
from dynwatch.ska_layer import LayerKnowledge

SAMPLES = 128


class WideCNN(nn.Sequential):
    """A CNN whose forward pass takes some tens of milliseconds."""

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(64, 128, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(128 * 64, 256), nn.ReLU(), nn.Linear(256, 10)),
        )


class Timed(SKAMonitor):
    """Times its own probes, and a forward pass of the same samples beside each."""

    def __init__(self) -> None:
        super().__init__(every_n_steps=1)
        self.probes: list[float] = []
        self.forwards: list[float] = []

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        took = seconds(lambda: super(Timed, self).on_train_batch_start(trainer, pl_module, batch, batch_idx))
        if not self.probes:
            self.probes.append(took)
            self.forwards.append(took)

    def end_step(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any) -> None:
        self.probes.append(seconds(lambda: super(Timed, self).end_step(trainer, pl_module, outputs, batch)))
        probed = [each[:SAMPLES] for each in batch]
        with torch.no_grad():
            self.forwards.append(seconds(lambda: pl_module.training_step(probed, 0)))


def seconds(action: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def digits_loader(batches: int, batch: int) -> DataLoader[Any]:
    x, y = digits()
    rows = torch.randint(len(y), (batches * batch,), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x[rows], y[rows]), batch_size=batch)


def images_loader(batches: int, batch: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 32, 32, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)
    return DataLoader([(x, y)] * batches, batch_size=None)  # type: ignore[arg-type]


CASES: dict[str, tuple[Callable[[], pl.LightningModule], Callable[[int], DataLoader[Any]]]] = {
    "MLP on digits, 128": (lambda: Digits(nets()["MLP"]), lambda n: digits_loader(n, 128)),
    "CNN on digits, 128": (lambda: Digits(nets()["CNN"]), lambda n: digits_loader(n, 128)),
    "CNN, 128 x 3 x 32 x 32": (lambda: Digits(WideCNN()), lambda n: images_loader(n, 128)),
    f"GPT, 4 x {CONTEXT}": (GPT, lambda n: loader(n, 4)),
    f"GPT, 16 x {CONTEXT}": (GPT, lambda n: loader(n, 16)),
}


def formulas(module: pl.LightningModule, batch: Any, monitor: SKAMonitor) -> float:
    """Seconds of the arithmetic alone, on what the layers give."""
    parts: list[torch.Tensor] = []
    hooks = [
        child.register_forward_hook(lambda m, _, out: parts.append(fixed_part(m, out, SAMPLES, monitor.max_units)))
        for child in module.modules()
        if isinstance(child, (nn.Linear, nn.Conv2d))
    ]
    with torch.no_grad():
        module.training_step([each[:SAMPLES] for each in batch], 0)
    for hook in hooks:
        hook.remove()
    layers = [LayerKnowledge() for _ in parts[:-1]]

    def all_of_them() -> None:
        for layer, part in zip(layers, parts, strict=False):
            layer.measure(part)

    all_of_them()
    return statistics.median(seconds(all_of_them) for _ in range(10))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, one thread, {rounds} probes; in forward passes of the probe batch")
    print(
        f"{'':26}{'forward, ms':>12}{'probe':>8}{'middle half':>16}{'less, ms':>10}{'formulas':>10}{'first':>8}"
        f"{'layers':>8}{'held, MiB':>11}"
    )
    for name, (module_of, loader_of) in CASES.items():
        torch.manual_seed(0)
        monitor, module, batches = Timed(), module_of(), loader_of(rounds + 1)
        trainer = pl.Trainer(
            max_steps=rounds + 1,
            accelerator="auto",
            devices=1,
            logger=False,
            callbacks=[monitor],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        )
        trainer.fit(module, batches)
        if monitor.off or not monitor._layers:
            raise SystemExit(f"{name}: nothing was measured: {monitor.off}")
        ratios = [probe / forward for probe, forward in zip(monitor.probes[2:], monitor.forwards[2:], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        forward = statistics.median(monitor.forwards[2:])
        extra = statistics.median(p - f for p, f in zip(monitor.probes[2:], monitor.forwards[2:], strict=True))
        own = formulas(module, next(iter(batches)), monitor)
        held = sum(layer.state_dict()["before"].nbytes for layer in monitor._layers.values()) / 2**20
        print(
            f"{name:26}{1e3 * forward:12.2f}{middle:8.2f}{f'{low:.2f} … {high:.2f}':>16}{1e3 * extra:10.1f}"
            f"{own / forward:10.2f}{monitor.probes[0] / forward:8.1f}{len(monitor._layers):8}{held:11.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
