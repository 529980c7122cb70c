r"""Pathways of samples through a mixture of experts, and how much they differ (arXiv 2506.21551).

A sample (one sequence) has for each MoE layer a gate vector g: the mean of its tokens' router probabilities. Its
pathway is, layer by layer, the experts that hold most of g. The paper finds that pathways grow apart while a model
memorises and alike as it generalises: seen on one family of models, and no ground to stop a run.

The paper has no public code. Chosen here where it is silent: gates are means over valid tokens of the full softmax (or
normalised sigmoid scores); ties go to the expert of the lower number; "exceeds the threshold" is a strict >, and a tie
with it is left to rounding; distances are of ids by default, not of text.

A sample of which a gate vector is not known (no valid token, NaN, or no expert above zero) has no pathway: it is None
and left out of distances, which say how many samples and pairs are in them.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dynwatch.constants import widest_float
from dynwatch.routing import Ratio
from dynwatch.rules.base import check_count, check_number

Unit = Literal["expert", "char"]

# For each layer the ids of the kept experts, in descending order of weight.
Pathway = tuple[tuple[int, ...], ...]

# Below this largest cosine the paper's complexity is a quotient of noise.
_LEAST_COSINE = 1e-3


def sample_gates(probabilities: Tensor, samples: Tensor, n_samples: int, valid: Tensor | None = None) -> Ratio:
    """The gate vectors of samples at one layer: the mean of their valid tokens' router probabilities.

    Args:
        probabilities: [N, E], rows that sum to one (`dynwatch.routing.router_probabilities`).
        samples: [N] integers, the sample of each token; a token of a sample outside 0 … n_samples - 1 counts nowhere.
        n_samples: S.
        valid: [N] bool, False for padding; None if every token counts.

    Returns:
        total [S, E] and count [S, 1] of tokens, so that parts can be added. The mean is NaN for a sample without a
        valid token, and where a valid token is NaN.

    Raises:
        ValueError: If shapes do not fit, or `n_samples` is no whole number of 1 or more.

    Example:
        >>> probabilities = torch.tensor([[0.8, 0.2], [0.4, 0.6], [0.0, 1.0]])
        >>> sample_gates(probabilities, torch.tensor([0, 0, 1]), n_samples=2).value
        tensor([[0.6000, 0.4000],
                [0.0000, 1.0000]], dtype=torch.float64)
    """
    check_count("n_samples", n_samples)
    _check_matrix("probabilities", probabilities, "[N, E]")
    for argument, tensor in (("samples", samples), ("valid", valid)):
        if tensor is not None and tensor.shape != probabilities.shape[:1]:
            raise ValueError(
                f"{argument} of shape {list(tensor.shape)} must be [{probabilities.shape[0]}], one entry for each row "
                "of probabilities; flatten batch and sequence into N."
            )
    counts = (samples >= 0) & (samples < n_samples)
    if valid is not None:
        counts = counts & valid
    # What does not count goes to one more sample, which is cut off.
    slots = torch.where(counts, samples.long(), n_samples)
    wide = probabilities.detach().to(widest_float(probabilities.device))
    total = wide.new_zeros(n_samples + 1, wide.shape[1]).index_add_(0, slots, wide)
    count = torch.zeros_like(total[:, 0], dtype=torch.int64).index_add_(0, slots, torch.ones_like(slots))
    return Ratio(total[:-1], count[:-1, None])


def pathways(gates: Sequence[Tensor], threshold: float = 0.7) -> list[Pathway | None]:
    """The pathway of each sample: by layer the experts of highest gate until their sum exceeds a threshold.

    Args:
        gates: For each of L layers [S, E], the mean of `sample_gates`; E may differ between layers.
        threshold: Share of the gate to keep, from 0 (the first expert alone) to below 1. Experts of weight zero are
            never kept, so if the weights do not reach it, all that are above zero are.

    Returns:
        For each sample L tuples of expert ids, or None if its gates at some layer are not finite or none is above zero.
        One transfer to the host for all layers.

    Raises:
        ValueError: If there is no layer, the layers' shapes do not fit, or the threshold is out of bounds.

    Example:
        >>> gates = [torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]), torch.tensor([[0.2, 0.4, 0.4], [0.0, 1.0, 0.0]])]
        >>> pathways(gates)
        [((0, 1), (1, 2)), ((2,), (1,))]
    """
    check_number("threshold", threshold, least=0, below=1)
    _check_layers("gates", gates)
    columns = []
    for layer in gates:
        wide = layer.detach().to(widest_float(layer.device))
        weights, order = wide.sort(dim=-1, descending=True, stable=True)
        # An expert is kept if those before it do not exceed the threshold.
        before = torch.cat([torch.zeros_like(weights[:, :1]), weights.cumsum(-1)[:, :-1]], dim=1)
        kept = ((before <= threshold) & (weights > 0)).sum(-1, keepdim=True)
        columns += [torch.where(wide.isfinite().all(-1, keepdim=True), kept, 0), order]
    rows = torch.cat([column.to(columns[0].device) for column in columns], dim=1).tolist()
    found: list[Pathway | None] = []
    for row in rows:
        path, start = [], 0
        for layer in gates:
            path.append(tuple(row[start + 1 : start + 1 + row[start]]))
            start += 1 + layer.shape[1]
        found.append(tuple(path) if all(path) else None)
    return found


def pathway_text(pathway: Pathway) -> str:
    """A pathway as the paper writes it: commas between experts, hyphens between layers.

    Args:
        pathway: Expert ids by layer.

    Returns:
        The text of which `unit="char"` takes distances.

    Example:
        >>> pathway_text(((0, 1), (1, 2), (0, 2)))
        '0,1-1,2-0,2'
    """
    return "-".join(",".join(map(str, experts)) for experts in pathway)


@dataclass(frozen=True)
class PathwayDistance:
    """Edit distances of pathways, averaged over pairs of samples. Without pairs they are NaN.

    Attributes:
        distance: Levenshtein distance of whole pathways.
        normalized: The same, each divided by the longer pathway of the pair: 0 to 1.
        layerwise: The distance of each layer's part on its own; they sum to `distance` or more.
        length: Mean length of the pathways, in the units of the distance.
        n_pairs: Pairs of samples in the means; means of groups combine with these as weights.
        n_samples: Samples that have a pathway.

    Example:
        >>> pathway_distance([((0, 1), (2,)), ((1,), (2,))])
        PathwayDistance(distance=1.0, normalized=0.3333333333333333, layerwise=(1.0, 0.0), length=2.5, n_pairs=1,
                        n_samples=2)
    """

    distance: float
    normalized: float
    layerwise: tuple[float, ...]
    length: float
    n_pairs: int
    n_samples: int


def pathway_distance(
    pathways: Sequence[Pathway | None], groups: Sequence[Hashable] | None = None, unit: Unit = "expert"
) -> PathwayDistance:
    """The mean Levenshtein distance over all pairs of samples, or over the pairs within groups.

    Args:
        pathways: Of S samples, from `pathways`; None is left out.
        groups: [S] keys such as the domain; only pairs of the same key count. None for one group.
        unit: "expert" compares experts, told apart by layer (as ids ℓ K + e); "char" compares the characters of
            `pathway_text`, the paper's likely form, which depends on how many digits an expert's number has.

    Returns:
        The means over pairs, and how many there are.

    Raises:
        ValueError: If pathways differ in their number of layers, `groups` has another length, or the unit is unknown.

    Example:
        >>> found = pathway_distance([((0, 1), (1, 2), (0, 2)), ((1, 0), (1,), (3, 2))])
        >>> found.distance, found.layerwise
        (4.0, (2.0, 1.0, 1.0))
    """
    if unit not in get_args(Unit):
        raise ValueError(f"unit={unit!r} must be 'expert' (expert ids) or 'char' (characters of their text).")
    if groups is not None and len(groups) != len(pathways):
        raise ValueError(f"groups has {len(groups)} keys and must have {len(pathways)}, one for each pathway.")
    members: dict[Hashable, list[Pathway]] = {}
    for i, pathway in enumerate(pathways):
        if pathway is not None:
            members.setdefault(None if groups is None else groups[i], []).append(pathway)
    told = [pathway for group in members.values() for pathway in group]
    depths = sorted({len(pathway) for pathway in told})
    if len(depths) > 1:
        raise ValueError(f"pathways of {depths} layers must all have the same number: compare those of one model.")
    n_layers = depths[0] if depths else 0

    n_pairs = sum(len(group) * (len(group) - 1) // 2 for group in members.values())
    sums = np.zeros(2 + n_layers)
    for group in members.values():
        first, second = np.triu_indices(len(group), 1)
        whole = [_symbols(pathway, unit) for pathway in group]
        distances = _distances(whole)[first, second]
        lengths = np.array([len(symbols) for symbols in whole], dtype=np.float64)
        longer = np.maximum(lengths[first], lengths[second])
        sums[0] += distances.sum()
        sums[1] += (distances / np.maximum(longer, 1)).sum()
        for layer in range(n_layers):
            parts = [_symbols(pathway[layer : layer + 1], unit) for pathway in group]
            sums[2 + layer] += _distances(parts)[first, second].sum()
    means = (sums / n_pairs).tolist() if n_pairs else [math.nan] * len(sums)
    length = sum(len(_symbols(pathway, unit)) for pathway in told) / len(told) if told else math.nan
    return PathwayDistance(means[0], means[1], tuple(means[2:]), length, n_pairs, len(told))


@dataclass(frozen=True, eq=False)
class Consistency:
    """How smoothly samples pass from layer to layer, from `pathway_consistency`.

    Attributes:
        cosines: [S, L - 1] between the expert embeddings of neighbouring layers; NaN where one is zero or not finite.
        mean: [S], the mean of the cosines: 1 when all layers agree. The main figure. NaN if a cosine is, or L < 2.
        complexity: [S], the paper's 1 - mean / (max + 1e-8). It takes out scale (cosines that are all .1 and all .9
            both give 0), so it is no measure on its own; NaN for L < 3, where it is always 0, and for max ≤ 1e-3.

    Example:
        >>> ones = torch.ones(2)
        >>> Consistency(cosines=torch.ones(2, 3), mean=ones, complexity=1 - ones).mean
        tensor([1., 1.])
    """

    cosines: Tensor
    mean: Tensor
    complexity: Tensor


def pathway_consistency(gates: Sequence[Tensor], router_weights: Sequence[Tensor]) -> Consistency:
    r"""Cosines between neighbouring layers of :math:`e_\ell = \sum_k g_\ell[k] W_\ell[k]`, and the paper's complexity.

    Args:
        gates: For each of L layers [S, E], the mean of `sample_gates`.
        router_weights: For each layer [E, d], the router's weight; d is the same in all.

    Returns:
        For each sample its cosines, their mean and its complexity.

    Raises:
        ValueError: If there is no layer, or shapes do not fit.

    Example:
        >>> gates = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.8]]), torch.tensor([[0.0, 1.0]])]
        >>> found = pathway_consistency(gates, [torch.eye(2)] * 3)
        >>> found.cosines, found.mean
        (tensor([[0.6000, 0.8000]], dtype=torch.float64), tensor([0.7000], dtype=torch.float64))
    """
    _check_layers("gates", gates)
    if len(router_weights) != len(gates):
        raise ValueError(f"router_weights has {len(router_weights)} layers and must have those of gates, {len(gates)}.")
    embeddings = []
    for layer, (gate, weight) in enumerate(zip(gates, router_weights, strict=True)):
        _check_matrix(f"router_weights[{layer}]", weight, "[E, d]")
        shape = (gate.shape[1], router_weights[0].shape[-1])
        if weight.shape != shape:
            raise ValueError(
                f"router_weights[{layer}] of shape {list(weight.shape)} must be {list(shape)}: an expert a row, and as "
                "many columns as the first layer's; give layers of another width on their own."
            )
        wide = widest_float(gate.device)
        embedding = gate.detach().to(wide) @ weight.detach().to(gate.device, wide)
        embeddings.append(embedding / embedding.norm(dim=-1, keepdim=True))
    stacked = torch.stack([embedding.to(embeddings[0].device) for embedding in embeddings])
    cosines = (stacked[1:] * stacked[:-1]).sum(-1).t()
    mean = cosines.mean(-1)
    if len(gates) < 3:
        return Consistency(cosines, mean, torch.full_like(mean, math.nan))
    most = cosines.amax(-1)
    return Consistency(cosines, mean, torch.where(most > _LEAST_COSINE, 1 - mean / (most + 1e-8), math.nan))


def effective_dimension(gates: Tensor, ridge: float = 0.1) -> Tensor:
    r"""How many directions the samples' gates at a layer fill, :math:`\operatorname{tr} H (H + \lambda I)^{-1}`.

    H = G Gᵀ is the samples' Gram matrix; computed from singular values of G.

    Args:
        gates: [S, E] of one layer. A sample that is not finite is left out.
        ridge: λ > 0; the paper gives none, 0.1 is our choice. Compare only figures of one λ and number of samples.

    Returns:
        Scalar from 0 to min(S, E).

    Raises:
        ValueError: If the gates are no matrix or λ is not a finite positive number.

    Example:
        >>> effective_dimension(torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.3, 0.5, 0.15, 0.05]]))
        tensor(1.1591, dtype=torch.float64)
    """
    _check_matrix("gates", gates, "[S, E]")
    check_number("ridge", ridge, above=0, below=math.inf)
    wide = gates.detach().to(widest_float(gates.device))
    # A row of zeros adds nothing.
    wide = torch.where(wide.isfinite().all(-1, keepdim=True), wide, 0)
    squares: Tensor = torch.linalg.svdvals(wide).square()
    return (squares / (squares + ridge)).sum()


def _symbols(pathway: Pathway, unit: Unit) -> Sequence[Hashable]:
    if unit == "char":
        return pathway_text(pathway)
    return [layer << 32 | expert for layer, experts in enumerate(pathway) for expert in experts]


def _distances(sequences: Sequence[Sequence[Hashable]]) -> np.ndarray[Any, Any]:
    """[S, S] Levenshtein distances of all pairs."""
    # Imported here so that the engine loads with torch and numpy alone.
    from rapidfuzz import process
    from rapidfuzz.distance import Levenshtein

    # Of its own accord it answers in unsigned integers.
    return process.cdist(sequences, sequences, scorer=Levenshtein.distance, dtype=np.float64)


def _check_matrix(argument: str, tensor: Tensor, shape: str) -> None:
    if tensor.dim() != 2 or not tensor.is_floating_point():
        raise ValueError(f"{argument} of shape {list(tensor.shape)} and {tensor.dtype} must be {shape} floats.")


def _check_layers(argument: str, layers: Sequence[Tensor]) -> None:
    if not layers:
        raise ValueError(f"{argument} is empty and must hold a matrix for each layer.")
    for i, layer in enumerate(layers):
        _check_matrix(f"{argument}[{i}]", layer, "[S, E]")
        if layer.shape[0] != layers[0].shape[0]:
            raise ValueError(
                f"{argument}[{i}] has {layer.shape[0]} samples and {argument}[0] has {layers[0].shape[0]}; "
                "every layer must have the same samples."
            )
