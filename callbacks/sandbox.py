"""A stretch of a run in which the training step can be run again with nothing left behind."""

from __future__ import annotations

import contextlib
import functools
import os
import random
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dynwatch.callbacks.base import Monitor
from dynwatch.callbacks.journal import WriteJournal, memory_of
from dynwatch.callbacks.namespaces import LightningModule, Logger, Trainer
from dynwatch.callbacks.snapshot import Snapshot

if TYPE_CHECKING:
    from typing_extensions import Self

# Bytes up to which plain tensors are copied rather than watched.
_LITTLE = 2**20


class Sandbox:
    """Puts back whatever a training step changes: at `rewind`, and at the end, also when the step raised.

    That is random streams (torch, the device's, numpy, random, and generators that the module holds), buffers,
    parameters, gradients, attributes and containers of the module and all that it holds (metrics among it), and the
    attributes of the trainer, of its optimizers and of its schedulers. Meanwhile `self.log` does nothing and loggers
    swallow what they are given. What leaves the process cannot be taken back: files, prints, a logger's connection
    that the module keeps for itself.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        batch: What the step may write to, beside the module.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._batch = batch
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        trainer, module = self._trainer, self._module
        roots = {type(module).__name__: module, "batch": self._batch}
        roots["trainer.datamodule"] = getattr(trainer, "datamodule", None)
        callbacks = {f"trainer.callbacks[{i}]": each for i, each in enumerate(getattr(trainer, "callbacks", ()))}
        # Monitors work while the sandbox is open; what they learn must stay.
        skip = (type(trainer), Trainer, Logger, Monitor)
        self._state = Snapshot(roots | callbacks, skip, lenient=frozenset(callbacks))
        # What has a place of its own in the run is noted without looking into it.
        self._shallow = [(now, dict(now)) for now in _attributes_of_the_run(trainer)]
        self._random = _random_streams(module)
        # Not left to the journal, because BatchNorm changes its statistics without saying so.
        self._buffers = [(b, b.detach().clone()) for b in module.buffers()]
        self._small = _small_memory(self._state.tensors, module)
        self._journal = WriteJournal([*self._state.tensors, *_optimizer_tensors(trainer)])
        self._lightning_modules = [
            child for child in module.modules() if hasattr(child, "log_dict") and hasattr(child, "training_step")
        ]
        self._undo.callback(self.rewind)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def rewind(self) -> None:
        """Put everything back as it was when the sandbox was entered; what raises does not keep the rest from it."""
        with contextlib.ExitStack() as last_first:
            for restore in self._random:
                last_first.callback(restore)
            last_first.callback(self._rewind_shallow)
            last_first.callback(self._rewind_memory)
            last_first.callback(self._state.restore)  # before the buffers, whose memory may have been replaced
            last_first.callback(self._journal.restore)

    def _rewind_memory(self) -> None:
        with torch.no_grad():
            for buffer, before in self._buffers:
                # Through .data, so that a graph that has saved this buffer does not take it for changed.
                buffer.data.copy_(before)
        for storage, bytes_before in self._small:
            if storage.nbytes() == bytes_before.nbytes():
                storage.copy_(bytes_before)

    def _rewind_shallow(self) -> None:
        for now, before in self._shallow:
            for name in now.keys() - before.keys():
                del now[name]
            now.update(before)

    def seed(self, seed: int) -> None:
        """Begin all random streams, those that the module holds too, at one place, until `rewind`."""
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        for generator in self._state.generators:
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            elif isinstance(generator, np.random.Generator):
                generator.bit_generator.state = type(generator.bit_generator)(seed).state
            else:
                generator.seed(seed)

    def substitute(self, tensors: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Put tensors in the place of parameters, until `rewind`: in modules, and wherever else they are kept.

        LSTMs have a list of their weights, and so may a module of the user's. Until `rewind`, because checkpointed
        parts of a model run once more during backward.

        Args:
            tensors: Pairs of a parameter and what to use instead.
        """
        for parameter, tensor in tensors:
            for put in self._state.places.get(id(parameter), ()):
                put(tensor)

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Run a step: watch what it writes to, and let it log into the void. What it changes stays until `rewind`."""
        mutes: list[Any] = [Mute(logger) for logger in self._trainer.loggers]
        self._trainer.loggers = mutes
        for child in self._lightning_modules:
            # Of either namespace; the attribute hides the method and is removed with all other changes.
            child.__dict__.update(log=_nothing, log_dict=_nothing)
        with self._journal, torch.enable_grad():
            yield


class Mute:
    """Takes any call and any attribute and does nothing; stands for a logger and its experiment.

    Args:
        logger: Whose name and folders to tell, for steps that ask.
    """

    def __init__(self, logger: Any = None) -> None:
        for name in ("name", "version", "save_dir", "root_dir", "log_dir"):
            value = getattr(logger, name, None)
            if isinstance(value, (str, int, os.PathLike)):
                setattr(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Mute()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return Mute()

    def __getitem__(self, key: Any) -> Any:
        return Mute()

    def __setitem__(self, key: Any, value: Any) -> None:
        return

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __int__(self) -> int:
        return 0

    def __float__(self) -> float:
        return 0.0


def _nothing(*args: Any, **kwargs: Any) -> None:
    return


def _random_streams(module: nn.Module) -> list[Callable[[], object]]:
    """Actions that put each process-wide random stream back to where it is now."""
    streams: list[Callable[[], object]] = [
        functools.partial(torch.set_rng_state, torch.get_rng_state()),
        functools.partial(np.random.set_state, np.random.get_state()),
        functools.partial(random.setstate, random.getstate()),
    ]
    for device in {p.device for p in module.parameters()}:
        backend: Any = getattr(torch, device.type, None)
        if device.type == "mps":
            streams.append(functools.partial(torch.mps.set_rng_state, torch.mps.get_rng_state()))
        elif device.type != "cpu" and hasattr(backend, "get_rng_state"):
            streams.append(functools.partial(backend.set_rng_state, backend.get_rng_state(device), device))
    return streams


def _attributes_of_the_run(trainer: Trainer) -> Iterator[dict[Any, Any]]:
    loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop)
    schedulers = (config.scheduler for config in trainer.lr_scheduler_configs)
    loader = getattr(trainer, "train_dataloader", None)
    attributes = getattr(getattr(loader, "dataset", None), "__dict__", None)
    if isinstance(attributes, dict):
        yield attributes
    for owner in (trainer, *loops, trainer._logger_connector, *schedulers):
        yield vars(owner)
    yield trainer._logger_connector._callback_metrics
    for optimizer in trainer.optimizers:
        yield optimizer.state
        yield from (state for state in optimizer.state.values() if isinstance(state, dict))
        yield from optimizer.param_groups


def _small_memory(
    tensors: Iterable[Tensor], module: nn.Module
) -> list[tuple[torch.UntypedStorage, torch.UntypedStorage]]:
    """Copies of the plain tensors on the host that hold little: NumPy can write to them unseen."""
    held = list(module.parameters())
    known = {memory_of(tensor) for tensor in (*held, *(p.grad for p in held if p.grad is not None))}
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        pointer = memory_of(tensor)
        if pointer and pointer not in known and tensor.device.type == "cpu" and type(tensor) is Tensor:
            storage = tensor.untyped_storage()
            if storage.nbytes() <= _LITTLE:
                found[pointer] = storage
    return [(storage, storage.clone()) for storage in found.values()]  # type: ignore[no-untyped-call]


def _optimizer_tensors(trainer: Trainer) -> Iterator[Tensor]:
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            if isinstance(state, dict):
                yield from (value for value in state.values() if isinstance(value, Tensor))
