"""A loss that has stopped falling, unless a learning rate decay is about to change that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import median

from dynwatch.rules import tags
from dynwatch.rules.base import Action, Recent, Rule, Verdict, check_action, check_count, check_number, newest
from dynwatch.trends import MAD_TO_SIGMA, RunMeans, mann_kendall


class Plateau(Rule):
    r"""The loss fell, and then stayed where it was for half of the run so far.

    The losses so far are averaged in 32 to 64 blocks. Over the later half of them the loss must have no falling
    trend (Mann-Kendall z above −1.64, one sided 5 %) and have gained less than `tolerance` of all that was gained
    before; and noise must not hide a gain of three and a half times as much (one standard error). It is left alone

    * while the learning rate is above a tenth of its peak and its schedule will bring it to less than half:
      such a plateau is oscillation across a valley, which a decay ends (arXiv 2410.05192);
    * until half of the run so far lies after the last halving of the learning rate;
    * when a positive loss is below `converged` times its start: that run is done rather than stuck;
    * before a quarter of the budget is spent, when less than a tenth is left to save, and before anything was
      learnt (`NoLearning`).

    Args:
        min_readings: Losses that must have been seen.
        tolerance: Share of the gain so far that the later half must add.
        converged: Share of the start below which a plateau is an end.
        action: What is done about its verdict.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> rule = Plateau()
        >>> curve = lambda step: max(1.0, 2.3 - step / 50) + 0.01 * (step % 3)
        >>> fired = [step for step in range(400) if rule.update(step, {"stop/loss": curve(step)}, {})]
        >>> bool(fired)
        True
    """

    name = "plateau"
    reads = (tags.LOSS, tags.LR, tags.LR_LOW, tags.PROGRESS)
    kept = ("_means", "_progress", "_lr", "_lr_low", "_lr_peak", "_lr_then", "_decayed_after", "_recent")
    _NO_TREND, _CLEAR, _UNSURE, _HIGH, _DECAY, _HALVED = -1.64, 5.0, 3.5, 0.1, 0.5, 0.5
    _EARLY, _LATE = 0.25, 0.9

    def __init__(
        self,
        min_readings: int = 200,
        tolerance: float = 0.01,
        converged: float = 0.1,
        action: Action = "warn",
    ) -> None:
        self.min_readings = check_count("min_readings", min_readings, least=32)
        self.tolerance = check_number("tolerance", tolerance, above=0, below=1)
        self.converged = check_number("converged", converged, least=0, below=1)
        self.action = check_action(action)
        self._means = RunMeans(64)
        self._progress = 0.0
        self._lr = self._lr_low = math.nan
        self._lr_peak = 0.0
        self._lr_then, self._decayed_after = 0.0, 0  # the highest rate since its last halving; losses seen before that
        self._recent = Recent(tags.LOSS)

    def update(self, step: int, readings: Mapping[str, float], notes: Mapping[str, str]) -> Verdict | None:
        self._progress = newest(readings, tags.PROGRESS, self._progress)
        self._lr = newest(readings, tags.LR, self._lr)
        self._lr_low = newest(readings, tags.LR_LOW, self._lr_low)
        if self._lr > self._lr_peak:
            self._lr_peak = self._lr
        if self._lr < self._HALVED * self._lr_then:
            self._lr_then, self._decayed_after = self._lr, len(self._means)
        elif self._lr > self._lr_then:
            self._lr_then = self._lr
        loss = readings.get(tags.LOSS)
        if loss is None:
            return None
        self._recent.add(step, loss)
        if not math.isfinite(loss) or not self._means.add(loss):
            return None
        if len(self._means) < self.min_readings or self._progress > self._LATE or self._decay_comes():
            return None
        if 0 < self._progress < self._EARLY:
            return None
        if self._decayed_after > len(self._means) // 2:
            return None  # the later half must be all after the last decay, to show what it has brought
        blocks = self._means.blocks
        early, late = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
        start, before = median(blocks[:2]), median(early[-len(early) // 3 :])
        third = len(late) // 3
        now = median(late[-third:])
        gain = start - min(before, now)
        level = median(late)
        scatter = MAD_TO_SIGMA * median(abs(mean - level) for mean in late)
        if mann_kendall(early) > self._NO_TREND or not gain > self._CLEAR * scatter:
            return None  # nothing was learnt before, so this is no plateau after a fall
        if start > 0 and now < self.converged * start:
            return None
        z = mann_kendall(late)
        fall, error = median(late[:third]) - now, scatter * math.sqrt(math.pi / third)  # of a difference of medians
        if (
            z <= self._NO_TREND
            or fall > self.tolerance * gain
            or max(fall, 0.0) + error > self._UNSURE * self.tolerance * gain
        ):
            return None
        rate = f", at a learning rate of {self._lr:.3g}" if math.isfinite(self._lr) else ""
        return self.verdict(
            step,
            f"The loss has not fallen for {len(late) * self._means.block_length} steps, up to step {step}{rate}: it "
            f"came down from {start:.4g} to {before:.4g} and is {now:.4g} (Mann-Kendall z = {z:.1f}).",
            "Decay the learning rate now and see whether the loss falls (ReduceLROnPlateau, or a cosine to zero); if "
            "it does not, this is what the model and the data give: end the run and save the rest of the budget.",
            self._recent,
        )

    def _decay_comes(self) -> bool:
        return self._lr > self._HIGH * self._lr_peak and self._lr_low < self._DECAY * self._lr
