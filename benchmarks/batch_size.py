"""How much sharper small batches are: the prediction from one set of samples, and the mean over real batches.

    python benchmarks/batch_size.py

Three nets learn 1500 digits for 150 steps of Adam. From the Hessian of all 1500 samples and its products with the top
vector on 8 or 32 chunks of them, λ_max of batches of 16 and 128 is predicted: by the directional correction, as
`HessianMonitor` does it from 8, and by the isotropic one of arXiv 2006.09092. Beside it stands the mean over 48 random
batches.
"""

from __future__ import annotations

import statistics

import torch
from hessian import digits, nets, own_operator, train
from torch import Tensor

from dynwatch.batch_size import directional, isotropic, spread_of_chunks
from dynwatch.lanczos import extreme_eigenvalues

FULL, BATCHES = 1500, 48


def variance_of_entries(net: torch.nn.Module, x: Tensor, y: Tensor, chunks: int) -> float:
    """σ² of the isotropic form: E |(H_i - H) z|² for a random unit z."""
    size = sum(p.numel() for p in net.parameters())
    z = torch.randn(size, generator=torch.Generator().manual_seed(1))
    z /= z.norm()
    rows = [part.tolist() for part in torch.arange(FULL).chunk(chunks)]
    spread = spread_of_chunks([own_operator(net, x[r], y[r])(z) for r in rows], z, [len(r) for r in rows])
    return spread.outer + spread.along


def main() -> None:
    torch.set_num_threads(2)
    x, y = (part[:FULL] for part in digits())
    print(f"{'':12}{'B':>5}{'batches':>10}{'directional':>13}{'off by':>8}{'isotropic':>11}{'off by':>8}{'full':>8}")
    for name, net in nets().items():
        train(net, 150)
        operator = own_operator(net, x, y)
        full = extreme_eigenvalues(operator, start=operator.gradient, tol=1e-4)
        order = torch.randperm(FULL, generator=torch.Generator().manual_seed(0))
        for chunks in (8, 32):
            rows = order.chunk(chunks)
            products = [own_operator(net, x[r], y[r])(full.top) for r in rows]
            spread = spread_of_chunks(products, full.top, [len(r) for r in rows])
            variance = variance_of_entries(net, x[order], y[order], chunks)
            for size in (16, 128):
                measured = mean_over_batches(net, x, y, size)
                ours, _ = directional(full.lambda_max, spread, size, FULL)
                theirs = isotropic(full.lambda_max, variance, size, FULL)
                label = f"{name}, {chunks}"
                print(
                    f"{label:16}{size:>3}{measured:10.2f}{ours:13.2f}{ours / measured - 1:+8.0%}{theirs:11.2f}"
                    f"{theirs / measured - 1:+8.0%}{full.lambda_max:8.2f}"
                )


def mean_over_batches(net: torch.nn.Module, x: Tensor, y: Tensor, size: int) -> float:
    generator = torch.Generator().manual_seed(2)
    found = []
    for _ in range(BATCHES):
        rows = torch.randperm(FULL, generator=generator)[:size]
        operator = own_operator(net, x[rows], y[rows])
        found.append(extreme_eigenvalues(operator, start=operator.gradient).lambda_max)
    return statistics.mean(found)


if __name__ == "__main__":
    main()
