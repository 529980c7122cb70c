"""Replays: the training step as a function of its parameters."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import LowRank, Recurrent, mlp
from pytorch_lightning.plugins.precision import MixedPrecision
from replays import Model, run
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from dynwatch.callbacks.differentiable import is_compiled
from dynwatch.callbacks.replay import Replay
from dynwatch.callbacks.snapshot import CannotReplayError
from dynwatch.operators import flatten, hessian, unflatten

# --- what a replay computes


class Attention(nn.Module):
    """Fused attention, and PyTorch's own layer, on sequences of three."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(5, 12)
        self.layer = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(torch.stack([x, x.flip(1), x**2], 1)).chunk(3, -1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.layer(mixed, mixed, mixed, need_weights=False)[0].mean(1))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.extra = nn.ParameterList([nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3))])

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).tanh() @ self.extra[0] + self.extra[1]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Tanh())
        self.attention = Attention()
        self.attention.qkv = nn.Linear(4, 12)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.body, x, use_reentrant=self.reentrant)
        return checkpoint(self.attention, x, use_reentrant=self.reentrant)


def _cnn() -> nn.Module:
    front = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.GELU(), nn.Dropout(0.3))
    return nn.Sequential(*front, nn.Flatten(), nn.Linear(9, 3))


def _weight_normed() -> nn.Module:
    old, new = nn.utils.weight_norm, nn.utils.parametrizations.weight_norm
    return nn.Sequential(old(nn.Linear(5, 4)), nn.Tanh(), new(nn.Linear(4, 3)))


def _spectral_normed() -> nn.Module:
    old, new = nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm
    return nn.Sequential(old(nn.Linear(5, 4)), nn.Tanh(), new(nn.Linear(4, 3)))


def _half_compiled() -> nn.Module:
    return nn.Sequential(torch.compile(nn.Linear(5, 4), backend="aot_eager"), nn.Tanh(), nn.Linear(4, 3))


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "cnn": _cnn,
    "attention": Attention,
    "lstm": Recurrent,
    "tied": Tied,
    "low_rank": LowRank,
    "weight_norm": _weight_normed,
    "spectral_norm": _spectral_normed,
    "checkpointed": Checkpointed,
    "compiled": _half_compiled,
}


def _dense_hessian(loss: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    """Row by row, with respect to the module's own parameters: nothing is put in their place."""
    gradient = torch.autograd.grad(loss, parameters, create_graph=True)
    rows = []
    for entry in torch.cat([g.reshape(-1) for g in gradient]):
        found = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True)
        row = [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
        rows.append(torch.cat([g.reshape(-1) for g in row]))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", NETS)
def test_the_hessian_is_that_of_automatic_differentiation(kind: str, tmp_path: Path) -> None:
    """In float64, for all that PyTorch can differentiate twice, batch statistics and dropout included."""

    def see(replay: Replay, module: Any) -> None:
        x, y = (tensor.clone() for tensor in replay.batch)
        expected = _dense_hessian(cross_entropy(module.net(x), y), list(replay.parameters.values()))
        leaves = replay.leaves()  # rewinds what was just done by hand
        operator = hessian(replay.loss(leaves), list(leaves.values()))
        found = torch.stack([operator(row) for row in torch.eye(operator.size, dtype=torch.float64)])
        assert float(expected.norm()) > 0
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9 * float(expected.norm()))

    run(Model(NETS[kind]().double()), tmp_path, see, precision="64-true")


@pytest.mark.parametrize("kind", [kind for kind in NETS if kind != "spectral_norm"])
def test_products_are_differences_of_gradients(kind: str, tmp_path: Path) -> None:
    """Second derivatives agree with gradients at other parameters, and these with the loss there.

    Spectral norms move with the parameters by power iteration, which has no derivative.
    """

    def see(replay: Replay, module: Any) -> None:
        leaves = replay.leaves()
        tensors = list(leaves.values())
        operator = hessian(replay.loss(leaves), tensors)
        v = operator.random(torch.Generator().manual_seed(1))
        product = operator(v)
        step = dict(zip(leaves, unflatten(v * 1e-5, tensors), strict=True))
        back = {name: -by for name, by in step.items()}
        ahead, behind = (flatten(list(replay.gradient(by).values())) for by in (step, back))
        difference = (ahead - behind) / 2e-5
        assert float(product.norm()) > 0
        torch.testing.assert_close(product, difference, rtol=1e-4, atol=1e-5 * float(product.norm()))
        above, below = (
            replay.loss({name: (p.detach() + by[name]).requires_grad_() for name, p in leaves.items()}).item()
            for by in (step, back)
        )
        assert (above - below) / 2e-5 == pytest.approx(float(operator.gradient @ v), rel=1e-4)

    run(Model(NETS[kind]().double()), tmp_path, see, precision="64-true")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("kind", NETS)
def test_the_gradient_is_that_of_training(kind: str, precision: str, tmp_path: Path) -> None:
    """Bit for bit what a backward pass of the step gives; the run's own `.grad` is not touched."""

    def see(replay: Replay, module: Any) -> None:
        own = {name: p.grad for name, p in replay.parameters.items()}
        bits = {name: None if g is None else g.clone() for name, g in own.items()}
        found = replay.gradient()
        for name, p in replay.parameters.items():
            assert p.grad is own[name]
            assert p.grad is None or torch.equal(p.grad, bits[name])
        replay.leaves()
        module.zero_grad()
        with module.trainer.precision_plugin.train_step_context():
            loss = module.training_step(replay.batch, 0)
        loss.backward()
        for name, p in replay.parameters.items():
            close = 1e-2 if precision == "bf16-mixed" else 1e-5  # weight norms are written out in another way
            torch.testing.assert_close(found[name], p.grad, rtol=0, atol=close * (kind == "weight_norm"))

    run(Model(NETS[kind]()), tmp_path, see, precision=precision)


def test_without_a_gradient_scaler(tmp_path: Path) -> None:
    """In float16 the loss is the one of the step, not the scaled one, and the scale stays."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision(precision="16-mixed", device="cpu", scaler=scaler)

    def see(replay: Replay, module: Any) -> None:
        assert replay.loss(replay.leaves()).item() < 10
        assert max(float(gradient.norm()) for gradient in replay.gradient().values()) < 100
        assert scaler.get_scale() == 1024

    run(Model(mlp()), tmp_path, see, plugins=[plugin])


def _cached(kind: str) -> Model:
    """A net whose weights are read from where only the module's author knows to look as well."""
    net = mlp()
    model = Model(net, lambda model, x, y: cross_entropy(model.net(x), y) + _penalty(model))
    weights = [p for p in net.parameters() if p.dim() > 1]
    model.kept = {
        "list": weights,
        "dict": {"weights": dict(enumerate(weights))},
        "function": lambda: weights,
        "tuple": tuple(weights),
        "set": set(weights),
    }[kind]
    return model


def _penalty(model: Any) -> Tensor:
    kept = model.kept() if callable(model.kept) else model.kept
    kept = kept["weights"].values() if isinstance(kept, dict) else kept
    return sum((p.square().sum() for p in kept), torch.zeros(()))


@pytest.mark.parametrize("kind", ["list", "dict", "function"])
def test_parameters_that_are_kept_twice(kind: str, tmp_path: Path) -> None:
    """A penalty on weights from a list of the module's counts, in the gradient and at other parameters."""

    def see(replay: Replay, module: Any) -> None:
        found = replay.gradient()
        expected = torch.autograd.grad(replay.loss(None), list(replay.parameters.values()))
        assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))
        zeros = {name: torch.zeros_like(p) for name, p in replay.parameters.items()}
        assert replay.loss({n: z.requires_grad_() for n, z in zeros.items()}).item() == pytest.approx(np.log(3))

    run(_cached(kind), tmp_path, see)


@pytest.mark.parametrize("kind", ["tuple", "set"])
def test_parameters_where_nothing_can_take_their_place(kind: str, tmp_path: Path) -> None:
    """A tuple cannot be given other tensors: the message names the parameters, instead of a wrong Hessian."""

    def see(replay: Replay, module: Any) -> None:
        for evaluate in (replay.gradient, lambda: replay.loss(replay.leaves())):
            with pytest.raises(CannotReplayError, match=r"training_step reads net\.0\.weight, net\.2\.weight from a"):
                evaluate()

    run(_cached(kind), tmp_path, see)


def test_reentrant_checkpoints_are_refused(tmp_path: Path) -> None:
    """PyTorch says itself that they cannot be differentiated this way."""

    def see(replay: Replay, module: Any) -> None:
        with pytest.raises(RuntimeError, match="use_reentrant"):
            replay.gradient()

    net = Checkpointed(reentrant=True)
    run(Model(nn.Sequential(nn.Linear(5, 5), net)), tmp_path, see)


@pytest.mark.parametrize("how", ["module", "in_place", "function"])
def test_compiled_modules_run_eagerly(how: str, tmp_path: Path) -> None:
    """However a model is compiled, it has a Hessian, and stays compiled."""
    model: Any = Model(mlp())
    if how == "module":
        model = torch.compile(model, backend="aot_eager")
    elif how == "in_place":
        model.net.compile(backend="aot_eager")
    else:
        model.own_loss = torch.compile(lambda m, x, y: cross_entropy(m.net(x), y), backend="aot_eager")

    def see(replay: Replay, module: Any) -> None:
        leaves = replay.leaves()
        operator = hessian(replay.loss(leaves), list(leaves.values()))
        assert float(operator(torch.ones(operator.size)).norm()) > 0
        assert is_compiled(module) == (how != "function")

    run(model, tmp_path, see)


def test_parts_of_a_batch_and_seeds(tmp_path: Path) -> None:
    """Parts have the loss of their samples, and average to that of all; a seed gives another dropout."""

    def see(replay: Replay, module: Any) -> None:
        assert (replay.samples, replay.whole) == (6, "")
        leaves = replay.leaves()
        parts = [replay.loss(leaves, start, start + 2).item() for start in (0, 2, 4)]
        assert sum(parts) / 3 == pytest.approx(replay.loss(leaves).item())
        assert len({replay.loss(leaves, seed=seed).item() for seed in (1, 2, 1, 2)}) == 1

    run(Model(mlp()), tmp_path, see, replay_settings={"max_samples": 6})

    def draws(replay: Replay, module: Any) -> None:
        assert len({replay.loss(None, seed=seed).item() for seed in (1, 2, 1, 2)}) == 2

    run(Model(nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))), tmp_path, draws)


def test_graphs_of_several_parts_live_side_by_side(tmp_path: Path) -> None:
    """A step that changes its batch in place leaves each part's graph the numbers that it was built from."""

    def scaled(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model.net(x.mul_(2)), y)

    def see(replay: Replay, module: Any) -> None:
        leaves = replay.leaves()
        tensors = list(leaves.values())
        alone = [torch.autograd.grad(replay.loss(leaves, start, start + 4), tensors)[0] for start in (0, 4)]
        losses = [replay.loss(leaves, start, start + 4) for start in (0, 4)]
        together = [torch.autograd.grad(loss, tensors)[0] for loss in losses]
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))

    run(Model(mlp(), scaled), tmp_path, see)


class Graph:
    """A batch of a type that nobody has heard of."""

    def __init__(self) -> None:
        self.x, self.y = torch.randn(4, 5), torch.arange(4) % 3

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x, self.y))


def test_a_batch_that_cannot_be_cut_is_used_whole(tmp_path: Path) -> None:
    """It says why; what the step does to the batch is undone all the same."""

    def spoil(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(model.net(x.mul_(2)), y)

    def see(replay: Replay, module: Any) -> None:
        assert replay.samples is None
        assert "do not agree" in replay.whole
        before.x = replay.batch.x.clone()
        assert replay.loss(None).item() == replay.loss(None).item()

    batch = Graph()
    before: Any = types.ModuleType("before")  # what else the callback reaches is put back with all the rest
    run(Model(mlp(), spoil), tmp_path, see, batch=batch, replay_settings={"max_samples": 2})
    assert torch.equal(batch.x, before.x)


# --- what cannot be replayed


FAULTS: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], str]] = {
    "none": (lambda m, x, y: None, "training_step returned None, which skips the batch, so that it has no loss"),
    "dict": (lambda m, x, y: {"value": 1}, "training_step returned dict"),
    "vector": (lambda m, x, y: m.net(x)[:, 0], r"a tensor of shape \(8,\) and must return one number"),
    "detached": (lambda m, x, y: m.net(x).sum().detach(), "depends on no parameter"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_what_is_no_loss_is_told(kind: str, tmp_path: Path) -> None:
    """The message says what came back and what to return."""
    wrong, message = FAULTS[kind]

    def see(replay: Replay, module: Any) -> None:
        module.own_loss = wrong  # after the training step, which Lightning would refuse
        with Replay(module.trainer, module, replay.batch) as inner, pytest.raises(CannotReplayError, match=message):
            inner.loss(None)
        module.own_loss = None

    run(Model(mlp()), tmp_path, see)


def test_losses_in_a_dictionary_or_of_one_entry(tmp_path: Path) -> None:
    """As Lightning takes them."""
    for form in (lambda loss: {"loss": loss, "other": 1}, lambda loss: loss):

        def own(model: Any, x: Tensor, y: Tensor, form: Any = form) -> Any:
            return form(cross_entropy(model.net(x), y))

        run(Model(mlp(), own), tmp_path, lambda replay, module: replay.loss(None).backward())


def test_a_loss_function_replaces_the_step(tmp_path: Path) -> None:
    """Manual optimization needs one, and its training step is not run."""

    class Manual(Model):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.automatic_optimization = False
            self.steps = 0

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.steps += 1

    def loss(module: Any, batch: Any) -> Tensor:
        return cross_entropy(module.net(batch[0]), batch[1])

    def see(replay: Replay, module: Any) -> None:
        steps = module.steps
        assert all(bool(gradient.any()) for gradient in replay.gradient().values())
        assert module.steps == steps

    run(Manual(), tmp_path, see, replay_settings={"loss": loss})
    with pytest.raises(CannotReplayError, match=r"manual optimization.*Pass loss="):
        run(Manual(), tmp_path, see)
    with pytest.raises(CannotReplayError, match="the function loss= returned float"):
        settings = {"loss": lambda module, batch: 1.0}
        run(Model(mlp()), tmp_path, lambda replay, module: replay.loss(None), replay_settings=settings)


def test_nothing_to_measure(tmp_path: Path) -> None:
    """A module of which every parameter is frozen."""
    model = Model(mlp())

    def see(replay: Replay, module: Any) -> None:
        module.requires_grad_(False)
        with pytest.raises(CannotReplayError, match="no parameter requires a gradient"):
            Replay(module.trainer, module, replay.batch)
        module.requires_grad_(True)

    run(model, tmp_path, see)


def test_an_iterator_is_refused_before_anything_runs(tmp_path: Path) -> None:
    """The message names the attribute; the run can go on."""
    model = Model(mlp())
    model.stream = iter(range(100))
    with pytest.raises(CannotReplayError, match=r"^Model\.stream is an iterator \(range_iterator\)"):
        run(model, tmp_path, lambda replay, module: None)
