"""What a reading of the step radius costs: time in forward passes, share of a training step, overhead, memory.

    python benchmarks/step_radius.py [--rounds 40]

* A reading in a run: all that `StepRadiusMonitor` does at a step that is due, over one forward pass of the samples that
  it probes (loss and all, no graph). The first reading, which tries the ways to differentiate, stands apart.
* A bare forward-mode product on the whole batch over one training step of it. Fused attention has no forward mode, so
  the formula is used, as in a reading.
* Overhead in a run, in lockstep with a bare one (`lockstep.py`): each step read, and from that each fiftieth.
* Peak memory of a process that trains the GPT for some steps.
* The bounds by themselves, on the logits of large vocabularies.
"""

from __future__ import annotations

import argparse
import functools
import logging
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from gpt import CONTEXT, GPT, loader
from hessian import Digits, digits, nets
from lockstep import lockstep
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from dynwatch.callbacks import StepRadiusController, StepRadiusMonitor
from dynwatch.step_radius import Bound, batch_radius

SAMPLES = 32  # max_samples
WARM_UP = 5
NEVER = 10**9


class Timed(StepRadiusMonitor):
    """Times its own readings, and a forward pass of the same samples beside each."""

    def __init__(self, **options: Any) -> None:
        super().__init__(every_n_steps=1, max_samples=SAMPLES, **options)
        self.readings: list[float] = []
        self.forwards: list[float] = []
        self._spent = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._spent = seconds(lambda: super(Timed, self).on_train_batch_start(trainer, pl_module, batch, batch_idx))

    def measure_gradients(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._spent += seconds(lambda: super(Timed, self).measure_gradients(trainer, pl_module, optimizer))

    def end_step(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any) -> None:
        probed = [each[:SAMPLES] for each in batch]
        self.readings.append(
            self._spent + seconds(lambda: super(Timed, self).end_step(trainer, pl_module, outputs, batch))
        )
        with torch.no_grad():
            self.forwards.append(seconds(lambda: pl_module.training_step(probed, 0)))


class Net:
    """A module and its batches, made anew for each run."""

    def __init__(self, name: str, batch: int) -> None:
        self.name, self.batch = name, batch

    def module(self) -> pl.LightningModule:
        torch.manual_seed(0)
        return GPT() if self.name == "GPT" else Digits(nets()[self.name])

    def loader(self, batches: int) -> DataLoader[Any]:
        if self.name == "GPT":
            return loader(batches, self.batch)
        x, y = digits()
        rows = torch.randint(len(y), (batches * self.batch,), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x[rows], y[rows]), batch_size=self.batch)

    def __str__(self) -> str:
        return f"{self.name}, {self.batch}" + (f" x {CONTEXT}" if self.name == "GPT" else "")


NETS = (*(Net(name, SAMPLES) for name in ("MLP", "CNN", "transformer")), Net("GPT", 4))
IN_LOCKSTEP = (Net("transformer", 256), Net("GPT", 4))


def seconds(action: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - start


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fit(net: Net, callbacks: list[pl.Callback], steps: int) -> None:
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="auto",
        devices=1,
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(net.module(), net.loader(steps))


def median_ratio(ours: list[float], unit: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, unit, strict=True))


def readings(rounds: int) -> None:
    print("\nA reading in a run, in forward passes of the samples that it probes")
    print(f"{'samples':22}{'forward, ms':>12}{'reading':>9}{'with B2':>9}{'middle half':>16}{'first reading':>15}")
    for net in NETS:
        plain, scanning = Timed(), Timed(b2=True)
        for monitor in (plain, scanning):
            fit(net, [monitor], rounds + 1)
            if monitor.state()["way"] is None:
                raise SystemExit(f"{net}: nothing was measured")
        each = [a / b for a, b in zip(plain.readings[1:], plain.forwards[1:], strict=True)]
        low, _, high = statistics.quantiles(each, n=4)
        forward = statistics.median(plain.forwards[1:])
        print(
            f"{net!s:22}{1e3 * forward:12.2f}{statistics.median(each):9.2f}"
            f"{median_ratio(scanning.readings[1:], scanning.forwards[1:]):9.2f}{f'{low:.2f} … {high:.2f}':>16}"
            f"{plain.readings[0] / forward:15.1f}"
        )


def product_in_a_step(rounds: int) -> None:
    """A bare product and a training step on the same batch, in turn, without Lightning."""
    print("\nOne forward-mode product on the whole batch, without Lightning (the paper: +129 % of a ResNet-18 step)")
    print(f"{'batch':22}{'step, ms':>12}{'product':>9}{'in forward passes':>20}")
    for net in NETS:
        module = net.module()
        optimizer: Any = module.configure_optimizers()
        batch = next(iter(net.loader(1)))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        module.to(device)
        batch = [each.to(device) for each in batch]
        took: dict[str, list[float]] = {"step": [], "product": [], "forward": []}
        for _ in range(rounds + 1):
            took["step"].append(seconds(lambda o=optimizer, m=module, b=batch: step(m, o, b)))
            took["product"].append(seconds(lambda m=module, b=batch: product(m, b)))
            with torch.no_grad():
                took["forward"].append(seconds(lambda m=module, b=batch: m.training_step(b, 0)))
        took = {what: measured[1:] for what, measured in took.items()}
        share = median_ratio(took["product"], took["step"])
        passes = median_ratio(took["product"], took["forward"])
        print(f"{net!s:22}{1e3 * statistics.median(took['step']):12.2f}{share:+9.0%}{passes:20.2f}")


def step(module: Any, optimizer: torch.optim.Optimizer, batch: list[Tensor]) -> None:
    optimizer.zero_grad()
    module.training_step(batch, 0).backward()
    optimizer.step()


def product(module: Any, batch: list[Tensor]) -> None:
    """Along the gradient of the last step, which is a direction as good as any."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(p.detach(), p.grad) for name, p in module.named_parameters()}
        with torch.nn.utils.stateless._reparametrize_module(module, duals):
            module.training_step(batch, 0)


EACH, IDLE = "StepRadiusMonitor, each step", "the same, never due"
CAPPING, WAITING = "StepRadiusController, each step", "the same, never due"
VARIANTS: dict[str, Callable[[], list[pl.Callback]]] = {
    "bare": list,
    EACH: lambda: [StepRadiusMonitor(every_n_steps=1, max_samples=SAMPLES)],
    IDLE: lambda: [StepRadiusMonitor(every_n_steps=NEVER, max_samples=SAMPLES)],
    CAPPING: lambda: [StepRadiusController(every_n_steps=1, max_samples=SAMPLES)],
    f"{WAITING} (lr_jump=2)": lambda: [StepRadiusController(every_n_steps=NEVER, max_samples=SAMPLES, alert=1e9)],
}


def overhead(rounds: int) -> None:
    rounds += WARM_UP
    for net in IN_LOCKSTEP:
        took = lockstep(VARIANTS, net.module, lambda net=net: net.loader(rounds + 3), rounds, {})
        bare = took["bare"]
        print(f"\nIn a run, {net} a step, {SAMPLES} samples probed, in lockstep: {rounds - WARM_UP} rounds")
        print(f"{'':38}{'ms a step':>10}{'over bare':>11}   (middle half of the rounds)")
        over: dict[str, float] = {}
        for name, measured in took.items():
            ratios = [ours / plain - 1 for ours, plain in list(zip(measured, bare, strict=True))[WARM_UP:]]
            low, over[name], high = statistics.quantiles(ratios, n=4)
            middle = "" if name == "bare" else f"   ({low:+.1%} … {high:+.1%})"
            print(f"{name:38}{1e3 * statistics.median(measured[WARM_UP:]):10.1f}{over[name]:+11.1%}{middle}")
        fiftieth = (over[EACH] - over[IDLE]) / 50
        print(f"each 50th step: {fiftieth:+.2%} for the readings, {over[IDLE] + fiftieth:+.2%} with the steps between")


# --- memory, each case in a process of its own

MEMORY: dict[str, Callable[[], list[pl.Callback]]] = {
    "bare": list,
    "StepRadiusMonitor, first reading and others": lambda: [StepRadiusMonitor(every_n_steps=1)],
    "StepRadiusMonitor, after a resume": lambda: [resumed(StepRadiusMonitor(every_n_steps=1))],
    "StepRadiusController": lambda: [StepRadiusController(every_n_steps=1)],
}


def resumed(monitor: StepRadiusMonitor) -> StepRadiusMonitor:
    """One that knows already which way to differentiate, and so does not try any."""
    monitor.load_state({"way": ["forward", "", 0.0]})
    return monitor


def memory() -> None:
    net = Net("GPT", 4)
    weights = sum(p.numel() for p in net.module().parameters()) * 4 / 2**20
    print(f"\nPeak memory of a process that trains the GPT for four steps, MiB (its weights: {weights:.0f})")
    bare = 0.0
    for name in MEMORY:
        command = [sys.executable, __file__, "--memory", name]
        peak = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        bare = bare or peak
        print(f"{name:46}{peak:8.0f}{peak - bare:+8.0f}")


def bounds(rounds: int) -> None:
    print(
        "\nThe bounds by themselves: ms, and the samples that B2 scans. Logits have a standard deviation of 3; tangents"
    )
    print("that of 1 in all samples (alike), or one whose logarithm has a standard deviation of 1 over samples (mixed)")
    kinds: tuple[Bound, ...] = ("pi", "b1", "b1m", "b2")
    print(f"{'samples x classes':26}" + "".join(f"{kind:>10}" for kind in kinds) + f"{'scanned':>10}")
    generator = torch.Generator().manual_seed(0)
    for samples, classes in ((32, 10), (4 * CONTEXT, 256), (32, 32_000)):
        z, alike = (scale * torch.randn(samples, classes, generator=generator) for scale in (3.0, 1.0))
        mixed = alike * torch.randn(samples, 1, generator=generator).exp()
        for name, a in (("alike", alike), ("mixed", mixed)):
            took = [
                statistics.median(
                    seconds(functools.partial(batch_radius, z, a, kind)) for _ in range(max(3, rounds // 8))
                )
                for kind in kinds
            ]
            columns = "".join(f"{1e3 * each:10.2f}" for each in took)
            print(f"{f'{samples} x {classes}, {name}':26}{columns}{batch_radius(z, a, 'b2').scanned:10}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--memory", choices=MEMORY, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    torch.set_num_threads(1)  # most of these nets gain nothing from more
    if arguments.memory:
        fit(Net("GPT", 4), MEMORY[arguments.memory](), 4)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        return
    print(f"torch {torch.__version__}, one thread, {arguments.rounds} rounds")
    readings(arguments.rounds)
    product_in_a_step(arguments.rounds)
    bounds(arguments.rounds)
    memory()
    overhead(arguments.rounds)


if __name__ == "__main__":
    main()
