"""What the package promises as a whole: a light engine, one name for the callbacks, and examples that run."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

import dynwatch

ENGINE = sorted(
    info.name
    for info in pkgutil.walk_packages(dynwatch.__path__, "dynwatch.")
    if not info.name.startswith("dynwatch.callbacks")
)
PUBLIC = [
    pytest.param(value, id=f"{module}.{name}")
    for module in ENGINE
    if "._" not in module  # inner parts of another module
    for name, value in vars(importlib.import_module(module)).items()
    if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == module and not name.startswith("_")
]
# What a module may import when one of its functions is called.
LATER = {"dynwatch.rules.old_logs": {"tensorboard", "rich"}, "dynwatch.pathways": {"rapidfuzz"}}


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a line in a fresh interpreter, with `cwd` first on its path."""
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)


def test_the_engine_is_all_there() -> None:
    """The tests below look at every engine module, so finding none must not pass for all being well."""
    assert {"dynwatch.gradients", "dynwatch.layers", "dynwatch.noise_scale", "dynwatch.rules"} <= set(ENGINE)
    assert len(PUBLIC) >= 10


def test_importing_the_engine_loads_no_framework(tmp_path: Path) -> None:
    """dynwatch and all engine modules leave Lightning, TensorBoard, Rich and rapidfuzz alone."""
    heavy = ["lightning", "pytorch_lightning", "lightning_fabric", "tensorboard", "rich", "torchmetrics", "rapidfuzz"]
    code = f"import sys, {', '.join(['dynwatch', *ENGINE])}; print([m for m in {heavy} if m in sys.modules])"
    found = python(code, tmp_path)
    assert (found.stdout.strip(), found.returncode) == ("[]", 0), found.stderr


@pytest.mark.parametrize("module", ["dynwatch", *ENGINE])
def test_the_engine_imports_torch_numpy_and_the_standard_library_only(module: str) -> None:
    """No import statement of an engine module, at any depth of the file, names anything else.

    Except in the functions of `old_logs`, which read TensorBoard's files and draw a table when they are called, and of
    `pathways`, which compare sequences with rapidfuzz.
    """
    allowed = {"torch", "numpy", "dynwatch", *sys.stdlib_module_names}
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    later = {id(inner) for function in functions for inner in ast.walk(function)}
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name is from"
            found = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        excepted = LATER.get(module, set()) if id(node) in later else set()
        names += [name for name in found if name.split(".")[0] not in excepted]
    assert [name for name in names if name.split(".")[0] not in allowed] == []
    assert [name for name in names if name.startswith("dynwatch.callbacks")] == []


@pytest.mark.parametrize("value", PUBLIC)
def test_everything_public_has_an_example(value: object) -> None:
    """Each public function and class of the engine is described and shown in use (doctest runs it)."""
    documentation = inspect.getdoc(value) or ""
    assert "Example:" in documentation
    assert doctest.DocTestParser().get_examples(documentation)


def test_the_callbacks_folder_refuses_another_name() -> None:
    """Imported by its folder's name it says what it is and what to write instead."""
    spec = find_spec("dynwatch.callbacks")
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations))).resolve()
    found = python(f"import {folder.name}", folder.parent)
    assert found.returncode == 1
    assert found.stderr.strip().splitlines()[-1] == (
        "ImportError: This folder is the package dynwatch.callbacks and was imported as 'callbacks', which would "
        "make a second copy of every class. Write 'from dynwatch.callbacks import DynWatch'."
    )


def test_the_installed_version_is_the_one_in_the_code() -> None:
    """The distribution's metadata and `dynwatch.__version__` agree."""
    assert version("dynwatch") == dynwatch.__version__
