"""Tells of rules that had nothing to look at, which must not pass for rules that were content."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

from dynwatch.rules import Rule, StopWhen, tags
from dynwatch.rules.replaying import is_known

log = logging.getLogger("dynwatch")


class Unseen:
    """Which tags have not come yet, of those that the user's own choice of rules looks at.

    Args:
        rules: Rules that the user chose; the default set holds for any run, whatever it measures.
        validation_loss: Name of the validation loss, if the user gave one.
    """

    def __init__(self, rules: Sequence[Rule], validation_loss: str | None) -> None:
        self._rules = rules
        self._validation_loss = validation_loss
        self._tags = {tag for rule in rules for tag in rule.reads}
        if validation_loss is not None:
            self._tags.add(tags.VAL_LOSS)

    def look(self, readings: Iterable[str]) -> None:
        """Take off the tags that have come."""
        if self._tags:
            self._tags = {tag for tag in self._tags if not is_known(tag, readings)}

    def tell(self) -> None:
        """Warn, once, of each rule that could not judge the run."""
        for rule in self._rules:
            unseen = [tag for tag in rule.judges if tag in self._tags]
            # A condition needs all that it names; other rules that name no needs make do with a part.
            if unseen and (len(unseen) == len(rule.judges) or rule.needs or isinstance(rule, StopWhen)):
                log.warning(
                    "The rule %s could not judge this run: nothing was logged or measured as %s. Metrics of "
                    "training_step and of validation can be read by the name under which you log them; a / that "
                    "divides needs spaces around it.",
                    rule.name,
                    ", ".join(unseen),
                )
        if self._validation_loss is not None and tags.VAL_LOSS in self._tags:
            log.warning("validation_loss=%r: no validation of this run logged such a metric.", self._validation_loss)
        self._tags = set()
