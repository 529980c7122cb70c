"""The Hessian of a loss as a symmetric matrix that is known by its products with vectors only.

Vectors are flat: all parameters, one after the other, in at least float32. `flatten` and `unflatten` go to and from
lists of tensors. Solvers (`lanczos.py`) see an `Operator` and never a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dynwatch.constants import widest_float


def _itself(dots: Tensor) -> Tensor:
    return dots


@dataclass(frozen=True)
class Operator:
    """A symmetric matrix as what it does to a vector.

    Attributes:
        apply: The product: [size] to [size].
        size: Entries of a vector, on this process.
        dimension: Rows of the matrix; more than `size` where vectors are sharded over processes.
        dtype: Of the vectors.
        device: Of the vectors.
        approximate: Why products are approximate; empty if they are exact up to rounding.
        gradient: [size] of the loss, where the matrix is its Hessian.
        reduce: Turns dot products over this process's entries into those over all, on all processes alike.
        draw: A random normal vector, [size], from a generator.
        failed: Told when a solver fails on this process alone: products then end the solvers of all, so that nobody
            waits. None where there is one process.

    Example:
        >>> operator = from_matrix(torch.diag(torch.tensor([1.0, -5.0])))
        >>> operator(torch.tensor([2.0, 1.0]))
        tensor([ 2., -5.])
    """

    apply: Callable[[Tensor], Tensor]
    size: int
    dimension: int
    dtype: torch.dtype
    device: torch.device
    approximate: str = ""
    gradient: Tensor | None = None
    reduce: Callable[[Tensor], Tensor] = _itself
    draw: Callable[[torch.Generator], Tensor] | None = None
    failed: Callable[[Exception], None] | None = None

    def __call__(self, vector: Tensor) -> Tensor:
        """The product with a vector, [size]."""
        if vector.shape != (self.size,):
            raise ValueError(
                f"vector has shape {tuple(vector.shape)} and must have shape ({self.size},): use flatten()."
            )
        return self.apply(vector)

    def random(self, generator: torch.Generator) -> Tensor:
        """A random normal vector, [size]."""
        if self.draw is not None:
            return self.draw(generator)
        drawn = torch.randn(self.size, generator=generator, dtype=self.dtype, device=generator.device)
        return drawn.to(self.device)

    def square(self, vector: Tensor) -> Tensor:
        """The squared norm over all processes, [1], in the widest type so that squares of float32 cannot overflow."""
        wide = widest_float(self.device)
        return self.reduce(torch.linalg.vector_norm(vector, dtype=wide).square().reshape(1).to(self.device))

    def norm(self, vector: Tensor) -> float:
        """The 2-norm of a vector over all processes."""
        return math.sqrt(float(self.square(vector)))


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one vector, in the widest of their types and at least float32.

    Args:
        tensors: Of any shapes, on one device.

    Returns:
        [sum of their sizes].

    Example:
        >>> flatten([torch.ones(1, 2), torch.zeros(1)])
        tensor([1., 1., 0.])
    """
    dtype = vector_dtype(tensors)
    return torch.cat([t.detach().reshape(-1).to(dtype) for t in tensors]) if tensors else torch.zeros(0, dtype=dtype)


def unflatten(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """A vector as tensors of the shapes and types of others; the inverse of `flatten`.

    Args:
        vector: [sum of the sizes of `like`].
        like: Whose shapes, types and devices are taken.

    Example:
        >>> unflatten(torch.arange(3.0), [torch.ones(1, 2), torch.zeros(1)])
        [tensor([[0., 1.]]), tensor([2.])]
    """
    parts = torch.split(vector, [t.numel() for t in like])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, like, strict=True)]


def vector_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The type of vectors over these parameters: their own, and float32 for half precision.

    Example:
        >>> vector_dtype([torch.zeros(2, dtype=torch.bfloat16)])
        torch.float32
    """
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def from_matrix(matrix: Tensor) -> Operator:
    """A dense symmetric matrix as an operator.

    Args:
        matrix: [n, n], symmetric.

    Example:
        >>> from_matrix(torch.eye(3)).dimension
        3
    """
    return Operator(matrix.mv, len(matrix), len(matrix), matrix.dtype, matrix.device)


def hessian(loss: Tensor, parameters: Sequence[Tensor]) -> Operator:
    """The exact Hessian of a loss, by differentiating its gradient's graph again.

    The graph of the gradient is built once, here, and used for all products (about 1.8 gradients each). It lives as
    long as the operator. The parameters' `.grad` is not touched. Restricted to a parameter group or a block: pass only
    its parameters; the others then count as constants.

    Args:
        loss: A scalar with a graph.
        parameters: What to differentiate with respect to; one that the loss does not use has zeros.

    Returns:
        The operator, with the `gradient` of the loss.

    Raises:
        ValueError: If the loss is no scalar or has no graph.
        RuntimeError: By torch, if an operation has no second derivative.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> hessian((x**3).sum(), [x])(torch.tensor([1.0, 1.0]))
        tensor([ 6., 12.])
    """
    if loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"loss has shape {tuple(loss.shape)} and requires_grad={loss.requires_grad}: the Hessian needs a scalar "
            "that depends on the parameters."
        )
    parameters = list(parameters)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
    # What is linear in a parameter has a gradient without a graph, and a Hessian of zero there.
    curved = [(g, i) for i, g in enumerate(gradients) if g is not None and g.requires_grad]
    sizes = [p.numel() for p in parameters]

    def product(vector: Tensor) -> Tensor:
        if not curved:
            return torch.zeros_like(vector)
        parts = unflatten(vector, parameters)
        found = torch.autograd.grad(
            [g for g, _ in curved],
            parameters,
            [parts[i].to(g.dtype) for g, i in curved],
            retain_graph=True,
            allow_unused=True,
        )
        return _flat(found, parameters)

    return Operator(
        product,
        sum(sizes),
        sum(sizes),
        vector_dtype(parameters),
        loss.device,
        gradient=_flat(gradients, parameters),
    )


def _flat(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> Tensor:
    return flatten([torch.zeros_like(p) if t is None else t for t, p in zip(tensors, like, strict=True)])


def hessian_by_differences(
    gradient_at: Callable[[Tensor | None], Tensor],
    weights: Tensor,
    relative_step: float | None = None,
    norm: Callable[[Tensor], float] | None = None,
) -> Operator:
    r"""The Hessian by central differences of the gradient, two gradients a product.

    .. math:: H v \approx \frac{|v|}{2 \varepsilon}
        \left(\nabla L(\theta + \varepsilon v / |v|) - \nabla L(\theta - \varepsilon v / |v|)\right)

    with ε = `relative_step` |θ|. It is the way where an operation has no second derivative, and it is approximate: on
    a net that is linear in pieces (ReLU) it sees kinks that the Hessian does not have.

    Args:
        gradient_at: The gradient, [n], at θ + displacement; None asks for it at θ.
        weights: [n] θ, or this process's share of it.
        relative_step: None takes the cube root of the type's rounding error, 5e-3 in float32.
        norm: The 2-norm of a vector over all processes; None takes this process's.

    Returns:
        The operator, marked `approximate`, with the `gradient` at θ.

    Example:
        >>> operator = hessian_by_differences(lambda d: (torch.ones(2) + (0 if d is None else d)) ** 3, torch.ones(2))
        >>> operator(torch.tensor([1.0, 0.0])).round(decimals=3)
        tensor([3., 0.])
    """
    relative = torch.finfo(weights.dtype).eps ** (1 / 3) if relative_step is None else relative_step
    norm = norm or (lambda vector: float(vector.norm()))
    length = relative * (norm(weights) or 1.0)

    def product(vector: Tensor) -> Tensor:
        size = norm(vector)
        if size == 0:
            return torch.zeros_like(vector)
        ahead = gradient_at(vector * (length / size))
        behind = gradient_at(vector * (-length / size))
        return (ahead - behind) * (size / (2 * length))

    n = len(weights)
    return Operator(
        product,
        n,
        n,
        weights.dtype,
        weights.device,
        approximate="central differences of the gradient",
        gradient=gradient_at(None),
    )


def preconditioned(operator: Operator, scale: Tensor, weight_decay: Tensor | float = 0.0) -> Operator:
    r"""S (H + W) S: the Hessian as an optimizer with the preconditioner S² feels it, in symmetric form.

    It has the eigenvalues of S²(H + W). For Adam S² = 1 / (√v̂ + ε) (arXiv 2207.14484).

    Args:
        operator: H.
        scale: [size] the diagonal of S.
        weight_decay: [size] or a number, the diagonal of W: decay that is added to the gradient.

    Example:
        >>> operator = preconditioned(from_matrix(torch.eye(2)), torch.tensor([1.0, 2.0]))
        >>> operator(torch.ones(2))
        tensor([1., 4.])
    """

    def product(vector: Tensor) -> Tensor:
        scaled = scale * vector
        return scale * (operator(scaled) + weight_decay * scaled)

    gradient = None if operator.gradient is None else scale * operator.gradient
    return replace(operator, apply=product, gradient=gradient)


def weighted_mean(operators: Sequence[Operator], weights: Sequence[float]) -> Operator:
    """The mean of operators, as of the Hessians of micro-batches, each with the weight of its samples.

    Args:
        operators: At least one, all of one size.
        weights: One each, positive; they need not add up to 1.

    Raises:
        ValueError: If there is none, their sizes differ, or a weight is not positive.

    Example:
        >>> mean = weighted_mean([from_matrix(torch.eye(2)), from_matrix(4 * torch.eye(2))], [2, 1])
        >>> mean(torch.ones(2))
        tensor([2., 2.])
    """
    if not operators or len(operators) != len(weights) or len({o.size for o in operators}) > 1:
        sizes = [o.size for o in operators]
        raise ValueError(f"operators of sizes {sizes} and {len(weights)} weights: give one weight each, of one size.")
    if not all(weight > 0 for weight in weights):
        raise ValueError(f"weights={list(weights)!r} must be positive: the number of samples that each stands for.")
    shares = [weight / math.fsum(weights) for weight in weights]

    def mean(values: Sequence[Tensor]) -> Tensor:
        total = shares[0] * values[0]
        for share, value in zip(shares[1:], values[1:], strict=True):
            total.add_(value, alpha=share)
        return total

    def product(vector: Tensor) -> Tensor:
        return mean([operator(vector) for operator in operators])

    gradients = [o.gradient for o in operators if o.gradient is not None]
    return replace(
        operators[0],
        apply=product,
        gradient=mean(gradients) if len(gradients) == len(operators) else None,
        approximate=next((o.approximate for o in operators if o.approximate), ""),
    )
