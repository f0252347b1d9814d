"""The import rules that keep the package a house and not a heap, read from the source."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "videollm_mod_jax"
NAME = PACKAGE.name

BASE = {"errors", "names", "config_dict", "console", "locks", "signals"}
"""Modules beside the folders that import nothing but each other; every folder may import them."""

ALLOWED = {
    "models": {"models"},
    "data": {"data"},
    "training": {"models", "data", "training"},
    "conversion": {"models", "data", "training", "conversion"},
    "streaming": {"models", "data", "training", "streaming"},
    "evaluation": {"models", "data", "training", "streaming", "evaluation"},
    "benchmarking": {
        "models",
        "data",
        "training",
        "streaming",
        "evaluation",
        "benchmarking",
    },
    "studying": {
        "models",
        "data",
        "training",
        "streaming",
        "evaluation",
        "benchmarking",
        "studying",
    },
}
"""What a folder may import. Modules beside the folders are verbs and may import all of it."""


def imports(path):
    """Yields (top-level package, part of our package or None) of every import in a file."""
    return imports_of(ast.parse(path.read_text()), path)


def imports_of(module, path):
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            yield parts[0], parts[1] if parts[0] == NAME and len(parts) > 1 else None


def files(folder=""):
    return sorted((PACKAGE / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ALLOWED)
def test_imports_run_one_way(folder):
    assert files(folder)
    for path in files(folder):
        for _, part in imports(path):
            assert part is None or part in ALLOWED[folder] | BASE, f"{path} imports {part}"


def test_the_base_imports_nothing_of_the_house():
    for name in BASE:
        for _, part in imports(PACKAGE / f"{name}.py"):
            assert part is None or part in BASE, f"{name} imports {part}"


def test_every_folder_has_its_rule():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(ALLOWED)


def test_data_never_imports_jax():
    for path in files("data"):
        assert not {top for top, _ in imports(path)} & {"jax", "flax", "optax", "orbax"}, path


def test_importing_data_loads_no_model():
    modules = f"{NAME}.data.pipeline, {NAME}.data.builders.digits_stream"
    code = (
        f"import sys, {modules}; sys.exit('flax' in sys.modules or '{NAME}.models' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_public_face_is_complete():
    package = importlib.import_module(NAME)
    assert sorted(package.__all__) == dir(package)
    assert all(getattr(package, name) is not None for name in package.__all__)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        getattr(package, "lo" + "de")


HEAVY = {"torch", "transformers", "peft", "huggingface_hub", "tensorflow"}
"""What only a conversion needs, and only when it comes to it."""


def test_only_conversion_imports_torch_and_its_kin_and_only_inside_functions():
    found = set()
    for path in files():
        everywhere = {top for top, _ in imports(path)} & HEAVY
        module = ast.parse(path.read_text())
        module.body = [n for n in module.body if isinstance(n, (ast.Import, ast.ImportFrom))]
        at_the_top = {top for top, _ in imports_of(module, path)} & HEAVY
        assert not at_the_top, f"{path} imports {at_the_top} at the top"
        assert not everywhere or path.parent.name == "conversion", f"{path} imports {everywhere}"
        found |= everywhere
    assert found == HEAVY - {"tensorflow"}


def test_commands_start_without_what_they_do_not_use():
    """A library that imports PyTorch where it is installed costs every command seconds."""
    verbs = ("train", "evaluate", "stream", "plan", "benchmark", "convert", "study")
    names = ", ".join(f"{NAME}.{verb}" for verb in verbs)
    code = f"import sys, {names}; print(*{HEAVY!r} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n")


def test_nothing_unpickles():
    # conversion/restricted_pickle.py reads pickles, and has no way to run what they ask for.
    for path in files():
        tops = {top for top, _ in imports(path)}
        assert not tops & {"pickle", "_pickle", "dill", "joblib", "cloudpickle"}, path
