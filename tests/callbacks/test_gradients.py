"""GradientNormMonitor against oracles that keep whole gradients and weights in float64."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BackboneFinetuning
from pytorch_lightning.plugins.precision import MixedPrecision
from runs import Classifier, data, scalars, trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dynwatch.callbacks import DynWatch, EarlyTermination, GradientNormMonitor
from dynwatch.callbacks.panels import layout

Tensors = dict[str, Tensor]


class Oracle(pl.Callback):
    """Keeps copies: gradients before and after clipping, weights before and after the update."""

    def __init__(self) -> None:
        self.raw: list[Tensors] = []  # by optimizer step
        self.clipped: list[Tensors] = []
        self.before: list[Tensors] = []
        self.after: list[Tensors] = []
        self.backward: list[Tensors] = []  # p.grad after each backward

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.backward.append(_gradients(pl_module))

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.raw.append(_gradients(pl_module))
        self.before.append({name: p.detach().double().clone() for name, p in pl_module.named_parameters()})

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.clipped.append(_gradients(pl_module))
            self.after.append({name: p.detach().double().clone() for name, p in pl_module.named_parameters()})


def _gradients(module: nn.Module) -> Tensors:
    dense = ((name, p.grad.to_dense() if p.grad is not None else None) for name, p in module.named_parameters())
    return {name: grad.double().clone() for name, grad in dense if grad is not None}


def norm(tensors: Tensors, p: float = 2.0, under: str = "") -> float:
    """The p-norm of all entries of the tensors whose name begins with `under`."""
    entries = torch.cat([t.flatten() for name, t in tensors.items() if name.startswith(under)]).abs()
    return float(entries.max() if math.isinf(p) else entries.pow(p).sum().pow(1 / p))


def watched(
    folder: Path, model: pl.LightningModule, monitor: GradientNormMonitor, loader: Any = None, **settings: Any
) -> tuple[dict[str, list[tuple[int, float]]], Oracle]:
    """Train with a monitor and an oracle; returns the scalars that are in the event file, and the oracle."""
    oracle = Oracle()
    trainer(folder, [oracle, monitor], **settings).fit(model, data() if loader is None else loader)
    assert monitor.off is None
    return scalars(folder / "run"), oracle


def every_step(**arguments: Any) -> GradientNormMonitor:
    return GradientNormMonitor(every_n_steps=1, update_ratio_every_n_steps=1, **arguments)


def values(readings: list[tuple[int, float]]) -> list[float]:
    return [value for _, value in readings]


# --- totals and clipping


@pytest.mark.parametrize("bound", [None, 0.5])
def test_readings_equal_those_of_a_hand_written_loop(bound: float | None, tmp_path: Path) -> None:
    """Total, clipped, layer norms and update ratios are those of plain PyTorch without Lightning."""
    model = Classifier()
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    net.load_state_dict(model.net.state_dict())
    events, _ = watched(tmp_path, model, every_step(), gradient_clip_val=bound, max_epochs=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step, (x, y) in enumerate(data()):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        raw = _gradients(net)
        assert events["grad_norm/total"][step] == (step, pytest.approx(norm(raw), rel=1e-6))
        assert events["grad_norm/layer/net.0"][step][1] == pytest.approx(norm(raw, under="0"), rel=1e-6)
        if bound:
            nn.utils.clip_grad_norm_(net.parameters(), bound)
        assert events["grad_norm/clipped"][step][1] == pytest.approx(norm(_gradients(net)), rel=1e-5)
        before = {name: p.detach().double().clone() for name, p in net.named_parameters()}
        optimizer.step()
        change = {name: p.detach().double() - before[name] for name, p in net.named_parameters()}
        for layer in ("0", "2"):
            expected = norm(change, under=layer) / norm(before, under=layer)
            assert events[f"update_ratio/net.{layer}"][step][1] == pytest.approx(expected, rel=1e-5)
    assert len(events["grad_norm/total"]) == 8


class OwnClipping(Classifier):
    """Halves the gradient of its last layer, its own way of clipping."""

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        for p in self.net[2].parameters():
            p.grad.mul_(0.5)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize(
    ("model_class", "settings"),
    [
        (Classifier, {"gradient_clip_val": 0.6}),
        (Classifier, {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
        (OwnClipping, {}),
    ],
    ids=["norm", "value", "overridden"],
)
def test_clipping_is_what_the_gradients_show(
    model_class: type[Classifier], settings: dict[str, Any], norm_type: float, tmp_path: Path
) -> None:
    """Total, clipped and the share of clipped readings follow the gradients before and after, in any norm."""
    events, oracle = watched(tmp_path, model_class(), every_step(norm_type=norm_type), **settings)
    totals = [norm(raw, norm_type) for raw in oracle.raw]
    clipped = [norm(after, norm_type) for after in oracle.clipped]
    assert values(events["grad_norm/total"]) == pytest.approx(totals, rel=1e-5)
    assert values(events["grad_norm/clipped"]) == pytest.approx(clipped, rel=1e-5)
    acted = [after < 0.9999 * total for total, after in zip(totals, clipped, strict=True)]
    assert any(acted)
    share = [sum(acted[: n + 1]) / (n + 1) for n in range(len(acted))]
    assert values(events["grad_norm/clip_fraction"]) == pytest.approx(share, rel=1e-6)
    heads = [norm(raw, norm_type, under="net.2") for raw in oracle.raw]
    assert values(events["grad_norm/layer/net.2"]) == pytest.approx(heads, rel=1e-5)


def test_without_clipping_nothing_counts_as_clipped(tmp_path: Path) -> None:
    """A run that does not clip has clipped = total exactly, and a share of 0; a bound out of reach likewise."""
    for bound in (None, 1e6):
        events, _ = watched(tmp_path / str(bound), Classifier(), every_step(), gradient_clip_val=bound)
        assert events["grad_norm/clipped"] == events["grad_norm/total"]
        assert set(values(events["grad_norm/clip_fraction"])) == {0.0}


def test_nonfinite_is_the_share_of_bad_entries(tmp_path: Path) -> None:
    """Three bad entries of the 212 in the gradient are 3/212, and the total says that something is wrong."""
    model = Classifier()

    def spoil(gradient: Tensor) -> Tensor:
        gradient = gradient.clone()
        gradient[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
        return gradient

    model.net[2].weight.register_hook(spoil)
    events, _ = watched(tmp_path, model, every_step(), max_steps=1)
    entries = sum(p.numel() for p in model.parameters())
    assert values(events["grad_norm/nonfinite"]) == pytest.approx([3 / entries])
    assert not math.isfinite(events["grad_norm/total"][0][1])
    assert math.isfinite(events["grad_norm/layer/net.0"][0][1])


# --- steps


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3}], ids=["plain", "accumulation"])
@pytest.mark.parametrize("cadence", [1, 2, 3])
def test_readings_stand_at_the_steps_of_the_users_own_logs(
    settings: dict[str, Any], cadence: int, tmp_path: Path
) -> None:
    """At equal cadence a reading has the step of `self.log` for the same batch, in all epochs."""
    events, _ = watched(
        tmp_path, Classifier(), GradientNormMonitor(cadence), max_epochs=3, log_every_n_steps=cadence, **settings
    )
    # With accumulation Lightning repeats a step once for each micro-batch.
    logged = sorted({step for step, _ in events["train_loss"]})
    assert logged
    assert [step for step, _ in events["grad_norm/total"]] == logged


def test_a_layer_that_is_unfrozen_later_joins(tmp_path: Path) -> None:
    """Lightning's own BackboneFinetuning: the backbone is drawn from its first gradient on, also by a pattern."""

    class Tuned(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.net = self.net[:2], self.net[2:]

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return torch.nn.functional.cross_entropy(self.net(self.backbone(x)), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    for number, layers in enumerate((None, ["backbone"])):
        tuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
        folder = tmp_path / str(number)
        trainer(folder, [tuning, every_step(layers=layers)]).fit(Tuned(), data())
        events = scalars(folder / "run")
        assert [step for step, _ in events["grad_norm/layer/backbone.0"]] == list(range(8, 16))
        assert ("grad_norm/layer/net.2" in events) == (layers is None)


def test_update_ratios_have_their_own_cadence(tmp_path: Path) -> None:
    """With every_n_steps=2 and ratios every 3 steps, norms come at 1, 3, 5, … and ratios at 2, 5, 8, …."""
    events, _ = watched(tmp_path, Classifier(), GradientNormMonitor(2, update_ratio_every_n_steps=3))
    assert [step for step, _ in events["grad_norm/total"]] == [1, 3, 5, 7, 9, 11, 13, 15]
    assert [step for step, _ in events["update_ratio/net.0"]] == [2, 5, 8, 11, 14]


def test_update_ratios_can_be_turned_off(tmp_path: Path) -> None:
    """update_ratio_every_n_steps=0 takes none."""
    events, _ = watched(tmp_path, Classifier(), GradientNormMonitor(1, update_ratio_every_n_steps=0))
    assert not [tag for tag in events if tag.startswith("update_ratio/")]


# --- layers, and which parameters count


def test_layers_chooses_by_pattern(tmp_path: Path) -> None:
    """Only layers whose parameters match are drawn, none for an empty list; the total stays that of all."""
    for patterns, expected in (["2"], ["net.2"]), ([], []):
        events, oracle = watched(tmp_path / str(patterns), Classifier(), every_step(layers=patterns))
        for prefix in ("grad_norm/layer/", "update_ratio/"):
            assert [tag for tag in events if tag.startswith(prefix)] == [prefix + name for name in expected]
        assert events["grad_norm/total"][0][1] == pytest.approx(norm(oracle.raw[0]), rel=1e-6)


class LowRank(Classifier):
    """A frozen network with a small trained addition, as LoRA has it; one adapter is not used at all."""

    def __init__(self) -> None:
        super().__init__()
        self.net.requires_grad_(False)
        self.down = nn.Linear(8, 2, bias=False)
        self.up = nn.Linear(2, 4, bias=False)
        self.unused = nn.Linear(3, 3)
        nn.init.zeros_(self.up.weight)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x) + self.up(self.down(x)), y)


def test_frozen_and_unused_layers_are_left_out(tmp_path: Path) -> None:
    """Of a LoRA-like model only the adapters with a gradient are drawn, and the total is theirs."""
    events, oracle = watched(tmp_path, LowRank(), every_step())
    drawn = {tag for tag in events if tag.startswith("grad_norm/layer/")}
    assert drawn == {"grad_norm/layer/down", "grad_norm/layer/up"}
    assert values(events["grad_norm/total"]) == pytest.approx([norm(raw) for raw in oracle.raw], rel=1e-6)
    ratio = values(events["update_ratio/up"])
    assert math.isnan(ratio[0])  # all-zero weights have no ratio
    assert all(r > 0 for r in ratio[1:])
    assert "update_ratio/net.0" not in events


class Tied(pl.LightningModule):
    """An embedding that is also the output layer."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 4, sparse=sparse)
        self.head = nn.Linear(4, 12, bias=False)
        if not sparse:
            self.head.weight = self.embed.weight

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (tokens,) = batch
        return nn.functional.cross_entropy(self.head(self.embed(tokens[:, 0])), tokens[:, 1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def tokens() -> DataLoader[Any]:
    pairs = torch.randint(0, 5, (32, 2), generator=torch.Generator().manual_seed(2))
    return DataLoader(TensorDataset(pairs), batch_size=8)


def test_tied_parameters_count_once(tmp_path: Path) -> None:
    """A weight that two layers share enters the total, its layer and the update once."""
    events, oracle = watched(tmp_path, Tied(), every_step(), tokens())
    assert values(events["grad_norm/total"]) == pytest.approx([norm(raw) for raw in oracle.raw], rel=1e-6)
    assert events["grad_norm/layer/embed"] == events["grad_norm/total"]
    assert "grad_norm/layer/head" not in events


def test_sparse_gradients_are_summed_first(tmp_path: Path) -> None:
    """An embedding's sparse gradient, with repeated rows, has the norm and the update of the dense one."""
    events, oracle = watched(tmp_path, Tied(sparse=True), every_step(), tokens())
    for layer in ("embed", "head"):
        expected = [norm(raw, under=layer) for raw in oracle.raw]
        assert values(events[f"grad_norm/layer/{layer}"]) == pytest.approx(expected, rel=1e-6)
        change = [{n: a[n] - b[n] for n in a} for a, b in zip(oracle.after, oracle.before, strict=True)]
        expected = [norm(c, under=layer) / norm(b, under=layer) for c, b in zip(change, oracle.before, strict=True)]
        assert values(events[f"update_ratio/{layer}"]) == pytest.approx(expected, rel=1e-5)


# --- optimizers


class WeightDecay(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.5)


def test_update_ratio_is_of_the_optimizers_actual_update(tmp_path: Path) -> None:
    """With AdamW the ratio is that of weights before and after: moments, decay and clipping included."""
    events, oracle = watched(tmp_path, WeightDecay(), every_step(), gradient_clip_val=0.1)
    change = [{n: a[n] - b[n] for n in a} for a, b in zip(oracle.after, oracle.before, strict=True)]
    for layer in ("net.0", "net.2"):
        expected = [norm(c, under=layer) / norm(b, under=layer) for c, b in zip(change, oracle.before, strict=True)]
        assert values(events[f"update_ratio/{layer}"]) == pytest.approx(expected, rel=1e-4)


class TwoOptimizers(Classifier):
    """Manual optimization: one backward, two optimizers, the user's own clipping before the second step."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        x, y = batch
        first, second = self.optimizers()
        first.zero_grad()
        second.zero_grad()
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("train_loss", loss)
        self.manual_backward(loss)
        first.step()
        self.clip_gradients(second, gradient_clip_val=0.2, gradient_clip_algorithm="norm")
        second.step()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net[0].parameters(), lr=0.1), torch.optim.Adam(self.net[2].parameters(), lr=0.01)


def test_manual_optimization_with_the_users_own_clipping(tmp_path: Path) -> None:
    """The total is from before the user's clipping and over both optimizers, each of which has its own norm."""
    events, oracle = watched(tmp_path, TwoOptimizers(), every_step())
    raw, after = oracle.backward, oracle.clipped
    assert values(events["grad_norm/total"]) == pytest.approx([norm(g) for g in raw], rel=1e-6)
    assert values(events["grad_norm/clipped"]) == pytest.approx([norm(g) for g in after], rel=1e-5)
    first = [norm(g, under="net.0") for g in raw]
    second = [norm(g, under="net.2") for g in raw]
    assert values(events["grad_norm/optimizer_0"]) == pytest.approx(first, rel=1e-6)
    assert values(events["grad_norm/optimizer_1"]) == pytest.approx(second, rel=1e-6)
    assert values(events["grad_norm/layer/net.2"]) == pytest.approx(second, rel=1e-6)
    assert events["grad_norm/clip_fraction"][-1][1] > 0
    # Two optimizer steps a batch, one reading, at the step of the user's log.
    assert [step for step, _ in events["grad_norm/total"]] == [step for step, _ in events["train_loss"]]
    change = {n: oracle.after[3][n] - oracle.before[6][n] for n in oracle.after[3]}
    for layer in ("net.0", "net.2"):
        expected = norm(change, under=layer) / norm(oracle.before[6], under=layer)
        assert events[f"update_ratio/{layer}"][3][1] == pytest.approx(expected, rel=1e-5)


class Alternating(TwoOptimizers):
    """Each optimizer has a backward of its own, as in a GAN; on odd batches only the first steps."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        x, y = batch
        for i, optimizer in enumerate(self.optimizers()):
            if i == 1 and batch_idx % 2:
                continue
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            self.manual_backward((i + 1) * nn.functional.cross_entropy(self.net(x), y))
            optimizer.step()
            self.untoggle_optimizer(optimizer)


def test_optimizers_with_their_own_backward(tmp_path: Path) -> None:
    """The total is over the optimizers that stepped on the batch; one that did not step has no reading."""
    events, oracle = watched(tmp_path, Alternating(), every_step(), max_epochs=1)
    assert [step for step, _ in events["grad_norm/optimizer_0"]] == list(range(8))
    assert [step for step, _ in events["grad_norm/optimizer_1"]] == [0, 2, 4, 6]
    first, second = norm(oracle.backward[0], under="net.0"), norm(oracle.backward[1], under="net.2")
    assert events["grad_norm/total"][0][1] == pytest.approx(math.hypot(first, second), rel=1e-6)
    only = norm(oracle.backward[2], under="net.0")
    assert events["grad_norm/total"][1][1] == pytest.approx(only, rel=1e-6)


class Quasi(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4)


def test_lbfgs_that_evaluates_several_times_a_step(tmp_path: Path) -> None:
    """Of LBFGS the last evaluation's gradient is shown, and the update of the whole step."""
    events, oracle = watched(tmp_path, Quasi(), every_step(), max_steps=4)
    assert len(oracle.raw) > 4  # several evaluations a step
    assert values(events["grad_norm/total"]) == pytest.approx([norm(g) for g in oracle.clipped], rel=1e-6)
    starts = [oracle.before[0], *oracle.after[:-1]]
    for layer in ("net.0", "net.2"):
        expected = [
            norm({n: a[n] - b[n] for n in a}, under=layer) / norm(b, under=layer)
            for a, b in zip(oracle.after, starts, strict=True)
        ]
        assert values(events[f"update_ratio/{layer}"]) == pytest.approx(expected, rel=1e-4)


# --- fp16 with a gradient scaler


def _fp16(scale: float) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return {"plugins": [MixedPrecision(precision="16-mixed", device="cpu", scaler=scaler)]}


@pytest.mark.parametrize("bound", [None, 0.3])
def test_norms_under_a_gradient_scaler_are_unscaled(bound: float | None, tmp_path: Path) -> None:
    """At a loss scale of 1024 the norms are those of the float32 run, up to half precision."""
    model, twin = Classifier(), Classifier()
    twin.load_state_dict(model.state_dict())
    half, _ = watched(tmp_path / "16", model, every_step(), gradient_clip_val=bound, max_epochs=1, **_fp16(1024.0))
    full, _ = watched(tmp_path / "32", twin, every_step(), gradient_clip_val=bound, max_epochs=1)
    for tag in ("grad_norm/total", "grad_norm/clipped", "grad_norm/layer/net.0", "update_ratio/net.2"):
        assert values(half[tag]) == pytest.approx(values(full[tag]), rel=0.02)


def test_manual_optimization_under_a_gradient_scaler(tmp_path: Path) -> None:
    """The look before the user's clipping sees scaled gradients, and takes the scale out."""
    events, oracle = watched(tmp_path, TwoOptimizers(), every_step(), max_epochs=1, **_fp16(1024.0))
    expected = [norm(raw) / 1024 for raw in oracle.backward]
    assert values(events["grad_norm/total"]) == pytest.approx(expected, rel=1e-5)


def test_an_overflow_is_not_a_failure(tmp_path: Path) -> None:
    """Skipped steps show non-finite norms but no update; nothing goes off, nothing stops."""
    stop = EarlyTermination()
    oracle, monitor = Oracle(), every_step()
    fit = trainer(tmp_path, [oracle, monitor, stop], max_epochs=1, **_fp16(2.0**20))
    fit.fit(Classifier(), data())
    events = scalars(tmp_path / "run")
    skipped = [step for step, raw in enumerate(oracle.raw) if not math.isfinite(norm(raw))]
    assert 0 < len(skipped) < 8
    totals = values(events["grad_norm/total"])
    assert [step for step, total in enumerate(totals) if not math.isfinite(total)] == skipped
    assert all(events["grad_norm/nonfinite"][step][1] > 0 for step in skipped)
    updated = [step for step in range(8) if step not in skipped]
    assert [step for step, _ in events["update_ratio/net.0"]] == updated
    assert [step for step, _ in events["grad_norm/clip_fraction"]] == updated
    assert monitor.off is None and stop.verdict is None and fit.global_step == 8


# --- noise scale


def _noise_scale(oracle: Oracle, window: int, small: int, windows: int, loss_scale: float) -> list[float]:
    """The two-batch-size estimator by its formulas, from whole gradients after each backward."""
    signals, noises, found = 0.0, 0.0, []
    for i in range(windows):
        after_first, after_all = oracle.backward[i * window], oracle.backward[(i + 1) * window - 1]
        # Lightning divided each micro-batch's loss by the window.
        g_small, g_big = (norm(after_first) * window / loss_scale) ** 2, (norm(after_all) / loss_scale) ** 2
        b_small, b_big = small, small * window
        signal = (b_big * g_big - b_small * g_small) / (b_big - b_small)
        noise = (g_small - g_big) / (1 / b_small - 1 / b_big)
        # Exponential averages with weight 1/20 for the newest.
        signals, noises = 0.95 * signals + 0.05 * signal, 0.95 * noises + 0.05 * noise
        found.append(noises / signals if signals > 0 and noises >= 0 else math.nan)
    return found


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_noise_scale_from_accumulated_gradients(loss_scale: float, tmp_path: Path) -> None:
    """It is the estimator of the paper on first micro-batch and window, also with clipping and a loss scale."""
    settings = {"accumulate_grad_batches": 4, "gradient_clip_val": 0.05}
    if loss_scale > 1:
        settings |= _fp16(loss_scale)
    events, oracle = watched(tmp_path, Classifier(lr=0.01), every_step(), **settings)
    expected = _noise_scale(oracle, window=4, small=8, windows=4, loss_scale=loss_scale)
    assert [step for step, _ in events["grad_norm/noise_scale"]] == [0, 1, 2, 3]
    assert values(events["grad_norm/noise_scale"]) == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert any(math.isfinite(value) for value in expected)


def test_a_short_last_window_gives_no_noise_scale(tmp_path: Path) -> None:
    """Of windows of 5 and 3 micro-batches only the full ones count; norms are there for both."""
    events, oracle = watched(tmp_path, Classifier(), every_step(), accumulate_grad_batches=5)
    assert [step for step, _ in events["grad_norm/noise_scale"]] == [0, 2]
    assert [step for step, _ in events["grad_norm/total"]] == [0, 1, 2, 3]
    assert values(events["grad_norm/total"]) == pytest.approx([norm(raw) for raw in oracle.raw], rel=1e-6)


def test_noise_scale_takes_the_batch_size_that_it_is_told(tmp_path: Path) -> None:
    """The estimate is in samples: of twice the samples a batch, the same gradients give twice the scale."""
    scale = {}
    for size in (None, 16):
        torch.manual_seed(0)
        events, _ = watched(
            tmp_path / str(size), Classifier(0.01), every_step(batch_size=size), accumulate_grad_batches=4
        )
        scale[size] = values(events["grad_norm/noise_scale"])
    assert any(math.isfinite(value) for value in scale[None])
    assert scale[16] == pytest.approx([2 * value for value in scale[None]], rel=1e-5, nan_ok=True)


@pytest.mark.parametrize(
    ("model_class", "reason"),
    [(Classifier, "it needs gradients of two batch sizes"), (TwoOptimizers, "in manual optimization it is not known")],
)
def test_without_two_batch_sizes_there_is_one_nan_and_a_reason(
    model_class: type[Classifier], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One NaN at the first reading, and the report says why there is no noise scale."""
    watch = DynWatch(gradients=every_step(), stop=False)
    trainer(tmp_path, [watch]).fit(model_class(), data())
    ((step, value),) = scalars(tmp_path / "run")["grad_norm/noise_scale"]
    assert step == 0 and math.isnan(value)
    assert f"grad_norm/noise_scale: not available: {reason}" in " ".join(capsys.readouterr().out.split("\n"))


def test_noise_scale_can_be_turned_off(tmp_path: Path) -> None:
    """noise_scale=False writes nothing for it."""
    events, _ = watched(tmp_path, Classifier(), every_step(noise_scale=False), accumulate_grad_batches=4)
    assert "grad_norm/noise_scale" not in events


# --- what the docstring promises


def promised_tags(callback: type) -> list[re.Pattern[str]]:
    """The tags of a callback's docstring, those with a `<placeholder>` as patterns."""
    quoted = re.findall(r"`((?:grad_norm|update_ratio|stop|dynwatch)/[^`]*)`", callback.__doc__ or "")
    return [re.compile(re.sub(r"<\w+>", "[^/]+", tag) + "$") for tag in quoted]


def test_every_tag_of_the_docstring_is_in_the_event_file(tmp_path: Path) -> None:
    """Each promised tag is written, each written tag is promised, and each belongs to a panel."""
    found = set()
    for name, model, settings in (
        ("two", TwoOptimizers(), {}),
        ("window", Classifier(), {"accumulate_grad_batches": 2}),
    ):
        found |= watched(tmp_path / name, model, every_step(), **settings)[0].keys()
    ours = {tag for tag in found if tag.startswith(("grad_norm/", "update_ratio/"))}
    promised = promised_tags(GradientNormMonitor)
    assert len(promised) == 8
    assert [p.pattern for p in promised if not any(p.match(tag) for tag in ours)] == []
    assert [tag for tag in ours if not any(p.match(tag) for p in promised)] == []
    panels = layout(GradientNormMonitor().charts())["dynwatch · gradients"]
    drawn = [pattern for _, patterns in panels.values() for pattern in patterns]
    undrawn = {tag for tag in ours if not any(re.match(pattern, tag) for pattern in drawn)}
    assert undrawn == {"grad_norm/optimizer_0", "grad_norm/optimizer_1"}


def test_readings_are_in_callback_metrics(tmp_path: Path) -> None:
    """EarlyStopping and pruners find the latest reading under its tag."""
    fit = trainer(tmp_path, [every_step()])
    fit.fit(Classifier(), data())
    written = scalars(tmp_path / "run")["grad_norm/total"][-1][1]
    assert fit.callback_metrics["grad_norm/total"].item() == pytest.approx(written, rel=1e-6)
