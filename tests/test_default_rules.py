"""What every default rule keeps: no reading breaks it or blinds it, and it goes on where its state was taken."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynwatch.rules import EVIDENCE_LENGTH, Rule, Verdict, default_rules

Stream = list[tuple[int, dict[str, float]]]

LOSS, VAL_LOSS, GRADIENT, WEIGHTS = "stop/loss", "stop/val_loss", "stop/grad_norm", "stop/weight_norm"
SCALER, LR, LR_LOW, PROGRESS, IDLE = "stop/scaler", "stop/lr", "stop/lr_low", "stop/progress", "stop/idle_parameters"
RATIO, CRITICAL, STEP = "hessian/sharpness_ratio", "hessian/critical_lr", "step_radius/r"
LAYERS = [f"{kind}{name}" for kind in ("grad_norm/layer/", "update_ratio/", "activation/dead/") for name in "abcd"]
MOE = [
    f"moe/layer_{i}/{name}"
    for i in range(2)
    for name in ("experts", "top_k", "effective_experts", "max_load", "dead_experts", "z_loss")
]
SHARED = [LOSS, VAL_LOSS, GRADIENT, WEIGHTS, SCALER, LR, LR_LOW, PROGRESS, IDLE, RATIO, CRITICAL, STEP]
UNKNOWN = ["", "loss", "stop/", "stop/loss/a", "grad_norm", "update_ratio", "activation/", "u", "ga", "é", "moe/layer_"]
BAD = [math.nan, math.inf, -math.inf]

NAMES = [rule.name for rule in default_rules()]
each_rule = pytest.mark.parametrize("name", NAMES)

# Impatient versions, which come to their verdicts within the short streams that are drawn here.
IMPATIENT: dict[str, dict[str, Any]] = {
    "non_finite": {"scaler_patience": 2},
    "divergence": {"patience": 2, "window": 5, "warm_up": 5},
    "loss_spike": {"patience": 2, "window": 3},
    "gradient_explosion": {"patience": 2, "window": 5, "warm_up": 3},
    "vanishing_gradients": {"patience": 1, "ratio": 0.5, "min_layers": 3},
    "dead_layers": {"patience": 1},
    "no_learning": {"share": 0.1, "min_readings": 16, "without_budget": 16},
    "plateau": {"min_readings": 32, "tolerance": 0.5},
    "overfitting": {"patience": 4, "tolerance": 0.0},
    "sharpness": {"patience": 2, "margin": 1.0},
    "large_steps": {"patience": 2, "margin": 1.0},
    "router_collapse": {"patience": 2},
    "dead_experts": {"patience": 2, "share": 0.0},
    "router_logits": {"patience": 2, "factor": 1.5, "floor": 0.0},
}


def make(name: str, **arguments: Any) -> Rule:
    """A default rule by its name, with other arguments if any are given."""
    rule = next(rule for rule in default_rules() if rule.name == name)
    return type(rule)(**arguments) if arguments else rule


def text(verdict: Verdict | None) -> str:
    """A verdict as a program would read it; raises where JSON has no word for a value."""
    return json.dumps(verdict and verdict.to_dict(), allow_nan=False)


def fired(rule: Rule, stream: Stream) -> list[int]:
    """At which places of a stream the rule fires."""
    return [i for i, (step, readings) in enumerate(stream) if rule.update(step, readings, {}) is not None]


# --- streams that are drawn

ANY = st.floats() | st.sampled_from([*BAD, 0.0, -0.0, 1.0, 1e-9, 1e308, -1e308, 1.7e308, -1.7e308])
CALM = st.floats(0.1, 10)
ODD = st.dictionaries(st.sampled_from([*SHARED, *LAYERS, *MOE, *UNKNOWN]), ANY, max_size=6)
FULL = st.fixed_dictionaries(dict.fromkeys((LOSS, VAL_LOSS, GRADIENT), CALM), optional=dict.fromkeys(LAYERS, CALM))
STILL = st.just({LOSS: 1.0, VAL_LOSS: 2.0, GRADIENT: 1.0, PROGRESS: 0.5, LR: 0.1, IDLE: 0.0, "update_ratio/a": 0.0})
READINGS = st.lists(ODD | FULL | STILL, max_size=60)
HOW_STEPS_GO = st.sampled_from(["on", "twice", "back", "still"])


def numbered(readings: list[dict[str, float]], how: str) -> Stream:
    """Readings with steps that go on, that repeat, that jump back, or that stand still."""
    steps = {"on": lambda i: i, "twice": lambda i: i // 2, "back": lambda i: i * 7 % 10, "still": lambda i: 3}
    return [(steps[how](i), item) for i, item in enumerate(readings)]


def tail(base: int) -> list[dict[str, float]]:
    """A course in which most of the impatient rules fire, so that drawn streams meet counts under way."""
    falling = [
        {
            LOSS: 3.0 / (1 + i),
            VAL_LOSS: 1.0 + 0.2 * i,
            GRADIENT: 1.0 if i < 6 else 1e6,
            "update_ratio/a": 0.0,
            "update_ratio/b": 1.0,
            RATIO: 2.0,
            STEP: 9.0,
            CRITICAL: 0.1,
            LR: 0.3,
            **(routed(2.0, dead=3, z=4.0**i) if i % 2 else {}),
            **{f"grad_norm/layer/{layer}": 0.01**k for k, layer in zip((3, 2, 1, 0), "abcd", strict=True)},
        }
        for i in range(base)
    ]
    rising = [{LOSS: 90.0 + 10 * i, RATIO: 2.0, STEP: 9.0} for i in range(12)]
    return [*falling, *rising, {LOSS: math.nan}]


@each_rule
@given(readings=READINGS, end=st.integers(0, 14), how=HOW_STEPS_GO, impatient=st.booleans())
@settings(max_examples=40, deadline=None)
def test_no_reading_breaks_a_rule(
    name: str, readings: list[dict[str, float]], end: int, how: str, impatient: bool
) -> None:
    """Whatever comes, nothing is raised; verdicts are strict JSON, bounded, and as severe as the action asks."""
    rule = make(name, **IMPATIENT[name]) if impatient else make(name)
    for step, item in numbered(readings + tail(end), how):
        verdict = rule.update(step, item, {})
        record = json.loads(text(verdict))
        if verdict is not None:
            assert (record["rule"], record["step"]) == (name, step)
            assert record["severity"] == ("warn" if rule.action == "warn" else "stop")
            assert record["reason"].endswith(".") and record["advice"].endswith(".")
            assert all(0 < len(items) <= EVIDENCE_LENGTH for items in record["evidence"].values())


@each_rule
@given(readings=READINGS, end=st.integers(0, 14), how=HOW_STEPS_GO, cut=st.integers(0, 80))
@settings(max_examples=40, deadline=None)
def test_a_restored_rule_goes_on_as_if_unbroken(
    name: str, readings: list[dict[str, float]], end: int, how: str, cut: int
) -> None:
    """State taken at any point and sent through JSON gives the same verdicts and, at the end, the same state."""
    unbroken, broken = make(name, **IMPATIENT[name]), make(name, **IMPATIENT[name])
    stream = numbered(readings + tail(end), how)
    for i, (step, item) in enumerate(stream):
        if i == cut % len(stream):
            state = json.loads(json.dumps(broken.state_dict()))
            broken = make(name, **IMPATIENT[name])
            broken.load_state_dict(state)
            assert json.dumps(broken.state_dict()) == json.dumps(state)
        assert text(broken.update(step, item, {})) == text(unbroken.update(step, item, {}))
    assert json.dumps(broken.state_dict()) == json.dumps(unbroken.state_dict())


@each_rule
@given(readings=READINGS, end=st.integers(0, 14), strange=st.dictionaries(st.sampled_from(UNKNOWN), ANY, min_size=1))
@settings(max_examples=40, deadline=None)
def test_unknown_tags_change_nothing(
    name: str, readings: list[dict[str, float]], end: int, strange: dict[str, float]
) -> None:
    """With or without readings of tags that a rule does not read, among them an empty one, it says the same."""
    known, more = make(name, **IMPATIENT[name]), make(name, **IMPATIENT[name])
    for step, item in enumerate(readings + tail(end)):
        plain = {tag: value for tag, value in item.items() if tag not in UNKNOWN}
        assert text(known.update(step, plain, {})) == text(more.update(step, {**strange, **plain}, {}))
    assert json.dumps(known.state_dict()) == json.dumps(more.state_dict())


# --- streams in which each rule must fire: a calm beginning, and a poor end


def constant(length: int, **readings: float) -> list[dict[str, float]]:
    names = {"loss": LOSS, "norm": GRADIENT}
    return [{names[key]: value for key, value in readings.items()} for _ in range(length)]


def profile(ratio: float) -> dict[str, float]:
    return {f"grad_norm/layer/{i}": ratio ** (5 - i) for i in range(6)}


def ratios(slow: float) -> dict[str, float]:
    return {"update_ratio/a": slow, "update_ratio/b": 1e-3, PROGRESS: 0.1}


def curved(ratio: float, losses: list[float]) -> list[dict[str, float]]:
    """Losses, with curvature at every fifth of them."""
    now = {RATIO: ratio, CRITICAL: 0.3 / ratio, LR: 0.3}
    return [{LOSS: loss, **(now if i % 5 == 0 else {})} for i, loss in enumerate(losses)]


def striding(r: float, losses: list[float]) -> list[dict[str, float]]:
    """Losses, with the normalised step at every fiftieth of them."""
    return [{LOSS: loss, **({STEP: r} if i % 50 == 0 else {})} for i, loss in enumerate(losses)]


def routed(effective: float, dead: int = 0, z: float = 6.0) -> dict[str, float]:
    """Readings of a layer of 8 experts, of which a token uses two."""
    return dict(zip(MOE[:6], (8.0, 2.0, effective, 2 / effective, float(dead), z), strict=True))


POOR: dict[str, tuple[list[dict[str, float]], list[dict[str, float]]]] = {
    "non_finite": (constant(40, loss=1.0, norm=1.0), [{LOSS: math.nan}]),
    "divergence": (constant(40, loss=2.0), constant(30, loss=80.0)),
    "loss_spike": (constant(20, loss=2.3) + constant(40, loss=0.4), constant(60, loss=2.2)),
    "gradient_explosion": (constant(40, norm=2.0), constant(15, norm=5e4)),
    "vanishing_gradients": ([profile(1.0)] * 3, [profile(0.01)] * 8),
    "dead_layers": ([ratios(1e-3)] * 3, [ratios(0.0)] * 5),
    "no_learning": (
        [{LOSS: 2.3 + 0.1 * math.sin(9.0 * i), PROGRESS: i / 400} for i in range(80)],
        [{LOSS: 2.3 + 0.1 * math.sin(9.0 * i), PROGRESS: i / 400} for i in range(80, 400)],
    ),
    "plateau": (
        [{LOSS: 2.5 - i / 150 + 0.01 * (i % 3), LR: 0.1, LR_LOW: 0.1, PROGRESS: i / 900} for i in range(200)],
        [{LOSS: 1.16 + 0.01 * (i % 3), LR: 0.1, LR_LOW: 0.1, PROGRESS: i / 900} for i in range(200, 800)],
    ),
    "overfitting": (
        [{LOSS: 2.0 / (1 + i), VAL_LOSS: 1.5 - 0.1 * i} for i in range(6)],
        [{LOSS: 2.0 / (1 + i), VAL_LOSS: 0.9 + 0.05 * (i - 5)} for i in range(6, 30)],
    ),
    "large_steps": (
        striding(3.0, [2.0 + 0.1 * (i % 3) for i in range(60)]),
        striding(9.0, [2.0 + 0.1 * (i % 3) for i in range(400)]),
    ),
    "router_collapse": ([routed(7.5)] * 6, [routed(2.1)] * 10),
    "dead_experts": ([routed(7.5)] * 6, [routed(6.5, dead=1)] * 6),
    "router_logits": ([routed(7.5, z=6.0 + i) for i in range(6)], [routed(7.0, z=2000.0)] * 6),
    "sharpness": (curved(1.1, [2.0 - i / 40 for i in range(60)]), curved(2.1, [0.5 * 1.02**i for i in range(150)])),
}


@each_rule
def test_a_poor_run_is_found(name: str) -> None:
    """Each rule is silent in the calm beginning and fires in the poor end."""
    calm, poor = POOR[name]
    found = fired(make(name), list(enumerate(calm + poor)))
    assert found and found[0] >= len(calm)


@each_rule
@pytest.mark.parametrize("value", BAD, ids=str)
@pytest.mark.parametrize("length", [1, 50])
@pytest.mark.parametrize("place", ["first", "two thirds in", "before the end", "before the verdict"])
def test_bad_readings_do_not_blind_a_rule(name: str, value: float, length: int, place: str) -> None:
    """NaN or infinities of all that a rule reads, one or fifty in a row, delay its verdict by a few readings."""
    calm, poor = POOR[name]
    tags = sorted({tag for item in calm + poor for tag in item} | set(make(name).reads) - {SCALER})
    bad = [{tag + "x" * tag.endswith("/"): value for tag in tags}] * length
    run = calm + poor
    clean = fired(make(name), list(enumerate(run)))[0]
    places = {"first": 0, "two thirds in": len(calm) * 2 // 3, "before the end": len(calm), "before the verdict": clean}
    at = places[place]
    found = fired(make(name), list(enumerate(run[:at] + bad + run[at:])))
    after = [i - length for i in found if i >= at + length]
    slack = len(poor) // 5 + 5  # blocks of a few readings, or a count that begins anew
    assert after and after[0] <= clean + slack


@each_rule
@pytest.mark.parametrize("every", [2, 7])
def test_bad_readings_now_and_then_do_not_blind_a_rule(name: str, every: int) -> None:
    """A NaN after every second or seventh reading of a calm beginning leaves the poor end to be found."""
    calm, poor = POOR[name]
    bad = dict.fromkeys({tag for item in calm + poor for tag in item} - {SCALER}, math.nan)
    run: list[dict[str, float]] = []
    for i, item in enumerate(calm):
        run += [item, bad] if i % every == every - 1 else [item]
    found = fired(make(name), list(enumerate(run + poor)))
    assert [i for i in found if i >= len(run)]


@each_rule
def test_a_rule_can_be_restored_at_every_reading_of_its_poor_run(name: str) -> None:
    """With default arguments, also in the middle of a count; long runs are cut at every seventh reading."""
    calm, poor = POOR[name]
    run = list(enumerate(calm + poor))
    rule, states, expected = make(name), [], []
    for step, item in run:
        states.append(json.dumps(rule.state_dict()))
        expected.append(text(rule.update(step, item, {})))
    last = json.dumps(rule.state_dict())
    for cut in range(0, len(run), 7 if len(run) > 150 else 1):
        restored = make(name)
        restored.load_state_dict(json.loads(states[cut]))
        assert [text(restored.update(step, item, {})) for step, item in run[cut:]] == expected[cut:]
        assert json.dumps(restored.state_dict()) == last


def attributes(rule: Rule) -> str:
    """All that a rule holds, as text; objects by their state."""
    return json.dumps({k: v.state_dict() if hasattr(v, "state_dict") else repr(v) for k, v in vars(rule).items()})


@each_rule
def test_every_attribute_is_restored(name: str) -> None:
    """In a run that learns and whose rate decays, a loaded rule differs in nothing after one more reading."""
    run = [{LOSS: 2.3 / (1 + i / 40) + 0.01 * (i % 3), PROGRESS: i / 400, LR: 0.1 * 0.98**i} for i in range(300)]
    rule = make(name)
    for step, readings in enumerate([*POOR[name][0], *run]):
        restored = make(name)
        if step % 10 == 0:
            restored.load_state_dict(json.loads(json.dumps(rule.state_dict())))
            restored.update(step, readings, {})
        rule.update(step, readings, {})
        if step % 10 == 0:
            assert attributes(restored) == attributes(rule)


@each_rule
def test_a_state_is_a_copy(name: str) -> None:
    """What was taken does not change with later readings, and two rules that were loaded from it stay apart."""
    calm, poor = POOR[name]
    rule = make(name)
    fired(rule, list(enumerate([*calm, *poor[:-1]])))
    state = rule.state_dict()
    kept = json.dumps(state)
    other = make(name)
    other.load_state_dict(state)
    for item in (poor[-1], calm[0]):
        rule.update(2000, item, {})
        other.update(2000, {**item, LOSS: 7.0, GRADIENT: 7.0}, {})
    assert json.dumps(state) == kept


@each_rule
def test_a_state_does_not_grow_with_the_run(name: str) -> None:
    """Five times the readings leave a state of about the same size."""
    calm, poor = POOR[name]
    sizes, rule = [], make(name)
    for repeat in range(10):
        fired(rule, [(1000 * repeat + i, item) for i, item in enumerate((calm + poor) * 3)])
        sizes.append(len(json.dumps(rule.state_dict())))
    assert sizes[-1] < 1.5 * sizes[1] + 200


HUGE = {
    "constant": lambda i: 1.7e308,
    "alternating": lambda i: 1.7e308 * (-1) ** i,
    "in pairs": lambda i: 1.7e308 * (-1) ** (i // 2),
    "falling": lambda i: 1.7e308 / (1 + i),
    "rising": lambda i: -1.7e308 / (1 + i),
    "zero": lambda i: 0.0,
    "zero but for one": lambda i: 1.7e308 * (i == 20),
    "as small as can be": lambda i: 5e-324 * (-1) ** i,
}


@each_rule
@pytest.mark.parametrize("course", HUGE)
def test_the_ends_of_the_floats_break_no_rule(name: str, course: str) -> None:
    """Hundreds of readings at which sums, means and differences overflow raise nothing and give strict JSON."""
    for arguments in ({}, IMPATIENT[name]):
        rule = make(name, **arguments)
        for i in range(300):
            readings = dict.fromkeys(
                [LOSS, VAL_LOSS, GRADIENT, WEIGHTS, IDLE, RATIO, CRITICAL, STEP, *LAYERS, *MOE], HUGE[course](i)
            )
            text(rule.update(i, {**readings, PROGRESS: 0.5, LR: abs(readings[LOSS]), LR_LOW: readings[LOSS]}, {}))


@pytest.mark.parametrize("name", ["dead_layers", "no_learning", "plateau"])
@pytest.mark.parametrize("value", BAD, ids=str)
def test_a_bad_progress_or_rate_does_not_replace_a_good_one(name: str, value: float) -> None:
    """Where these are known once and non-finite ever after, the rule fires as if the good ones had lasted."""
    context = {PROGRESS: 0.5, LR: 0.1, LR_LOW: 0.1}
    calm, poor = POOR[name]
    plain = [{tag: v for tag, v in item.items() if tag not in context} for item in calm + poor]
    good = fired(make(name), list(enumerate([context, *plain])))
    bad = fired(make(name), list(enumerate([context, *[item | dict.fromkeys(context, value) for item in plain]])))
    assert bad == good != []


# --- arguments

MISTAKES: Mapping[str, list[tuple[str, Any]]] = {
    "count": [("0", 0), ("-1", -1), ("1.5", 1.5), ("'a'", "a"), ("None", None), ("True", True), ("nan", math.nan)],
    "number": [("nan", math.nan), ("inf", math.inf), ("-1", -1), ("'a'", "a"), ("None", None), ("True", True)],
}


def mistakes() -> list[Any]:
    """Every argument of every default rule with values that are out of bounds whatever the rule."""
    found = []
    for rule in default_rules():
        for argument, parameter in inspect.signature(type(rule)).parameters.items():
            if argument == "action":
                values: list[tuple[str, Any]] = [(repr(value), value) for value in ("Stop", "off", "", None, 1)]
            else:
                values = MISTAKES["count" if isinstance(parameter.default, int) else "number"]
            found += [
                pytest.param(type(rule), argument, v, id=f"{rule.name}-{argument}-{shown}") for shown, v in values
            ]
    return found


@pytest.mark.parametrize(("kind", "argument", "value"), mistakes())
def test_an_argument_out_of_bounds_is_an_error(kind: Callable[..., Rule], argument: str, value: Any) -> None:
    """The message begins with the argument and its value, and says what it must be."""
    with pytest.raises(ValueError, match=f"^{re.escape(f'{argument}={value!r}')} must be "):
        kind(**{argument: value})


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("loss_spike", "lost", 1.01),
        ("gradient_explosion", "factor", 1.0),
        ("vanishing_gradients", "ratio", 1.0),
        ("vanishing_gradients", "min_layers", 2),
        ("dead_layers", "min_ratio", 0.0),
        ("dead_layers", "dead_units", 1.0),
        ("dead_layers", "idle", 0.0),
        ("no_learning", "share", 1.0),
        ("no_learning", "min_readings", 15),
        ("no_learning", "without_budget", 15),
        ("plateau", "min_readings", 31),
        ("plateau", "tolerance", 0.0),
        ("plateau", "converged", 1.0),
        ("overfitting", "patience", 3),
        ("overfitting", "tolerance", 1.0),
        ("sharpness", "patience", 1),
        ("sharpness", "margin", 0.99),
        ("large_steps", "patience", 1),
        ("large_steps", "margin", 0.99),
        ("router_collapse", "min_share", 0.0),
        ("router_collapse", "max_share", 1.0),
        ("dead_experts", "share", 1.0),
        ("dead_experts", "share", -0.01),
        ("router_logits", "factor", 1.0),
        ("router_logits", "floor", -0.01),
    ],
)
def test_a_bound_is_where_it_is_said_to_be(name: str, argument: str, value: float) -> None:
    """The first value beyond a bound is an error."""
    with pytest.raises(ValueError, match=f"^{argument}={value!r} must be "):
        make(name, **{argument: value})


@each_rule
@pytest.mark.parametrize("action", ["stop", "warn", "shadow"])
def test_severity_follows_the_action(name: str, action: str) -> None:
    """Also when it is set after the rule was made; in shadow mode it is what would have been."""
    rule = make(name)
    rule.action = action  # type: ignore[assignment]
    calm, poor = POOR[name]
    verdicts = [rule.update(step, item, {}) for step, item in enumerate(calm + poor)]
    found = {verdict.severity for verdict in verdicts if verdict is not None}
    assert found == {"warn" if action == "warn" else "stop"}
