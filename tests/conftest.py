"""A run of the tiny profile that several files of tests look at; each worker makes its own."""

from pathlib import Path

import pytest

from pipeline import Ran, papermill, pipeline


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs, empty at first."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def trained(runs: Path) -> Ran:
    """One step in an empty folder: it makes what it lacks."""
    return papermill("06_train", runs, stage=2)


@pytest.fixture(scope="session")
def finished(runs: Path, trained: Ran) -> Ran:
    """The whole pipeline, from where training left it."""
    return pipeline(runs, "tiny")
