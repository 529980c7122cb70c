"""Classifiers that learn what they should."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
from catalogue import Goal, Run, healthy
from learner import Learner, adam, adamw, classify, sgd
from models import Transformer, cnn, mlp, resnet
from tasks import Split, cancer, digits, spirals, which_text
from torch import Tensor, nn

DIGITS = Goal("val_accuracy", at_least=0.9)
CANCER = Goal("val_accuracy", at_least=0.93)
SPIRALS = Goal("val_accuracy", at_least=0.9)
WHICH_TEXT = Goal("val_accuracy", at_least=0.8)


@healthy("A perceptron with SGD and momentum.", DIGITS)
def mlp_sgd(seed: int) -> Run:
    return Run(Learner(mlp(64, 64, 10), classify, sgd(0.1)), *digits(seed).loaders(50, seed), epochs=14)


@healthy("SGD without momentum and with a small learning rate: slow, but it gets there.", DIGITS)
def slow_sgd(seed: int) -> Run:
    module = Learner(mlp(64, 128, 10), classify, sgd(0.07, momentum=0))
    return Run(module, *digits(seed).loaders(32, seed), epochs=14)


@healthy("RMSprop on a perceptron.", DIGITS)
def mlp_rmsprop(seed: int) -> Run:
    rmsprop = partial(torch.optim.RMSprop, lr=1e-3)
    return Run(Learner(mlp(64, 64, 64, 10), classify, rmsprop), *digits(seed).loaders(50, seed), epochs=14)


@healthy("Convolutions without normalisation.", DIGITS)
def cnn_plain(seed: int) -> Run:
    return Run(Learner(cnn(), classify, sgd(0.05)), *digits(seed).loaders(50, seed), epochs=14)


@healthy("Convolutions with BatchNorm and AdamW.", DIGITS)
def cnn_batchnorm(seed: int) -> Run:
    module = Learner(cnn(nn.BatchNorm2d), classify, adamw(3e-3))
    return Run(module, *digits(seed).loaders(50, seed), epochs=10)


@healthy("A residual network with BatchNorm and weight decay.", DIGITS)
def resnet_sgd(seed: int) -> Run:
    module = Learner(resnet(), classify, sgd(0.05, weight_decay=5e-4))
    return Run(module, *digits(seed).loaders(50, seed), epochs=8)


@healthy("Half of all units dropped out: the training loss stays above the validation loss.", DIGITS)
def dropout(seed: int) -> Run:
    module = Learner(mlp(64, 128, 128, 10, dropout=0.5), classify, adam(2e-3))
    return Run(module, *digits(seed).loaders(50, seed), epochs=16)


@healthy("Gradients of four batches make one step.", DIGITS)
def accumulation(seed: int) -> Run:
    module = Learner(mlp(64, 64, 10), classify, adam(5e-3))
    return Run(module, *digits(seed).loaders(16, seed), epochs=12, settings={"accumulate_grad_batches": 4})


@healthy("bfloat16 autocast.", DIGITS)
def bfloat16(seed: int) -> Run:
    module = Learner(mlp(64, 128, 10), classify, adam(2e-3))
    return Run(module, *digits(seed).loaders(50, seed), epochs=14, settings={"precision": "bf16-mixed"})


@healthy("Gradients clipped on nearly every step.", DIGITS)
def clipping(seed: int) -> Run:
    module = Learner(cnn(), classify, sgd(0.1))
    return Run(module, *digits(seed).loaders(50, seed), epochs=12, settings={"gradient_clip_val": 0.3})


@healthy("Four rows a batch: the loss is very noisy.", DIGITS)
def batch_of_four(seed: int) -> Run:
    return Run(Learner(mlp(64, 64, 10), classify, sgd(0.01)), *digits(seed).loaders(4, seed), epochs=3)


@healthy("One row a batch.", CANCER)
def batch_of_one(seed: int) -> Run:
    return Run(Learner(mlp(30, 16, 2), classify, sgd(0.01, momentum=0)), *cancer(seed).loaders(1, seed), epochs=1)


@healthy("Logistic regression.", CANCER)
def logistic(seed: int) -> Run:
    return Run(Learner(mlp(30, 2), classify, sgd(0.05, weight_decay=1e-3)), *cancer(seed).loaders(32, seed), epochs=24)


@healthy("A long shallow start, then the spirals are told apart.", SPIRALS)
def two_spirals(seed: int) -> Run:
    module = Learner(mlp(2, 64, 64, 2, activation=nn.Tanh), classify, adam(5e-3))
    return Run(module, *spirals(seed).loaders(100, seed), epochs=30)


@healthy("30 % of the training labels are wrong: the loss stays high, the validation accuracy does not suffer.", DIGITS)
def noisy_labels(seed: int) -> Run:
    def wrong(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.where(torch.rand(len(y)) < 0.3, torch.randint(10, y.shape), y)

    module = Learner(mlp(64, 32, 10), classify, sgd(0.02, weight_decay=5e-3))
    return Run(module, *digits(seed).change(wrong).loaders(50, seed), epochs=14)


@healthy("One class has 5 % of the rows: the loss is low from early on.", Goal("val_accuracy", at_least=0.97))
def imbalance(seed: int) -> Run:
    def rare(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        kept = (y != 3) | (torch.rand(len(y)) < 0.5)
        return x[kept], (y[kept] == 3).long()

    module = Learner(mlp(64, 32, 2), classify, adam(3e-3))
    return Run(module, *digits(seed).change_both(rare).loaders(50, seed), epochs=16)


@healthy("Rows sorted by class, so the loss jumps at each new class.", Goal("val_accuracy", at_least=0.8))
def sorted_by_class(seed: int) -> Run:
    def in_order(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        order = y.argsort(stable=True)
        return x[order], y[order]

    module = Learner(mlp(64, 10), classify, sgd(0.03, momentum=0))
    return Run(module, *digits(seed).change(in_order).loaders(50, seed, shuffle=False), epochs=18)


def _pretrained(seed: int, steps: int = 150) -> tuple[nn.Module, Split]:
    """A perceptron that knows digits below five, and the split of all."""
    whole = digits(seed)
    net = nn.Sequential(OrderedDict(backbone=mlp(64, 64, 32), join=nn.ReLU(), head=nn.Linear(32, 10)))
    x, y = (row[whole.train[1] < 5] for row in whole.train)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        classify(net, [x, y])[0].backward()
        optimizer.step()
    return net, whole


@healthy("A backbone that was trained before is frozen on purpose; only a new head learns.", DIGITS)
def frozen_backbone(seed: int) -> Run:
    net, _ = _pretrained(seed)
    whole = digits(seed).change_both(lambda x, y: (x[y < 5], y[y < 5]))
    net.head = nn.Linear(32, 10)
    net.backbone.requires_grad_(False)
    return Run(Learner(net, classify, adam(0.01)), *whole.loaders(32, seed), epochs=16)


@healthy("All layers of a trained network learn new classes.", DIGITS)
def fine_tuning(seed: int) -> Run:
    net, whole = _pretrained(seed)
    return Run(Learner(net, classify, adamw(3e-3)), *whole.loaders(50, seed), epochs=14)


@healthy("Training goes on at the end of another training: the loss is low from the first step on and stays.", DIGITS)
def already_trained(seed: int) -> Run:
    whole = digits(seed)
    net = mlp(64, 64, 10)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(200):
        optimizer.zero_grad()
        classify(net, list(whole.train))[0].backward()
        optimizer.step()
    return Run(Learner(net, classify, sgd(1e-3, weight_decay=1e-3)), *whole.loaders(50, seed), epochs=14)


@healthy("A transformer tells prose from programs.", WHICH_TEXT)
def text_classifier(seed: int) -> Run:
    net = Transformer(128, 48, width=24, layers=1, classes=2)
    return Run(Learner(net, classify, adamw(3e-3)), *which_text(seed).loaders(32, seed), epochs=3)
