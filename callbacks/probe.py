"""Forward passes on fixed batches that leave the run as it was, for monitors that look at activations."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch

from dynwatch.callbacks.batches import cloned
from dynwatch.callbacks.differentiable import eager
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.replay import run_training_step
from dynwatch.callbacks.sandbox import Sandbox
from dynwatch.callbacks.snapshot import CannotReplayError
from dynwatch.ranks import let_go_of_gathered

if TYPE_CHECKING:
    from typing_extensions import Self

# Runs a module on a batch, in place of its own step; what it returns is not used.
Forward = Callable[[LightningModule, Any], Any]
Stage = Literal["train", "validate"]

_SEED = 0


class ProbePass:
    """Runs a step of the module on batches, and leaves nothing behind.

    By default in evaluation mode, without a graph and with random streams that begin alike at every pass: dropout is
    off, and what the step draws (augmentation, masks) is the same each time, so that two passes differ by the weights
    alone. Compiled modules run eagerly, so that hooks fire. Use it as a context; at its end, also when a step raised,
    all is as it was. On several ranks all must run it together.

    Args:
        trainer: The trainer, fitting.
        pl_module: Its module.
        batches: All that will be run, on the module's device.
        forward: A function of module and batch that is run instead of the step. Manual optimization needs it.
        stage: Whose step is run, `training_step` or `validation_step`.
        training: Run in the modes in which the modules are now, with the random streams as they are now: what the step
            of this very batch will do.

    Raises:
        CannotReplayError: If the module's step cannot be run; the message says what to do.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batches: Sequence[Any],
        *,
        forward: Forward | None = None,
        stage: Stage = "train",
        training: bool = False,
    ) -> None:
        if forward is None and stage == "train" and not pl_module.automatic_optimization:
            raise CannotReplayError(
                "training_step steps the optimizers itself (manual optimization), so it cannot be run again. "
                "Pass forward=, a function of module and batch that runs the model."
            )
        self._trainer = trainer
        self._module = pl_module
        self._forward = forward
        self._stage = stage
        self._training = training
        self._sandbox = Sandbox(trainer, pl_module, list(batches))

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._sandbox)
            stack.enter_context(eager(self._module, "hooks do not fire in compiled ones"))
            stack.enter_context(_no_fast_path())
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    def run(self, batch: Any, batch_idx: int = 0, *watches: AbstractContextManager[Any]) -> Any:
        """Run the step on a copy of a batch, which the step may write to.

        Args:
            batch: One of `batches`.
            batch_idx: Its number.
            watches: Entered around the step alone: what looks at the model (hooks, modes), and what it notes, is then
                not among the things that are put back.

        Returns:
            What the step returned.
        """
        self._sandbox.rewind()
        if not self._training:
            self._module.eval()
            self._sandbox.seed(_SEED)
        plugin = self._trainer.precision_plugin
        precision = plugin.train_step_context() if self._stage == "train" else plugin.val_step_context()
        graph = torch.enable_grad() if self._training else torch.no_grad()  # a step may differentiate within itself
        with self._sandbox.muted(), precision, graph, contextlib.ExitStack() as stack:
            for watch in watches:
                stack.enter_context(watch)
            try:
                return self._step(cloned(batch), batch_idx)
            finally:  # no backward comes, after which FSDP lets go of gathered weights
                let_go_of_gathered(self._module)

    def _step(self, batch: Any, batch_idx: int) -> Any:
        if self._forward is not None:
            return self._forward(self._module, batch)
        if self._stage == "validate":
            return self._module.validation_step(batch, batch_idx)
        return run_training_step(self._trainer, self._module, batch, batch_idx)


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """Transformer layers of torch's own as they are written, not as one fused kernel, in which no module runs."""
    backend: Any = getattr(torch.backends, "mha", None)  # torch 2.4 or newer
    if backend is None or not backend.get_fastpath_enabled():
        yield
        return
    backend.set_fastpath_enabled(False)
    try:
        yield
    finally:
        backend.set_fastpath_enabled(True)
