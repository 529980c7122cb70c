"""What LogitsWatch sees of a step's cross entropies, and what it leaves out or refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from dynwatch.callbacks.logits import LogitsWatch, Scores, given_scores
from dynwatch.callbacks.snapshot import CannotReplayError

linear_cross_entropy = getattr(F, "linear_cross_entropy", None)


def seen(step: Callable[[], Any]) -> list[Scores]:
    """What the watch notes while a step runs; the step's result is the one that it has without the watch."""
    watch = LogitsWatch()
    plain = step()
    with watch:
        watched = step()
    assert torch.equal(torch.as_tensor(plain), torch.as_tensor(watched))
    watch.check_unchanged()
    return watch.scores


def one(step: Callable[[], Any]) -> Scores:
    (scores,) = seen(step)
    return scores


def loss_of(scores: Scores) -> Tensor:
    """The loss once more, from nothing but what was noted: the classes last."""
    assert scores.targets is not None
    if scores.kind == "sigmoid":
        return F.binary_cross_entropy_with_logits(scores.logits, scores.targets, **scores.options)
    classes = scores.logits.shape[-1]
    targets = scores.targets
    flat = targets.reshape(-1, classes) if targets.is_floating_point() else targets.reshape(-1)
    return F.cross_entropy(scores.logits.reshape(-1, classes), flat, **scores.options)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


WEIGHT = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
LABELS = torch.tensor([0, 3, 1, 2, -100, 3])
SOFTMAX: dict[str, tuple[tuple[int, ...], Tensor, dict[str, Any]]] = {
    "batch": ((6, 4), LABELS, {}),
    "one sample": ((4,), torch.tensor(2), {}),
    "tokens": ((2, 4, 3), LABELS.reshape(2, 3), {}),
    "pixels": ((2, 4, 3, 1), LABELS.reshape(2, 3, 1), {}),
    "probabilities": ((6, 4), torch.rand(6, 4, dtype=torch.float64).softmax(1), {}),
    "probabilities of tokens": ((2, 4, 3), torch.rand(2, 4, 3, dtype=torch.float64).softmax(1), {}),
    "one sample's probabilities": ((4,), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), {}),
    "another ignored": ((6, 4), LABELS.clamp(0), {"ignore_index": 3}),
    "weights": ((6, 4), LABELS, {"weight": WEIGHT}),
    "smoothing": ((6, 4), LABELS, {"label_smoothing": 0.1}),
    "all": ((2, 4, 3), LABELS.reshape(2, 3), {"weight": WEIGHT, "label_smoothing": 0.2, "ignore_index": -100}),
}


@pytest.mark.parametrize("form", ["function", "module"])
@pytest.mark.parametrize("kind", SOFTMAX)
def test_cross_entropy(kind: str, form: str) -> None:
    """Logits with the classes last, targets and options, from which the loss can be computed again."""
    shape, targets, options = SOFTMAX[kind]
    z = normal(*shape)
    loss = F.cross_entropy if form == "function" else None

    def step() -> Tensor:
        return loss(z, targets, **options) if loss else nn.CrossEntropyLoss(**options)(z, targets)

    scores = one(step)
    assert (scores.kind, scores.call) == ("softmax", 0)
    assert scores.logits.shape[-1] == 4 and scores.logits.requires_grad
    assert scores.samples == scores.logits.shape[:-1]
    torch.testing.assert_close(loss_of(scores), step())


COUNTED = {
    "batch": [True, True, True, True, False, True],
    "one sample": True,
    "tokens": [[True, True, True], [True, False, True]],
    "probabilities": [True] * 6,
    "another ignored": [True, False, True, True, True, False],
    "weights": [True, True, False, True, False, True],
    "all": [[True, True, False], [True, False, True]],
}


@pytest.mark.parametrize("kind", COUNTED)
def test_samples_that_count(kind: str) -> None:
    """Those that are not ignored and whose class has a weight; of probabilities those that are not all zero."""
    shape, targets, options = SOFTMAX[kind]
    counted = one(lambda: F.cross_entropy(normal(*shape).detach() * 0, targets, **options)).counted()
    assert (None if counted is None else counted.tolist()) == COUNTED[kind]


def test_what_does_not_count_has_no_gradient() -> None:
    """The mask is that of torch's own gradient."""
    for kind in ("batch", "weights", "another ignored", "all"):
        shape, targets, options = SOFTMAX[kind]
        z = normal(*shape)
        scores = one(lambda z=z, t=targets, o=options: F.cross_entropy(z, t, **(o | {"label_smoothing": 0.0})))
        gradient = torch.autograd.grad(F.cross_entropy(z, targets, **(options | {"label_smoothing": 0.0})), z)[0]
        moved = gradient.movedim(1, -1) if z.dim() > 2 else gradient
        assert torch.equal(scores.counted(), moved.abs().sum(-1) > 0)


def test_no_sample_counts() -> None:
    """A batch of padding alone: nothing counts, and nothing raises."""
    counted = one(lambda: torch.nan_to_num(F.cross_entropy(normal(2, 3).detach(), torch.full((2,), -100)))).counted()
    assert counted is not None and not counted.any()


@pytest.mark.parametrize("shape", [(6, 4), (4,), (2, 4, 3)])
def test_nll_loss_after_log_softmax(shape: tuple[int, ...]) -> None:
    """Log-probabilities are logits of the same softmax; weights and ignored targets come along."""
    z = normal(*shape)
    dim = 1 if len(shape) > 1 else 0
    targets = {1: torch.tensor(3), 2: LABELS, 3: LABELS.reshape(2, 3)}[len(shape)]
    for options in ({}, {"weight": WEIGHT, "ignore_index": 2}):
        targets = targets if not options else targets.clamp(0)
        scores = one(lambda t=targets, o=options: F.nll_loss(F.log_softmax(z, dim), t, **o))
        torch.testing.assert_close(loss_of(scores), F.nll_loss(F.log_softmax(z, dim), targets, **options))
    half = F.log_softmax(100 * torch.randn(6, 1000).bfloat16(), 1)
    assert one(lambda: nn.NLLLoss()(half, LABELS)).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", ["scores", "probabilities", "not a number"])
def test_nll_loss_of_something_else(wrong: str) -> None:
    """Numbers that are no log-probabilities are refused, with what to do; NaN is a model that blew up."""
    z = torch.randn(6, 4)
    given = {"scores": z, "probabilities": z.softmax(1), "not a number": z * torch.nan}[wrong]
    if wrong == "not a number":
        assert one(lambda: torch.nan_to_num(F.nll_loss(given, LABELS))).kind == "softmax"
        return
    with pytest.raises(CannotReplayError, match=r"^nll_loss was given numbers that are no log-probab.*pass logits="):
        seen(lambda: F.nll_loss(given, LABELS))


SIGMOID: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "one logit": ((6,), {}),
    "a column": ((6, 1), {}),
    "labels": ((6, 4), {}),
    "weight": ((6, 4), {"weight": WEIGHT}),
    "positive weight": ((6, 4), {"pos_weight": WEIGHT + 1}),
    "both": ((6, 4), {"weight": torch.tensor([[1.0], [0.0], [2.0], [1.0], [1.0], [0.0]]), "pos_weight": WEIGHT + 1}),
    "a number": ((), {}),
}


@pytest.mark.parametrize("form", ["function", "module"])
@pytest.mark.parametrize("kind", SIGMOID)
def test_binary_cross_entropy_with_logits(kind: str, form: str) -> None:
    """Each label is a sample of its own, those with a weight of zero do not count."""
    shape, options = SIGMOID[kind]
    z, targets = normal(*shape), torch.rand(shape, dtype=torch.float64).round()
    loss = F.binary_cross_entropy_with_logits if form == "function" else None

    def step() -> Tensor:
        return loss(z, targets, **options) if loss else nn.BCEWithLogitsLoss(**options)(z, targets)

    scores = one(step)
    assert scores.kind == "sigmoid" and scores.samples == z.shape
    torch.testing.assert_close(loss_of(scores), step())
    counted = scores.counted()
    assert (counted is None) == ("weight" not in options)
    if counted is not None:
        assert torch.equal(counted, torch.autograd.grad(step(), z)[0] != 0)


@pytest.mark.skipif(linear_cross_entropy is None, reason="torch has no linear_cross_entropy")
@pytest.mark.parametrize("options", [{}, {"weight": WEIGHT, "label_smoothing": 0.1}, {"ignore_index": 3}])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_cross_entropy(options: dict[str, Any], bias: bool) -> None:
    """The logits are those of its linear layer, and depend on its weights."""
    hidden, weight = normal(6, 5), normal(4, 5)
    given = options | ({"linear_bias": normal(4)} if bias else {})
    targets = LABELS.clamp(0) if "ignore_index" in options else LABELS
    loss: Any = linear_cross_entropy
    scores = one(lambda: loss(hidden, weight, targets, **given))
    torch.testing.assert_close(scores.logits, F.linear(hidden, weight, given.get("linear_bias")))
    torch.testing.assert_close(loss_of(scores), loss(hidden, weight, targets, **given))
    assert torch.autograd.grad(scores.logits.sum(), weight)[0].any()


@pytest.mark.skipif(linear_cross_entropy is None, reason="torch has no linear_cross_entropy")
def test_linear_cross_entropy_of_tokens() -> None:
    """With class probabilities, and with a weight of more dimensions, where classes come second."""
    loss: Any = linear_cross_entropy
    hidden, weight = normal(6, 5), normal(4, 2, 5)
    targets = torch.randint(4, (6, 2))
    scores = one(lambda: loss(hidden, weight, targets))
    assert scores.logits.shape == (6, 2, 4)
    torch.testing.assert_close(loss_of(scores), loss(hidden, weight, targets))
    soft = torch.rand(6, 4, dtype=torch.float64).softmax(1)
    scores = one(lambda: loss(hidden, weight[:, 0], soft))
    torch.testing.assert_close(loss_of(scores), loss(hidden, weight[:, 0], soft))


@pytest.mark.parametrize("given", [True, False])
def test_classes_that_are_masked_out(given: bool) -> None:
    """-inf becomes a finite logit that leaves the loss as it is and moves with the likeliest class."""
    free = normal(6, 4)
    mask = torch.tensor([[False, False, False, True]]).expand(6, 4)
    z, y = free.masked_fill(mask, -torch.inf), LABELS.clamp(0, 2)
    scores = given_scores((z, y)) if given else one(lambda: F.cross_entropy(z, y))
    assert scores.logits.isfinite().all() and torch.equal(scores.logits[:, :3], z[:, :3])
    torch.testing.assert_close(loss_of(scores), F.cross_entropy(z, y), rtol=1e-12, atol=0.0)
    moved = torch.autograd.grad(scores.logits[:, 3].sum(), free)[0]
    assert torch.equal(moved.argmax(1), free[:, :3].argmax(1)) and moved.sum(1).tolist() == [1.0] * 6


def test_several_losses_are_noted_in_order() -> None:
    """Each with its number; a loss inside of another one's module counts once."""
    z, y = normal(6, 4), LABELS.clamp(0)

    def step() -> Tensor:
        first = nn.CrossEntropyLoss()(z, y)
        return first + F.binary_cross_entropy_with_logits(z[:, 0], z[:, 1].detach()) + F.cross_entropy(2 * z, y)

    assert [(s.call, s.kind) for s in seen(step)] == [(0, "softmax"), (1, "sigmoid"), (2, "softmax")]


def test_what_is_computed_without_gradients_is_left_out() -> None:
    """Metrics under no_grad and in inference mode; losses of other kinds are not seen."""
    z, y = normal(6, 4), LABELS.clamp(0)

    def step() -> Tensor:
        with torch.no_grad():
            F.cross_entropy(z, y)
        with torch.inference_mode():
            F.cross_entropy(z.detach() + 1, y)
        return F.mse_loss(z, z.detach()) + F.kl_div(z.log_softmax(1), z.softmax(1).detach())

    assert seen(step) == []


def test_arguments_by_name_and_old_ones() -> None:
    """However torch lets them be given."""
    z, y = normal(6, 4), LABELS
    scores = one(lambda: F.cross_entropy(target=y, input=z, weight=WEIGHT, reduction="sum"))
    assert scores.logits is z and scores.targets is y and scores.options["weight"] is WEIGHT


def test_logits_that_are_changed_after_their_loss() -> None:
    """They are refused, because what was noted is gone; a change before it, or of a copy, is fine."""
    z, y = normal(6, 4), LABELS
    for late, fine in ((False, True), (True, False)):
        watch = LogitsWatch()
        with watch:
            logits = z * 1
            if not late:
                logits.mul_(2)
            F.cross_entropy(logits, y)
            logits.clone().mul_(3)
            if late:
                logits.mul_(2)
        if fine:
            watch.check_unchanged()
        else:
            with pytest.raises(CannotReplayError, match=r"changes its logits in place after .*logits\.clone\(\)"):
                watch.check_unchanged()


def test_a_view_that_is_changed_after_the_loss() -> None:
    """Logits of tokens are noted as a view, which a change of the whole reaches."""
    watch = LogitsWatch()
    with watch:
        logits = normal(2, 4, 3) * 1
        F.cross_entropy(logits, LABELS.reshape(2, 3))
        logits[0, 0, 0] = 1
    with pytest.raises(CannotReplayError, match="in place"):
        watch.check_unchanged()


def test_a_call_that_raises_is_not_noted() -> None:
    """The user's error comes through."""
    watch = LogitsWatch()
    with watch, pytest.raises((ValueError, RuntimeError)):
        F.cross_entropy(normal(6, 4), torch.zeros(5, dtype=torch.long))
    assert watch.scores == []


# --- what a function of the user's returned


def test_given_logits() -> None:
    """Alone or with targets, of any number of leading dimensions; -100 does not count."""
    z = normal(2, 3, 4)
    y = LABELS.reshape(2, 3)
    for result, targets in ((z, None), ((z, None), None), ((z, y), y), ([z, y], y), ((z, z.softmax(-1)), "soft")):
        scores = given_scores(result)
        assert scores.kind == "softmax" and scores.logits is z and scores.samples == (2, 3)
        assert targets == "soft" or scores.targets is targets
        counted = scores.counted()
        assert (counted is None) == (targets is None)
        if counted is not None:
            assert torch.equal(counted, y != -100) if targets is y else bool(counted.all())


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float64])
def test_given_logits_of_a_sigmoid(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A last dimension of one is a sigmoid's; targets of any kind are numbers then, in its shape."""
    z, y = normal(6, 1), torch.tensor([0, 1, 1, 0, 1, 0]).to(dtype).reshape(shape)
    scores = given_scores((z, y))
    assert scores.kind == "sigmoid" and scores.logits.shape == (6,)
    assert scores.targets is not None
    assert scores.targets.tolist() == [0, 1, 1, 0, 1, 0] and scores.targets.dtype == z.dtype
    assert given_scores(z).targets is None


@pytest.mark.parametrize(
    ("result", "kinds"),
    [
        (None, "NoneType, NoneType"),
        (1.0, "float, NoneType"),
        ({"logits": torch.zeros(2, 3)}, "dict, NoneType"),
        ((torch.zeros(2, 3), torch.zeros(2), 1), "tuple, NoneType"),
        ((torch.zeros(2, 3), [0, 1]), "Tensor, list"),
        (torch.zeros(2, 3, dtype=torch.long), "Tensor, NoneType"),
        (torch.zeros(()), "Tensor, NoneType"),
        (torch.zeros(2, 3, dtype=torch.complex64), "Tensor, NoneType"),
    ],
)
def test_wrong_results(result: Any, kinds: str) -> None:
    """The message says what came back and what to return."""
    with pytest.raises(
        CannotReplayError, match=f"^the function logits= returned {kinds} and must return logits, a float"
    ):
        given_scores(result)


@pytest.mark.parametrize(
    "targets",
    [torch.zeros(5, dtype=torch.long), torch.zeros(6, 3), torch.zeros(6, 4, dtype=torch.long), torch.zeros(6)],
)
@pytest.mark.parametrize("classes", [4, 1])
def test_targets_of_another_shape(targets: Tensor, classes: int) -> None:
    """The message says both shapes."""
    if classes == 1 and targets.shape == (6,):
        return
    with pytest.raises(CannotReplayError, match=r"targets of shape \([\d, ]+\).* logits of shape \(6, [14]\)"):
        given_scores((torch.zeros(6, classes), targets))
