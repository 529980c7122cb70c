"""Steps that go far beyond the radius of the softmax loss, while the loss does not fall."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from dynwatch.rules import tags
from dynwatch.rules.base import Action, Recent, Rule, Verdict, check_action, check_count, check_number
from dynwatch.trends import Row, RunMeans, mann_kendall


class LargeSteps(Rule):
    r"""The optimizer's steps are far longer than the step radius, reading after reading, and the loss does not fall.

    It looks at `step_radius/r`, the length of a step over the radius ρ of the Taylor series of the softmax loss along
    it (arXiv 2603.13552; bound B1 of `dynwatch.step_radius`). Being above 1 is a risk and no fault: a longer step can
    still be a good one. So it fires at a reading only when

    * the last `patience` readings, each at most twice as long after the one before as usual, lay above `margin`;
    * the losses do not fall over the later half of the readings that have lain above it in a row, or over the last
      `patience` of them or over 200 losses if that is longer: their means in up to 64 blocks have a Mann-Kendall z of
      -0.5 or more. It waits for 200 losses; where none at all has come since the first of these readings, they alone
      decide.

    A row whose losses fall is tested again only when it is `patience` times a power of two long: of forty looks at a
    slow fall one would find it hidden by its noise. One whose losses do not is tested at every reading from then on.
    So the stretch grows with the row, until it shows also a fall that is slow in its noise; and z must be near 0 or
    above, because a fall that a short stretch cannot prove is none of its business. By default it warns.
    `action="stop"` ends runs that might have got through: r tells nothing of where a step leads.

    Args:
        patience: Readings above the margin in a row before it fires, 2 or more.
        margin: The r above which a reading counts, 1 or more. The default lies above all but 2 of 3428
            readings in 78 healthy runs of small networks (99 % of them below 1.2); larger networks may hold more.
        action: What is done about its verdict.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> rule = LargeSteps()
        >>> for step in range(300):
        ...     readings = {"stop/loss": 2.3 + 0.1 * (step % 3)}
        ...     if step % 50 == 49:
        ...         readings["step_radius/r"] = 12.0
        ...     verdict = rule.update(step, readings, {})
        ...     if verdict:
        ...         break
        >>> verdict.step
        249
        >>> verdict.advice.split(";")[0]
        'Divide the learning rate by 3 at least, which brings such a step below 4, or by 12 for steps of one radius'
    """

    name = "large_steps"
    reads = (tags.STEP, tags.LOSS)
    needs = (tags.STEP,)
    kept = ("_row", "_losses", "_steps", "_due")
    _FALLS, _BLOCKS, _LEAST = -0.5, 64, 200

    def __init__(self, patience: int = 3, margin: float = 4.0, action: Action = "warn") -> None:
        self.patience = check_count("patience", patience, least=2)
        self.margin = check_number("margin", margin, least=1, remedy="a step within the radius is no risk")
        self.action = check_action(action)
        self._row = Row()
        self._losses = RunMeans(self._BLOCKS)  # losses since the row's first reading
        self._steps = Recent(tags.STEP)
        self._due = self.patience  # length of the row at which the losses are tested next

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        loss = readings.get(tags.LOSS, math.nan)
        if self._row.length and math.isfinite(loss):
            self._losses.add(loss)
        r = readings.get(tags.STEP, math.nan)
        if not math.isfinite(r):
            return None
        self._steps.add(step, r)
        if self._row.add(step, r > self.margin) <= 1:
            self._losses, self._due = RunMeans(self._BLOCKS), self.patience
        if self._row.length < self._due:
            return None
        words = self._loss_words()
        if words is None:
            return None
        usual = median([value for _, value in list(self._steps)[-self.patience :]])
        return self.verdict(
            step,
            f"The step is {r:.3g} times as long as the radius within which the softmax loss can be trusted to its "
            f"Taylor series at step {step}, above {self.margin:g} at {self._row.length} readings in a row, {words}.",
            f"Divide the learning rate by {usual / self.margin:.2g} at least, which brings such a step below "
            f"{self.margin:g}, or by {usual:.2g} for steps of one radius; or warm it up for longer, clip the gradient "
            "(Trainer(gradient_clip_val=1.0); with Adam it shortens few steps), or let StepRadiusController cap the "
            "steps.",
            self._steps,
        )

    def _loss_words(self) -> str | None:
        """That the losses do not fall, or that there are none; None if they fall or are too few to tell."""
        if not len(self._losses):
            return "and there was no loss to tell whether it falls all the same"
        blocks, length = self._losses.blocks, self._losses.block_length
        share = max(0.5, (self.patience - 1) / (self._row.length - 1))
        late = blocks[-max(round(share * len(blocks)), math.ceil(self._LEAST / length)) :]
        if len(late) * length < self._LEAST:
            return None
        if mann_kendall(late) < self._FALLS:
            # Not at every reading: among many looks at a slow fall one would find it hidden by noise.
            while self._due <= self._row.length:
                self._due *= 2
            return None
        third = len(late) // 3
        first, last = median(late[:third]), median(late[-third:])
        return f"and the last {len(late) * length} losses do not fall: they went from {first:.4g} to {last:.4g}"
