"""Replays leave no trace: a run with them ends as one without, bit for bit."""

from __future__ import annotations

import copy
import io
import random
import types
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import runs
import torch
from bits import differences, train_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassRecall

from dynwatch.callbacks.replay import Replay
from dynwatch.callbacks.snapshot import CannotReplayError


class Step(pl.LightningModule):
    """A small net whose step does something else as well (`change`), which goes into the checkpoint (`noted`)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        x = self.change(x)
        return cross_entropy(self.net(x), y)

    def change(self, x: Tensor) -> Tensor:
        return x

    def noted(self) -> Any:
        return None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["noted"] = copy.deepcopy(self.noted())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class Draws(Step):
    def __init__(self) -> None:
        super().__init__()
        self.own = random.Random(1), np.random.default_rng(2), torch.Generator().manual_seed(3)
        self.body = nn.Dropout(0.5)

    def change(self, x: Tensor) -> Tensor:
        noise = random.random() + np.random.rand() + float(torch.rand(()))
        noise += self.own[0].random() + self.own[1].random() + float(torch.rand((), generator=self.own[2]))
        return self.body(x + 0.1 * noise)

    def noted(self) -> Any:
        return [self.own[0].getstate(), repr(self.own[1].bit_generator.state), self.own[2].get_state()]


class Slots:
    __slots__ = ("steps",)

    def __init__(self) -> None:
        self.steps = 0


class Containers(Step):
    totals: list[float] = []  # noqa: RUF012 - as users write it

    def __init__(self) -> None:
        super().__init__()
        type(self).totals = []
        self.losses: list[Tensor] = []
        self.by_name: dict[str, list[int]] = {"a": []}
        self.queue: deque[int] = deque(maxlen=3)
        self.seen: set[int] = set()
        self.counts: Counter[str] = Counter()
        self.sums = np.zeros(2)
        self.slots = Slots()
        self.steps = 0

    def change(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.totals.append(x.sum().item())
        self.losses.append(x.sum())
        self.by_name["a"].append(self.steps)
        self.by_name[f"step {self.steps}"] = []
        self.queue.append(self.steps)
        self.seen.add(self.steps)
        self.counts.update(["step"])
        self.sums += self.steps
        self.slots.steps += 1
        return x * (1 + 0.01 * self.steps)

    def noted(self) -> Any:
        more = [self.totals, self.losses, self.by_name, list(self.queue), sorted(self.seen), dict(self.counts)]
        return [*more, self.sums, self.slots.steps, self.steps]


class Queues(Step):
    """One queue is replaced, one written to, one is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("replaced", torch.zeros(4))
        self.register_buffer("written", torch.zeros(4))
        self.plain = torch.zeros(4)

    def change(self, x: Tensor) -> Tensor:
        newest = x.mean().reshape(1)
        self.replaced = torch.cat([newest, self.replaced[:-1]])
        self.written[int(self.written.count_nonzero()) % 4] = newest
        self.plain.roll(1).mul_(2)
        self.plain.data[0] += 1
        return x * (1 + 0.1 * (self.replaced.sum() + self.written.sum() + self.plain.sum()))

    def noted(self) -> Any:
        return self.plain


class Nested(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.metrics = MetricCollection([MulticlassAccuracy(3), MulticlassRecall(3)])
        self.mean = MeanMetric()

    def training_step(self, x: Tensor, y: Tensor) -> None:
        self.metrics(x.flatten(1)[:, :3], y)
        self.mean.update(x)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log_dict({f"nested/{name}": metric for name, metric in self.metrics.items()}, on_epoch=True)


class Logs(Step):
    """Logs in every way; the names of nested modules need the trainer's help."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Nested()
        self.accuracy = MulticlassAccuracy(3)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x)
        self.child._trainer, self.child._current_fx_name = self.trainer, "training_step"
        self.child.training_step(x, y)
        self.accuracy(logits, y)
        loss = cross_entropy(logits, y)
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True)
        self.log_dict({"loss": loss, "twice": 2 * loss}, on_step=True, on_epoch=True, prog_bar=True)
        self.logger.experiment.add_scalar("direct", loss, self.global_step)
        self.logger.log_metrics({"by_logger": loss.item()}, step=self.global_step)
        assert isinstance(self.logger.log_dir, str)
        return loss

    def noted(self) -> Any:
        metrics = [self.accuracy, self.child.mean, *self.child.metrics.values()]
        return [(metric._update_count, metric.metric_state, metric._computed) for metric in metrics]


class Teacher(Step):
    """A teacher follows the net, in every way in which one writes that."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)

    def change(self, x: Tensor) -> Tensor:
        pairs = list(zip(self.teacher.parameters(), self.net.parameters(), strict=True))
        with torch.no_grad():
            for mean, now in pairs:
                mean.mul_(0.9).add_(now, alpha=0.1)
                mean.lerp_(now, 0.1)
            torch._foreach_mul_([mean for mean, _ in pairs], 0.99)
        pairs[0][0].data.mul_(0.9)
        pairs[1][0].data = pairs[1][0].data + 0.1 * pairs[1][1].data
        with torch.no_grad():
            return x + 0.1 * self.teacher(x).mean()


class Clamped(Step):
    def change(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            for p in self.net.parameters():
                p.clamp_(-0.05, 0.05)
        return x


class Embedded(Step):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 64, max_norm=0.5)

    def change(self, x: Tensor) -> Tensor:
        return x + self.embedding(torch.arange(8)).reshape(8, 1, 8, 8)


class Normed(Step):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.BatchNorm2d(1), nn.Dropout(0.2))
        self.net[1] = nn.utils.spectral_norm(self.net[1])
        self.net[3] = nn.utils.parametrizations.spectral_norm(self.net[3])

    def change(self, x: Tensor) -> Tensor:
        return self.norm(x)


class Hooked(Step):
    def __init__(self) -> None:
        super().__init__()
        self.shares = self.watch()

    def watch(self) -> Callable[[], Any]:
        calls, found = 0, []

        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            found.append(output.mean().item())
            return output * (1 + 0.01 * calls)

        self.net[2].register_forward_hook(hook)
        return lambda: (calls, list(found))

    def noted(self) -> Any:
        return self.shares()


class Stops(Step):
    """Reaches into the run: asks for its end in a step, and changes learning rates."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def change(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls >= 9:
            self.trainer.should_stop = True
        for group in self.optimizers().param_groups:
            group["lr"] *= 0.95
        for p in self.net.parameters():
            p.requires_grad_(True)
        self.toggle_optimizer(self.optimizers())
        self.optimizers().state[f"step {self.calls}"] = {"seen": True}
        self.net[2].train(not self.net[2].training)
        return x


class Batch(Step):
    """Changes what it is given."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x = batch.pop(0).mul_(2).sub_(0.1)
        return cross_entropy(self.net(x), batch.pop())


class Meter:
    """A plain object of the user's."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[float] = []


_RNG = np.random.default_rng(0)
_LOSSES: list[float] = []
_TOTAL = 0.0


def mixed(x: Tensor) -> Tensor:
    """A helper in the same file, with a generator of the file."""
    return x * float(_RNG.uniform(0.9, 1.1))


class Outside(Step):
    """Changes what stands outside of the object: variables of the file and of the class, memory through NumPy."""

    meter = Meter()

    def __init__(self) -> None:
        super().__init__()
        self.bank = torch.zeros(3)
        self.text = io.StringIO()
        _RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state
        _LOSSES.clear()
        type(self).meter = Meter()

    def change(self, x: Tensor) -> Tensor:
        global _TOTAL
        _TOTAL = len(_LOSSES) + 1.0
        _LOSSES.append(_TOTAL)
        self.meter.count += 1
        self.meter.sums.append(float(self.meter.count))
        self.bank.numpy()[:] += 1
        self.text.write("step ")
        return mixed(x) + 0.01 * _LOSSES[-1] + 0.01 * self.bank.mean()

    def noted(self) -> Any:
        generator = _RNG.bit_generator.state
        return _TOTAL, list(_LOSSES), vars(self.meter), self.bank, self.text.getvalue(), generator


CHANGES: dict[str, tuple[type[pl.LightningModule], dict[str, Any]]] = {
    "draws": (Draws, {}),
    "containers": (Containers, {}),
    "queues": (Queues, {}),
    "logs": (Logs, {}),
    "teacher": (Teacher, {}),
    "clamped": (Clamped, {}),
    "embedded": (Embedded, {}),
    "normed": (Normed, {}),
    "hooked": (Hooked, {}),
    "stops": (Stops, {}),
    "outside": (Outside, {}),
    "accumulated": (Draws, {"accumulate_grad_batches": 4}),
    "bf16": (Draws, {"precision": "bf16-mixed"}),
}


class Replays(pl.Callback):
    """Replays each batch several ways and looks whether the step is a function of its parameters."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = [tensor.clone() for tensor in batch]  # a step may change its batch

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        with Replay(trainer, pl_module, self.batch, batch_idx) as replay:
            leaves = replay.leaves()
            first = replay.loss(leaves)
            gradients = torch.autograd.grad(first, list(leaves.values()), allow_unused=True)
            second = replay.loss(None)
            assert second.item() == first.item()
            shift = {name: torch.full_like(p, 0.1) for name, p in replay.parameters.items()}
            there = replay.gradient(shift)
            assert all(torch.equal(g, there[name]) for name, g in replay.gradient(shift).items())
            again = replay.gradient()
            for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
                assert torch.equal(again[name], torch.zeros_like(leaf) if gradient is None else gradient)
            assert any(not torch.equal(again[name], there[name]) for name in again)
        self.losses.append(first.item())


class Naive(pl.Callback):
    """Runs the step once more, with everything that this does."""

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.batch = [tensor.clone() for tensor in batch]

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module._current_fx_name = "training_step"
        pl_module.training_step(self.batch, batch_idx)


@pytest.mark.parametrize("kind", CHANGES)
def test_a_replay_changes_no_bit(kind: str, tmp_path: Path) -> None:
    """A run with replays ends as one without; one in which the step merely runs again does not."""
    model, settings = CHANGES[kind]
    bare = train_model(model, settings, tmp_path / "bare")
    replays = Replays()
    assert differences(bare, train_model(model, settings, tmp_path / "replayed", replays)) == []
    assert len(replays.losses) >= 8
    assert np.isfinite(replays.losses).all()
    if kind != "clamped":  # clamping twice is clamping
        assert bare[0] != train_model(model, settings, tmp_path / "naive", Naive())[0]


# A module, so that a replay does not put it back.
_COUNTDOWN: Any = types.ModuleType("countdown")
_COUNTDOWN.evaluations = 0


class Failing(Draws):
    """Raises in the middle of its step when it is told to."""

    def change(self, x: Tensor) -> Tensor:
        x = super().change(x.mul_(2))
        self.net[1].weight.data.mul_(0.9)
        _COUNTDOWN.evaluations -= 1
        if _COUNTDOWN.evaluations == 0:
            raise ZeroDivisionError
        return x


class Fails(pl.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        _COUNTDOWN.evaluations = self.at
        with pytest.raises(ZeroDivisionError), Replay(trainer, pl_module, batch, batch_idx) as replay:
            for _ in range(self.at):
                replay.gradient()
        assert _COUNTDOWN.evaluations == 0


@pytest.mark.parametrize("at", [1, 3])
def test_a_step_that_raises_leaves_nothing_behind(at: int, tmp_path: Path) -> None:
    """At the first evaluation or at a later one: streams, weights and settings of PyTorch are as before."""
    bare = train_model(Failing, {}, tmp_path / "bare")
    assert differences(bare, train_model(Failing, {}, tmp_path / "failed", Fails(at))) == []
    assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cudnn.enabled
    assert torch.is_grad_enabled()


class Held(pl.Callback):
    """A callback and a data module of the user's that the step changes."""

    def __init__(self) -> None:
        self.n = 0


class Data(pl.LightningDataModule):
    def __init__(self, iterates: bool = False) -> None:
        super().__init__()
        self.difficulty = 0
        self.unlabelled = iter(range(1000)) if iterates else None

    def train_dataloader(self) -> Any:
        return runs.data()


class Curriculum(runs.Classifier):
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        held = next(each for each in self.trainer.callbacks if isinstance(each, Held))
        held.n += 1
        self.trainer.datamodule.difficulty += 1
        if self.trainer.datamodule.unlabelled is not None:
            next(self.trainer.datamodule.unlabelled)
        return super().training_step([batch[0] * (1 + 0.01 * held.n), batch[1]], batch_idx)


def test_data_modules_and_callbacks_are_put_back(tmp_path: Path) -> None:
    """What the step changes in them is as before the replay."""
    held, data, replays = Held(), Data(), Replays()
    runs.trainer(tmp_path, [held, replays]).fit(Curriculum(), datamodule=data)
    assert (held.n, data.difficulty) == (16, 16) and len(replays.losses) == 16


def test_an_iterator_of_the_data_module_is_refused(tmp_path: Path) -> None:
    """By its name, before anything is drawn from it."""
    found = []

    class Refused(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            with pytest.raises(CannotReplayError, match=r"trainer\.datamodule\.unlabelled is an iterator"):
                Replay(trainer, pl_module, batch, batch_idx).__enter__()
            found.append(batch_idx)

    data = Data(iterates=True)
    runs.trainer(tmp_path, [Held(), Refused()]).fit(Curriculum(), datamodule=data)
    assert len(found) == 16 and next(data.unlabelled) == 16


def test_one_that_cannot_be_put_back_does_not_keep_the_rest(tmp_path: Path) -> None:
    """A container that refuses to be changed is told; all others, and the user's self.log, are as before."""

    class Odd(runs.Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = [0]
            self.odd = Unrestorable()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.seen.append(batch_idx)
            self.odd.value += 1
            return super().training_step(batch, batch_idx)

    class Unrestorable:
        __slots__ = ("_value", "replaying")

        def __init__(self) -> None:
            object.__setattr__(self, "_value", 0)

        @property
        def value(self) -> int:
            return self._value

        @value.setter
        def value(self, value: int) -> None:
            object.__setattr__(self, "_value", value)

    told = []

    class Sees(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            replay = Replay(trainer, pl_module, batch, batch_idx)
            replay.__enter__()
            replay.loss(replay.leaves())
            replay._sandbox._state._undo.insert(0, (_fails,))
            with pytest.raises(ZeroDivisionError):
                replay.__exit__(None, None, None)
            assert len(pl_module.seen) == len(told) + 2 and pl_module.odd.value == len(told) + 1
            assert "log" not in vars(pl_module)
            told.append(batch_idx)

    runs.trainer(tmp_path, [Sees()]).fit(Odd(), runs.data())
    assert len(runs.scalars(tmp_path / "run")["train_loss"]) == len(told) == 16


def _fails() -> None:
    raise ZeroDivisionError
