"""The training step as a pure function of its parameters."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dynwatch.callbacks.batches import cloned, part, samples_in
from dynwatch.callbacks.differentiable import dense_gradients, twice_differentiable
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.sandbox import Sandbox
from dynwatch.callbacks.snapshot import CannotReplayError
from dynwatch.ranks import let_go_of_gathered, local_part

if TYPE_CHECKING:
    from typing_extensions import Self

# The loss of a module on a batch, in place of the training step.
Loss = Callable[[LightningModule, Any], Tensor]


# Characters of another library's message that are quoted.
_MOST_QUOTED = 100


class SkippedBatchError(CannotReplayError):
    """A training step that returned None, which in Lightning skips the batch: there is no loss of it."""


class Replay:
    """Runs the training step again, at these or other parameters, and leaves the run as it was.

    Every evaluation begins with the same random streams, buffers and attributes, so that the loss is a function of
    the parameters alone. It sees the batch with the run's own precision, without a gradient scaler; attention runs
    on kernels that have a second derivative, compiled modules run eagerly. Use it as a context: at its end, also
    when a step raised, all is as it was before. Until then the module is not to be used otherwise: an evaluation
    leaves its changes, and what it put in the place of parameters, for checkpointed parts that run again in backward.

    Attributes:
        batch: What is replayed, after it was cut.
        parameters: Those to differentiate with respect to, by name: all that require a gradient.
        samples: How many samples the batch holds; None if that cannot be told.
        operations: Names of the backward functions behind the first loss that was evaluated.
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
        CannotReplayError: If the module's training step cannot be replayed; the message says what to do. A
            `SkippedBatchError` says that it can be, but not on this batch.
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
        unreal = [name for name, p in self.parameters.items() if p.is_complex()]
        if unreal:
            raise CannotReplayError(
                f"complex parameters have no real Hessian here: {_first(unreal)}. Keep their real and imaginary parts "
                "as one real parameter (torch.view_as_complex in forward), or freeze them."
            )
        self.operations: frozenset[str] = frozenset()
        self.samples = samples_in(batch)
        self.whole = ""
        if max_samples is not None:
            try:
                if self.samples is None:
                    self.whole = "the tensors of the batch do not agree on a first dimension, so it cannot be cut"
                elif self.samples > max_samples:
                    batch, self.samples = part(batch, self.samples, 0, max_samples), max_samples
            except (TypeError, ValueError, IndexError, RuntimeError) as error:  # a container or tensor of some kind
                self.whole, self.samples = f"the batch cannot be cut ({type(error).__name__}: {_brief(error)})", None
        self._trainer = trainer
        self._module = pl_module
        self.batch = batch
        self._batch_idx = batch_idx
        self._loss = loss
        self._looked_through = False
        self._sandbox = Sandbox(trainer, pl_module, batch)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(dense_gradients(self._module))  # before the sandbox, which puts back what it finds
            stack.enter_context(self._sandbox)
            # Also around what the caller differentiates: checkpointed parts run once more then.
            stack.enter_context(twice_differentiable(self._module))
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    @property
    def sharded(self) -> bool:
        """Whether parameters are spread over ranks, so that only `gradient_in_place` can be used."""
        return any(hasattr(p, "to_local") for p in self.parameters.values())

    @property
    def rounds(self) -> bool:
        """Whether autocast rounds on the way to what was last looked through, or weights are of half precision."""
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.parameters.values())
        return half or "ToCopy" in self.operations

    def leaves(self) -> dict[str, Tensor]:
        """Fresh leaves of a graph that share the parameters' memory."""
        self._sandbox.rewind()  # the last evaluation may have written to it
        return {name: p.detach().requires_grad_() for name, p in self.parameters.items()}

    def loss(
        self, parameters: Mapping[str, Tensor] | None, start: int = 0, stop: int | None = None, seed: int | None = None
    ) -> Tensor:
        """The loss at given parameters, a scalar with a graph to them.

        Graphs at the parameters of `leaves` stay good beside each other; one at others, until the next evaluation.

        Args:
            parameters: By name; those left out are as they are. None runs the module on its own parameters.
            start: First sample to use.
            stop: The sample to stop before; None uses all.
            seed: Another start for torch's random streams, for parts of a batch that are to be independent.

        Raises:
            CannotReplayError: If the step gives no scalar loss; a `SkippedBatchError` if it gives None.
        """
        self._sandbox.rewind()
        if seed is not None:
            torch.manual_seed(seed)
        return self._evaluate(parameters, start, stop)

    def _evaluate(self, parameters: Mapping[str, Tensor] | None, start: int = 0, stop: int | None = None) -> Tensor:
        """The loss, where all has been rewound."""
        loss = self._checked(self._run(parameters, start, stop))
        if not self._looked_through:
            self.look_through(loss, parameters or {})
            self._looked_through = bool(parameters)
        return loss

    def _run(self, parameters: Mapping[str, Tensor] | None, start: int = 0, stop: int | None = None) -> Any:
        """What the step returns, where all has been rewound."""
        batch = self.batch
        if (start, stop) != (0, None) and self.samples is not None:
            batch = part(batch, self.samples, start, self.samples if stop is None else stop)
        # With tensors of its own, because a graph may need what the step has written to them.
        batch = cloned(batch)
        replaced = [] if parameters is None else [(self.parameters[name], t) for name, t in parameters.items()]
        with self._sandbox.muted(), self._trainer.precision_plugin.train_step_context():
            self._sandbox.substitute(replaced)
            return self._step(batch)

    def look_through(self, result: Tensor, parameters: Mapping[str, Tensor]) -> None:
        """Note the operations behind what a run gave, and refuse it if it depends on parameters that were replaced.

        Args:
            result: The loss, or anything else with a graph.
            parameters: What the run was given.
        """
        self.operations, leaves = behind(result)
        replaced = {self.parameters[name] for name, t in parameters.items() if t is not self.parameters[name]}
        missed = [name for name, p in self.parameters.items() if p in replaced and p in leaves]
        scripted = _scripted(self._module, missed)
        if scripted:
            raise CannotReplayError(
                f"{scripted} is compiled by TorchScript (torch.jit), where no other values can be given to its "
                f"parameters ({_first(missed)}): train the plain module, and script it after training."
            )
        if missed:
            raise CannotReplayError(
                f"training_step reads {_first(missed)} from a place other than the module's attributes, lists and "
                "dictionaries (a tuple, an optimizer, a module outside of it), where no other values can be given to "
                "it. Use self.parameters() or keep them in nn.ParameterList."
            )

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
        found = torch.autograd.grad(self._evaluate(moved), list(moved.values()), allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(moved.items(), found, strict=True)}

    def _gradient_in_place(self, displacement: Mapping[str, Tensor]) -> dict[str, Tensor]:
        shards = {name: local_part(p) for name, p in self.parameters.items()}
        with self._in_place({name: shards[name].detach() + by for name, by in displacement.items()}):
            loss = self._evaluate(None)
            for p in self.parameters.values():
                p.grad = None  # the run's own gradients wait in the sandbox
            loss.backward()  # type: ignore[no-untyped-call]  # FSDP gathers and reduces in hooks of backward
            gradients = {name: p.grad for name, p in self.parameters.items()}
            return {n: torch.zeros_like(shards[n]) if g is None else local_part(g) for n, g in gradients.items()}

    def run(self, parameters: Mapping[str, Tensor]) -> Any:
        """What the step returns at given parameters, unchecked: for a mode that watches what happens in it.

        There is a graph to the parameters that require a gradient, and tangents go through. Parameters that are spread
        over ranks are given other values in place: all ranks must call it together, with values of their shards.

        Args:
            parameters: By name; those left out are as they are.
        """
        if not self.sharded:
            self._sandbox.rewind()
            return self._run(parameters)
        with self._in_place(parameters):
            try:
                return self._run(None)
            finally:  # backward, after which FSDP lets go of gathered weights, does not come
                let_go_of_gathered(self._module)

    @contextlib.contextmanager
    def _in_place(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Other values in the parameters' own memory (this rank's shards), whose bits are put back at the end."""
        self._sandbox.rewind()
        shards = {name: local_part(self.parameters[name]) for name in values}
        before = {name: shard.detach().clone() for name, shard in shards.items()}
        try:
            with torch.no_grad():
                for name, value in values.items():
                    shards[name].copy_(value)
            yield
        finally:
            self._sandbox.rewind()
            with torch.no_grad():
                for name, bits in before.items():
                    shards[name].copy_(bits)

    # --- one evaluation

    def _step(self, batch: Any) -> Any:
        if self._loss is not None:
            return self._loss(self._module, batch)
        return run_training_step(self._trainer, self._module, batch, self._batch_idx)

    def _checked(self, result: Any) -> Tensor:
        source = "training_step" if self._loss is None else "the function loss="
        if isinstance(result, Mapping) and "loss" in result:
            result = result["loss"]
        if result is None:
            raise SkippedBatchError(f"{source} returned None, which skips the batch, so that it has no loss.")
        if not isinstance(result, Tensor):
            raise CannotReplayError(
                f"{source} returned {type(result).__name__} and must return the loss, a tensor with one number, or a "
                "dictionary with it at 'loss'. Pass loss= (a function of module and batch)."
            )
        if result.numel() != 1:
            raise CannotReplayError(
                f"{source} returned a tensor of shape {tuple(result.shape)} and must return one number: take its mean."
            )
        if not result.requires_grad:
            raise CannotReplayError(
                f"{source} returned a loss that depends on no parameter: it was detached, or computed under no_grad."
            )
        return result.reshape(())


def run_training_step(trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> Any:
    """Call `training_step` with the arguments that it takes, as Lightning does."""
    arguments = trainer.fit_loop.epoch_loop._build_kwargs(OrderedDict(), batch, batch_idx)
    return pl_module.training_step(*arguments.values())


def _scripted(module: nn.Module, parameters: Sequence[str]) -> str:
    """The module compiled by TorchScript that holds one of these parameters; empty if there is none."""
    for name, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule) and any(p.startswith(f"{name}.") for p in parameters):
            return str(name)
    return ""


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + " and others" * (len(names) > 3)


def _brief(error: Exception) -> str:
    """The first line of a message, not too long: torch adds its whole table of kernels to some."""
    line = (str(error).strip().splitlines() or [""])[0].rstrip(".")
    return line if len(line) <= _MOST_QUOTED else f"{line[:_MOST_QUOTED].rstrip()}…"


def nodes_behind(loss: Tensor) -> Iterator[Any]:
    """The backward nodes in the graph of a loss, each once."""
    seen: set[Any] = set()
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            waiting.extend(following for following, _ in node.next_functions)


def behind(loss: Tensor) -> tuple[frozenset[str], set[Tensor]]:
    """Names of the operations in the graph of a loss, without "Backward", and the leaves that it ends in."""
    names: set[str] = set()
    leaves: set[Tensor] = set()
    for node in nodes_behind(loss):
        names.add(node.name().partition("Backward")[0])
        if hasattr(node, "variable"):
            leaves.add(node.variable)
    return frozenset(names), leaves
