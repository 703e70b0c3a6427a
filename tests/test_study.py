"""The study: rows are made once, and every table comes from their records."""

import json
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from llava_ta.core import Run, Settings, check_params
from llava_ta.study import COLUMNS, read_records, rows_of, stale_rows, study_rows, system_table
from pipeline import Ran, chapter, papermill
from records import assert_no_text
from repository import ROOT

CHANGED = "train.modes=[topic], generate.films=[real, black], select.lm_studies=0, evaluate.bootstrap=50"


@pytest.fixture(scope="module")
def place(runs: Path, trained: Ran) -> Path:
    """The records of a matrix of one system, which shares films and features with the run of other tests."""
    ran = papermill("11b_study", runs, run="tiny", overrides=CHANGED, row="all")
    assert ran.status == 0, ran.said[-2000:]
    return runs / "tiny" / "records"


@pytest.fixture
def settings(runs: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """The settings of the matrix."""
    monkeypatch.setenv("LLAVA_TA_RUNS", str(runs))
    return check_params("tiny", "tiny", CHANGED)


def test_rows_are_made_once(place: Path, settings: Settings, capsys: pytest.CaptureFixture):
    records, numbers = read_records(place)
    assert set(records) == {"topic-0", "topic-plain", "blind"}
    before = {path.name: path.stat().st_mtime_ns for path in place.iterdir()}
    chapter("11b_study", run="tiny", overrides=CHANGED, row="all")
    assert "making" not in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in place.iterdir()} == before


def test_records_hold_no_text(place: Path):
    _, numbers = read_records(place)
    assert_no_text(numbers)


def test_tables_come_from_records_alone(place: Path, settings: Settings):
    """The step `evaluate`, which reads films and predictions, finds the same scores."""
    scores = pd.read_parquet(Run(settings).make("evaluate") / "scores.parquet")
    _, numbers = read_records(place)
    table = system_table(rows_of(numbers, template="v1", stage=2), "report-predicted", resamples=50)
    assert len(table) == 2, "real and black"
    for row in table.to_dict("records"):
        one = scores.query("system == @row['system'] and film == @row['film'] and evaluation == 'report-predicted'")
        for name in ("micro-F1-14", "macro-F1-14", "BLEU-4 r2gen", "ROUGE-L r2gen"):
            metric, convention = COLUMNS[name]
            expected = one.query("metric == @metric and convention == @convention").iloc[0]
            for part, found in (("value", row[name]), ("low", row[f"{name} low"]), ("high", row[f"{name} high"])):
                assert found == pytest.approx(expected[part], abs=1e-9), (name, part)


def test_what_has_changed_is_named(place: Path, settings: Settings):
    records, _ = read_records(place)
    assert stale_rows(settings, records) == {}
    other = check_params("tiny", "tiny", CHANGED + ", train.stage1.lr=0.004")
    stale = stale_rows(other, records)
    assert set(stale) == {"topic-0", "topic-plain"}, "the blind row learns nothing"
    assert any("train.stage1.lr was 0.005 and is 0.004" in what for what in stale["topic-0"])
    fewer = check_params("tiny", "tiny", CHANGED.replace("[topic]", "[anatomy]"))
    assert stale_rows(fewer, records)["topic-0"] == ["not in the matrix any more"]


def test_damaged_records_are_refused(place: Path, tmp_path: Path):
    for path in place.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    table = tmp_path / "topic-0.parquet"
    table.write_bytes(table.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"topic-0\.parquet is not what topic-0\.json was written with"):
        read_records(tmp_path)
    table.write_bytes((place / "topic-0.parquet").read_bytes())
    record = json.loads((tmp_path / "blind.json").read_text())
    (tmp_path / "blind.json").write_text(json.dumps({**record, "schema": 99}))
    with pytest.raises(ValueError, match="schema 99, and this version reads 1"):
        read_records(tmp_path)
    with pytest.raises(FileNotFoundError, match="make study"):
        read_records(tmp_path / "nothing")


def test_unknown_rows_and_absent_films_are_refused():
    with pytest.raises(ValueError, match="row='topic-7': allowed are narrative-0"):
        chapter("11b_study", row="topic-7")
    done = subprocess.run(["make", "-n", "study", "OPENI_DIR=nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert "11b_study" in done.stdout and "-p profile study" in done.stdout, done.stdout + done.stderr


def test_the_matrix():
    rows = study_rows(check_params("study").profile)
    assert [name for name in rows if name.endswith("plain")] == ["narrative-plain", "topic-plain", "anatomy-plain"]
    assert len(rows) == 13
