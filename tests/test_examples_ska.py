"""The forward-only example: its learner is that of the worked table and of the engine, its runs show what they say."""

import importlib.util
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from runs import trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torch.utils.data import DataLoader

from dynwatch.ska_crossings import zero_crossings
from dynwatch.ska_layer import KnowledgeReading, LayerKnowledge
from dynwatch.ska_learner import forward_only_pass

EXAMPLE = Path(__file__).parent.parent / "examples" / "ska_forward_only.py"

pytestmark = pytest.mark.skipif(not EXAMPLE.is_file(), reason="the examples are not beside the tests")

TABLE = [
    (1.0, 0.5, 0.0),
    (1.0, 0.5567302122, 0.0283651061),
    (1.1418255305, 0.6249406456, 0.0624703228),
    (1.3123516141, 0.6968441921, 0.0984220960),
]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ska_forward_only", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ska_forward_only"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


class Passes(pl.Callback):
    """Knowledge, and the weights and biases after each pass."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        parts = [layer.weight for layer in pl_module.layers], [layer.bias for layer in pl_module.layers]
        weights, biases = ([p.detach().clone() for p in part] for part in parts)
        self.seen.append(([z.clone() for z in pl_module.before], weights, biases))


def train(module: Any, x: Tensor, passes: int, folder: Path) -> list[Any]:
    seen = Passes()
    loader = DataLoader([x] * passes, batch_size=None)  # type: ignore[arg-type]
    trainer(folder, [seen], max_epochs=1, logger=False).fit(module, loader)
    return seen.seen


def test_one_unit_learns_as_in_the_table(example: ModuleType, tmp_path: Path) -> None:
    """x = 2, w = 0.5, b = 0, a rate of 0.1, in float64, to 1e-9: through Lightning's optimizer step."""
    module = example.ForwardOnly((1, 1), lr=0.1).double()
    with torch.no_grad():
        module.layers[0].weight.fill_(0.5)
    seen = train(module, torch.tensor([[2.0]], dtype=torch.float64), len(TABLE), tmp_path)
    for (z, weight, bias), expected in zip(seen, TABLE, strict=True):
        assert (z[0].item(), weight[0].item(), bias[0].item()) == pytest.approx(expected, rel=0, abs=1e-9)


def test_layers_learn_as_the_engine_says(example: ModuleType, tmp_path: Path) -> None:
    """Pass by pass, in float64, for layers of unequal widths."""
    torch.manual_seed(2)
    module = example.ForwardOnly((5, 7, 3), lr=0.3).double()
    weights = [layer.weight.detach().clone() for layer in module.layers]
    biases = [layer.bias.detach().clone() for layer in module.layers]
    x, before = torch.rand(9, 5, dtype=torch.float64), None
    for z, new_weights, new_biases in train(module, x, 6, tmp_path):
        expected = forward_only_pass(x, weights, biases, before, lr=0.3)
        weights, biases, before = expected.weights, expected.biases, expected.knowledge
        for found, wanted in ((z, before), (new_weights, weights), (new_biases, biases)):
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_curves_converge_over_the_sum_of_rates(example: ModuleType) -> None:
    """At eta K = 0.5, from one rate to half of it: times agree within 15 %, extrema within 40 %; both come nearer."""
    x = example.digits()
    times: list[list[float]] = []
    extrema: list[list[float]] = []
    for lr in (0.02, 0.01, 0.005):
        torch.manual_seed(0)
        module = example.ForwardOnly(lr=lr)
        weights = [layer.weight.detach() for layer in module.layers]
        biases = [layer.bias.detach() for layer in module.layers]
        layers, before = [LayerKnowledge() for _ in weights[1:3]], None
        curves: list[list[KnowledgeReading]] = [[] for _ in layers]
        for _ in range(round(0.5 / lr)):
            found = forward_only_pass(x, weights, biases, before, lr)
            weights, biases, before = found.weights, found.biases, found.knowledge
            for layer, z, curve in zip(layers, before[1:3], curves, strict=True):
                curve.append(layer.read(layer.measure(z).tolist(), dt=lr))
        crossings = [lr * zero_crossings([r.net_code for r in curve])[-1].position for curve in curves]
        flows = [[0.0, *(r.flow for r in curve[1:])] for curve in curves]
        times.append([*crossings, *(lr * flow.index(max(flow)) for flow in flows)])
        extrema.append([*map(max, flows), *(abs(min(r.entropy_published for r in c[1:])) / lr for c in curves)])
    for series, tolerance in ((times, 0.15), (extrema, 0.4)):
        for coarse, fine in pairwise(series):
            assert coarse == pytest.approx(fine, rel=tolerance)
    assert all(abs(b - c) < abs(a - b) for a, b, c in zip(*extrema, strict=True))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the example printed, and where it logged."""
    folder = tmp_path_factory.mktemp("ska")
    command = [sys.executable, str(EXAMPLE), "--logdir", "logs", "--picture", "ska.png"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, encoding="utf-8", timeout=560)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout, folder


@pytest.mark.slow
@pytest.mark.timeout(600)  # a minute on an idle core
def test_the_curves_do_not_depend_on_the_rate(done: tuple[str, Path]) -> None:
    """At four rates all times agree: within 15 % from one to the next for the smaller three, 40 % over all."""
    output, _ = done
    rows = re.findall(r"^ +(0\.\d+) +(\d+) +(.*)$", output, re.MULTILINE)
    times = [rest.split() for _, _, rest in rows]
    assert [float(rate) for rate, *_ in rows] == [0.04, 0.02, 0.01, 0.005] and all(len(row) == 9 for row in times)
    for texts in zip(*times, strict=True):
        if "-" in texts:  # the last layer's Net need not cross zero
            assert set(texts) == {"-"}
            continue
        column = [float(text) for text in texts]
        assert max(column) / min(column) < 1.4
        assert all(0.85 < a / b < 1.15 for a, b in pairwise(column[1:]))
    # The number of passes is what a rate changes.
    passes = [int(count) for _, count, _ in rows]
    assert all(1.9 < more / fewer < 2.1 for fewer, more in pairwise(passes))


@pytest.mark.slow
def test_the_runs_are_ended_by_the_rule_and_can_be_looked_at(done: tuple[str, Path]) -> None:
    """Before their budget, with the reason; the trajectories are drawn, in TensorBoard as well."""
    output, folder = done
    assert "The network has stopped changing its decisions" in output
    assert {path.name for path in (folder / "logs").iterdir()} == {
        "all",
        *(f"eta_{r}" for r in (0.04, 0.02, 0.01, 0.005)),
    }
    events = EventAccumulator(str(folder / "logs" / "eta_0.02"), size_guidance={"scalars": 0}).Reload()
    assert {f"ska/layers.{i}/{kind}" for i in range(4) for kind in ("entropy", "alignment", "flow", "net")} <= set(
        events.Tags()["scalars"]
    )
    assert max(event.step for event in events.Scalars("ska/equilibrium")) < 8 / 0.02 - 1
    pictures = EventAccumulator(str(folder / "logs" / "all"), size_guidance={"images": 0}).Reload()
    assert pictures.Tags()["images"] == ["ska/trajectories"]
    assert Image.open(folder / "ska.png").size == (1200, 780)
    assert (folder / "ska.png").stat().st_size < 200_000


def test_a_budget_too_small_for_the_picture_is_refused(tmp_path: Path) -> None:
    """With the least one."""
    command = [sys.executable, str(EXAMPLE), "--budget", "1"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert ended.returncode == 2
    assert "--budget 1 is less than the picture shows: give 2 or more" in ended.stderr
