"""The example and the benchmark of mixtures of experts run to their end and show what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent
EXAMPLE, BENCHMARK = ROOT / "examples" / "moe_language_model.py", ROOT / "benchmarks" / "moe_grokking.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (EXAMPLE.exists() and BENCHMARK.exists()), reason="they are not beside the tests"),
]


def ended(program: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(program), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=280)


def output_of(program: Path, *arguments: str, cwd: Path) -> str:
    done = ended(program, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What a short version of the example printed, and where it logged."""
    folder = tmp_path_factory.mktemp("writers")
    return output_of(EXAMPLE, "--logdir", "logs", "--steps", "160", cwd=folder), folder / "logs"


def rows_of(output: str) -> dict[str, tuple[list[float], str]]:
    """Loss, effective experts of three layers, busiest share in per cent and distance, and the verdict, by run."""
    rows = re.findall(r"^(healthy|collapsed) +0((?: +[\d.]+%?){6})  (.+)$", output, re.MULTILINE)
    return {name: ([float(text.rstrip("%")) for text in figures.split()], verdict) for name, figures, verdict in rows}


def test_the_collapsed_router_is_told_from_the_healthy_one(writers: tuple[str, Path]) -> None:
    """Both learn; one spreads the bytes over the experts, the other holds on to two of eight, and only it is warned."""
    rows = rows_of(writers[0])
    assert list(rows) == ["healthy", "collapsed"], writers[0]
    (loss, *effective, busiest, distance), verdict = rows["healthy"]
    assert loss < 3
    assert min(effective) > 6
    assert busiest < 50
    assert distance > 0.5
    assert verdict == "none"
    (loss, *effective, busiest, distance), verdict = rows["collapsed"]
    assert loss < 3
    assert min(effective) < 2.7
    assert max(effective) < 4
    assert busiest > 95
    assert distance < 0.2
    assert "router_collapse" in verdict
    assert re.search("^collapsed, seed 0: The router of MoE layer ", writers[0], re.MULTILINE)
    assert "healthy, seed" not in writers[0]


def test_both_writers_lie_side_by_side(writers: tuple[str, Path]) -> None:
    """The same curves of each layer stand in two runs under one folder, with the pathways of the fixed samples."""
    output, logs = writers
    assert "tensorboard --logdir logs" in output
    assert {path.name for path in logs.iterdir()} == {"healthy_0", "collapsed_0"}
    for path in logs.iterdir():
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        layers = {f"moe/layer_{layer}/{name}" for layer in range(3) for name in ("effective_experts", "max_load")}
        assert layers | {"train_loss", "moe/distance_normalized"} <= set(events.Tags()["scalars"])
        assert "moe/load" in events.Tags()["images"]
        assert len(events.Scalars("moe/layer_0/effective_experts")) == 8  # each 20 steps


def test_too_few_steps_are_refused(tmp_path: Path) -> None:
    """The table's mean needs its steps; how many is said."""
    done = ended(EXAMPLE, "--steps", "50", cwd=tmp_path)
    assert done.returncode == 2
    assert "--steps 50 is too few for a mean over the last 100" in done.stderr


def test_pathways_stand_beside_held_out_accuracy(tmp_path: Path) -> None:
    """The known pairs are learnt within 300 steps and the others not; each figure is correlated in each way."""
    output = output_of(BENCHMARK, "--seeds", "1", "--steps", "300", "--logdir", "logs", cwd=tmp_path)
    assert re.search(
        r"^seed 0: 99% of the known pairs right from step (\d+), half of the others from step -;", output, re.M
    )
    checkpoints = re.findall(r"^ +(\d+) +\S+ +(\S+) +(\S+)((?: +\S+){5})$", output, re.MULTILINE)
    assert checkpoints[0][0] == "25"
    assert checkpoints[-1][0] == "300"
    assert float(checkpoints[-1][1]) > 0.95
    assert float(checkpoints[-1][2]) < 0.2
    table = re.findall(r"^(\w+) +0 +12/(\d+)((?: +[+-]\d\.\d\d){5})$", output, re.MULTILINE)
    assert [row[0] for row in table] == ["distance", "normalised", "length", "consistency", "complexity", "step"]
    assert all(abs(float(value)) <= 1 for row in table for value in row[2].split())
    assert "-0.93 to -0.98" in output
    assert not re.search("trainer|gpu|warning", output, re.IGNORECASE)
