"""The benchmark page: made of committed records alone, and the README says what they say."""

import re

import pandas as pd
import pytest

from llava_ta.benchmark import ablation_table, beside_published, comparison_table, main_table
from llava_ta.core import load_profile
from llava_ta.evaluate import SELECTOR, SYSTEMS
from llava_ta.study import COLUMNS, Drawn, compared, drawn_score, read_records, rows_of, study_rows
from records import assert_no_text
from repository import ROOT

PLACE = ROOT / "study"


@pytest.fixture(scope="module")
def committed() -> tuple[dict[str, dict], pd.DataFrame]:
    """The records that come with the project."""
    return read_records(PLACE)


def test_records_are_of_the_matrix(committed: tuple[dict[str, dict], pd.DataFrame]):
    records, numbers = committed
    rows = study_rows(load_profile("study"))
    assert set(records) == set(rows), "the matrix is full"
    for name, record in records.items():
        trained = sum(seconds for folder, seconds in record["seconds"].items()
                      if folder.startswith(("train/", "generate/")))
        assert trained < 25 * 60, f"{name} took {trained / 60:.0f} min"
        assert re.fullmatch("[0-9a-f]{40}", record["commit"]), name
    assert numbers.study.nunique() == 292, "Open-i's val split"


def test_records_hold_no_text(committed: tuple[dict[str, dict], pd.DataFrame]):
    _, numbers = committed
    assert_no_text(numbers)


def test_every_table_is_made_of_records(committed: tuple[dict[str, dict], pd.DataFrame]):
    _, numbers = committed
    table = main_table(numbers, draws=20)
    assert table.index.is_unique and {"narrative", "one report for all"} <= set(table.index)
    assert (table.loc["narrative", ["macro-F1 frequent", "macro-F1 frequent, black"]] != "").all()
    gaps = comparison_table(numbers, ["macro-F1 frequent"], draws=20)
    assert (gaps.low <= gaps.difference).all() and (gaps.difference <= gaps.high).all()
    assert len(beside_published(numbers, 20)) >= 4
    ablation = ablation_table(numbers, draws=20)
    assert list(ablation["MLP only, published"]) == [19.8, 1.6, 31.1]


def test_the_first_page_says_what_the_records_say(committed: tuple[dict[str, dict], pd.DataFrame]):
    _, numbers = committed
    page = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())

    def score(column: str, evaluation: str, system: str, **who: object) -> Drawn:
        return drawn_score(rows_of(numbers, system=system, evaluation=evaluation, **who), *COLUMNS[column], 1000)

    graphs = [100 * score("finding-graph F1", "report-original", f"{SYSTEMS[mode]}, MLP only", film="real",
                          template=template).value for template in ("v1", "plain") for mode in ("topic", "anatomy")]
    assert f"is {graphs[0]:.1f} (T) and {graphs[1]:.1f} (TA) with the question in the prompt" in page
    assert f"{graphs[2]:.1f} (T) and {graphs[3]:.1f} (TA) without it" in page
    present = score("macro-F1-14", "report-original", "always present")
    assert f"a macro-F1-14 of {100 * present.value:.1f} and sees no film" in page
    anatomy, narrative, fixed = (score("macro-F1 frequent", "report-predicted", system, film="real", stage=stage)
                                 for system, stage in ((SYSTEMS["anatomy"], 2), ("narrative", 2), (SELECTOR, 0)))
    assert f"TA has {compared(anatomy, narrative)['ratio']:.2f} times the macro-F1" in page
    assert f"sentences: {anatomy.value:.3f} against {fixed.value:.3f}".replace("0.", ".") in page
    words = [f"{score(column, 'report-predicted', system, film=film, stage=stage).value:.3f}".lstrip("0")
             for system, film, stage in (("one report for all", "none", 0), ("narrative", "real", 2))
             for column in ("BLEU-4 r2gen", "ROUGE-L r2gen")]
    assert "BLEU-4 {} and ROUGE-L {}, the narrative model {} and {}".format(*words) in page


def test_a_seed_is_scored_once(committed: tuple[dict[str, dict], pd.DataFrame]):
    _, numbers = committed
    keys = ["system", "template", "stage", "film", "evaluation", "seed", "study", "topic"]
    assert not rows_of(numbers, evaluation="report-predicted")[keys].duplicated().any()
