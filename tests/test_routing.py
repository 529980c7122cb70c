"""Health of a router against loops over tokens, additivity, degenerate loads, and no waiting for the device."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dynwatch.routing import (
    DeadExperts,
    Ratio,
    Routing,
    aux_loss,
    coactivation,
    coactivation_counts,
    dropped_share,
    effective_experts,
    load_counts,
    load_cv,
    load_entropy,
    max_vio,
    mean_probabilities,
    normalized_entropy,
    router_entropy,
    router_probabilities,
    stability,
    z_loss,
)

NAN, INF = math.nan, math.inf
LOGITS = torch.tensor([[2.0, 1, 0, -1], [1, 2, 0, -1], [2, 0, 1, -1], [3, 1, 0, 0]])
EXAMPLE = Routing(LOGITS.topk(2).indices, 4, router_probabilities(LOGITS))


def some_routing(n: int = 200, n_experts: int = 6, k: int = 2) -> tuple[Routing, Tensor]:
    """Random routing with padding and empty slots, and its logits."""
    logits = torch.randn(n, n_experts) * 2
    indices = torch.where(torch.rand(n, k) < 0.1, -1, logits.topk(k).indices)
    return Routing(indices, n_experts, router_probabilities(logits), valid=torch.rand(n) > 0.25), logits


def part_of(routing: Routing, which: slice) -> Routing:
    """Some of its tokens."""
    assert routing.probabilities is not None and routing.valid is not None
    return Routing(routing.indices[which], routing.n_experts, routing.probabilities[which], valid=routing.valid[which])


# --- the worked example


def test_the_worked_example() -> None:
    """All figures of four tokens and four experts, as worked out by hand."""
    load = load_counts(EXAMPLE)
    assert load.tolist() == [4, 3, 1, 0]
    assert aux_loss(load, mean_probabilities(EXAMPLE).value).item() == pytest.approx(1.627754, abs=1e-6)
    assert load_cv(load).item() == pytest.approx(0.790569, abs=1e-6)
    assert max_vio(load).item() == 1.0
    assert load_entropy(load).item() == pytest.approx(0.974315, abs=1e-6)
    assert normalized_entropy(load_entropy(load), 4).item() == pytest.approx(0.702820, abs=1e-6)
    assert effective_experts(load).item() == pytest.approx(2.649351, abs=1e-6)
    entropy = router_entropy(EXAMPLE).value
    assert entropy.item() == pytest.approx(0.878672, abs=1e-6)
    assert normalized_entropy(entropy, 4).item() == pytest.approx(0.633828, abs=1e-6)
    assert z_loss(LOGITS).value.item() == pytest.approx(7.043521, abs=1e-6)
    assert dropped_share(load, capacity=2).value.item() == 0.375
    assert DeadExperts(window=1).update(load).tolist() == [False, False, False, True]
    together = coactivation(coactivation_counts(EXAMPLE))
    assert together[0].tolist() == [1.0, 0.75, 0.25, 0.0]
    assert together[[1, 2], 0].tolist() == [1.0, 1.0]
    assert together[3].isnan().all()


def test_stability_of_the_worked_example() -> None:
    """Order within a token does not matter."""
    before = Routing(torch.tensor([[0, 1], [1, 0], [0, 2], [0, 1]]), 4)
    now = Routing(torch.tensor([[0, 1], [0, 2], [0, 2], [3, 1]]), 4)
    assert stability(now, before).value.item() == stability(before, now).value.item() == 0.75
    assert stability(now, now).value.item() == 1.0


# --- against loops


@pytest.mark.parametrize("seed", range(5))
def test_every_measure_against_a_loop_over_tokens(seed: int) -> None:
    """Padding and empty slots included."""
    torch.manual_seed(seed)
    routing, logits = some_routing()
    later, _ = some_routing()
    assert routing.valid is not None and routing.probabilities is not None and later.valid is not None
    chosen, together, shared, slots = Counter[int](), Counter[tuple[int, int]](), 0, 0
    entropy, z, means, tokens = 0.0, 0.0, [0.0] * 6, 0
    for t in range(200):
        if not routing.valid[t]:
            continue
        experts = [e for e in routing.indices[t].tolist() if e >= 0]
        chosen.update(experts)
        together.update(permutations(experts, 2))
        row = routing.probabilities[t].tolist()
        entropy -= sum(p * math.log(p) for p in row)
        means = [mean + p for mean, p in zip(means, row, strict=True)]
        z += math.log(sum(map(math.exp, logits[t].tolist()))) ** 2
        tokens += 1
        if later.valid[t]:
            others = [e for e in later.indices[t].tolist() if e >= 0]
            shared += len({*experts} & {*others})
            slots += max(len(experts), len(others))
    load = load_counts(routing)
    assert load.tolist() == [chosen[e] for e in range(6)]
    counts = coactivation_counts(routing)
    assert counts.tolist() == [[together[i, j] if i != j else chosen[i] for j in range(6)] for i in range(6)]
    assert router_entropy(routing).value.item() == pytest.approx(entropy / tokens)
    assert z_loss(logits, routing.valid).value.item() == pytest.approx(z / tokens)
    means = [mean / tokens for mean in means]
    assert mean_probabilities(routing).value.tolist() == pytest.approx(means)
    balance = 6 * sum(chosen[e] * means[e] for e in range(6)) / sum(chosen.values())
    assert aux_loss(load, mean_probabilities(routing).value).item() == pytest.approx(balance)
    overlap = stability(routing, later)
    assert (overlap.total.item(), overlap.count.item()) == (shared, slots)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=9).filter(any), st.integers(0, 10**12))
@settings(max_examples=150, deadline=None)
def test_measures_of_a_load_against_plain_numbers(load: list[int], capacity: int) -> None:
    """Any counts, very unequal ones too."""
    n, mean = len(load), sum(load) / len(load)
    counts = torch.tensor(load)
    assert max_vio(counts).item() == pytest.approx(max(load) / mean - 1, abs=1e-9)
    deviation = math.sqrt(sum((c - mean) ** 2 for c in load) / n)
    assert load_cv(counts).item() == pytest.approx(deviation / mean, abs=1e-9)
    shares = [c / sum(load) for c in load if c]
    entropy = -sum(f * math.log(f) for f in shares)
    assert load_entropy(counts).item() == pytest.approx(entropy, abs=1e-9)
    assert effective_experts(counts).item() == pytest.approx(math.exp(entropy))
    dropped = sum(max(c - capacity, 0) for c in load) / sum(load)
    assert dropped_share(counts, capacity).value.item() == pytest.approx(dropped)


# --- adding parts


def test_parts_add_up_to_the_whole() -> None:
    """Three batches or processes with unequal numbers of tokens give the figures of all their tokens together."""
    whole, logits = some_routing()
    other = Routing(whole.indices.flip(0), 6, whole.probabilities, valid=whole.valid)
    assert whole.valid is not None
    pieces = [slice(0, 10), slice(10, 120), slice(120, 200)]
    parts = [part_of(whole, piece) for piece in pieces]
    assert torch.equal(sum(load_counts(part) for part in parts), load_counts(whole))  # type: ignore[arg-type]
    assert torch.equal(sum(coactivation_counts(part) for part in parts), coactivation_counts(whole))  # type: ignore[arg-type]
    for measure in (mean_probabilities, router_entropy):
        check_sum([measure(part) for part in parts], measure(whole))
    check_sum([z_loss(logits[piece], whole.valid[piece]) for piece in pieces], z_loss(logits, whole.valid))
    overlaps = [stability(part, part_of(other, piece)) for part, piece in zip(parts, pieces, strict=True)]
    check_sum(overlaps, stability(whole, other))


def check_sum(parts: list[Ratio], whole: Ratio) -> None:
    """The parts' sum is the whole, and is not the mean of their means."""
    first, *others = parts
    for other in others:
        first = first + other
    assert torch.allclose(first.total.double(), whole.total.double(), rtol=1e-13)
    assert torch.equal(first.count, whole.count)
    means = torch.stack([part.value.double() for part in parts]).mean(0)
    assert not torch.allclose(means, whole.value.double(), rtol=1e-6)


def test_means_of_counts_serve_as_well_as_counts() -> None:
    """A load averaged over processes has the measures of the summed one."""
    load = torch.tensor([7, 2, 0, 1])
    for measure in (max_vio, load_cv, load_entropy, effective_experts):
        assert measure(load / 3).item() == pytest.approx(measure(load).item(), rel=1e-6)


def test_layers_are_measured_at_once() -> None:
    """Leading dimensions of a load are kept."""
    loads = torch.randint(0, 50, (3, 5))
    for measure in (max_vio, load_cv, load_entropy, effective_experts):
        assert torch.allclose(measure(loads), torch.stack([measure(load) for load in loads]), rtol=1e-14)
    means = torch.rand(3, 5)
    each = torch.stack([aux_loss(load, mean) for load, mean in zip(loads, means, strict=True)])
    assert torch.allclose(aux_loss(loads, means), each, rtol=1e-14)
    dropped = [dropped_share(load, 20) for load in loads]
    assert torch.equal((dropped[0] + dropped[1] + dropped[2]).value, dropped_share(loads, 20).value)


# --- degenerate input


@pytest.mark.parametrize("n_experts", [1, 2, 7, 64])
def test_the_ends_of_every_scale(n_experts: int) -> None:
    """A balanced load, and one expert that takes all."""
    even = torch.full((n_experts,), 3)
    assert max_vio(even).item() == pytest.approx(0, abs=1e-12)
    assert load_cv(even).item() == pytest.approx(0, abs=1e-12)
    assert effective_experts(even).item() == pytest.approx(n_experts)
    assert normalized_entropy(load_entropy(even), n_experts).item() == pytest.approx(1)
    one = torch.zeros(n_experts)
    one[-1] = 5
    assert max_vio(one).item() == pytest.approx(n_experts - 1)
    assert load_cv(one).item() == pytest.approx(math.sqrt(n_experts - 1))
    assert effective_experts(one).item() == 1.0
    assert aux_loss(even, even / even.sum()).item() == pytest.approx(1)
    assert aux_loss(one, one / 5).item() == pytest.approx(n_experts)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_balanced_aux_loss_is_one_for_any_k(k: int) -> None:
    """Unlike where the 1/k is left out."""
    indices = torch.stack([(torch.arange(8) + i) % 8 for i in range(k)], dim=1)
    routing = Routing(indices, 8, torch.full((8, 8), 1 / 8))
    assert aux_loss(load_counts(routing), mean_probabilities(routing).value).item() == pytest.approx(1)


@pytest.mark.parametrize("tokens", [0, 3])
def test_without_a_token_that_counts_all_is_nan(tokens: int) -> None:
    """An empty batch and one that is all padding have counts of zero and no means."""
    valid = torch.zeros(tokens, dtype=torch.bool)
    routing = Routing(torch.zeros(tokens, 2, dtype=torch.int64), 4, torch.ones(tokens, 4), valid=valid)
    load = load_counts(routing)
    assert load.tolist() == [0] * 4 and not coactivation_counts(routing).any()
    figures = [measure(load) for measure in (max_vio, load_cv, load_entropy, effective_experts)]
    ratios = [router_entropy(routing), z_loss(torch.ones(tokens, 4), valid), stability(routing, routing)]
    figures += [ratio.value for ratio in [*ratios, dropped_share(load, 1)]]
    figures += [aux_loss(load, mean_probabilities(routing).value), normalized_entropy(load_entropy(load), 1)]
    assert all(math.isnan(figure.item()) for figure in figures)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_in_padding_is_nothing_and_in_a_token_shows(bad: float) -> None:
    """Masked tokens count nowhere, whatever they hold; a counted one makes the mean NaN and leaves the load."""
    logits = LOGITS.clone()
    logits[3] = bad
    padded = Routing(EXAMPLE.indices, 4, router_probabilities(logits), valid=torch.tensor([True, True, True, False]))
    assert padded.valid is not None
    short = Routing(EXAMPLE.indices[:3], 4, router_probabilities(LOGITS[:3]))
    assert torch.equal(load_counts(padded), load_counts(short))
    assert router_entropy(padded).value.item() == pytest.approx(router_entropy(short).value.item())
    assert torch.allclose(mean_probabilities(padded).value, mean_probabilities(short).value)
    assert z_loss(logits, padded.valid).value.item() == pytest.approx(z_loss(LOGITS[:3]).value.item())
    shown = Routing(EXAMPLE.indices, 4, router_probabilities(logits))
    assert router_entropy(shown).value.isnan() and mean_probabilities(shown).value.isnan().all()
    assert load_counts(shown).tolist() == [4, 3, 1, 0]
    assert not z_loss(logits).value.isfinite()


def test_one_expert_and_one_token() -> None:
    """The smallest router has finite figures."""
    routing = Routing(torch.tensor([[0]]), 1, torch.ones(1, 1))
    load = load_counts(routing)
    assert (max_vio(load).item(), load_cv(load).item(), effective_experts(load).item()) == (0.0, 0.0, 1.0)
    assert router_entropy(routing).value.item() == 0.0
    assert coactivation(coactivation_counts(routing)).tolist() == [[1.0]]


def test_probabilities_of_zero_have_no_entropy() -> None:
    """0 log 0 is 0."""
    routing = Routing(torch.tensor([[0], [1]]), 3, torch.eye(3)[:2])
    assert router_entropy(routing).value.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_sums_over_many_tokens_keep_their_digits(dtype: torch.dtype) -> None:
    """A sum in the dtype of the input would stop growing or lose digits."""
    probabilities = torch.full((300_000, 2), 0.5, dtype=dtype)
    probabilities[:, 0] = 0.1
    routing = Routing(torch.zeros(300_000, 1, dtype=torch.int32), 2, probabilities)
    exact = probabilities[0].double()
    assert torch.allclose(mean_probabilities(routing).value, exact, rtol=1e-12)
    entropy = -(exact * exact.log()).sum().item()
    assert router_entropy(routing).value.item() == pytest.approx(entropy, rel=1e-6)
    assert z_loss(probabilities).value.item() == pytest.approx(exact.logsumexp(0).item() ** 2, rel=1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-10, 1.0, 1e15, 1e30])
def test_the_z_loss_of_logits_of_any_size(size: float) -> None:
    """Squares that no float32 holds are held."""
    logits = LOGITS * size
    assert z_loss(logits).value.item() == pytest.approx(logits.double().logsumexp(-1).square().mean().item(), rel=1e-6)


# --- probabilities


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_probabilities_of_logits_against_plain_numbers(logits: list[float]) -> None:
    """Softmax, and sigmoid scores divided by their sum, both from logits and given."""
    row = torch.tensor(logits, dtype=torch.float64)
    powers = [math.exp(z - max(logits)) for z in logits]
    assert router_probabilities(row).tolist() == pytest.approx([p / sum(powers) for p in powers])
    scores = [1 / (1 + math.exp(-z)) for z in logits]
    expected = [score / sum(scores) for score in scores]
    assert router_probabilities(row, "sigmoid").tolist() == pytest.approx(expected)
    assert router_probabilities(torch.tensor(scores, dtype=torch.float64), "given").tolist() == pytest.approx(expected)


def test_sigmoid_scores_of_any_size_sum_to_one() -> None:
    """Also where every sigmoid is 0 or 1 in floating point."""
    logits = torch.tensor([[-200.0, -201.0], [-1e15, -1e15], [1e15, 1e15], [0.0, 1e-10]])
    found = router_probabilities(logits, "sigmoid")
    assert found[0].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e)])
    assert found[1:].tolist() == [[0.5, 0.5]] * 3


@pytest.mark.parametrize("size", [1e-44, 1e-10, 1.0, 1e15, 3e38])
def test_given_scores_of_any_size_sum_to_one(size: float) -> None:
    """Sparse ones too; a row of zeros has no preference, and a row with NaN is NaN."""
    scores = torch.tensor([[1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [NAN, 1.0, 0.0]]) * size
    found = router_probabilities(scores, "given")
    assert found[:3].tolist() == [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], pytest.approx([1 / 3] * 3)]
    assert found[3].isnan().all()


def test_probabilities_take_no_part_in_autograd() -> None:
    """Looking asks for no gradient, and half precision comes out as float32."""
    logits = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    for score in ("softmax", "sigmoid", "given"):
        found = router_probabilities(logits.abs(), score)  # type: ignore[arg-type]
        assert not found.requires_grad and found.dtype == torch.float32
    routing = Routing(torch.zeros(3, 1, dtype=torch.int64), 4, logits.softmax(-1))
    figures = [router_entropy(routing), mean_probabilities(routing), z_loss(logits)]
    assert not any(figure.value.requires_grad for figure in figures)


def test_an_unknown_score_is_an_error() -> None:
    """The message lists those there are."""
    with pytest.raises(ValueError, match=r"^score='tanh' must be 'softmax' or 'sigmoid'"):
        router_probabilities(LOGITS, "tanh")  # type: ignore[arg-type]


# --- dead experts


LOADS = st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), max_size=15)


@given(loads=LOADS, window=st.integers(1, 4), cut=st.integers(0, 15))
@settings(max_examples=150, deadline=None)
def test_dead_experts_against_the_whole_history(loads: list[list[int]], window: int, cut: int) -> None:
    """Dead is who had nothing in the last `window` looks that saw a token, also through a restored state."""
    dead, looks = DeadExperts(window), []
    for i, load in enumerate(loads):
        if i == cut:
            state = json.loads(json.dumps(dead.state_dict()))
            dead = DeadExperts(window)
            dead.load_state_dict(state)
        looks += [load] if any(load) else []
        recent = looks[-window:]
        expected = [len(looks) >= window and not any(look[e] for look in recent) for e in range(3)]
        assert dead.update(torch.tensor(load)).tolist() == expected


def test_dead_experts_of_many_layers_and_of_means() -> None:
    """Layers are judged on their own, one without a token (or with NaN) is not; loads may be floats."""
    dead = DeadExperts(window=2)
    loads = torch.tensor([[0.0, 0.5], [0.0, 0.0], [NAN, 1.0]])
    assert not dead.update(loads).any()
    assert dead.update(loads).tolist() == [[True, False], [False, False], [False, False]]


def test_dead_experts_of_another_number_start_afresh() -> None:
    """Instead of raising."""
    dead = DeadExperts(window=2)
    dead.update(torch.tensor([1, 0]))
    assert dead.update(torch.tensor([1, 0, 0])).tolist() == [False] * 3
    assert dead.update(torch.tensor([1, 0, 1])).tolist() == [False, True, False]


def test_what_a_dead_expert_is_told_by_is_a_copy() -> None:
    """Later looks change no state or answer that was taken, and the load stays as it was."""
    dead, load = DeadExperts(window=1), torch.tensor([0, 1])
    told, state = dead.update(load), dead.state_dict()
    dead.update(torch.tensor([1, 0]))
    assert (told.tolist(), state, load.tolist()) == ([True, False], {"silent": [1, 0]}, [0, 1])
    fresh = DeadExperts(window=1)
    fresh.load_state_dict(DeadExperts(window=1).state_dict())
    assert fresh.update(load).tolist() == [True, False]


# --- errors


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"indices": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            "indices of shape [3] must be [N, k] with k from 1 ",
        ),
        ({"indices": torch.zeros(3, 5, dtype=torch.int64)}, ValueError, "indices of shape [3, 5] must be [N, k] with "),
        ({"indices": torch.zeros(3, 0, dtype=torch.int64)}, ValueError, "indices of shape [3, 0] must be [N, k] with "),
        ({"indices": torch.zeros(3, 2)}, TypeError, "indices of torch.float32 must be integers; convert them first."),
        ({"indices": torch.zeros(3, 2) > 0}, TypeError, "indices of torch.bool must be integers; convert them first."),
        ({"n_experts": 0}, ValueError, "n_experts=0 must be a whole number, 1 or more."),
        ({"probabilities": torch.zeros(3, 2)}, ValueError, "probabilities of shape [3, 2] must be [3, 4], one row a "),
        ({"probabilities": torch.zeros(3, 4).int()}, TypeError, "probabilities of torch.int32 must be floats; convert"),
        ({"weights": torch.zeros(3, 4)}, ValueError, "weights of shape [3, 4] must be [3, 2], one row a token."),
        ({"valid": torch.ones(3, 1) > 0}, ValueError, "valid of shape [3, 1] must be [3], one row a token."),
        ({"valid": torch.ones(3)}, TypeError, "valid of torch.float32 must be bools; convert them first."),
        ({"samples": torch.ones(3)}, TypeError, "samples of torch.float32 must be integers; convert them first."),
    ],
)
def test_a_record_that_does_not_fit_is_an_error(
    change: dict[str, object], error: type[Exception], message: str
) -> None:
    """The message names the field, what it is and what it must be."""
    fitting = {"indices": torch.zeros(3, 2, dtype=torch.int64), "n_experts": 4}
    with pytest.raises(error, match="^" + re.escape(message)):
        Routing(**{**fitting, **change})  # type: ignore[arg-type]


def test_other_misuse_is_an_error() -> None:
    """Each message says what is needed."""
    bare = Routing(EXAMPLE.indices, 4)
    for measure in (router_entropy, mean_probabilities):
        with pytest.raises(ValueError, match=r"^routing.probabilities is None and must be \[N, E\]; router_probabili"):
            measure(bare)
    with pytest.raises(ValueError, match=r"^logits of shape \[4\] must be \[N, E\]; flatten"):
        z_loss(LOGITS[0])
    with pytest.raises(ValueError, match=r"^valid of shape \[3\] must be \[4\], one row a token.$"):
        z_loss(LOGITS, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"^capacity=-1 must be a number, 0 or more\.$"):
        dropped_share(load_counts(EXAMPLE), -1)
    with pytest.raises(ValueError, match=r"^window=0 must be a whole number, 1 or more\.$"):
        DeadExperts(0)
    with pytest.raises(ValueError, match=r"^n_experts=0 must be a whole number, 1 or more\.$"):
        normalized_entropy(torch.ones(()), 0)
    other = Routing(EXAMPLE.indices, 5)
    with pytest.raises(ValueError, match=r"\(tokens, k, experts\) \(4, 2, 4\) and \(4, 2, 5\), which must be equal"):
        stability(EXAMPLE, other)


# --- no waiting


class Waits(TorchDispatchMode):
    """Collects operations that make the host wait for a device, or whose shape depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            self.seen.append(str(func))
        # Copies to or from the host and tensors made of Python numbers wait as well.
        if func in (torch.ops.aten.lift_fresh.default, torch.ops.aten.bincount.default):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def all_measures(routing: Routing, logits: Tensor) -> None:
    """Every measure of the module once."""
    load = load_counts(routing)
    aux_loss(load, mean_probabilities(routing).value)
    for measure in (max_vio, load_cv, load_entropy, effective_experts):
        measure(load)
    for score in ("softmax", "sigmoid", "given"):
        router_probabilities(logits, score)  # type: ignore[arg-type]
    normalized_entropy(router_entropy(routing).value, routing.n_experts)
    _ = z_loss(logits, routing.valid).value, dropped_share(load, 3).value, stability(routing, routing).value
    coactivation(coactivation_counts(routing))
    dead = DeadExperts(2)
    dead.update(load)
    dead.update(load)


def test_no_measure_waits_for_the_device() -> None:
    """No operation needs a value on the host: none is tagged so, and all run on tensors that have no values."""
    routing, logits = some_routing(20)
    with Waits() as waits:
        (torch.ones(2) > 0).nonzero()
    assert waits.seen == ["aten.nonzero.default"], "the watch must see what it watches for"
    with Waits() as waits:
        all_measures(routing, logits)
    assert waits.seen == []
    assert routing.probabilities is not None and routing.valid is not None
    nowhere = Routing(routing.indices.to("meta"), 6, routing.probabilities.to("meta"), valid=routing.valid.to("meta"))
    all_measures(nowhere, logits.to("meta"))


def test_autocast_changes_nothing() -> None:
    """Within a half-precision region, where hooks of routers run, the figures are the same to the last bit."""
    routing, logits = some_routing()

    def figures() -> list[Tensor]:
        means = mean_probabilities(routing).value, router_entropy(routing).value, z_loss(logits).value
        return [*means, load_counts(routing), coactivation_counts(routing), router_probabilities(logits, "sigmoid")]

    outside = figures()
    with torch.autocast("cpu", torch.bfloat16):
        inside = figures()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(outside, inside, strict=True))
