"""The rule that its user writes: when it is evaluated, how long it must hold, what it says, and its state."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynwatch.rules.base import EVIDENCE_LENGTH, Rule, Verdict
from dynwatch.rules.stop_when import StopWhen

READING = (
    st.sampled_from([0.0, 1.0, 2.0, 3.0]) | st.floats() | st.sampled_from([math.nan, math.inf, -math.inf, 1.7e308])
)
READINGS = st.fixed_dictionaries({}, optional={"a": READING, "b": READING, "c": READING})
STREAM = st.lists(READINGS, max_size=50)
EXPRESSIONS = [
    "a > 1",
    "a > 1 for 3 readings",
    "a > 1 and not b < 1 for 4 steps",
    "a != b after 5 steps",
    "mean(a, 3) > min(b, 2) or abs(c) > 2 for 2 readings after 7 steps",
    "max(a, 4) - median(a, 4) > a / b for 3 steps",
    "mean(a, 2) * 1e308 + b > 0 or a == inf",
]


def fired(expression: str, numbers: Sequence[float | None], rule: StopWhen | None = None) -> list[int]:
    """The steps at which readings of the tag a alone, one a step (None: no reading), make the rule speak."""
    rule = rule or StopWhen(expression)
    return [i for i, a in enumerate(numbers) if rule.update(i, {} if a is None else {"a": a}, {})]


def strict_json(verdict: Verdict | None) -> str:
    """The verdict as a program would read it; raises where JSON has no word for a value."""
    return json.dumps(verdict and verdict.to_dict(), allow_nan=False)


# --- how long


@pytest.mark.parametrize("n", [1, 2, 5])
def test_for_readings_counts_readings(n: int) -> None:
    """It speaks from the n-th true evaluation in a row on; steps without a reading neither count nor break."""
    numbers: list[float | None] = [0, 2, None, 2, 0, None, *[2] * 8]
    since = [i for i, a in enumerate(numbers) if a == 2]
    runs = [since[:2], since[2:]]
    assert fired(f"a > 1 for {n} readings", numbers) == [i for run in runs for i in run[n - 1 :]]


@pytest.mark.parametrize(("every", "n"), [(1, 1), (1, 4), (3, 4), (3, 6), (10, 4)])
def test_for_steps_looks_back(every: int, n: int) -> None:
    """With a reading every few steps it speaks at the first one that lies n steps behind the first true one."""
    rule = StopWhen(f"a > 1 for {n} steps")
    steps = range(0, 200, every)
    found = [step for step in steps if rule.update(step, {"a": 2.0 if step >= 30 else 0.0}, {})]
    first = next(step for step in steps if step >= 30)
    assert found == [step for step in steps if step >= first + n]


def test_one_false_evaluation_begins_anew() -> None:
    """Also for steps: true, false and true again is counted from the second true one."""
    assert fired("a > 1 for 3 steps", [2, 2, 0, 2, 2, 2, 2, 2]) == [6, 7]


def test_after_passes_over_the_first_steps() -> None:
    """Steps 0 to N - 1 do not count, neither alone nor towards a run."""
    assert fired("a > 1 after 4 steps", [2.0] * 7) == [4, 5, 6]
    assert fired("a > 1 for 2 readings after 4 steps", [2.0] * 7) == [5, 6]
    assert fired("a > 1 after 4 steps for 2 steps", [2.0] * 8) == [6, 7]


def test_readings_before_after_enter_the_windows() -> None:
    """A window is full at the first step that counts."""
    assert fired("mean(a, 4) >= 2 after 4 steps", [1.0, 1.0, 3.0, 3.0, 1.0, 1.0]) == [4, 5]


def test_steps_that_repeat_or_go_back_are_taken() -> None:
    """A run is then counted from its lowest step, so that it is never too early."""
    rule = StopWhen("a > 1 for 10 steps")
    steps = [50, 55, 55, 20, 29, 30, 31]
    assert [step for step in steps if rule.update(step, {"a": 2.0}, {})] == [30, 31]


# --- when it is evaluated


def test_tags_at_different_cadences() -> None:
    """It waits for all tags, keeps the last reading of each, and is evaluated when one of them is new."""
    rule = StopWhen("val_loss > 2 * train_loss for 2 readings")
    stream: list[tuple[dict[str, float], bool]] = [
        ({"train_loss": 1.0}, False),
        ({"other": 9.0}, False),
        ({"val_loss": 3.0}, False),  # the first evaluation
        ({}, False),
        ({"other": 9.0}, False),
        ({"train_loss": 1.2}, True),
        ({"train_loss": 2.0}, False),
        ({"train_loss": 1.0, "val_loss": 3.0}, False),
        ({"val_loss": 3.0}, True),
    ]
    assert [rule.update(i, readings, {}) is not None for i, (readings, _) in enumerate(stream)] == [
        e for _, e in stream
    ]


def test_missing_names_the_tags_that_have_not_come() -> None:
    """In order of appearance, until they come; one that came as NaN has come."""
    rule = StopWhen("x > y / z")
    assert rule.missing == ("x", "y", "z")
    rule.update(0, {"y": math.nan, "x": 1.0}, {})
    assert rule.missing == ("z",)


def test_a_nan_is_no_reason_and_does_not_blind() -> None:
    """A NaN reading breaks a run, and the next readings count again; a window passes over it."""
    nan = math.nan
    assert fired("a > 1 for 2 readings", [2, 2, nan, 2, 2]) == [1, 4]
    assert fired("a != 1", [nan, 2, nan]) == [1]
    assert fired("not a > 1", [nan, 0, nan]) == [1]
    assert fired("mean(a, 3) > 1", [2, nan, 2, math.inf, 2, nan, 2]) == [4, 5, 6]


def test_infinite_readings_compare_as_numbers() -> None:
    """Infinity is above and minus infinity below everything, and each equals itself."""
    assert fired("a > 1e308", [1, math.inf, -math.inf]) == [1]
    assert fired("a == -inf", [1, math.inf, -math.inf]) == [2]


def brute_force(history: list[tuple[int, dict[str, float]]], which: int) -> list[bool]:
    """Whether `EXPRESSIONS[which]` speaks at each step, from the whole history and by definition alone."""
    unknown = math.nan

    def last(tag: str, n: int, statistic: Any) -> float:
        finite = [r[tag] for _, r in seen if tag in r and math.isfinite(r[tag])][-n:]
        return statistic(finite) if len(finite) == n else unknown

    def more(left: float, right: float) -> float:  # 1 true, 0 false, 1/2 unknown
        return 0.5 if math.isnan(left) or math.isnan(right) else float(left > right)

    tags, readings, steps, after = [
        ("a", 1, 0, 0),
        ("a", 3, 0, 0),
        ("ab", 1, 4, 0),
        ("ab", 1, 0, 5),
        ("abc", 2, 0, 7),
        ("ab", 1, 3, 0),
        ("ab", 1, 0, 0),
    ][which]
    answers, run = [], []
    for i, (step, new) in enumerate(history):
        seen = history[: i + 1]
        now = {tag: next((r[tag] for _, r in reversed(seen) if tag in r), None) for tag in tags}
        if not set(tags) & set(new) or None in now.values():
            answers.append(False)
            continue
        a, b, c = (now.get(tag) or 0.0 for tag in "abc")
        truth = [
            lambda a, b, c: more(a, 1),
            lambda a, b, c: more(a, 1),
            lambda a, b, c: min(more(a, 1), 1 - more(1, b)),
            lambda a, b, c: max(more(a, b), more(b, a)),
            lambda a, b, c: max(more(last("a", 3, statistics.mean), last("b", 2, min)), more(abs(c), 2)),
            lambda a, b, c: more(last("a", 4, max) - last("a", 4, statistics.median), a / b if b else unknown),
            lambda a, b, c: max(
                more(last("a", 2, statistics.mean) * 1e308 + b, 0), 0.5 if math.isnan(a) else float(a == math.inf)
            ),
        ][which](a, b, c)
        run = [*run, step] if truth == 1 and step >= after else []
        answers.append(len(run) >= readings and step - run[0] >= steps)
    return answers


@pytest.mark.parametrize("which", range(len(EXPRESSIONS)), ids=EXPRESSIONS)
@given(stream=STREAM, stride=st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_it_speaks_when_its_definition_says_so(which: int, stream: list[dict[str, float]], stride: int) -> None:
    """Each expression, over any stream, against an evaluation of the whole history at each step."""
    rule = StopWhen(EXPRESSIONS[which])
    history = [(i * stride, readings) for i, readings in enumerate(stream)]
    found = [rule.update(step, readings, {}) is not None for step, readings in history]
    assert found == brute_force(history, which)


# --- what it says


def test_the_verdict_has_the_numbers() -> None:
    """The expression, the steps it has held for, and the number of everything that it names."""
    rule = StopWhen('mean("lr-SGD", 2) <  1 and a / b > 1.5\n for 2 readings')
    for step in range(40):
        verdict = rule.update(10 * step, {"lr-SGD": 0.5, "a": 1.83456, "b": 1.0}, {})
    assert verdict is not None
    assert verdict.reason == (
        'mean("lr-SGD", 2) < 1 and a / b > 1.5 for 2 readings (steps 10-390): '
        "mean(lr-SGD, 2) is 0.5, a is 1.835, b is 1."
    )
    assert (verdict.rule, verdict.severity, verdict.step) == ("when_lr_SGD", "stop", 390)
    assert "lr-SGD and a and b" in verdict.advice
    assert list(verdict.evidence) == ["lr-SGD", "a", "b"]
    assert verdict.evidence["a"][-1] == (390, 1.83456)
    assert len(verdict.evidence["a"]) == EVIDENCE_LENGTH
    assert not verdict.weights_suspect


def test_a_single_step_is_named_alone() -> None:
    """A condition without "for" gives the one step."""
    verdict = StopWhen("a > 1").update(7, {"a": math.inf}, {})
    assert verdict is not None and verdict.reason == "a > 1 (step 7): a is inf."


def test_arguments_go_into_the_verdict() -> None:
    """Name, advice, action and weights_suspect are as given."""
    rule = StopWhen("a > 1", name="my-rule.2", advice="Rest.", action="warn", weights_suspect=True)
    verdict = rule.update(0, {"a": 2.0}, {})
    assert verdict is not None
    assert (verdict.rule, verdict.advice, verdict.severity, verdict.weights_suspect) == (
        "my-rule.2",
        "Rest.",
        "warn",
        True,
    )


@pytest.mark.parametrize(
    ("expression", "name"),
    [("hessian/sharpness_ratio > 1", "when_hessian_sharpness_ratio"), ('1 < "Größe, m" + b', "when_Gr_e_m")],
)
def test_the_name_comes_from_the_first_tag(expression: str, name: str) -> None:
    """Every run of other characters than letters and digits becomes one underscore."""
    assert StopWhen(expression).name == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": ""}, "name='' must be one or more letters, digits, '_', '.' or '-'"),
        ({"name": "a b"}, "name='a b' must be"),
        ({"name": "größe"}, "name='größe' must be"),
        ({"name": "a\n"}, r"name='a\\n' must be"),
        ({"name": 5}, "name=5 must be"),
        ({"advice": None}, "advice=None must be a text"),
        ({"action": "halt"}, "action='halt' must be 'stop'"),
        ({"weights_suspect": 1}, "weights_suspect=1 must be True or False"),
        ({"expression": "a > "}, "expression is not understood at character 4: expected a number or a tag"),
        ({"expression": None}, "expression=None must be a text"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    """Each error names the argument, its value and what it may be."""
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        StopWhen(**{"expression": "a > 1", **arguments})


def test_it_can_be_written_in_yaml() -> None:
    """Class path and plain arguments are enough for Lightning's command line."""
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--rules", type=list[Rule])
    config = """
    - class_path: dynwatch.rules.stop_when.StopWhen
      init_args:
        expression: '"lr-SGD" > 0.1 or hessian/sharpness_ratio > 1.5 for 5 readings'
        action: warn
    """
    instantiate = getattr(parser, "instantiate", parser.instantiate_classes)  # the first since jsonargparse 4.49
    (rule,) = instantiate(parser.parse_args([f"--rules={config}"])).rules
    assert isinstance(rule, StopWhen)
    assert (rule.reads, rule.action, rule.name) == (("lr-SGD", "hessian/sharpness_ratio"), "warn", "when_lr_SGD")


# --- state, and readings of any kind


@pytest.mark.parametrize("expression", EXPRESSIONS)
@given(stream=STREAM, cut=st.integers(0, 50), steps=st.lists(st.integers(-3, 30), min_size=50, max_size=50))
@settings(max_examples=60, deadline=None)
def test_a_restored_rule_goes_on_as_if_unbroken(
    expression: str, stream: list[dict[str, float]], cut: int, steps: list[int]
) -> None:
    """No readings or steps raise, verdicts are strict JSON, and state sent through JSON gives the same ones."""
    unbroken, broken = StopWhen(expression), StopWhen(expression)
    for i, readings in enumerate(stream):
        if i == cut:
            state = json.loads(json.dumps(broken.state_dict()))
            broken = StopWhen(expression)
            broken.load_state_dict(state)
            assert json.dumps(broken.state_dict()) == json.dumps(unbroken.state_dict())
        expected = strict_json(unbroken.update(steps[i], readings, {}))
        assert strict_json(broken.update(steps[i], readings, {})) == expected
    assert json.dumps(broken.state_dict()) == json.dumps(unbroken.state_dict())


@pytest.mark.parametrize(
    ("how_long", "expected"),
    [("for 2 readings", [5, 6, 7, 13]), ("for 3 steps", [7]), ("after 5 steps", [5, 6, 7, 12, 13])],
)
def test_every_step_of_a_run_can_be_restored(how_long: str, expected: list[int]) -> None:
    """In the middle of a count and of a window that is not full yet, the verdicts after it are the same."""
    numbers = [3, 3, 1, math.nan, 3, 3, 3, 3, 0, 0, 3, 3, 3, 3]
    expression = f"mean(a, 3) > 2 and a > 2 {how_long}"
    unbroken = StopWhen(expression)
    verdicts = [unbroken.update(i, {"a": a}, {}) for i, a in enumerate(numbers)]
    assert [i for i, verdict in enumerate(verdicts) if verdict] == expected
    for cut in range(len(numbers)):
        before, after = StopWhen(expression), StopWhen(expression)
        found = [before.update(i, {"a": numbers[i]}, {}) for i in range(cut)]
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        found += [after.update(i, {"a": numbers[i]}, {}) for i in range(cut, len(numbers))]
        assert [strict_json(verdict) for verdict in found] == [strict_json(verdict) for verdict in verdicts]


def test_state_is_a_copy() -> None:
    """What was taken at one step does not change with the next, nor does loading tie two rules together."""
    rule, other = StopWhen("mean(a, 2) > 1 for 2 readings"), StopWhen("mean(a, 2) > 1 for 2 readings")
    rule.update(0, {"a": 2.0}, {})
    state = rule.state_dict()
    kept = json.dumps(state)
    other.load_state_dict(state)
    for step in range(1, 4):
        rule.update(step, {"a": 3.0}, {})
    assert json.dumps(state) == json.dumps(other.state_dict()) == kept


def test_a_changed_expression_begins_afresh() -> None:
    """State of another expression is not taken over: its counts and windows mean something else."""
    old, new = StopWhen("a > 1 for 3 readings"), StopWhen("a > 1 for 2 readings")
    for step in range(5):
        old.update(step, {"a": 2.0}, {})
    new.load_state_dict(old.state_dict())
    assert json.dumps(new.state_dict()) == json.dumps(StopWhen("a > 1 for 2 readings").state_dict())
    assert fired("", [2, 2], new) == [1]


def test_reason_is_one_line() -> None:
    """An expression that is written over several lines is told in one."""
    verdict = StopWhen("a > 1\n  and a < 9").update(0, {"a": 2.0}, {})
    assert verdict is not None and re.fullmatch(r"a > 1 and a < 9 \(step 0\): a is 2\.", verdict.reason)
