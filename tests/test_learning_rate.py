"""Critical rates are checked against real optimizers on quadratics and against spectral radii of their updates."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RMSprop

from dynwatch.learning_rate import batch_sharpness, critical_lr, critical_lr_adam, learned_rates
from dynwatch.operators import from_matrix, preconditioned
from dynwatch.stability import Stability, Unsupported, stability

STEPS = 10_000
SGD_FORMS = [
    {},
    {"momentum": 0.5},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.9},
    {"momentum": 0.5, "dampening": -1.0},
    {"dampening": 0.5},
    {"momentum": 0.9, "nesterov": True},
    {"momentum": 0.3, "nesterov": True},
    {"weight_decay": 0.7},
    {"momentum": 0.9, "weight_decay": 0.7},
]
# Each with the square of the denominator of its update by hand, from the gradients so far.
ADAPTIVE: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (Adam, {}),
    (Adam, {"amsgrad": True}),
    (Adam, {"foreach": True}),
    (Adam, {"fused": True}),
    (Adam, {"betas": (0.0, 0.0)}),
    (Adam, {"capturable": False, "eps": 1e-3}),
    (AdamW, {}),
    (AdamW, {"amsgrad": True, "betas": (0.5, 0.9)}),
    (NAdam, {}),
    (RMSprop, {"alpha": 0.9}),
    (RMSprop, {"alpha": 0.9, "momentum": 0.5}),
    (RMSprop, {"alpha": 0.9, "centered": True}),
    (Adagrad, {"lr_decay": 0.1, "initial_accumulator_value": 0.5}),
    (Adagrad, {}),
    (Adamax, {"betas": (0.9, 0.5)}),
]


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """Steps on a handful of numbers are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def ran_away(step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> list[bool]:
    """Whether two runs (below and above a rate) end above their start, after `STEPS` steps of (θ, buffer)."""
    x, buffer = torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for _ in range(STEPS):
        x, buffer = step(x, buffer)
    return [not abs(number) < 1 for number in x.tolist()]


def spectral_radius(optimizer: Callable[[list[Tensor]], Optimizer], matrix: Tensor, parts: list[int]) -> float:
    """Of the linear map that an optimizer's step on ½xᵀAx makes of (x, momentum buffer), built from real steps."""
    n = len(matrix)
    columns = []
    for unit in torch.eye(2 * n, dtype=torch.float64):
        weights = [part.clone().requires_grad_() for part in torch.split(unit[:n], parts)]
        stepper = optimizer(weights)
        for weight, buffer in zip(weights, torch.split(unit[n:], parts), strict=True):
            stepper.state[weight]["momentum_buffer"] = buffer.clone()
        x = torch.cat([w.detach() for w in weights])
        for weight, grad in zip(weights, torch.split(matrix @ x, parts), strict=True):
            weight.grad = grad.clone()
        stepper.step()
        buffers = [stepper.state[w]["momentum_buffer"] for w in weights]
        ends = [b if stepper.defaults["momentum"] else torch.zeros_like(b) for b in buffers]
        columns.append(torch.cat([*(w.detach() for w in weights), *ends]))
    return float(np.abs(np.linalg.eigvals(torch.stack(columns, 1).numpy())).max())


def random_matrix(n: int, seed: int, smallest: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return a @ a.T / n + smallest * torch.eye(n, dtype=torch.float64)


def top(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix)[-1])


def felt_sharpness(state: Stability, matrix: Tensor) -> float:
    """λ_max of S (H + W) S by dense algebra."""
    scale = torch.ones(len(matrix)) if state.scale is None else state.scale
    operator = preconditioned(from_matrix(matrix), scale.to(matrix), state.weight_decay)
    return top(torch.stack([operator(e) for e in torch.eye(len(matrix), dtype=matrix.dtype)]))


def stepped(
    kind: type[Optimizer], settings: dict[str, Any], steps: int = 3, dtype: torch.dtype = torch.float32
) -> tuple[Optimizer, list[Tensor], list[Tensor]]:
    """An optimizer after steps with random gradients, its weights, and the flat gradients."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(2, 2, generator=generator).to(dtype), torch.randn(3, generator=generator).to(dtype)]
    weights = [w.requires_grad_() for w in weights]
    optimizer = kind(weights, lr=0.01, **settings)  # type: ignore[call-arg]
    gradients = []
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
        gradients.append(torch.cat([w.grad.reshape(-1).double() for w in weights if w.grad is not None]))
        optimizer.step()
    return optimizer, weights, gradients


def denominator_by_hand(kind: type[Optimizer], settings: dict[str, Any], gradients: list[Tensor]) -> Tensor:
    """What the last step divided by, written from the optimizers' papers."""
    t, g = len(gradients), torch.stack(gradients)
    beta2 = settings.get("betas", (0.9, 0.999))[1]
    eps = settings.get("eps", 1e-10 if kind is Adagrad else 1e-8)
    if kind is Adagrad:
        root = (settings.get("initial_accumulator_value", 0.0) + (g**2).sum(0)).sqrt() + eps
        return root * (1 + t * settings.get("lr_decay", 0.0))
    if kind is Adamax:
        decayed = torch.stack([beta2 ** (t - 1 - i) * (g[i].abs() + eps) for i in range(t)])
        return decayed.amax(0)
    rate = settings.get("alpha", beta2)
    means = []
    for end in range(1, t + 1):
        ages = torch.tensor([(1 - rate) * rate ** (end - 1 - i) for i in range(end)], dtype=torch.float64)
        means.append((ages @ g[:end] ** 2, ages @ g[:end]))
    square = torch.stack([m[0] for m in means]).amax(0) if settings.get("amsgrad") else means[-1][0]
    if settings.get("centered"):
        square = square - means[-1][1] ** 2
    correction = 1.0 if kind is RMSprop else 1 - rate**t
    return (square / correction).sqrt() + eps


@pytest.mark.parametrize("form", SGD_FORMS, ids=str)
@pytest.mark.parametrize("sharpness", [1e-10, 3.0, 1e15])
def test_sgd_turns_at_its_critical_rate(form: dict[str, Any], sharpness: float) -> None:
    """Torch's own SGD on ½λx² comes to rest 1 % below the critical rate and runs away 1 % above it."""
    form = {**form, "weight_decay": form.get("weight_decay", 0.0) * sharpness}
    rate = critical_lr(sharpness, **form)
    matrix = torch.tensor([[sharpness]], dtype=torch.float64)
    radii = [
        spectral_radius(lambda weights, at=rate * near: SGD(weights, lr=at, **form), matrix, [1])  # type: ignore[misc]
        for near in (0.99, 1.01)
    ]
    assert radii[0] < 1 < radii[1]


@pytest.mark.parametrize("form", SGD_FORMS, ids=str)
def test_simulated_sgd_turns_at_its_critical_rate(form: dict[str, Any]) -> None:
    """The update as torch's manual states it, run 10 000 steps: below the rate it shrinks and above it grows."""
    sharpness = 3.0
    rates = critical_lr(sharpness, **form) * torch.tensor([0.99, 1.01], dtype=torch.float64)
    beta, nesterov = form.get("momentum", 0.0), form.get("nesterov", False)
    kept = 1 - form.get("dampening", 0.0) if beta else 1.0

    def step(x: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
        gradient = (sharpness + form.get("weight_decay", 0.0)) * x
        buffer = beta * buffer + kept * gradient
        return x - rates * (gradient + beta * buffer if nesterov else buffer), buffer

    assert ran_away(step) == [False, True]


@pytest.mark.parametrize("form", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}], ids=str)
def test_running_torch_sgd_turns_at_its_critical_rate(form: dict[str, Any]) -> None:
    """Not only its linear map: 2 000 steps of the real optimizer, each weight with a rate of its own."""
    weights = [torch.ones(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    rate = critical_lr(3.0, **form)
    optimizer = SGD([{"params": [w], "lr": rate * near} for w, near in zip(weights, (0.99, 1.01), strict=True)], **form)
    for _ in range(2_000):
        for weight in weights:
            weight.grad = 3.0 * weight.detach()
        optimizer.step()
    ends = [abs(weight.item()) for weight in weights]
    assert ends[0] < 1e-3 < 1e3 < ends[1]


@pytest.mark.parametrize("beta1", [0.0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("decay", [0.0, 0.3, 40.0])
def test_adamw_with_a_frozen_preconditioner_turns_at_its_critical_rate(beta1: float, decay: float) -> None:
    """AdamW's update with v̂ held fixed shrinks 1 % below the rate and grows 1 % above it."""
    sharpness = 3.0
    rates = critical_lr_adam(sharpness, beta1, decay) * torch.tensor([0.99, 1.01], dtype=torch.float64)

    def step(x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        m = beta1 * m + (1 - beta1) * sharpness * x
        return x * (1 - rates * decay) - rates * m, m

    assert ran_away(step) == [False, True]


@pytest.mark.parametrize("kind", [Adam, AdamW, NAdam, RMSprop, Adagrad, Adamax])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_real_adaptive_optimizers_turn_at_their_critical_rate(kind: type[Optimizer], decay: float) -> None:
    """With v held by β₂ near 1 (or already huge), real steps shrink 1 % below the rate and grow 1 % above it."""
    settings: dict[str, Any] = {"weight_decay": decay}
    held = {"exp_avg_sq": 4.0, "square_avg": 4.0, "sum": 4e20, "exp_inf": 2.0}
    if kind is RMSprop:
        settings |= {"alpha": 1 - 1e-14, "momentum": 0.5}
    elif kind is not Adagrad:
        # One large step count, where the corrections of the start are over and μ of NAdam has settled.
        settings |= {"betas": (0.9, 1 - 1e-14)}
    if kind is NAdam:
        settings |= {"momentum_decay": 1.0}
    sharpness, ends = 3.0, []
    for near in (0.99, 1.01):
        weight = torch.full((1,), 1e-3, dtype=torch.float64, requires_grad=True)
        optimizer = kind([weight], lr=1.0, **settings)  # type: ignore[call-arg]
        weight.grad = torch.zeros_like(weight)
        optimizer.step()
        state = optimizer.state[weight]
        for name in held.keys() & state.keys():
            state[name].fill_(held[name])
        for name in ("exp_avg", "momentum_buffer"):
            state.get(name, weight.detach()).zero_()
        if kind in (Adam, AdamW, NAdam):
            state["step"].fill_(1e6)
            state["exp_avg_sq"] *= 1 - settings["betas"][1] ** 1e6
        if kind is NAdam:
            state["mu_product"].fill_(0.0)
        if kind is Adamax:
            state["step"].fill_(1e6)
        with torch.no_grad():
            weight.fill_(1e-3)
        found = stability(optimizer, [weight])
        optimizer.param_groups[0]["lr"] = near * found.critical_lr(
            felt_sharpness(found, torch.tensor([[sharpness]], dtype=torch.float64))
        )
        for _ in range(3_000):
            weight.grad = sharpness * weight.detach()
            optimizer.step()
            if not abs(weight.item()) < 1e-1:
                break
        ends.append(abs(weight.item()))
    assert ends[0] < 1e-6 < 1e-3 < ends[1]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "form",
    [form for form in SGD_FORMS if "weight_decay" not in form] + [{"momentum": 0.5, "weight_decay": 0.7}],
    ids=str,
)
def test_groups_with_rates_and_decays_of_their_own_turn_together(form: dict[str, Any], seed: int) -> None:
    """For groups of different rates and decays, the spectral radius crosses 1 at the critical reference rate."""
    matrix, parts = random_matrix(6, seed, smallest=0.05), [2, 3, 1]

    def build(weights: list[Tensor], factor: float = 1.0) -> SGD:
        groups = [
            {"params": [weights[0]], "lr": 0.2 * factor},
            {"params": [weights[1]], "lr": 0.02 * factor, "weight_decay": 0.4},
            {"params": [weights[2]], "lr": 0.6 * factor},
        ]
        return SGD(groups, **form)

    weights = [torch.zeros(part, dtype=torch.float64, requires_grad=True) for part in parts]
    found = stability(build(weights), weights)
    sharpness = felt_sharpness(found, matrix)
    assert found.lr == 0.2
    factor = 1 / found.ratio(sharpness)
    assert factor * found.lr == pytest.approx(found.critical_lr(sharpness))
    radii = [spectral_radius(lambda w, f=factor * near: build(w, f), matrix, parts) for near in (0.99, 1.01)]  # type: ignore[misc]
    assert radii[0] < 1 < radii[1]


def test_the_symmetric_form_has_the_eigenvalues_of_the_preconditioned_hessian() -> None:
    """S H S with S² from Adam's state has the spectrum of P⁻¹H."""
    optimizer, weights, gradients = stepped(Adam, {}, dtype=torch.float64)
    matrix = random_matrix(7, seed=1)
    found = stability(optimizer, weights)
    inverse = torch.diag(1 / denominator_by_hand(Adam, {}, gradients)) @ matrix
    assert felt_sharpness(found, matrix) == pytest.approx(float(torch.linalg.eigvals(inverse).real.max()), rel=1e-10)


@pytest.mark.parametrize(("kind", "settings"), ADAPTIVE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scale_is_what_the_optimizer_divides_by(
    kind: type[Optimizer], settings: dict[str, Any], dtype: torch.dtype
) -> None:
    """S² is 1 / (the denominator from the formulas), flat in the order asked for and in the vectors' type."""
    optimizer, weights, gradients = stepped(kind, settings, dtype=dtype)
    found = stability(optimizer, weights)
    expected = 1 / denominator_by_hand(kind, settings, gradients)
    assert found.scale is not None and found.scale.dtype == dtype
    torch.testing.assert_close(found.scale.double() ** 2, expected, rtol=1e-4, atol=0)
    backwards = stability(optimizer, weights[::-1]).scale
    assert backwards is not None and torch.equal(backwards, torch.cat([found.scale[4:], found.scale[:4]]))
    assert (found.kind, found.lr) == (kind.__name__, 0.01)


@pytest.mark.parametrize(
    ("kind", "settings", "threshold"),
    [
        (SGD, {}, 2.0),
        (SGD, {"momentum": 0.9}, 3.8),
        (SGD, {"momentum": 0.9, "nesterov": True}, 3.8 / 2.8),
        (SGD, {"momentum": 0.5, "dampening": 0.5}, 6.0),
        (SGD, {"dampening": 0.5}, 2.0),
        (Adam, {}, 38.0),
        (AdamW, {"betas": (0.5, 0.9), "weight_decay": 0.0}, 6.0),
        (Adamax, {}, 38.0),
        (RMSprop, {}, 2.0),
        (RMSprop, {"momentum": 0.9}, 3.8),
        (Adagrad, {}, 2.0),
        (NAdam, {"momentum_decay": 1e9}, 3.8 / 0.28),
        (NAdam, {"momentum_decay": 0.0}, 3.8 / (1.9 - 0.81)),
        (NAdam, {"momentum_decay": 5.0}, 3.8 / (1.9 - 1.8 * 0.9 * (1 - 0.5 * 0.96**20))),  # in the fourth step
    ],
    ids=str,
)
def test_thresholds(kind: type[Optimizer], settings: dict[str, Any], threshold: float) -> None:
    """The threshold of each optimizer is the one of its momentum, also for a subclass."""

    class Own(kind):  # type: ignore[misc, valid-type]
        pass

    for each in (kind, Own):
        optimizer, weights, _ = stepped(each, settings)
        found = stability(optimizer, weights)
        assert found.threshold == pytest.approx(threshold)
        assert found.critical_lr(2.0) == pytest.approx(threshold / 2)
        assert found.kind == each.__name__


def test_plain_sgd_has_no_scale() -> None:
    """With one rate for all there is nothing to scale; a frozen parameter or another rate brings the scale back."""
    a, b = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    assert stability(SGD([{"params": [a]}, {"params": [b]}], lr=0.1), [b, a]).scale is None
    frozen = stability(SGD([a], lr=0.1), [a, b]).scale
    assert frozen is not None and frozen.tolist() == [1, 1, 0]
    other = stability(SGD([{"params": [a]}, {"params": [b], "lr": 0.4}], lr=0.1), [a, b]).scale
    assert other is not None and other.tolist() == [1, 1, 2]


def test_the_reference_rate_is_that_of_the_first_group_that_moves_a_parameter() -> None:
    """Groups without any of the parameters and groups of rate zero are passed over."""
    a, b, c = (torch.ones(1, requires_grad=True) for _ in range(3))
    optimizer = SGD([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.0}, {"params": [c], "lr": torch.tensor(0.5)}])
    found = stability(optimizer, [c, b])
    assert found.lr == 0.5 and found.scale is not None and found.scale.tolist() == [1, 0]
    still = stability(optimizer, [b])
    assert (still.lr, still.scale, still.ratio(3.0), still.critical_lr(4.0)) == (0.0, None, 0.0, 0.5)


def test_decay_goes_where_the_optimizer_puts_it() -> None:
    """Adam's decay joins the Hessian, AdamW's stays apart, and groups that differ get a vector or the safe number."""
    optimizer, weights, _ = stepped(Adam, {"weight_decay": 0.2})
    coupled = stability(optimizer, weights)
    assert (coupled.weight_decay, coupled.decoupled_decay) == (0.2, 0.0)
    optimizer.param_groups[0]["decoupled_weight_decay"] = True
    apart = stability(optimizer, weights)
    assert (apart.weight_decay, apart.decoupled_decay) == (0.0, 0.2)
    assert apart.critical_lr(38.0) == pytest.approx(critical_lr_adam(38.0, 0.9, 0.2))
    optimizer, weights, _ = stepped(AdamW, {"weight_decay": 0.2})
    optimizer.param_groups[0].pop("decoupled_weight_decay", None)  # as in older torch
    optimizer.add_param_group({"params": [torch.ones(1, requires_grad=True)], "weight_decay": 9.0})
    assert stability(optimizer, weights).decoupled_decay == 0.2
    a, b, c = (torch.ones(2, requires_grad=True) for _ in range(3))
    optimizer = SGD([{"params": [a], "weight_decay": 0.5}, {"params": [b]}], lr=0.1)
    both = stability(optimizer, [b, c, a]).weight_decay
    assert isinstance(both, Tensor) and both.tolist() == [0, 0, 0, 0, 0.5, 0.5]
    for weight in (a, b):
        weight.grad = torch.ones(2)
    optimizer = AdamW([{"params": [a], "weight_decay": 0.1}, {"params": [b], "weight_decay": 0.2, "lr": 0.3}], lr=0.1)
    optimizer.step()
    assert stability(optimizer, [a, b]).decoupled_decay == pytest.approx(0.6)


def test_a_parameter_without_a_gradient_so_far_does_not_move() -> None:
    """Beside parameters that have stepped, one that never had a gradient counts as frozen."""
    a, b = torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)
    for optimizer in (Adam([a, b]), Adagrad([a, b])):
        a.grad = torch.ones(2)
        optimizer.step()
        scale = stability(optimizer, [a, b]).scale
        assert scale is not None and scale.tolist() == pytest.approx([1, 1, 0], abs=1e-6)


def test_looking_changes_nothing() -> None:
    """A reading leaves the optimizer's state and the weights as they were, also of what never stepped."""
    optimizer, weights, _ = stepped(RMSprop, {"centered": True})
    before = {name: value.clone() for name, value in optimizer.state[weights[0]].items()}
    stability(optimizer, [*weights, torch.ones(1, requires_grad=True)])
    assert len(optimizer.state) == 2
    assert all(torch.equal(before[name], value) for name, value in optimizer.state[weights[0]].items())


def test_half_precision_is_read_in_float32() -> None:
    """The vectors of bfloat16 parameters are float32, and denominators are computed in it."""
    optimizer, weights, gradients = stepped(Adam, {}, dtype=torch.bfloat16)
    scale = stability(optimizer, weights).scale
    assert scale is not None and scale.dtype == torch.float32
    torch.testing.assert_close(scale.double() ** 2, 1 / denominator_by_hand(Adam, {}, gradients), rtol=0.03, atol=0)


def test_shares_of_distributed_tensors_are_read_locally() -> None:
    """With DTensor parameters and states the scale is a plain tensor of this process's entries."""
    tensors = pytest.importorskip("torch.distributed.tensor")
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{Path(folder) / 'meet'}", rank=0, world_size=1)
        try:
            mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
            weight = torch.nn.Parameter(tensors.distribute_tensor(torch.ones(4, 2), mesh, [tensors.Shard(0)]))
            optimizer = AdamW([weight], lr=0.1)
            weight.grad = tensors.distribute_tensor(torch.full((4, 2), 4.0), mesh, [tensors.Shard(0)])
            optimizer.step()
            scale = stability(optimizer, [weight]).scale
            assert type(scale) is Tensor and scale.tolist() == pytest.approx([0.5] * 8)
        finally:
            dist.destroy_process_group()


class Foreign(Optimizer):
    """An optimizer that nobody has heard of."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__(weights, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        """Does nothing."""


WEIGHTS = [torch.ones(1, requires_grad=True), torch.ones(1, requires_grad=True)]


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: Foreign(WEIGHTS), r"of Foreign is not known, only of SGD, Adam.*lambda_max and batch_sharpness stay"),
        (lambda: torch.optim.LBFGS(WEIGHTS), "of LBFGS is not known"),
        (lambda: Adam(WEIGHTS), "Adam has not stepped yet"),
        (lambda: Adagrad(WEIGHTS), "Adagrad has not stepped yet"),
        (lambda: SGD(WEIGHTS, lr=0.1, maximize=True), "SGD has maximize=True.*negate the loss"),
        (lambda: SGD([torch.ones(1)], lr=0.1), "None of the 2 parameters is in a group of SGD"),
        (lambda: SGD(WEIGHTS, lr=0.1, momentum=1.0), r"SGD: momentum=1.0 must be .* below 1; at 1 or more no"),
        (lambda: SGD(WEIGHTS, lr=0.1, momentum=0.5, dampening=1.5), "dampening=1.5 must be 1 or less"),
        (
            lambda: SGD([{"params": WEIGHTS[:1], "momentum": 0.5}, {"params": WEIGHTS[1:]}], lr=0.1),
            r"Groups of SGD differ in momentum or betas.*\(2, 3\); measure one group",
        ),
        (lambda: SGD(WEIGHTS, lr=math.inf), "lr=inf in a group"),
    ],
)
def test_what_has_no_critical_rate_says_why(build: Callable[[], Optimizer], text: str) -> None:
    """An optimizer that cannot be read raises Unsupported with the reason and, where there is one, the remedy."""
    with pytest.raises(Unsupported, match=text):
        stability(build(), WEIGHTS)


def test_groups_that_differ_but_do_not_matter_are_no_reason_to_refuse() -> None:
    """A group of other momentum is fine if it stands still or has none of the parameters; β₂ may differ."""
    optimizer = SGD([{"params": WEIGHTS[:1], "momentum": 0.5}, {"params": WEIGHTS[1:], "lr": 0.0}], lr=0.1)
    assert stability(optimizer, WEIGHTS).threshold == 3.0
    optimizer.param_groups[1]["lr"] = 0.1
    assert stability(optimizer, WEIGHTS[1:]).threshold == 2.0


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_a_state_that_is_not_finite_is_refused(eps: float) -> None:
    """NaN among the squared gradients, or a zero divided by, is told instead of giving NaN."""
    weight = torch.ones(2, requires_grad=True)
    optimizer = Adam([weight], eps=eps)
    weight.grad = torch.tensor([1.0, math.nan if eps else 0.0])
    optimizer.step()
    with pytest.raises(Unsupported, match="Adam divides by zero or by NaN"):
        stability(optimizer, [weight])


@pytest.mark.parametrize("rate", [critical_lr, critical_lr_adam])
def test_curvature_at_the_ends_of_its_range(rate: Callable[[float], float]) -> None:
    """Without positive curvature no rate is too large, infinite curvature allows none, and NaN stays NaN."""
    assert [rate(x) for x in (0.0, -3.0, -math.inf, math.inf)] == [math.inf, math.inf, math.inf, 0.0]
    assert math.isnan(rate(math.nan))


def test_ratio_at_the_ends_of_its_range() -> None:
    """The ratio is zero without curvature, infinite for infinite curvature, and NaN for NaN."""
    state = Stability("SGD", 0.1, None, 0.0, 0.0, 2.0)
    assert [state.ratio(x) for x in (-1.0, 0.0, 20.0, math.inf)] == [0.0, 0.0, 1.0, math.inf]
    assert math.isnan(state.ratio(math.nan))
    assert Stability("SGD", 0.0, None, 0.0, 0.0, 2.0).ratio(math.inf) == 0.0


def test_decay_adds_to_negative_curvature() -> None:
    """What counts is λ + w: decay makes a slightly concave direction bound the rate."""
    assert critical_lr(-1.0, weight_decay=1.5) == 4.0
    assert critical_lr(1.0, momentum=0.5, dampening=1.0) == math.inf


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: critical_lr(1.0, momentum=-0.1), r"momentum=-0.1 must be a number, 0 or more and below 1"),
        (lambda: critical_lr(1.0, momentum=1.0), "at 1 or more no learning rate is stable"),
        (lambda: critical_lr(1.0, momentum=math.nan), "momentum=nan must be"),
        (lambda: critical_lr(1.0, momentum=0.5, dampening=1.5), "dampening=1.5 must be 1 or less; above it"),
        (lambda: critical_lr(1.0, momentum=0.5, dampening=math.nan), "dampening=nan must be 1 or less"),
        (
            lambda: critical_lr(1.0, momentum=0.5, dampening=0.1, nesterov=True),
            r"dampening=0.1 must be 0 with nesterov=True, as in torch.optim.SGD; leave one of them out",
        ),
        (lambda: critical_lr(1.0, weight_decay=-1.0), "weight_decay=-1.0 must be a number, 0 or more"),
        (lambda: critical_lr_adam(1.0, beta1=1.0), "beta1=1.0 must be a number, 0 or more and below 1"),
        (lambda: critical_lr_adam(1.0, decoupled_weight_decay=math.nan), "decoupled_weight_decay=nan must be"),
        (lambda: batch_sharpness(torch.ones(2), torch.ones(3)), r"product has shape \(3,\) and must have the gradient"),
        (lambda: learned_rates([1.0, 2.0], [1.0]), r"weights has shape \(1,\) and must have that of ritz, \(2,\)"),
        (lambda: learned_rates([[1.0]], [[1.0]]), r"must have that of ritz, \(1, 1\): \[m\] each"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[], Any], text: str) -> None:
    """An argument out of bounds is told with its value and the bound."""
    with pytest.raises(ValueError, match=text):
        call()


@pytest.mark.parametrize("size", [1e-10, 1.0, 1e15])
@pytest.mark.parametrize("curvature", [1e-10, 1.0, 1e15])
def test_batch_sharpness_is_a_rayleigh_quotient(size: float, curvature: float) -> None:
    """It is gᵀHg / gᵀg whatever the gradient's size, in float32."""
    matrix = random_matrix(20, seed=2) * curvature
    g = torch.randn(20, generator=torch.Generator().manual_seed(3), dtype=torch.float64) * size
    expected = float(g @ matrix @ g / (g @ g))
    assert batch_sharpness(g.float(), (matrix @ g).float()) == pytest.approx(expected, rel=1e-5)


def test_batch_sharpness_over_processes_and_of_nothing() -> None:
    """Dot products are summed by `reduce` before the division; a zero gradient has none; NaN stays NaN."""
    g, product = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 0.0, -1.0])
    rest = torch.tensor([float(g[1:] @ product[1:]), float(g[1:] @ g[1:])], dtype=torch.float64)
    assert batch_sharpness(g[:1], product[:1], reduce=lambda dots: dots + rest) == 0.0
    assert math.isnan(batch_sharpness(torch.zeros(2), torch.zeros(2)))
    assert math.isnan(batch_sharpness(torch.tensor([math.nan]), torch.ones(1)))
    assert batch_sharpness(torch.tensor([2.0]), torch.tensor([-6.0])) == -3.0


def test_learned_heavy_ball_is_the_fastest() -> None:
    """On a quadratic with these extremes no nearby rate or momentum contracts faster."""
    matrix = torch.diag(torch.tensor([0.3, 1.0, 7.0], dtype=torch.float64))

    def radius(lr: float, beta: float) -> float:
        return spectral_radius(lambda weights: SGD(weights, lr=lr, momentum=beta), matrix, [3])

    lr, beta = learned_rates([0.3, 1.0, 7.0], [0.3, 0.3, 0.4])
    best = radius(lr, beta)
    assert best == pytest.approx(math.sqrt(beta), rel=1e-6)
    for more, heavier in itertools.product((0.95, 1.0, 1.05), (0.95, 1.0, 1.05)):
        assert radius(lr * more, beta * heavier) >= best * (1 - 1e-6)


@pytest.mark.parametrize("size", [1e-10, 1.0, 1e15])
def test_learned_rates_scale_with_curvature(size: float) -> None:
    """The rate goes with 1 / curvature and the momentum does not change; signs do not matter."""
    ritz, weights = np.array([-4.0, 1e-5, 0.5, 9.0]) * size, np.array([0.1, 0.8, 0.05, 0.05])
    lr, beta = learned_rates(ritz, weights)
    root = math.sqrt(0.5)
    assert lr * size == pytest.approx(4 / (3 + root) ** 2) and beta == pytest.approx(((3 - root) / (3 + root)) ** 2)
    assert learned_rates(-ritz, weights, nesterov=True) == (pytest.approx(1 / (9 * size)), pytest.approx(beta))


@pytest.mark.parametrize(
    ("ritz", "weights"),
    [([], []), ([0.0], [0.1]), ([1.0], [1.0]), ([1.0, math.nan], [0.5, 0.5]), ([1.0, math.inf], [0.5, 0.5])],
)
def test_learned_rates_that_are_not_defined(ritz: list[float], weights: list[float]) -> None:
    """Without a Ritz value outside the bulk, or with one that is not finite, both are NaN."""
    assert all(math.isnan(number) for number in learned_rates(ritz, weights))


def test_zero_ritz_values_are_of_the_bulk() -> None:
    """Ritz values that float32 cannot tell from zero do not make the momentum 1."""
    assert learned_rates([1e-9, 0.0, 1.0, 9.0], [0.3, 0.3, 0.2, 0.2]) == (0.25, 0.25)
