"""Regressions, generative models, reinforcement learning: losses of other sizes, signs and shapes."""

from __future__ import annotations

import torch
from catalogue import Goal, Run, healthy
from healthy_classifiers import DIGITS
from healthy_schedules import WAVES
from learner import Batch, Learner, adam, adamw, classify, reconstruct, regress, sgd
from models import mlp
from special import Bandit, Contrastive, Denoiser, Gan, Pole, Variational, gaussian
from tasks import diabetes, digits, linear, ring, waves
from torch import Tensor, nn
from torch.nn import functional

DIABETES = Goal("val_loss", at_most=0.75)  # of a variance of 1; a linear model reaches about 0.5
PIXELS = Goal("val_loss", at_most=0.035)  # the mean image has 0.073
GAN = Goal("val_loss", at_most=0.2)  # 0.6 at first
BANDIT = Goal("val_reward", at_least=0.7)  # 0.1 at first


@healthy("A small real regression, with weight decay.", DIABETES)
def diabetes_mlp(seed: int) -> Run:
    module = Learner(mlp(10, 16, 1), regress, sgd(0.01, weight_decay=0.05))
    return Run(module, *diabetes(seed).loaders(34, seed), epochs=32)


@healthy("A smooth function, with Adam.", WAVES)
def smooth_regression(seed: int) -> Run:
    return Run(Learner(mlp(2, 64, 64, 1), regress, adam(5e-3)), *waves(seed).loaders(50, seed), epochs=12)


@healthy(
    "Only 15 % of the variance can be known, and it is found: the loss hardly falls.", Goal("val_loss", at_most=0.93)
)
def weak_signal(seed: int) -> Run:
    module = Learner(mlp(20, 1), regress, sgd(2e-3))
    return Run(module, *linear(seed, 16000, signal=0.15).loaders(32, seed), epochs=1)


@healthy("Rows sorted by difficulty: the loss rises while the model gets better.", Goal("val_loss", at_most=0.1))
def harder_and_harder(seed: int) -> Run:
    def by_size(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        y = y + 1.5 * x.square().mean(1, keepdim=True) * torch.randn(y.shape)
        order = x.norm(dim=1).argsort()
        return x[order], y[order]

    module = Learner(mlp(20, 1), regress, adam(2e-3))
    return Run(module, *linear(seed, 16000, signal=1.0).change(by_size).loaders(32, seed, shuffle=False), epochs=1)


@healthy("The first batches happen to be easy: the loss starts far below its later values.", WAVES)
def lucky_start(seed: int) -> Run:
    def easy_first(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        order = torch.cat([y[:, 0].abs().argsort()[:300], torch.randperm(len(y))])
        return x[order], y[order]

    module = Learner(mlp(2, 64, 64, 1), regress, adam(3e-3))
    return Run(module, *waves(seed, 30000, noise=0.02).change(easy_first).loaders(50, seed, shuffle=False), epochs=1)


@healthy("A Gaussian likelihood: the loss goes below zero.", Goal("val_loss", at_most=-0.5))
def negative_loss(seed: int) -> Run:
    return Run(Learner(mlp(2, 64, 64, 2), gaussian, adam(3e-3)), *waves(seed).loaders(50, seed), epochs=14)


@healthy("A loss summed over rows and pixels: thousands at first.", Goal("val_loss", at_most=1000.0))
def summed_loss(seed: int) -> Run:
    def summed(net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, _ = reconstruct(net, batch)
        return loss * batch[0].numel(), {}

    return Run(Learner(mlp(64, 32, 64), summed, adam(3e-3)), *digits(seed).loaders(100, seed), epochs=28)


@healthy("An autoencoder of digits.", PIXELS)
def autoencoder(seed: int) -> Run:
    return Run(Learner(mlp(64, 64, 24, 64, 64), reconstruct, adam(3e-3)), *digits(seed).loaders(50, seed), epochs=16)


@healthy("A variational autoencoder; the weight of its second term rises slowly.", Goal("val_pixels", at_most=0.055))
def vae(seed: int) -> Run:
    module = Variational(lambda share: min(1.0, share * 4), adam(3e-3))
    return Run(module, *digits(seed).loaders(50, seed), epochs=16)


@healthy("A term of the loss is switched on half-way: the loss jumps and stays up.", Goal("val_pixels", at_most=0.055))
def term_switched_on(seed: int) -> Run:
    module = Variational(lambda share: float(share > 0.5), adam(3e-3))
    return Run(module, *digits(seed).loaders(50, seed), epochs=16)


@healthy("A diffusion model of points: the loss falls at once, then is flat and noisy.", Goal("val_loss", at_most=0.5))
def diffusion(seed: int) -> Run:
    return Run(Denoiser(adam(3e-3)), *ring(seed, 30000).loaders(64, seed), epochs=1)


@healthy("Pairs of noisy views of digits are to find each other.", Goal("val_accuracy", at_least=0.4))
def contrastive(seed: int) -> Run:
    return Run(Contrastive(adamw(2e-3)), *digits(seed).loaders(100, seed), epochs=24)


@healthy("Two networks play against each other: the loss ends where it began.", GAN)
def gan(seed: int) -> Run:
    return Run(Gan(), *ring(seed, 64 * 1000).loaders(64, seed), epochs=1)


@healthy("The same with a quicker critic: the loss rises first, while the points get better.", GAN)
def gan_quick_critic(seed: int) -> Run:
    return Run(Gan(lr=3e-4, critic_lr=3e-3, penalty=0.02), *ring(seed, 64 * 1000).loaders(64, seed), epochs=1)


@healthy("REINFORCE where each digit is a bandit: a loss around zero that says nothing.", BANDIT)
def bandit(seed: int) -> Run:
    return Run(Bandit(adam(0.01)), *digits(seed).loaders(50, seed), epochs=28)


@healthy("REINFORCE balances a pole.", Goal("val_reward", at_least=0.7))
def pole(seed: int) -> Run:
    return Run(Pole(adam(1e-3)), *Pole.starts(seed, 16 * 300).loaders(16, seed), epochs=1)


@healthy("A few corrupted batches in the middle: the loss leaps and recovers.", DIGITS)
def corrupted_batches(seed: int) -> Run:
    def corrupt(batch: Batch, share: float) -> Batch:
        x, y = batch
        return [100 * torch.randn_like(x), y] if 0.5 < share < 0.51 else batch

    module = Learner(mlp(64, 64, 10), classify, sgd(0.05, weight_decay=1e-4), change=corrupt)
    return Run(module, *digits(seed).loaders(50, seed), epochs=18, settings={"gradient_clip_val": 1.0})


@healthy("Heavy tails: single batches have a loss many times as large as usual.", Goal("val_loss", at_most=0.1))
def heavy_tails(seed: int) -> Run:
    def outliers(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y + 40 * torch.randn(y.shape) * (torch.rand(y.shape) < 5e-4)

    def huber(net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch
        return functional.huber_loss(net(x), y), {}

    module = Learner(mlp(2, 64, 64, 1), huber, adam(3e-3))
    return Run(module, *waves(seed, 20000).change(outliers).loaders(32, seed), epochs=1)
