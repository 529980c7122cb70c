r"""How evenly the experts of a mixture are used, from how often each was chosen.

c_e is the load of expert e and E the number of experts. Loads may have leading dimensions (layers), may be counts or
means of counts over processes, and are computed with on their device without waiting for it. A load of zero (no token
counted) makes every measure NaN.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dynwatch.constants import widest_float
from dynwatch.rules.base import check_count


def max_vio(load: Tensor) -> Tensor:
    """How far the busiest expert is above the mean load, (max c - c̄) / c̄ (arXiv 2408.15664).

    Args:
        load: [..., E] counts, or any multiple of them.

    Returns:
        [...]; 0 when balanced, E - 1 when one expert takes all.

    Example:
        >>> max_vio(torch.tensor([4, 3, 1, 0]))
        tensor(1., dtype=torch.float64)
    """
    shares = _shares(load)
    return shares.amax(-1) * load.shape[-1] - 1


def load_cv(load: Tensor) -> Tensor:
    """Coefficient of variation of the load, (population) standard deviation over mean (arXiv 1701.06538).

    Args:
        load: [..., E] counts, or any multiple of them.

    Returns:
        [...]; 0 when balanced, √(E - 1) when one expert takes all.

    Example:
        >>> load_cv(torch.tensor([4, 3, 1, 0]))
        tensor(0.7906, dtype=torch.float64)
    """
    return (_shares(load) * load.shape[-1]).std(-1, correction=0)


def load_entropy(load: Tensor) -> Tensor:
    r"""Entropy of the load, :math:`-\sum_e f_e \log f_e` with :math:`f_e = c_e / \sum c`.

    Args:
        load: [..., E] counts, or any multiple of them.

    Returns:
        [...] in nats, from 0 to log E (`normalized_entropy`).

    Example:
        >>> load_entropy(torch.tensor([4, 3, 1, 0]))
        tensor(0.9743, dtype=torch.float64)
    """
    parts: Tensor = torch.special.entr(_shares(load))
    return parts.sum(-1)


def normalized_entropy(entropy: Tensor, n_experts: int) -> Tensor:
    """An entropy over experts, of the load or of the router, as a share of the most there can be: log E.

    Args:
        entropy: [...] in nats.
        n_experts: E.

    Returns:
        [...] from 0 to 1; 1 for a single expert, which is as balanced as one can be. NaN stays.

    Raises:
        ValueError: If `n_experts` is no whole number of 1 or more.

    Example:
        >>> normalized_entropy(load_entropy(torch.tensor([5, 5, 0, 0])), 4)
        tensor(0.5000, dtype=torch.float64)
    """
    check_count("n_experts", n_experts)
    return entropy / math.log(n_experts) if n_experts > 1 else entropy + 1


def effective_experts(load: Tensor) -> Tensor:
    """How many equally loaded experts would have this load's entropy: its exponential.

    Args:
        load: [..., E] counts, or any multiple of them.

    Returns:
        [...] from 1 (one expert takes all) to E (balanced).

    Example:
        >>> effective_experts(torch.tensor([5, 5, 0, 0]))
        tensor(2., dtype=torch.float64)
    """
    return load_entropy(load).exp()


def aux_loss(load: Tensor, probabilities: Tensor) -> Tensor:
    r"""The load balancing loss :math:`E \sum_e f_e P_e` (arXiv 2101.03961), with :math:`f_e = c_e / \sum c`.

    Balanced is 1 whatever k is. Some libraries leave out the 1/k in f and get k for balanced. With empty slots f still
    sums to one here, and is not relative to T k.

    Args:
        load: [..., E] counts, or any multiple of them.
        probabilities: [..., E] mean probabilities P of the same tokens.

    Returns:
        [...].

    Example:
        >>> aux_loss(torch.tensor([9, 1]), torch.tensor([0.9, 0.1]))
        tensor(1.6400, dtype=torch.float64)
    """
    shares = _shares(load)
    return load.shape[-1] * (shares * probabilities.to(shares.dtype)).sum(-1)


def coactivation(counts: Tensor) -> Tensor:
    """The share of an expert's tokens that chose another one too, P(j | i) = N_ij / N_i.

    Args:
        counts: [E, E] from `coactivation_counts`.

    Returns:
        [E, E]: row i given i; its diagonal is 1, the row of an expert without tokens NaN.

    Example:
        >>> coactivation(torch.tensor([[4, 3], [3, 3]]))
        tensor([[1.0000, 0.7500],
                [1.0000, 1.0000]], dtype=torch.float64)
    """
    wide = counts.detach().to(widest_float(counts.device))
    return wide / wide.diagonal()[:, None]


class DeadExperts:
    """Which experts no token has chosen for a window of looks.

    A look without any token (or with a load that is NaN) says nothing and is not counted. A load of another shape
    starts afresh.

    Args:
        window: Looks without a token after which an expert is dead.

    Raises:
        ValueError: If the window is no whole number of 1 or more.

    Example:
        >>> dead = DeadExperts(window=2)
        >>> dead.update(torch.tensor([3, 0])), dead.update(torch.tensor([3, 0]))
        (tensor([False, False]), tensor([False,  True]))
    """

    def __init__(self, window: int) -> None:
        self.window = check_count("window", window)
        self._silent: Tensor | None = None

    def update(self, load: Tensor) -> Tensor:
        """Take in the load of one look.

        Args:
            load: [..., E] counts, summed over processes.

        Returns:
            [..., E] bool, True for a dead expert; on the load's device.
        """
        if self._silent is None or self._silent.shape != load.shape:
            self._silent = torch.zeros_like(load, dtype=torch.int64)
        silent = self._silent.to(load.device)
        looked = load.sum(-1, keepdim=True) > 0
        self._silent = torch.where(load > 0, 0, silent + looked)
        return self._silent >= self.window

    def state_dict(self) -> dict[str, Any]:
        return {"silent": None if self._silent is None else self._silent.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        silent = state["silent"]
        self._silent = None if silent is None else torch.tensor(silent, dtype=torch.int64)


def _shares(load: Tensor) -> Tensor:
    wide = load.detach().to(widest_float(load.device))
    return wide / wide.sum(-1, keepdim=True)
