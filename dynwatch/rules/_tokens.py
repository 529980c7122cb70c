"""The words of the language in which conditions on readings are written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

_TOKEN = re.compile(
    r"""(?P<space>\s+)
    | (?P<number>(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)(?![A-Za-z0-9_.])
    | (?P<word>[A-Za-z_][A-Za-z0-9_.]*(?:/[A-Za-z0-9_.]+)*)  # a slash without spaces is part of a tag
    | (?P<quoted>"[^"]*"|`[^`]*`)
    | (?P<symbol><=|>=|==|!=|[<>+\-*/(),])""",
    re.VERBOSE,
)
_NO_NUMBER = re.compile(r"[0-9.][A-Za-z0-9_.]*")
_REMEDIES = {
    "=": "'equal' is ==, 'at least' is >= and 'at most' is <=",
    "&": "write 'and'",
    "|": "write 'or'",
    "!": "write 'not'",
    "≤": "write <=",
    "≥": "write >=",
    "≠": "write !=",
    "'": 'a tag is quoted with " or `',
}


@dataclass(frozen=True)
class Token:
    """A word and where it stands: "number", "word", "quoted", "symbol", or the "end" with an empty text."""

    kind: str
    text: str
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else f"'{self.text}'"


def tokenize(text: str) -> list[Token]:
    """The words of a text and an end; raises a ValueError that points at what is none.

    Example:
        >>> print(*tokenize("train/loss / 2 > 1e-3"))
        'train/loss' '/' '2' '>' '1e-3' the end
    """
    tokens: list[Token] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            _fail_at(text, at)
        if match.lastgroup != "space":
            tokens.append(Token(str(match.lastgroup), match.group(), at))
        at = match.end()
    # Where it ends for a reader: a caret behind trailing spaces would point at nothing.
    return [*tokens, Token("end", "", tokens[-1].end if tokens else 0)]


def fail(text: str, at: int, problem: str) -> NoReturn:
    """Raise a ValueError that says what is wrong with a text, and points at the character.

    Example:
        >>> fail("loss = 3", 5, "no such operator")
        Traceback (most recent call last):
        ValueError: expression is not understood at character 6: no such operator.
            loss = 3
                 ^
    """
    shown = "".join(character if character.isprintable() else " " for character in text).rstrip()
    raise ValueError(f"expression is not understood at character {at + 1}: {problem}.\n    {shown}\n    {' ' * at}^")


def _fail_at(text: str, at: int) -> NoReturn:
    number = _NO_NUMBER.match(text, at)
    if number:
        remedy = "a number is written 1, 0.5 or 1e-3, and a tag that begins with a digit goes in double quotes"
        fail(text, at, f"{number.group()!r} is no number; {remedy}")
    if text[at] in '"`':
        fail(text, at, f"the quote {text[at]} is not closed")
    remedy = _REMEDIES.get(text[at], "a tag with other characters than letters, digits, _ . / goes in double quotes")
    fail(text, at, f"{text[at]!r} is not known; {remedy}")
