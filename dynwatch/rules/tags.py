"""The readings that rules share, by tag."""

from __future__ import annotations

from collections.abc import Iterable

LOSS = "stop/loss"  # training loss of the global batch, each step
VAL_LOSS = "stop/val_loss"  # the user's validation loss, at each end of validation
GRADIENT = "stop/grad_norm"  # norm over all gradients before clipping, each step
WEIGHTS = "stop/weight_norm"  # norm over all weights, once at the end
SCALER = "stop/scaler"  # 1 on each step under a gradient scaler
LR = "stop/lr"  # the largest learning rate of the step
LR_LOW = "stop/lr_low"  # the lowest learning rate still to come, as planned by the schedule
PROGRESS = "stop/progress"  # share of the planned budget that is spent, in [0, 1]
LOSS_LIMIT = "stop/loss_limit"  # the divergence rule's own limit

GRADIENT_BY_LAYER = "grad_norm/layer/"
UPDATE_RATIO = "update_ratio/"
DEAD_UNITS = "activation/dead/"
IDLE = "stop/idle_parameters"  # share of trainable parameters that no optimizer moves

# Curvature, at sparse steps: with λ the largest eigenvalue of the training Hessian (or of its preconditioned form),
SHARPNESS_RATIO = "hessian/sharpness_ratio"  # λ over the λ at which the optimizer at its present rate becomes unstable
CRITICAL_LR = "hessian/critical_lr"  # the learning rate at which that happens
LAMBDA_MAX = "hessian/lambda_max"  # λ itself
BATCH_SHARPNESS = "hessian/batch_sharpness"  # gᵀHg / gᵀg of a training batch

# At sparse steps: how long the step was, over the radius within which the softmax loss can be trusted.
STEP = "step_radius/r"

# Mixtures of experts, at sparse steps; * is the number of a layer, which has E experts, of which a token uses k.
MOE_LAYER = "moe/layer_"
EXPERTS = "moe/layer_*/experts"  # E, with the first readings of a run and after a resume
TOP_K = "moe/layer_*/top_k"  # k, with E
EFFECTIVE_EXPERTS = "moe/layer_*/effective_experts"  # exponential of the load's entropy, from k to E
MAX_LOAD = "moe/layer_*/max_load"  # share of the tokens that chose the busiest expert, k/E when balanced
DEAD_EXPERTS = "moe/layer_*/dead_experts"  # how many no token has chosen for a window of looks
Z_LOSS = "moe/layer_*/z_loss"  # mean over tokens of the squared logsumexp of the router's logits
# At sparse steps: how far flow and entropy steps of all layers have come down from their peaks.
EQUILIBRIUM = "ska/equilibrium"

# All of the above, which no metric of the user's and no rule may be called.
OWN = frozenset(tag for name, tag in list(globals().items()) if name.isupper() and isinstance(tag, str))

_VAL_LOSS_NAMES = ("val_loss", "val/loss", "valid_loss", "valid/loss", "validation_loss", "validation/loss", "loss/val")
_LOSS_NAMES = ("train_loss", "train/loss", "train_loss_step", "train/loss_step", "loss/train", "loss", "loss_step")


def pick_validation_loss(names: Iterable[str]) -> str | None:
    """Which of a run's validation metrics is its loss; None if that cannot be told.

    Example:
        >>> pick_validation_loss(["val_accuracy", "val_loss"])
        'val_loss'
        >>> pick_validation_loss(["val_box_loss", "val_class_loss"])
    """
    return _pick([name for name in names if "val" in name.lower()], _VAL_LOSS_NAMES)


def pick_train_loss(names: Iterable[str]) -> str | None:
    """Which of a run's metrics is its training loss; None if that cannot be told.

    Example:
        >>> pick_train_loss(["epoch", "train/loss", "val/loss"])
        'train/loss'
    """
    kept = [n for n in names if not any(part in n.lower() for part in ("val", "test", "epoch")) and "stop/" not in n]
    return _pick(kept, _LOSS_NAMES)


def _pick(names: list[str], known: tuple[str, ...]) -> str | None:
    for name in known:
        found = [n for n in names if n.lower() == name]
        if found:
            return found[0]
    candidates = [name for name in names if "loss" in name.lower()]
    return candidates[0] if len(candidates) == 1 else None
