"""RouterCollapse, DeadExperts and RouterLogits: what they find, what they leave alone, and what they need to judge."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from dynwatch import expert_load
from dynwatch.routing import Routing, effective_experts, load_counts, z_loss
from dynwatch.rules import (
    DeadExperts,
    LargeSteps,
    Outcome,
    RouterCollapse,
    RouterLogits,
    Rule,
    Verdict,
    default_rules,
    replay,
    replay_readings,
)
from dynwatch.rules.replaying import is_known

KINDS: list[Callable[..., Rule]] = [RouterCollapse, DeadExperts, RouterLogits]
NAMES = ["router_collapse", "dead_experts", "router_logits"]
each_kind = pytest.mark.parametrize("kind", KINDS)
NONE: list[int] = []


def tagged(layer: int, **values: float) -> dict[str, float]:
    """Readings of a layer by their full tags."""
    return {f"moe/layer_{layer}/{name}": value for name, value in values.items()}


def loads(n: int, k: int, effective: float, busiest: float, layer: int = 0) -> dict[str, float]:
    """Readings on which `RouterCollapse` judges."""
    return tagged(layer, experts=n, top_k=k, effective_experts=effective, max_load=busiest)


def fired(rule: Rule, stream: Sequence[Mapping[str, float]]) -> list[int]:
    """At which readings a rule fires, with one each 50 steps and nothing but a loss on the step before."""
    found = []
    for i, readings in enumerate(stream):
        assert rule.update(50 * i + 48, {"stop/loss": 1.0}, {}) is None
        if rule.update(50 * i + 49, readings, {}):
            found.append(i)
    return found


def verdict_of(rule: Rule, stream: Sequence[Mapping[str, float]], notes: Mapping[str, str] | None = None) -> Verdict:
    """The last verdict on readings each 50 steps."""
    verdict = None
    for i, readings in enumerate(stream):
        verdict = rule.update(50 * i + 49, readings, notes or {})
    assert verdict is not None
    return verdict


# How each rule sees a good and a poor layer of 8 experts, top-2, and how a reading of nothing.
GOOD = {"effective_experts": 7.6, "max_load": 0.3, "dead_experts": 0.0, "z_loss": 5.0}
POOR = {"effective_experts": 2.2, "max_load": 0.97, "dead_experts": 4.0, "z_loss": 3000.0}
EMPTY = dict.fromkeys(GOOD, math.nan)
SIZES = {"experts": 8.0, "top_k": 2.0}


def course(words: str, layer: int = 0) -> list[dict[str, float]]:
    """Readings of a layer, one letter each: good, poor, NaN, or - for none. Sizes come with the first."""
    values = {"g": GOOD, "p": POOR, "n": EMPTY, "-": {}}
    stream = [tagged(layer, **values[letter]) for letter in words]
    return [tagged(layer, **SIZES) | stream[0], *stream[1:]]


# --- RouterCollapse

SHAPES = st.integers(1, 512).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n)))


@given(SHAPES)
def test_a_balanced_router_is_left_alone(shape: tuple[int, int]) -> None:
    """Whatever E and k are, also E = 1 and k = E, and with the rounding of a log in float32."""
    n, k = shape
    for wobble in (-1e-6, 0.0, 1e-6):
        balanced = loads(n, k, n * (1 + wobble), k / n * (1 - wobble))
        assert fired(RouterCollapse(patience=1), [balanced] * 3) == NONE


@given(SHAPES.filter(lambda shape: shape[1] < shape[0]), st.integers(1, 9))
def test_a_total_collapse_is_found_at_the_last_reading_of_patience(shape: tuple[int, int], patience: int) -> None:
    """All tokens choose the same k experts, whatever share of E these are; measured, not made up."""
    n, k = shape
    load = torch.zeros(n)
    load[:k] = 64
    poor = loads(n, k, float(effective_experts(load)), 1.0)
    assert fired(RouterCollapse(patience), [poor] * 12) == list(range(patience - 1, 12))


def test_the_room_is_what_counts() -> None:
    """Four of eight is a collapse for k = 4, and a mild one for k = 1."""
    assert fired(RouterCollapse(1), [loads(8, 4, 4.0, 0.9)]) == [0]
    assert fired(RouterCollapse(1), [loads(8, 1, 4.0, 0.3)]) == NONE


@pytest.mark.parametrize(
    ("effective", "busiest", "found"),
    [
        *[(3.49, 0.3, True), (3.5, 0.3, False), (6.0, 0.924, False), (6.0, 0.926, True)],
        *[(3.49, math.nan, True), (6.0, math.nan, False), (6.0, math.inf, False), (math.nan, 0.99, False)],
    ],
)
def test_either_sign_is_enough(effective: float, busiest: float, found: bool) -> None:
    """Of 8 experts, top-2: fewer than 2 + 0.25 · 6, or more than 0.25 + 0.9 · 0.75; nothing without the first."""
    assert bool(fired(RouterCollapse(1), [loads(8, 2, effective, busiest)])) is found


@pytest.mark.parametrize("k", [8, 9, 0, -1, 0.5, math.nan, math.inf])
def test_a_router_without_a_choice_is_not_judged(k: float) -> None:
    """k = E, and numbers that no router has."""
    one = tagged(0, experts=8, top_k=k, effective_experts=1.0, max_load=1.0)
    assert fired(RouterCollapse(1), [one] * 3) == NONE


def test_the_first_readings_may_be_uneven() -> None:
    """A router that begins collapsed and is evened out within four readings is left alone."""
    stream = [loads(8, 2, effective, 0.95) for effective in (2.0, 2.2, 2.6, 3.2)] + [loads(8, 2, 4.5, 0.6)] * 9
    assert fired(RouterCollapse(), stream) == NONE


def test_a_router_that_is_being_evened_out_is_given_time() -> None:
    """While the effective experts rise by more than a tenth of the room within the row; not when they stop."""
    rising = [loads(8, 2, 2.0 + 0.16 * i, 0.99) for i in range(9)]
    assert fired(RouterCollapse(), rising) == NONE
    assert fired(RouterCollapse(), [*rising, *[rising[-1]] * 9]) == list(range(9, 18))
    shaken = [loads(8, 2, 2.0 + 0.16 * i - 0.4 * (i == 2), 0.99) for i in range(5)]
    assert fired(RouterCollapse(), shaken) == [4]
    slower = [loads(8, 2, 2.0 + 0.14 * i, 0.99) for i in range(9)]
    assert fired(RouterCollapse(), slower) == list(range(4, 9))


def test_the_verdict_of_a_collapse_names_the_worst_layer() -> None:
    """Numbers, sizes, how many layers, and the evidence of the row."""
    stream = [loads(8, 2, 3.0, 0.8, 0) | loads(8, 2, 2.1, 0.98, 1) | loads(8, 2, 7.5, 0.3, 2)] * 5
    verdict = verdict_of(RouterCollapse(), stream, {"moe/layer_1/effective_experts": "blocks.1.gate"})
    assert verdict.reason == (
        "The router of MoE layer 1 (blocks.1.gate) sends its tokens to 2.1 effective experts of 8 (top-2) at step 249, "
        "98% of them to the busiest one (balanced is 25%). At 5 readings in a row it had fewer than 3.5 or one expert "
        "for more than 92%. It is so in 2 of 3 layers: 0, 1."
    )
    assert verdict.evidence["moe/layer_1/effective_experts"] == [(49 + 50 * i, 2.1) for i in range(5)]
    assert verdict.evidence.keys() == {"moe/layer_1/effective_experts", "moe/layer_1/max_load"}
    for word in ("output_router_logits", "coefficient", "bias", "learning rate", "z-loss", "noise"):
        assert word in verdict.advice
    assert (verdict.severity, verdict.weights_suspect) == ("warn", False)


# --- DeadExperts


@pytest.mark.parametrize(
    ("share", "experts", "dead", "found"),
    [
        *[(0.1, 8, 0, False), (0.1, 8, 1, True), (0.1, 64, 6, False), (0.1, 64, 7, True), (0.1, 1, 1, True)],
        *[(0.0, 256, 0, False), (0.0, 256, 1, True), (0.5, 8, 4, False), (0.5, 8, 5, True), (0.1, 4, 0.5, False)],
    ],
)
def test_more_than_a_share_and_at_least_one(share: float, experts: int, dead: float, found: bool) -> None:
    """The share itself is still allowed; a mean of counts below one is no dead expert."""
    stream = [tagged(0, experts=experts, dead_experts=dead)] * 4
    assert fired(DeadExperts(share=share), stream) == ([2, 3] if found else NONE)


def test_the_verdict_on_dead_experts() -> None:
    """The layer with the largest share of them, the counts, and the share."""
    stream = [tagged(0, experts=8, dead_experts=2) | tagged(1, experts=64, dead_experts=9)] * 3
    verdict = verdict_of(DeadExperts(), stream)
    assert verdict.reason == (
        "MoE layer 0 has 2 of 8 experts without tokens at step 149, more than 10% at 3 readings in a row. "
        "It is so in 2 of 2 layers: 0, 1."
    )
    assert verdict.evidence == {"moe/layer_0/dead_experts": [(49, 2), (99, 2), (149, 2)]}
    assert "balancing" in verdict.advice and verdict.severity == "warn"


# --- RouterLogits


def sizes_of_logits(*zs: float) -> list[dict[str, float]]:
    return [tagged(0, z_loss=z) for z in zs]


@pytest.mark.parametrize(
    "zs",
    [
        [4.5] * 20,
        [30.7] * 20,  # 256 undecided experts
        [4.5 * 1.2**i for i in range(29)],  # logits that grow with what is learnt, to 27
        [0.001] * 5 + [899.0] * 9,  # within the floor
        [2000.0] * 20,  # large from the start
        [2000.0, 2500.0, 1500.0, 4000.0] * 5,
        [2000.0] * 5 + [0.0] + [2000.0] * 9,  # one odd reading is no reference
        [5.0, 3000.0, 3000.0] * 6,  # never three in a row
    ],
)
def test_large_logits_are_no_explosion(zs: list[float]) -> None:
    """Neither what is below the floor, nor what is large from the start, nor a spike."""
    assert fired(RouterLogits(), sizes_of_logits(*zs)) == NONE


@pytest.mark.parametrize("start", [1, 2, 3, 10])
@pytest.mark.parametrize("z", [1000.0, 1e15, math.inf, math.nan])
def test_an_explosion_is_found_after_patience(start: int, z: float) -> None:
    """From the second reading on, at which there is something to compare with; not a number counts too."""
    assert fired(RouterLogits(), sizes_of_logits(*[5.0] * start, *[z] * 5)) == [start + 2, start + 3, start + 4]


def test_a_slow_growth_is_found_at_the_floor() -> None:
    """It is measured by where it was calmest, not by where it lately was; descents count as such."""
    zs = [30.0 / (1 + i) for i in range(5)] + [10 * 1.1**i for i in range(60)]
    assert fired(RouterLogits(), sizes_of_logits(*zs))[0] == 5 + 48 + 2  # 10 · 1.1**48 is the first above 900


def test_logits_that_never_were_finite_are_found() -> None:
    """Without anything to compare with; the verdict says what they are."""
    verdict = verdict_of(RouterLogits(), sizes_of_logits(*[math.nan] * 3))
    assert verdict.reason == (
        "The router logits of MoE layer 0 are not finite (z-loss nan) at step 149, with 3 bad readings in a row."
    )
    assert json.loads(json.dumps(verdict.to_dict(), allow_nan=False))["evidence"]["moe/layer_0/z_loss"][0][1] == "nan"


@pytest.mark.parametrize(("effective", "found"), [(7.0, [1, 2, 3]), (math.nan, NONE)])
def test_a_reading_of_no_token_is_no_sign(effective: float, found: list[int]) -> None:
    """NaN beside a load that is NaN comes of no token; beside one that is known it comes of the logits."""
    stream = [tagged(0, z_loss=math.nan, effective_experts=effective)] * 4
    assert fired(RouterLogits(patience=2), stream) == found


def test_the_verdict_on_logits() -> None:
    """The largest of the layers, its calmest, and the size of logits that it stands for."""
    stream = [tagged(0, z_loss=5) | tagged(1, z_loss=6)] * 2 + [tagged(0, z_loss=1600) | tagged(1, z_loss=1e4)] * 3
    verdict = verdict_of(RouterLogits(), stream)
    assert verdict.reason == (
        "The z-loss of MoE layer 1 is 1e+04 at step 249, that of logits about 100 in size: 3 readings in a row were "
        "above 900 and 10 times its calmest 6. It is so in 2 of 2 layers: 0, 1."
    )
    assert "float32" in verdict.advice and verdict.severity == "warn"


# --- what holds for all three


@each_kind
def test_recovering_begins_anew(kind: Callable[..., Rule]) -> None:
    """A good reading between poor ones starts the count again, and the verdict ends with the trouble."""
    assert fired(kind(patience=3), course("ggppgppgpp")) == NONE
    assert fired(kind(patience=3), course("gpppgpppp")) == [3, 7, 8]


@each_kind
def test_no_reading_and_one_of_nothing_break_no_row(kind: Callable[..., Rule]) -> None:
    """They count for nothing either: a look without any token, and a layer that is left out."""
    assert fired(kind(patience=3), course("gpnp-nnpnp")) == [7, 9]
    assert fired(kind(patience=3), course("gnn--nng")) == NONE


@each_kind
def test_layers_are_counted_apart(kind: Callable[..., Rule]) -> None:
    """Two that are poor in turns make no row; one of several that stays poor does, and is named."""
    turns = [a | b for a, b in zip(course("gpgpgpgp", 0), course("ggpgpgpg", 1), strict=True)]
    assert fired(kind(patience=2), turns) == NONE
    apart = [a | b for a, b in zip(course("gggggg", 0), course("gggppp", 11), strict=True)]
    verdict = verdict_of(kind(patience=3), apart)
    assert "MoE layer 11" in verdict.reason and "It is so" not in verdict.reason
    assert all(tag.startswith("moe/layer_11/") for tag in verdict.evidence)


@each_kind
def test_evidence_is_bounded_and_a_verdict_lasts(kind: Callable[..., Rule]) -> None:
    """It goes on objecting for as long as the sign is there, with the last thirty readings."""
    stream = course("g" + "p" * 50)
    assert fired(kind(patience=3), stream) == list(range(3, 51))
    assert {len(items) for items in verdict_of(kind(), stream).evidence.values()} == {30}


@each_kind
@given(words=st.text("gpn-", min_size=1, max_size=24), cut=st.integers(0, 24))
def test_state_taken_in_the_middle_of_a_count(kind: Callable[..., Rule], words: str, cut: int) -> None:
    """Sent through JSON at any reading it goes on as if unbroken, though the sizes came before."""
    stream = [a | b for a, b in zip(course(words, 0), course(words[::-1], 1), strict=True)]
    unbroken, broken = kind(patience=2), kind(patience=2)
    for i, readings in enumerate(stream):
        if i == cut:
            state = json.loads(json.dumps(broken.state_dict()))
            broken = kind(patience=2)
            broken.load_state_dict(state)
        assert broken.update(i, readings, {}) == unbroken.update(i, readings, {})
    assert json.dumps(broken.state_dict()) == json.dumps(unbroken.state_dict())


@pytest.mark.parametrize("kind", [RouterCollapse, DeadExperts])
def test_sizes_that_come_late_or_again(kind: Callable[..., Rule]) -> None:
    """Before E has come a layer is not judged; after it has come once it is, also where it comes as NaN."""
    poor, sizes = tagged(0, **POOR), tagged(0, **SIZES)
    bad = dict.fromkeys(sizes, math.nan)
    assert fired(kind(patience=2), [poor] * 9) == NONE
    assert fired(kind(patience=2), [poor, poor, poor | sizes, poor | bad, poor]) == [3, 4]
    assert fired(kind(patience=2), [sizes, poor, poor]) == [2]


@pytest.mark.parametrize(
    "tag", ["moe/layer_/{}", "moe/layer_a/{}", "moe/layer_0/x/{}", "moe/layer_0{}", "moe/{}", "moe/layer_-1/{}"]
)
@each_kind
def test_tags_that_are_no_layers_are_left_alone(kind: Callable[..., Rule], tag: str) -> None:
    """Other tags below moe/, and those of no number."""
    assert fired(kind(patience=1), [{tag.format(name): value for name, value in (SIZES | POOR).items()}] * 9) == NONE


def test_they_are_default_rules_that_warn() -> None:
    """After the steps, in this order."""
    rules = default_rules()
    at = [rule.name for rule in rules].index(LargeSteps.name)
    assert [(rule.name, rule.action) for rule in rules[at + 1 : at + 4]] == [(name, "warn") for name in NAMES]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (RouterCollapse, {"min_share": 1.0}, r"^min_share=1.0 must be a number above 0 and below 1\.$"),
        (RouterCollapse, {"max_share": 0}, r"^max_share=0 must be a number above 0 and below 1\.$"),
        (DeadExperts, {"share": 1}, r"^share=1 must be a number, 0 or more and below 1\.$"),
        (DeadExperts, {"patience": 0}, r"^patience=0 must be a whole number, 1 or more\.$"),
        (RouterLogits, {"factor": 1}, r"^factor=1 must be a number above 1"),
        (RouterLogits, {"floor": math.inf}, r"^floor=inf must be a finite number, 0 or more"),
    ],
)
def test_errors_name_argument_value_and_bound(kind: Callable[..., Rule], arguments: dict, message: str) -> None:
    """The bounds themselves are where they are said to be."""
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


# --- replay of logs


def test_a_star_stands_for_a_number() -> None:
    """Of any layer, and for itself; not for nothing, a word, or more than one part."""
    tag = "moe/layer_*/experts"
    assert all(is_known(tag, [f"moe/layer_{i}/experts"]) for i in ("0", "17", "*"))
    assert not any(is_known(tag, [f"moe/layer_{i}/experts"]) for i in ("", "a", "0/1", "0/experts", "-1"))
    assert not is_known(tag, ["moe/layer_0/experts/x", "moe/layer_0/dead_experts", "moe/layer_experts"])


@pytest.mark.parametrize("without", ["", "experts", "top_k", "effective_experts", "dead_experts", "z_loss"])
def test_a_log_without_what_they_need_is_told(without: str) -> None:
    """A rule that could not judge does not pass for one that was content."""
    stream = [
        (50 * i, {tag: value for tag, value in readings.items() if tag.rpartition("/")[2] != without})
        for i, readings in enumerate(course("pppppp"))
    ]
    blind = {
        "": set(),
        "experts": {"router_collapse", "dead_experts"},
        "top_k": {"router_collapse"},
        "effective_experts": {"router_collapse"},
        "dead_experts": {"dead_experts"},
        "z_loss": {"router_logits"},
    }[without]
    outcomes: list[Outcome] = replay_readings(stream, [kind() for kind in KINDS])
    assert {outcome.rule for outcome in outcomes if outcome.nothing_to_read} == blind
    for outcome in outcomes:
        assert outcome.missing == ((f"moe/layer_*/{without}",) if outcome.rule in blind else ())


def test_replay_from_an_event_file(tmp_path: Path) -> None:
    """Sizes stand in it once; the rules judge all that comes after, and a dense run has nothing to read."""
    for run, words in (("poor", "gg" + "p" * 8), ("good", "g" * 10)):
        with SummaryWriter(str(tmp_path / run)) as writer:
            for i, readings in enumerate(course(words, layer=3)):
                for tag, value in readings.items():
                    writer.add_scalar(tag, value, 50 * i + 49)
    with SummaryWriter(str(tmp_path / "dense")) as writer:
        writer.add_scalar("train_loss", 2.3, 49)
        writer.add_scalar("moe/consistency", 0.9, 49)
    replayed = replay(tmp_path, [kind() for kind in KINDS])
    steps = {(outcome.run, outcome.rule): outcome.step for outcome in replayed}
    assert [steps["poor", name] for name in NAMES] == [49 + 50 * 6, 49 + 50 * 4, 49 + 50 * 4]
    assert [steps["good", name] for name in NAMES] == [None] * 3
    assert {outcome.run for outcome in replayed if outcome.nothing_to_read} == {"dense"}
    assert f"Nothing to read: {', '.join(NAMES)} (without moe/…)." in "\n".join(replayed.notes())


# --- real runs


class Experts(nn.Module):
    """A residual layer of experts, computed densely."""

    def __init__(self, width: int, n: int, k: int) -> None:
        super().__init__()
        self.k = k
        self.router = nn.Linear(width, n, bias=False)
        self.up = nn.Parameter(torch.randn(n, width, 2 * width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(n, 2 * width, width) * (2 * width) ** -0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Routing]:
        logits = self.router(x)
        weights, chosen = logits.softmax(-1).topk(self.k)
        if self.k > 1:  # for one alone it would be 1 whatever the router says
            weights = weights / weights.sum(-1, keepdim=True)
        gate = torch.zeros_like(logits).scatter(1, chosen, weights)
        hidden = torch.einsum("td,edh->teh", x, self.up).relu()
        out = torch.einsum("te,teh,ehd->td", gate, hidden, self.down)
        return x + out, logits, Routing(chosen, logits.shape[1])


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads wait for each other more than these small products take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(
    seed: int, balance: float = 0.01, router_lr: float = 1e-3, common: float = 0.0, n: int = 8, k: int = 2
) -> list[tuple[int, dict[str, float]]]:
    """Two layers of experts learn which of 16 clusters is which of four classes; readings each 10 of 300 steps.

    Args:
        seed: Of the weights and the data.
        balance: Coefficient of the load balancing loss.
        router_lr: Adam's learning rate for the routers.
        common: Size of what all inputs have in common, which makes a router uneven at first.
        n: Experts.
        k: Experts of a token.
    """
    torch.manual_seed(seed)
    centers, shift, tokens = torch.randn(16, 16), common * torch.randn(16), 128
    layers = nn.ModuleList(Experts(16, n, k) for _ in range(2))
    head = nn.Linear(16, 4)
    routers = [layer.router.weight for layer in layers]
    others = [p for p in [*layers.parameters(), *head.parameters()] if all(p is not router for router in routers)]
    optimizer = torch.optim.Adam([{"params": others, "lr": 2e-3}, {"params": routers, "lr": router_lr}])
    counters, found = [expert_load.DeadExperts(window=5) for _ in layers], []
    for step in range(300):
        cluster = torch.randint(16, (tokens,))
        x = centers[cluster] + shift + 0.5 * torch.randn(tokens, 16)
        loss, now = torch.zeros(()), {}
        for i, layer in enumerate(layers):
            x, logits, routing = layer(x)
            load = load_counts(routing)
            loss = loss + balance * n * (load / load.sum() * logits.softmax(-1).mean(0)).sum()
            if step % 10 == 9:
                now |= tagged(i, effective_experts=float(effective_experts(load)), max_load=float(load.max() / tokens))
                now |= tagged(i, dead_experts=float(counters[i].update(load).sum()), z_loss=float(z_loss(logits).value))
        loss = loss + nn.functional.cross_entropy(head(x), cluster % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if now:
            found.append(
                (step, now | (tagged(0, experts=n, top_k=k) | tagged(1, experts=n, top_k=k) if step < 10 else {}))
            )
    return found


def judged(readings: list[tuple[int, dict[str, float]]], every: int = 1) -> dict[str, int]:
    """Where the rules fire first, on each so many-th reading; with the sizes with the first of them."""
    sizes = {tag: value for tag, value in readings[0][1].items() if tag.endswith(("/experts", "/top_k"))}
    kept = [(step, sizes | now) for step, now in readings[every - 1 :: every]]
    outcomes = replay_readings(kept, [kind() for kind in KINDS])
    return {outcome.rule: outcome.step for outcome in outcomes if outcome.step is not None}


@pytest.mark.parametrize(("n", "k", "common", "seed"), [(8, 2, 0.0, 0), (8, 2, 0.0, 1), (4, 2, 0.0, 0), (8, 2, 1.0, 0)])
def test_a_balanced_run_is_left_alone(n: int, k: int, common: float, seed: int) -> None:
    """With a balance loss, from an even or an uneven start; with readings each 50 and each 10 steps."""
    readings = train(seed, n=n, k=k, common=common)
    assert judged(readings, every=5) == judged(readings) == {}


@pytest.mark.parametrize("k", [1, 2])
def test_a_router_that_collapses_is_found(k: int) -> None:
    """Without a balance loss and at a hundred times the rate, on inputs that have much in common."""
    readings = train(0, balance=0.0, router_lr=0.1, common=3.0, k=k)
    assert judged(readings, every=5)["router_collapse"] == 249
    found = judged(readings)
    assert found["router_collapse"] <= 99 and found["dead_experts"] <= 149


def test_a_router_whose_rate_is_far_too_high_has_huge_logits() -> None:
    """At a thousand times the rate the z-loss leaves its scale within 150 steps."""
    assert judged(train(0, balance=0.0, router_lr=1.0))["router_logits"] <= 149
