"""Routing health and pathways of real runs, against what the experts really got."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
from moe_model import CLASSES, LENGTH, Model, Texts, texts
from moes import EXPERTS, TOP_K, WIDTH, LinearGate
from rapidfuzz.distance import Levenshtein
from runs import scalars, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dynwatch.callbacks import DynWatch, MoEPathwayMonitor, moe_health
from dynwatch.routing import Routing


class Truth(pl.Callback):
    """The choices of the experts in each training batch, [L, N, E] bool, and the weights at its end."""

    def __init__(self) -> None:
        self.batches: list[tuple[Tensor, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_before_backward(self, trainer: pl.Trainer, pl_module: Any, loss: Tensor) -> None:
        chosen = torch.stack([block.truth > 0 for block in pl_module.net.blocks])
        self.batches.append((chosen, torch.empty(0)))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, i: int) -> None:
        self.batches[-1] = (self.batches[-1][0], batch["attention_mask"].flatten() > 0)
        self.weights.append({name: p.detach().clone() for name, p in pl_module.state_dict().items()})


def fit(
    folder: Path,
    monitor: MoEPathwayMonitor | None,
    model: Any = None,
    loader: Any = None,
    validation: Any = None,
    **settings: Any,
) -> tuple[dict[str, dict[int, float]], Truth]:
    """Train; readings by tag and step, and what really happened."""
    torch.manual_seed(3)
    truth = Truth()
    callbacks = [each for each in (monitor, truth) if each is not None]
    run = trainer(folder, callbacks, **({"max_epochs": 1, "num_sanity_val_steps": 0} | settings))
    run.fit(Model() if model is None else model, loader or texts(), validation)
    readings = {tag: dict(values) for tag, values in scalars(folder / "run").items()}
    return readings, truth


def health(chosen: Tensor, valid: Tensor) -> dict[str, float]:
    """Some figures of one layer from [N, E] choices, by other means than the engine's."""
    load = chosen[valid].sum(0).double()
    shares = load / load.sum()
    entropy = -sum(float(p) * math.log(float(p)) for p in shares if p > 0)
    return {
        "effective_experts": math.exp(entropy),
        "max_load": float(load.max()) / int(valid.sum()),
        "max_vio": float(load.max() / load.mean()) - 1,
        "load_cv": float(load.std(correction=0) / load.mean()),
    }


# --- health


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("style", ["linear", "sigmoid", "noisy", "dispatch", "expert_choice", "emitting_flat"])
def test_health_is_of_what_the_experts_got(style: str, padded: bool, tmp_path: Path) -> None:
    """On each due step, of the tokens that are no padding."""
    monitor = MoEPathwayMonitor(every_n_steps=2, probe_every_n_steps=100)
    readings, truth = fit(tmp_path, monitor, Model(style), texts(padded=padded))
    assert monitor.off is None
    steps = [1, 3, 5]
    for layer in range(3):
        assert list(readings[f"moe/layer_{layer}/load_cv"]) == steps
        for step in steps:
            chosen, valid = truth.batches[step]
            for tag, value in health(chosen[layer], valid).items():
                assert readings[f"moe/layer_{layer}/{tag}"][step] == pytest.approx(value, rel=1e-5), (tag, step)
            if style == "dispatch":
                kept = int(chosen[layer][valid].sum())
                dropped = 1 - kept / (TOP_K * int(valid.sum()))
                assert readings[f"moe/layer_{layer}/dropped"][step] == pytest.approx(dropped, abs=1e-6)
        assert readings[f"moe/layer_{layer}/experts"] == {1: EXPERTS}
        assert readings[f"moe/layer_{layer}/top_k"] == {1: EXPERTS if style == "expert_choice" else TOP_K}
        assert ("moe/layer_0/dropped" in readings) is (style == "dispatch")
        assert ("moe/layer_0/z_loss" in readings) is (style not in ("dispatch", "emitting_flat"))


def test_losses_of_the_router_are_of_its_logits(tmp_path: Path) -> None:
    """z-loss, entropy and balance loss of the first due step, from the weights before it."""
    readings, truth = fit(tmp_path, MoEPathwayMonitor(every_n_steps=2))
    model = Model()
    model.load_state_dict(truth.weights[0])
    data = Texts()
    with torch.no_grad():
        x = model.net.norms[0](data.x[8:16]).reshape(-1, WIDTH)
        logits = model.net.blocks[0].gate(x).double()
    p = logits.softmax(-1)
    load = truth.batches[1][0][0].sum(0).double()
    assert readings["moe/layer_0/z_loss"][1] == pytest.approx(float(logits.logsumexp(-1).square().mean()), rel=1e-5)
    assert readings["moe/layer_0/router_entropy"][1] == pytest.approx(float(-(p * p.log()).sum(-1).mean()), rel=1e-5)
    aux = EXPERTS * float((load / load.sum() * p.mean(0)).sum())
    assert readings["moe/layer_0/aux_loss"][1] == pytest.approx(aux, rel=1e-5)


def test_micro_batches_add_up(tmp_path: Path) -> None:
    """With accumulation a reading is of all micro-batches of its step, and stands at Lightning's step."""
    readings, truth = fit(tmp_path, MoEPathwayMonitor(every_n_steps=1), accumulate_grad_batches=2)
    for step in range(3):
        chosen = torch.cat([truth.batches[2 * step + i][0] for i in range(2)], dim=1)
        every = torch.ones(chosen.shape[1], dtype=torch.bool)
        expected = health(chosen[1], every)["effective_experts"]
        assert readings["moe/layer_1/effective_experts"][step] == pytest.approx(expected, rel=1e-5)


class Checkpointed(Model):
    """Runs its blocks once more in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def step(self, batch: dict[str, Any]) -> Tensor:
        x = batch["x"].requires_grad_()
        for block in self.net.blocks:
            x = x + torch.utils.checkpoint.checkpoint(block, x, use_reentrant=self.reentrant)
        return nn.functional.cross_entropy(self.net.head(x).flatten(0, 1), batch["labels"].flatten())


class ManualCheckpointed(Checkpointed):
    """Steps its optimizer itself, so that backward runs inside of the training step."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__(reentrant)
        self.automatic_optimization = False

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> None:  # type: ignore[override]
        self.optimizers().zero_grad()  # type: ignore[union-attr]
        self.manual_backward(self.step(batch))
        self.optimizers().step()  # type: ignore[union-attr]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", [Checkpointed, ManualCheckpointed])
def test_checkpointing_counts_tokens_once(kind: type[Checkpointed], reentrant: bool, tmp_path: Path) -> None:
    """Raw sums show it: shares would not."""
    sums: list[float] = []

    class Noting(MoEPathwayMonitor):
        def finish(self, step: int, raw: Any) -> Any:
            if "\n" in next(iter(raw)):
                sums.append(sum(list(raw.values())[:EXPERTS]))
            return super().finish(step, raw)

    monitor = Noting(every_n_steps=1, forward=lambda module, batch: module.step(batch))
    fit(tmp_path, monitor, kind(reentrant))
    assert monitor.off is None
    assert sums == [8 * LENGTH * TOP_K] * 6


@pytest.mark.parametrize("how", ["module", "net", "block", "function"])
def test_compiled_models_have_the_same_readings(how: str, tmp_path: Path) -> None:
    """Compiled as a whole, in parts, or inside of a function; nothing is compiled anew for the monitor."""
    plain, _ = fit(tmp_path / "plain", MoEPathwayMonitor(every_n_steps=2, probe_every_n_steps=3), Model("stacked"))
    graphs: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(1)
        return graph.forward

    def compiled() -> Any:
        model: Any = Model("stacked")
        if how == "module":
            return torch.compile(model, backend=backend)
        if how == "net":
            model.net = torch.compile(model.net, backend=backend)
        elif how == "block":
            model.net.blocks = nn.ModuleList(torch.compile(block, backend=backend) for block in model.net.blocks)
        else:
            model.net.forward = torch.compile(model.net.forward, backend=backend)
        return model

    counts = []
    for name, monitor in (("bare", None), ("watched", MoEPathwayMonitor(every_n_steps=2, probe_every_n_steps=3))):
        torch._dynamo.reset()
        graphs.clear()
        torch.manual_seed(3)
        trainer(tmp_path / name, [monitor] if monitor else [], max_epochs=1).fit(compiled(), texts())
        counts.append(len(graphs))
    assert counts[0] == counts[1] > 0
    found = scalars(tmp_path / "watched" / "run")
    assert {tag for tag in plain if tag.startswith("moe/")} == {tag for tag in found if tag.startswith("moe/")}
    for tag in ("moe/layer_1/effective_experts", "moe/layer_2/z_loss", "moe/distance"):
        assert dict(found[tag]) == pytest.approx(plain[tag], rel=1e-4), tag


# --- nothing to find, and failures


class Dense(Model):
    """No experts; a list of layers and a head of as many outputs, which might be a router by its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(CLASSES))
        self.head = nn.Linear(WIDTH, CLASSES)

    def step(self, batch: dict[str, Any]) -> Tensor:
        x = batch["x"]
        for layer in self.layers:
            x = x + layer(x).relu()
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), batch["labels"].flatten())


class Bystander(pl.Callback):
    """Notes after each batch how many hooks there are, and which mode is on."""

    def __init__(self) -> None:
        self.hooks: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        modules = list(pl_module.modules())
        self.hooks.append(sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules))
        assert torch.overrides._get_current_function_mode() is None


@pytest.mark.parametrize("watch", [MoEPathwayMonitor, DynWatch])
def test_a_dense_model_pays_and_hears_nothing(watch: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """No reading, no message, no panel, and no hook after the first batch."""
    monitor, bystander = watch(), Bystander()
    with caplog.at_level(logging.DEBUG, "dynwatch"):
        trainer(tmp_path, [monitor, bystander], max_epochs=1).fit(Dense(), texts())
    assert not [record for record in caplog.records if "MoE" in record.getMessage()]
    assert not [tag for tag in scalars(tmp_path / "run") if tag.startswith("moe/")]
    assert bystander.hooks == [0] * 6
    part = next(each for each in getattr(monitor, "monitors", [monitor]) if isinstance(each, MoEPathwayMonitor))
    assert part.charts() == () and part.off is None


class SoftMixture(Model):
    """All experts for all tokens: there is a router by name, and no choice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Module()
        self.net.router = nn.Linear(WIDTH, 3)
        self.net.experts = nn.ModuleList(nn.Linear(WIDTH, CLASSES) for _ in range(3))

    def step(self, batch: dict[str, Any]) -> Tensor:
        weights = self.net.router(batch["x"]).softmax(-1)
        outputs = torch.stack([expert(batch["x"]) for expert in self.net.experts], -1)
        return nn.functional.cross_entropy(
            (outputs * weights[..., None, :]).sum(-1).flatten(0, 1), batch["labels"].flatten()
        )


def test_what_looks_like_a_router_and_is_none_is_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The warning lists the candidates and what to pass; with top_k= there are readings."""
    with caplog.at_level(logging.WARNING, "dynwatch"):
        trainer(tmp_path / "soft", [MoEPathwayMonitor()], max_epochs=1).fit(SoftMixture(), texts())
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert messages[0] == (
        "MoEPathwayMonitor measures nothing in this run: these looked like routers, but showed no choice of experts: "
        "net.router. Pass routers= (patterns for names) with top_k= or extract=, or leave it out."
    )
    monitor = MoEPathwayMonitor(every_n_steps=1, top_k=1)
    trainer(tmp_path / "told", [monitor], max_epochs=1).fit(SoftMixture(), texts())
    assert scalars(tmp_path / "told" / "run")["moe/layer_0/top_k"] == [(0, 1.0)]


def test_a_failure_ends_the_monitor_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also in the middle of a forward pass: no hook and no mode stays, and weights are those of the bare run."""

    def fail(*_: Any) -> None:
        raise RuntimeError("made to fail")

    monkeypatch.setattr(moe_health.HealthTally, "add", fail)
    _, bare = fit(tmp_path / "bare", None)
    monitor, bystander = MoEPathwayMonitor(every_n_steps=2, probe_every_n_steps=2), Bystander()
    torch.manual_seed(3)
    truth = Truth()
    trainer(tmp_path / "run", [monitor, truth, bystander], max_epochs=1).fit(Model(), texts())
    assert monitor.off == "RuntimeError: made to fail" and bystander.hooks == [0] * 6
    assert "training goes on. Cause: RuntimeError: made to fail." in caplog.text
    assert all(torch.equal(bare.weights[-1][name], p) for name, p in truth.weights[-1].items())


class Packed(Model):
    """Takes padding out before the model: tokens of samples are of unequal numbers."""

    def step(self, batch: dict[str, Any]) -> Tensor:
        kept = batch["attention_mask"] > 0
        return nn.functional.cross_entropy(self.net(batch["x"][kept][None])[0], batch["labels"][kept])


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        (Packed, {}, "do not belong to"),
        (Model, {"probe": {"x": torch.randn(4, LENGTH, WIDTH)}}, "KeyError('labels')"),
        (Model, {"group_by": lambda batch: ["a"]}, "gave 1 keys for the 8 samples of a batch"),
    ],
)
def test_pathways_may_fail_alone(
    model: type[Model], options: dict[str, Any], why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Health and what rules make of it go on; the reason is told, once."""
    monitor = MoEPathwayMonitor(every_n_steps=1, probe_every_n_steps=2, **options)
    fit_on = texts(padded=True)
    trainer(tmp_path, [monitor], max_epochs=1).fit(model(), fit_on)
    readings = scalars(tmp_path / "run")
    assert monitor.off is None and len(readings["moe/layer_0/load_cv"]) == 6 and "moe/distance" not in readings
    assert monitor._stream is not None and why in monitor._stream.reasons["moe/distance"]
    assert len([r for r in caplog.records if "looks at no pathways in this run" in r.getMessage()]) == 1


class Interrupted(Model):
    """As by Ctrl-C, within a block."""

    def __init__(self, probing: bool) -> None:
        super().__init__()
        self.probing = probing
        self.net.blocks[1].experts[0].register_forward_pre_hook(self.interrupt)

    def interrupt(self, *_: Any) -> None:
        if self.trainer.global_step >= 2 and self.net.training is not self.probing:
            raise KeyboardInterrupt


@pytest.mark.parametrize("probing", [False, True])
def test_an_interrupt_leaves_nothing_behind(probing: bool, tmp_path: Path) -> None:
    """Torch tells hooks of exceptions, but not of this."""
    model = Interrupted(probing)
    run = trainer(tmp_path, [MoEPathwayMonitor(every_n_steps=1, probe_every_n_steps=1)], max_epochs=1)
    with contextlib.suppress(KeyboardInterrupt, SystemExit):
        run.fit(model, texts())
    assert run.interrupted
    assert torch.overrides._get_current_function_mode() is None
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks.values(),)]
    assert hooks == []


class Raising(Model):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 3:
            self.net(batch["x"][..., :3])  # in the middle of a block
        return loss


def test_hooks_are_removed_when_training_raises(tmp_path: Path) -> None:
    """The user's error comes through, and nothing stays on the model."""
    model = Raising()
    with pytest.raises(RuntimeError, match="shape"):
        trainer(tmp_path, [MoEPathwayMonitor(every_n_steps=1)], max_epochs=1).fit(model, texts())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.overrides._get_current_function_mode() is None


def test_nan_in_a_router_is_a_reading(tmp_path: Path) -> None:
    """Probabilities and losses are NaN, the load is what it is, and the monitor goes on."""

    class Spoilt(Model):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                with torch.no_grad():
                    self.net.blocks[1].gate.weight.fill_(math.nan)

    monitor = MoEPathwayMonitor(every_n_steps=1, probe_every_n_steps=1)
    readings, _ = fit(tmp_path, monitor, Spoilt())
    assert monitor.off is None
    assert math.isnan(readings["moe/layer_1/z_loss"][4]) and math.isfinite(readings["moe/layer_0/z_loss"][2])
    assert math.isfinite(readings["moe/layer_1/load_cv"][4]) and 4 in readings["moe/layer_1/effective_experts"]
    assert 2 in readings["moe/distance"] and 4 not in readings["moe/distance"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "every_n_steps=0 must be a whole number of steps"),
        ({"probe_every_n_steps": 0}, "probe_every_n_steps=0 must be a whole number of steps"),
        ({"probe": "test"}, "probe='test' must be 'train', 'validate' or a batch."),
        ({"max_samples": 1}, "max_samples=1 must be a whole number, 2 or more."),
        ({"probe": None}, "probe=None must be 'train', 'validate' or a batch."),
        ({"group_by": 3}, "group_by=3 must be a key of the batch or a function of it."),
        ({"padding_mask": 3}, "padding_mask=3 must be a key of the batch or a function of it."),
        ({"memorized": "yes"}, "memorized='yes' must be True or False."),
        ({"routers": [3]}, "routers has 3, and must have patterns for module names, or modules."),
        ({"num_experts": 4, "top_k": 8}, "top_k=8 must be num_experts=4 or less."),
        ({"max_tokens": 0}, "max_tokens=0 must be a whole number, 1 or more."),
        ({"unit": "word"}, "unit='word' must be one of 'expert', 'char'."),
        ({"threshold": 1.0}, "threshold=1.0 must be"),
        ({"routers": "gate"}, "routers='gate' must be a list of patterns"),
        ({"extract": 3}, "extract=3 must be a function."),
        ({"num_experts": 0}, "num_experts=0 must be a whole number, 1 or more."),
        ({"score": "tanh"}, "score='tanh' must be one of 'softmax', 'sigmoid', None."),
        ({"dead_window": 0}, "dead_window=0 must be a whole number, 1 or more."),
        ({"max_overhead": 0.0}, "max_overhead=0.0 must be"),
    ],
)
def test_arguments_out_of_bounds(arguments: dict[str, Any], message: str) -> None:
    """Each error names the argument, its value and the bound."""
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        MoEPathwayMonitor(**arguments)


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"routers": ["nothing"]}, "routers='nothing' matches none of the model's modules"),
        ({"routers": ["norms.0"]}, "the number of experts of net.norms.0 cannot be told; pass num_experts=."),
        ({"padding_mask": "nothing"}, "padding_mask='nothing' gave NoneType and must give a tensor"),
        ({"padding_mask": lambda batch: batch["attention_mask"][:, :2] == 0}, "does not fit the 56 tokens of a router"),
        ({"extract": lambda module, args, output: output}, "extract= returned Tensor for net.blocks.0.gate"),
    ],
)
def test_a_wrong_word_of_the_user_is_told(
    options: dict[str, Any], cause: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The monitor goes off with a message that says what to pass; the run goes on."""
    monitor = MoEPathwayMonitor(every_n_steps=1, **options)
    fit(tmp_path, monitor)
    assert monitor.off is not None and cause in monitor.off
    assert cause in caplog.text


# --- overrides


def test_the_users_words_are_taken(tmp_path: Path) -> None:
    """routers=, extract=, score= and a padding mask of another name."""

    def worst(module: nn.Module, args: Any, output: Tensor) -> Routing:
        return Routing(output.reshape(-1, EXPERTS).argmin(-1, keepdim=True), EXPERTS)

    readings, _ = fit(
        tmp_path / "own", MoEPathwayMonitor(every_n_steps=1, routers=[r"blocks\.[02]\.gate"], extract=worst)
    )
    assert readings["moe/layer_0/top_k"] == {0: 1.0} and "moe/layer_2/top_k" not in readings
    readings, _ = fit(tmp_path / "sigmoid", MoEPathwayMonitor(every_n_steps=1, score="sigmoid"))
    other, _ = fit(tmp_path / "softmax", MoEPathwayMonitor(every_n_steps=1))
    assert readings["moe/layer_0/router_entropy"] != other["moe/layer_0/router_entropy"]
    assert readings["moe/layer_0/load_cv"] == other["moe/layer_0/load_cv"]

    def renamed(items: list[dict[str, Any]]) -> dict[str, Any]:
        batch = torch.utils.data.default_collate(items)
        return batch | {"hidden": batch["attention_mask"] == 0}

    loader = DataLoader(Texts(padded=True), batch_size=8, collate_fn=renamed)
    named, _ = fit(tmp_path / "named", MoEPathwayMonitor(every_n_steps=1, padding_mask="hidden"), loader=loader)
    found, _ = fit(tmp_path / "found", MoEPathwayMonitor(every_n_steps=1), loader=texts(padded=True))
    assert named["moe/layer_1/max_load"] == found["moe/layer_1/max_load"]


# --- pathways


def by_hand(weights: dict[str, Tensor], samples: Tensor, mask: Tensor, threshold: float = 0.7) -> list[list[list[int]]]:
    """Pathways of samples, [S][L][kept experts], token by token in Python."""
    model = Model()
    model.load_state_dict(weights)
    gates: list[Tensor] = []
    with torch.no_grad():
        x = samples
        for block, norm in zip(model.net.blocks, model.net.norms, strict=True):
            given = norm(x)
            p = block.gate(given).double().softmax(-1)
            gates.append(torch.stack([p[s][mask[s] > 0].mean(0) for s in range(len(x))]))
            x = x + block(given)
    found = []
    for s in range(len(samples)):
        path = []
        for gate in gates:
            order = sorted(range(EXPERTS), key=lambda e, g=gate[s]: -float(g[e]))
            kept, total = [], 0.0
            for e in order:
                kept.append(e)
                total += float(gate[s][e])
                if total > threshold:
                    break
            path.append(kept)
        found.append(path)
    return found


def distances(paths: list[list[list[int]]], groups: list[str] | None = None) -> tuple[float, float]:
    raw, normalized = [], []
    flat = [[100 * layer + e for layer, kept in enumerate(path) for e in kept] for path in paths]
    for i in range(len(flat)):
        for j in range(i):
            if groups is None or groups[i] == groups[j]:
                d = Levenshtein.distance(flat[i], flat[j])
                raw.append(d)
                normalized.append(d / max(len(flat[i]), len(flat[j])))
    return sum(raw) / len(raw), sum(normalized) / len(normalized)


@pytest.mark.parametrize("padded", [False, True])
def test_pathways_are_of_the_first_batches_at_these_weights(padded: bool, tmp_path: Path) -> None:
    """Twelve samples of the first two batches, by domain, against the definition in plain Python."""
    monitor = MoEPathwayMonitor(probe_every_n_steps=3, max_samples=12)
    readings, truth = fit(tmp_path, monitor, loader=texts(padded=padded))
    data = Texts(padded=padded)
    groups = [data[i]["domain"] for i in range(12)]
    for step in (2, 5):
        paths = by_hand(truth.weights[step], data.x[:12], data.mask[:12])
        raw, normalized = distances(paths, groups)
        assert readings["moe/distance"][step] == pytest.approx(raw, rel=1e-5)
        assert readings["moe/distance_normalized"][step] == pytest.approx(normalized, rel=1e-5)
        length = sum(len(kept) for path in paths for kept in path) / 12
        assert readings["moe/pathway_length"][step] == pytest.approx(length, rel=1e-5)
    assert 0 < readings["moe/layer_0/stability"][5] < 1 and 2 not in readings["moe/layer_0/stability"]


@dataclasses.dataclass
class Bundle:
    """A batch that is no dictionary."""

    x: Tensor
    labels: Tensor
    attention_mask: Tensor


class OfBundles(Model):
    def step(self, batch: Any) -> Tensor:
        return super().step(vars(batch))


class Popping(Model):
    """Takes the mask out of the batch before the model runs."""

    def step(self, batch: dict[str, Any]) -> Tensor:
        batch.pop("attention_mask")
        return super().step(batch)


@pytest.mark.parametrize("kind", [OfBundles, Popping])
def test_padding_is_found(kind: type[Model], tmp_path: Path) -> None:
    """In a dataclass, and where the step takes it out of its dictionary."""

    def bundle(items: list[dict[str, Any]]) -> Any:
        batch = torch.utils.data.default_collate(items)
        batch.pop("domain")
        return Bundle(**batch) if kind is OfBundles else batch

    expected, _ = fit(tmp_path / "plain", MoEPathwayMonitor(every_n_steps=1), loader=texts(padded=True))
    loader = DataLoader(Texts(padded=True), batch_size=8, collate_fn=bundle)
    trainer(tmp_path / "other", [MoEPathwayMonitor(every_n_steps=1)], max_epochs=1).fit(kind(), loader)
    found = dict(scalars(tmp_path / "other" / "run")["moe/layer_1/max_load"])
    assert found == expected["moe/layer_1/max_load"]


def test_the_probe_can_be_chosen(tmp_path: Path) -> None:
    """A batch, the first validation batches, or all as one group."""
    data = Texts()
    batch = {"x": data.x[20:28], "labels": data.y[20:28]}
    given = MoEPathwayMonitor(probe_every_n_steps=6, probe=batch)
    readings, truth = fit(tmp_path / "given", given)
    expected = distances(by_hand(truth.weights[5], data.x[20:28], data.mask[20:28]))[0]
    assert readings["moe/distance"] == {5: pytest.approx(expected, rel=1e-5)}

    validated = MoEPathwayMonitor(probe_every_n_steps=6, probe="validate", max_samples=10, group_by=None)
    later = DataLoader(torch.utils.data.Subset(data, range(30, 48)), batch_size=6)
    readings, truth = fit(tmp_path / "validate", validated, validation=later, num_sanity_val_steps=2)
    expected = distances(by_hand(truth.weights[5], data.x[30:40], data.mask[30:40]))[0]
    assert readings["moe/distance"] == {5: pytest.approx(expected, rel=1e-5)}

    late = MoEPathwayMonitor(probe_every_n_steps=2, probe="validate")
    readings, _ = fit(tmp_path / "late", late, validation=later, val_check_interval=3)
    assert list(readings["moe/distance"]) == [3, 5]  # nothing was validated before step 1

    by_function = MoEPathwayMonitor(probe_every_n_steps=6, group_by=lambda batch: batch["labels"][:, 0], max_samples=16)
    readings, truth = fit(tmp_path / "function", by_function)
    keys = [str(int(y)) for y in data.y[:16, 0]]
    expected = distances(by_hand(truth.weights[5], data.x[:16], data.mask[:16]), keys)[0]
    assert readings["moe/distance"] == {5: pytest.approx(expected, rel=1e-5)}


@pytest.mark.parametrize("length", [LENGTH, 8])
def test_the_order_of_tokens_does_not_matter(length: int, tmp_path: Path) -> None:
    """Sequence-major routers have the same pathways, also where a batch has as many samples as positions."""
    found = []
    for major in (False, True):
        monitor = MoEPathwayMonitor(every_n_steps=1, probe_every_n_steps=3, max_samples=8)
        loader = texts(padded=True, length=length)
        readings, _ = fit(tmp_path / str(major), monitor, Model(sequence_major=major), loader)
        found.append(readings)
        assert monitor._reader.probe.samples == (8 if length == LENGTH else 7)
    for tag in ("moe/distance", "moe/pathway_length", "moe/consistency", "moe/probe_loss"):
        assert found[0][tag] == pytest.approx(found[1][tag], rel=1e-4), tag
    if length == LENGTH:
        assert found[0]["moe/layer_1/load_cv"] == pytest.approx(found[1]["moe/layer_1/load_cv"], rel=1e-4)


class Seen:
    """Shapes that a step saw: out of the reach of what puts lists back after a probe."""

    shapes: ClassVar[list[Any]] = []


class OfIds(Model):
    """Of token numbers, with several losses."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, WIDTH)

    def step(self, batch: dict[str, Any]) -> Tensor:
        ids = batch["ids"]
        Seen.shapes.append(tuple(ids.shape))
        logits = self.net(self.embedding(ids[:, :-1]))
        loss = nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:] % CLASSES)
        return loss + 0.1 * nn.functional.cross_entropy(logits[:, 0], ids[:, 1] % CLASSES)


class Ids(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int = 8) -> None:
        self.ids = torch.randint(9, (count, 21), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"ids": self.ids[i], "attention_mask": torch.ones(21)}


def test_long_sequences_are_cut(tmp_path: Path) -> None:
    """To max_tokens positions, in the probe alone; a mask of one more position than the model sees is cut, too."""
    Seen.shapes.clear()
    monitor = MoEPathwayMonitor(every_n_steps=1, probe_every_n_steps=2, max_tokens=6, max_samples=3)
    run = trainer(tmp_path, [monitor], max_epochs=1)
    run.fit(OfIds(), DataLoader(Ids(), batch_size=4))
    assert monitor.off is None and "moe padding" not in monitor._stream.remarks  # type: ignore[union-attr]
    assert Seen.shapes.count((3, 6)) == 1 and set(Seen.shapes) == {(4, 21), (3, 6)}
    assert "moe/distance" in scalars(tmp_path / "run")


def test_losses_of_samples(tmp_path: Path) -> None:
    """The mean over a sample's targets in the step's largest cross entropy; ignored ones do not count."""
    readings, truth = fit(tmp_path, MoEPathwayMonitor(probe_every_n_steps=6, max_samples=8), loader=texts(padded=True))
    model, data = Model(), Texts(padded=True)
    model.load_state_dict(truth.weights[5])
    with torch.no_grad():
        logits = model.net(data.x[:8])
    each = [nn.functional.cross_entropy(logits[i], data.y[i]) for i in range(8)]
    assert readings["moe/probe_loss"][5] == pytest.approx(float(torch.stack(each).mean()), rel=1e-5)


@pytest.mark.slow
def test_memorised_samples_are_split_off(tmp_path: Path) -> None:
    """A run over few samples memorises them all, one after the other."""
    loader = DataLoader(torch.utils.data.Subset(Texts(), range(8)), batch_size=8)
    monitor = MoEPathwayMonitor(probe_every_n_steps=10, memorized=True, max_samples=8, group_by=None)
    readings, _ = fit(tmp_path, monitor, loader=loader, max_epochs=150)
    share = readings["moe/memorized"]
    assert share[9] == share[19] == 0 and share[149] == 1
    assert readings["moe/memorized/distance"][149] == readings["moe/distance"][149]
    assert readings["moe/probe_loss"][149] < 0.1 * readings["moe/probe_loss"][9]


def test_what_is_missing_says_why(tmp_path: Path) -> None:
    """One layer, no cross entropy, groups of one."""

    class One(Model):
        def __init__(self) -> None:
            super().__init__()
            self.net.blocks, self.net.norms = self.net.blocks[:1], self.net.norms[:1]

        def step(self, batch: dict[str, Any]) -> Tensor:
            return self.net(batch["x"]).square().mean()

    monitor = MoEPathwayMonitor(probe_every_n_steps=3, group_by=lambda batch: batch["x"][:, 0, 0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Truth, "on_before_backward", lambda *_: None)
        patch.setattr(Truth, "on_train_batch_end", lambda *_: None)
        readings, _ = fit(tmp_path, monitor, One())
    assert monitor._stream is not None
    reasons = monitor._stream.reasons
    assert "one router" in reasons["moe/consistency"]
    assert "no cross entropy" in reasons["moe/memorized"]
    assert "no two samples of the probe are of one group" in reasons["moe/distance"]
    assert "moe/pathway_length" in readings and "moe/distance" not in readings


def test_manual_optimization(tmp_path: Path) -> None:
    """Health needs nothing; pathways need forward=, and say so."""
    without = MoEPathwayMonitor(every_n_steps=1, probe_every_n_steps=2)
    readings, _ = fit(tmp_path / "without", without, ManualCheckpointed(False))
    assert "moe/layer_0/load_cv" in readings and "moe/distance" not in readings
    assert without._stream is not None
    assert "pass MoEPathwayMonitor(forward=...)" in without._stream.reasons["moe/distance"]
    given = MoEPathwayMonitor(every_n_steps=1, probe_every_n_steps=2, forward=lambda module, batch: module.step(batch))
    readings, _ = fit(tmp_path / "with", given, ManualCheckpointed(False))
    assert "moe/distance" in readings


def test_a_model_that_cannot_be_run_again_has_health_alone(tmp_path: Path) -> None:
    """An iterator in the module cannot be turned back: pathways say why, and live hooks still count."""

    class Iterating(Model):
        def __init__(self) -> None:
            super().__init__()
            self.numbers = iter(range(100))

    monitor = MoEPathwayMonitor(every_n_steps=1, probe_every_n_steps=2)
    readings, _ = fit(tmp_path, monitor, Iterating())
    assert monitor.off is None and list(readings["moe/layer_0/load_cv"]) == list(range(6))
    assert monitor._stream is not None and "is an iterator" in monitor._stream.reasons["moe/distance"]


def test_a_step_that_differentiates_within_itself(tmp_path: Path) -> None:
    """A gradient penalty needs a graph, which a look at pathways has not: that alone is missing."""

    class Penalised(Model):
        def step(self, batch: dict[str, Any]) -> Tensor:
            x = batch["x"].requires_grad_()
            loss = nn.functional.cross_entropy(self.net(x).flatten(0, 1), batch["labels"].flatten())
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            return loss + gradient.square().sum()

    monitor = MoEPathwayMonitor(every_n_steps=1, probe_every_n_steps=100)
    readings, _ = fit(tmp_path, monitor, Penalised())
    assert monitor.off is None and list(readings["moe/layer_0/load_cv"]) == list(range(6))


def test_no_module_is_held_after_fit(tmp_path: Path) -> None:
    """The callback still lives and tells its charts; routers and batches are let go."""
    monitor = MoEPathwayMonitor(every_n_steps=1, probe_every_n_steps=2)
    fit(tmp_path, monitor)
    assert (monitor._capture, monitor._batch, monitor._tally) == (None, None, None) and monitor.charts()


def test_encoder_and_decoder_stand_apart(tmp_path: Path) -> None:
    """Pathways of a translation model's encoder and decoder are not mixed, and each has its own padding."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SwitchTransformersConfig(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=16,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        num_experts=4,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=1,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )

    class Translator(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.SwitchTransformersForConditionalGeneration(config)

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self.model(**batch).loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    ids = torch.randint(2, 32, (16, 9))
    labels = torch.randint(2, 32, (16, 6))
    labels[:, 4:] = -100
    mask = torch.ones_like(ids)
    mask[::2, 5:] = 0
    items = [{"input_ids": i, "attention_mask": m, "labels": y} for i, m, y in zip(ids, mask, labels, strict=True)]
    monitor = MoEPathwayMonitor(every_n_steps=1, probe_every_n_steps=1)
    trainer(tmp_path, [monitor], max_epochs=1).fit(Translator(), DataLoader(items, batch_size=8))
    assert monitor.off is None
    readings = scalars(tmp_path / "run")
    assert {"moe/encoder/pathway_length", "moe/decoder/pathway_length"} <= readings.keys()
    assert "moe/pathway_length" not in readings and "moe/probe_loss" in readings
    assert monitor._stream is not None and "moe padding" not in monitor._stream.remarks
    assert any(tag.endswith("moe/decoder/distance") for chart in monitor.charts() for tag in chart.tags)


def test_pictures_and_names_are_in_the_event_file(tmp_path: Path) -> None:
    """At the first reading of health and each tenth after it; layers are named once."""
    fit(tmp_path, MoEPathwayMonitor(every_n_steps=1), max_epochs=2)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0, "tensors": 0}).Reload()
    for tag in ("moe/load", "moe/coactivation"):
        assert [image.step for image in events.Images(tag)] == [0, 10]
        assert all(image.width >= 400 for image in events.Images(tag))
    (text,) = events.Tensors("moe/layers/text_summary")
    assert b"| 1 | `net.blocks.1.gate` | 2 of 6, from indices at op.topk2.0 |" in text.tensor_proto.string_val[0]


def test_a_callback_can_be_used_again(tmp_path: Path) -> None:
    """Another run with the same callback has a probe and a history of its own."""
    monitor = MoEPathwayMonitor(every_n_steps=2, probe_every_n_steps=3, max_samples=8)
    first, _ = fit(tmp_path / "first", monitor)
    second, _ = fit(tmp_path / "second", monitor)
    assert {tag: v for tag, v in first.items() if "moe" in tag} == {tag: v for tag, v in second.items() if "moe" in tag}


def test_a_model_with_one_block(tmp_path: Path) -> None:
    """The module itself may be the block."""

    class Whole(LinearGate):
        pass

    class Small(Model):
        def __init__(self) -> None:
            super().__init__()
            self.net = Whole()

        def step(self, batch: dict[str, Any]) -> Tensor:
            return nn.functional.cross_entropy(
                self.net(batch["x"])[..., :CLASSES].flatten(0, 1), batch["labels"].flatten()
            )

    monitor = MoEPathwayMonitor(every_n_steps=1)
    trainer(tmp_path, [monitor], max_epochs=1).fit(Small(), texts())
    assert monitor.off is None and "moe/layer_0/load_cv" in scalars(tmp_path / "run")
