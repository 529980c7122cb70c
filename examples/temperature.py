"""Does the softmax radius tell where trouble begins? Step sizes tried at nine temperatures, in units of several radii.

Dividing logits by a temperature T makes a softmax sharper or blunter, and the radius in which the loss of a step can be
told from its Taylor series with it: ρ_a = π T / Δ, where Δ is the largest spread of the logits' derivatives along the
step (arXiv 2603.13552). If that radius decides, then steps of any T begin to do harm at the same r = τ / ρ. Small nets
learn digits. Then the step along the negative gradient is searched at which the loss on 256 of them comes to twice
its start, for temperatures from 1/4 to 4, in two ways:

* trained: each temperature has a net of its own, trained at it from the same initial weights.
* changed: one net, trained at T = 1, is given the other temperatures afterwards.

    python examples/temperature.py [--picture temperature.png] [--seeds 1]

The table has the standard deviation of the logarithm of the onset over the temperatures: .1 is a spread of 10 %. If r
spreads less than τ itself, the radius is worth something. B1 and B2 are tighter bounds (see dynwatch.step_radius).

What it shows: where T was there in training, all nets get into trouble at nearly the same r, about 3, whatever T is.
That is not 1: within the radius nothing happens, and it says nothing about how far beyond it the harm begins. Where T
is changed afterwards, normalising helps the tanh net by a factor of about three and the ReLU nets little or not at all
(the paper has .992 and .164, once). There the loss at a low T is that of a few digits that the net gets wrong, while
the radius is set by whichever digit's logits move most.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, jvp

from dynwatch.step_radius import Bound, batch_radius

TEMPERATURES = [2 ** (k / 2) for k in range(-4, 5)]
STEPS, BATCH, PROBED = 300, 64, 256
BOUNDS: dict[str, Bound] = {"r = tau / rho_a": "pi", "r of B1": "b1", "r of B2": "b2"}
NETS = ("tanh", "relu", "cnn")
WAYS = ("trained", "changed")
COLOURS = {"tanh": "#1f6fb4", "relu": "#e07b00", "cnn": "#2a8f4f"}


@dataclass(frozen=True)
class Onset:
    """Where the loss of a step comes to twice its start.

    Attributes:
        tau: Length of that step.
        r: The same in units of the radii, by name.
    """

    tau: float
    r: dict[str, float]


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)


def make(name: str) -> nn.Module:
    if name == "tanh":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    if name == "relu":
        hidden = (nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))
    stem = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU())
    return nn.Sequential(*stem, nn.Flatten(), nn.Linear(256, 10))


def trained(name: str, temperature: float, seed: int, x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(seed)
    net = make(name)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(STEPS):
        rows = torch.randint(len(y), (BATCH,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[rows]) / temperature, y[rows]).backward()
        optimizer.step()
    return net


def onset(net: nn.Module, temperature: float, x: Tensor, y: Tensor) -> Onset:
    """Search the step along the negative gradient that doubles the loss, at a temperature."""
    names = [name for name, _ in net.named_parameters()]
    weights = {name: p.detach() for name, p in net.named_parameters()}
    start = nn.functional.cross_entropy(net(x) / temperature, y)
    gradient = torch.autograd.grad(start, list(net.parameters()))
    length = torch.stack([g.norm() for g in gradient]).norm()
    direction = {name: -g / length for name, g in zip(names, gradient, strict=True)}

    def logits(at: dict[str, Tensor]) -> Tensor:
        return functional_call(net, at, (x,))

    z, a = jvp(logits, (weights,), (direction,))
    radii = {name: float(batch_radius(z, a, bound, temperature=temperature).radius) for name, bound in BOUNDS.items()}

    @torch.no_grad()
    def doubled(tau: float) -> bool:
        moved = {name: weights[name] + tau * direction[name] for name in names}
        return not float(nn.functional.cross_entropy(logits(moved) / temperature, y)) < 2 * float(start)

    low = high = 0.1 * radii["r = tau / rho_a"]
    while not doubled(high):
        low, high = high, 1.1 * high
    for _ in range(5):
        middle = (low + high) / 2
        low, high = (low, middle) if doubled(middle) else (middle, high)
    return Onset(high, {name: high / radius for name, radius in radii.items()})


def spread(values: list[float]) -> float:
    return statistics.stdev(math.log(value) for value in values)


def measure(way: str, name: str, seed: int, x: Tensor, y: Tensor) -> list[Onset]:
    """The onset at each temperature."""
    probed = slice(0, PROBED)
    if way == "changed":
        net = trained(name, 1.0, seed, x, y)
        return [onset(net, temperature, x[probed], y[probed]) for temperature in TEMPERATURES]
    nets = (trained(name, temperature, seed, x, y) for temperature in TEMPERATURES)
    return [onset(net, temperature, x[probed], y[probed]) for net, temperature in zip(nets, TEMPERATURES, strict=True)]


def draw(found: dict[str, dict[str, list[Onset]]], path: Path) -> None:
    """Onsets over temperature for both ways: lengths dashed, in radii solid."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (1200, 520), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(18)
    first = next(iter(BOUNDS))
    shown = [v for nets in found.values() for each in nets.values() for o in each for v in (o.tau, o.r[first])]
    low, high = math.log10(min(shown)) - 0.05, math.log10(max(shown)) + 0.05
    for i, (way, nets) in enumerate(found.items()):
        left, top, width, height = 80 + 580 * i, 50, 500, 380

        def at(
            k: int, value: float, left: int = left, top: int = top, w: int = width, h: int = height
        ) -> tuple[float, float]:
            return left + w * k / (len(TEMPERATURES) - 1), top + h * (1 - (math.log10(value) - low) / (high - low))

        for exponent in range(math.ceil(low), math.floor(high) + 1):
            _, down = at(0, 10.0**exponent)
            pen.line([(left, down), (left + width, down)], "#cccccc")
            pen.text((left - 8, down), f"{10.0**exponent:g}", "#333333", font, anchor="rm")
        for k in range(0, len(TEMPERATURES), 2):
            across, _ = at(k, 1.0)
            pen.text((across, top + height + 8), f"T = {TEMPERATURES[k]:g}", "#333333", font, anchor="mt")
        for name, onsets in nets.items():
            pen.line([at(k, o.r[first]) for k, o in enumerate(onsets)], COLOURS[name], 4, joint="curve")
            for k, o in enumerate(onsets):
                across, down = at(k, o.tau)
                pen.ellipse((across - 4, down - 4, across + 4, down + 4), outline=COLOURS[name], width=2)
        pen.rectangle((left, top, left + width, top + height), outline="#333333")
        pen.text((left, top - 8), f"Temperature {way}", "black", font, anchor="ls")
    for i, name in enumerate(NETS):
        pen.text((80 + 90 * i, 490), name, COLOURS[name], font, anchor="lm")
    pen.text((380, 490), f"lines: {first}; circles: tau, where the loss has doubled", "#333333", font, anchor="lm")
    image.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, help="where to draw the onsets of the first seed, as PNG")
    parser.add_argument("--seeds", type=int, default=1, help="how many initial weights to average the spreads over")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # nets this small gain nothing from more
    x, y = digits()
    print("Standard deviation of ln(onset) over temperatures from 1/4 to 4; and the onset in units of rho_a\n")
    print(
        f"{'temperature':13}{'net':8}{'tau':>8}"
        + "".join(f"{name:>17}" for name in BOUNDS)
        + f"{'onset, in rho_a':>20}"
    )
    drawn: dict[str, dict[str, list[Onset]]] = {}
    for way in WAYS:
        drawn[way] = {}
        for name in NETS:
            runs = [measure(way, name, seed, x, y) for seed in range(asked.seeds)]
            drawn[way][name] = runs[0]
            raw = statistics.mean(spread([o.tau for o in run]) for run in runs)
            normalised = {key: statistics.mean(spread([o.r[key] for o in run]) for run in runs) for key in BOUNDS}
            r = [o.r["r = tau / rho_a"] for run in runs for o in run]
            columns = "".join(f"{value:17.3f}" for value in normalised.values())
            print(f"{way:13}{name:8}{raw:8.3f}{columns}{f'{min(r):.1f} to {max(r):.1f}':>20}", flush=True)
    if asked.picture:
        draw(drawn, asked.picture)
        print(f"\nDrawn: {asked.picture}")


if __name__ == "__main__":
    main()
