"""What a rule is, and what it answers with."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, TypeVar, get_args

# What is done about a verdict: end the run, only say so, or only note that it would have ended.
Action = Literal["stop", "warn", "shadow"]

# How many readings of a rule's own tags go into a verdict as evidence.
EVIDENCE_LENGTH = 30


@dataclass(frozen=True)
class Verdict:
    """Why a run should end, or what its owner should know, in a form that a person and a program can read.

    Attributes:
        rule: Name of the rule.
        step: The step whose readings decided.
        reason: One sentence with numbers.
        advice: What to do about it.
        evidence: For each tag the last readings as (step, value) pairs, oldest first.
        weights_suspect: Whether the weights may have been spoilt, so that they should not replace an
            earlier checkpoint.
        severity: What the rule asks for: "stop" (also in shadow mode, where it is only noted) or "warn".

    Example:
        >>> verdict = Verdict("patience", step=7, reason="Enough.", advice="Rest.", evidence={"loss": [(7, math.inf)]})
        >>> verdict.to_dict()["evidence"]
        {'loss': [[7, 'inf']]}
    """

    rule: str
    step: int
    reason: str
    advice: str
    evidence: Mapping[str, list[tuple[int, float]]] = field(default_factory=dict)
    weights_suspect: bool = True
    severity: Literal["stop", "warn"] = "stop"

    def to_dict(self) -> dict[str, Any]:
        """The verdict as primitives, for JSON; non-finite numbers become the strings "nan" and "inf"."""
        record = asdict(self)
        record["evidence"] = {
            tag: [[step, value if math.isfinite(value) else str(value)] for step, value in readings]
            for tag, readings in self.evidence.items()
        }
        return record


class Rule(ABC):
    """What `EarlyTermination` asks of a rule: a state machine fed with numbers, free of devices and Lightning.

    A subclass sets `name`, lists in `reads` the tags it looks at and in `kept` the attributes that later verdicts
    depend on: numbers, strings, lists and dicts of them, deques, and objects with a `state_dict` of their own.

    Attributes:
        name: Unique among the rules of a run; verdicts stand in TensorBoard at `stop/<name>`.
        reads: Tags of the readings that the rule looks at; one that ends in "/" stands for all tags below it, and a *
            in one for the number of any layer.
        needs: Those of `reads` without any one of which it can judge nothing; empty if any one of `reads` is enough.
        quotes: Those of `reads` that only go into the words of its verdicts, so that alone they are nothing to judge.
        action: What is done about its verdicts: "stop", "warn" or "shadow".
        kept: Names of the attributes that make its state.

    Example:
        >>> class Budget(Rule):
        ...     name = "budget"
        ...     def update(self, step, readings, notes):
        ...         return self.verdict(step, "100 steps are spent.", "Buy more.") if step >= 100 else None
        >>> Budget().update(100, {}, {}).reason
        '100 steps are spent.'
    """

    name: str
    reads: tuple[str, ...] = ()
    needs: ClassVar[tuple[str, ...]] = ()
    quotes: ClassVar[tuple[str, ...]] = ()
    action: Action = "stop"
    kept: ClassVar[tuple[str, ...]] = ()

    @property
    def judges(self) -> tuple[str, ...]:
        """The tags to miss when they do not come: `needs`, or all that is read but not only quoted."""
        return self.needs or tuple(tag for tag in self.reads if tag not in self.quotes)

    @abstractmethod
    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        """Take in the readings of one step; answer with a verdict for as long as there is something to object to.

        Args:
            step: The step, not decreasing from call to call.
            readings: Values by tag, each new at this step; a rule ignores tags that it does not know.
            notes: What is known in words about a reading, by its tag ("conv1.weight first, …").
        """

    def verdict(self, step: int, reason: str, advice: str, *evidence: Recent, weights_suspect: bool = False) -> Verdict:
        """A verdict in this rule's name, with the severity that its action asks for."""
        return Verdict(
            rule=self.name,
            step=step,
            reason=reason,
            advice=advice,
            evidence={recent.tag: list(recent) for recent in evidence if recent},
            weights_suspect=weights_suspect,
            severity="warn" if self.action == "warn" else "stop",
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything that later verdicts depend on, as primitives."""
        return {name.lstrip("_"): _to_primitives(getattr(self, name)) for name in self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken."""
        for name in self.kept:
            setattr(self, name, _like(getattr(self, name), state[name.lstrip("_")]))


class Recent:
    """The last readings of one tag, as evidence.

    Example:
        >>> recent = Recent("loss", length=2)
        >>> for step in range(3):
        ...     recent.add(step, step / 2)
        >>> list(recent)
        [(1, 0.5), (2, 1.0)]
    """

    def __init__(self, tag: str, length: int = EVIDENCE_LENGTH) -> None:
        self.tag = tag
        self._readings: deque[tuple[int, float]] = deque(maxlen=length)

    def add(self, step: int, value: float) -> None:
        self._readings.append((step, value))

    def __iter__(self) -> Any:
        return iter(self._readings)

    def __len__(self) -> int:
        return len(self._readings)

    def state_dict(self) -> dict[str, Any]:
        return {
            "tag": self.tag,
            "steps": [step for step, _ in self._readings],
            "values": [value for _, value in self._readings],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tag = state["tag"]
        self._readings = deque(zip(state["steps"], state["values"], strict=True), maxlen=self._readings.maxlen)


_Known = TypeVar("_Known", float, "float | None")


def newest(readings: Mapping[str, float], tag: str, before: _Known) -> float | _Known:
    """A tag's reading if it is new and finite, else what was known before.

    Example:
        >>> newest({"stop/lr": math.nan}, "stop/lr", 0.1)
        0.1
    """
    value = readings.get(tag, math.nan)
    return value if math.isfinite(value) else before


def _to_primitives(value: Any) -> Any:
    if hasattr(value, "state_dict"):
        return value.state_dict()
    if isinstance(value, dict):
        return {key: _to_primitives(item) for key, item in value.items()}
    return list(value) if isinstance(value, (list, deque)) else value


def _like(now: Any, saved: Any) -> Any:
    """A saved value in the form of the attribute that it goes to."""
    if hasattr(now, "load_state_dict"):
        now.load_state_dict(saved)
        return now
    if isinstance(now, deque):
        return deque(saved, maxlen=now.maxlen)
    return type(now)(saved) if isinstance(now, (list, dict)) else saved


def check_action(action: Action) -> Action:
    """Return an action, or raise a ValueError that lists them.

    Example:
        >>> check_action("warn")
        'warn'
    """
    if action not in get_args(Action):
        raise ValueError(
            f"action={action!r} must be 'stop' (end the run), 'warn' (say so) or 'shadow' (note where it would end)."
        )
    return action


def check_count(argument: str, value: object, least: int = 1) -> int:
    """Return a count, or raise a ValueError that says its bound.

    Example:
        >>> check_count("patience", 20)
        20
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{argument}={value!r} must be a whole number, {least} or more.")
    return value


def check_number(
    argument: str,
    value: object,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    remedy: str = "",
) -> float:
    """Return a number within bounds, or raise a ValueError that says them.

    Example:
        >>> check_number("share", 0.5, above=0.0, below=1.0)
        0.5
    """
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not fits or not (above < value < below and value >= least):  # type: ignore[operator]
        bounds = f" above {above:g}" * (above > -math.inf) + f", {least:g} or more" * (least > -math.inf)
        bounds += f" and below {below:g}" * (below < math.inf)
        kind = "a finite number" if value == math.inf else "a number"
        text = f"{argument}={value!r} must be {kind}{bounds}"
        raise ValueError(f"{text}; {remedy}." if remedy else f"{text}.")
    return value  # type: ignore[return-value]
