"""How the decisions of one router are read: which tensors, and what each of them is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from dynwatch.router_outputs import Kind, mask_of_tokens, slots_of_mask
from dynwatch.router_search import RouterSite
from dynwatch.routing import Score, router_probabilities

# Operations that show a choice, the most telling first.
_CHOICES = ("op.scatter", "op.one_hot", "op.topk", "op.multinomial", "op.tokens")


@dataclass(frozen=True)
class Plan:
    """Where a router's choice, weights and scores are found.

    Attributes:
        n_experts: E.
        top_k: k, the most experts of a token.
        choice: Place of what tells the chosen experts; empty to take the k most probable ones.
        kind: What that is.
        weights: Place of the weights of chosen experts; empty if they are not seen.
        scores: Place of logits, probabilities or scores; empty if they are not seen.
        score: How these become probabilities; "given" if they are no logits.

    Example:
        >>> Plan(4, 2, "router.2", "indices", "router.1", "router.0", "softmax").reads("experts")
        False
    """

    n_experts: int
    top_k: int
    choice: str
    kind: Kind
    weights: str
    scores: str
    score: Score

    @property
    def places(self) -> tuple[str, ...]:
        """All places that are needed."""
        return tuple(dict.fromkeys(place for place in (self.choice, self.weights, self.scores) if place))

    def reads(self, source: str) -> bool:
        """Whether something of a source ("router", "experts" or "op") is needed."""
        return any(place == source or place.startswith(f"{source}.") for place in self.places)

    @property
    def capacity(self) -> bool:
        """Whether the router emits its choice in a form in which slots are empty where tokens were dropped."""
        return self.kind in ("mask", "sparse", "dispatch") and not self.choice.startswith("op.")

    def __str__(self) -> str:
        how = f"{self.kind} at {self.choice}" if self.choice else f"the {self.top_k} most probable"
        return f"{self.top_k} of {self.n_experts}, from {how}"


def make_plan(
    site: RouterSite,
    n_tokens: int,
    seen: Mapping[str, Tensor],
    kinds: Mapping[str, Kind | None],
    score: Score | None,
    top_k: int | None,
) -> Plan | None:
    """Find out how a router's decisions are to be read; None if it shows no choice of experts.

    Args:
        site: The place.
        n_tokens: N.
        seen: Tensors by their place, of one pass.
        kinds: What each of them is.
        score: How logits become probabilities, if the user says so.
        top_k: k, if the user says so.

    Example:
        >>> import torch
        >>> gate, block = torch.nn.Linear(4, 3), torch.nn.Module()
        >>> seen = {"router": torch.randn(2, 3), "op.topk": torch.tensor([[0], [2]])}
        >>> kinds = {"router": "logits", "op.topk": "indices"}
        >>> print(make_plan(RouterSite("gate", gate, block, None, 3), 2, seen, kinds, None, None))
        1 of 3, from indices at op.topk
    """
    choice, kind = _choice(seen, kinds)
    scores = _first(kinds, ("logits",)) or _first(kinds, ("probabilities", "scores"))
    if not scores and kinds.get("op.topk.input") in ("logits", "probabilities", "scores"):
        scores = "op.topk.input"
    k = top_k or 0
    if kind in ("mask", "sparse", "dispatch"):
        rows = _rows(seen[choice], kind, n_tokens, site.n_experts)
        k = k or max(int((rows != 0).sum(-1).max().item()), 1)
    elif kind == "tokens":
        k = site.n_experts
    elif kind == "indices":
        k = seen[choice].numel() // n_tokens
    else:
        k = k or (site.top_k or 0) * site.telling
        if not scores or not 0 < k <= site.n_experts:
            return None
        choice, kind = "", "probabilities"
    weights = _weights(choice, kind, k, n_tokens, seen, kinds)
    how: Score = "given"
    if scores and kinds[scores] == "logits":
        how = score or _score_of(scores, choice if kind == "indices" else "", weights, n_tokens, seen, kinds)
    return Plan(site.n_experts, k, choice, kind, weights, scores, how)


def decode(plan: Plan, seen: Mapping[str, Tensor], n_tokens: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The chosen experts [N, k] of one pass, the router's scores [N, E] and the weights [N, k], as far as seen.

    Args:
        plan: From `make_plan`.
        seen: Tensors by place.
        n_tokens: N.

    Example:
        >>> import torch
        >>> plan = Plan(3, 1, "op.topk", "indices", "", "", "given")
        >>> decode(plan, {"op.topk": torch.tensor([[0], [2]])}, 2)[0].tolist()
        [[0], [2]]
    """
    shape = (n_tokens, plan.n_experts)
    scores = seen[plan.scores].reshape(shape) if plan.scores else None
    weights = None
    if not plan.choice:
        assert scores is not None
        indices = router_probabilities(scores, plan.score).topk(plan.top_k, dim=-1).indices
    elif plan.kind == "indices":
        indices = seen[plan.choice].reshape(n_tokens, -1).long()
        weights = seen[plan.weights].reshape(n_tokens, -1) if plan.weights else None
    elif plan.kind == "tokens":
        indices, _ = slots_of_mask(mask_of_tokens(seen[plan.choice], n_tokens), plan.top_k)
    else:
        indices, entries = slots_of_mask(_rows(seen[plan.choice], plan.kind, *shape), plan.top_k)
        if plan.weights == plan.choice:
            weights = entries
        elif plan.weights:
            weights = seen[plan.weights].reshape(n_tokens, -1)
    if weights is not None and not weights.is_floating_point():
        weights = None
    return indices, scores, weights


def _choice(seen: Mapping[str, Tensor], kinds: Mapping[str, Kind | None]) -> tuple[str, Kind | None]:
    """What tells the chosen experts: emitted indices first, then other emissions, then operations."""
    for source in ("router", "experts"):
        for kind in ("indices", "sparse", "dispatch", "mask"):
            places = [p for p in kinds if p.partition(".")[0] == source and kinds[p] == kind]
            if kind == "dispatch":  # weights rather than a mask of the same
                places.sort(key=lambda place: not seen[place].is_floating_point())
            if places:
                return places[0], kind
    most = seen["op.topk"].shape[-1] if kinds.get("op.topk") == "indices" else None
    for place in _CHOICES:
        kind_ = kinds.get(place)
        if place == "op.scatter" and kind_ in ("mask", "sparse"):
            if most is None or int((seen[place] != 0).sum(-1).max().item()) <= most:
                return place, kind_
        elif kind_ in ("indices", "tokens"):
            return place, kind_
    return "", None


def _first(kinds: Mapping[str, Kind | None], wanted: tuple[str, ...]) -> str:
    """The first place of a kind, an operation only if nothing else is of it."""
    places = [p for p, kind in kinds.items() if kind in wanted and p not in ("op.topk.input", "op.scatter")]
    places.sort(key=lambda place: place.startswith("op."))
    return places[0] if places else ""


def _weights(
    choice: str,
    kind: Kind,
    k: int,
    n_tokens: int,
    seen: Mapping[str, Tensor],
    kinds: Mapping[str, Kind | None],
) -> str:
    if kind == "sparse" or (kind == "dispatch" and seen[choice].is_floating_point()):
        return choice
    source = choice.partition(".")[0]
    if source not in ("router", "experts"):
        return ""
    for place, tensor in seen.items():
        fits = (
            tensor.is_floating_point() and tensor.numel() == n_tokens * k and tensor.shape[-1:] in ((k,), (n_tokens,))
        )
        if (
            place.partition(".")[0] == source
            and place != choice
            and fits
            and kinds[place] in (None, "logits", "scores")
        ):
            return place
    return ""


def _rows(tensor: Tensor, kind: Kind, n_tokens: int, n_experts: int) -> Tensor:
    """[N, E], zero where an expert was not chosen."""
    if kind == "dispatch":  # at most one place of an expert is a token's
        return tensor.reshape(n_tokens, n_experts, -1).amax(-1)
    return tensor.reshape(n_tokens, n_experts)


def _score_of(
    scores: str, choice: str, weights: str, n_tokens: int, seen: Mapping[str, Tensor], kinds: Mapping[str, Kind | None]
) -> Score:
    """Whether experts are scored by a softmax or by sigmoids: by the weights, else by what the block computed."""
    if choice and weights:
        logits = seen[scores].reshape(n_tokens, -1).double()
        chosen = seen[choice].reshape(n_tokens, -1).long()
        given = seen[weights].reshape(n_tokens, -1).double()
        kept = ((chosen >= 0) & (chosen < logits.shape[1])).all(-1)
        found: dict[Score, float] = {}
        for how, values in (("softmax", logits.softmax(-1)), ("sigmoid", logits.sigmoid())):
            mine = values[kept].gather(1, chosen[kept])
            theirs = given[kept]
            apart = [_apart(mine, theirs)]
            if mine.shape[1] > 1:
                apart.append(_apart(mine / mine.sum(-1, keepdim=True), theirs))
            found[how] = min(apart)  # type: ignore[index]
        if found["sigmoid"] < 0.5 * found["softmax"]:
            return "sigmoid"
        if found["softmax"] < 0.5 * found["sigmoid"]:
            return "softmax"
    return "sigmoid" if "op.sigmoid" in kinds and "op.softmax" not in kinds else "softmax"


def _apart(mine: Tensor, theirs: Tensor) -> float:
    """How far two sets of weights are apart but for a factor, as a share."""
    scale = (mine * theirs).sum() / mine.square().sum().clamp_min(1e-300)
    return float(((mine * scale - theirs).norm() / theirs.norm().clamp_min(1e-300)).item())


def router_weight(site: RouterSite) -> Tensor | None:
    """The router's matrix with one row an expert, [E, d]; None if it has none.

    Args:
        site: The router.

    Example:
        >>> import torch
        >>> router_weight(RouterSite("gate", torch.nn.Linear(4, 3), torch.nn.Module(), None, 3)).shape
        torch.Size([3, 4])
    """
    weight = site.weight
    if weight is None:
        return None
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    whole = whole.detach()
    if whole.dim() == 1:
        return whole.view(site.n_experts, -1)
    return whole if whole.shape[0] == site.n_experts else whole.t()
