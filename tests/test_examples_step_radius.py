"""The two examples of the step radius run to their end and show what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not beside the tests"),
]


def output_of(name: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=280)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def spike(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """What the example of the learning-rate spike printed, and where it logged."""
    folder = tmp_path_factory.mktemp("spike")
    return output_of("lr_spike.py", "--logdir", "logs", cwd=folder), folder / "logs"


def runs_of(output: str) -> dict[str, tuple[float, float, float, float]]:
    """Accuracy before the spike, r of that step, lowest and final accuracy, by run."""
    numbers = r"(\d\.\d+) +(\S+) +(\d\.\d+) +(\d\.\d+)"
    rows = re.findall(rf"^(plain|clipped|controlled) +0 +{numbers}$", output, re.MULTILINE)
    return {name: (float(before), float(r), float(low), float(end)) for name, before, r, low, end in rows}


def test_only_the_controller_survives_the_spike(spike: tuple[str, Path]) -> None:
    """All three runs had learned the digits; plain and clipped collapse, the controlled one stays above .90."""
    runs = runs_of(spike[0])
    assert list(runs) == ["plain", "clipped", "controlled"], spike[0]
    assert all(before > 0.93 for before, *_ in runs.values())
    for name in ("plain", "clipped"):
        _, r, lowest, final = runs[name]
        assert r > 100
        assert lowest < 0.2
        assert final < 0.5
    _, r, lowest, final = runs["controlled"]
    assert r == pytest.approx(1, abs=0.01)
    assert lowest >= 0.90
    assert final >= 0.93


def test_the_spikes_runs_lie_side_by_side(spike: tuple[str, Path]) -> None:
    """Three versions under one folder have the same curves, and the controlled one says what it capped."""
    output, logs = spike
    assert "tensorboard --logdir logs" in output
    assert {path.name for path in logs.iterdir()} == {"plain_0", "clipped_0", "controlled_0"}
    for path in logs.iterdir():
        events = EventAccumulator(str(path), size_guidance={"scalars": 0}).Reload()
        tags = set(events.Tags()["scalars"])
        assert {"train_loss", "val_accuracy", "step_radius/r", "step_radius/tau"} <= tags
        assert ("step_radius/capped_steps" in tags) == (path.name == "controlled_0")
        if path.name == "controlled_0":
            scales = {event.step + 1: event.value for event in events.Scalars("step_radius/scale")}
            assert scales[410] < 1e-2


def test_a_run_that_ends_before_the_spike_is_refused(tmp_path: Path) -> None:
    """Too few steps are named, with how many it takes."""
    command = [sys.executable, str(EXAMPLES / "lr_spike.py"), "--steps", "100"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert ended.returncode == 2
    assert "--steps 100 ends before the spike: give more than 410" in ended.stderr


def test_trouble_begins_at_one_normalised_step_where_the_temperature_was_trained(tmp_path: Path) -> None:
    """Any radius shrinks each net's spread, and the tanh net's where T was changed; no harm comes at r < 1."""
    output = output_of("temperature.py", "--picture", "drawn.png", cwd=tmp_path)
    rows = re.findall(r"^(trained|changed) +(\w+) +(\S+) +(\S+) +(\S+) +(\S+) +(\S+) to (\S+)$", output, re.MULTILINE)
    assert [row[1] for row in rows] == ["tanh", "relu", "cnn"] * 2, output
    for way, net, *numbers in rows:
        raw, *normalised, least, most = map(float, numbers)
        if way == "trained":
            assert max(normalised) < 0.6 * raw
            assert 1.5 < least < most < 6
        elif net == "tanh":
            assert max(normalised) < 0.6 * raw
        assert least > 1  # within the radius nothing has happened yet
    assert (tmp_path / "drawn.png").stat().st_size < 200_000
    with Image.open(tmp_path / "drawn.png") as picture:
        assert picture.size == (1200, 520)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(picture.width * picture.height)}
    assert {(31, 111, 180), (224, 123, 0), (42, 143, 79)} <= colours  # a curve for each net
