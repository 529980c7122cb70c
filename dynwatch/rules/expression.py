r"""A small language for conditions on readings, and the recursive-descent parser that turns it into nodes.

.. code-block:: text

    rule       := condition {"for" N ("readings" | "steps") | "after" N "steps"}       each at most once
    condition  := all {"or" all}
    all        := not {"and" not}
    not        := {"not"} (comparison | "(" condition ")")
    comparison := sum ("<" | "<=" | ">" | ">=" | "==" | "!=") sum
    sum        := product {("+" | "-") product}
    product    := factor {("*" | "/") factor}
    factor     := {"-"} (number | "inf" | tag | function | "(" sum ")")
    function   := "abs" "(" sum ")"  |  ("mean" | "median" | "min" | "max") "(" tag "," N ")"

Nothing of a text is ever executed.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

from dynwatch.rules import _nodes as nodes
from dynwatch.rules._nodes import Condition, Quantity
from dynwatch.rules._tokens import Token, fail, tokenize
from dynwatch.rules.memory import Memory

# Far beyond what anybody writes; they keep the recursion of parser and nodes well inside Python's own limit.
MAX_LENGTH, MAX_NESTING = 1000, 30
MAX_WINDOW = 100_000

_STATISTICS = ("mean", "median", "min", "max")
_KEYWORDS = ("and", "or", "not", "for", "after", "inf", "nan")
_COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
# From the loosest to the tightest. Floats overflow to inf and raise nothing.
_ARITHMETIC: tuple[dict[str, Callable[[float, float], float]], ...] = (
    {"+": operator.add, "-": operator.sub},
    {"*": operator.mul, "/": lambda a, b: a / b if b else math.nan},
)


@dataclass(frozen=True)
class Expression:
    """A condition on readings and how long it must hold.

    Attributes:
        condition: What must hold.
        terms: What the condition looks at, tags and statistics, each once, in order of appearance.
        for_readings: How many evaluations in a row it must hold.
        for_steps: How many steps back it must have begun to hold.
        after: The first step that counts.

    Example:
        >>> parse("val_loss > 3 for 5 readings after 100 steps").after
        100
    """

    condition: Condition
    terms: tuple[nodes.Tag | nodes.Windowed, ...]
    for_readings: int = 1
    for_steps: int = 0
    after: int = 0

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags, in order of appearance."""
        return tuple(dict.fromkeys(term.tag for term in self.terms))

    def memory(self) -> Memory:
        """An empty memory for its tags and windows."""
        windows = dict.fromkeys((term.tag, term.size) for term in self.terms if isinstance(term, nodes.Windowed))
        return Memory(self.tags, windows)


def parse(text: str) -> Expression:
    """What a text asks for; raises a ValueError that points at the first character that is not understood.

    Example:
        >>> expression = parse("val_loss > 2 * min(val_loss, 10) for 3 readings")
        >>> expression.tags, expression.for_readings, [str(term) for term in expression.terms]
        (('val_loss',), 3, ['val_loss', 'min(val_loss, 10)'])
        >>> parse("val_loss > > 3")
        Traceback (most recent call last):
        ValueError: expression is not understood at character 12: expected a number or a tag, found '>'.
            val_loss > > 3
                       ^
    """
    if not isinstance(text, str):
        raise ValueError(f"expression={text!r} must be a text, such as 'val_loss > 3 for 5 readings'.")
    if len(text) > MAX_LENGTH:
        raise ValueError(
            f"expression has {len(text)} characters and may have {MAX_LENGTH}; split it into several rules. "
            f"It begins {text[:60]!r}."
        )
    return _Parser(text).rule()


class _Parser:
    """Reads one text. Conditions and numbers share one ladder of methods, because "(" may begin either."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._tokens = tokenize(text)
        self._next = 0
        self._nesting = 0
        self._terms: dict[nodes.Tag | nodes.Windowed, None] = {}

    def rule(self) -> Expression:
        condition = self._condition(self._joined())
        counts: dict[str, tuple[int, str]] = {}  # by keyword: the number and its unit
        while self._token.text in ("for", "after"):
            keyword = self._advance()
            if keyword.text in counts:
                self._fail(f"{keyword} may stand once", keyword)
            units = ("reading", "step") if keyword.text == "for" else ("step",)
            count = self._count(" or ".join(f"{unit}s" for unit in units))
            unit = self._token.text.removesuffix("s")
            if unit not in units:
                self._expected(" or ".join(f"'{unit}s'" for unit in units))
            self._advance()
            counts[keyword.text] = count, unit
        if self._token.kind != "end":
            self._expected("an operator, 'for', 'after' or the end")
        if not self._terms:
            self._fail("there is no tag, and so nothing to watch; name one, as in val_loss > 3", self._tokens[0])
        number, unit = counts.get("for", (1, "reading"))
        return Expression(
            condition,
            tuple(self._terms),
            for_readings=number if unit == "reading" else 1,
            for_steps=number if unit == "step" else 0,
            after=counts.get("after", (0, "step"))[0],
        )

    def _joined(self, keyword: str = "or") -> Condition | Quantity:
        part = partial(self._joined, "and") if keyword == "or" else self._not
        first = part()
        if self._token.text != keyword:
            return first
        parts = [self._condition(first)]
        while self._accept(keyword):
            parts.append(self._condition(part()))
        return nodes.Joined(tuple(parts), decisive=keyword == "or")

    def _not(self) -> Condition | Quantity:
        count = self._repeats("not")
        part = self._comparison()
        if count == 0:
            return part
        condition = self._condition(part)
        return nodes.Not(condition) if count % 2 else condition

    def _comparison(self) -> Condition | Quantity:
        start = self._token
        first = self._arithmetic()
        if self._token.text not in _COMPARISONS:
            return first
        left = self._quantity(first, start)
        compare = _COMPARISONS[self._advance().text]
        middle = self._token
        right = self._quantity(self._arithmetic(), middle)
        again = self._token
        if again.text in _COMPARISONS:
            one = self._text_since(start)
            self._advance()
            self._arithmetic()
            self._fail(f"comparisons cannot be chained; write {one} and {self._text_since(middle)}", again)
        return nodes.Comparison(left, compare, right)

    def _arithmetic(self, level: int = 0) -> Condition | Quantity:
        if level == len(_ARITHMETIC):
            return self._factor()
        start = self._token
        first = self._arithmetic(level + 1)
        if self._token.text not in _ARITHMETIC[level]:
            return first
        left, rest = self._quantity(first, start), []
        while self._token.text in _ARITHMETIC[level]:
            operate = _ARITHMETIC[level][self._advance().text]
            start = self._token
            rest.append((operate, self._quantity(self._arithmetic(level + 1), start)))
        return nodes.Arithmetic(left, tuple(rest))

    def _factor(self) -> Condition | Quantity:
        count = self._repeats("-")
        start = self._token
        part = self._primary()
        if count == 0:
            return part
        quantity = self._quantity(part, start)
        return nodes.Negative(quantity) if count % 2 else quantity

    def _primary(self) -> Condition | Quantity:
        token = self._token
        if token.text == "(":
            return self._in_parentheses()
        if token.kind == "number":
            number = float(self._advance().text)
            if math.isinf(number):
                self._fail(f"{token} is beyond the largest number; infinity is written inf", token)
            return nodes.Number(number)
        if self._accept("inf"):
            return nodes.Number(math.inf)
        if token.kind == "word" and token.text not in _KEYWORDS and self._tokens[self._next + 1].text == "(":
            return self._function()
        tag = nodes.Tag(self._tag("a number or a tag"))
        self._terms[tag] = None
        return tag

    def _in_parentheses(self) -> Condition | Quantity:
        if self._nesting == MAX_NESTING:
            self._fail(f"there are more than {MAX_NESTING} parentheses in one another; write it flatter", self._token)
        self._advance()
        self._nesting += 1
        inside = self._joined()
        self._nesting -= 1
        if not self._accept(")"):
            self._expected("an operator or ')'")
        return inside

    def _function(self) -> Quantity:
        name = self._advance()
        if name.text == "abs":
            start = self._tokens[self._next + 1]
            return nodes.Absolute(self._quantity(self._in_parentheses(), start))
        if name.text not in _STATISTICS:
            self._fail(f"there is no function {name}; there are abs, mean, median, min and max", name)
        self._advance()
        tag = self._tag(f"a tag, as in {name.text}(val_loss, 20)")
        if not self._accept(","):
            self._expected(f"',' and a number of readings, as in {name.text}(val_loss, 20)")
        size = self._count("readings", MAX_WINDOW)
        if not self._accept(")"):
            self._expected("')'")
        statistic = nodes.Windowed(name.text, tag, size)
        self._terms[statistic] = None
        return statistic

    def _tag(self, expected: str) -> str:
        token = self._token
        if token.kind == "word":
            if token.text.lower() == "nan":
                self._fail("nothing can be compared with nan; the rule NonFinite looks for it", token)
            if token.text.lower() in _KEYWORDS:
                self._expected(expected, f'; a tag of this name is written "{token.text}"')
            return self._advance().text
        if token.kind != "quoted":
            self._expected(expected)
        tag = self._advance().text[1:-1]
        if not tag.strip() or tag.endswith("/"):
            self._fail(f"{token} is no tag: a tag is not blank and does not end in '/'", token)
        return tag

    def _count(self, of: str, most: float = math.inf) -> int:
        token = self._token
        if not token.text.isdecimal() or not 1 <= int(token.text) <= most:
            bound = f"from 1 to {most}" if most < math.inf else "at least 1"
            self._expected(f"a whole number of {of}, {bound}")
        return int(self._advance().text)

    def _repeats(self, text: str) -> int:
        start = self._next
        while self._accept(text):
            pass
        return self._next - start

    def _condition(self, node: Condition | Quantity) -> Condition:
        if not isinstance(node, Condition):
            self._expected("<, <=, >, >=, == or !=")
        return node

    def _quantity(self, node: Condition | Quantity, start: Token) -> Quantity:
        if not isinstance(node, Quantity):
            self._fail("expected a number, found a condition in parentheses", start)
        return node

    @property
    def _token(self) -> Token:
        return self._tokens[self._next]

    def _advance(self) -> Token:
        self._next += 1
        return self._tokens[self._next - 1]

    def _accept(self, text: str) -> bool:
        found = self._token.text == text
        self._next += found
        return found

    def _text_since(self, start: Token) -> str:
        return self._text[start.start : self._tokens[self._next - 1].end]

    def _expected(self, what: str, remedy: str = "") -> NoReturn:
        keyword = self._token.text.lower()
        if keyword in _KEYWORDS and keyword != self._token.text:
            remedy = f"; the keyword is written '{keyword}'{remedy}"
        self._fail(f"expected {what}, found {self._token}{remedy}", self._token)

    def _fail(self, problem: str, token: Token) -> NoReturn:
        fail(self._text, token.start, problem)
