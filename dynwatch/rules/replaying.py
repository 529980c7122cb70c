"""Rules on readings of the past: where each would have fired."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

from dynwatch.rules import tags
from dynwatch.rules.base import Action, Rule, Verdict, check_count
from dynwatch.rules.rulebook import Rulebook

# Readings of one step after the other, or the curve of each tag.
Readings = Iterable[tuple[int, Mapping[str, float]]] | Mapping[str, Sequence[tuple[int, float]]]


# With fewer losses than this, most rules are still waiting.
_FEW = 100


@dataclass(frozen=True)
class Outcome:
    """What one rule makes of one run.

    Attributes:
        run: Name of the run.
        rule: Name of the rule; of several of one name the second is "name #2".
        action: The rule's action. Only "stop" would have ended the run.
        step: The step at which it fires for the first time; None if it never does.
        saved: Share of the budget that a stop at this step saves.
        verdict: Its first verdict.
        fired: At how many steps it has something to object to.
        missing: Tags of `rule.judges` that the log does not have, so that "never fired" is not taken for "had nothing
            to read"; one that ends in "/" stands for all below it.
        failed: What the rule raised, after which it was not asked any more.
        needs: The rule's `needs`.
        quotes: The rule's `quotes`.

    Example:
        >>> Outcome("run", "divergence", "stop", missing=("stop/loss",)).step is None
        True
    """

    run: str
    rule: str
    action: Action
    step: int | None = None
    saved: float | None = None
    verdict: Verdict | None = None
    fired: int = 0
    reads: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    failed: str = ""
    needs: tuple[str, ...] = ()
    quotes: tuple[str, ...] = ()

    @property
    def nothing_to_read(self) -> bool:
        """Whether the log lacks what the rule needs, or has nothing that it reads but the share spent."""
        if self.needs:
            return bool(self.missing)
        return bool(self.reads) and set(self.reads) <= {*self.missing, *self.quotes, tags.PROGRESS}


@dataclass(frozen=True)
class PastRun:
    """A run as its log tells it.

    Attributes:
        outcomes: One for each rule.
        mapped: For each reading that the log has under another name, the tag or tags that it was taken from.
        planned_steps: The budget that `saved` is a share of; None for a log without scalars.
        loss_every: The usual number of steps from one loss to the next; None if there are less than two.
        unreadable: What could not be read, and why.
        losses: How many losses there are; None if there is no such tag.
        recorded: Which rules fired in the run itself, and where, if dynwatch watched it.

    Example:
        >>> PastRun(mapped={"stop/loss": "train_loss"}).mapped["stop/loss"]
        'train_loss'
    """

    outcomes: tuple[Outcome, ...] = ()
    mapped: Mapping[str, str] = field(default_factory=dict)
    planned_steps: int | None = None
    loss_every: float | None = None
    unreadable: tuple[str, ...] = ()
    losses: int | None = None
    recorded: tuple[str, ...] = ()

    def notes(self) -> Iterator[str]:
        """What the outcomes should be read with: where readings are from, which are missing, what was unreadable."""
        yield from self.unreadable
        if self.planned_steps is None:
            yield "The log has no scalars."
            return
        reads = {tag for outcome in self.outcomes for tag in outcome.reads}
        sources: dict[str, list[str]] = {}
        for reading, tag in self.mapped.items():
            if reading in reads:
                sources.setdefault(tag, []).append(reading)
        if sources:
            yield f"Read {'; '.join(f'{listed(readings)} from {tag}' for tag, readings in sources.items())}."
        if self.loss_every is not None and self.loss_every > 1:
            yield f"The loss stands in the log each {self.loss_every:g} steps: a rule in a run may see more of it."
        if self.losses is not None and self.losses < _FEW:
            yield f"The log holds {self.losses} losses only: rules that wait for more of them cannot fire."
        if self.recorded:
            yield f"Verdicts of the run itself: {listed(self.recorded)}."
        for outcome in self.outcomes:
            if outcome.failed:
                yield f"The rule {outcome.rule} was not asked any more, because it raised {outcome.failed}."
        for words, nothing in (("Nothing to read", True), ("Not all to read", False)):
            lacking: dict[str, list[str]] = {}  # rules by what they lack
            for outcome in self.outcomes:
                if outcome.missing and outcome.nothing_to_read is nothing:
                    lacking.setdefault(_in_short(outcome.missing), []).append(outcome.rule)
            if lacking:
                yield f"{words}: {', '.join(f'{listed(rules)} (without {tags})' for tags, rules in lacking.items())}."
        if any(outcome.step is not None for outcome in self.outcomes):
            yield f"Saved is a share of {self.planned_steps} planned steps."


def _in_short(missing: Sequence[str]) -> str:
    """Tags that a rule lacks; of several by layer only where they all stand."""
    kind = missing[0].split("/", 1)[0]
    if any("*" in tag for tag in missing) and all(tag.startswith(f"{kind}/") for tag in missing):
        return f"{kind}/…"
    return listed(missing)


def replay_readings(
    readings: Readings, rules: Iterable[Rule], planned_steps: int | None = None, run: str = "."
) -> list[Outcome]:
    """Feed readings of the past to rules.

    The rules that are passed in are copied and stay as they are. Readings of one step go into one update, a
    later one in the place of an earlier one of the same tag and step; steps are taken in increasing order. The
    spent share of the budget, `stop/progress`, is (step + 1) / `planned_steps` unless it is among the readings and
    no `planned_steps` is given; a step that has nothing else is left out.

    Args:
        readings: (step, {tag: value}) pairs, or for each tag its (step, value) pairs.
        rules: The rules; several of one name, with different settings, are welcome.
        planned_steps: The budget in steps; None takes the last step + 1, as if the run had been planned to be
            as long as it was.
        run: A name for the outcomes.

    Returns:
        One outcome for each rule, in their order.

    Raises:
        ValueError: If there are no rules or something else is among them, or `planned_steps` is no whole number
            of at least 1.

    Example:
        >>> from dynwatch.rules import NonFinite
        >>> losses = [(0, 2.3), (1, 2.2), (2, float("nan")), (3, 2.1)]
        >>> [outcome] = replay_readings({"stop/loss": losses}, [NonFinite()])
        >>> outcome.step, outcome.saved, outcome.missing
        (2, 0.25, ('stop/grad_norm', 'stop/weight_norm', 'stop/scaler'))
    """
    labelled = label_rules(rules)
    if planned_steps is not None:
        check_count("planned_steps", planned_steps)
    by_step = _by_step(readings)
    known = {tag for values in by_step.values() for tag in values}
    steps = [step for step in sorted(by_step) if by_step[step].keys() - {tags.PROGRESS}]
    budget = planned_steps or max([1, *(step + 1 for step in steps)])
    if planned_steps is not None or tags.PROGRESS not in known:
        known.add(tags.PROGRESS)
        for step in steps:
            by_step[step][tags.PROGRESS] = min(1.0, (step + 1) / budget)
    outcomes = []
    for label, original in labelled.items():
        rule = deepcopy(original)
        book, first, verdict, fired = Rulebook([rule], cooldown=0), None, None, 0
        for step in steps:
            for _, found in book.update(step, by_step[step], {}):
                fired += 1
                if verdict is None:
                    first, verdict = step, found
        saved = None if first is None else max(0.0, 1 - (first + 1) / budget)
        missing = tuple(tag for tag in rule.judges if not is_known(tag, known))
        failed = book.failed.get(rule.name, "")
        outcomes.append(
            Outcome(
                *(run, label, rule.action, first, saved, verdict, fired),
                reads=rule.reads,
                missing=missing,
                failed=failed,
                needs=rule.needs,
                quotes=rule.quotes,
            )
        )
    return outcomes


def is_known(tag: str, known: Iterable[str]) -> bool:
    """Whether a tag, or for one that ends in "/" any tag below it or for a * any number, is among those known.

    Example:
        >>> is_known("update_ratio/", ["update_ratio/net.0"])
        True
        >>> is_known("moe/layer_*/experts", ["moe/layer_3/experts"])
        True
    """
    if tag.endswith("/"):
        return any(name.startswith(tag) for name in known)
    head, star, end = tag.partition("*")
    if not star:
        return tag in known
    ends = (name[len(head) :].removesuffix(end) for name in known if name.startswith(head) and name.endswith(end))
    return any(number == star or number.isdecimal() for number in ends)


def label_rules(rules: Iterable[Rule]) -> dict[str, Rule]:
    """Rules by name; the second of one name is "name #2".

    Raises:
        ValueError: If there are no rules, or something else is among them.

    Example:
        >>> from dynwatch.rules import Divergence
        >>> list(label_rules([Divergence(patience=5), Divergence(patience=50)]))
        ['divergence', 'divergence #2']
    """
    labelled: dict[str, Rule] = {}
    counts: dict[str, int] = {}
    for rule in rules:
        if not isinstance(rule, Rule):
            raise ValueError(f"rules has {rule!r}, which must be an instance of Rule, such as NonFinite().")
        count = counts[rule.name] = counts.get(rule.name, 0) + 1
        labelled[rule.name if count == 1 else f"{rule.name} #{count}"] = rule
    if not labelled:
        raise ValueError(
            "rules is empty; pass at least one rule, such as [Divergence()], or None for the default ones."
        )
    return labelled


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first names, and how many more there are.

    Example:
        >>> listed(["a", "b", "c"], most=2)
        'a, b and 1 more'
    """
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")


def _by_step(readings: Readings) -> dict[int, dict[str, float]]:
    by_step: dict[int, dict[str, float]] = {}
    if isinstance(readings, Mapping):
        for tag, curve in readings.items():
            for step, value in curve:
                by_step.setdefault(step, {})[tag] = value
    else:
        for step, values in readings:
            by_step.setdefault(step, {}).update(values)
    return by_step
