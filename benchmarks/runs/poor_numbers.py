"""Numbers that overflow, divide by zero or have no derivative."""

from __future__ import annotations

import torch
from catalogue import Goal, Run, poor
from healthy_classifiers import CANCER, DIGITS
from healthy_schedules import WAVES
from learner import Batch, Learner, adam, classify, regress, sgd
from models import mlp
from tasks import cancer, digits, waves
from torch import Tensor, nn


@poor("Half-way inputs become NaN.", DIGITS)
def inputs_become_nan(seed: int) -> Run:
    def spoil(batch: Batch, share: float) -> Batch:
        return [batch[0] * torch.nan, batch[1]] if share > 0.5 else batch

    module = Learner(mlp(64, 64, 10), classify, sgd(0.1), change=spoil)
    return Run(module, *digits(seed).loaders(50, seed), epochs=14)


@poor("One row in the data is NaN.", WAVES)
def one_row_nan(seed: int) -> Run:
    def spoil(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        x[0, 0] = torch.nan
        return x, y

    module = Learner(mlp(2, 64, 64, 1), regress, adam(3e-3))
    return Run(module, *waves(seed, 20000).change(spoil).loaders(40, seed), epochs=1)


@poor("Features are divided by their standard deviation, and one is constant: 0 / 0.", DIGITS)
def zero_deviation(seed: int) -> Run:
    def standard(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return (x - x.mean(0)) / x.std(0), y

    data = digits(seed).change_both(standard)
    return Run(Learner(mlp(64, 64, 10), classify, sgd(0.1)), *data.loaders(50, seed), epochs=12)


@poor("The logarithm of a probability that becomes 0.", CANCER)
def log_of_zero(seed: int) -> Run:
    def likelihood(net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch
        p = net(x).softmax(1)[:, 1]
        return -(y * p.log() + (1 - y) * (1 - p).log()).mean(), {"accuracy": ((p > 0.5) == y).float().mean()}

    return Run(Learner(mlp(30, 32, 2), likelihood, sgd(0.05)), *cancer(seed).loaders(32, seed), epochs=40)


@poor(
    "A distance without a safe square root: its gradient is NaN where a row meets itself.",
    Goal("val_loss", at_most=0.1),
)
def root_of_zero(seed: int) -> Run:
    def pairs(net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch
        other = torch.randperm(len(x))
        place, same = net(x), y == y[other]
        distance = (place - place[other]).square().sum(1).sqrt()
        loss = torch.where(same, distance, (1 - distance).relu()).square().mean()
        return loss, {"accuracy": ((distance < 0.5) == same).float().mean()}

    return Run(Learner(mlp(64, 64, 4), pairs, adam(3e-3)), *digits(seed).loaders(50, seed), epochs=14)


class HalfPrecision(nn.Module):
    """Passes its input through float16, whose largest number is 65504."""

    def forward(self, x: Tensor) -> Tensor:
        return x.half().float()


@poor("Activations that are too large for float16 from the start.", DIGITS)
def float16_overflow(seed: int) -> Run:
    net = nn.Sequential(mlp(64, 64, 64), HalfPrecision(), nn.ReLU(), nn.Linear(64, 10))
    data = digits(seed).change_both(lambda x, y: (2e5 * x, y))
    return Run(Learner(net, classify, adam(1e-3)), *data.loaders(50, seed), epochs=12)


@poor("Activations grow until float16 cannot hold them.", Goal("val_loss", at_most=1e8))
def float16_overflow_later(seed: int) -> Run:
    net = nn.Sequential(mlp(2, 64, 64, 1), HalfPrecision())
    data = waves(seed).change_both(lambda x, y: (x, 1e5 * (y + 1)))
    return Run(Learner(net, regress, adam(0.01)), *data.loaders(50, seed), epochs=12)


@poor("A variance without a lower bound goes to zero on data without noise.", Goal("val_loss", at_most=0.0))
def vanishing_variance(seed: int) -> Run:
    def likelihood(net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch
        mean, variance = net(x).chunk(2, dim=1)
        return (variance.sqrt().log() + 0.5 * (mean - y).square() / variance).mean(), {}

    net = mlp(2, 64, 64, 2)
    nn.init.constant_(net[-1].bias, 0.5)
    return Run(Learner(net, likelihood, adam(5e-3)), *waves(seed).loaders(50, seed), epochs=12)


@poor("exp() of an unbounded output overflows.", Goal("val_loss", at_most=1.0))
def exponential(seed: int) -> Run:
    def counts(net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch
        rate = net(x).exp()
        return (rate - (y + 1) * rate.log()).mean(), {}

    data = waves(seed).change_both(lambda x, y: (20 * x, y))
    return Run(Learner(mlp(2, 64, 64, 1), counts, sgd(0.05)), *data.loaders(50, seed), epochs=12)
