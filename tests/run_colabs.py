"""Runs the notebooks of colabs/ in full, and stores what they display.

    python -m tests.run_colabs quickstart      about as long as its first cell says

Each runs from its text form in a directory of its own, with the package of this checkout.
"""

import os
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
COLABS = ROOT / "colabs"


def run(name: str, directory: Path, timeout: int) -> nbformat.NotebookNode:
    """The notebook with its outputs; a cell that fails raises.

    What C++ libraries print about the machine is left out.
    """
    book = jupytext.read(COLABS / f"{name}.py")
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [before])])
    try:
        resources = {"metadata": {"path": str(directory)}}
        NotebookClient(book, timeout=timeout, kernel_name="python3", resources=resources).execute()
    finally:
        os.environ["PYTHONPATH"] = before
    for cell in book.cells:
        cell.get("metadata", {}).pop("execution", None)
        if "outputs" in cell:
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    return book


def main(names: list[str]) -> None:
    """Runs and stores notebooks, by default all."""
    for name in names or sorted(path.stem for path in COLABS.glob("*.py")):
        directory = ROOT / "runs" / "colabs" / name
        directory.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        book = run(name, directory, timeout=3600)
        target = COLABS / f"{name}.ipynb"
        nbformat.write(book, target)
        seconds = time.perf_counter() - began
        print(f"{name}: {seconds:.0f} s, {target.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
