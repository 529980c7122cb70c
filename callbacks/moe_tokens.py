"""Which sample of a batch a token belongs to, and whether it is padding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

# Where True or not zero means padding: the key of a batch, or a function of it that gives [B, S].
PaddingMask = str | Callable[[Any], Tensor]

_IGNORED = -100  # what torch's cross entropy leaves out


class TokenLayout:
    """How the N tokens of routers lie in batches of B samples.

    Args:
        padding_mask: The user's own; None takes `attention_mask` of a batch that has one (and for a decoder beside an
            encoder `decoder_attention_mask`, else its `labels`).
    """

    def __init__(self, padding_mask: PaddingMask | None) -> None:
        self._padding_mask = padding_mask
        self.remark = ""  # why a mask was not used

    def valid(self, batch: Any, leading: tuple[int, ...], decoder: bool = False) -> Tensor | None:
        """Which tokens count, [N] bool; None if all do.

        Args:
            batch: As the step gets it.
            leading: The shape of the tokens in the model: [B, S], [S, B] or [N].
            decoder: Whether they are those of a decoder beside an encoder.

        Raises:
            ValueError: If the user's own mask does not fit.
        """
        mask = self._mask(batch, decoder)
        if mask is None:
            return None
        n_tokens = 1
        for side in leading:
            n_tokens *= side
        if len(leading) >= 2 and leading[0] == mask.shape[0] and leading[1] < mask.shape[1] and len(leading) == 2:
            mask = mask[:, : leading[1]]  # a model of all but the last token
        elif len(leading) >= 2 and leading[:2] == tuple(mask.shape[::-1]) and leading[0] != leading[1]:
            mask = mask.t()
        if mask.numel() == n_tokens:
            return mask.reshape(-1)
        what = f"a padding mask of shape {list(mask.shape)} does not fit the {n_tokens} tokens of a router"
        if self._padding_mask is not None:
            raise ValueError(f"padding_mask gives {what}; give one entry for each token that routers see.")
        self.remark = f"{what}, so all of these tokens count; pass padding_mask="
        return None

    def _mask(self, batch: Any, decoder: bool) -> Tensor | None:
        """[B, S] bool, True where a token counts."""
        if callable(self._padding_mask):
            found: Any = self._padding_mask(batch)
        elif self._padding_mask is not None:
            found = _field(batch, self._padding_mask)
        else:
            return self._attention_mask(batch, decoder)
        if not isinstance(found, Tensor) or found.dim() != 2:
            kind = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(
                f"padding_mask={self._padding_mask!r} gave {kind} and must give a tensor [B, S] that is True (or not "
                "zero) where a token is padding: name a key of the batch or pass a function of it."
            )
        return found == 0

    @staticmethod
    def _attention_mask(batch: Any, decoder: bool) -> Tensor | None:
        if decoder:
            mask, labels = _field(batch, "decoder_attention_mask"), _field(batch, "labels")
            if not isinstance(mask, Tensor) and isinstance(labels, Tensor) and labels.dim() == 2:
                return labels != _IGNORED
        else:
            mask = _field(batch, "attention_mask")
        return mask != 0 if isinstance(mask, Tensor) and mask.dim() == 2 else None


def _field(batch: Any, name: str) -> Any:
    """A named part of a batch, of a mapping or a dataclass; None if it has none."""
    if isinstance(batch, Mapping):
        return batch.get(name)
    return getattr(batch, name, None) if dataclasses.is_dataclass(batch) else None


def sample_of_tokens(leading: tuple[int, ...], samples: int, device: torch.device) -> Tensor:
    """The sample of each token, [N].

    Args:
        leading: The shape of the tokens in the model.
        samples: B.
        device: Of the answer.

    Raises:
        ValueError: If it cannot be told.
    """
    n_tokens = 1
    for side in leading:
        n_tokens *= side
    numbers = torch.arange(n_tokens, device=device)
    if is_sequence_major(leading, samples):
        return numbers // (n_tokens // (leading[0] * samples)) % samples
    if n_tokens % samples or not n_tokens:
        raise ValueError(
            f"{n_tokens} tokens of a router do not belong to {samples} samples in equal parts, so pathways of samples "
            "are unknown; pass extract=, which can give the samples of tokens."
        )
    return numbers // (n_tokens // samples)


def is_sequence_major(leading: tuple[int, ...], samples: int) -> bool:
    """Whether tokens are ordered by position first, [S, B]."""
    return len(leading) >= 2 and leading[0] != samples and leading[1] == samples


def is_ambiguous(leading: tuple[int, ...], samples: int) -> bool:
    """Whether the order cannot be told, because there are as many samples as positions."""
    return len(leading) >= 2 and leading[0] == leading[1] == samples > 1
