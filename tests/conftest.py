"""A run of the tiny profile that several files of tests look at; each worker changes its own."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from filelock import FileLock

from pipeline import Ran, papermill, pipeline

# Files that take a minute or more, the longest first: begun last, one would leave all workers but one without work.
LONG = ("pipeline", "docs", "paper", "trainer", "another_run", "study", "segment", "llm", "guides")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the long files first. xdist would begin with those that hold the most tests: --no-loadscope-reorder."""
    names = [item.path.stem.removeprefix("test_") for item in items]
    first = {name: place for place, name in enumerate(LONG)}
    items[:] = [items[k] for k in sorted(range(len(items)), key=lambda k: first.get(names[k], len(LONG)))]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, empty at first."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def trained(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """One step in an empty folder: it makes what it lacks. Workers share it; each goes on in a copy."""
    own = tmp_path_factory.getbasetemp()
    place = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "trained"
    with FileLock(f"{place}.lock"):
        if not (place / "ran.json").exists():
            ran = papermill("06_train", place / "runs", stage=2)
            (place / "ran.json").write_text(json.dumps(asdict(ran)), encoding="utf-8")
    shutil.copytree(place / "runs", runs, dirs_exist_ok=True)
    return Ran(**json.loads((place / "ran.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def finished(runs: Path, trained: Ran) -> Ran:
    """The whole pipeline, from where training left it."""
    return pipeline(runs, "tiny")
