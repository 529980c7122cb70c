"""Layers from parameter names: every parameter has one, there are never too many, and the order is the model's."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dynwatch.layers import LayerGroups, group_by_layer

_PART = st.sampled_from(["a", "b", "net", "0", "1", "2", "10"])
NAMES = st.lists(st.lists(_PART, min_size=1, max_size=5).map(".".join), max_size=60, unique=True)
MAX_GROUPS = st.integers(1, 12)
DEPTH = st.none() | st.integers(1, 7)


def modules(names: list[str], depth: int) -> list[str]:
    """The module that holds each parameter, cut at a depth: the naive version."""
    return [".".join((name.split(".")[:-1] or [name])[:depth]) for name in names]


@given(names=NAMES, depth=DEPTH, max_groups=MAX_GROUPS)
@settings(max_examples=150, deadline=None)
def test_every_parameter_is_in_one_of_at_most_max_groups_layers(
    names: list[str], depth: int | None, max_groups: int
) -> None:
    """Nothing is dropped, nothing is empty, the bound holds, and layers stand in the order of their parameters."""
    groups = group_by_layer(names, depth=depth, max_groups=max_groups)
    assert len(groups.index) == len(names)
    assert len(groups.names) <= max_groups
    assert len(set(groups.names)) == len(groups.names)
    assert list(dict.fromkeys(groups.index)) == list(range(len(groups.names)))


@given(names=NAMES, depth=st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_a_depth_cuts_the_names_of_modules_there(names: list[str], depth: int) -> None:
    """With room for all layers, a parameter's layer is its module's path cut at the depth."""
    groups = group_by_layer(names, depth=depth, max_groups=1000)
    assert [groups.names[i] for i in groups.index] == modules(names, depth)


@given(names=NAMES, depth=DEPTH, max_groups=MAX_GROUPS)
@settings(max_examples=100, deadline=None)
def test_parameters_of_one_module_share_a_layer(names: list[str], depth: int | None, max_groups: int) -> None:
    """No cut and no merge separates the weight of a module from its bias."""
    groups = group_by_layer(names, depth=depth, max_groups=max_groups)
    layer_of: dict[str, int] = {}
    for module, layer in zip(modules(names, 99), groups.index, strict=True):
        assert layer_of.setdefault(module, layer) == layer


@given(names=NAMES, depth=st.integers(1, 7), max_groups=MAX_GROUPS)
@settings(max_examples=100, deadline=None)
def test_merged_layers_are_neighbours_and_named_by_their_ends(names: list[str], depth: int, max_groups: int) -> None:
    """A merged layer is a run of neighbours in model order, all runs but the last are equally long, and it says so."""
    groups = group_by_layer(names, depth=depth, max_groups=max_groups)
    unmerged = list(dict.fromkeys(modules(names, depth)))
    layer_of = dict(zip(modules(names, depth), groups.index, strict=True))
    runs = [[m for m in unmerged if layer_of[m] == layer] for layer in range(len(groups.names))]
    assert [m for run in runs for m in run] == unmerged
    assert len({len(run) for run in runs[:-1]}) <= 1
    assert all(len(run) <= len(runs[0]) for run in runs)
    for name, run in zip(groups.names, runs, strict=True):
        assert name == (run[0] if len(run) == 1 else f"{run[0]}..{run[-1]}")


@given(names=NAMES, max_groups=MAX_GROUPS)
@settings(max_examples=100, deadline=None)
def test_the_chosen_depth_is_the_deepest_that_fits_or_the_next(names: list[str], max_groups: int) -> None:
    """The answer is that of the deepest depth within the bound, or of the next one if that tells too little."""
    fitting = [depth for depth in range(1, 8) if len(set(modules(names, depth))) <= max_groups]
    deepest = max((name.count(".") or 1 for name in names), default=1)
    chosen = min(max(fitting, default=1), deepest)
    if chosen < deepest and len(set(modules(names, chosen))) < min(8, max_groups):
        chosen += 1
    assert group_by_layer(names, max_groups=max_groups) == group_by_layer(names, depth=chosen, max_groups=max_groups)


def test_a_deep_stack_of_blocks_is_merged_instead_of_one_lump() -> None:
    """48 blocks do not fit into 32 layers, but one curve named "h" would tell nothing: pairs of blocks are drawn."""
    names = ["wte.weight", *(f"h.{i}.{part}.weight" for i in range(48) for part in ("attn", "mlp")), "head.weight"]
    groups = group_by_layer(names)
    assert groups.names[:3] == ("wte..h.0", "h.1..h.2", "h.3..h.4")
    assert groups.names[-1] == "h.47..head"
    assert len(groups.names) == 25


def test_enough_shallow_layers_are_kept_unmerged() -> None:
    """Eight whole layers are told apart better by their own names than 80 merged ones."""
    names = [f"block{i}.part{j}.weight" for i in range(8) for j in range(10)]
    assert group_by_layer(names).names == tuple(f"block{i}" for i in range(8))
    names = names[:70]  # seven
    assert "block0.part0..block0.part2" in group_by_layer(names).names


def test_names_of_a_real_model_with_root_and_tied_parameters() -> None:
    """A parameter of the root module is its own layer; a tied one is where PyTorch names it first."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(nn.Linear(1, 1).weight.detach())
            self.body = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
            self.head = nn.Linear(2, 2, bias=False)
            self.head.weight = self.body[0].weight

    names = [name for name, _ in Model().named_parameters()]
    assert group_by_layer(names) == LayerGroups(("scale", "body.0", "body.2"), (0, 1, 1, 2, 2))


def test_a_model_without_parameters_has_no_layers() -> None:
    """No names in, no layers out."""
    assert group_by_layer([]) == LayerGroups((), ())


def test_one_layer_takes_everything() -> None:
    """`max_groups=1` merges the whole model."""
    groups = group_by_layer(["a.w", "b.w", "c.w"], max_groups=1)
    assert groups == LayerGroups(("a..c",), (0, 0, 0))


def test_patterns_choose_parameters() -> None:
    """Only parameters in which a pattern is found have a layer; patterns are united and searched anywhere."""
    names = ["emb.weight", "h.0.attn.q", "h.0.mlp.w", "h.1.attn.q", "h.1.mlp.w", "head.weight"]
    groups = group_by_layer(names, patterns=["attn", "^head"])
    assert groups == LayerGroups(("h.0.attn", "h.1.attn", "head"), (-1, 0, -1, 1, -1, 2))
    assert group_by_layer(names, patterns=["attn", r"h\.0"], depth=2).index == (-1, 0, 0, 1, -1, -1)


@given(names=NAMES, max_groups=MAX_GROUPS, depth=DEPTH)
@settings(max_examples=60, deadline=None)
def test_patterns_leave_the_rest_out_as_if_it_were_not_there(
    names: list[str], max_groups: int, depth: int | None
) -> None:
    """Layers of the matching parameters do not depend on the others."""
    names = ["a.weight", *names]
    wanted = [name for name in names if "a" in name]
    chosen = group_by_layer(names, depth=depth, max_groups=max_groups, patterns=["a"])
    alone = group_by_layer(wanted, depth=depth, max_groups=max_groups)
    assert chosen.names == alone.names
    assert [i for i in chosen.index if i >= 0] == list(alone.index)
    assert [i >= 0 for i in chosen.index] == ["a" in name for name in names]


def test_equal_names_in_equal_layers_out() -> None:
    """The result is a value: equal, hashable and frozen."""
    first, second = group_by_layer(["a.w", "b.w"]), group_by_layer(("a.w", "b.w"))
    assert first == second and hash(first) == hash(second)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.names = ()  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth=0 must be at least 1, or None to have it chosen."),
        ({"depth": -2}, "depth=-2 must be at least 1, or None to have it chosen."),
        ({"max_groups": 0}, "max_groups=0 must be at least 1."),
        (
            {"patterns": ["a", "atn"]},
            "layers='atn' matches none of the 7 parameters. Names look like: a0.w, a1.w, a2.w, a3.w, a4.w, ….",
        ),
        ({"patterns": ["a["]}, "layers='a[' is not a regular expression: unterminated character set"),
    ],
)
def test_bad_arguments_say_what_to_change(arguments: dict[str, object], message: str) -> None:
    """An error names the argument, its value and the bound; for a pattern, what the names look like."""
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        group_by_layer([f"a{i}.w" for i in range(7)], **arguments)  # type: ignore[arg-type]


def test_few_names_are_shown_whole() -> None:
    """The list of names in the error ends without dots if it is complete."""
    with pytest.raises(ValueError, match=re.escape("none of the 2 parameters. Names look like: a.w, b.w.")):
        group_by_layer(["a.w", "b.w"], patterns=["c"])
