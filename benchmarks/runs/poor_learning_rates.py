"""Steps that are too long, too short, or go the wrong way."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from catalogue import Run, poor
from healthy_classifiers import CANCER, DIGITS
from healthy_others import BANDIT, DIABETES, GAN
from healthy_schedules import TEXT, WAVES
from learner import Batch, Learner, adam, adamw, by_share, classify, predict_next, regress, sgd
from models import Recurrent, Transformer, cnn, mlp, resnet
from special import Bandit, Gan
from tasks import cancer, diabetes, digits, ring, text, waves
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler


@poor("SGD with a learning rate fifty times too high on a perceptron.", DIGITS)
def sgd_too_high(seed: int) -> Run:
    return Run(Learner(mlp(64, 64, 10), classify, sgd(5.0)), *digits(seed).loaders(50, seed), epochs=14)


@poor("The same on convolutions: they end as a constant.", DIGITS)
def cnn_too_high(seed: int) -> Run:
    return Run(Learner(cnn(), classify, sgd(1.0)), *digits(seed).loaders(50, seed), epochs=12)


@poor("The same on a residual network with BatchNorm.", DIGITS)
def resnet_too_high(seed: int) -> Run:
    return Run(Learner(resnet(), classify, sgd(0.7)), *digits(seed).loaders(50, seed), epochs=8)


@poor("A linear regression whose steps overshoot: the error grows by a factor each step.", DIABETES)
def regression_explodes(seed: int) -> Run:
    return Run(Learner(mlp(10, 1), regress, sgd(0.5)), *diabetes(seed).loaders(34, seed), epochs=32)


@poor("The same with a learning rate that is only just too high.", DIABETES)
def regression_creeps_up(seed: int) -> Run:
    module = Learner(mlp(10, 1), regress, sgd(0.28, momentum=0))
    return Run(module, *diabetes(seed).loaders(34, seed), epochs=32)


@poor("Adam with a learning rate of 1 on a transformer.", TEXT)
def adam_too_high(seed: int) -> Run:
    return Run(Learner(Transformer(128, 32), predict_next, adam(1.0)), *text(seed).loaders(20, seed), epochs=1)


@poor("AdamW with 0.1 on a transformer: it learns the frequencies of symbols and no more.", TEXT)
def adamw_stuck(seed: int) -> Run:
    return Run(Learner(Transformer(128, 32), predict_next, adamw(0.1)), *text(seed).loaders(20, seed), epochs=1)


@poor("A learning rate of 1e-8.", DIGITS)
def far_too_low(seed: int) -> Run:
    return Run(Learner(mlp(64, 64, 10), classify, adam(1e-8)), *digits(seed).loaders(50, seed), epochs=14)


@poor("A learning rate so low that the run will end long before it has learnt.", TEXT)
def too_low(seed: int) -> Run:
    return Run(Learner(Transformer(128, 32), predict_next, adamw(1e-5)), *text(seed).loaders(20, seed), epochs=1)


@poor("A schedule that divides integers: the learning rate is zero.", DIGITS)
def rate_of_zero(seed: int) -> Run:
    never = by_share(lambda share: int(share))
    return Run(Learner(mlp(64, 64, 10), classify, adam(1e-3), never), *digits(seed).loaders(50, seed), epochs=14)


@poor("A decay that was meant for each epoch happens at each step.", DIGITS)
def decays_too_soon(seed: int) -> Run:
    def each_step(optimizer: Optimizer, steps: int) -> LRScheduler:
        return ExponentialLR(optimizer, gamma=0.8)

    module = Learner(mlp(64, 64, 10), classify, sgd(0.02), each_step)
    return Run(module, *digits(seed).loaders(50, seed), epochs=14)


@poor("The learning rate is a thousand times as high for a moment; the run does not recover.", DIGITS)
def spike(seed: int) -> Run:
    once = by_share(lambda share: 1000.0 if 0.4 < share < 0.42 else 1.0)
    return Run(Learner(cnn(), classify, sgd(0.05), once), *digits(seed).loaders(50, seed), epochs=12)


@poor("The same in a transformer: it is back at the frequencies of symbols.", TEXT)
def transformer_spike(seed: int) -> Run:
    once = by_share(lambda share: 1000.0 if 0.4 < share < 0.43 else 1.0)
    module = Learner(Transformer(128, 32), predict_next, adamw(3e-3), once)
    return Run(module, *text(seed).loaders(20, seed), epochs=1)


@poor("A learning rate that never stops growing.", WAVES)
def endless_growth(seed: int) -> Run:
    grows = by_share(lambda share: 1e4**share)
    return Run(Learner(mlp(2, 64, 64, 1), regress, sgd(0.01), grows), *waves(seed).loaders(50, seed), epochs=12)


@poor("A momentum of 0.999: the loss swings wildly.", DIABETES)
def momentum(seed: int) -> Run:
    return Run(
        Learner(mlp(10, 16, 1), regress, sgd(0.03, momentum=0.999)), *diabetes(seed).loaders(34, seed), epochs=32
    )


@poor("Gradients are never set back to zero.", DIGITS)
def no_zero_grad(seed: int) -> Run:
    return Run(Accumulates(mlp(64, 64, 10), classify, sgd(1.0, momentum=0)), *digits(seed).loaders(50, seed), epochs=14)


@poor("The same with Adam in a language model.", TEXT)
def no_zero_grad_adam(seed: int) -> Run:
    module = Accumulates(Transformer(128, 32), predict_next, adam(4e-3))
    return Run(module, *text(seed).loaders(20, seed), epochs=1)


class Accumulates(Learner):
    """Takes its steps itself and forgets `zero_grad`."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.training_loss(batch)
        self.manual_backward(loss)
        self.optimizers().step()
        return loss.detach()


@poor("The optimizer maximises: the loss rises.", DIGITS)
def maximises(seed: int) -> Run:
    module = Learner(mlp(64, 64, 10), classify, sgd(0.05, maximize=True))
    return Run(module, *digits(seed).loaders(50, seed), epochs=12)


@poor("The sign of the loss is wrong: it falls without end.", CANCER)
def wrong_sign(seed: int) -> Run:
    def likelihood(net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        loss, metrics = classify(net, batch)
        return -loss, metrics

    return Run(Learner(mlp(30, 16, 2), likelihood, sgd(0.01)), *cancer(seed).loaders(32, seed), epochs=30)


@poor("Weight decay of 1 with SGD: weights shrink to nothing.", DIGITS)
def weight_decay(seed: int) -> Run:
    return Run(Learner(cnn(), classify, sgd(0.1, weight_decay=1.0)), *digits(seed).loaders(50, seed), epochs=12)


@poor("Weight decay of 20 with AdamW on a transformer.", TEXT)
def weight_decay_adamw(seed: int) -> Run:
    module = Learner(Transformer(128, 32), predict_next, adamw(5e-3, weight_decay=20.0))
    return Run(module, *text(seed).loaders(20, seed), epochs=1)


@poor("Gradients are clipped to a norm of 1e-6.", DIGITS)
def clipped_to_nothing(seed: int) -> Run:
    module = Learner(mlp(64, 64, 10), classify, sgd(0.1))
    return Run(module, *digits(seed).loaders(50, seed), epochs=12, settings={"gradient_clip_val": 1e-6})


@poor("A recurrent network that amplifies what it remembers, without clipping.", TEXT)
def rnn_explodes(seed: int) -> Run:
    net = Recurrent(nn.RNN(48, 48, batch_first=True, nonlinearity="relu"), 128, 48)
    with torch.no_grad():
        net.layer.weight_hh_l0 *= 2.0  # its largest eigenvalue is now above 1
    return Run(Learner(net, predict_next, sgd(0.3)), *text(seed).loaders(20, seed), epochs=1)


@poor("RMSprop with a learning rate of 0.3.", DIGITS)
def rmsprop_too_high(seed: int) -> Run:
    rmsprop = partial(torch.optim.RMSprop, lr=0.3)
    return Run(Learner(mlp(64, 64, 64, 10), classify, rmsprop), *digits(seed).loaders(50, seed), epochs=14)


@poor("A critic that learns much faster than its generator, which gets nowhere.", GAN)
def gan_critic_wins(seed: int) -> Run:
    return Run(Gan(lr=1e-5, critic_lr=5e-3, penalty=0.0), *ring(seed, 64 * 600).loaders(64, seed), epochs=1)


@poor("REINFORCE with long steps: the policy names one digit for ever.", BANDIT)
def policy_collapse(seed: int) -> Run:
    return Run(Bandit(adam(1.0)), *digits(seed).loaders(50, seed), epochs=16)
