"""Each rule that warns fires on a small real run that has its fault, and none on a healthy one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from runs import scalars, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynwatch.callbacks import ActivationMonitor, DynWatch, EarlyTermination, GradientNormMonitor
from dynwatch.rules import (
    DeadLayers,
    GradientExplosion,
    LossSpike,
    NoLearning,
    Overfitting,
    Plateau,
    Rule,
    VanishingGradients,
    default_rules,
)

Data = DataLoader[tuple[Tensor, ...]]


def batches(n: int = 256, batch_size: int = 16, noise: float = 0.0, random: bool = False, seed: int = 1) -> Data:
    """Four classes of 8 features; some labels, or all, are random."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator)
    labels = torch.randint(4, (n,), generator=generator)
    wrong = torch.rand(n, generator=generator) < (1.0 if random else noise)
    return DataLoader(TensorDataset(x, torch.where(wrong, labels, x[:, :4].argmax(1))), batch_size=batch_size)


def mlp(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers: list[nn.Module] = []
    for wide, next_wide in pairwise(widths):
        layers += [nn.Linear(wide, next_wide), activation()]
    return nn.Sequential(*layers[:-1])


class Model(pl.LightningModule):
    """A network, an optimizer, and a fault that begins at a step."""

    def __init__(self, net: nn.Module, optimizer: Any = None, spoil: Any = None, at: int = 0) -> None:
        super().__init__()
        self.net, self.spoil, self.at = net, spoil, at
        self.make = optimizer or (lambda parameters: torch.optim.SGD(parameters, lr=0.1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        if self.spoil and self.trainer.global_step >= self.at:
            x, y = self.spoil(self, x, y)
        return nn.functional.cross_entropy(self.net(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return self.make(self.net.parameters())


def fit(folder: Path, model: Model, train: Data, epochs: int, *, rule: Rule | None = None, val: Any = None) -> DynWatch:
    """A run under DynWatch with the default rules, one of them perhaps with a patience for short runs."""
    rules = [rule if rule and rule.name == other.name else other for other in default_rules()]
    watch = DynWatch(
        GradientNormMonitor(every_n_steps=4, update_ratio_every_n_steps=4),
        EarlyTermination(rules),
        activations=ActivationMonitor(every_n_steps=4),
        report=False,
    )
    trainer(folder, [watch], max_epochs=epochs, num_sanity_val_steps=0, log_every_n_steps=4).fit(model, train, val)
    assert not any(monitor.off for monitor in watch.monitors)
    return watch


def reinitialised(model: Model, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The network forgets everything, at every step."""
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.normal_(0, 0.3)
    return x, y


class Louder(torch.autograd.Function):
    """Leaves its input as it is and multiplies the gradient, like a recurrent network on its way to exploding."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 1e5


class GetsLouder(nn.Module):
    """Passes everything on; after 60 steps of training it multiplies gradients."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return Louder.apply(x) if self.calls > 60 else x


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=2e-3)


def tiny(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3)


def fast(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


def _dead() -> nn.Module:
    net = mlp(8, 16, 16, 4)
    with torch.no_grad():
        net[0].bias -= 100
    return net


FAULTS: dict[str, tuple[Any, Any, int, Rule | None]] = {
    "loss_spike": (lambda: Model(mlp(8, 32, 4), adam, reinitialised, 150), {}, 20, LossSpike(patience=20)),
    "gradient_explosion": (lambda: Model(nn.Sequential(mlp(8, 32, 4), GetsLouder()), adam), {}, 6, GradientExplosion()),
    "vanishing_gradients": (
        lambda: Model(mlp(8, *[16] * 12, 4, activation=nn.Sigmoid)),
        {},
        4,
        VanishingGradients(),
    ),
    "dead_layers": (lambda: Model(_dead(), tiny), {}, 6, DeadLayers()),
    "no_learning": (lambda: Model(mlp(8, 16, 4), tiny), {"random": True, "n": 512}, 6, NoLearning()),
    "plateau": (lambda: Model(mlp(8, 4), fast), {"noise": 0.4, "batch_size": 64}, 100, Plateau()),
    "overfitting": (
        lambda: Model(mlp(8, 256, 256, 4), adam),
        {"n": 32, "batch_size": 8, "random": True},
        20,
        Overfitting(),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_run_has_its_warning(name: str, tmp_path: Path) -> None:
    """The rule's tag is in the event file at the verdict's step, and the run goes on to its end."""
    make, kind, epochs, rule = FAULTS[name]
    val = batches(64, 16, random=True, seed=9) if name == "overfitting" else None
    train = batches(**kind)
    watch = fit(tmp_path, make(), train, epochs, rule=rule, val=val)
    verdicts = {verdict.rule: (action, verdict) for action, verdict in watch.early_termination.verdicts}
    assert name in verdicts, verdicts
    action, verdict = verdicts[name]
    assert action == verdict.severity == "warn" and verdict.advice and verdict.evidence
    assert (verdict.step, verdict.step) in scalars(tmp_path / "run")[f"stop/{name}"]
    assert len(scalars(tmp_path / "run")["stop/loss"]) >= epochs * len(train) // 4


def test_a_healthy_run_has_no_verdict(tmp_path: Path) -> None:
    """A small network that learns, with validation and the defaults of DynWatch(), is left alone by every rule."""
    watch = DynWatch()
    model = Model(mlp(8, 64, 64, 4), lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9))
    run = trainer(tmp_path, [watch], max_epochs=12, log_every_n_steps=10)
    run.fit(model, batches(1024, 32), batches(256, 64, seed=2))
    assert run.global_step == 384
    assert watch.early_termination.verdicts == []
    assert run.callback_metrics["val_loss"] < 0.3
    known = {f"stop/{rule.name}" for rule in default_rules()}
    assert not known & scalars(tmp_path / "run").keys()
