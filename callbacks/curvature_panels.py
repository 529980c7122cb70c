"""How a run's curvature is shown in TensorBoard: its charts, and the spectrum over time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from dynwatch.callbacks import curvature_reading as tags
from dynwatch.callbacks.density_picture import density_picture
from dynwatch.callbacks.panels import Chart
from dynwatch.spectral_density import SpectralDensity

_CATEGORY = "dynwatch · curvature"
# Densities in the picture.
_MOST_DENSITIES = 64


def charts(preconditioned: bool) -> list[Chart]:
    """The charts of a run.

    Args:
        preconditioned: Whether its optimizer preconditions.
    """
    bounds = (tags.LAMBDA_MAX, tags.LAMBDA_MAX_LOWER, tags.LAMBDA_MAX_UPPER)
    ratio = Chart(_CATEGORY, "Sharpness ratio (1 is the edge of stability)", (tags.SHARPNESS_RATIO,), pinned=True)
    largest = Chart(_CATEGORY, "Largest Hessian eigenvalue, with its error bar", bounds, margin=True, pinned=True)
    others = {
        "Critical learning rate": (tags.CRITICAL_LR,),
        "Critical learning rate by batch size": (tags.AT_BATCH_SIZE,),
        "Batch sharpness": (tags.BATCH_SHARPNESS,),
        "Smallest Hessian eigenvalue": (tags.LAMBDA_MIN,),
        "Trace of the Hessian": (tags.TRACE,),
        "Learning rate and momentum for the spectrum": (tags.LEARNED_LR, tags.LEARNED_MOMENTUM),
        "Errors": (tags.LAMBDA_MAX_ERROR, tags.LAMBDA_MIN_ERROR, tags.TRACE_ERROR),
        "Hessian-vector products of a reading": (tags.HVPS,),
    }
    if preconditioned:
        others = {"Largest preconditioned eigenvalue": (tags.PRECONDITIONED,)} | others
    return [ratio, largest, *(Chart(_CATEGORY, title, drawn) for title, drawn in others.items())]


class Densities:
    """The spectra of a run, thinned to at most 64, drawn as a histogram each and as one picture."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, SpectralDensity]] = []

    def add(self, step: int, density: SpectralDensity, writers: Iterable[Any]) -> None:
        """Take in a spectrum and write it, to each `SummaryWriter`."""
        self.kept.append((step, density))
        if len(self.kept) > _MOST_DENSITIES:
            self.kept = self.kept[::2]
        edges, counts = density.histogram(60)
        nodes, weights = density.nodes, density.weights * density.dimension
        for writer in writers:
            writer.add_histogram_raw(
                tags.DENSITY,
                min=float(nodes[0]),
                max=float(nodes[-1]),
                num=density.dimension,
                sum=float(weights @ nodes),
                sum_squares=float(weights @ nodes**2),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=step,
            )
            picture = density_picture(self.kept)
            writer.add_image(tags.DENSITY, picture, global_step=step, dataformats="HWC")

    def state(self) -> list[list[Any]]:
        return [[step, d.nodes.tolist(), d.weights.tolist(), d.hvps, d.dimension] for step, d in self.kept]

    def load_state(self, state: Sequence[Sequence[Any]]) -> None:
        self.kept = [
            (step, SpectralDensity(np.array(nodes), np.array(weights), hvps, dimension, "complete"))
            for step, nodes, weights, hvps, dimension in state
        ]
