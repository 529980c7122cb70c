"""Routers are found in real code, and what is read of them is what their experts got, bit for bit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import moes
import pytest
import torch
from moes import EXPERTS, STYLES, TOP_K, WIDTH, Net
from torch import Tensor, nn

from dynwatch.router_capture import RouterCapture
from dynwatch.router_decision import Decision
from dynwatch.router_plan import router_weight
from dynwatch.router_search import chosen_routers, find_routers
from dynwatch.routing import Routing, load_counts

transformers = pytest.importorskip("transformers")

Seen = list[tuple[int, Decision]]


def capture(model: nn.Module, run: Callable[[], object], **options: Any) -> tuple[RouterCapture, Seen, list[str]]:
    """Run a model once with hooks on its candidates: routers, decisions, and what was dropped."""
    seen: Seen = []
    watch = RouterCapture(find_routers(model), lambda at, decision: seen.append((at, decision)), **options)
    with watch:
        run()
    places = [site.name for site in watch.sites]
    dropped = [site.name for site in watch.settle()]
    kept = [site.name for site in watch.sites]
    return watch, [(kept.index(places[at]), decision) for at, decision in seen if places[at] in kept], dropped


def dense(routing: Routing, use_weights: bool = True) -> Tensor:
    """[N, E] weights, or 1 for a chosen expert, as a record says."""
    n = len(routing.indices)
    entries = routing.weights if use_weights and routing.weights is not None else torch.ones(routing.indices.shape)
    inside = (routing.indices >= 0) & (routing.indices < routing.n_experts)
    spread = torch.zeros(n, routing.n_experts + 1, dtype=entries.dtype)
    spread.scatter_(1, torch.where(inside, routing.indices, routing.n_experts), entries)
    return spread[:, :-1]


@pytest.mark.parametrize("style", STYLES)
def test_own_mixtures(style: str) -> None:
    """Each style is found in every block; choices are those of the experts, and so are weights where they are seen."""
    torch.manual_seed(0)
    model = Net(style)
    x = torch.randn(4, 9, WIDTH)
    watch, seen, dropped = capture(model, lambda: model(x))
    assert len(watch.sites) == 3 and all("noise" in name for name in dropped)
    assert [at for at, _ in seen] == [0, 1, 2]
    for (_, decision), block in zip(seen, model.blocks, strict=True):
        truth, routing = block.truth, decision.routing
        assert routing.n_experts == EXPERTS and decision.leading == (4, 9)
        assert torch.equal(dense(routing, use_weights=False) > 0, truth > 0)
        if routing.weights is not None:
            assert torch.equal(dense(routing), truth)
        assert routing.probabilities is not None
        torch.testing.assert_close(routing.probabilities.sum(-1), torch.ones(36))
        weight = router_weight(watch.sites[0])
        assert weight is not None and weight.shape == (EXPERTS, WIDTH)
    # Where they are emitted, weights are there.
    if style.startswith(("emitting", "noisy", "dispatch")):
        assert seen[0][1].routing.weights is not None


@pytest.mark.parametrize(
    ("style", "score", "logits"),
    [("linear", "softmax", True), ("sigmoid", "sigmoid", True), ("emitting_scores", "given", False)],
)
def test_the_way_of_scoring_is_found(style: str, score: str, logits: bool) -> None:
    """Probabilities are the softmax of the logits, or the normalised sigmoids."""
    model, x = Net(style), torch.randn(4, 9, WIDTH)
    watch, seen, _ = capture(model, lambda: model(x))
    assert watch.plans[0] is not None and watch.plans[0].score == score
    given = model.norms[0](x).reshape(-1, WIDTH)
    raw = model.blocks[0].gate(given) if logits else model.blocks[0].router(given)[2]
    expected = raw.softmax(-1) if score == "softmax" else (raw.sigmoid() if logits else raw)
    decision = seen[0][1]
    torch.testing.assert_close(decision.routing.probabilities, expected / expected.sum(-1, keepdim=True))
    assert (decision.logits is not None) is logits
    if decision.logits is not None:
        assert torch.equal(decision.logits, raw)


def test_the_second_pass_reads_the_same_way_and_waits_for_nothing() -> None:
    """Later passes follow the plan; decisions of other tokens are again those of the experts."""
    for style in STYLES:
        model = Net(style)
        watch, _, _ = capture(model, lambda model=model: model(torch.randn(2, 9, WIDTH)))
        seen: Seen = []
        watch._deliver = lambda at, decision, seen=seen: seen.append((at, decision))  # type: ignore[misc]
        with watch:
            model(torch.randn(3, 8, WIDTH))
        assert len(seen) == 3, style
        for (_, decision), block in zip(seen, model.blocks, strict=True):
            assert torch.equal(dense(decision.routing, use_weights=False) > 0, block.truth > 0), style
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_dropped_tokens_are_empty_slots() -> None:
    """A capacity of three quarters drops some; their slots are -1."""
    model = Net("dispatch")
    _, seen, _ = capture(model, lambda: model(torch.randn(4, 9, WIDTH)))
    for (_, decision), block in zip(seen, model.blocks, strict=True):
        assert decision.capacity
        dropped = int((decision.routing.indices < 0).sum())
        assert dropped == 36 * TOP_K - int((block.truth > 0).sum()) > 0


def test_a_router_that_did_not_run_yet_stays_a_candidate() -> None:
    """As under LayerDrop; a candidate by its shape alone does not."""
    model = Net("linear")
    watch, _seen, dropped = capture(model, lambda: model.blocks[0](torch.randn(2, 9, WIDTH)))
    assert len(watch.sites) == 3 and dropped == [] and [watch.reads(at) for at in range(3)] == [True, False, False]
    with watch:
        model(torch.randn(2, 9, WIDTH))
    assert watch.settle() == [] and all(watch.reads(at) for at in range(3))
    assert capture(model, lambda: None)[2] == []
    assert capture(MultiHead(), lambda: None)[2] == ["trunk"]


def test_lazy_modules_have_no_shape_yet() -> None:
    """They are passed over, in a dense model and beside a router."""
    model = nn.Sequential(nn.LazyLinear(4), Net("linear"), nn.ModuleList([nn.LazyLinear(3), nn.LazyLinear(3)]))
    assert [site.name for site in find_routers(model)] == [f"1.blocks.{i}.gate" for i in range(3)]


def test_logits_that_are_written_to_are_copied() -> None:
    """A block that masks its first choice in place to find the second: seen, left out once, and then read right."""

    class Masking(moes.Block):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, EXPERTS)

        def forward(self, x: Tensor) -> Tensor:
            logits = self.gate(x)
            self.logits = logits.detach().clone()
            indices = logits.detach().topk(TOP_K).indices
            logits.data.scatter_(1, indices[:, :1], -1e9)
            logits.detach().scatter_(1, indices[:, :1], -1e9)
            return self._combine(x, indices, torch.ones(indices.shape))

    model, seen = Masking(), []
    watch = RouterCapture(find_routers(model), lambda at, decision: seen.append(decision))
    with watch:
        for _ in range(3):
            model(torch.randn(7, WIDTH))
    assert len(seen) == 2
    assert torch.equal(seen[-1].logits, model.logits)


def test_an_exception_in_a_block_leaves_no_hook_and_no_mode() -> None:
    """The operation watch is left also where the forward pass raises."""

    class Broken(moes.LinearGate):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("in the middle")

    model = Broken()
    watch = RouterCapture(find_routers(model), lambda *_: None)
    with pytest.raises(RuntimeError, match="in the middle"), watch:
        model(torch.randn(3, WIDTH))
    assert torch.overrides._get_current_function_mode() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_counts_tokens_once(reentrant: bool) -> None:
    """The part that runs again in backward is not a new decision."""
    model, seen = Net("linear"), []
    x = torch.randn(2, 9, WIDTH, requires_grad=True)
    watch = RouterCapture(find_routers(model), lambda at, decision: seen.append(at))
    with watch:
        y = torch.utils.checkpoint.checkpoint(model.blocks[0], x, use_reentrant=reentrant)
        y.sum().backward()
    assert seen == [0]


def test_compiled_code_is_left_alone() -> None:
    """Hooks that are traced do nothing: no break of the graph, and no decision."""
    model, seen = Net("stacked"), []
    watch = RouterCapture(find_routers(model), lambda at, decision: seen.append(at))
    x = torch.randn(2, 9, WIDTH)
    expected = model(x)
    with watch:
        found = torch.compile(model, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, expected)
    assert seen == []


def test_half_precision_and_autocast() -> None:
    """Choices are the experts' under autocast and in bfloat16."""
    for style in ("linear", "sigmoid", "emitting", "noisy"):
        model = Net(style)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            _, seen, _ = capture(model, lambda model=model: model(torch.randn(4, 9, WIDTH)))
        for (_, decision), block in zip(seen, model.blocks, strict=True):
            assert torch.equal(dense(decision.routing, use_weights=False) > 0, block.truth > 0), style
    model = Net("linear").bfloat16()
    _, seen, _ = capture(model, lambda: model(torch.randn(4, 9, WIDTH).bfloat16()))
    assert len(seen) == 3


# --- the user's own word


def test_named_routers_and_an_own_reading() -> None:
    """routers= finds by pattern or module; extract= replaces the reading."""
    model = Net("linear")
    assert [site.name for site in chosen_routers(model, ["gate$"], None, None)] == [
        f"blocks.{i}.gate" for i in range(3)
    ]
    (site,) = chosen_routers(model, [model.blocks[1].gate], None, 1)
    assert (site.name, site.n_experts, site.top_k) == ("blocks.1.gate", EXPERTS, 1)
    with pytest.raises(ValueError, match=r"routers='nothing' matches none of the model's modules. Names look like: bl"):
        chosen_routers(model, ["nothing"], None, None)
    with pytest.raises(ValueError, match=r"routers=Linear is none of the model's modules"):
        chosen_routers(model, [nn.Linear(2, 2)], None, None)
    with pytest.raises(ValueError, match=r"routers='\(' is not a regular expression"):
        chosen_routers(model, ["("], None, None)

    def top1(module: nn.Module, args: Any, output: Tensor) -> Routing:
        return Routing(output.reshape(-1, EXPERTS).argmax(-1, keepdim=True), EXPERTS)

    seen: Seen = []
    watch = RouterCapture(chosen_routers(model, ["gate"], None, None), lambda at, d: seen.append((at, d)), extract=top1)
    with watch:
        model(torch.randn(2, 9, WIDTH))
    assert watch.settle() == [] and len(seen) == 3 and seen[0][1].routing.indices.shape == (18, 1)
    wrong = RouterCapture(
        chosen_routers(model, ["gate"], None, None),
        lambda *_: None,
        extract=lambda *_: None,  # type: ignore[arg-type,return-value]
    )
    with pytest.raises(TypeError, match=r"extract= returned NoneType for blocks.0.gate"), wrong:
        model(torch.randn(2, 9, WIDTH))


def test_of_two_matrices_the_gate_is_the_one_that_was_chosen_by() -> None:
    """Whichever is defined first."""
    model = Net("noise_first")
    watch, _, dropped = capture(model, lambda: model(torch.randn(4, 9, WIDTH)))
    assert [site.name for site in watch.sites] == [f"blocks.{i}.gate" for i in range(3)]
    assert dropped == [f"blocks.{i}.noise" for i in range(3)]


def test_a_router_that_blocks_share_is_one_of_each() -> None:
    """Its decisions in each block are counted there."""
    model = Net("linear")
    for block in model.blocks[1:]:
        block.gate = model.blocks[0].gate
    watch, seen, _ = capture(model, lambda: model(torch.randn(4, 9, WIDTH)))
    assert len(watch.sites) == 3 and [at for at, _ in seen] == [0, 1, 2]
    for (_, decision), block in zip(seen, model.blocks, strict=True):
        assert torch.equal(dense(decision.routing) > 0, block.truth > 0)


def test_a_guess_is_believed_only_if_the_experts_got_it() -> None:
    """A k that an attribute says, and a choice by a bias of which no watched operation shows anything."""

    class Biased(moes.Block):
        top_k = TOP_K

        def __init__(self, scale: float) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, EXPERTS)
            self.scale = scale

        def forward(self, x: Tensor) -> Tensor:
            p = self.gate(x).softmax(-1)
            indices = (p + self.scale * torch.linspace(0, 1, EXPERTS)).sort(dim=-1, descending=True).indices[:, :TOP_K]
            return self._combine(x, indices, p.gather(1, indices))

    for scale, found in ((0.0, 1), (1.0, 0)):
        model = Biased(scale)
        watch, _, _ = capture(model, lambda model=model: model(torch.randn(40, WIDTH)))
        assert len(watch.sites) == found


def test_experts_by_a_table_may_be_the_same_twice() -> None:
    """A hash router whose table is fresh sends all tokens to one expert, which is what the load must show."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.top_k, self.num_experts = TOP_K, EXPERTS
            self.weight = nn.Parameter(torch.randn(EXPERTS, WIDTH))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x @ self.weight.t(), torch.zeros(len(x), TOP_K, dtype=torch.int64)

    class Hashed(moes.Block):
        def __init__(self) -> None:
            super().__init__()
            self.router = Table()

        def forward(self, x: Tensor) -> Tensor:
            _, indices = self.router(x)
            return self.experts[0](x) + 0 * indices.sum()

    model = Hashed()
    _, seen, _ = capture(model, lambda: model(torch.randn(7, WIDTH)))
    assert load_counts(seen[0][1].routing).tolist() == [14, 0, 0, 0, 0, 0]


def test_top_k_of_the_most_probable_where_nothing_is_seen() -> None:
    """A gate whose choice no watched operation shows needs top_k."""

    class Sorting(moes.Block):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, EXPERTS)

        def forward(self, x: Tensor) -> Tensor:
            weights = self.gate(x).softmax(-1)
            indices = weights.sort(dim=-1, descending=True).indices[:, :TOP_K]
            return self._combine(x, indices, weights.gather(1, indices))

    model = Sorting()
    watch, seen, dropped = capture(model, lambda: model(torch.randn(7, WIDTH)))
    assert watch.sites == [] and dropped == ["gate"]
    watch, seen, _ = capture(model, lambda: model(torch.randn(7, WIDTH)), top_k=TOP_K)
    assert torch.equal(dense(seen[0][1].routing) > 0, model.truth > 0)
    assert str(watch.plans[0]) == "2 of 6, from the 2 most probable"


# --- real models

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_PAIR: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "vocab_size": 64}


def _llama(kind: str, **more: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}TextConfig", None) or getattr(transformers, f"{kind}Config")
    return getattr(transformers, f"{kind}ForCausalLM")(config(**_SIZES, **more))


def _deepseek() -> nn.Module:
    return _llama(
        "DeepseekV3",
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=2,
        topk_group=1,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
    )


def _switch() -> nn.Module:
    config = transformers.SwitchTransformersConfig(
        **_PAIR,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=4,
        num_decoder_layers=4,
        num_heads=4,
        num_experts=8,
        expert_capacity=2,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
    )
    return transformers.SwitchTransformersForConditionalGeneration(config)


def _nllb() -> nn.Module:
    config = transformers.NllbMoeConfig(
        **_PAIR,
        d_model=32,
        encoder_layers=4,
        decoder_layers=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        num_experts=8,
        encoder_sparse_step=2,
        decoder_sparse_step=2,
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        expert_capacity=8,
    )
    return transformers.NllbMoeForConditionalGeneration(config)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "olmoe": (lambda: _llama("Olmoe", num_experts=8, num_experts_per_tok=2), 3),
    "mixtral": (lambda: _llama("Mixtral", num_local_experts=8, num_experts_per_tok=2), 3),
    "qwen3": (
        lambda: _llama("Qwen3Moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8),
        3,
    ),
    "deepseek": (_deepseek, 2),
    "gpt_oss": (lambda: _llama("GptOss", num_local_experts=8, num_experts_per_tok=2, head_dim=8), 3),
    "switch": (_switch, 4),
    "llama4": (
        lambda: _llama("Llama4", num_local_experts=8, num_experts_per_tok=2, intermediate_size_mlp=48, head_dim=8),
        3,
    ),
    "nllb": (_nllb, 4),
}


def _record_experts(model: nn.Module) -> list[tuple[Tensor, ...]]:
    """What each experts module is called with, from a pre-hook of the test's own."""
    calls: list[tuple[Tensor, ...]] = []
    for module in model.modules():
        if type(module).__name__.endswith("Experts"):
            module.register_forward_pre_hook(lambda m, args: calls.append(tuple(a.detach().clone() for a in args)))
    return calls


def _expected(family: str, given: tuple[Tensor, ...]) -> Tensor:
    """[N, E] weights that the experts got."""
    if family == "llama4":  # inputs times sigmoid, [E * N, d]: an expert that was not chosen gets zeros
        return given[0].view(8, -1, 32).abs().sum(-1).t() > 0
    _, indices, weights = given
    if family == "switch":
        return (indices.reshape(-1, 8) * weights).float()
    if family == "nllb":  # a mask of the first choice, and weights of both
        return weights
    n, _k = indices.shape
    return torch.zeros(n, 8, dtype=weights.dtype).scatter_(1, indices, weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers(family: str) -> None:
    """Every router is found, and indices and weights are what the experts were called with, bit for bit."""
    torch.manual_seed(0)
    make, count = FAMILIES[family]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make().train()
    with torch.no_grad():
        for _name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    given = _record_experts(model)
    ids = torch.randint(4, 60, (3, 10))
    watch, seen, dropped = capture(model, lambda: model(input_ids=ids, labels=ids))
    assert len(watch.sites) == count and dropped == []
    assert len(given) == len(seen) == count
    for (_, decision), call in zip(seen, given, strict=True):
        expected, routing = _expected(family, call), decision.routing
        assert routing.n_experts == 8 and len(routing.indices) == 30
        if family == "llama4":
            assert torch.equal(dense(routing, use_weights=False) > 0, expected)
            assert routing.weights is not None
        else:
            assert torch.equal(dense(routing), expected)
        assert int(load_counts(routing).sum()) == int((expected != 0).sum())
        assert routing.probabilities is not None and decision.logits is not None
    assert all(
        plan is not None and plan.score == ("sigmoid" if family in ("deepseek", "llama4") else "softmax")
        for plan in watch.plans
    )


# --- dense models


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.stages = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = x + stage(x).relu()
        return self.head(x.mean((2, 3)))


class UNet1d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList(nn.Conv1d(4, 4, 3, padding=1) for _ in range(3))
        self.up = nn.ModuleList(nn.ConvTranspose1d(4, 4, 3, padding=1) for _ in range(3))
        self.mix = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = layer(x).relu()
            skips.append(x)
        for layer, skip in zip(self.up, reversed(skips), strict=True):
            x = layer(x + skip).relu()
        return self.mix(x.transpose(1, 2))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.LSTM(6, 6, batch_first=True) for _ in range(2))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return self.head(x)


class MultiHead(nn.Module):
    """As many heads as the trunk has outputs, and a top-k of its logits as a metric."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(6, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 5) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.trunk(x).relu()
        outputs = torch.stack([head(x) for head in self.heads], 1)
        outputs.topk(2, dim=-1)
        return outputs


class Policy(nn.Module):
    """As many layers as actions, of which it takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.pi = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).relu()
        logits = self.pi(x)
        logits.argmax(-1)
        return torch.multinomial(logits.softmax(-1), 1)


class Ensemble(nn.Module):
    """Three nets for three classes, and a trunk with a ReLU, whose zeros look like a sparse choice."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 3), nn.ReLU())
        self.nets = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        votes = torch.stack([net(self.trunk(x)) for net in self.nets]).softmax(-1).mean(0)
        return torch.nn.functional.one_hot(votes.topk(1).indices[:, 0], 3)


def _ids(model: nn.Module) -> object:
    return model(input_ids=torch.randint(0, 60, (2, 9)))


_GPT2 = {"vocab_size": 64, "n_positions": 32, "n_embd": 8, "n_layer": 8, "n_head": 2}
_BERT = {"vocab_size": 64, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
DENSE: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], object]]] = {
    "resnet": (ResNet, lambda model: model(torch.randn(2, 1, 8, 8))),
    "bert": (lambda: transformers.BertForMaskedLM(transformers.BertConfig(**_BERT)), _ids),
    "gpt2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**_GPT2)), _ids),
    "lstm": (Lstm, lambda model: model(torch.randn(2, 9, 6))),
    "unet": (UNet1d, lambda model: model(torch.randn(2, 4, 16))),
    "multi_head": (MultiHead, lambda model: model(torch.randn(3, 6))),
    "policy": (Policy, lambda model: model(torch.randn(9, 6))),
    "ensemble": (Ensemble, lambda model: model(torch.randn(9, 6))),
}


@pytest.mark.parametrize("kind", DENSE)
def test_no_router_in_a_dense_model(kind: str) -> None:
    """Sizes are chosen so that some look like one: as many layers as a matrix has rows."""
    make, run = DENSE[kind]
    model = make()
    watch, seen, _dropped = capture(model, lambda: run(model))
    assert watch.sites == [] and seen == []
    assert not [site for site in find_routers(model) if site.telling]
