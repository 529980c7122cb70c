"""A stretch of a run in which the training step can be run again with nothing left behind."""

from __future__ import annotations

import contextlib
import functools
import random
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from dynwatch.callbacks.namespaces import LightningModule, Logger, Trainer
from dynwatch.callbacks.snapshot import Snapshot, WriteJournal

if TYPE_CHECKING:
    from typing_extensions import Self


class Sandbox:
    """Puts back whatever a training step changes: at `rewind`, and at the end, also when the step raised.

    That is random streams (torch, the device's, numpy, random, and generators that the module holds), buffers,
    parameters, gradients, attributes and containers of the module and all that it holds (metrics among it), and the
    trainer's own attributes. Meanwhile `self.log` does nothing and loggers swallow what they are given. What leaves
    the process cannot be taken back: files, prints, another logger's own connection.

    Args:
        trainer: The trainer.
        pl_module: Its module.
        batch: Tensors that the step may write to, beside the module's.
    """

    def __init__(self, trainer: Trainer, pl_module: LightningModule, batch: list[Tensor]) -> None:
        self._trainer = trainer
        self._module = pl_module
        self._batch = batch
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        trainer, module = self._trainer, self._module
        loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop)
        connector = trainer._logger_connector
        # What has a place of its own in the run is noted without looking into it.
        self._shallow = [(vars(owner), dict(vars(owner))) for owner in (trainer, *loops, connector)]
        self._shallow.append((connector._callback_metrics, dict(connector._callback_metrics)))
        self._state = Snapshot([module], skip=(type(trainer), Trainer, Logger))
        self._random = _random_streams(module)
        # Not left to the journal, because BatchNorm changes its statistics without saying so.
        self._buffers = [(b, b.detach().clone()) for b in module.buffers()]
        self._journal = WriteJournal([*self._state.tensors, *self._batch, *_optimizer_tensors(trainer)])
        self._undo.callback(self.rewind)
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def rewind(self) -> None:
        """Put everything back as it was when the sandbox was entered."""
        self._journal.restore()
        for buffer, before in self._buffers:
            _copy_bits(buffer, before)
        self._state.restore()
        for now, before_ in self._shallow:
            for name in now.keys() - before_.keys():
                del now[name]
            now.update(before_)
        for restore in self._random:
            restore()

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Run a step: watch what it writes to, and let it log into the void. What it changes stays until `rewind`."""
        mutes: list[Any] = [Mute() for _ in self._trainer.loggers]
        self._trainer.loggers = mutes
        for child in self._module.modules():
            # Of either namespace; the attribute hides the method and is removed with all other changes.
            if hasattr(child, "log_dict") and hasattr(child, "training_step"):
                child.__dict__.update(log=_nothing, log_dict=_nothing)
        with self._journal, torch.enable_grad():
            yield


class Mute:
    """Takes any call and any attribute and does nothing; stands for a logger and its experiment."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        return

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        return

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def _nothing(*args: Any, **kwargs: Any) -> None:
    return


def _copy_bits(tensor: Tensor, source: Tensor) -> None:
    with torch.no_grad():
        # Through .data, so that a graph that has saved this buffer does not take it for changed.
        tensor.data.copy_(source)


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


def _optimizer_tensors(trainer: Trainer) -> Iterator[Tensor]:
    for optimizer in trainer.optimizers:
        for state in optimizer.state.values():
            if isinstance(state, dict):
                yield from (value for value in state.values() if isinstance(value, Tensor))
