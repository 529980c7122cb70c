"""The training step as a pure function of its parameters."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynwatch.callbacks.batches import copied, part, samples_in, tensors_in
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.sandbox import Sandbox
from dynwatch.callbacks.snapshot import CannotReplayError

if TYPE_CHECKING:
    from typing_extensions import Self

# The loss of a module on a batch, in place of the training step.
Loss = Callable[[LightningModule, Any], Tensor]


class Replay:
    """Runs the training step again, at these or other parameters, and leaves the run as it was.

    Every evaluation begins with the same random streams, buffers and attributes, so that the loss is a function of
    the parameters alone. It sees the batch with the run's own precision, without a gradient scaler; attention runs
    on kernels that have a second derivative, compiled modules run eagerly. Use it as a context: at its end, also
    when a step raised, all is as it was before.

    Attributes:
        parameters: Those to differentiate with respect to, by name: all that require a gradient.
        samples: How many samples the batch holds; None if that cannot be told.
        whole: Why the whole batch is used although fewer samples were asked for; empty if it is not.

    Args:
        trainer: The trainer, fitting.
        pl_module: Its module.
        batch: As `training_step` gets it.
        batch_idx: The batch's number.
        max_samples: Use no more than the first so many samples; None uses all.
        loss: A function of module and batch that gives the loss, used instead of `training_step`. Manual
            optimization needs it.

    Raises:
        CannotReplayError: If the module's training step cannot be replayed; the message says what to do.
    """

    def __init__(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int = 0,
        *,
        max_samples: int | None = None,
        loss: Loss | None = None,
    ) -> None:
        if loss is None and not pl_module.automatic_optimization:
            raise CannotReplayError(
                "training_step steps the optimizers itself (manual optimization), so it cannot be run again. "
                "Pass loss=, a function of module and batch that gives the loss."
            )
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in pl_module.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise CannotReplayError("no parameter requires a gradient, so there is nothing to measure.")
        self.samples = samples_in(batch)
        self.whole = ""
        if max_samples is not None:
            if self.samples is None:
                self.whole = "the tensors of the batch do not agree on a first dimension, so it cannot be cut"
            elif self.samples > max_samples:
                batch, self.samples = part(batch, self.samples, 0, max_samples), max_samples
        self._trainer = trainer
        self._module = pl_module
        self._batch = batch
        self._batch_idx = batch_idx
        self._loss = loss
        self._sandbox = Sandbox(trainer, pl_module, list(tensors_in(batch)))

    def __enter__(self) -> Self:
        self._sandbox.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._sandbox.__exit__(*error)

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over ranks, so that only `gradient_in_place` can be used."""
        return any(hasattr(p, "to_local") for p in self.parameters.values())

    def leaves(self) -> dict[str, Tensor]:
        """Fresh leaves of a graph that share the parameters' memory."""
        return {name: p.detach().requires_grad_() for name, p in self.parameters.items()}

    def loss(
        self, parameters: Mapping[str, Tensor] | None, start: int = 0, stop: int | None = None, seed: int | None = None
    ) -> Tensor:
        """The loss at given parameters, a scalar with a graph to them.

        Args:
            parameters: By name; those left out are as they are. None runs the module on its own parameters.
            start: First sample to use.
            stop: The sample to stop before; None uses all.
            seed: Another start for torch's random streams, for parts of a batch that are to be independent.

        Raises:
            CannotReplayError: If the step gives no scalar loss.
        """
        self._sandbox.rewind()
        if seed is not None:
            torch.manual_seed(seed)
        batch = self._batch
        if (start, stop) != (0, None) and self.samples is not None:
            batch = part(batch, self.samples, start, self.samples if stop is None else stop)
        run = functools.partial(self._step, copied(batch))
        with self._sandbox.muted(), self._surroundings():
            if parameters is None:
                return self._checked(run())
            holder = _Holder(self._module, run)
            named = {f"module.{name}": tensor for name, tensor in parameters.items()}
            return self._checked(torch.func.functional_call(holder, named, ()))

    def gradient(self, displacement: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The gradient of the loss at displaced parameters, by name.

        Parameters that are spread over ranks (FSDP2) are moved themselves and their bits put back; all ranks must
        call it together, and displacements and gradients are of this rank's shards.

        Args:
            displacement: By name, in the parameters' (or shards') shapes; None moves nothing.
        """
        if self.sharded:
            return self._gradient_in_place(displacement or {})
        moved = self.leaves()
        for name, by in (displacement or {}).items():
            moved[name] = (moved[name].detach() + by).requires_grad_()
        found = torch.autograd.grad(self.loss(moved), list(moved.values()), allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(moved.items(), found, strict=True)}

    def _gradient_in_place(self, displacement: Mapping[str, Tensor]) -> dict[str, Tensor]:
        shards = {name: local_part(p) for name, p in self.parameters.items()}
        before = {name: shards[name].detach().clone() for name in displacement}
        try:
            with torch.no_grad():
                for name, by in displacement.items():
                    shards[name].add_(by)
            loss = self.loss(None)
            for p in self.parameters.values():
                p.grad = None  # the run's own gradients wait in the sandbox
            loss.backward()  # FSDP gathers and reduces in hooks of backward
            gradients = {name: p.grad for name, p in self.parameters.items()}
            return {n: torch.zeros_like(shards[n]) if g is None else local_part(g) for n, g in gradients.items()}
        finally:
            with torch.no_grad():
                for name, bits in before.items():
                    shards[name].copy_(bits)
            self._sandbox.rewind()

    # --- one evaluation

    def _step(self, batch: Any) -> Any:
        if self._loss is not None:
            return self._loss(self._module, batch)
        epoch_loop = self._trainer.fit_loop.epoch_loop
        arguments = epoch_loop._build_kwargs(OrderedDict(), batch, self._batch_idx)
        return self._module.training_step(*arguments.values())

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        """Precision as in training, and only operations that have a second derivative."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._trainer.precision_plugin.train_step_context())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            modules = list(self._module.modules())
            if any(isinstance(module, nn.RNNBase) for module in modules):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            if is_compiled(self._module):
                if not hasattr(torch.compiler, "set_stance"):
                    raise CannotReplayError(
                        f"torch {torch.__version__} cannot run a compiled module eagerly, and compiled ones have no "
                        "second derivative: update to torch 2.6 or newer."
                    )
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def _checked(self, result: Any) -> Tensor:
        source = "training_step" if self._loss is None else "the function loss="
        if isinstance(result, Mapping) and "loss" in result:
            result = result["loss"]
        if not isinstance(result, Tensor):
            raise CannotReplayError(
                f"{source} returned {type(result).__name__} and must return the loss, a tensor with one number, or a "
                "dictionary with it at 'loss'. Pass loss= (a function of module and batch)."
            )
        if result.numel() != 1:
            raise CannotReplayError(
                f"{source} returned a tensor of shape {tuple(result.shape)} and must return one number: take its mean."
            )
        return result.reshape(())


class _Holder(nn.Module):
    """Lets `functional_call` run any method of a module."""

    def __init__(self, module: nn.Module, run: Callable[[], Any]) -> None:
        super().__init__()
        self.module = module
        self.run = run

    def forward(self) -> Any:
        return self.run()


def local_part(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor: all of it, unless it is a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_compiled(module: nn.Module) -> bool:
    """Whether a module or one of its children runs compiled."""
    return any(
        type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None or getattr(m, "_compiler_ctx", None)
        for m in module.modules()
    )
