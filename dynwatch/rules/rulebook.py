"""Asks a set of rules, and keeps order among their verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from dynwatch.rules import tags
from dynwatch.rules.base import Action, Rule, Verdict, check_count

# Where a rule of that name would write over readings of dynwatch's own.
_TAKEN = {"stop/verdict", *tags.OWN}


def apply_actions(rules: Sequence[Rule], actions: Mapping[str, str | bool] | str | bool | None) -> list[Rule]:
    """Set what is done about the verdicts of rules.

    Args:
        rules: The rules; their `action` is set.
        actions: By the rule's name "stop", "warn", "shadow", or "off" (also False, which is what YAML reads `off`
            as), which leaves the rule out; one word holds for all; None leaves all as they are.

    Raises:
        ValueError: For a rule that is not there or an unknown action.

    Example:
        >>> from dynwatch.rules import default_rules
        >>> rules = apply_actions(default_rules(), {"plateau": "off", "no_learning": "stop"})
        >>> [rule.name for rule in rules if rule.action == "stop"]
        ['non_finite', 'divergence', 'no_learning']
    """
    rules = list(rules)
    names = [getattr(rule, "name", None) for rule in rules]
    words = (*get_args(Action), "off", False)  # YAML reads off as False
    if actions is None or isinstance(actions, (str, bool)):
        if actions is not None and actions not in words:
            raise ValueError(f"actions={actions!r} must be 'stop', 'warn', 'shadow' or 'off', or a dict by rule.")
        chosen = {} if actions is None else {name: actions for name in names if name}
    elif isinstance(actions, Mapping):
        chosen = dict(actions)
    else:
        raise ValueError(f"actions={actions!r} must be a dict of actions by the rule's name, or one action for all.")
    for name, action in chosen.items():
        if name not in names:
            known = ", ".join(str(known) for known in names)
            raise ValueError(f"actions names the rule {name!r}, which is not there. The rules are: {known}.")
        if action not in words:
            raise ValueError(f"actions[{name!r}]={action!r} must be 'stop', 'warn', 'shadow' or 'off'.")
    kept = [rule for rule, name in zip(rules, names, strict=True) if chosen.get(name or "") not in ("off", False)]
    for rule in kept:
        if isinstance(rule, Rule) and rule.name in chosen:
            rule.action = chosen[rule.name]  # type: ignore[assignment]
    return kept


class Rulebook:
    """Asks rules in their order; no verdict before `min_steps`, and none twice within `cooldown` steps.

    A rule that raises is not asked again: `failed` says why, and the others go on. A verdict that ends the
    run ("stop") knows no cooldown.

    Args:
        rules: The rules, each with a name of its own.
        min_steps: Steps that must be done before a verdict counts.
        cooldown: Steps for which a rule that has warned, or fired in shadow mode, stays silent.

    Raises:
        ValueError: For something that is no rule, two rules of one name, or a number out of bounds.

    Example:
        >>> from dynwatch.rules import NonFinite
        >>> book = Rulebook([NonFinite(action="warn")], cooldown=10)
        >>> [step for step in range(30) if book.update(step, {"stop/loss": float("nan")}, {})]
        [0, 10, 20]
    """

    def __init__(self, rules: Sequence[Rule], min_steps: int = 0, cooldown: int = 1000) -> None:
        for rule in rules:
            if not isinstance(rule, Rule):
                raise ValueError(f"rules has {rule!r}, which must be an instance of Rule, such as NonFinite().")
            if not getattr(rule, "name", None):
                raise ValueError(f"rules has {rule!r}, which must have a name; set `name` in its class.")
        names = [rule.name for rule in rules]
        if len(set(names)) < len(names):
            raise ValueError(
                f"rules has two rules of one name: {', '.join(names)}. Keep one of each, or give one of them name=."
            )
        taken = [name for name in names if f"stop/{name}" in _TAKEN]
        if taken:
            raise ValueError(f"rules has a rule named {taken[0]!r}, but dynwatch itself writes to stop/{taken[0]}.")
        self.rules = list(rules)
        self.min_steps = check_count("min_steps", min_steps, least=0)
        self.cooldown = check_count("cooldown", cooldown, least=0)
        self.failed: dict[str, str] = {}
        self._silent_until: dict[str, int] = {}

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> list[tuple[Rule, Verdict]]:
        """Ask every rule; the verdicts that count, with their rules."""
        found = []
        for rule in self.rules:
            if rule.name in self.failed:
                continue
            try:
                verdict = rule.update(step, readings, notes)
                if verdict is not None and not isinstance(verdict, Verdict):
                    raise TypeError(f"its update returned {verdict!r}, which must be a Verdict or None")
            except Exception as error:
                self.failed[rule.name] = f"{type(error).__name__}: {error}"
                continue
            if verdict is None or step + 1 < self.min_steps:
                continue
            if rule.action != "stop":
                if step < self._silent_until.get(rule.name, step):
                    continue
                self._silent_until[rule.name] = step + max(self.cooldown, 1)
            found.append((rule, verdict))
        return found

    def state_dict(self) -> dict[str, Any]:
        rules = {rule.name: rule.state_dict() for rule in self.rules}
        return {"rules": rules, "silent_until": dict(self._silent_until)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken; rules that it does not know start afresh."""
        for rule in self.rules:
            if rule.name in state["rules"]:
                rule.load_state_dict(state["rules"][rule.name])
        self._silent_until = dict(state["silent_until"])
