"""The two examples of curvature run to their end and show what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not beside the tests"),
]


def output_of(name: str, *arguments: str, cwd: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=240)
    assert ended.returncode == 0, ended.stderr
    assert "Traceback" not in ended.stderr
    return ended.stdout


def batch_size_table(output: str, name: str) -> list[tuple[float, float, float]]:
    """Rows of predicted rate by sharpness, by mean square, and median measured rate, by growing batch size."""
    section = output.split(f"{name}: critical learning rate")[1].split("Slope")[0]
    rows = [line.split() for line in section.splitlines() if re.match(r"\s+(\d+|all)\s", line)]
    return [(float(row[1]), float(row[2]), float(row[3])) for row in rows]


def test_the_sharpness_ratio_comes_to_one_and_stays(tmp_path: Path) -> None:
    """Gradient descent and Adam start well below the edge, hover at it in the last quarter, and learn on."""
    output = output_of("edge_of_stability.py", "--logdir", "logs", "--steps", "900", cwd=tmp_path)
    ends = re.findall(
        r"ratio is (\S+) on average, from (\S+) to ([\d.]+); the loss went from (\S+) to ([\d.]+)\.", output
    )
    starts = re.findall(r"^ +20 +\S+ +\S+ +(\S+)", output, re.MULTILINE)
    assert len(ends) == len(starts) == 2, output
    for start, (mean, least, most, before, after) in zip(starts, ends, strict=True):
        assert float(start) < 0.7
        assert 0.8 < float(mean) < 1.3
        assert float(least) > 0.7
        assert float(most) < 1.5
        assert float(after) < float(before)


def test_the_edge_of_stability_prints_its_tables_alone(tmp_path: Path) -> None:
    """Not even a short run has Lightning's advice or warnings around its tables."""
    output = output_of("edge_of_stability.py", "--logdir", "logs", "--steps", "60", cwd=tmp_path)
    assert output.startswith("\nsgd, learning rate 0.15: hessian/lambda_max against 2/lr = 13.3333\n\n  step")
    assert "adam, learning rate 0.002: hessian/preconditioned_lambda_max against 38/lr = 19000" in output
    assert not re.search("trainer|gpu|warning", output, re.IGNORECASE)


def test_critical_rates_grow_with_the_batch_as_predicted(tmp_path: Path) -> None:
    """Measured rates rise with B, within a factor of 2.5 of both predictions (SGD) or of the mean square (Adam)."""
    output = output_of("batch_size.py", "--quick", "--picture", "drawn.png", cwd=tmp_path)
    sgd, adam = batch_size_table(output, "SGD"), batch_size_table(output, "Adam")
    assert len(sgd) == len(adam) == 4, output
    measured = [row[2] for row in sgd]
    assert measured == sorted(measured)
    assert measured[-1] > 4 * measured[0]
    for sharpness, mean_square, rate in sgd:
        assert 0.4 < sharpness / rate < 2.5
        assert 0.4 < mean_square / rate < 2.5
    noisy = adam[:-1]  # with all the data there is no noise
    assert noisy[0][2] < noisy[1][2] < noisy[2][2]
    assert all(0.4 < mean_square / rate < 2.5 for _, mean_square, rate in noisy)
    with Image.open(tmp_path / "drawn.png") as picture:
        assert picture.size == (1200, 590)
        colours = {colour for _, colour in picture.convert("RGB").getcolors(picture.width * picture.height)}
    assert {(224, 123, 0), (31, 111, 180), (17, 17, 17)} <= colours  # both predictions and what was measured


def test_slopes_are_told_over_the_noisy_sizes(tmp_path: Path) -> None:
    """The fitted exponents: near a root for Adam, more than a root and no more than proportional for SGD's."""
    output = output_of("batch_size.py", "--quick", cwd=tmp_path)
    slopes = re.findall(r"sharpness (\S+), mean square (\S+), measured (\S+) \((\S+) in the limit", output)
    assert [slope[3] for slope in slopes] == ["1", "0.5"]
    (_, sgd_predicted, sgd_measured, _), (_, adam_predicted, adam_measured, _) = slopes
    assert 0.5 < float(sgd_predicted) <= 1
    assert 0.4 < float(sgd_measured) < 1.2
    assert 0.4 < float(adam_predicted) < 0.55
    assert 0.2 < float(adam_measured) < 0.7
    assert not (tmp_path / "drawn.png").exists()
