"""ActivationMonitor on real runs with ReLU units that are alive, dead, shared, in place or out of reach."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.utils.checkpoint
from runs import Classifier, data, scalars, trainer
from torch import Tensor, nn

from dynwatch.callbacks import DynWatch, EarlyTermination
from dynwatch.callbacks.activations import DEAD, ActivationMonitor
from dynwatch.callbacks.stream import Stream

Scalars = dict[str, list[tuple[int, float]]]


class Rectified(Classifier):
    """An MLP with two ReLU layers; of the first, `dead` of 16 units have a bias that no input overcomes."""

    def __init__(self, dead: int = 0, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = net or nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU6(), nn.Linear(12, 4))
        with torch.no_grad():
            self.net[0].bias[:dead] = -1e3

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.net(batch[0] + 1e4)  # here every unit would fire


class Hooks(pl.Callback):
    """Counts forward hooks inside and after every batch; added after the monitor."""

    def __init__(self) -> None:
        self.during: list[int] = []
        self.after: list[int] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        self.during.append(hooks_on(pl_module))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        self.after.append(hooks_on(pl_module))


def hooks_on(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def fit(folder: Path, model: pl.LightningModule, *callbacks: Any, val: Any = None, **settings: Any) -> Scalars:
    """Train for 16 steps; the scalars of the activations."""
    trainer(folder, list(callbacks), **settings).fit(model, data(), val)
    for callback in callbacks:
        assert getattr(callback, "off", None) is None
    return {tag: values for tag, values in scalars(folder / "run").items() if tag.startswith(DEAD)}


def every_step(looks: int = 3, **arguments: Any) -> ActivationMonitor:
    return ActivationMonitor(every_n_steps=1, looks=looks, **arguments)


@pytest.mark.parametrize(("dead", "least"), [(16, 1.0), (4, 0.25), (0, 0.0)])
def test_the_share_of_dead_units(dead: int, least: float, tmp_path: Path) -> None:
    """Units below zero for every input count from the third look on, in the layer where they are; others do not."""
    found = fit(tmp_path, Rectified(dead), every_step())
    assert found.keys() == {DEAD + "net.1", DEAD + "net.3"}
    steps, shares = zip(*found[DEAD + "net.1"], strict=True)
    assert steps == tuple(range(16)) and shares[:2] == (0, 0)
    assert all(least <= share <= least + 0.2 for share in shares[2:])


def test_the_docstring_has_the_tag(tmp_path: Path) -> None:
    """What it promises to log is what stands in the event file, when due and only then."""
    (promised,) = re.findall(r"\* `([^`]+)<layer>`", ActivationMonitor.__doc__ or "")
    found = fit(tmp_path, Rectified(), ActivationMonitor(every_n_steps=5))
    assert promised == DEAD
    assert {tag: [step for step, _ in values] for tag, values in found.items()} == {
        promised + layer: [4, 9, 14] for layer in ("net.1", "net.3")
    }


def test_dead_layers_warns(tmp_path: Path) -> None:
    """Under DynWatch a dead layer has its warning, with its name, and the run goes on."""
    watch = DynWatch(activations=every_step(), stop=EarlyTermination(), report=False)
    model = Rectified(16)
    model.net[2].bias.requires_grad_(False)
    fit(tmp_path, model, watch)
    reasons = [verdict.reason for _, verdict in watch.early_termination.verdicts if verdict.rule == "dead_layers"]
    assert any("100% of the ReLU units of net.1 do not fire any more" in reason for reason in reasons)
    assert "stop/dead_layers" in scalars(tmp_path / "run")


def test_units_of_a_convolution_are_channels(tmp_path: Path) -> None:
    """Of four channels one is dead everywhere: a quarter, however large the image."""
    body = nn.Sequential(nn.Conv1d(1, 4, 3), nn.Unflatten(2, (2, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4))
    with torch.no_grad():
        body[0].bias[:] = torch.tensor([-1e3, 9.0, 9.0, 9.0])
    model = Rectified()
    model.lr, model.net = 1e-5, nn.Sequential(nn.Unflatten(1, (1, 8)), *body)
    found = fit(tmp_path, model, every_step())
    assert found == {DEAD + "net.3": [(step, 0.0 if step < 2 else 0.25) for step in range(16)]}


def test_a_shared_module(tmp_path: Path) -> None:
    """One ReLU that two layers use is two rows, so that a dead first use is not hidden by the second."""
    relu = nn.ReLU()
    net = nn.Sequential(nn.Linear(8, 16), relu, nn.Linear(16, 16), relu, nn.Linear(16, 4))
    model = Rectified(16, net)  # the first use is dead
    with torch.no_grad():
        net[2].bias[:] = torch.tensor([9.0] * 12 + [-1e3] * 4)
    found = fit(tmp_path, model, every_step())
    shares = {"net.1": 1.0, "net.1.use2": 0.25}
    assert found == {DEAD + use: [(i, 0.0 if i < 2 else share) for i in range(16)] for use, share in shares.items()}


class Convolved(Classifier):
    """A convolution over a sequence of 8; four of six channels are dead."""

    def __init__(self) -> None:
        super().__init__(lr=1e-6)
        conv = nn.Conv1d(1, 6, 3, padding=1)
        self.net = nn.Sequential(nn.Unflatten(1, (1, 8)), conv, nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
        with torch.no_grad():
            conv.bias[:] = torch.tensor([9.0, 9.0, -1e3, -1e3, -1e3, -1e3])


def test_channels_of_a_sequence(tmp_path: Path) -> None:
    """After a Conv1d the units are its channels, not the positions."""
    found = fit(tmp_path, Convolved(), every_step())
    assert found[DEAD + "net.2"][-1][1] == pytest.approx(2 / 3)


class Checkpointed(Rectified):
    """Runs its network again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.net, x, use_reentrant=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def test_checkpointing_makes_no_second_use(tmp_path: Path) -> None:
    """What is run again for the backward pass is not another layer."""
    found = fit(tmp_path, Checkpointed(16), every_step())
    assert list(found) == [DEAD + "net.1", DEAD + "net.3"]


def test_in_place(tmp_path: Path) -> None:
    """A ReLU that writes into its input is seen like another, and the weights end with the same bits."""
    ends, shares = [], []
    for inplace in (False, True):
        for callbacks in ([every_step()], []):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace), nn.Linear(16, 4))
            model = Rectified(4, net)
            shares.append(fit(tmp_path / f"{inplace}{len(callbacks)}", model, *callbacks))
            ends.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
    assert all(torch.equal(end, ends[0]) for end in ends)
    assert shares[0] == shares[2] and len(shares[0][DEAD + "net.1"]) == 16


class OnlyInOne(Rectified):
    """All units of the first layer fire in the first micro-batch of a window of two, and none in the second."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.net[0].bias[:] = 1e3 if batch_idx % 2 == 0 else -1e3
        return super().training_step(batch, batch_idx)


def test_accumulation(tmp_path: Path) -> None:
    """A unit that fires in any micro-batch of the window is alive."""
    found = fit(tmp_path, OnlyInOne(), every_step(looks=1), accumulate_grad_batches=2)
    assert found[DEAD + "net.1"] == [(step, 0.0) for step in range(8)]
    found = fit(tmp_path / "single", OnlyInOne(), every_step(looks=1))
    assert found[DEAD + "net.1"] == [(step, float(step % 2)) for step in range(16)]


def test_validation_is_not_looked_at(tmp_path: Path) -> None:
    """Units that would fire on validation data alone stay dead, also with validation inside a window."""
    found = fit(tmp_path, Rectified(16), every_step(), val=data(8), accumulate_grad_batches=2, val_check_interval=3)
    assert [share for _, share in found[DEAD + "net.1"]] == [0, 0, *[1] * 6]


# --- hooks


def test_hooks_are_there_on_due_steps_only(tmp_path: Path) -> None:
    """Two hooks during a due step, none after it and none in other steps."""
    hooks, model = Hooks(), Rectified()
    fit(tmp_path, model, ActivationMonitor(every_n_steps=4), hooks)
    assert hooks.during == [2 if (step + 1) % 4 == 0 else 0 for step in range(16)]
    assert set(hooks.after) == {0} and hooks_on(model) == 0


def test_hooks_go_when_the_run_fails(tmp_path: Path) -> None:
    """An exception of the user's inside a due step leaves no hook."""

    class Fails(Rectified):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 5:
                assert hooks_on(self) == 2
                raise RuntimeError("the user's own")
            return loss

    model = Fails()
    with pytest.raises(RuntimeError, match="the user's own"):
        fit(tmp_path, model, every_step())
    assert hooks_on(model) == 0


def test_a_stop_leaves_no_hook(tmp_path: Path) -> None:
    """Nor does a verdict that ends the run in the middle of an accumulation window's epoch."""
    model = Rectified()
    model.bad_at = 3
    watch = DynWatch(activations=every_step(), report=False)
    fit(tmp_path, model, watch, accumulate_grad_batches=3)
    assert watch.verdict.rule == "non_finite" and hooks_on(model) == 0


# --- nothing to see


class Charts(pl.Callback):
    """Notes the stream's charts and reasons while they are known."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.titles = [chart.title for chart in Stream.of(trainer).charts()]
        self.reasons = dict(Stream.of(trainer).reasons)


def _wrapped(model: Rectified) -> None:
    model.net = torch.compile(model.net, backend="eager")


def _in_place(model: Rectified) -> None:
    model.net[0].compile(backend="eager")


@pytest.mark.parametrize("compiled", [_wrapped, _in_place])
def test_a_compiled_model_is_left_alone(compiled: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No hook, no tag, no chart, and the report says why."""
    model, hooks, charts = Rectified(), Hooks(), Charts()
    compiled(model)
    found = fit(tmp_path, model, DynWatch(activations=every_step()), hooks, charts)
    assert found == {} and set(hooks.during) == {0}
    assert charts.reasons["activation/dead"] == "the model is compiled"
    assert "Share of dead ReLU units by layer" not in charts.titles
    assert "activation/dead: not available: the model is compiled." in capsys.readouterr().out


def test_a_model_without_relu(tmp_path: Path) -> None:
    """There is no tag, no chart and nothing to explain."""
    charts = Charts()
    assert fit(tmp_path / "a", Classifier(), every_step(), charts) == {}
    assert charts.reasons == {} and "Share of dead ReLU units by layer" not in charts.titles
    fit(tmp_path / "b", Rectified(), every_step(), charts)
    assert "Share of dead ReLU units by layer" in charts.titles


def test_many_layers_are_sampled(tmp_path: Path) -> None:
    """At most max_layers are looked at, evenly spaced, from the first on."""
    net = nn.Sequential(nn.Linear(8, 8), *[nn.ReLU() for _ in range(9)], nn.Linear(8, 4))
    found = fit(tmp_path, Rectified(net=net), every_step(max_layers=3))
    assert found.keys() == {DEAD + f"net.{at}" for at in (1, 4, 7)}


# --- again, and arguments


def test_its_state_goes_into_a_checkpoint(tmp_path: Path) -> None:
    """A resumed run counts the looks on, so that its shares are those of the run without a break."""
    whole = fit(tmp_path / "whole", Rectified(16), every_step(looks=12), max_epochs=2)
    first = trainer(tmp_path / "first", [every_step(looks=12)], max_epochs=1)
    torch.manual_seed(1)
    first.fit(Rectified(16), data())
    first.save_checkpoint(tmp_path / "half.ckpt")
    second = trainer(tmp_path / "second", [every_step(looks=12)], max_epochs=2)
    second.fit(Rectified(16), data(), ckpt_path=tmp_path / "half.ckpt", weights_only=False)
    resumed = scalars(tmp_path / "second" / "run")[DEAD + "net.1"]
    assert resumed == whole[DEAD + "net.1"][8:]
    assert [share for _, share in resumed] == [0.0] * 3 + [1.0] * 5


def test_a_second_run_starts_afresh(tmp_path: Path) -> None:
    """Looks of an earlier fit with the same callback do not count."""
    monitor = every_step(looks=5)
    for folder in ("a", "b"):
        found = fit(tmp_path / folder, Rectified(16), monitor)
        assert [share for _, share in found[DEAD + "net.1"]] == [0.0] * 4 + [1.0] * 12


@pytest.mark.parametrize("argument", ["every_n_steps", "looks", "max_layers"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "5", None])
def test_arguments_out_of_bounds(argument: str, value: Any) -> None:
    """Each is refused with its name, its value and the bound."""
    with pytest.raises(ValueError, match=re.escape(f"{argument}={value!r} must be a whole number")):
        ActivationMonitor(**{argument: value})


def test_dynwatch_takes_its_own_kind_only() -> None:
    """A part of another kind is refused where it is given."""
    with pytest.raises(ValueError, match="activations='yes' must be True, False or an instance of ActivationMonitor"):
        DynWatch(activations="yes")
