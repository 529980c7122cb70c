"""Data that is wrong, becomes wrong, or is too little."""

from __future__ import annotations

import torch
from catalogue import Goal, Run, poor
from healthy_classifiers import CANCER, DIGITS
from healthy_others import DIABETES
from healthy_schedules import TEXT, WAVES
from learner import Batch, Learner, adam, adamw, classify, predict_next, regress, sgd
from models import Transformer, cnn, mlp
from tasks import cancer, diabetes, digits, text, waves
from torch import Tensor

BETTER_THAN_CHANCE = Goal("val_loss", at_most=2.3)  # log(10), which saying nothing has


@poor("Labels drawn anew in each batch.", DIGITS)
def shuffled_labels(seed: int) -> Run:
    def shuffle(batch: Batch, share: float) -> Batch:
        return [batch[0], batch[1][torch.randperm(len(batch[1]))]]

    module = Learner(mlp(64, 64, 10), classify, sgd(0.1), change=shuffle)
    return Run(module, *digits(seed).loaders(50, seed), epochs=14)


@poor("Inputs and targets shuffled apart, in a regression.", WAVES)
def shuffled_targets(seed: int) -> Run:
    def apart(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, y[torch.randperm(len(y))]

    data = waves(seed, 20000).change(apart)
    return Run(Learner(mlp(2, 64, 64, 1), regress, adam(3e-3)), *data.loaders(40, seed), epochs=1)


@poor("Fixed random labels, learnt by heart.", DIGITS)
def learnt_by_heart(seed: int) -> Run:
    def draw(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x, torch.randint(10, y.shape)

    module = Learner(mlp(64, 512, 10), classify, adam(5e-3))
    return Run(module, *digits(seed, 300).change(draw).loaders(30, seed), epochs=48)


@poor("Sixty rows and a large network: the validation loss rises for most of the run.", BETTER_THAN_CHANCE)
def overfitting(seed: int) -> Run:
    def noisy(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x + 0.55 * torch.randn_like(x), y

    module = Learner(mlp(64, 512, 512, 10), classify, adam(2e-3))
    return Run(module, *digits(seed, 60).change_both(noisy).loaders(20, seed), epochs=128)


@poor("A large network learns the noise of a small real regression.", DIABETES)
def overfitting_regression(seed: int) -> Run:
    module = Learner(mlp(10, 256, 256, 1), regress, adam(3e-3))
    return Run(module, *diabetes(seed).loaders(34, seed), epochs=64)


@poor("A language model reads the same few lines over and over.", TEXT)
def overfitting_text(seed: int) -> Run:
    module = Learner(Transformer(128, 32, width=48), predict_next, adamw(5e-3))
    return Run(module, *text(seed, n_train=60).loaders(20, seed), epochs=128)


@poor("Raw features between 1e-3 and 4e3, with SGD.", CANCER)
def raw_features(seed: int) -> Run:
    data = cancer(seed, standard=False)
    return Run(Learner(mlp(30, 16, 2), classify, sgd(0.05)), *data.loaders(32, seed), epochs=30)


@poor("Pixels between 0 and 4000 instead of 1.", DIGITS)
def raw_pixels(seed: int) -> Run:
    data = digits(seed).change_both(lambda x, y: (4000 * x, y))
    return Run(Learner(cnn(), classify, sgd(0.05)), *data.loaders(50, seed), epochs=12)


@poor("Targets around 10 000, for which the steps are far too short.", Goal("val_loss", at_most=1e5))
def distant_targets(seed: int) -> Run:
    data = diabetes(seed).change_both(lambda x, y: (x, 1e4 + 300 * y))
    return Run(Learner(mlp(10, 16, 1), regress, adam(1e-3)), *data.loaders(34, seed), epochs=32)


@poor("Targets in thousands, with SGD.", Goal("val_loss", at_most=1e6))
def large_targets(seed: int) -> Run:
    data = diabetes(seed).change_both(lambda x, y: (x, 1000 * y))
    return Run(Learner(mlp(10, 16, 1), regress, sgd(0.05)), *data.loaders(34, seed), epochs=32)


@poor("Half-way all inputs become zero.", DIGITS)
def inputs_become_zero(seed: int) -> Run:
    def blank(batch: Batch, share: float) -> Batch:
        return [torch.zeros_like(batch[0]), batch[1]] if share > 0.4 else batch

    module = Learner(mlp(64, 64, 10), classify, sgd(0.1, weight_decay=0.01), change=blank)
    return Run(module, *digits(seed).loaders(50, seed), epochs=14)


@poor("Half-way all inputs become noise.", DIGITS)
def inputs_become_noise(seed: int) -> Run:
    def noise(batch: Batch, share: float) -> Batch:
        return [torch.randn_like(batch[0]), batch[1]] if share > 0.4 else batch

    return Run(Learner(cnn(), classify, adam(3e-3), change=noise), *digits(seed).loaders(50, seed), epochs=12)


@poor("Half-way the labels are shuffled.", DIGITS)
def labels_become_noise(seed: int) -> Run:
    def shuffle(batch: Batch, share: float) -> Batch:
        return [batch[0], batch[1][torch.randperm(len(batch[1]))]] if share > 0.4 else batch

    module = Learner(mlp(64, 64, 10), classify, sgd(0.1), change=shuffle)
    return Run(module, *digits(seed).loaders(50, seed), epochs=14)


@poor("Half-way the text becomes random symbols.", TEXT)
def text_becomes_noise(seed: int) -> Run:
    def noise(batch: Batch, share: float) -> Batch:
        return [torch.randint(128, batch[0].shape)] if share > 0.5 else batch

    module = Learner(Transformer(128, 32), predict_next, adamw(4e-3), change=noise)
    return Run(module, *text(seed).loaders(20, seed), epochs=1)


@poor("The validation images are scaled otherwise than the training images.", DIGITS)
def scaled_otherwise(seed: int) -> Run:
    data = digits(seed).change(lambda x, y: (x - 0.5, y), lambda x, y: (16 * (1 - x), y))
    return Run(Learner(mlp(64, 64, 10), classify, sgd(0.1)), *data.loaders(50, seed), epochs=14)


@poor("All training rows are of three classes.", DIGITS)
def missing_classes(seed: int) -> Run:
    data = digits(seed).change(lambda x, y: (x[y < 3], y[y < 3]))
    return Run(Learner(mlp(64, 64, 10), classify, adam(3e-3)), *data.loaders(20, seed), epochs=18)
