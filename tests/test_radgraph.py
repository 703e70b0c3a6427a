"""RadGraph F1 through its own environment: really installed, with a tiny network of the published layout."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from llava_ta.metrics import not_computed
from llava_ta.radgraph import (
    LEVELS,
    RELEASES,
    environment,
    find_weights,
    main,
    radgraph_each,
    radgraph_parts,
    status,
    write_job,
)

TINY = Path(__file__).resolve().parent / "tiny_radgraph.py"
DATASETS = {"llava-rad": "None", "radeval": "radgraph-xl"}  # how each release names the labels of its network
SAID = ["no effusion . the heart is normal .", "lungs are clear", "", "small left pleural effusion", "heart"]
TRUE = ["the lungs are clear . no effusion .", "lungs are clear", "the heart", "the heart is enlarged", " "]
slow = pytest.mark.slow


@pytest.fixture(scope="module", params=list(RELEASES))
def installed(request: pytest.FixtureRequest):  # convention, home
    """An environment made by the command, and a tiny network in the place of the weights. Both are 6 GB with CUDA."""
    convention = request.param
    with tempfile.TemporaryDirectory() as home:
        main(["install", "--home", home, "--convention", convention])
        weights = Path(home) / "weights"
        run(environment(convention, home), "make", weights, RELEASES[convention].model, DATASETS[convention])
        yield convention, Path(home)


def run(python: Path, *arguments: object, said: str = "") -> str:
    """Run the tiny network's program inside an environment."""
    done = subprocess.run([python, "-I", TINY, *map(str, arguments)], input=said, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return done.stdout


def items(graph: dict, level: str) -> set[tuple]:
    """What a level compares: entities, entities with a flag for a relation, or the relations themselves."""
    found = set()
    for entity in graph["entities"].values():
        word, label, relations = entity["tokens"], entity["label"], entity["relations"]
        if level == "RG_E" or not relations:
            found.add((word, label))
        elif level == "RG_ER":
            found.add((word, label, True))
        else:
            found |= {(word, label, kind, graph["entities"][other]["tokens"]) for kind, other in relations}
    return found


@slow
def test_a_score_comes_back_and_is_the_one_of_the_graphs(installed):
    convention, home = installed
    each = radgraph_each(SAID, TRUE, convention, home)
    assert each.shape == (5, 3) and (each[1] == 1).all() and (each[[2, 4]] == 0).all()
    model, bert = find_weights(convention, home)
    with tempfile.TemporaryDirectory() as folder:  # the package's own graphs, counted by hand
        write_job(Path(folder), RELEASES[convention], (model, bert), ([], []), -1)
        texts = json.dumps([SAID[row] for row in (0, 1, 3)] + [TRUE[row] for row in (0, 1, 3)])
        python = environment(convention, home)
        graphs = json.loads(run(python, "read", folder, model.name, said=texts).splitlines()[-1])
    for row, said, true in zip((0, 1, 3), graphs[:3], graphs[3:]):
        for column, level in enumerate(LEVELS):
            left, right = items(said, level), items(true, level)
            assert left and right
            assert np.isclose(each[row, column], 2 * len(left & right) / (len(left) + len(right)))
    assert 0 < each[0].min() < 1


@slow
def test_parts_carry_release_and_level_and_stay_the_same(installed):
    convention, home = installed
    parts = radgraph_parts(SAID, TRUE, convention, home)
    assert [part.metric.split(" (")[0] for part in parts] == [f"RadGraph F1 {level}" for level in LEVELS]
    assert all(RELEASES[convention].version in part.metric and part.convention == convention for part in parts)
    again = radgraph_parts(SAID[::-1], TRUE[::-1], convention, home)
    assert [part.value() for part in parts] == [part.value() for part in again]
    assert "RadGraph F1" not in not_computed(part.metric for part in parts)


@slow
def test_the_published_archive_is_unpacked(installed):
    convention, home = installed
    release, weights = RELEASES[convention], home / "weights"
    before = radgraph_each(SAID, TRUE, convention, home)
    packed = shutil.make_archive(str(weights / "packed"), "gztar", weights / release.model)
    Path(packed).rename(weights / release.archive)
    shutil.rmtree(weights / release.model)
    assert np.array_equal(radgraph_each(SAID, TRUE, convention, home), before)


@slow
def test_a_second_install_leaves_it_alone_and_status_says_ready(installed, capsys):
    convention, home = installed
    marker = home / RELEASES[convention].version / "installed.json"
    before = marker.stat().st_mtime_ns
    main(["install", "--home", str(home), "--convention", convention])
    assert marker.stat().st_mtime_ns == before and "is ready" in capsys.readouterr().out


@pytest.mark.parametrize("convention", RELEASES)
def test_without_anything_the_messages_say_what_to_do(convention, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAVA_TA_RADGRAPH", str(tmp_path))
    release = RELEASES[convention]
    with pytest.raises(FileNotFoundError, match=f"llava_ta.radgraph install --convention {convention}"):
        radgraph_each(["a"], ["b"], convention)
    with pytest.raises(FileNotFoundError, match=f"put {release.archive} of StanfordAIMI/RRG_scorers"):
        find_weights(convention)
    assert "is not installed" in status(convention) and "RadGraph F1" in not_computed()


def test_python_too_new_is_said_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 12, 0))
    with pytest.raises(RuntimeError, match="radgraph 0.0.9 needs Python 3.11 or older"):
        main(["install", "--home", str(tmp_path), "--convention", "llava-rad"])
    assert not list(tmp_path.iterdir())


def test_rows_must_match(tmp_path):
    with pytest.raises(ValueError, match="2 predictions, but 1 references"):
        radgraph_each(["a", "b"], ["a"], "radeval", tmp_path)
    with pytest.raises(ValueError, match="'r2gen'; RadGraph F1 has llava-rad and radeval"):
        radgraph_each(["a"], ["a"], "r2gen", tmp_path)
