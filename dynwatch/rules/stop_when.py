"""A rule that its user writes as an expression."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from dynwatch.rules.base import Action, Rule, Verdict, check_action
from dynwatch.rules.expression import parse


class StopWhen(Rule):
    """Any condition on any readings, written as one would say it.

    ::

        StopWhen("hessian/sharpness_ratio > 1.5 for 5 readings")
        StopWhen("val_loss > 1.2 * min(val_loss, 10) and train_loss < 0.1 after 2000 steps")
        StopWhen('mean("lr-SGD", 3) < 1e-6 or abs(bias) == inf for 200 steps', action="warn")

    Tags
        Letters, digits, `_`, `.` and `/`, with a letter or `_` first. Any other tag, and one that is called
        like a keyword (`and or not for after inf nan`), goes in double quotes or backticks: `lr-SGD` means lr
        minus SGD. A slash belongs to the tag (`train/loss`) unless there is a space beside it (`train / loss`).
        `missing` names the tags that have not come yet, such as a misspelt one.
    Operators
        `< <= > >= == !=`, `and or not`, `+ - * /` and parentheses, with the usual precedence.
    Functions
        `abs(x)`, and `mean`, `median`, `min` and `max` of the last n finite readings of a tag, the newest
        among them: `mean(val_loss, 5)`. They have no value before the n-th.
    When it is evaluated
        At each step with a new reading of one of its tags, once all of them have come. A tag without a new
        reading keeps its last one, so that tags may come at different cadences.
    `for N readings`
        True at N evaluations in a row; 1 without it.
    `for N steps`
        True at every evaluation since one that lies at least N steps back.
    `after N steps`
        Evaluations at steps 0 to N - 1 do not count; their readings enter the windows all the same.
    What cannot be told
        A comparison with NaN is unknown, `!=` too, and so are its opposite and what depends on it (`false and
        unknown` is false, `true or unknown` is true). Unknown counts as not true. A division by zero is NaN.

    Args:
        expression: The condition, of at most 1000 characters.
        name: The rule's name, in letters, digits, `_`, `.` and `-`. None: `when_` and the first tag. Two
            conditions on the same tag need names of their own.
        advice: What its verdicts advise. Empty: to look at these tags, and how to let such a run go on.
        action: What is done about its verdicts.
        weights_suspect: Whether the weights may be spoilt when it holds, so that they should not replace an
            earlier checkpoint.

    Raises:
        ValueError: If the expression is not understood (the message points at the character), `name` has other
            characters or none, `action` is unknown, or `advice` or `weights_suspect` is of another type.

    Example:
        >>> rule = StopWhen("sharpness > 1.5 for 2 readings")
        >>> for step, sharpness in enumerate([1.8, 1.2, 1.6, 1.83]):
        ...     verdict = rule.update(10 * step, {"sharpness": sharpness}, {})
        >>> rule.name, verdict.reason
        ('when_sharpness', 'sharpness > 1.5 for 2 readings (steps 20-30): sharpness is 1.83.')
    """

    kept = ("expression", "_memory", "_times", "_since")

    def __init__(
        self,
        expression: str,
        name: str | None = None,
        advice: str = "",
        action: Action = "stop",
        weights_suspect: bool = False,
    ) -> None:
        self._parsed = parse(expression)
        self.expression = expression
        self.reads = self._parsed.tags
        self.name = "when_" + re.sub("[^A-Za-z0-9]+", "_", self.reads[0]) if name is None else _check_name(name)
        if not isinstance(advice, str):
            raise ValueError(f"advice={advice!r} must be a text, or empty for one that suits any condition.")
        self.advice = advice or (
            f"This bound is your own: see what {' and '.join(self.reads)} did in the steps before, and change what "
            "drives it. If such a run should go on, loosen the expression (a wider bound, 'for 20 readings', 'after "
            "1000 steps') or pass action='warn'."
        )
        self.action = check_action(action)
        if not isinstance(weights_suspect, bool):
            raise ValueError(f"weights_suspect={weights_suspect!r} must be True or False.")
        self.weights_suspect = weights_suspect
        self._memory = self._parsed.memory()
        self._times = 0  # evaluations in a row that were true
        self._since: int | None = None  # the step of the first of them

    @property
    def missing(self) -> tuple[str, ...]:
        """The tags that have not come yet; as long as there are any, the condition is not evaluated.

        Example:
            >>> rule = StopWhen("val_loss > 2 * train_loss")
            >>> rule.update(0, {"val_loss": 3.0, "train/loss": 1.0}, {})
            >>> rule.missing
            ('train_loss',)
        """
        return tuple(tag for tag in self.reads if tag not in self._memory.latest)

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        if not self._memory.take(step, readings):
            return None
        parsed = self._parsed
        if step < parsed.after or not parsed.condition.holds(self._memory):
            self._times, self._since = 0, None
            return None
        self._times += 1
        # Where steps go back the run of true evaluations is counted from the lowest: never too early.
        self._since = step if self._since is None else min(self._since, step)
        if self._times < parsed.for_readings or step - self._since < parsed.for_steps:
            return None
        steps = f"steps {self._since}-{step}" if self._since < step else f"step {step}"
        numbers = ", ".join(f"{term} is {term.value(self._memory):.4g}" for term in parsed.terms)
        return self.verdict(
            step,
            f"{' '.join(self.expression.split())} ({steps}): {numbers}.",
            self.advice,
            *self._memory.recent.values(),
            weights_suspect=self.weights_suspect,
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; a rule whose expression was changed meanwhile begins afresh."""
        if state["expression"] == self.expression:
            super().load_state_dict(state)


def _check_name(name: object) -> str:
    if not isinstance(name, str) or not re.fullmatch("[A-Za-z0-9_.-]+", name):
        raise ValueError(
            f"name={name!r} must be one or more letters, digits, '_', '.' or '-': verdicts stand at stop/<name>."
        )
    return name
