"""The user's own logged metrics, for rules that ask for them by name."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from dynwatch.callbacks.namespaces import Trainer


class UserMetrics:
    """Looks up new values of named metrics without computing, synchronising or resetting any of them.

    Args:
        names: The metrics' names, as logged ("train_accuracy", also "train_accuracy_step").
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        self._by_step: set[str] = set()
        self._last_of_step: dict[str, Any] = {}  # weak references: a value may hold a graph
        self._seen: dict[str, Tensor] = {}

    def of_step(self, trainer: Trainer) -> dict[str, Tensor]:
        """What `training_step` logged for this batch."""
        results = trainer._results
        found: dict[str, Tensor] = {}
        if results is None:
            return found
        for _, metric in results.valid_items():
            names = [name for name in results._forked_name(metric, on_step=True) if name in self.names]
            # The cached value of the batch: asking for an epoch's value would compute the user's metric early.
            value = results._get_cache(metric, on_step=True) if names else None
            if isinstance(value, Tensor) and value.numel() == 1:
                # Not logged for this batch, a metric still has its value of an earlier one: the same tensor.
                last, held = self._last_of_step.get(names[0]), metric._forward_cache
                if last is None or last() is not held:
                    self._last_of_step[names[0]] = weakref.ref(held)
                    found.update(dict.fromkeys(names, value))
        self._by_step.update(found)
        return found

    def of_epoch(self, trainer: Trainer, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """What Lightning has computed since the last call: metrics of validation, and of training epochs."""
        connector = trainer._logger_connector
        known = {**connector._logged_metrics, **connector._callback_metrics}
        found: dict[str, Tensor] = {}
        for name in self.names if names is None else names:
            value = known.get(name)
            # Each computation makes a tensor of its own, so the same one is an old value.
            if isinstance(value, Tensor) and value.numel() == 1 and value is not self._seen.get(name):
                self._seen[name] = value
                if name not in self._by_step:
                    found[name] = value.detach()
        return found
