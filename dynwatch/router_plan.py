"""How the decisions of one router are read: which tensors, and what each of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from dynwatch.router_outputs import Kind, mask_of_tokens, slots_of_mask
from dynwatch.router_scoring import score_of
from dynwatch.router_search import RouterSite
from dynwatch.routing import Routing, Score, load_counts, router_probabilities

# Operations that show a choice, the most telling first.
_CHOICES = ("op.scatter", "op.topk", "op.multinomial", "op.one_hot", "op.tokens")
# How far scores must go together with what was chosen by; noise and biases come between them.
_LEAST_FIT = 0.2
_EMITTED: tuple[Kind, ...] = ("indices", "sparse", "dispatch", "mask")


@dataclass(frozen=True)
class Plan:
    """Where a router's choice, weights and scores are found.

    Attributes:
        n_experts: E.
        top_k: k, the most experts of a token.
        choice: Places of what tells the chosen experts, several if each tells one of them; none to take the k most
            probable ones.
        kind: What that is.
        weights: Place of the weights of chosen experts; empty if they are not seen.
        scores: Place of logits, probabilities or scores; empty if they are not seen.
        score: How these become probabilities; "given" if they are no logits.
        fit: How closely the scores follow what was chosen by, from 0 to 1.

    Example:
        >>> Plan(4, 2, ("router.2",), "indices", "router.1", "router.0", "softmax").reads("experts")
        False
    """

    n_experts: int
    top_k: int
    choice: tuple[str, ...]
    kind: Kind
    weights: str
    scores: str
    score: Score
    fit: float = 1.0

    @property
    def places(self) -> tuple[str, ...]:
        """All places that are needed."""
        return tuple(dict.fromkeys(place for place in (*self.choice, self.weights, self.scores) if place))

    def reads(self, source: str) -> bool:
        """Whether something of a source ("router", "experts" or "op") is needed."""
        return any(place == source or place.startswith(f"{source}.") for place in self.places)

    @property
    def capacity(self) -> bool:
        """Whether the router emits its choice in a form in which slots are empty where tokens were dropped."""
        return self.kind in ("mask", "sparse", "dispatch") and not self.choice[0].startswith("op.")

    def __str__(self) -> str:
        how = f"{self.kind} at {' and '.join(self.choice)}" if self.choice else f"the {self.top_k} most probable"
        return f"{self.top_k} of {self.n_experts}, from {how}"


@dataclass(frozen=True)
class _Choice:
    """Something that may tell the chosen experts."""

    places: tuple[str, ...]
    kind: Kind
    k: int
    load: tuple[int, ...]  # of each expert, by this

    @property
    def emitted(self) -> bool:
        return not self.places[0].startswith("op.")


def make_plan(
    site: RouterSite,
    n_tokens: int,
    seen: Mapping[str, Tensor],
    kinds: Mapping[str, Kind | None],
    score: Score | None = None,
    top_k: int | None = None,
    received: Sequence[int] | None = None,
) -> Plan | None:
    """Find out how a router's decisions are to be read; None if it shows no choice of experts.

    A choice is believed if it is what the experts were given, where that can be told, or else if the names of the
    modules speak of routing. Waits for the device.

    Args:
        site: The place.
        n_tokens: N.
        seen: Tensors by their place, of one pass.
        kinds: What each of them is.
        score: How logits become probabilities, if the user says so.
        top_k: k, if the user says so.
        received: How many tokens each expert was called with; None if experts are not called one by one.

    Example:
        >>> gate, block = torch.nn.Linear(4, 3), torch.nn.Module()
        >>> seen = {"router": torch.randn(2, 3), "op.topk1.0": torch.tensor([[0], [2]])}
        >>> kinds = {"router": "logits", "op.topk1.0": "indices"}
        >>> print(make_plan(RouterSite("gate", gate, block, None, 3), 2, seen, kinds, received=[1, 0, 1]))
        1 of 3, from indices at op.topk1.0
    """
    found = _candidates(site, n_tokens, seen, kinds)
    wanted = top_k or site.top_k
    chosen = _believed(found, received, site.telling, wanted)
    scores = _scores(kinds, chosen)
    if chosen is None:
        # The most probable ones are a guess, unless the user says k or the experts were given just these.
        if any(each.emitted and each.kind == "indices" for each in found) or not scores or not wanted:
            return None
        how = score or ("softmax" if kinds[scores] == "logits" else "given")
        p = router_probabilities(seen[scores].reshape(n_tokens, -1), how)
        guess = _load(p.topk(min(wanted, site.n_experts)).indices, site.n_experts)
        if wanted > site.n_experts or not (top_k or guess == tuple(received or ())):
            return None
        return Plan(site.n_experts, wanted, (), "probabilities", "", scores, how)
    weights = _weights(chosen, n_tokens, seen, kinds)
    how = "given"
    given = seen.get(f"{chosen.places[0]}.input")
    if scores and kinds[scores] == "logits":
        indices = seen[chosen.places[0]].reshape(n_tokens, -1).long() if chosen.kind == "indices" else None
        known = seen[weights].reshape(n_tokens, -1) if weights and indices is not None else None
        how = score or score_of(seen[scores].reshape(n_tokens, -1), indices, known, given, set(kinds))
    fit = 1.0
    if given is not None and scores and not chosen.emitted:
        fit = _correlation(seen[scores].reshape(-1), given.reshape(-1))
        if fit < _LEAST_FIT and chosen.load != tuple(received or ()):
            return None  # the largest of something else
    return Plan(site.n_experts, chosen.k, chosen.places, chosen.kind, weights, scores, how, fit)


def decode(plan: Plan, seen: Mapping[str, Tensor], n_tokens: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The chosen experts [N, k] of one pass, the router's scores [N, E] and the weights [N, k], as far as seen.

    Args:
        plan: From `make_plan`.
        seen: Tensors by place.
        n_tokens: N.

    Example:
        >>> plan = Plan(3, 1, ("op.topk1.0",), "indices", "", "", "given")
        >>> decode(plan, {"op.topk1.0": torch.tensor([[0], [2]])}, 2)[0].tolist()
        [[0], [2]]
    """
    scores = seen[plan.scores].reshape(n_tokens, plan.n_experts) if plan.scores else None
    weights = None
    if not plan.choice:
        assert scores is not None
        indices = router_probabilities(scores, plan.score).topk(plan.top_k, dim=-1).indices
    else:
        tensors = [seen[place] for place in plan.choice]
        indices, entries = _slots(tensors, plan.kind, plan.top_k, n_tokens, plan.n_experts)
        if plan.weights:
            weights = entries if plan.weights in plan.choice else seen[plan.weights].reshape(n_tokens, -1)
    if weights is not None and not weights.is_floating_point():
        weights = None
    return indices, scores, weights


def _slots(
    tensors: Sequence[Tensor], kind: Kind, k: int, n_tokens: int, n_experts: int
) -> tuple[Tensor, Tensor | None]:
    """[N, k] experts, and their entries where a mask has some."""
    if kind == "indices":
        return torch.cat([tensor.reshape(n_tokens, -1).long() for tensor in tensors], dim=1), None
    if kind == "tokens":
        return slots_of_mask(mask_of_tokens(tensors[0], n_tokens), k)
    if kind == "dispatch":  # at most one place of an expert is a token's
        return slots_of_mask(tensors[0].reshape(n_tokens, n_experts, -1).amax(-1), k)
    return slots_of_mask(tensors[0].reshape(n_tokens, n_experts), k)


def _candidates(
    site: RouterSite, n_tokens: int, seen: Mapping[str, Tensor], kinds: Mapping[str, Kind | None]
) -> list[_Choice]:
    """All that may tell the chosen experts, emissions first, in the order of belief."""
    found: list[tuple[tuple[str, ...], Kind]] = []
    for source in ("router", "experts"):
        for kind in _EMITTED:
            places = [p for p in kinds if p.partition(".")[0] == source and kinds[p] == kind]
            places.sort(key=lambda place: not seen[place].is_floating_point())  # weights rather than a mask of the same
            found += [((place,), kind) for place in places]
    for prefix in _CHOICES:
        places = [p for p in kinds if p.startswith(prefix) and not p.endswith(".input")]
        for place in places:
            kind_ = kinds[place]
            wanted = ("mask", "sparse") if prefix == "op.scatter" else ("indices", "tokens")
            if kind_ is not None and kind_ in wanted:
                found.append(((place,), kind_))
    singles = [
        places[0]
        for places, kind in found
        if places[0].startswith("op.") and kind == "indices" and seen[places[0]].numel() == n_tokens
    ]
    firsts = {place: seen[place].reshape(-1) for place in singles}
    apart = [p for i, p in enumerate(singles) if not any(torch.equal(firsts[p], firsts[q]) for q in singles[:i])]
    if len(apart) > 1 and all(bool((firsts[p] != firsts[q]).all()) for p, q in combinations(apart, 2)):
        found.insert(0, (tuple(apart), "indices"))  # one expert after the other, each time without the last
    choices = []
    for places_, kind in found:
        tensors = [seen[place] for place in places_]
        if kind == "tokens":
            k = site.n_experts
        elif kind == "indices":
            k = sum(tensor.numel() for tensor in tensors) // n_tokens
        else:
            most = _slots(tensors, kind, site.n_experts, n_tokens, site.n_experts)[0]
            k = max(int((most >= 0).sum(-1).max().item()), 1)
        if k <= site.n_experts:
            load = _load(_slots(tensors, kind, k, n_tokens, site.n_experts)[0], site.n_experts)
            choices.append(_Choice(places_, kind, k, load))
    return choices


def _believed(found: Sequence[_Choice], received: Sequence[int] | None, telling: bool, k: int | None) -> _Choice | None:
    """What the experts were really chosen by; None if nothing can be believed."""
    experts_got = tuple(received or ())
    same = [choice for choice in found if choice.load == experts_got]
    if same:
        return same[0]
    emitted = [choice for choice in found if choice.emitted and (telling or choice.kind == "indices")]
    if emitted:
        return emitted[0]
    if not telling:
        return None
    if len(set(experts_got)) > 1:
        # Tokens may have been dropped on the way.
        enough = [c for c in found if all(mine >= theirs for mine, theirs in zip(c.load, experts_got, strict=True))]
        return min(enough, key=lambda choice: sum(choice.load), default=None)
    said = [choice for choice in found if choice.k == k]
    # Else the largest: a first choice is often counted beside it, for a balance loss.
    return said[0] if said else max(found, key=lambda choice: choice.k * (choice.kind != "tokens"), default=None)


def _load(indices: Tensor, n_experts: int) -> tuple[int, ...]:
    return tuple(load_counts(Routing(indices, n_experts)).tolist())


def _scores(kinds: Mapping[str, Kind | None], chosen: _Choice | None) -> str:
    """The place of logits, else of probabilities or scores, of an operation only if nothing else is of it."""
    for wanted in (("logits",), ("probabilities", "scores")):
        places = [p for p, kind in kinds.items() if kind in wanted and p.partition(".")[0] in ("router", "experts")]
        if places:
            return places[0]
    for place in ("op.softmax", "op.sigmoid"):
        if kinds.get(place) in ("probabilities", "scores"):
            return place
    given = [f"{chosen.places[0]}.input"] if chosen else []
    given += [place for place in kinds if place.endswith(".input")]
    return next((place for place in given if kinds.get(place) in ("logits", "probabilities", "scores")), "")


def _weights(chosen: _Choice, n_tokens: int, seen: Mapping[str, Tensor], kinds: Mapping[str, Kind | None]) -> str:
    """The place of the weights of what was chosen."""
    place = chosen.places[0]
    if chosen.kind == "sparse" or (chosen.kind == "dispatch" and seen[place].is_floating_point()):
        return place
    source = place.partition(".")[0]
    if not chosen.emitted:
        return ""
    for other, tensor in seen.items():
        fits = tensor.is_floating_point() and tensor.numel() == n_tokens * chosen.k
        fits = fits and tensor.shape[-1:] in ((chosen.k,), (n_tokens,)) and other != place
        if other.partition(".")[0] == source and fits and kinds[other] in (None, "logits", "scores"):
            return other
    return ""


def _correlation(one: Tensor, other: Tensor) -> float:
    """How far two sets of numbers go together, from 0 to 1; 0 if they are not of one size."""
    if one.numel() != other.numel():
        return 0.0
    both = torch.stack([one.double(), other.double()])
    both = both[:, both.isfinite().all(0)]
    value = float(torch.corrcoef(both)[0, 1].abs().item()) if both.shape[1] > 1 else 0.0
    return value if value == value else 0.0


def router_weight(site: RouterSite) -> Tensor | None:
    """The router's matrix with one row an expert, [E, d]; None if it has none.

    Args:
        site: The router.

    Example:
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
