"""Texts, and puzzles whose loss stands still for long before it falls."""

from __future__ import annotations

from catalogue import Goal, Run, healthy
from healthy_schedules import TEXT, warm_up_then_cosine
from learner import Learner, adam, adamw, classify, predict_next, sgd
from models import Pair, Recurrent, Transformer, mlp
from tasks import parity, repeats, sums, text
from torch import nn

PARITY = Goal("val_accuracy", at_least=0.95)


@healthy("A transformer on Python's manual, with a constant learning rate.", TEXT)
def language_model(seed: int) -> Run:
    return Run(Learner(Transformer(128, 32), predict_next, adamw(4e-3)), *text(seed).loaders(20, seed), epochs=1)


@healthy("The same with the output layer tied to the embedding, and clipping.", TEXT)
def tied_language_model(seed: int) -> Run:
    module = Learner(Transformer(128, 32, tied=True), predict_next, adamw(6e-3), warm_up_then_cosine(0.05))
    return Run(module, *text(seed).loaders(20, seed), epochs=1, settings={"gradient_clip_val": 1.0})


@healthy("An LSTM with clipping.", TEXT)
def lstm(seed: int) -> Run:
    net = Recurrent(nn.LSTM(48, 48, batch_first=True), 128, 48)
    settings = {"gradient_clip_val": 1.0}
    return Run(Learner(net, predict_next, adam(0.01)), *text(seed).loaders(20, seed), epochs=1, settings=settings)


@healthy("A plain recurrent network with SGD and clipping.", Goal("val_loss", at_most=2.8))
def rnn_sgd(seed: int) -> Run:
    net = Recurrent(nn.RNN(48, 48, batch_first=True), 128, 48)
    settings = {"gradient_clip_val": 0.5}
    return Run(Learner(net, predict_next, sgd(0.3)), *text(seed).loaders(20, seed), epochs=1, settings=settings)


@healthy("Parity of 3 among 20 bits: nothing for most of the run, then everything.", PARITY)
def sparse_parity(seed: int) -> Run:
    module = Learner(mlp(20, 256, 2), classify, sgd(0.2, momentum=0, weight_decay=1e-4))
    return Run(module, *parity(seed, 64 * 800).loaders(64, seed), epochs=1)


@healthy("A repeated random sequence: chance for long, until copying is found.", Goal("val_loss", at_most=2.0))
def copying(seed: int) -> Run:
    module = Learner(Transformer(16, 24), predict_next, adamw(1e-3))
    return Run(module, *repeats(seed, 32 * 600).loaders(32, seed), epochs=1)


@healthy(
    "Addition modulo 23: the training loss is 0 long before the validation loss falls.",
    Goal("val_accuracy", at_least=0.9),
)
def late_generalisation(seed: int) -> Run:
    module = Learner(Pair(23), classify, adamw(0.01, weight_decay=1.0, betas=(0.9, 0.98)))
    return Run(module, *sums(seed, 23, share=0.7).loaders(370, seed), epochs=800)
