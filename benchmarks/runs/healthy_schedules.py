"""Learning rates that rise, fall, cycle or jump on purpose."""

from __future__ import annotations

import math

from catalogue import Goal, Run, healthy
from healthy_classifiers import DIGITS
from learner import Learner, MakeSchedule, adamw, by_share, classify, predict_next, regress, sgd
from models import Transformer, cnn, mlp
from tasks import digits, linear, text, waves
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, CyclicLR, LRScheduler, OneCycleLR, StepLR

TEXT = Goal("val_loss", at_most=2.55)
WAVES = Goal("val_loss", at_most=0.03)


def warm_up_then_cosine(warm_up: float) -> MakeSchedule:
    """Linear for a share of the run, then half a cosine to 0."""

    def factor(share: float) -> float:
        if share < warm_up:
            return (share + 1e-3) / warm_up
        return 0.5 * (1 + math.cos(math.pi * (share - warm_up) / (1 - warm_up)))

    return by_share(factor)


@healthy("Warm-up for a tenth of the run, then a cosine.", TEXT)
def warm_up_cosine(seed: int) -> Run:
    module = Learner(Transformer(128, 32), predict_next, adamw(5e-3), warm_up_then_cosine(0.1))
    return Run(module, *text(seed, n_train=9600).loaders(24, seed), epochs=1)


@healthy("Warm-up for a third of the run: nothing much happens at first.", DIGITS)
def long_warm_up(seed: int) -> Run:
    module = Learner(mlp(64, 64, 10), classify, adamw(2e-3), warm_up_then_cosine(0.33))
    return Run(module, *digits(seed).loaders(50, seed), epochs=14)


@healthy("A learning rate that falls to zero in a line: the last steps change nothing.", DIGITS)
def decay_to_zero(seed: int) -> Run:
    module = Learner(cnn(), classify, sgd(0.08), by_share(lambda share: 1 - share))
    return Run(module, *digits(seed).loaders(50, seed), epochs=12)


@healthy("Triangles of the learning rate: the loss goes up and down with them.", DIGITS)
def cyclic(seed: int) -> Run:
    def triangles(optimizer: Optimizer, steps: int) -> LRScheduler:
        return CyclicLR(optimizer, base_lr=1e-3, max_lr=0.4, step_size_up=steps // 8)

    return Run(Learner(mlp(64, 64, 10), classify, sgd(0.1), triangles), *digits(seed).loaders(50, seed), epochs=14)


@healthy("Cosines with warm restarts.", WAVES)
def restarts(seed: int) -> Run:
    def cosines(optimizer: Optimizer, steps: int) -> LRScheduler:
        return CosineAnnealingWarmRestarts(optimizer, T_0=steps // 4)

    module = Learner(mlp(2, 64, 64, 1), regress, adamw(0.01), cosines)
    return Run(module, *waves(seed).loaders(50, seed), epochs=12)


@healthy("One cycle up to a high learning rate and down to nothing.", DIGITS)
def one_cycle(seed: int) -> Run:
    def cycle(optimizer: Optimizer, steps: int) -> LRScheduler:
        return OneCycleLR(optimizer, max_lr=0.2, total_steps=steps + 1)

    return Run(Learner(cnn(), classify, sgd(0.1), cycle), *digits(seed).loaders(50, seed), epochs=12)


@healthy(
    "The loss stays on a noisy plateau until the learning rate is divided by ten, which helps.",
    Goal("val_loss", at_most=0.25),
)
def step_decay(seed: int) -> Run:
    def steps_down(optimizer: Optimizer, steps: int) -> LRScheduler:
        return StepLR(optimizer, step_size=int(0.6 * steps), gamma=0.05)

    module = Learner(mlp(20, 1), regress, sgd(0.06, momentum=0.5), steps_down)
    return Run(module, *linear(seed, 4000, signal=0.8).loaders(8, seed), epochs=1)


@healthy("The learning rate is twelve times too high for a few steps, and the loss recovers from it.", DIGITS)
def brief_bump(seed: int) -> Run:
    bump = by_share(lambda share: 12.0 if 0.4 < share < 0.41 else 1.0)
    module = Learner(mlp(64, 64, 10), classify, sgd(0.05), bump)
    return Run(module, *digits(seed).loaders(50, seed), epochs=14)


@healthy("The learning rate doubles when the loss is low already.", DIGITS)
def late_rise(seed: int) -> Run:
    module = Learner(cnn(), classify, sgd(0.03), by_share(lambda share: 1.0 if share < 0.5 else 4.0))
    return Run(module, *digits(seed).loaders(50, seed), epochs=12)
