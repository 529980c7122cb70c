"""How high may the learning rate be, at which batch size? Predicted from curvature, and tried.

A small network learns 1000 digits for a while. Then, from the same weights, the critical learning rate is predicted for
several batch sizes B, and the rate at which real runs leave is searched by bisection. In theory (arXiv 2006.09092) it
grows in proportion to B for SGD and as the square root of B for Adam while noise dominates, and then saturates.

    python examples/batch_size.py [--picture batch_size.png] [--quick]

Two predictions stand beside what was measured. λ is the largest eigenvalue for all the data, U and V the spread of the
samples' Hessians across and along its eigenvector, s = 1/B - 1/N.

* "sharpness": 2/λ' with λ' = λ + U s / λ, the mean largest eigenvalue of batches of B samples (`directional`). That is
  what `HessianMonitor` logs as `hessian/critical_lr_at_batch_size/<B>`. For Adam it is 38/λ' (the monitor
  has the v̂ of its run for all B).
* "mean square": where E w² begins to grow on random quadratics, 2 / (λ/a + (U + V) s / λ), with a = 1 for SGD and
  a = (1 + β₁)/(1 - β₁) = 19 for Adam. Momentum averages the oscillation away, but not the noise, which comes anew
  with each batch: so only λ is divided. It is exact for one direction with a curvature that is drawn anew at each step
  (the largest eigenvalue of the map of second moments is 1 there).

For Adam all is in the coordinates of its preconditioner 1/(√v̂ + ε), with the v̂ that a long run with batches of B has
at these weights: the mean square of a batch's gradient. The smaller the batch, the larger v̂; hence the square root.

A run starts at the same weights, with fresh random batches and, for Adam, with that v̂ and the mean gradient as its
state. It has left when the loss on all the data comes to twice its start within 40 steps. That is a choice: a rate
that is just critical takes longer to show, and a net that is thrown out may settle in a flatter place (a catapult). So
agreement within a factor of two is as much as can be expected; what should agree is how the rate grows with B.

What it shows: both predictions fit SGD within a factor of about two. For Adam "sharpness" does not: it gives the noise,
too, the room that only the oscillation has, and comes out some twenty times too high for the smallest batches; the mean
square fits, and grows like the root. With all the data v̂ is that of a single gradient, zero in many places; the real
one grows as soon as the weights move, so the run bears more than either says.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from dynwatch.batch_size import directional, spread_of_chunks
from dynwatch.lanczos import extreme_eigenvalues
from dynwatch.learning_rate import critical_lr, critical_lr_adam
from dynwatch.operators import Operator, flatten, hessian, preconditioned, unflatten

if TYPE_CHECKING:
    from PIL import ImageDraw

SAMPLES = 1000
SIZES = (4, 8, 16, 32, 64, 128, 256, SAMPLES)
CHUNKS = 32  # for the spread of the Hessian
STEPS = 40  # of a run that is tried
LOWEST, HIGHEST = 1e-4, 1e2  # learning rates
BETA1, EPS = 0.9, 1e-8
SHARPNESS, MEAN_SQUARE, MEASURED, GUIDE = "#e07b00", "#1f6fb4", "#111111", "#888888"
LEGEND = {
    "predicted, sharpness of batches": SHARPNESS,
    "predicted, mean square": MEAN_SQUARE,
    "measured: median and range": MEASURED,
    "as B (SGD), as its root (Adam)": GUIDE,
}


@dataclass(frozen=True)
class Row:
    """Critical learning rates at a batch size."""

    size: int
    sharpness: float
    mean_square: float
    noise: float  # share of the noise in what makes it unstable, by the mean square
    tried: list[float]  # one for each seed

    @property
    def measured(self) -> float:
        return statistics.median(self.tried)


class Task:
    """A network with trained weights, to which it can be put back, and its data."""

    def __init__(self, steps: int = 150) -> None:
        digits = load_digits()
        self.x = torch.tensor(digits.data[:SAMPLES], dtype=torch.float32) / 16
        self.y = torch.tensor(digits.target[:SAMPLES])
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
        self.parameters = list(self.net.parameters())
        optimizer = torch.optim.SGD(self.parameters, lr=0.1, momentum=0.9)
        for _ in range(steps):
            self.step(optimizer, torch.randint(SAMPLES, (64,)))
        self.trained = [p.detach().clone() for p in self.parameters]
        self.start = float(self.loss(slice(None)).detach())
        self.order = torch.randperm(SAMPLES)

    def loss(self, rows: Tensor | slice) -> Tensor:
        return nn.functional.cross_entropy(self.net(self.x[rows]), self.y[rows])

    def step(self, optimizer: torch.optim.Optimizer, rows: Tensor | slice) -> None:
        optimizer.zero_grad()
        self.loss(rows).backward()
        optimizer.step()

    @torch.no_grad()
    def put_back(self) -> None:
        for parameter, trained in zip(self.parameters, self.trained, strict=True):
            parameter.copy_(trained)

    def mean_squares(self) -> Callable[[int], Tensor]:
        """E g² of the gradient of a random batch, [n], by the size of the batch."""
        rows = range(SAMPLES)
        each = torch.stack([flatten(torch.autograd.grad(self.loss(slice(i, i + 1)), self.parameters)) for i in rows])
        variance, square = each.var(0), each.mean(0).square()
        return lambda size: square + variance * (1 / size - 1 / SAMPLES)

    def predict(self, size: int, scale: Tensor | None, gain: float) -> tuple[float, float, float]:
        """The mean sharpness of batches, the critical rate by the mean square, and the noise's share in it."""

        def operator(rows: Tensor | slice) -> Operator:
            plain = hessian(self.loss(rows), self.parameters)
            return plain if scale is None else preconditioned(plain, scale)

        whole = operator(slice(None))
        found = extreme_eigenvalues(whole, start=whole.gradient)
        chunks = self.order.chunk(CHUNKS)
        spread = spread_of_chunks([operator(rows)(found.top) for rows in chunks], found.top, [len(r) for r in chunks])
        sharpness, _ = directional(found.lambda_max, spread, size, SAMPLES)
        noise = (spread.outer + spread.along) * (1 / size - 1 / SAMPLES) / found.lambda_max
        pull = found.lambda_max / gain + noise
        return sharpness, 2 / pull, noise / pull

    def leaves(self, optimizer: torch.optim.Optimizer, size: int, seed: int) -> bool:
        """Whether a run from the trained weights comes to twice their loss."""
        generator = torch.Generator().manual_seed(seed)
        for step in range(STEPS):
            drawn = torch.randint(SAMPLES, (size,), generator=generator)
            self.step(optimizer, drawn if size < SAMPLES else slice(None))
            if step % 5 == 4:
                with torch.no_grad():
                    loss = float(self.loss(slice(None)))
                if not loss < 2 * self.start:  # NaN, too
                    return True
        return False

    def search(self, make: Callable[[float], torch.optim.Optimizer], size: int, seed: int, halvings: int) -> float:
        """The learning rate at which runs begin to leave."""
        low, high = LOWEST, HIGHEST
        for _ in range(halvings):
            middle = math.sqrt(low * high)
            self.put_back()
            if self.leaves(make(middle), size, seed):
                high = middle
            else:
                low = middle
        self.put_back()
        return math.sqrt(low * high)


def sgd(task: Task, size: int, seeds: int, halvings: int) -> Row:
    sharpness, mean_square, noise = task.predict(size, None, gain=1.0)
    tried = [
        task.search(lambda lr: torch.optim.SGD(task.parameters, lr=lr), size, seed, halvings) for seed in range(seeds)
    ]
    return Row(size, critical_lr(sharpness), mean_square, noise, tried)


def adam(task: Task, size: int, seeds: int, halvings: int, mean_squares: Callable[[int], Tensor]) -> Row:
    square = mean_squares(size)
    gradient = flatten(torch.autograd.grad(task.loss(slice(None)), task.parameters))

    def make(lr: float) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(task.parameters, lr=lr, betas=(BETA1, 0.999), eps=EPS)
        states = zip(
            task.parameters, unflatten(gradient, task.parameters), unflatten(square, task.parameters), strict=True
        )
        for parameter, mean, mean_of_squares in states:
            optimizer.state[parameter] = {
                "step": torch.tensor(1e5),  # a long run: no start-up correction
                "exp_avg": mean.clone(),
                "exp_avg_sq": mean_of_squares.clone(),
            }
        return optimizer

    scale = (square.sqrt() + EPS).rsqrt()
    sharpness, mean_square, noise = task.predict(size, scale, gain=(1 + BETA1) / (1 - BETA1))
    tried = [task.search(make, size, seed, halvings) for seed in range(seeds)]
    return Row(size, critical_lr_adam(sharpness, BETA1), mean_square, noise, tried)


def noisy(rows: list[Row]) -> list[Row]:
    """Those in which noise is at least half of what makes the optimizer unstable."""
    return [row for row in rows if row.noise >= 0.5]


def slope(rows: list[Row], values: list[float]) -> float:
    """Of the values against the batch size, both in logarithms; NaN for fewer than two."""
    if len(rows) < 2:
        return math.nan
    return float(np.polyfit(np.log([row.size for row in rows]), np.log(values), 1)[0])


def print_table(name: str, rows: list[Row], theory: str) -> None:
    print(f"\n{name}: critical learning rate\n")
    print(f"{'':8}{'---- predicted ----':>24}{'------ measured ------':>28}{'predicted / measured':>25}{'noise':>8}")
    print(
        f"{'B':>8}{'sharpness':>12}{'mean square':>13}{'median':>10}{'range':>17}{'sharpness':>12}{'mean square':>13}"
    )
    for row in rows:
        label = "all" if row.size == SAMPLES else row.size
        extent = f"{min(row.tried):.2g} to {max(row.tried):.2g}"
        print(
            f"{label:>8}{row.sharpness:12.4f}{row.mean_square:13.4f}{row.measured:10.4f}{extent:>17}"
            f"{row.sharpness / row.measured:12.2f}{row.mean_square / row.measured:13.2f}{row.noise:8.0%}"
        )
    fitted = noisy(rows)
    if len(fitted) < 2:
        print("Noise dominates at fewer than two of these sizes: no slope.")
        return
    slopes = [slope(fitted, [getattr(r, kind) for r in fitted]) for kind in ("sharpness", "mean_square", "measured")]
    print(
        f"Slope in logarithms over B = {fitted[0].size} to {fitted[-1].size}, where noise is the larger part: "
        f"sharpness {slopes[0]:.2f}, mean square {slopes[1]:.2f}, measured {slopes[2]:.2f} ({theory} in the limit)."
    )


def draw(tables: dict[str, list[Row]], path: Path) -> None:
    """The tables as two log-log plots; needs Pillow 10.1."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (2400, 1180), "white")
    pen = ImageDraw.Draw(image)
    for i, (name, rows) in enumerate(tables.items()):
        plot(pen, name, rows, left=150 + 1210 * i, top=90, power=(1.0, 0.5)[i])
    font = ImageFont.load_default(32)
    across = 200
    for label, colour in LEGEND.items():
        pen.line([(across, 1126), (across + 70, 1126)], colour, 8)
        pen.text((across + 86, 1126), label, "#333333", font, anchor="lm")
        across += 150 + int(font.getlength(label))
    image.resize((1200, 590), Image.Resampling.LANCZOS).save(path, optimize=True)


def plot(pen: ImageDraw.ImageDraw, name: str, rows: list[Row], left: int, top: int, power: float) -> None:
    """One table, in a frame of 1000 x 860 pixels, with a guide that grows as a power of the batch size."""
    from PIL import ImageFont

    small, large = (ImageFont.load_default(size) for size in (30, 40))
    width, height = 1000, 860
    shown = [rate for row in rows for rate in (row.sharpness, row.mean_square, *row.tried)]
    bottom, ceiling = math.log10(min(shown) / 1.4), math.log10(max(shown) * 1.4)
    first, last = math.log2(rows[0].size) - 0.5, math.log2(rows[-1].size) + 0.5

    def at(size: float, rate: float) -> tuple[float, float]:
        across, up = (math.log2(size) - first) / (last - first), (math.log10(rate) - bottom) / (ceiling - bottom)
        return left + width * across, top + height * (1 - up)

    for row in rows:
        across, _ = at(row.size, 1.0)
        pen.line([(across, top), (across, top + height)], "#eeeeee", 2)
        label = "all" if row.size == SAMPLES else str(row.size)
        pen.text((across, top + height + 12), label, "#333333", small, anchor="mt")
    for exponent in range(math.floor(bottom), math.ceil(ceiling)):
        for digit in (1, 2, 5):
            rate = digit * 10.0**exponent
            if bottom < math.log10(rate) < ceiling:
                _, down = at(rows[0].size, rate)
                pen.line([(left, down), (left + width, down)], "#cccccc" if digit == 1 else "#eeeeee", 2)
                pen.text((left - 14, down), f"{rate:g}", "#333333", small, anchor="rm")
    sizes = [rows[0].size * 1.06**i for i in range(100)]
    guide = [(size, rows[0].measured * (size / rows[0].size) ** power) for size in sizes if size <= rows[-1].size]
    guide = [(size, rate) for size, rate in guide if math.log10(rate) < ceiling]
    for here, there in zip(guide[::2], guide[1::2], strict=False):
        pen.line([at(*here), at(*there)], GUIDE, 4)
    for colour, kind in ((SHARPNESS, "sharpness"), (MEAN_SQUARE, "mean_square")):
        pen.line([at(row.size, getattr(row, kind)) for row in rows], colour, 7, joint="curve")
    for row in rows:
        across, down = at(row.size, row.measured)
        pen.line([at(row.size, min(row.tried)), at(row.size, max(row.tried))], MEASURED, 5)
        pen.ellipse((across - 12, down - 12, across + 12, down + 12), fill=MEASURED)
    pen.rectangle((left, top, left + width, top + height), outline="#333333", width=2)
    pen.text((left, top - 24), f"{name}: critical learning rate", "black", large, anchor="ls")
    pen.text((left + width / 2, top + height + 62), "batch size", "#333333", small, anchor="mt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="where to draw the tables, as PNG")
    parser.add_argument("--quick", action="store_true", help="four batch sizes, one run each")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # a net this small gains nothing from more
    sizes, seeds, halvings = ((4, 16, 64, SAMPLES), 1, 7) if asked.quick else (SIZES, 5, 10)
    task = Task()
    print(f"A net of {sum(p.numel() for p in task.parameters)} parameters, loss {task.start:.3f} on {SAMPLES} digits.")
    tables = {"SGD": [sgd(task, size, seeds, halvings) for size in sizes]}
    print_table("SGD", tables["SGD"], theory="1")
    mean_squares = task.mean_squares()
    tables["Adam"] = [adam(task, size, seeds, halvings, mean_squares) for size in sizes]
    print_table("Adam", tables["Adam"], theory="0.5")
    if asked.picture:
        draw(tables, asked.picture)
        print(f"\nDrawn: {asked.picture}")


if __name__ == "__main__":
    main()
