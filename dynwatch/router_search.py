"""Where a network may route tokens to experts, told from its structure alone: no names, no known libraries.

Experts are alike: a list of modules of one type, or one tensor with a dimension for them. A router scores each of E
experts, so next to E experts it is a module, or a parameter of the block itself, with a matrix one of whose sides is E.
What looks so by chance is dropped when it does not behave so (`dynwatch.router_capture`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

# Layers of torch's own whose weight has three dimensions.
_NOT_EXPERTS = (
    nn.modules.conv._ConvNd,
    nn.Bilinear,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.Embedding,
    nn.modules.batchnorm._NormBase,
)
_COUNTS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts", "num_routed_experts", "experts_count")
_TOP_KS = ("top_k", "topk", "num_experts_per_tok", "num_experts_per_token", "n_activated_experts", "moe_top_k", "k")
_NAMED = re.compile(r"MoE|Moe[A-Z]|Moe$|MixtureOfExperts|SparseMixer|Router|Experts")
_TELLING = re.compile(r"(?i)router|expert|moe|gate(?!_proj|s?_up)|gating|mixture|switch")


@dataclass(frozen=True, eq=False)
class RouterSite:
    """A place where tokens may be routed.

    Attributes:
        name: Dotted name of the router; of the block where that routes itself.
        router: The module that scores experts; None where the block does so with a parameter of its own.
        block: The module in whose forward pass routers and experts run.
        experts: The module that is called with what was chosen; None where experts are called one by one.
        n_experts: E.
        top_k: How many experts a token gets, if an attribute says so.
        members: The experts, where they are modules in a list.
        telling: Whether names speak of experts or routers, so that a site that behaves otherwise is worth a message.

    Example:
        >>> experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        >>> block = nn.ModuleDict({"gate": nn.Linear(4, 3), "experts": experts})
        >>> site, = find_routers(block)
        >>> site.name, site.n_experts
        ('gate', 3)
    """

    name: str
    router: nn.Module | None
    block: nn.Module
    experts: nn.Module | None
    n_experts: int
    top_k: int | None = None
    telling: bool = False
    members: tuple[nn.Module, ...] = ()

    @property
    def weight(self) -> nn.Parameter | None:
        """The router's matrix, [E, d] or [d, E] (or flat, [E · d]); None if there is none."""
        holder = self.router if self.router is not None else self.block
        own = _parameters(holder, recurse=self.router is not None)
        fits = [p for p in own if p.dim() == 2 and self.n_experts in p.shape]
        if not fits and self.router is not None:
            fits = [p for p in own if p.dim() == 1 and p.numel() > self.n_experts and p.numel() % self.n_experts == 0]
        return fits[0] if fits else None


def find_routers(model: nn.Module) -> list[RouterSite]:
    """All places of a model that may be routers, in the order of its modules.

    Args:
        model: Any network.

    Returns:
        The candidates; most dense networks have none, and a few have some that a forward pass rules out.

    Example:
        >>> find_routers(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2), 2))
        []
    """
    found: dict[tuple[int, int], RouterSite] = {}
    for path, block in model.named_modules():
        for site in _in_block(path, block):
            found.setdefault((id(site.router), id(site.block)), site)
    # A module that only says of itself that it is one need not stand for itself where a block has it.
    held = {id(site.router) for site in found.values() if site.router is not site.block}
    return [site for site in found.values() if site.router is not site.block or id(site.router) not in held]


def chosen_routers(
    model: nn.Module, routers: Sequence[str | nn.Module], n_experts: int | None, top_k: int | None
) -> list[RouterSite]:
    """The routers that a user names.

    Args:
        model: The network.
        routers: Regular expressions that are searched in module names, or the modules themselves.
        n_experts: E; None takes it from the model's structure or attributes, 0 where it cannot be told.
        top_k: k; None takes it from attributes.

    Raises:
        ValueError: If a pattern is no regular expression or matches nothing, or a module is not in the model.

    Example:
        >>> model = nn.ModuleDict({"gate": nn.Linear(4, 3), "out": nn.Linear(4, 4)})
        >>> [(site.name, site.n_experts, site.top_k) for site in chosen_routers(model, ["^gate$"], None, 2)]
        [('gate', 3, 2)]
    """
    names = {id(module): name for name, module in model.named_modules()}
    known = {id(site.router): site for site in find_routers(model) if site.router is not None}
    parents = {id(child): parent for parent in model.modules() for child in parent.children()}
    sites = []
    for module in _named(model, routers, names):
        site = known.get(id(module))
        block = site.block if site else parents.get(id(module), model)
        count = n_experts or (site.n_experts if site else _attribute((module, block), _COUNTS)) or 0
        if not count and isinstance(module, nn.Linear):
            count = module.out_features
        k = top_k or _attribute((module, block), _TOP_KS)
        experts, members = (site.experts, site.members) if site else (None, ())
        sites.append(RouterSite(names[id(module)], module, block, experts, count, k, True, members))
    return sites


def _named(model: nn.Module, routers: Sequence[str | nn.Module], names: dict[int, str]) -> Iterator[nn.Module]:
    seen: set[int] = set()
    for each in routers:
        if isinstance(each, nn.Module):
            hits = [each] if id(each) in names else []
        else:
            try:
                hits = [module for name, module in model.named_modules() if name and re.search(each, name)]
            except re.error as error:
                raise ValueError(f"routers={each!r} is not a regular expression: {error}.") from error
        if not hits:
            shown = ", ".join([name for name in names.values() if name][:8])
            what = f"{each!r} matches none" if isinstance(each, str) else f"{type(each).__name__} is none"
            raise ValueError(f"routers={what} of the model's modules. Names look like: {shown}, ….")
        for module in hits:
            if id(module) not in seen:
                seen.add(id(module))
                yield module


def _in_block(path: str, block: nn.Module) -> Iterator[RouterSite]:
    children = dict(block.named_children())
    # By child: E, the module to which choices are given, and the experts.
    holders: dict[int, tuple[int, nn.Module | None, tuple[nn.Module, ...]]] = {}
    for child in children.values():
        count, members = _experts_of(child)
        if not count and not any(_in_block("", child)):  # one level down, unless there is a block of its own
            count, members = next((found for each in child.children() if (found := _experts_of(each))[0]), (0, ()))
        if count:
            called = type(child).forward is not nn.Module.forward and type(child) not in (nn.ModuleList, nn.ModuleDict)
            holders[id(child)] = count, child if called else None, members
    own_count = _leading(block)
    if own_count:  # the block holds its experts' tensors itself
        holders[id(block)] = own_count, None, ()
    for holder, (count, experts, members) in holders.items():
        top_k = _attribute((block,), _TOP_KS)
        for name, child in children.items():
            if id(child) not in holders and _scores(child, count):
                k = _attribute((child,), _TOP_KS) or top_k
                where = f"{path}.{name}".lstrip(".")
                yield RouterSite(where, child, block, experts, count, k, _tells((where, child, block)), members)
        own = [p for p in _parameters(block, recurse=False) if p.dim() == 2 and count in p.shape]
        if own and holder != id(block):
            yield RouterSite(path, None, block, experts, count, top_k, _tells((path, block)), members)
    says, k = _attribute((block,), _COUNTS), _attribute((block,), _TOP_KS)
    if says and k and not holders and _scores(block, says):
        yield RouterSite(path, block, block, None, says, k, True)


def _experts_of(module: nn.Module) -> tuple[int, tuple[nn.Module, ...]]:
    """How many experts a module holds, as a list of them or in tensors, and those of the list; 0 if it has none."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        inner = [each for each in module.children() if any(True for _ in each.parameters())]
        if len(inner) >= 2 and len({type(each) for each in inner}) == 1:
            return len(inner), tuple(inner)
    return _leading(module), ()


def _leading(module: nn.Module) -> int:
    """The first side of a module's own tensors of three dimensions; 0 if it has none or they differ."""
    if isinstance(module, _NOT_EXPERTS):
        return 0
    sides = {p.shape[0] for p in _parameters(module, recurse=False) if p.dim() == 3}
    return sides.pop() if len(sides) == 1 and min(sides) >= 2 else 0


def _scores(module: nn.Module, count: int) -> bool:
    """Whether a module may score so many experts."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return False
    parameters = _parameters(module)
    flat = [
        p for p in _parameters(module, recurse=False) if p.dim() == 1 and p.numel() > count and p.numel() % count == 0
    ]
    matrix = any(p.dim() == 2 and count in p.shape for p in parameters)
    says = _attribute((module,), _COUNTS) == count
    return (matrix or (says and bool(flat))) and all(p.dim() < 3 for p in parameters)


def _parameters(module: nn.Module, recurse: bool = True) -> list[nn.Parameter]:
    """Those that have a shape yet; lazy modules have none before their first pass."""
    return [p for p in module.parameters(recurse) if not is_lazy(p)]


def _attribute(owners: Iterable[nn.Module], names: Sequence[str]) -> int | None:
    for owner in owners:
        for name in names:
            value = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _tells(things: Iterable[object]) -> bool:
    return any(_TELLING.search(each if isinstance(each, str) else type(each).__name__) for each in things)


def suspects(model: nn.Module) -> list[str]:
    """Modules whose class is called a router or a mixture of experts, by name.

    Args:
        model: Any network.

    Example:
        >>> suspects(nn.Linear(2, 2))
        []
    """
    return [name for name, module in model.named_modules() if _NAMED.search(type(module).__name__)]
