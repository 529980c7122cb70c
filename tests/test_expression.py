"""The language of conditions: what is understood, what is pointed at, and values against independent evaluators."""

from __future__ import annotations

import math
import statistics
import sys
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dynwatch.rules.expression import MAX_LENGTH, MAX_NESTING, MAX_WINDOW, parse
from dynwatch.rules.memory import Window

TAGS = ("a", "b", "c")
NUMBER = st.floats(-10, 10) | st.floats() | st.sampled_from([0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1.7e308])
PLAIN = st.integers(-3, 3).map(float)


def holds(text: str, **readings: float) -> bool | None:
    """What a condition says of one reading of each tag."""
    expression = parse(text)
    memory = expression.memory()
    assert memory.take(0, readings)
    return expression.condition.holds(memory)


# --- values


def quantities(depth: int) -> st.SearchStrategy[str]:
    """Texts of numbers with few parentheses, so that precedence decides."""
    leaf = st.sampled_from([*TAGS, "0", "1", "2", "0.5", ".25", "1e1", "3."])
    if depth == 0:
        return leaf
    below = quantities(depth - 1)
    pair = st.tuples(below, st.sampled_from(["+", "-", "*"]), below).map(" ".join)
    return leaf | pair | below.map("-{}".format) | below.map("({})".format) | below.map("abs({})".format)


def conditions(depth: int) -> st.SearchStrategy[str]:
    """Texts of conditions with few parentheses, each of them also a Python expression."""
    compared = st.tuples(quantities(2), st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), quantities(2))
    if depth == 0:
        return compared.map(" ".join)
    below = conditions(depth - 1)
    pair = st.tuples(below, st.sampled_from(["and", "or"]), below).map(" ".join)
    return compared.map(" ".join) | pair | below.map("not {}".format) | below.map("({})".format)


@given(text=conditions(3), a=PLAIN, b=PLAIN, c=PLAIN)
@settings(max_examples=500, deadline=None)
def test_precedence_is_that_of_python(text: str, a: float, b: float, c: float) -> None:
    """Where all numbers are known a condition says what Python says of the same text."""
    assume(any(tag in text.replace("abs", "").replace("and", "") for tag in TAGS))
    assume(len(text) <= MAX_LENGTH)
    readings = {"a": a, "b": b, "c": c}
    expression = parse(text)
    memory = expression.memory()
    memory.take(0, readings)
    expected = eval(text, {"__builtins__": {}, "abs": abs}, readings)
    assert expression.condition.holds(memory) is expected


TREE: Any = st.deferred(
    lambda: (
        st.tuples(st.sampled_from([">", "!=", "=="]), st.sampled_from(TAGS), st.sampled_from(TAGS))
        | st.tuples(st.sampled_from(["and", "or"]), TREE, TREE)
        | st.tuples(st.just("not"), TREE)
    )
)


def kleene_text(tree: Any) -> str:
    """A tree as text, with all its parentheses."""
    if tree[0] == "not":
        return f"not ({kleene_text(tree[1])})"
    if tree[0] in ("and", "or"):
        return f"({kleene_text(tree[1])}) {tree[0]} ({kleene_text(tree[2])})"
    return f"{tree[1]} {tree[0]} {tree[2]}"


def kleene_value(tree: Any, values: dict[str, float]) -> float:
    """Kleene's logic in numbers: 0 is false, 1/2 unknown, 1 true; and is the least, or the most, not the rest to 1."""
    if tree[0] == "not":
        return 1 - kleene_value(tree[1], values)
    if tree[0] in ("and", "or"):
        choose = min if tree[0] == "and" else max
        return choose(kleene_value(tree[1], values), kleene_value(tree[2], values))
    left, right = values[tree[1]], values[tree[2]]
    if math.isnan(left) or math.isnan(right):
        return 0.5
    return float({">": left > right, "!=": left != right, "==": left == right}[tree[0]])


@given(tree=TREE, values=st.fixed_dictionaries({tag: st.sampled_from([math.nan, math.inf, 0.0, 1.0]) for tag in TAGS}))
@settings(max_examples=400, deadline=None)
def test_unknown_follows_kleene(tree: Any, values: dict[str, float]) -> None:
    """A comparison with NaN is unknown, and unknown goes through and, or and not as in Kleene's logic."""
    text = kleene_text(tree)
    assume(len(text) <= MAX_LENGTH and deepest(text) <= MAX_NESTING)
    assert holds(text, **values) is {0.0: False, 0.5: None, 1.0: True}[kleene_value(tree, values)]


def deepest(text: str) -> int:
    """How many parentheses stand in one another."""
    depth = most = 0
    for character in text:
        depth += (character == "(") - (character == ")")
        most = max(most, depth)
    return most


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a / 0 > 0", None),
        ("a / (a - a) != 0", None),
        ("not a / 0 > 0", None),
        ("a / 0 > 0 or a == 2", True),
        ("a / 0 > 0 and a == 3", False),
        ("a * 1e308 * 1e308 == inf", True),
        ("inf - inf * a != 0", None),
        ("a / 1e-308 / 1e-308 > 1e308", True),
        ("-inf < a", True),
        ("a / inf == 0", True),
        ("a - -a == 4", True),
        ("- - -a == -2", True),
        ("not not a == 2", True),
        ("8 / a / 2 == 2", True),
        ("8 - a - 2 == 4", True),
        ("1+a*3==7", True),
        ("a-1 == 1", True),
        ("abs(-a * 2) == 4", True),
        ("(((a))) == ((2))", True),
    ],
)
def test_numbers_with_two(text: str, expected: bool | None) -> None:
    """Arithmetic of a = 2, with divisions by zero and overflows, raises nothing."""
    assert holds(text, a=2.0) is expected


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("hessian/sharpness_ratio > 1", ["hessian/sharpness_ratio"]),
        ("grad_norm/layer/0.weight > 1", ["grad_norm/layer/0.weight"]),
        ("a/b / c > 1", ["a/b", "c"]),
        ("a /b > 1", ["a", "b"]),
        ("a/ b > 1", ["a", "b"]),
        ("a/(b) > 1", ["a", "b"]),
        ("lr-SGD > 1", ["lr", "SGD"]),
        ('"lr-SGD" > 1', ["lr-SGD"]),
        ("`lr-SGD` > `Größe (m)`", ["lr-SGD", "Größe (m)"]),
        ('"and" > "5"', ["and", "5"]),
        ("mean > max(steps, 2) for 2 steps", ["mean", "steps"]),
        ("b > mean(a, 3) or a > b", ["b", "a"]),
        ("_x.y > android", ["_x.y", "android"]),
        ("a\u00a0>\n\t1", ["a"]),
        ("infinity > 1", ["infinity"]),
    ],
)
def test_tags(text: str, tags: list[str]) -> None:
    """Slashes, quotes and words that only look like keywords, in order of appearance."""
    assert list(parse(text).tags) == tags


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("a > 1", (1, 0, 0)),
        ("a > 1 for 5 readings", (5, 0, 0)),
        ("a > 1 for 1 reading", (1, 0, 0)),
        ("a > 1 for 7 steps", (1, 7, 0)),
        ("a > 1 for 1 step after 1 step", (1, 1, 1)),
        ("a > 1 after 20 steps for 5 readings", (5, 0, 20)),
        ("(a > 1)for 5 readings", (5, 0, 0)),
    ],
)
def test_how_long(text: str, counts: tuple[int, int, int]) -> None:
    """How many readings, over how many steps, from which step on."""
    expression = parse(text)
    assert (expression.for_readings, expression.for_steps, expression.after) == counts


# --- errors


@pytest.mark.parametrize(
    ("text", "at", "problem"),
    [
        ("", 1, "expected a number or a tag, found the end."),
        ("val_loss > > 3", 12, "expected a number or a tag, found '>'."),
        ("a > 1 and b  ", 12, "expected <, <=, >, >=, == or !=, found the end."),
        ("a and b > 1", 3, "expected <, <=, >, >=, == or !=, found 'and'."),
        ("not a", 6, "expected <, <=, >, >=, == or !=, found the end."),
        ("(a > 1", 7, "expected an operator or ')', found the end."),
        ("a > 1)", 6, "expected an operator, 'for', 'after' or the end, found ')'."),
        ("a > 1 b", 7, "expected an operator, 'for', 'after' or the end, found 'b'."),
        ("1 < a < 2", 7, "comparisons cannot be chained; write 1 < a and a < 2."),
        ("b > 2 or 2*a<=b  +1 != mean(b, 3)", 21, "chained; write 2*a<=b  +1 and b  +1 != mean(b, 3)."),
        ("a = 1", 3, "'=' is not known; 'equal' is ==, 'at least' is >= and 'at most' is <=."),
        ("a > 1 && b > 2", 7, "'&' is not known; write 'and'."),
        ("acc% > 3", 4, "a tag with other characters than letters, digits, _ . / goes in double quotes."),
        ("'a' > 1", 1, 'a tag is quoted with " or `.'),
        ('b > 1 and "a > 1', 11, 'the quote " is not closed.'),
        ('b > ""', 5, "'\"\"' is no tag: a tag is not blank and does not end in '/'."),
        ("`a/` > 1", 1, "'`a/`' is no tag"),
        ("a > 1.5.2", 5, "'1.5.2' is no number; a number is written 1, 0.5 or 1e-3"),
        ("5abc > 1", 1, "a tag that begins with a digit goes in double quotes."),
        ("a > 1e999", 5, "'1e999' is beyond the largest number; infinity is written inf."),
        ("a != nan", 6, "nothing can be compared with nan; the rule NonFinite looks for it."),
        ("for > 3", 1, "found 'for'; a tag of this name is written \"for\"."),
        ("a > 1 AND b > 2", 7, "found 'AND'; the keyword is written 'and'."),
        ("1 < 2", 1, "there is no tag, and so nothing to watch; name one, as in val_loss > 3."),
        ("a > 1 for 0 readings", 11, "expected a whole number of readings or steps, at least 1, found '0'."),
        ("a > 1 for 1.5 steps", 11, "expected a whole number of readings or steps, at least 1, found '1.5'."),
        ("a > 1 for -1 steps", 11, "expected a whole number of readings or steps, at least 1, found '-'."),
        ("a > 1 for 5 epochs", 13, "expected 'readings' or 'steps', found 'epochs'."),
        ("a > 1 after 5 readings", 15, "expected 'steps', found 'readings'."),
        ("a > 1 after 5", 14, "expected 'steps', found the end."),
        ("a > 1 for 2 steps for 3 steps", 19, "'for' may stand once."),
        ("a > 1 for 2 steps and b > 3", 19, "expected an operator, 'for', 'after' or the end, found 'and'."),
        ("log(a) > 1", 1, "there is no function 'log'; there are abs, mean, median, min and max."),
        ("mean(a) > 1", 7, "expected ',' and a number of readings, as in mean(val_loss, 20), found ')'."),
        ("min(a, b) > 1", 8, "expected a whole number of readings, from 1 to 100000, found 'b'."),
        ("mean(a, 0) > 1", 9, "expected a whole number of readings, from 1 to 100000, found '0'."),
        (f"mean(a, {MAX_WINDOW + 1}) > 1", 9, "from 1 to 100000, found '100001'."),
        ("mean(a + b, 3) > 1", 8, "expected ',' and a number of readings"),
        ("mean(1, 3) > 1", 6, "expected a tag, as in mean(val_loss, 20), found '1'."),
        ("abs() > 1", 5, "expected a number or a tag, found ')'."),
        ("abs(a > 1) > 1", 5, "expected a number, found a condition in parentheses."),
        ("2 + (a > 1) > 3", 5, "expected a number, found a condition in parentheses."),
        ("(a > 1) * 2 > 3", 1, "expected a number, found a condition in parentheses."),
        ("b > -(a > 1)", 6, "expected a number, found a condition in parentheses."),
        ("(" * 40 + "a", MAX_NESTING + 1, f"there are more than {MAX_NESTING} parentheses in one another"),
        (" a >\n\t> 1", 7, "expected a number or a tag, found '>'."),
    ],
)
def test_errors_point_at_the_character(text: str, at: int, problem: str) -> None:
    """Each says what is wrong, shows the expression on one line and sets a caret below the character."""
    with pytest.raises(ValueError) as caught:
        parse(text)
    message, shown, caret = str(caught.value).split("\n")
    assert message.startswith(f"expression is not understood at character {at}: ")
    assert problem in message
    assert shown == "    " + text.replace("\n", " ").replace("\t", " ").rstrip()
    assert caret == "    " + " " * (at - 1) + "^"


@pytest.mark.parametrize("value", [None, 5, 1.5, True, ["a > 1"], b"a > 1"])
def test_what_is_no_text_is_named(value: Any) -> None:
    """An expression of another type is a ValueError that shows it and an example."""
    with pytest.raises(ValueError, match=r"expression=.* must be a text, such as 'val_loss > 3 for 5 readings'"):
        parse(value)


def test_length_is_bounded() -> None:
    """The longest expression is understood; one character more is an error that says both lengths."""
    longest = "a > " + "1 + " * 248 + "1234"
    assert len(longest) == MAX_LENGTH
    parse(longest)
    with pytest.raises(ValueError, match="has 1001 characters and may have 1000; split it"):
        parse(longest + "5")


@pytest.mark.parametrize(
    "text",
    [
        "(" * MAX_NESTING + "a > 0" + ")" * MAX_NESTING,
        "not (1 > 2 or a < 0 and " * MAX_NESTING + "a > 0" + ")" * MAX_NESTING,
        "1 < " + "abs(1 + 2 * -" * MAX_NESTING + "a" + ")" * MAX_NESTING,
        "a > " + "-" * 900 + "1",
        "not " * 200 + "a > 1",
        "a > 1" + " + 1" * 200,
        "a > 1" + " or a > 1" * 100,
    ],
)
def test_the_deepest_and_longest_leave_most_of_the_stack(text: str) -> None:
    """Parsing and evaluating them takes less than half of the frames that Python allows by default."""
    depth, frame = 0, sys._getframe()
    while frame.f_back is not None:
        depth, frame = depth + 1, frame.f_back
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(depth + 450)
    try:
        holds(text, a=2.0)
    finally:
        sys.setrecursionlimit(limit)


WORDS = "a b_c loss/x and or not for after 3 readings steps inf nan mean( abs( min( 1 .5 1e9"
PIECE = st.sampled_from([*WORDS.split(), *",()<>=!+-*/", "<=", "==", "!=", '"', "`"])


@given(st.text(max_size=40) | st.lists(PIECE, max_size=12).map(" ".join) | st.lists(PIECE, max_size=12).map("".join))
@example("a > 1 for " + "9" * 900 + " steps")
@example("\x00\ud800 > 1")
@settings(max_examples=1500, deadline=None)
def test_any_text_is_understood_or_a_value_error(text: str) -> None:
    """No text raises anything else, and what is understood can be evaluated."""
    try:
        expression = parse(text)
    except ValueError as error:
        assert "expression" in str(error)
        return
    memory = expression.memory()
    assert memory.take(0, dict.fromkeys(expression.tags, 1.0))
    assert expression.condition.holds(memory) in (True, False, None)


# --- windows


@given(size=st.integers(1, 6), numbers=st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=30))
@settings(max_examples=300, deadline=None)
def test_a_window_against_the_standard_library(size: int, numbers: list[float]) -> None:
    """Mean (rounded once), median, least and most of the last numbers, huge, tiny and of both signs."""
    window = Window(size)
    for i, number in enumerate(numbers):
        window.add(number)
        last = numbers[max(0, i + 1 - size) : i + 1]
        assert window.mean == statistics.mean(last)
        assert (window.median, window.min, window.max) == (statistics.median(last), min(last), max(last))


def test_a_mean_does_not_drift() -> None:
    """A huge number that has left the window leaves no trace in the mean."""
    window = Window(2)
    for number in [0.1, 1e300, -1e-300, 0.1, 0.3]:
        window.add(number)
    assert window.mean == 0.2


def test_an_empty_window_has_no_value() -> None:
    """All four statistics are NaN."""
    window = Window(2)
    assert all(math.isnan(value) for value in (window.mean, window.median, window.min, window.max))


@given(st.lists(NUMBER, max_size=40), st.integers(1, 5), st.sampled_from(["mean", "median", "min", "max"]))
@settings(max_examples=200, deadline=None)
def test_functions_see_the_last_finite_readings(readings: list[float], size: int, function: str) -> None:
    """They have no value before the n-th finite reading, and NaN and infinite readings are passed over."""
    expression = parse(f"{function}(a, {size}) == b")
    memory = expression.memory()
    oracle = {"mean": statistics.mean, "median": statistics.median, "min": min, "max": max}[function]
    for step, reading in enumerate(readings):
        finite = [r for r in readings[: step + 1] if math.isfinite(r)][-size:]
        expected = oracle(finite) if len(finite) == size else None
        memory.take(step, {"a": reading, "b": 0.0 if expected is None else expected})
        assert expression.condition.holds(memory) is (None if expected is None else True)
