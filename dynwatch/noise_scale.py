"""Gradient noise scale from gradients of two batch sizes (McCandlish et al., arXiv 1812.06162)."""

from __future__ import annotations

import math
from typing import Any

# Weight of the newest pair in the running means of signal and noise; about the last 20 pairs count.
_NEWEST = 0.05


def signal_and_noise(
    small_square: float, big_square: float, inverse_small: float, inverse_big: float
) -> tuple[float, float]:
    r"""Unbiased estimates of the true gradient's square and of the noise of one sample.

    A gradient averaged over B samples has :math:`E|g_B|^2 = |G|^2 + \operatorname{tr}\Sigma / B`.
    Two batch sizes give two equations (the paper's appendix A.1). Inverse sizes are asked for because
    for micro-batches of unequal sizes :math:`b_i` the mean gradient has :math:`1/B = k^{-2}\sum 1/b_i`.

    Args:
        small_square: Squared 2-norm of the gradient of the small batch.
        big_square: Squared 2-norm of the gradient of the big batch.
        inverse_small: 1 / samples in the small batch.
        inverse_big: 1 / samples in the big batch; less than `inverse_small`.

    Returns:
        (|G|², tr Σ). Either can be negative by chance: average them before dividing.

    Raises:
        ValueError: If the big batch is not bigger.

    Example:
        >>> signal_and_noise(small_square=5.0, big_square=2.0, inverse_small=1.0, inverse_big=0.25)
        (1.0, 4.0)
    """
    if not inverse_big < inverse_small:
        raise ValueError(
            f"inverse_big={inverse_big} must be less than inverse_small={inverse_small}: "
            "the noise scale needs gradients of two different batch sizes."
        )
    noise = (small_square - big_square) / (inverse_small - inverse_big)
    return big_square - noise * inverse_big, noise


class NoiseScale:
    """Running estimate of the simple noise scale tr Σ / |G|², in samples.

    It is about the batch size beyond which a bigger batch stops paying off. The two estimates are
    averaged separately, because the mean of a quotient of noisy numbers is biased.

    Example:
        >>> scale = NoiseScale()
        >>> scale.update(small_square=5.0, big_square=2.0, inverse_small=1.0, inverse_big=0.25)
        4.0
    """

    def __init__(self) -> None:
        self._signal = 0.0
        self._noise = 0.0

    def update(self, small_square: float, big_square: float, inverse_small: float, inverse_big: float) -> float:
        """Take in one pair of gradients (as `signal_and_noise`) and return the noise scale.

        Pairs that tell nothing are left out: squares that are not finite (a skipped step of a gradient
        scaler), sizes that are not known (NaN) or of which the big one is not bigger (a short last
        micro-batch gives its few samples so much weight that the mean is as noisy as a full one).

        Returns:
            The noise scale in samples; NaN while the averaged signal or noise is not positive, which
            means that the noise is too large or too small to be told from these batch sizes.
        """
        if inverse_big < inverse_small:
            signal, noise = signal_and_noise(small_square, big_square, inverse_small, inverse_big)
            if math.isfinite(signal) and math.isfinite(noise):
                # Both start from zero alike, so the start-up bias cancels in their quotient.
                self._signal += _NEWEST * (signal - self._signal)
                self._noise += _NEWEST * (noise - self._noise)
        if self._signal <= 0 or self._noise < 0:
            return math.nan
        return self._noise / self._signal

    def state_dict(self) -> dict[str, Any]:
        return {"signal": self._signal, "noise": self._noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._signal = state["signal"]
        self._noise = state["noise"]
