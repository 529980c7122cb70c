"""The fixed samples on which pathways are looked at."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dynwatch.callbacks.batches import MOST_SAVED_BYTES, cloned, is_small, moved, part, samples_in, tensors_in
from dynwatch.callbacks.probe import Stage

GroupBy = str | Callable[[Any], Sequence[Any]]


class ProbeSet:
    """Collects the first batches of a run, or takes a given one, up to a number of samples, and keeps copies.

    Attributes:
        batches: Those kept, with their numbers in the run.
        samples: How many samples they hold.
        reason: Why there are none, once that is known.

    Args:
        source: "train", "validate", or a batch.
        max_samples: The most samples, on this rank.
        max_tokens: The most positions of a sequence to keep; None keeps all.
        group_by: Key of the batch (or function of it) that tells each sample's group.
    """

    def __init__(self, source: Any, max_samples: int, max_tokens: int | None, group_by: GroupBy | None) -> None:
        self.stage: Stage = "validate" if isinstance(source, str) and source == "validate" else "train"
        self._given = None if isinstance(source, str) else source
        self.max_samples = max_samples
        self._max_tokens = max_tokens
        self._group_by = group_by
        self.batches: list[tuple[Any, int]] = []
        self.samples = 0
        self.reason = ""
        self._closed = False

    def wants(self, stage: Stage) -> bool:
        """Whether batches of a stage are still to be offered."""
        return self.stage == stage and self._given is None and not self._closed

    def take_given(self, device: torch.device) -> None:
        """Keep the batch that was given, if one was."""
        if self._given is not None and not self.batches:
            self.offer(moved(self._given, device), 0)
            self._closed = True

    def offer(self, batch: Any, batch_idx: int) -> None:
        """Keep a copy of a batch, or of its first samples if that is enough."""
        count = samples_in(batch)
        if not count:
            self.reason = (
                "the tensors of a batch do not agree on a first dimension, so its samples cannot be told; pass probe=, "
                "a batch of samples"
            )
            self._closed = True
            return
        kept = min(count, self.max_samples - self.samples)
        batch = part(batch, count, 0, kept) if kept < count else batch
        self.batches.append((cloned(self._shortened(batch)), batch_idx))
        self.samples += kept
        self._closed = self.samples >= self.max_samples

    def clear(self) -> None:
        """Let go of all samples, and take no more."""
        self.batches, self.samples, self._closed = [], 0, True

    def close(self) -> None:
        """Go on with what has been kept: the samples must stay the same from now on."""
        self._closed = bool(self.batches)

    def without_last(self, index: int) -> None:
        """Leave out the last sample of a batch."""
        batch, number = self.batches[index]
        count = samples_in(batch) or 0
        self.batches[index] = part(batch, count, 0, count - 1), number
        self.samples -= 1

    def _shortened(self, batch: Any) -> Any:
        """A batch whose sequences are cut: tensors that are as long as its first [B, S] of whole numbers."""
        ids = next((t for t in tensors_in(batch) if t.dim() >= 2 and not t.is_floating_point()), None)
        if self._max_tokens is None or ids is None or ids.shape[1] <= self._max_tokens:
            return batch
        length, most = ids.shape[1], self._max_tokens

        def cut(item: Any) -> Any:
            if isinstance(item, Tensor):
                return item[:, :most] if item.dim() >= 2 and item.shape[1] == length else item
            if isinstance(item, Mapping):
                return {key: cut(value) for key, value in item.items()}
            if type(item) in (list, tuple):
                return type(item)(cut(value) for value in item)
            return item

        return cut(batch)

    def groups(self) -> list[int] | None:
        """A number for each sample's group, the same on all ranks; None if the batches tell no groups.

        Raises:
            ValueError: If there are not as many keys as samples.
        """
        found: list[int] = []
        for batch, _ in self.batches:
            keys = self._keys(batch)
            if keys is None:
                return None
            count = samples_in(batch)
            if len(keys) != count:
                raise ValueError(
                    f"group_by={self._group_by!r} gave {len(keys)} keys for the {count} samples of a batch."
                )
            found += [_number_of(key) for key in keys]
        return found or None

    def _keys(self, batch: Any) -> Sequence[Any] | None:
        if callable(self._group_by):
            keys: Any = self._group_by(batch)
        elif self._group_by is None:
            return None
        elif isinstance(batch, Mapping):
            keys = batch.get(self._group_by)
        else:
            keys = getattr(batch, self._group_by, None) if dataclasses.is_dataclass(batch) else None
        return keys.tolist() if isinstance(keys, Tensor) else keys

    # --- state

    def state(self) -> list[list[Any]] | None:
        batches = [[batch, number] for batch, number in self.batches]
        return batches if is_small(batches, MOST_SAVED_BYTES) else None

    def load_state(self, state: list[list[Any]] | None, device: torch.device | None = None) -> None:
        self.batches = [(batch, number) for batch, number in state or ()]
        self.samples = sum(samples_in(batch) or 0 for batch, _ in self.batches)
        self._closed = self.samples >= self.max_samples
        self.reason = ""

    def to(self, device: torch.device) -> None:
        """Move what is kept to a device."""
        self.batches = [(moved(batch, device), number) for batch, number in self.batches]


def _number_of(key: Any) -> int:
    """Forty bits that stand for a key, on every rank alike."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=5).digest(), "big")
