"""The gradient norm after clipping, without looking at the gradients again where that can be done exactly."""

from __future__ import annotations

import torch
from torch import Tensor

from dynwatch.callbacks.namespaces import LightningModule, Trainer


def norm_after_clipping(trainer: Trainer, pl_module: LightningModule, total: Tensor, norm_type: float) -> Tensor | None:
    """What is left of a gradient norm after Lightning's clipping, or None if that must be measured.

    Args:
        trainer: The trainer, with its clipping arguments.
        pl_module: The module, which may override the clipping.
        total: The norm before clipping, a scalar tensor.
        norm_type: The p of `total`; Lightning's clipping by norm uses 2.
    """
    if not pl_module.automatic_optimization:
        return total  # the user has clipped already, between backward and step
    if _overrides_clipping(pl_module):
        return None
    bound = trainer.gradient_clip_val
    if not bound:
        return total
    if trainer.gradient_clip_algorithm == "value" or norm_type != 2:
        return None
    return total * torch.clamp(bound / (total + 1e-6), max=1.0)  # as torch.nn.utils.clip_grad_norm_


def clipping_expected(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether gradients may be clipped in this run, as far as can be known before it."""
    return bool(trainer.gradient_clip_val) or not pl_module.automatic_optimization or _overrides_clipping(pl_module)


def _overrides_clipping(pl_module: LightningModule) -> bool:
    # The function comes from Lightning's own module unless the user's class overrides it.
    owner = type(pl_module).configure_gradient_clipping.__module__.split(".")[0]
    return owner not in ("pytorch_lightning", "lightning")
