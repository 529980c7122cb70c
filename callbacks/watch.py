"""Everything in one callback."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from dynwatch.callbacks.activations import ActivationMonitor
from dynwatch.callbacks.base import Monitor
from dynwatch.callbacks.early_termination import EarlyTermination
from dynwatch.callbacks.gradients import GradientNormMonitor
from dynwatch.callbacks.hessian import HessianMonitor
from dynwatch.callbacks.moe import MoEPathwayMonitor
from dynwatch.callbacks.namespaces import Callback, LightningModule, Trainer
from dynwatch.callbacks.report import print_start, print_summary
from dynwatch.callbacks.ska import SKAMonitor
from dynwatch.callbacks.step_radius import StepRadiusMonitor
from dynwatch.callbacks.step_radius_controller import StepRadiusController
from dynwatch.callbacks.stream import Stream


class DynWatch(Callback):
    """Watches a run and ends it when it is poor: all of dynwatch in one callback.

    It holds the monitors below and passes Lightning's hooks on to them; add it alone. When training
    starts it prints the command and the link that open its TensorBoard panels; at the end of fit a
    summary with the key figures, its own cost and the verdict.

    Logs everything that `GradientNormMonitor`, `ActivationMonitor`, `HessianMonitor`, `StepRadiusMonitor`,
    `MoEPathwayMonitor`, `SKAMonitor` and `EarlyTermination` log, and `dynwatch/overhead`: the share of the run's time
    spent in dynwatch, as the host sees it, as often as the Trainer logs.

    Args:
        gradients: Watch gradient norms and update-to-weight ratios; a `GradientNormMonitor` of your own
            replaces the default one, `False` leaves it out.
        stop: End poor runs; an `EarlyTermination` of your own replaces the default one, `False` leaves
            it out and the run always goes on.
        report: Print to the terminal.
        activations: Watch ReLU units that stop firing; an `ActivationMonitor` of your own replaces the
            default one, `False` leaves it out.
        hessian: Watch curvature; a `HessianMonitor` of your own replaces the default one, `False` leaves it out.
        max_overhead: The most of the run's time that costly monitors may take, as a share: they read less often to
            keep it. One whose `every_n_steps` you set yourself is not held back.
        step_radius: Watch the optimizer's steps beside the softmax radius; a `StepRadiusMonitor` of your own replaces
            the default one, `False` leaves it out.
        controller: A `StepRadiusController` that caps steps beyond that radius, or `True` for one that looks at every
            step. Off by default: it is the one part of dynwatch that may change a run.
        moe: Watch mixtures of experts, if the model has any; a `MoEPathwayMonitor` of your own replaces the default
            one, `False` leaves it out.
        ska: Watch whether layers still change their decisions; an `SKAMonitor` of your own replaces the default one,
            `False` leaves it out.

    Raises:
        ValueError: If everything is left out, or an argument is of another kind.

    Example:
        >>> watch = DynWatch(stop=EarlyTermination(min_steps=100))
    """

    def __init__(
        self,
        gradients: bool | GradientNormMonitor = True,
        stop: bool | EarlyTermination = True,
        report: bool = True,
        activations: bool | ActivationMonitor = True,
        hessian: bool | HessianMonitor = True,
        max_overhead: float = 0.05,
        step_radius: bool | StepRadiusMonitor = True,
        controller: bool | StepRadiusController = False,
        moe: bool | MoEPathwayMonitor = True,
        ska: bool | SKAMonitor = True,
    ) -> None:
        super().__init__()
        for argument, value, kind in (
            ("gradients", gradients, GradientNormMonitor),
            ("activations", activations, ActivationMonitor),
            ("hessian", hessian, HessianMonitor),
            ("step_radius", step_radius, StepRadiusMonitor),
            ("controller", controller, StepRadiusController),
            ("moe", moe, MoEPathwayMonitor),
            ("ska", ska, SKAMonitor),
            ("stop", stop, EarlyTermination),
        ):
            if not isinstance(value, (bool, kind)):
                raise ValueError(f"{argument}={value!r} must be True, False or an instance of {kind.__name__}.")
        self.monitors: list[Monitor] = []
        if controller:
            # First, so that the others see the steps that are really taken.
            self.monitors.append(StepRadiusController() if controller is True else controller)
        if gradients:
            self.monitors.append(GradientNormMonitor() if gradients is True else gradients)
        if activations:
            self.monitors.append(ActivationMonitor() if activations is True else activations)
        # Made in any case, so that a wrong max_overhead is told.
        default_hessian = HessianMonitor(max_overhead=max_overhead)
        if hessian:
            self.monitors.append(default_hessian if hessian is True else hessian)
        if step_radius:
            if step_radius is True:
                step_radius = StepRadiusMonitor(max_overhead=max_overhead / 5)  # what is left goes to curvature
                step_radius.level = logging.INFO  # nobody asked for it; the summary says so
            self.monitors.append(step_radius)
        if moe:
            self.monitors.append(MoEPathwayMonitor(max_overhead=max_overhead / 10) if moe is True else moe)
        if ska:
            if ska is True:
                ska = SKAMonitor(max_overhead=max_overhead / 10)
                ska.level = logging.INFO
            self.monitors.append(ska)
        self.early_termination = (EarlyTermination() if stop is True else stop) if stop else None
        if self.early_termination:
            self.monitors.append(self.early_termination)  # last: it reads what the others measured
        if not self.monitors:
            raise ValueError(
                "DynWatch(gradients=False, stop=False, activations=False, hessian=False, step_radius=False, moe=False, "
                "ska=False) "
                "watches nothing: turn one on or leave it out."
            )
        self.report = report
        if self.early_termination and not report:
            self.early_termination.prints = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for monitor in self.monitors:
            monitor.on_train_start(trainer, pl_module)
        if self.report and trainer.is_global_zero:
            print_start(trainer, Stream.of(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for monitor in self.monitors:
            monitor.on_fit_end(trainer, pl_module)
        if self.report and trainer.is_global_zero:
            verdicts = self.early_termination.verdicts if self.early_termination else []
            print_summary(trainer, Stream.of(trainer), verdicts)

    @property
    def verdict(self) -> Any:
        """The `Verdict` that ended the run, or None."""
        return self.early_termination.verdict if self.early_termination else None

    def state_dict(self) -> dict[str, Any]:
        return {type(monitor).__name__: monitor.state_dict() for monitor in self.monitors}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for monitor in self.monitors:
            if type(monitor).__name__ in state_dict:
                monitor.load_state_dict(state_dict[type(monitor).__name__])


def _pass_on(hook: str) -> Callable[..., None]:
    def to_monitors(self: DynWatch, *args: Any, **kwargs: Any) -> None:
        for monitor in self.monitors:
            getattr(monitor, hook)(*args, **kwargs)

    to_monitors.__name__ = hook
    return to_monitors


# Lightning's whole list, so that a new monitor may use any hook without a line here.
for _hook in dir(Callback):
    if (_hook.startswith("on_") or _hook in ("setup", "teardown")) and _hook not in vars(DynWatch):
        setattr(DynWatch, _hook, _pass_on(_hook))
