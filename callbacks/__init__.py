"""dynwatch's Lightning callbacks: when to measure, where readings go, when to stop."""

if __name__ != "dynwatch.callbacks":
    raise ImportError(
        f"This folder is the package dynwatch.callbacks and was imported as {__name__!r}, which would make "
        "a second copy of every class. Write 'from dynwatch.callbacks import DynWatch'."
    )

from dynwatch.callbacks.activations import ActivationMonitor
from dynwatch.callbacks.early_termination import EarlyTermination
from dynwatch.callbacks.gradients import GradientNormMonitor
from dynwatch.callbacks.hessian import HessianMonitor
from dynwatch.callbacks.moe import MoEPathwayMonitor
from dynwatch.callbacks.ska import SKAMonitor
from dynwatch.callbacks.step_radius import StepRadiusMonitor
from dynwatch.callbacks.step_radius_controller import StepRadiusController
from dynwatch.callbacks.watch import DynWatch

__all__ = [
    "ActivationMonitor",
    "DynWatch",
    "EarlyTermination",
    "GradientNormMonitor",
    "HessianMonitor",
    "MoEPathwayMonitor",
    "SKAMonitor",
    "StepRadiusController",
    "StepRadiusMonitor",
]
