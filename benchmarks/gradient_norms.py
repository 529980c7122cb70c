"""What watching gradient norms costs: the same GPT bare, with dynwatch, and with Lightning's own utility.

    python benchmarks/gradient_norms.py [--rounds 60]

All variants train in lockstep, one step each in turn. A figure is the median over rounds of a variant's
step time over the bare one's of the same round, so a machine whose speed drifts slows both alike.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from gpt import GPT, loader
from lockstep import lockstep
from pytorch_lightning.utilities import grad_norm

from dynwatch.callbacks import DynWatch, EarlyTermination, GradientNormMonitor

WARM_UP = 5


class LightningUtility(pl.Callback):
    """What Lightning's documentation recommends: its grad_norm, logged each step."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        pl_module.log_dict(grad_norm(pl_module, norm_type=2))


class OnePass(pl.Callback):
    """The least that torch's own norm costs: one fused pass over the gradients, nothing logged."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        torch._foreach_norm([p.grad for p in pl_module.parameters() if p.grad is not None])


def norms(update_ratio_every_n_steps: int = 0) -> GradientNormMonitor:
    return GradientNormMonitor(every_n_steps=1, update_ratio_every_n_steps=update_ratio_every_n_steps)


NORMS = "gradient norms, total and by layer, each step"
RATIOS = "the same and update ratios, each step"
STOP = "EarlyTermination(), each step"
ALL = "DynWatch without curvature, norms each step"
UTILITY = "Lightning's grad_norm utility, logged each step"
VARIANTS: dict[str, Callable[[], list[pl.Callback]]] = {
    "bare": list,
    "one bare torch._foreach_norm pass, each step": lambda: [OnePass()],
    NORMS: lambda: [norms()],
    RATIOS: lambda: [norms(update_ratio_every_n_steps=1)],
    STOP: lambda: [EarlyTermination()],
    ALL: lambda: [DynWatch(norms(), report=False, hessian=False)],
    UTILITY: lambda: [LightningUtility()],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    rounds = parser.parse_args().rounds + WARM_UP
    torch.set_num_threads(2)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)

    seconds = lockstep(VARIANTS, GPT, lambda: loader(rounds + 3), rounds, {UTILITY: {"log_every_n_steps": 1}})
    parameters = sum(p.numel() for p in GPT().parameters())
    print(f"\n{parameters / 1e6:.1f} M parameters, {rounds - WARM_UP} rounds, torch {torch.__version__}, 2 threads")
    print(f"{'':50} {'ms a step':>10} {'over bare':>10}   (middle half of the rounds)")
    over: dict[str, float] = {}
    for name, measured in seconds.items():
        pairs = list(zip(measured, seconds["bare"], strict=True))[WARM_UP:]
        ratios = [ours / bare - 1 for ours, bare in pairs]
        low, over[name], high = statistics.quantiles(ratios, n=4)
        spread = "" if name == "bare" else f"   ({low:+.1%} … {high:+.1%})"
        print(f"{name:50} {1e3 * statistics.median(measured[WARM_UP:]):10.1f} {over[name]:+10.1%}{spread}")

    print("\nWith their cadences, from the figures above:")
    ratio = over[RATIOS] - over[NORMS]
    print(f"{'GradientNormMonitor(every_n_steps=1)':61} {over[NORMS] + ratio / 50:+10.1%}   norms + ratios / 50")
    print(f"{'GradientNormMonitor()':61} {over[NORMS] / 10 + ratio / 50:+10.1%}   norms / 10 + ratios / 50")
    default = over[STOP] + (over[ALL] - over[STOP]) / 10 + ratio / 50
    print(f"{'DynWatch(hessian=False)':61} {default:+10.1%}   stop + (all - stop) / 10 + ratios / 50")
    print(f"Share of the utility's overhead: {(over[NORMS] + ratio / 50) / over[UTILITY]:.2f}")


if __name__ == "__main__":
    main()
