"""Tangents of logits: each way against differences that are taken here, and which way is chosen."""

from __future__ import annotations

import copy
import math
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import LowRank, Recurrent, mlp
from replays import Model, run
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from dynwatch.callbacks.replay import Replay
from dynwatch.callbacks.snapshot import CannotReplayError
from dynwatch.callbacks.tangents import Along, Logits, Method, NoLogitsError, Way, choose, tangents

Named = dict[str, Tensor]
FORWARD, REVERSE = Way("forward"), Way("reverse")


# --- networks on 5 features and 3 classes


class Attention(nn.Module):
    """Fused attention, and PyTorch's own layer, on sequences of three."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(5, 12)
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, activation="gelu", batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(torch.stack([x, x.flip(1), x**2], 1)).chunk(3, -1)
        return self.head(self.layer(nn.functional.scaled_dot_product_attention(q, k, v)).mean(1))


class FastAttention(Attention):
    """Its layer is in evaluation mode, where PyTorch has a fused kernel for all of it."""

    def forward(self, x: Tensor) -> Tensor:
        self.layer.eval()
        return super().forward(x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())[:, :3]


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.body = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(4), nn.Dropout(0.3), nn.Linear(4, 3))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, self.first(x), use_reentrant=self.reentrant)


def cnn() -> nn.Module:
    front = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3), nn.BatchNorm1d(3), nn.GELU(), nn.Dropout(0.3))
    return nn.Sequential(*front, nn.Flatten(), nn.Linear(9, 3))


def compiled() -> nn.Module:
    return torch.compile(mlp(), backend="aot_eager")


# The ways that work, of float64 and of float32, in which torch takes other kernels on a CPU.
EVERY, NOT_FORWARD, NONE = ("forward", "reverse"), ("reverse",), ()
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], tuple[str, ...]]] = {
    "mlp": (mlp, EVERY, EVERY),
    "cnn": (cnn, EVERY, EVERY),
    "lstm": (Recurrent, EVERY, NOT_FORWARD),  # no forward mode in oneDNN
    "attention": (Attention, EVERY, EVERY),
    "fast attention": (FastAttention, EVERY, EVERY),
    "tied": (Tied, EVERY, EVERY),
    "frozen base": (LowRank, EVERY, EVERY),
    "checkpointed": (lambda: Checkpointed(False), EVERY, EVERY),
    "reentrant": (lambda: Checkpointed(True), NONE, NONE),
    "compiled": (compiled, EVERY, EVERY),
}


# --- what they are compared with


def direction_of(replay: Replay) -> Named:
    """A random one, as long as the parameters."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        * p.detach().norm()
        / p.numel() ** 0.5
        for name, p in replay.parameters.items()
    }


def start_of(replay: Replay) -> Named:
    return {name: p.detach() for name, p in replay.parameters.items()}


def plain_logits(net: Any, batch: Any) -> Tensor:
    return net(batch[0].double() if batch[0].is_floating_point() else batch[0])


def differences(replay: Replay, module: Any, direction: Named, logits_of: Callable[..., Tensor]) -> Tensor:
    """Central ones of fourth order of a copy of the net in float64, with the replay's random numbers."""
    replay.leaves()  # rewinds: the module is as it was, and so are the random streams
    stream = torch.get_rng_state()
    net = copy.deepcopy(module.net).double()
    held = {f"net.{name}": p for name, p in net.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in held.items()}
    assert held.keys() == direction.keys()

    def at(t: float) -> Tensor:
        torch.set_rng_state(stream)
        with torch.no_grad():
            for name, p in held.items():
                p.copy_(before[name] + t * direction[name].double())
            return logits_of(net, replay.batch)

    h = 1e-3
    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


def apart(found: list[Along], expected: Tensor) -> float:
    (along,) = found
    return float((along.tangent.double().reshape(expected.shape) - expected).norm() / expected.norm())


def each_way(
    model: Any,
    folder: Path,
    works: tuple[str, ...],
    close: float,
    coarse: float,
    *,
    batch: Any = None,
    logits_of: Callable[..., Tensor] = plain_logits,
    **settings: Any,
) -> None:
    """All ways that work are as close as said, those that do not raise, and "auto" takes the first that does."""

    def see(replay: Replay, module: Any) -> None:
        logits, start, direction = Logits(replay), start_of(replay), direction_of(replay)
        expected = differences(replay, module, direction, logits_of)
        assert float(expected.norm()) > 0
        for kind, way in (("forward", FORWARD), ("reverse", REVERSE)):
            if kind in works:
                assert apart(tangents(logits, start, direction, way), expected) <= close
            else:
                with pytest.raises((RuntimeError, NotImplementedError)):
                    tangents(logits, start, direction, way)
        asked = choose(logits, start, direction, "differences")
        assert asked.method == "differences" and str(asked) == "central differences, approximate: asked for"
        assert apart(tangents(logits, start, direction, asked), expected) <= coarse
        chosen = choose(logits, start, direction)
        assert chosen.method == (*works, "differences")[0]
        assert apart(tangents(logits, start, direction, chosen), expected) <= (close if works else coarse)
        if chosen.method != "forward":
            assert "forward mode does not work here (" in str(chosen)
        if chosen.method == "differences":
            assert "; reverse mode does not work here (" in str(chosen)

    run(model, folder, see, batch=batch, **settings)


@pytest.mark.parametrize("kind", NETS)
def test_tangents_in_float64_are_those_of_differences(kind: str, tmp_path: Path) -> None:
    """Within 1e-6 by each of the three ways, with batch statistics, the same dropout mask, and tied weights once."""
    make, works, _ = NETS[kind]
    each_way(Model(make().double()), tmp_path, works, 1e-8, 1e-6, precision="64-true")


@pytest.mark.parametrize(
    "kind", [kind for kind in NETS if kind not in ("cnn", "attention", "checkpointed", "reentrant")]
)
def test_tangents_in_float32(kind: str, tmp_path: Path) -> None:
    """Derivatives within some roundings, differences within two per cent; dropout draws other masks in float64."""
    make, _, works = NETS[kind]
    each_way(Model(make()), tmp_path, works, 1e-5, 0.02)


@pytest.mark.parametrize("kind", ["mlp", "tied", "frozen base", "lstm"])
def test_tangents_in_bfloat16(kind: str, tmp_path: Path) -> None:
    """Under autocast within 3 %, about eight roundings of 2^-8; a difference divides its two by a step of 5 %: 50 %."""
    make, _, works = NETS[kind]
    each_way(Model(make()), tmp_path, works, 0.03, 0.5, precision="bf16-mixed")


def test_a_language_model_that_computes_its_own_loss(tmp_path: Path) -> None:
    """Of Hugging Face, which shifts and flattens the logits; the last token has no target and does not count."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=2, n_head=2, resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.0
    )

    def own(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
        return model.net(input_ids=ids, labels=labels).loss

    def logits_of(net: Any, batch: Any) -> Tensor:
        return net(input_ids=batch[0]).logits.flatten(0, 1)

    def see(replay: Replay, module: Any) -> None:
        ((along),) = tangents(Logits(replay), start_of(replay), direction_of(replay), FORWARD)
        counted = along.scores.counted()
        assert counted is not None and counted.reshape(4, 6).tolist() == [[True] * 5 + [False]] * 4

    ids = torch.randint(11, (4, 6))
    model = Model(transformers.GPT2LMHeadModel(config).double(), own)
    # The library rounds its logits to float32, as if under autocast.
    each_way(model, tmp_path, EVERY, 1e-6, 0.05, batch=(ids, ids), logits_of=logits_of, precision="64-true")
    run(model, tmp_path, see, batch=(ids, ids), precision="64-true")


# --- models that some ways get wrong


class NoJvp(torch.autograd.Function):
    """A sine that only knows how to go backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> Any:
        return by * ctx.saved_tensors[0].cos()


class Once(NoJvp):
    """Also not twice."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by: Tensor) -> Any:
        return by * ctx.saved_tensors[0].cos()


class ForgetsToMove(NoJvp):
    """Its forward rule says that nothing moves."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    def jvp(ctx: Any, by: Tensor) -> Tensor:
        return torch.zeros_like(by)


class WrongBothWays(ForgetsToMove):
    """Its two rules are wrong in two ways."""

    @staticmethod
    def backward(ctx: Any, by: Tensor) -> Any:
        return -by * ctx.saved_tensors[0].cos()


class Through(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def straight_through(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


ODD: dict[str, tuple[Callable[[Tensor], Tensor], str, str]] = {
    "no jvp": (NoJvp.apply, "reverse", "twice: forward mode does not work here (You must implement the jvp function"),
    "once": (Once.apply, "differences", "reverse mode misses a part of the model, as differences show"),
    "forgets": (ForgetsToMove.apply, "reverse", "twice: forward mode misses a part of the model, as differences show"),
    "wrong": (WrongBothWays.apply, "differences", "show; reverse mode misses a part of the model, as differences show"),
    "straight through": (straight_through, "forward", "forward-mode differentiation"),
}


@pytest.mark.parametrize("kind", ODD)
def test_functions_that_some_ways_get_wrong(kind: str, tmp_path: Path) -> None:
    """The way taken is right, and says why it is not the usual one; a rounding differs from differences on purpose."""
    function, method, why = ODD[kind]

    def see(replay: Replay, module: Any) -> None:
        logits, start, direction = Logits(replay), start_of(replay), direction_of(replay)
        way = choose(logits, start, direction)
        assert way.method == method and why in str(way)
        if kind == "straight through":
            by = {name.removeprefix("net."): value for name, value in direction.items()}
            x, last = replay.batch[0], module.net.last.weight.detach()
            moved = linear(x, by["first.weight"], by["first.bias"])
            expected = linear(moved, last) + linear(module.net.first(x).round(), by["last.weight"], by["last.bias"])
        else:
            expected = differences(replay, module, direction, plain_logits)
        assert apart(tangents(logits, start, direction, way), expected.detach()) <= 1e-6

    run(Model(Through(function).double()), tmp_path, see, precision="64-true")


@pytest.mark.parametrize(
    ("function", "method", "reason"),
    [
        (NoJvp, "forward", r"forward mode does not work here \(You must implement the jvp"),
        (ForgetsToMove, "forward", "forward mode misses a part of the model, as differences show"),
        (WrongBothWays, "reverse", "reverse mode misses a part of the model, as differences show"),
        (Once, "reverse", "reverse mode misses a part of the model, as differences show"),
        (NoJvp, "reverse", ""),
    ],
)
def test_a_way_that_was_asked_for_must_be_right(function: Any, method: Method, reason: str, tmp_path: Path) -> None:
    """A wrong one is refused, with the reason, and so is one that does not work."""

    def see(replay: Replay, module: Any) -> None:
        asked = Logits(replay), start_of(replay), direction_of(replay), method
        if not reason:
            assert choose(*asked) == Way(method)  # type: ignore[arg-type]
            return
        with pytest.raises(RuntimeError, match=f"method='{method}' was asked for, and {reason}.*: use 'auto'$"):
            choose(*asked)

    run(Model(Through(function.apply)), tmp_path, see)


def test_one_of_two_losses_that_a_way_misses(tmp_path: Path) -> None:
    """Logits are compared with those of the same cross entropy, not with the next one's."""

    def both(model: Any, x: Tensor, y: Tensor) -> Tensor:
        hidden = model.net.first(x)
        missed = ForgetsToMove.apply(hidden)[:, :3]
        return cross_entropy(missed, y) + cross_entropy(10 * model.net.last(hidden), y)

    def see(replay: Replay, module: Any) -> None:
        logits, start, direction = Logits(replay), start_of(replay), direction_of(replay)
        way = choose(logits, start, direction)
        assert way.method == "reverse" and "forward mode misses a part of the model" in str(way)
        assert [along.scores.call for along in tangents(logits, start, direction, way)] == [0, 1]

    run(Model(Through(torch.sin), both), tmp_path, see)


@pytest.mark.parametrize("way", [FORWARD, REVERSE, Way("differences", "", 1e-5)], ids=lambda way: way.method)
def test_logits_that_do_not_depend_on_the_weights_are_left_out(way: Way, tmp_path: Path) -> None:
    """A teacher's, and detached ones that are only logged, which differences would see move."""

    def distilled(model: Any, x: Tensor, y: Tensor) -> Tensor:
        z = model.net(x)
        model.log("detached", cross_entropy(z.detach(), y))
        teacher = cross_entropy(x[:, :3] * 3, y)
        with torch.no_grad():
            model.log("unseen", cross_entropy(z, y))
        return cross_entropy(z, y) + teacher

    def see(replay: Replay, module: Any) -> None:
        found = tangents(Logits(replay), start_of(replay), direction_of(replay), way)
        assert [along.scores.call for along in found] == [2]
        assert apart(found, differences(replay, module, direction_of(replay), plain_logits)) <= 1e-6

    run(Model(mlp().double(), distilled), tmp_path, see, precision="64-true")


def test_parts_of_the_weights_can_move_alone(tmp_path: Path) -> None:
    """Parameters that a direction leaves out stay; a direction of zeros moves nothing, and nothing is left out."""

    def see(replay: Replay, module: Any) -> None:
        logits, start, direction = Logits(replay), start_of(replay), direction_of(replay)
        last = {name: by for name, by in direction.items() if name.startswith("net.2")}
        zeros = {name: torch.zeros_like(by) for name, by in direction.items()}
        whole = {name: last.get(name, zeros[name]) for name in direction}
        expected = differences(replay, module, whole, plain_logits)
        for way in (FORWARD, REVERSE, Way("differences", "", 1e-5)):
            assert apart(tangents(logits, start, last, way), expected) <= 1e-6
            (still,) = tangents(logits, start, zeros, way)
            assert not still.tangent.any() and torch.equal(still.scores.logits, module.net(replay.batch[0]).detach())

    run(Model(mlp().double()), tmp_path, see, precision="64-true")


@pytest.mark.parametrize("size", [0.0, 1e-10, 1e15, math.nan, math.inf])
def test_weights_of_any_size_have_some_way(size: float, tmp_path: Path) -> None:
    """A model that has blown up, or died, tells nothing about the way: the usual one is taken."""

    def see(replay: Replay, module: Any) -> None:
        start = {name: torch.full_like(p, size) for name, p in replay.parameters.items()}
        direction = {name: torch.ones_like(p) for name, p in replay.parameters.items()}
        way = choose(Logits(replay), start, direction)
        assert way.method == "forward"
        (along,) = tangents(Logits(replay), start, direction, way)
        assert along.tangent.shape == (8, 3)

    run(Model(mlp()), tmp_path, see)


# --- what is refused


class InATuple(nn.Module):
    """Computes with weights from a tuple, where nothing can take their place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 3)
        self.kept = (self.last.weight, self.last.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.first(x).tanh(), *self.kept)


METHODS: tuple[Method, ...] = ("auto", "forward", "reverse", "differences")


@pytest.mark.parametrize("method", METHODS)
def test_parameters_in_a_tuple_are_refused(method: Method, tmp_path: Path) -> None:
    """By name, instead of a tangent that misses them."""

    def see(replay: Replay, module: Any) -> None:
        with pytest.raises(CannotReplayError, match=r"training_step reads net\.last\.weight, net\.last\.bias from a"):
            choose(Logits(replay), start_of(replay), direction_of(replay), method)

    run(Model(InATuple()), tmp_path, see)


ELSEWHERE: Any = types.ModuleType("elsewhere")  # out of a replay's reach


@pytest.mark.parametrize("method", METHODS)
def test_a_step_that_is_not_repeatable_is_refused(method: Method, tmp_path: Path) -> None:
    """Its logits differ at the same weights, so their differences say nothing; the message names the cure."""

    def counted(model: Any, x: Tensor, y: Tensor) -> Tensor:
        ELSEWHERE.calls += 1
        return cross_entropy(model.net(x) * ELSEWHERE.calls, y)

    def see(replay: Replay, module: Any) -> None:
        ELSEWHERE.calls = 0
        with pytest.raises(CannotReplayError, match=r"gave other logits the second time.*Pass logits= \(a function"):
            choose(Logits(replay), start_of(replay), direction_of(replay), method)

    ELSEWHERE.calls = 0
    run(Model(mlp(), counted), tmp_path, see)


def test_a_step_with_another_number_of_losses_elsewhere(tmp_path: Path) -> None:
    """Where the weights decide how many cross entropies there are, differences have nothing to compare."""

    def branches(model: Any, x: Tensor, y: Tensor) -> Tensor:
        z = model.net(x)
        loss = cross_entropy(z, y)
        return loss if bool(z.sum() > ELSEWHERE.limit) else loss + cross_entropy(z, y)

    def see(replay: Replay, module: Any) -> None:
        ELSEWHERE.limit = float(module.net(replay.batch[0]).sum().detach())
        with pytest.raises(CannotReplayError, match="computed 2 cross entropies, and others at weights a little away"):
            tangents(Logits(replay), start_of(replay), direction_of(replay), Way("differences", "", 1e-3))

    ELSEWHERE.limit = 0.0
    run(Model(mlp(), branches), tmp_path, see)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_without_a_cross_entropy(method: Method, tmp_path: Path) -> None:
    """One message for what is none, for one under no_grad, and for one of logits that no weight moves."""

    def squares(model: Any, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            cross_entropy(model.net(x), y)
        cross_entropy(x[:, :3], y)
        return model.net(x).square().mean()

    def see(replay: Replay, module: Any) -> None:
        with pytest.raises(
            NoLogitsError, match=r"^training_step computes no cross_entropy, nll_loss or .* pass logits="
        ):
            choose(Logits(replay), start_of(replay), direction_of(replay), method)

    run(Model(mlp(), squares), tmp_path, see)


def test_a_function_of_detached_logits(tmp_path: Path) -> None:
    """The message says what is wrong with it, rather than to pass one."""

    @torch.no_grad()
    def careful(module: Any, batch: Any) -> Tensor:
        return module.net(batch[0])

    def see(replay: Replay, module: Any) -> None:
        with pytest.raises(NoLogitsError, match=r"^the function logits= returned logits that depend on no"):
            choose(Logits(replay, given=True), start_of(replay), direction_of(replay))

    run(Model(mlp()), tmp_path, see, replay_settings={"loss": careful})


class FrozenBefore(nn.Module):
    """The usual recipe for reentrant checkpoints of a frozen beginning: its output is made to ask for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.inside, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.before.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x).requires_grad_()
        return self.last(checkpoint(lambda h: torch.tanh(self.inside(h)), hidden, use_reentrant=True))


def test_a_reentrant_checkpoint_behind_a_frozen_part(tmp_path: Path) -> None:
    """Forward and reverse mode lose the same part without a word, and differences do not."""

    def see(replay: Replay, module: Any) -> None:
        way = choose(Logits(replay), start_of(replay), direction_of(replay))
        assert way.method == "differences" and "misses a part of the model" in way.why

    run(Model(FrozenBefore()), tmp_path, see)
