"""Operators over two processes, as a program: `python operators_run.py operators FOLDER` on each rank writes JSON."""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dynwatch.lanczos import extreme_eigenvalues, lanczos
from dynwatch.operators import Operator, from_matrix
from dynwatch.ranks import RankFailure, mean_over_ranks, sharded
from dynwatch.spectral_density import trace

N, PROBES = 12, 500
SAMPLES = (3.0, 5.0)
# Entries 0 to 6 are rank 0's, 7 to 9 rank 1's, 10 and 11 are held by both.
OWN = ([*range(7), 10, 11], [*range(7, 10), 10, 11])


def symmetric(seed: int) -> Tensor:
    drawn = torch.randn(N, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return drawn + drawn.T


def vector(seed: int) -> Tensor:
    return torch.randn(N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean(rank: int) -> dict[str, Any]:
    """Each rank has a matrix of its own."""
    operator = mean_over_ranks(from_matrix(symmetric(rank)), SAMPLES[rank], RankFailure())
    found = extreme_eigenvalues(operator, ends="both", tol=1e-9)
    return {
        "product": operator(vector(9)).tolist(),
        "extremes": [found.lambda_max, found.lambda_min],
        "dots": operator.reduce(torch.tensor([1.0 + rank])).tolist(),
    }


def mean_of_gradients(rank: int) -> dict[str, Any]:
    operator = Operator(symmetric(rank).mv, N, N, torch.float64, torch.device("cpu"), gradient=vector(rank))
    found = mean_over_ranks(operator, SAMPLES[rank], RankFailure()).gradient
    assert found is not None
    return {"gradient": found.tolist()}


def raising(failing_rank: int, call: int) -> Callable[[int], dict[str, Any]]:
    """One product on one rank raises, in the middle of a Lanczos run."""

    def run(rank: int) -> dict[str, Any]:
        calls = []

        def product(v: Tensor) -> Tensor:
            calls.append(v)
            if rank == failing_rank and len(calls) == call:
                raise torch.OutOfMemoryError("no memory")
            return symmetric(rank).mv(v)

        own, failure = Operator(product, N, N, torch.float64, torch.device("cpu")), RankFailure()
        operator = mean_over_ranks(own, SAMPLES[rank], failure)
        found = extreme_eigenvalues(operator, tol=1e-9)
        again = operator(vector(9))
        return {
            "reason": found.reason,
            "hvps": found.hvps,
            "lambda_max": found.lambda_max,
            "again": again.tolist(),
            "error": repr(failure.error),
            "calls": len(calls),
        }

    return run


def shards(rank: int) -> dict[str, Any]:
    """The entries of one matrix are spread over ranks, two of them on both."""
    matrix, own = symmetric(4), OWN[rank]

    def product(share: Tensor) -> Tensor:
        whole = torch.zeros(N, dtype=torch.float64)
        whole[own] = share
        if rank == 1:
            whole[10:] = 0  # once is enough
        dist.all_reduce(whole)
        return matrix.mv(whole)[own]

    n = len(own)
    operator = sharded(
        Operator(product, n, n, torch.float64, torch.device("cpu"), gradient=vector(5)[own]),
        torch.tensor([i >= 10 for i in own]),
    )
    assert operator.gradient is not None
    found = extreme_eigenvalues(operator, ends="both", tol=1e-9)
    generator = torch.Generator().manual_seed(0)
    drawn = [operator.random(generator) for _ in range(2)]
    return {
        "dimension": operator.dimension,
        "extremes": [found.lambda_max, found.lambda_min],
        "along_gradient": operator.reduce(torch.dot(operator.gradient, operator(operator.gradient)).reshape(1)).item(),
        "norm": operator.norm(operator.gradient),
        "drawn": [d.tolist() for d in drawn],
        "next": generator.initial_seed() + int(torch.randint(1000, (), generator=generator)),
        "trace": trace(operator, lanczos(operator, steps=4), probes=PROBES).value,
        "whole_trace": trace(operator, lanczos(operator)).value,
    }


SCENARIOS: dict[str, Callable[[int], dict[str, Any]]] = {
    "mean": mean,
    "mean_of_gradients": mean_of_gradients,
    "raising_0": raising(0, 3),
    "raising_1": raising(1, 1),
    "shards": shards,
}


if __name__ == "__main__":
    faulthandler.dump_traceback_later(60)  # shows where a run hangs
    torch.set_num_threads(1)
    own_rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=own_rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    for scenario, run in SCENARIOS.items():
        result = {"rank": own_rank, "ranks": 2} | run(own_rank)
        (Path(sys.argv[2]) / f"{scenario}.{own_rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
