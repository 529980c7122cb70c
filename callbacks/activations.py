"""ReLU units that do not fire any more."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynwatch.activations import SilentUnits, units_that_fired
from dynwatch.callbacks.base import Monitor, isolated
from dynwatch.callbacks.namespaces import LightningModule, Trainer
from dynwatch.callbacks.panels import Chart
from dynwatch.callbacks.stream import Stream
from dynwatch.rules import tags
from dynwatch.rules.base import check_count

DEAD = tags.DEAD_UNITS


class ActivationMonitor(Monitor):
    """The share of each ReLU layer's units that have stopped firing.

    A unit that is at zero for every input gets no gradient and cannot come back by itself. The monitor
    looks at the outputs of `nn.ReLU` and `nn.ReLU6` modules during the training batches of a due step, micro-batches
    included; a unit that fired on none of the last `looks` due steps, on any rank, counts as dead. A module that is
    used several times in a forward pass counts as several layers. Of a layer with more than 256 units, 256 are
    looked at. Activations written as functions (`F.relu`) cannot be seen, and a compiled module is left alone,
    because a hook would make it compile again.

    Logs, when due:

    * `activation/dead/<layer>`: share of dead units of each ReLU module, by its name in the model; `<layer>.use2` for
      its second use in a forward pass.

    Args:
        every_n_steps: Cadence, in optimizer steps.
        looks: Due steps in a row without firing after which a unit counts as dead.
        max_layers: The most ReLU modules to look at, evenly spaced over the model.

    Raises:
        ValueError: For an argument out of bounds.

    Example:
        >>> monitor = ActivationMonitor(every_n_steps=20)
    """

    def __init__(self, every_n_steps: int = 50, looks: int = 5, max_layers: int = 32) -> None:
        super().__init__(every_n_steps)
        self.looks = check_count("looks", looks)
        self.max_layers = check_count("max_layers", max_layers)
        self._layers: dict[str, nn.Module] = {}
        self._handles: list[RemovableHandle] = []
        self._channels: frozenset[int] = frozenset()  # of the model's Conv1d layers
        self._features: frozenset[int] = frozenset()  # of its Linear layers
        self._uses: dict[str, int] = {}  # of each layer, in this forward pass
        self._forward = False  # not during backward, where checkpointing runs layers again
        self._fired: dict[str, Tensor] = {}
        self._silent: dict[str, SilentUnits] = {}

    def charts(self) -> Sequence[Chart]:
        if not self._layers:
            return ()
        return (Chart("dynwatch · activations", "Share of dead ReLU units by layer", (DEAD,)),)

    # --- on the training process

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        modules = dict(pl_module.named_modules())
        if any(type(m).__name__ == "OptimizedModule" or m._compiled_call_impl is not None for m in modules.values()):
            Stream.of(trainer).unavailable(DEAD[:-1], "the model is compiled")
            return
        names = [name for name, module in modules.items() if isinstance(module, (nn.ReLU, nn.ReLU6))]
        stride = -(-len(names) // self.max_layers)
        self._layers = {name: modules[name] for name in names[:: max(stride, 1)]}
        convolutions = (nn.Conv1d, nn.ConvTranspose1d)
        self._channels = frozenset(m.out_channels for m in modules.values() if isinstance(m, convolutions))
        self._features = frozenset(m.out_features for m in modules.values() if isinstance(m, nn.Linear))

    @isolated
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._uses.clear()
        self._forward = True
        if self._layers and not self._handles and self.is_due(trainer):
            for name, layer in self._layers.items():
                look = functools.partial(self._look, trainer, name)
                self._handles.append(layer.register_forward_hook(look))

    def _look(self, trainer: Trainer, name: str, layer: nn.Module, args: Any, output: Any) -> None:
        if layer.training and self._forward and type(output) is Tensor:
            self.guarded(trainer, self._note, name, output)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        super().on_before_backward(trainer, pl_module, loss)
        self._forward = not pl_module.automatic_optimization

    def _note(self, name: str, output: Tensor) -> None:
        use = self._uses[name] = self._uses.get(name, 0) + 1
        if use > 1:
            name = f"{name}.use{use}"
        # After a Conv1d channels come before positions, in a transformer they come last.
        if output.dim() == 3 and output.shape[1] in self._channels and output.shape[2] not in self._features:
            output = output.transpose(1, 2)
        with torch.no_grad():
            fired, before = units_that_fired(output), self._fired.get(name)
            if before is None or before.shape != fired.shape:
                self._fired[name] = fired
            else:
                before |= fired

    def end_step(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any) -> None:
        if not self._handles or trainer.fit_loop._should_accumulate():
            return
        self._unhook()
        stream, step = Stream.of(trainer), Stream.step(trainer)
        for name, fired in self._fired.items():
            stream.emit(self, step, _unit_tags(name, len(fired)), fired.float(), mean_over_ranks=True)
        self._fired.clear()

    # --- at a flush, on the host

    def finish(self, step: int, raw: Mapping[str, float]) -> Mapping[str, float]:
        name = next(iter(raw)).partition("\n")[0]
        silent = self._silent.setdefault(name, SilentUnits(self.looks))
        return {DEAD + (name or "relu"): silent.update([share > 0 for share in raw.values()])}

    # --- state

    def state(self) -> dict[str, Any]:
        return {name: silent.state_dict() for name, silent in self._silent.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        self._silent = {}
        for name, saved in state.items():
            self._silent[name] = SilentUnits(self.looks)
            self._silent[name].load_state_dict(saved)

    def release(self) -> None:
        self._unhook()
        self._fired.clear()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@functools.lru_cache(maxsize=256)
def _unit_tags(name: str, count: int) -> tuple[str, ...]:
    """Inner tags of a layer's units: the layer's name, a line break, the unit."""
    return tuple(f"{name}\n{unit}" for unit in range(count))
