"""The forward-only learner of arXiv 2504.03214: every layer descends its own entropy, and nothing is backpropagated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dynwatch._logit_rows import check_floats
from dynwatch.rules.base import check_number
from dynwatch.ska import entropy_gradient


@dataclass(frozen=True)
class ForwardOnlyPass:
    """What one pass of the learner gives; the tensors that were passed are left as they are.

    Attributes:
        knowledge: For each layer Z of this pass, [N, n_out]; to be passed as `before` to the next.
        weights: For each layer [n_out, n_in] for the next pass.
        biases: For each layer [n_out] for the next pass.

    Example:
        >>> found = forward_only_pass(torch.ones(1, 1), [torch.ones(1, 1)], [torch.zeros(1)], None, lr=0.1)
        >>> found.knowledge
        [tensor([[1.]])]
    """

    knowledge: list[Tensor]
    weights: list[Tensor]
    biases: list[Tensor]


def forward_only_pass(
    inputs: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    before: Sequence[Tensor] | None,
    lr: float,
) -> ForwardOnlyPass:
    r"""One pass of a sigmoid network over its samples, then an update of all layers from what each has stored.

    .. math:: W \leftarrow W - \eta \, G^\top A / N, \qquad b \leftarrow b - \eta \, \overline{G}

    with G of `dynwatch.ska.entropy_gradient` and A the inputs for the first layer and else the decisions of the layer
    below in the pass before, as in the experiment of arXiv 2504.03214. No labels enter: the layers make their decisions
    surer, whatever these say. The first pass has nothing to compare with and changes nothing.

    Args:
        inputs: [N ≥ 1, n_in] all samples, in the same order in every pass.
        weights: For each layer [n_out, n_in], as in `torch.nn.Linear`.
        biases: For each layer [n_out].
        before: `knowledge` of the pass before, or None for the first pass.
        lr: η > 0.

    Returns:
        The knowledge of this pass and the weights for the next.

    Raises:
        TypeError: If the inputs are not real floats.
        ValueError: If layers do not fit each other, there is none or no sample, or lr is not positive.

    Example:
        >>> x, weights, biases, before = torch.tensor([[2.0]]), [torch.tensor([[0.5]])], [torch.zeros(1)], None
        >>> for _ in range(3):
        ...     found = forward_only_pass(x, weights, biases, before, lr=0.1)
        ...     weights, biases, before = found.weights, found.biases, found.knowledge
        >>> weights, biases
        ([tensor([[0.6249]])], [tensor([0.0625])])
    """
    check_number("lr", lr, above=0.0, below=math.inf)
    _check_layers(inputs, weights, biases, before)
    with torch.no_grad():
        knowledge: list[Tensor] = []
        signal = inputs
        for weight, bias in zip(weights, biases, strict=True):
            knowledge.append(signal @ weight.T + bias)
            signal = torch.sigmoid(knowledge[-1])
        if before is None:
            return ForwardOnlyPass(knowledge, [w.clone() for w in weights], [b.clone() for b in biases])
        gradients = [entropy_gradient(z, old).to(z.dtype) for z, old in zip(knowledge, before, strict=True)]
        below = [inputs] + [torch.sigmoid(old) for old in before[:-1]]
        new_weights = [w - lr * (g.T @ a) / inputs.shape[0] for w, g, a in zip(weights, gradients, below, strict=True)]
        new_biases = [b - lr * g.mean(0) for b, g in zip(biases, gradients, strict=True)]
    return ForwardOnlyPass(knowledge, new_weights, new_biases)


def _check_layers(
    inputs: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], before: Sequence[Tensor] | None
) -> None:
    check_floats("inputs", inputs)
    if inputs.ndim != 2 or not len(inputs):
        raise ValueError(f"inputs has shape {tuple(inputs.shape)} and must be [N, n_in] with one sample or more.")
    layers = len(weights)
    if not layers or len(biases) != layers or (before is not None and len(before) != layers):
        counts = f"weights has {layers} layers, biases {len(biases)}"
        counts += "" if before is None else f", before {len(before)}"
        raise ValueError(f"{counts}: all must have the same number of them, 1 or more.")
    samples, width = inputs.shape
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        if weight.ndim != 2 or weight.shape[1] != width:
            raise ValueError(
                f"weights[{i}] has shape {tuple(weight.shape)} and must be [n_out, {width}], as in torch.nn.Linear."
            )
        width = weight.shape[0]
        if bias.shape != (width,):
            raise ValueError(
                f"biases[{i}] has shape {tuple(bias.shape)} and must be [{width}], as weights[{i}] has rows."
            )
        if before is not None and before[i].shape != (samples, width):
            raise ValueError(
                f"before[{i}] has shape {tuple(before[i].shape)} and must be [{samples}, {width}]: pass the knowledge "
                "of the pass before, of the same samples."
            )
