"""Follows the routing decisions of a network as it runs, whatever routers it has.

On the first pass every place that may be a router (`dynwatch.router_search`) is looked at: what goes in and comes out,
and which operations its block runs on the way to the experts. A place that shows a choice of experts is a router; the
others are dropped. From then on only what is needed is hooked, and nothing waits for the device.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dynwatch.router_decision import Decision
from dynwatch.router_outputs import classify, tensors_by_place, tokens_given
from dynwatch.router_plan import Plan, decode, make_plan
from dynwatch.router_search import RouterSite
from dynwatch.router_watch import OperationWatch
from dynwatch.routing import Routing, Score

# A user's own way: module, its arguments and its output to what it decided.
Extract = Callable[[nn.Module, Any, Any], Routing]


@dataclass(eq=False)
class _Call:
    """What has been seen of one forward pass of one site."""

    n_tokens: int = 0
    leading: tuple[int, ...] = ()
    seen: dict[str, Tensor] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)  # of these, when they were seen
    received: list[int] = field(default_factory=list)  # tokens that each expert was called with
    counts: dict[str, int] = field(default_factory=dict)  # of operations of a kind, from 0
    last: str = ""  # k of the last one
    watch: OperationWatch | None = None
    done: bool = False


class RouterCapture:
    """Hooks on routers, and what they decide.

    Attributes:
        sites: Candidates before the first pass is over, routers after `settle`.
        plans: How each router's decisions are read, by its place in `sites`; None while that is not known.

    Args:
        sites: From `dynwatch.router_search`.
        deliver: Called with the place of a site in `sites` and its decision, in the forward pass, without a graph.
        guard: Runs what a hook does: `guard(action, *arguments)`. It may swallow what an action raises.
        extract: The user's own way to read a router's decision.
        score: How logits become probabilities; None finds out.
        top_k: k where it can neither be seen nor told from attributes.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.gate, self.experts = nn.Linear(4, 3), nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x):
        ...         weights, chosen = self.gate(x).softmax(-1).topk(2)
        ...         outputs = torch.stack([expert(x) for expert in self.experts], 1)
        ...         return (outputs.gather(1, chosen[..., None].expand(-1, -1, 4)) * weights[..., None]).sum(1)
        >>> from dynwatch.router_search import find_routers
        >>> block, seen = Block(), []
        >>> capture = RouterCapture(find_routers(block), lambda at, decision: seen.append(decision.routing))
        >>> with capture:
        ...     _ = block(torch.randn(5, 4))
        >>> capture.settle(), seen[0].indices.shape, seen[0].probabilities.shape
        ([], torch.Size([5, 2]), torch.Size([5, 3]))
    """

    def __init__(
        self,
        sites: Sequence[RouterSite],
        deliver: Callable[[int, Decision], None],
        guard: Callable[..., Any] = lambda action, *arguments: action(*arguments),
        *,
        extract: Extract | None = None,
        score: Score | None = None,
        top_k: int | None = None,
    ) -> None:
        self.sites = list(sites)
        self.plans: list[Plan | None] = [None] * len(self.sites)
        self._deliver = deliver
        self._guard = guard
        self._extract = extract
        self._score = score
        self._top_k = top_k
        self._handles: list[RemovableHandle] = []
        self._leaving: dict[int, RemovableHandle] = {}  # at the end of a block's pass
        self._calls: dict[int, _Call] = {}  # open ones, by site
        self._inside = 0  # hooks that are running
        self._closed = False  # no more routers are looked for
        self._open: list[int] = []  # sites whose block is running, the innermost last
        self._fired: set[int] = set()  # sites that ran
        self._copied: set[tuple[int, str]] = set()  # places whose tensors are written to afterwards, by site

    def twin(self, deliver: Callable[[int, Decision], None]) -> RouterCapture:
        """Another capture of the same routers, read in the same way, which delivers to somebody else."""
        other = RouterCapture(self.sites, deliver, extract=self._extract, score=self._score, top_k=self._top_k)
        other.plans, other._fired, other._copied = self.plans, self._fired, self._copied
        other._closed = self._closed
        return other

    def settle(self) -> list[RouterSite]:
        """Drop the sites that have shown no choice of experts, once a pass is over; these are returned.

        One whose name tells and that did not run in this pass (LayerDrop) stays a candidate. Of several modules in a
        block that could be its router, the one is kept whose scores follow what was chosen by.
        """
        best: dict[int, float] = {}
        for site, plan in zip(self.sites, self.plans, strict=True):
            best[id(site.block)] = max(best.get(id(site.block), 0.0), plan.fit if plan else 0.0)
        kept: list[int] = []
        taken: set[int] = set()
        for i, (site, plan) in enumerate(zip(self.sites, self.plans, strict=True)):
            beaten = plan is not None and (plan.fit < best[id(site.block)] or id(site.block) in taken)
            if (self.reads(i) and not beaten) or (site.telling and i not in self._fired):
                kept.append(i)
                taken |= {id(site.block)} if plan is not None else set()
        dropped = [site for i, site in enumerate(self.sites) if i not in kept]
        self.sites, self.plans = [self.sites[i] for i in kept], _of_one_score([self.plans[i] for i in kept])
        self._fired = {kept.index(i) for i in self._fired if i in kept}
        self._copied = {(kept.index(i), place) for i, place in self._copied if i in kept}
        return dropped

    def close(self) -> None:
        """Look for no more routers: sites that have not run keep their places, without hooks."""
        self._closed = True

    def reads(self, at: int) -> bool:
        """Whether the site at a place is known to be a router."""
        return self.plans[at] is not None or (self._extract is not None and at in self._fired)

    # --- hooks

    def __enter__(self) -> Any:
        try:
            for at, (site, plan) in enumerate(zip(self.sites, self.plans, strict=True)):
                if plan is not None or not self._closed or self._extract is not None:
                    self._attach(at, site, plan)
        except Exception:
            self.detach()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.detach()

    attach = __enter__

    def detach(self) -> None:
        """Remove all hooks; may be called more than once, also from within a hook, whose pass then removes the last."""
        while self._handles:
            self._handles.pop().remove()
        if not self._inside:
            # Blocks that are open were interrupted, by something of which torch tells no hook (Ctrl-C).
            for at in reversed(self._open):
                self._unwatch(self._calls[at])
            self._open.clear()
        for at in [at for at in self._leaving if at not in self._open]:
            self._leaving.pop(at).remove()
        self._calls = {at: call for at, call in self._calls.items() if at in self._open}

    @staticmethod
    def _unwatch(call: _Call) -> None:
        if call.watch is not None:
            call.watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            call.watch = None

    def _attach(self, at: int, site: RouterSite, plan: Plan | None) -> None:
        if self._extract is not None:
            if site.router is not None:
                self._on_forward(site.router, lambda m, args, kw, out: self._extracted(at, m, args, kw, out))
            return
        # First and last of a pass, also where it raises; what the user hooks comes inside.
        self._handles.append(
            site.block.register_forward_pre_hook(
                lambda m, args, kwargs: self._run(self._enter, at, args, kwargs), with_kwargs=True, prepend=True
            )
        )
        if site.router is not None and (plan is None or plan.reads("router")):
            self._on_forward(site.router, lambda m, args, kw, out: self._run(self._routed, at, args, kw, out))
        if site.experts is not None and (plan is None or plan.reads("experts")):
            self._handles.append(
                site.experts.register_forward_pre_hook(
                    lambda m, args, kwargs: self._run(self._given, at, args, kwargs), with_kwargs=True
                )
            )
        if plan is None:
            for e, member in enumerate(site.members):
                self._handles.append(
                    member.register_forward_pre_hook(
                        lambda m, args, kwargs, e=e: self._run(self._received, at, e, args, kwargs), with_kwargs=True
                    )
                )
        leave = lambda m, args, out: self._left(at)  # noqa: E731 - a hook must return None
        self._leaving[at] = site.block.register_forward_hook(leave, always_call=True)

    def _on_forward(self, module: nn.Module, hook: Callable[[nn.Module, Any, Any, Any], None]) -> None:
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def _run(self, action: Callable[..., None], *arguments: Any) -> None:
        # Compiled code is left as it is; a part that runs again in backward (checkpointing) has been seen already.
        if not torch.compiler.is_compiling() and not _in_backward():
            self._inside += 1
            try:
                with torch.no_grad():
                    self._guard(action, *arguments)
            finally:
                self._inside -= 1

    # --- one pass of one site

    def _enter(self, at: int, args: Any, kwargs: Any) -> None:
        self._fired.add(at)
        call = self._calls[at] = _Call()
        call.n_tokens, call.leading = tokens_given(args, kwargs)
        self._open.append(at)
        plan = self.plans[at]
        if plan is None or plan.reads("op"):
            call.watch = OperationWatch(functools.partial(self._operated, at), self.sites[at].n_experts)
            call.watch.__enter__()  # type: ignore[no-untyped-call]

    def _routed(self, at: int, args: Any, kwargs: Any, output: Any) -> None:
        if at not in self._open and any(
            other.router is self.sites[at].router for i, other in enumerate(self.sites) if i != at
        ):
            return  # a router that several blocks share, called by another of them
        self._fired.add(at)
        call = self._calls.setdefault(at, _Call())
        n_tokens, leading = tokens_given(args, kwargs)
        if n_tokens and n_tokens != call.n_tokens:
            call.n_tokens, call.leading = n_tokens, leading
        self._note(at, "router", output)
        if at not in self._open:  # the router was called from elsewhere than its block's forward
            self._finish(at)

    def _received(self, at: int, expert: int, args: Any, kwargs: Any) -> None:
        call = self._calls.get(at)
        if call is not None:
            call.received = call.received or [0] * len(self.sites[at].members)
            call.received[expert] += tokens_given(args, kwargs)[0]

    def _given(self, at: int, args: Any, kwargs: Any) -> None:
        self._note(at, "experts", (*args, *kwargs.values()))

    def _operated(self, at: int, name: str, tensor: Tensor, n_scores: int) -> None:
        call = self._calls.get(at)
        # One score for each token and expert; `one_hot` does not tell.
        if call is None or n_scores not in (0, call.n_tokens * self.sites[at].n_experts):
            return
        if not self._open or self.sites[self._open[-1]].block is not self.sites[at].block:
            return
        name, _, rest = name.partition(".")
        if name in ("topk", "multinomial", "one_hot", "scatter"):
            # By how many experts it tells and how many there were of it: a metric or a loss may take others.
            k = "" if name == "scatter" else str(tensor.numel() // max(call.n_tokens, 1))
            if not rest:
                call.counts[name + k] = call.counts.get(name + k, -1) + 1
            k = k if not rest else call.last
            call.last = k
            name = f"{name}{k}.{call.counts[name + k]}"
        self._note(at, f"op.{name}.{rest}" if rest else f"op.{name}", tensor)

    def _note(self, at: int, source: str, values: Any) -> None:
        plan, call = self.plans[at], self._calls.get(at)
        if call is None or call.done:
            return
        for place, tensor in tensors_by_place(values, source):
            if plan is None or place in plan.places:
                copied = (at, place) in self._copied
                call.seen[place] = tensor.detach().clone() if copied else tensor.detach()
                call.versions[place] = version_of(call.seen[place])
        if plan is not None and not plan.reads("op") and all(place in call.seen for place in plan.places):
            self._finish(at)  # at once: what follows may write to these tensors

    def _left(self, at: int) -> None:
        if at not in self._open:
            return
        # Unguarded: a mode that was entered must be left, whatever has become of the monitor.
        self._open.remove(at)
        self._unwatch(self._calls[at])
        self._run(self._finish, at)
        self._calls.pop(at, None)
        if not self._handles and at in self._leaving:  # detached meanwhile
            self._leaving.pop(at).remove()

    def _finish(self, at: int) -> None:
        call, site = self._calls.get(at), self.sites[at]
        if call is None or call.done or not call.n_tokens or not call.seen:
            return
        spoilt = [place for place, tensor in call.seen.items() if version_of(tensor) != call.versions[place]]
        if spoilt:  # written to within the block, as to mask the first choice for the second: copied from now on
            self._copied.update((at, place) for place in spoilt)
            self._fired.discard(at)
            known = self.plans[at]
            if known is None or any(place in known.places for place in spoilt):
                return
        with torch.autocast(next(iter(call.seen.values())).device.type, enabled=False):
            if self.plans[at] is None:
                self.plans[at] = self._plan(site, call)
            plan = self.plans[at]
            if plan is None or any(place not in call.seen for place in plan.places):
                return
            call.done = True
            indices, scores, weights = decode(plan, call.seen, call.n_tokens)
            found = Decision(indices, plan.n_experts, scores, plan.score, weights, call.leading, plan.capacity)
            self._deliver(at, found)

    def _plan(self, site: RouterSite, call: _Call) -> Plan | None:
        kinds = {
            place: "tokens" if place == "op.tokens" else classify(tensor, call.n_tokens, site.n_experts, site.top_k)
            for place, tensor in call.seen.items()
        }
        received = call.received or None
        return make_plan(site, call.n_tokens, call.seen, kinds, self._score, self._top_k, received)

    def _extracted(self, at: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._run(self._extract_and_deliver, at, module, args, kwargs, output)

    def _extract_and_deliver(self, at: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        assert self._extract is not None
        routing = self._extract(module, args, output)
        if not isinstance(routing, Routing):
            raise TypeError(
                f"extract= returned {type(routing).__name__} for {self.sites[at].name} and must return a "
                "dynwatch.routing.Routing."
            )
        self._fired.add(at)
        _, leading = tokens_given(args, kwargs)
        found = Decision(
            routing.indices,
            routing.n_experts,
            routing.probabilities,
            "given",
            routing.weights,
            leading,
            capacity=False,
            valid=routing.valid,
            samples=routing.samples,
        )
        self._deliver(at, found)


def _of_one_score(plans: list[Plan | None]) -> list[Plan | None]:
    """Plans in which all logits become probabilities as most do: a model scores in one way."""
    ways = Counter(plan.score for plan in plans if plan is not None and plan.score != "given")
    if not ways:
        return plans
    most = ways.most_common(1)[0][0]
    return [plan if plan is None or plan.score == "given" else replace(plan, score=most) for plan in plans]


def version_of(tensor: Tensor) -> int:
    """How often a tensor has been written to.

    Example:
        >>> version_of(torch.zeros(2).add_(1))
        1
    """
    return 0 if tensor.is_inference() else tensor._version


def _in_backward() -> bool:
    """Whether the autograd engine is running this: a checkpointed part that is computed once more."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1
