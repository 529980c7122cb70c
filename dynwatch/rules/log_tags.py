"""Which scalars of a log are the readings that rules ask for."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence

from dynwatch.rules.replaying import listed
from dynwatch.rules.tags import GRADIENT, LOSS, LR, LR_LOW, VAL_LOSS, pick_train_loss, pick_validation_loss

Curve = Sequence[tuple[int, float]]

# The norm over all gradients, as dynwatch and as Lightning's `grad_norm` utility name it.
_GRADIENT_NAMES = ("grad_norm/total", "grad_2.0_norm_total", "grad_2_norm_total")
_NO_RATE = ("-momentum", "-weight_decay")  # LearningRateMonitor's other tags


def map_tags(
    log: Mapping[str, Curve],
    chosen: Mapping[str, str] | None = None,
    loss: str | None = None,
    val_loss: str | None = None,
) -> tuple[dict[str, Curve], dict[str, str]]:
    """Add to a log the readings that it has under other names.

    * `stop/loss` and `stop/val_loss`: the log's own, else `loss` and `val_loss`, else the tag whose name says so.
    * `stop/grad_norm`: the log's own, else `grad_norm/total`, else the total of Lightning's `grad_norm` utility.
    * `stop/lr`: the log's own, else at each step the largest of the rates that LearningRateMonitor logs (tags that
      begin with `lr-` or `lr/`, or are `lr` or `learning_rate`).
    * `stop/lr_low`: the log's own, else the smallest value of `stop/lr` after the step. A log knows its future, but
      none that a stop has cut off.

    A chosen or named tag that the log lacks leaves its reading out; nothing else is taken in its place.

    Args:
        log: (step, value) pairs by tag, in the order of the steps.
        chosen: Tags of the log by reading, in place of all of the above.
        loss: Tag of the training loss.
        val_loss: Tag of the validation loss.

    Returns:
        The log with these readings, and for each of them the tag or tags that it was taken from.

    Example:
        >>> readings, mapped = map_tags({"train/loss": [(0, 2.3)], "lr-SGD": [(0, 0.1), (1, 0.01)]})
        >>> mapped
        {'stop/loss': 'train/loss', 'stop/lr': 'lr-SGD', 'stop/lr_low': 'lr-SGD'}
        >>> readings["stop/lr_low"]
        [(0, 0.01), (1, 0.01)]
    """
    chosen = chosen or {}
    readings = {tag: curve for tag, curve in log.items() if tag not in chosen}
    wanted: dict[str, str | None] = {
        LOSS: loss or pick_train_loss(log),
        VAL_LOSS: val_loss or pick_validation_loss(log),
        GRADIENT: next((name for name in _GRADIENT_NAMES if name in log), None),
        **chosen,
    }
    # Who names a tag is told that the log's own went before it.
    mapped = {own: own for own, named in ((LOSS, loss), (VAL_LOSS, val_loss)) if named and own in readings}
    for reading, tag in wanted.items():
        if tag is not None and tag in log and reading not in readings:
            readings[reading], mapped[reading] = log[tag], tag
    rates = [name for name in log if _is_rate(name)]
    if rates and LR not in readings and LR not in chosen:
        readings[LR], mapped[LR] = _largest([log[name] for name in rates]), ", ".join(rates)
    if LR in readings and LR_LOW not in readings and LR_LOW not in chosen:
        readings[LR_LOW], mapped[LR_LOW] = _lowest_to_come(readings[LR]), mapped.get(LR, LR)
    return readings, mapped


def check_tag(argument: str, tag: str, known: Collection[str]) -> None:
    """Raise a ValueError that lists the known tags if one is not among them.

    Example:
        >>> check_tag("loss", "trainloss", ["train_loss", "val_loss"])
        Traceback (most recent call last):
        ValueError: loss='trainloss' is in no run; did you mean 'train_loss'? There are: train_loss, val_loss.
    """
    if tag in known:
        return
    close = difflib.get_close_matches(tag, known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    there_are = listed(list(known), most=30) or "no scalars at all"
    raise ValueError(f"{argument}={tag!r} is in no run{hint} There are: {there_are}.")


def _is_rate(name: str) -> bool:
    return (name.startswith(("lr-", "lr/")) or name in ("lr", "learning_rate")) and not name.endswith(_NO_RATE)


def _largest(curves: Sequence[Curve]) -> Curve:
    by_step: dict[int, float] = {}
    for curve in curves:
        for step, value in curve:
            by_step[step] = max(by_step.get(step, -math.inf), value)
    return sorted(by_step.items())


def _lowest_to_come(curve: Curve) -> Curve:
    lowest = math.inf
    result: list[tuple[int, float]] = []
    for step, value in reversed(curve):
        result.append((step, lowest if result else value))  # nothing follows the last one
        lowest = min(lowest, value)
    return result[::-1]
