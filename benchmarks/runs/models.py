"""Networks of the runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn


def mlp(*widths: int, activation: Callable[[], nn.Module] = nn.ReLU, dropout: float = 0.0) -> nn.Sequential:
    """A multilayer perceptron that flattens its input."""
    layers: list[nn.Module] = [nn.Flatten()]
    for width, following in pairwise(widths):
        layers += [nn.Linear(width, following), activation()]
        if dropout:
            layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers[: -2 if dropout else -1])


def cnn(norm: Callable[[int], nn.Module] | None = None, width: int = 12) -> nn.Sequential:
    """Two convolutions and a linear layer, for images of 8 x 8 pixels and 10 classes."""

    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1), *([norm(after)] if norm else []), nn.ReLU(), nn.MaxPool2d(2)]

    return nn.Sequential(*block(1, width), *block(width, 2 * width), nn.Flatten(), nn.Linear(2 * width * 4, 10))


class Residual(nn.Sequential):
    """A residual block of anything."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def resnet(width: int = 16, blocks: int = 2) -> nn.Sequential:
    """A small residual network with BatchNorm, for the same images."""

    def block() -> Residual:
        conv = [nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)]
        return Residual(nn.BatchNorm2d(width), nn.ReLU(), conv[0], nn.BatchNorm2d(width), nn.ReLU(), conv[1])

    stem = [nn.Conv2d(1, width, 3, padding=1), nn.MaxPool2d(2)]
    return nn.Sequential(*stem, *(block() for _ in range(blocks)), nn.Flatten(), nn.Linear(width * 16, 10))


class Transformer(nn.Module):
    """A small pre-norm transformer.

    Args:
        symbols: Size of the alphabet.
        context: Longest input.
        classes: Outputs for the whole sequence, from the mean over its places; 0: next symbols, causally.
        tied: Whether the output layer is the embedding.
    """

    def __init__(
        self, symbols: int, context: int, width: int = 32, layers: int = 2, classes: int = 0, tied: bool = False
    ) -> None:
        super().__init__()
        self.classes = classes
        self.symbols, self.places = nn.Embedding(symbols, width), nn.Embedding(context, width)
        nn.init.normal_(self.symbols.weight, std=0.1)
        nn.init.normal_(self.places.weight, std=0.1)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes or symbols, bias=False)
        if tied:
            self.head.weight = self.symbols.weight

    def forward(self, symbols: Tensor) -> Tensor:
        length = symbols.shape[1]
        x = self.symbols(symbols) + self.places.weight[:length]
        mask = None if self.classes else nn.Transformer.generate_square_subsequent_mask(length)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=mask is not None)
        x = self.norm(x)
        return self.head(x.mean(1) if self.classes else x)


class Recurrent(nn.Module):
    """Reads symbols one after another and predicts the next ones."""

    def __init__(self, layer: nn.Module, symbols: int, width: int) -> None:
        super().__init__()
        self.symbols, self.layer, self.head = nn.Embedding(symbols, width), layer, nn.Linear(width, symbols)

    def forward(self, symbols: Tensor) -> Tensor:
        return self.head(self.layer(self.symbols(symbols))[0])


class Pair(nn.Module):
    """Embeds two numbers and reads their sum off with a hidden layer."""

    def __init__(self, modulus: int, width: int = 64, hidden: int = 256) -> None:
        super().__init__()
        self.symbols = nn.Embedding(modulus, width)
        self.net = mlp(2 * width, hidden, modulus)

    def forward(self, pairs: Tensor) -> Tensor:
        return self.net(self.symbols(pairs).flatten(1))


class VariationalAutoencoder(nn.Module):
    """Encodes digits as Gaussians in a few dimensions; gives the logits of pixels, means and log variances."""

    def __init__(self, code: int = 4) -> None:
        super().__init__()
        self.encoder, self.decoder = mlp(64, 64, 2 * code), mlp(code, 64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        noise = torch.randn_like(mean) if self.training else torch.zeros_like(mean)
        return self.decoder(mean + noise * (log_variance / 2).exp()), mean, log_variance
