"""A network that learns without backpropagation, each layer from its own entropy, and stops when its decisions stand.

The forward-only learner of "structured knowledge accumulation" (arXiv 2504.03214): sigmoid layers, all samples in each
pass, no labels and no loss. Layer by layer the weights go down the gradient of the entropy of the layer's own step,
from what it has stored of the pass before. 100 handwritten digits of each class, layers 64-256-128-64-10 (the paper:
784 inputs), weights near zero.

    python examples/ska_forward_only.py [--logdir logs/ska] [--picture ska.png] [--budget 8]

`SKAMonitor` draws entropy, alignment, flow and Tensor Net of each layer, and the rule `ska_equilibrium` ends the run.
It is done at four learning rates eta, each with the same budget eta K for K passes, because of what the paper claims:
that curves over t = eta k do not depend on eta. They converge as eta goes to 0, as those of any Euler scheme do. What
the layers learn is to be sure, of whatever they were inclined to: the labels are never looked at.
"""

from __future__ import annotations

import argparse
import logging
import math
import warnings
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from dynwatch.callbacks import EarlyTermination, SKAMonitor
from dynwatch.rules import SKAEquilibrium
from dynwatch.ska import entropy_gradient
from dynwatch.ska_crossings import zero_crossings

WIDTHS = (64, 256, 128, 64, 10)
RATES = (0.04, 0.02, 0.01, 0.005)
PER_CLASS, PROBED, LAYERS = 100, 250, len(WIDTHS) - 1
SHOWN = 2.0  # how much of t the picture has: later nothing turns
COLOURS = ((31, 111, 180), (224, 123, 0), (42, 143, 79), (160, 60, 150))
PANELS = {
    "entropy": "Entropy since the start, bits",
    "alignment": "Alignment (cosine)",
    "flow": "Knowledge flow",
    "net": "Tensor Net, over eta",
}

Curve = list[tuple[float, float]]  # of t and a reading


class ForwardOnly(pl.LightningModule):
    """Sigmoid layers, each of which descends its own entropy.

    Args:
        widths: Of the input and of each layer.
        lr: The learning rate eta.
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS, lr: float = 0.01) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lr = lr
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        self.before: list[Tensor] = []  # knowledge of the pass before

    def forward(self, x: Tensor) -> list[Tensor]:
        """The knowledge (pre-activations) of each layer."""
        knowledge: list[Tensor] = []
        for layer in self.layers:
            knowledge.append(layer(torch.sigmoid(knowledge[-1]) if knowledge else x))
        return knowledge

    @torch.no_grad()
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        knowledge = self(batch)
        if self.before:  # the first pass has nothing to compare with
            below = [batch, *map(torch.sigmoid, self.before[:-1])]
            for layer, z, old, inputs in zip(self.layers, knowledge, self.before, below, strict=True):
                gradient = entropy_gradient(z, old)
                layer.weight.grad = gradient.T @ inputs / len(batch)
                layer.bias.grad = gradient.mean(0)
            optimizer.step()
        self.before = knowledge

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


@dataclass(frozen=True)
class Run:
    """What the event file of a run says.

    Attributes:
        curves: By kind of reading and layer.
        passes: How many there were.
        settled: t from which on the network was at equilibrium; NaN if it never was.
        reason: Why it was ended.
    """

    curves: dict[str, list[Curve]]
    passes: int
    settled: float
    reason: str


def digits() -> Tensor:
    """100 images of each class, in [0, 1], in a random order that is always the same."""
    data = load_digits()
    rows = np.concatenate([np.flatnonzero(data.target == label)[:PER_CLASS] for label in range(10)])
    return torch.tensor(data.data[np.random.default_rng(0).permutation(rows)], dtype=torch.float32) / 16


def train(lr: float, budget: float, logdir: Path) -> Run:
    pl.seed_everything(0, verbose=False)
    # The layer that runs last is no classifier here, and is read as well.
    monitor = SKAMonitor(every_n_steps=1, include_last=True, max_samples=PROBED, forward=lambda module, x: module(x))
    stop = EarlyTermination([SKAEquilibrium(action="stop", min_steps=0)])
    stop.prints = False  # the table has it
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=TensorBoardLogger(logdir, name=None, version=f"eta_{lr:g}", default_hp_metric=False),
        callbacks=[monitor, stop],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(ForwardOnly(lr=lr), DataLoader([digits()] * round(budget / lr), batch_size=None))  # type: ignore[arg-type]
    return read(Path(str(trainer.log_dir)), stop.verdict.reason if stop.verdict else "")


def read(folder: Path, reason: str) -> Run:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    time = {event.step: event.value for event in events.Scalars("ska/time")}
    curves = {
        kind: [
            [(time[event.step], event.value) for event in events.Scalars(f"ska/layers.{layer}/{kind}") if event.step]
            for layer in range(LAYERS)
        ]
        for kind in PANELS
    }
    settled = (
        events.Scalars("ska/settled_time")[-1].value if "ska/settled_time" in events.Tags()["scalars"] else math.nan
    )
    return Run(curves, max(time) + 1, settled, reason)


def last_crossing(curve: Curve) -> float:
    """t at which the series changes its sign for the last time; NaN if it never does."""
    found = zero_crossings([value for _, value in curve])
    if not found:
        return math.nan
    whole, share = divmod(found[-1].position, 1.0)
    (a, _), (b, _) = curve[int(whole)], curve[min(int(whole) + 1, len(curve) - 1)]
    return a + share * (b - a)


def peak(curve: Curve) -> float:
    """t of the largest value."""
    return max(curve, key=lambda point: point[1])[0]


def table(runs: dict[float, Run]) -> list[str]:
    """For each rate the times of all layers, and since when the network was at equilibrium."""
    heads = [f"layer {layer + 1}" for layer in range(LAYERS)]
    lines = [f"{'':>8}{'':>8}{'Net crosses zero at t':^36}{'flow is largest at t':^36}"]
    lines += [f"{'eta':>8}{'passes':>8}" + "".join(f"{head:>9}" for head in heads * 2) + f"{'equilibrium':>14}"]
    for lr, run in runs.items():
        times = [last_crossing(curve) for curve in run.curves["net"]] + [peak(curve) for curve in run.curves["flow"]]
        columns = "".join(f"{'-' if math.isnan(time) else f'{time:.3f}':>9}" for time in times)
        lines.append(f"{lr:8g}{run.passes:8}{columns}{run.settled:14.3f}")
    return lines


def picture(runs: dict[float, Run]) -> Any:
    """Four panels over t: a colour for each layer, paler where eta is larger."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (1200, 780), "white")
    pen, font, small = ImageDraw.Draw(image), ImageFont.load_default(18), ImageFont.load_default(14)
    for i, (kind, title) in enumerate(PANELS.items()):
        left, top, width, height = 80 + 590 * (i % 2), 50 + 360 * (i // 2), 500, 280
        curves: list[tuple[int, float, Curve]] = []
        for lr, run in runs.items():
            scale = lr if kind == "net" else 1.0
            for layer, curve in enumerate(run.curves[kind]):
                curves.append((layer, lr, [(t, value / scale) for t, value in curve if t <= SHOWN]))
        values = [value for _, _, curve in curves for _, value in curve]
        low, high = min([*values, 0.0]), max([*values, 0.0])
        margin = 0.05 * (high - low)
        low, high = low - margin, high + margin

        def at(
            t: float, value: float, low: float = low, high: float = high, x: int = left, y: int = top
        ) -> tuple[float, float]:
            return x + 500 * t / SHOWN, y + 280 * (high - value) / (high - low)

        pen.line([at(0, 0), at(SHOWN, 0)], (190, 190, 190))
        for layer, lr, curve in curves:
            pale = 0.7 * RATES[::-1].index(lr) / (len(RATES) - 1)
            colour = tuple(round(c + (255 - c) * pale) for c in COLOURS[layer])
            pen.line([at(t, value) for t, value in curve], colour, 3, joint="curve")
        pen.rectangle((left, top, left + width, top + height), outline=(60, 60, 60))
        pen.text((left, top - 8), title, "black", font, anchor="ls")
        for value in (low + margin, high - margin):
            pen.text((left - 8, at(0, value)[1]), f"{value:.3g}".replace("\N{MINUS SIGN}", "-"), "#333333", small, "rm")
        for t in (0.0, SHOWN / 2, SHOWN):
            pen.text((at(t, low)[0], top + height + 8), f"t = {t:g}", "#333333", small, anchor="mt")
    for layer in range(LAYERS):
        pen.text((80 + 100 * layer, 755), f"layer {layer + 1}", COLOURS[layer], font, anchor="lm")
    pen.text((520, 755), f"eta = {', '.join(f'{lr:g}' for lr in runs)}: from pale to dark", "#333333", font, "lm")
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, default=Path("logs/ska"))
    parser.add_argument("--picture", type=Path, help="where to save the trajectories as PNG, too")
    parser.add_argument("--budget", type=float, default=8.0, help="eta K: learning rate times passes, of each run")
    asked = parser.parse_args()
    if not asked.budget >= SHOWN:
        parser.error(f"--budget {asked.budget:g} is less than the picture shows: give {SHOWN:g} or more")
    for name in ("pytorch_lightning", "lightning.pytorch", "dynwatch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", ".*(does not have many workers|smaller than the logging interval|treespec).*")
    torch.set_num_threads(1)  # a net this small gains nothing from more

    print(f"Forward-only learning of digits, eta K = {asked.budget:g}. No labels, no loss, no backpropagation.\n")
    runs = {lr: train(lr, asked.budget, asked.logdir) for lr in RATES}
    print("\n".join(table(runs)))
    slowest = runs[RATES[-1]]
    print(f"\nAt eta = {RATES[-1]:g}: {slowest.reason or 'the budget was spent before equilibrium.'}")
    print(
        "The smaller eta, the less do curves over t depend on it. The crossing is said to mark an onset, never the end."
    )
    drawn = picture(runs)
    if asked.picture:
        drawn.save(asked.picture, optimize=True)
    with SummaryWriter(str(asked.logdir / "all")) as writer:
        writer.add_image("ska/trajectories", np.asarray(drawn), dataformats="HWC")
    print(f"\nAll runs, and the picture under Images: tensorboard --logdir {asked.logdir}")


if __name__ == "__main__":
    main()
