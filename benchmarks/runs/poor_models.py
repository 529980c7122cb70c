"""Networks that cannot learn, or of which only a part does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from catalogue import Goal, Run, poor
from healthy_classifiers import DIGITS, SPIRALS
from healthy_schedules import TEXT, WAVES
from learner import Batch, Learner, adam, adamw, classify, predict_next, regress, sgd
from models import Transformer, cnn, mlp
from special import Variational
from tasks import digits, spirals, text, waves
from torch import Tensor, nn
from torch.nn import functional


@poor("Twelve layers of sigmoids: the gradient does not reach the first ones.", DIGITS)
def deep_sigmoid(seed: int) -> Run:
    net = mlp(64, *[32] * 12, 10, activation=nn.Sigmoid)
    return Run(Learner(net, classify, sgd(0.1)), *digits(seed).loaders(50, seed), epochs=12)


@poor("Sixteen layers of tanh with small weights.", DIGITS)
def deep_tanh(seed: int) -> Run:
    net = mlp(64, *[32] * 16, 10, activation=nn.Tanh)
    _scale(net, 0.3)
    return Run(Learner(net, classify, sgd(0.05)), *digits(seed).loaders(50, seed), epochs=12)


def _scale(net: nn.Module, factor: float) -> None:
    """Multiply all weights, not the biases, of the linear layers."""
    with torch.no_grad():
        for layer in net.modules():
            if isinstance(layer, nn.Linear):
                layer.weight *= factor


@poor("Biases start so low that no unit ever fires.", DIGITS)
def dead_units(seed: int) -> Run:
    net = mlp(64, 64, 64, 10)
    nn.init.constant_(net[1].bias, -10.0)
    return Run(Learner(net, classify, adam(1e-3)), *digits(seed).loaders(50, seed), epochs=12)


@poor("The same in a regression's last hidden layer.", WAVES)
def dead_last_layer(seed: int) -> Run:
    net = mlp(2, 64, 64, 1)
    nn.init.constant_(net[3].bias, -5.0)
    return Run(Learner(net, regress, adam(3e-3)), *waves(seed).loaders(50, seed), epochs=12)


@poor("All weights start at zero: units stay alike and nothing passes.", DIGITS)
def zero_weights(seed: int) -> Run:
    net = mlp(64, 64, 64, 10)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    return Run(Learner(net, classify, adam(1e-3)), *digits(seed).loaders(50, seed), epochs=12)


@poor("A softmax with logits of ten thousand: no gradient, or a huge one.", Goal("val_loss", at_most=0.5))
def saturated(seed: int) -> Run:
    net = mlp(64, 64, 10)
    _scale(net, 300.0)
    return Run(Learner(net, classify, sgd(0.1)), *digits(seed).loaders(50, seed), epochs=12)


@poor("A softmax before a loss that has one of its own.", DIGITS)
def double_softmax(seed: int) -> Run:
    net = nn.Sequential(mlp(64, 64, 10), nn.Softmax(dim=1))
    return Run(Learner(net, classify, sgd(0.02)), *digits(seed).loaders(50, seed), epochs=12)


def _narrow() -> nn.Module:
    """A deep narrow backbone that is of little use before it is trained, and a head."""
    backbone = mlp(64, 32, 32, 6, activation=nn.LeakyReLU)
    return nn.Sequential(OrderedDict(backbone=backbone, join=nn.ReLU(), head=nn.Linear(6, 10)))


@poor("The optimizer got the head alone; the backbone, never trained, should learn too.", DIGITS)
def forgotten_backbone(seed: int) -> Run:
    module = Learner(_narrow(), classify, adam(3e-3), trained=lambda net: net.head.parameters())
    return Run(module, *digits(seed).loaders(50, seed), epochs=12)


class Detached(nn.Module):
    """Loses its backbone's gradient on the way."""

    def __init__(self, net: nn.Module, cut: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.cut = net, cut

    def forward(self, x: Tensor) -> Tensor:
        return self.net.head(self.net.join(self.cut(self.net.backbone, x)))


@poor("`no_grad` was left around the backbone.", DIGITS)
def backbone_without_grad(seed: int) -> Run:
    net = Detached(_narrow(), torch.no_grad()(lambda backbone, x: backbone(x)))
    return Run(Learner(net, classify, adam(3e-3)), *digits(seed).loaders(50, seed), epochs=12)


@poor("A `detach` in a transformer: the embedding alone and all blocks stay as they were.", TEXT)
def detached_blocks(seed: int) -> Run:
    class Cut(Transformer):
        def forward(self, symbols: Tensor) -> Tensor:
            x = self.symbols(symbols) + self.places.weight[: symbols.shape[1]]
            mask = nn.Transformer.generate_square_subsequent_mask(symbols.shape[1])
            for block in self.blocks:
                x = block(x, src_mask=mask, is_causal=True)
            return self.head(self.norm(x.detach()))

    return Run(Learner(Cut(128, 32), predict_next, adamw(4e-3)), *text(seed).loaders(20, seed), epochs=1)


@poor("A linear model cannot tell spirals apart.", SPIRALS)
def too_simple(seed: int) -> Run:
    return Run(Learner(mlp(2, 2), classify, adam(5e-3)), *spirals(seed).loaders(100, seed), epochs=30)


@poor("A perceptron without activations is a linear model.", WAVES)
def no_activation(seed: int) -> Run:
    net = mlp(2, 64, 64, 1, activation=nn.Identity)
    return Run(Learner(net, regress, adam(3e-3)), *waves(seed).loaders(50, seed), epochs=12)


@poor("Predictions of [n, 1] against targets of [n]: broadcasting compares everything with everything.", WAVES)
def broadcast(seed: int) -> Run:
    def wrong_shape(net: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        x, y = batch
        return functional.mse_loss(*torch.broadcast_tensors(net(x), y[:, 0])), {}

    return Run(Learner(mlp(2, 64, 64, 1), wrong_shape, adam(3e-3)), *waves(seed).loaders(50, seed), epochs=12)


@poor(
    "The second term of a variational autoencoder weighs a hundred times too much: codes carry nothing.",
    Goal("val_pixels", at_most=0.055),
)
def posterior_collapse(seed: int) -> Run:
    module = Variational(lambda share: 100.0, adam(3e-3))
    return Run(module, *digits(seed).loaders(50, seed), epochs=12)


@poor("Dropout of 97 %.", DIGITS)
def drowned_by_dropout(seed: int) -> Run:
    net = mlp(64, 64, 64, 10, dropout=0.97)
    return Run(Learner(net, classify, adam(1e-3)), *digits(seed).loaders(50, seed), epochs=12)


@poor("Weights start thirty times too large.", DIGITS)
def large_weights(seed: int) -> Run:
    net = cnn()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter *= 30
    return Run(Learner(net, classify, sgd(0.01)), *digits(seed).loaders(50, seed), epochs=12)
