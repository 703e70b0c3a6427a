"""How the rules read real reports: the texts come with torchxrayvision, what people read in them with the manifests."""

from pathlib import Path

import pandas as pd
import pytest

from llava_ta.agreement import pair_scores, read_pairs
from llava_ta.ontology import TOPICS
from llava_ta.rules import RuleDecomposer, RuleLabeler, read_report
from llava_ta.sources import openi_reports
from llava_ta.studies import says_nothing

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:  # study -> what is decomposed
    """The findings of Open-i, or the impression where there are none."""
    reports = openi_reports()
    findings, impression = reports.findings.fillna(""), reports.impression.fillna("")
    return dict(zip(reports.study, findings.mask(findings.map(says_nothing), impression)))


@pytest.mark.parametrize("name", ["A", "B"])
def test_rules_agree_with_people(texts, name):
    people = read_pairs()[name]
    found = {study: [(s.topic, s.polarity) for s in RuleDecomposer().decompose(texts[study])] for study in people}
    assert pair_scores(people, found).f1["all"] >= 0.97


def test_annotated_studies_are_in_the_manifest_outside_its_test_split():
    manifest = pd.read_csv(ROOT / "data_manifests" / "openi.csv").set_index("study")
    for people in read_pairs().values():
        assert set(manifest.loc[list(people)].split) <= {"train", "val"}


def test_every_clause_is_kept_or_dropped_for_a_reason(texts):
    clauses = [clause for text in texts.values() for clause in read_report(text)]
    assert all(clause.outcome.removeprefix("dropped: ") for clause in clauses)
    assert sum(clause.outcome == "special-other" for clause in clauses) < 0.03 * len(clauses)
    assert all(bool(clause.sentence) != clause.outcome.startswith("dropped") for clause in clauses)


def test_sentences_of_all_reports_keep_no_mark_and_no_topic_twice(texts):
    for text in texts.values():
        found = RuleDecomposer().decompose(text)
        assert len({one.topic for one in found}) == len(found)
        assert not any("xxxx" in one.sentence.lower() for one in found)
        assert all(0 <= start < end <= len(text) for one in found for start, end in one.spans)


def test_labels_of_a_topic_sentence_agree_with_its_polarity(texts):
    """The decomposer writes what the labeler reads: a sentence of a present disease is labelled present."""
    wrong = right = 0
    for study in read_pairs()["B"]:
        for one in RuleDecomposer().decompose(texts[study]):
            if label := TOPICS[one.topic].chexpert:
                agrees = RuleLabeler().label(one.sentence)[label] == one.polarity
                right, wrong = right + agrees, wrong + (not agrees)
    assert right > 100 and wrong <= 0.01 * right
