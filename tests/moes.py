"""Small mixtures of experts in the styles that people write; each notes what its experts really got."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, EXPERTS, TOP_K = 12, 6, 2


class Block(nn.Module):
    """Experts in a list, each called on its own tokens; subclasses route.

    Attributes:
        truth: [N, E] weights that the experts got at the last call, zero where an expert did not get a token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)) for _ in range(EXPERTS)
        )
        self.truth = torch.empty(0)

    def _combine(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """x [N, d], indices and weights [N, k]."""
        y = torch.zeros_like(x)
        self.truth = torch.zeros(len(x), EXPERTS)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(indices == e)
            if len(token):
                y = y.index_add(0, token, (expert(x[token]) * weights[token, slot, None]).to(y.dtype))
                self.truth[token, e] = weights[token, slot].detach().float()
        return y


class LinearGate(Block):
    """A plain linear gate; the block takes the top k of a softmax and normalises them."""

    def __init__(self, top_k: int = TOP_K) -> None:
        super().__init__()
        self.top_k = top_k
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        weights, indices = torch.topk(self.gate(flat).softmax(-1), self.top_k)
        return self._combine(flat, indices, weights / weights.sum(-1, keepdim=True)).view_as(x)


class Top1(Block):
    """The most probable expert, by argmax."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        probabilities = self.gate(flat).softmax(-1)
        indices = probabilities.argmax(-1, keepdim=True)
        return self._combine(flat, indices, probabilities.gather(1, indices)).view_as(x)


class SigmoidWithBias(Block):
    """Sigmoid scores, chosen after a bias is added that balances the load (DeepSeek-V3)."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.register_buffer("selection_bias", torch.linspace(-0.5, 0.5, EXPERTS))
        self.shared_expert_gate = nn.Linear(WIDTH, 1)
        self.shared_expert = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        scores = self.gate(flat).sigmoid()
        indices = torch.topk(scores + self.selection_bias, TOP_K, dim=-1).indices
        weights = scores.gather(1, indices)
        shared = self.shared_expert(flat) * self.shared_expert_gate(flat).sigmoid()
        return (self._combine(flat, indices, weights / weights.sum(-1, keepdim=True)) + shared).view_as(x)


class ExpertChoice(Block):
    """Each expert takes its favourite tokens (arXiv 2202.09368)."""

    def __init__(self, batched: bool = False) -> None:
        super().__init__()
        self.batched = batched
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        probabilities = self.gate(x).softmax(-1)
        if self.batched:  # of each sequence
            capacity = TOP_K * x.shape[1] // EXPERTS
            weights, tokens = probabilities.transpose(1, 2).topk(capacity, dim=-1)
            tokens = (tokens + torch.arange(len(x))[:, None, None] * x.shape[1]).transpose(0, 1).flatten(1)
            weights = weights.transpose(0, 1).flatten(1)
        else:
            weights, tokens = probabilities.reshape(-1, EXPERTS).t().topk(TOP_K * len(flat) // EXPERTS, dim=1)
        y = torch.zeros_like(flat)
        self.truth = torch.zeros(len(flat), EXPERTS)
        for e, expert in enumerate(self.experts):
            y = y.index_add(0, tokens[e], expert(flat[tokens[e]]) * weights[e, :, None])
            self.truth[tokens[e], e] = weights[e].detach()
        return y.view_as(x)


class NoisyTopK(Block):
    """A gate of bare parameters with noise, k + 1 candidates and a scatter (arXiv 1701.06538)."""

    def __init__(self) -> None:
        super().__init__()
        self.w_gate = nn.Parameter(0.3 * torch.randn(WIDTH, EXPERTS))
        self.w_noise = nn.Parameter(torch.zeros(WIDTH, EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        logits = flat @ self.w_gate
        if self.training:
            logits = logits + torch.randn_like(logits) * functional.softplus(flat @ self.w_noise)
        top, candidates = logits.topk(TOP_K + 1, dim=1)
        indices = candidates[:, :TOP_K]
        gates = torch.zeros_like(logits).scatter(1, indices, top[:, :TOP_K].softmax(1))
        return self._combine(flat, indices, gates.gather(1, indices)).view_as(x)


class DispatchGate(nn.Module):
    """Emits a loss, combine weights, a dispatch mask and counts, with a capacity (DeepSpeed)."""

    def __init__(self, capacity_factor: float) -> None:
        super().__init__()
        self.wg = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.capacity_factor = capacity_factor

    def forward(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gates = self.wg(flat.float()).softmax(dim=1)
        capacity = math.ceil(self.capacity_factor * len(flat) * TOP_K / EXPERTS)
        first = functional.one_hot(gates.argmax(dim=1), EXPERTS)
        second = functional.one_hot(gates.masked_fill(first.bool(), -1.0).argmax(dim=1), EXPERTS)
        places = [torch.cumsum(first, 0) - 1, torch.cumsum(second, 0) - 1 + first.sum(0, keepdim=True)]
        combine = torch.zeros(len(flat), EXPERTS, capacity)
        for mask, place in zip((first, second), places, strict=True):
            kept = mask * (place < capacity)
            slot = functional.one_hot((place * kept).sum(1).clamp(max=capacity - 1), capacity)
            combine = combine + (gates * kept)[..., None] * slot[:, None, :] * kept.sum(1)[:, None, None]
        loss = (gates.mean(0) * first.float().mean(0)).sum() * EXPERTS
        return loss, combine, combine.bool(), first.sum(0)


class Dispatched(nn.Module):
    """Experts inside a module of their own, called with a place for each token."""

    def __init__(self, capacity_factor: float = 0.75) -> None:
        super().__init__()
        self.gate = DispatchGate(capacity_factor)
        self.experts = nn.Module()
        self.experts.all = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))
        self.truth = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        _, combine, dispatch, _ = self.gate(flat)
        self.truth = combine.detach().sum(-1)
        given = torch.einsum("nec,nd->ecd", dispatch.to(flat.dtype), flat)
        found = torch.stack([expert(each) for expert, each in zip(self.experts.all, given, strict=True)])
        return torch.einsum("nec,ecd->nd", combine, found).view_as(x)


class EmittingRouter(nn.Module):
    """Emits weights, indices, and as it is told scores or counts; its matrix may be flat (OLMo-core, torchtitan)."""

    def __init__(self, flat: bool, scores: bool) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.scores = EXPERTS, TOP_K, scores
        self.weight = nn.Parameter(0.3 * torch.randn(EXPERTS * WIDTH if flat else (EXPERTS, WIDTH)))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        scores = functional.linear(x, self.weight.view(EXPERTS, WIDTH)).sigmoid()
        weights, indices = scores.topk(TOP_K)
        last = scores if self.scores else torch.bincount(indices.flatten(), minlength=EXPERTS)
        return weights, indices, last


class Emitting(Block):
    def __init__(self, flat: bool = False, scores: bool = False) -> None:
        super().__init__()
        self.router = EmittingRouter(flat, scores)

    def forward(self, x: Tensor) -> Tensor:
        weights, indices, _ = self.router(x)
        flat = x.reshape(-1, WIDTH)
        return self._combine(flat, indices.reshape(-1, TOP_K), weights.reshape(-1, TOP_K)).view_as(x)


class Stacked(nn.Module):
    """Experts as one tensor in the block, all of them run, and one-hot masks."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.w1 = nn.Parameter(0.3 * torch.randn(EXPERTS, WIDTH, 16))
        self.w2 = nn.Parameter(0.3 * torch.randn(EXPERTS, 16, WIDTH))
        self.truth = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        logits = self.gate(flat)
        chosen = functional.one_hot(torch.topk(logits, TOP_K).indices, EXPERTS).sum(1)
        weights = logits.softmax(-1) * chosen
        self.truth = weights.detach()
        hidden = torch.einsum("nd,edh->neh", flat, self.w1).relu()
        return torch.einsum("neh,ehd,ne->nd", hidden, self.w2, weights).view_as(x)


class WithBalanceLoss(LinearGate):
    """Counts first choices for a balance loss, and looks at third ones, after it has chosen two."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        probabilities = self.gate(x.reshape(-1, WIDTH)).softmax(-1)
        first = functional.one_hot(probabilities.argmax(-1), EXPERTS).float().mean(0)
        self.balance = (first * probabilities.mean(0)).sum()
        self.third = probabilities.topk(3).values[:, 2].mean()
        return y


class OneAfterTheOther(Block):
    """Takes the best, and then the best of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        probabilities = self.gate(flat).softmax(-1)
        first = probabilities.argmax(-1, keepdim=True)
        second = probabilities.masked_fill(functional.one_hot(first[:, 0], EXPERTS).bool(), -1.0).argmax(
            -1, keepdim=True
        )
        indices = torch.cat([first, second], dim=1)
        return self._combine(flat, indices, probabilities.gather(1, indices)).view_as(x)


class NoiseFirst(Block):
    """A second matrix of the same size, defined before the gate (noisy top-k)."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, WIDTH)
        logits = self.gate(flat) + 0.01 * torch.randn(len(flat), EXPERTS) * functional.softplus(self.noise(flat))
        top, indices = logits.topk(TOP_K)
        return self._combine(flat, indices, top.softmax(-1)).view_as(x)


STYLES: dict[str, Callable[[], nn.Module]] = {
    "linear": LinearGate,
    "top1": Top1,
    "sigmoid": SigmoidWithBias,
    "expert_choice": ExpertChoice,
    "expert_choice_batched": lambda: ExpertChoice(batched=True),
    "noisy": NoisyTopK,
    "dispatch": Dispatched,
    "emitting": Emitting,
    "emitting_flat": lambda: Emitting(flat=True),
    "emitting_scores": lambda: Emitting(scores=True),
    "stacked": Stacked,
    "balance_loss": WithBalanceLoss,
    "one_after_the_other": OneAfterTheOther,
    "noise_first": NoiseFirst,
}


class Net(nn.Module):
    """Three residual blocks of one style; in sequence-major order if it is told so."""

    def __init__(self, style: str = "linear", sequence_major: bool = False, classes: int = 5) -> None:
        super().__init__()
        self.sequence_major = sequence_major
        self.blocks = nn.ModuleList(STYLES[style]() for _ in range(3))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, S, d] to [B, S, classes]."""
        if self.sequence_major:
            x = x.transpose(0, 1)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + block(norm(x))
        return self.head(x.transpose(0, 1) if self.sequence_major else x)
