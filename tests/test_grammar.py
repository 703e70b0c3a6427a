"""The phantom's reports, read back by the decomposer and held against what was drawn."""

import re
from collections import Counter

import numpy as np
import pytest
import yaml

from llava_ta.grammar import WORDED, Statement, report_sentences, sample_study, write_report
from llava_ta.phantom import EXCLUDES, KINDS, RECORDS, Finding, findings_from_mesh
from llava_ta.rules import RuleDecomposer
from llava_ta.sources import openi_reports
from repository import LIB

GRAMMAR = yaml.safe_load((LIB / "grammar.yaml").read_text(encoding="utf-8"))


def some(
    kind: str,  # of a finding
    rng: np.random.Generator,
) -> Finding:  # with a site, a side and a severity that the kind can have
    """Draw one finding of a kind."""
    record = RECORDS[kind]
    site, side = (str(rng.choice(record.get(name, [""]))) for name in ("sites", "sides"))
    grade = str(rng.choice(["", "mild", "moderate", "severe"])) if record.get("graded") else ""
    return Finding(kind, site, "left" if site == "lingula" else side, grade)


def misread(
    stated: list[Statement],  # sentences with what they were meant to say
) -> list[str]:  # those that the decomposer understands otherwise
    """Hold the rules of the decomposer against the grammar."""
    reader, found = RuleDecomposer(), []
    for statement in stated:
        read = {(said.topic, said.polarity) for said in reader.decompose(statement.text)}
        if read != set(statement.pairs):
            found.append(f"{statement.text} meant {sorted(statement.pairs)} read {sorted(read)}")
    return found


def test_every_kind_has_wordings():
    assert set(KINDS) == set(WORDED)
    assert not [k for k, r in GRAMMAR["kinds"].items() if len([*r["says"], *r.get("noun", ()), *r.get("mass", ())]) < 3]
    rng = np.random.default_rng(0)
    poor = {}
    for kind in WORDED:
        finding = some(kind, rng)
        said = {s.text for _ in range(150) for s in report_sentences([finding], rng, 0) if s.pairs[0][1] == "present"}
        poor |= {kind: len(said)} if len(said) < 12 else {}
    assert not poor


def test_the_decomposer_reads_what_was_meant():
    rng = np.random.default_rng(1)
    stated = []
    for _ in range(2000):  # any kinds, the new ones too
        kinds = rng.choice(WORDED, rng.integers(0, 4), replace=False)
        stated += report_sentences([some(kind, rng) for kind in kinds], rng, 0)
    found = misread(stated)
    assert len(stated) > 8000 and len(found) <= 0.01 * len(stated), "\n".join(found)


def test_codes_of_real_reports_can_be_worded():
    rng = np.random.default_rng(2)
    shown = [findings_from_mesh(codes)[0] for codes in openi_reports()["mesh"][::4]]
    stated = [statement for findings in shown for statement in report_sentences(findings, rng)]
    assert not [s.text for s in stated if not re.fullmatch(r"[A-Z][A-Za-z ,'-]+[a-zA-Z]\.", s.text) or "  " in s.text]
    found = misread(stated)
    assert len(found) <= 0.01 * len(stated), "\n".join(found)


def test_reports_are_true():
    rng = np.random.default_rng(3)
    for _ in range(1000):
        findings = [some(kind, rng) for kind in rng.choice(WORDED, rng.integers(0, 4), replace=False)]
        stated = report_sentences(findings, rng, 0.5)
        pairs = [pair for statement in stated for pair in statement.pairs]
        topics = {KINDS[finding.kind] for finding in findings}
        assert {topic for topic, polarity in pairs if polarity == "present"} == topics
        denied = Counter(topic for topic, polarity in pairs if polarity == "absent")
        blocked = topics | {t for f in findings for t in GRAMMAR["kinds"][f.kind].get("blocks", ())}
        assert not blocked & set(denied) and set(denied.values()) <= {1}
        text = " ".join(statement.text for statement in stated)
        for side in ("right", "left"):
            drawn = any(finding.side == side or finding.site == "lingula" for finding in findings)
            assert drawn or side not in text.lower(), text
        for word in ("mild", "moderate", "severe"):
            drawn = any(finding.severity == word for finding in findings)
            assert drawn or not re.search(rf"\b{word}(ly)?\b", text, re.I), text


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_nothing_exclusive_in_one_study(correlation: float):
    for k in range(1000):
        kinds = {finding.kind for finding in sample_study(np.random.default_rng(k), correlation, 0.95)[0]}
        assert not [group for group in EXCLUDES if len(kinds & set(group)) > 1]


def test_the_same_generator_gives_the_same_study():
    again = [[sample_study(np.random.default_rng([5, k]), c) for k in range(50)] for c in (0.5, 0.5)]
    assert again[0] == again[1] and len({text for _, text in again[0]}) > 25


@pytest.mark.parametrize("correlation", [-0.01, 1.01, float("nan")])
def test_a_correlation_outside_its_range_is_refused(correlation: float):
    for call in (lambda rng: write_report([], rng, correlation), lambda rng: sample_study(rng, correlation)):
        with pytest.raises(ValueError, match="correlation .* is not between 0"):
            call(np.random.default_rng(0))
