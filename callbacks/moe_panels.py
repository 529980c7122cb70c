"""How routing is shown in TensorBoard: charts, pictures, and which router is which layer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from dynwatch.callbacks.moe_health import RouterHealth
from dynwatch.callbacks.moe_pathways import COMPLEXITY, CONSISTENCY, DISTANCE, LENGTH, MOE, NORMALIZED
from dynwatch.callbacks.moe_pictures import coactivation_picture, load_picture
from dynwatch.callbacks.panels import Chart
from dynwatch.router_capture import RouterCapture

_CATEGORY = "dynwatch · mixture of experts"


def charts(parts: Sequence[str], memorized: bool) -> list[Chart]:
    """The charts of a run.

    Args:
        parts: Names of the parts of the model that have pathways of their own; one empty name for a whole.
        memorized: Whether pathways of memorised samples are logged as well.
    """
    of_layers = {
        "Effective experts by layer": "effective_experts",
        "Share of tokens at the busiest expert": "max_load",
        "Router entropy by layer": "router_entropy",
        "Dead experts by layer": "dead_experts",
        "Load balancing loss (balanced is 1)": "aux_loss",
        "Router z-loss by layer": "z_loss",
        "Share of slots dropped for capacity": "dropped",
        "Load: coefficient of variation": "load_cv",
        "Choices that stayed since the last look": "stability",
    }
    prefixes = [f"{MOE}{part}/" if part else MOE for part in parts]
    if memorized:
        prefixes += [f"{prefix}memorized/" for prefix in prefixes]
    of_pathways = {
        "Pathway distance between samples, normalised": NORMALIZED,
        "Pathway consistency (cosine between layers)": CONSISTENCY,
        "Pathway distance between samples": DISTANCE,
        "Pathway length": LENGTH,
        "Pathway complexity (of the paper)": COMPLEXITY,
    }
    found = [
        Chart(_CATEGORY, title, (f"{MOE}layer_*/{name}",), pinned=name == "effective_experts")
        for title, name in of_layers.items()
    ]
    found += [
        Chart(_CATEGORY, title, tuple(f"{prefix}{tag}" for prefix in prefixes), pinned=tag == NORMALIZED)
        for title, tag in of_pathways.items()
    ]
    return [
        *found,
        Chart(_CATEGORY, "Memorised share of the probe, and its loss", (f"{MOE}memorized", f"{MOE}probe_loss")),
    ]


def write_layers(capture: RouterCapture, writers: Iterable[Any], step: int) -> None:
    """Write which router is which layer, to each `SummaryWriter`."""
    rows = [
        f"| {at} | `{site.name}` | {plan or 'as extract= says'} |"
        for at, (site, plan) in enumerate(zip(capture.sites, capture.plans, strict=True))
    ]
    text = "\n".join(["| layer | router | how it is read |", "|---|---|---|", *rows])
    for writer in writers:
        writer.add_text(f"{MOE}layers", text, global_step=step)


def write_pictures(health: RouterHealth, writers: Iterable[Any], step: int) -> None:
    """Write the load of all layers, and which experts are chosen together, to each `SummaryWriter`."""
    for writer in writers:
        writer.add_image(f"{MOE}load", load_picture(health.loads, step), global_step=step, dataformats="HWC")
        if health.together:
            together = coactivation_picture(health.together, step)
            writer.add_image(f"{MOE}coactivation", together, global_step=step, dataformats="HWC")
