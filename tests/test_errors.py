"""The error browser: its rows are what the scores count, whatever is compared with what."""

import random
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from llava_ta.core import load_profile, ref
from llava_ta.errors import (
    ERROR_COLUMNS,
    KINDS,
    OTHER,
    ErrorBrowser,
    count_errors,
    error_page,
    error_table,
    film_svg,
    filter_errors,
    run_errors,
    systems_of,
)
from llava_ta.evaluate import paired_texts
from llava_ta.grammar import sample_study
from llava_ta.metrics import chexpert_f1, label_counts, label_matrix
from llava_ta.ontology import ASKED, CHEXPERT_14, REGIONS, TOPICS
from llava_ta.rules import RuleDecomposer, RuleLabeler

REPORTS = 40
EVALUATIONS = ("report-all", "report-original", "report-oracle", "topic")


class Together(RuleLabeler):
    """A labeler that reads many texts at once, and none twice."""

    name = "together"

    def __init__(self):
        self.seen: list[str] = []

    def label_all(self, texts: list[str]) -> list[dict[str, str]]:
        """Read several."""
        self.seen += texts
        return [self.label(text) for text in texts]


@pytest.fixture(scope="module")
def studies() -> pd.DataFrame:
    """Phantom reports; the films' rows do not start at 0."""
    rng = np.random.default_rng(5)
    rows = [(f"s{n}", f"p{n // 2}", "val", 100 + n, sample_study(rng)[1]) for n in range(REPORTS)]
    return pd.DataFrame(rows, columns=["study", "patient", "split", "row", "findings"])


@pytest.fixture(scope="module")
def true(studies: pd.DataFrame) -> pd.DataFrame:
    """Their topic sentences."""
    rows = [(row.study, one.topic, one.sentence) for row in studies.itertuples()
            for one in RuleDecomposer().decompose(row.findings) if one.topic in ASKED]
    return pd.DataFrame(rows, columns=["study", "topic", "sentence"])


@pytest.fixture(scope="module")
def answers(studies: pd.DataFrame, true: pd.DataFrame) -> pd.DataFrame:
    """What a system says that often tells the truth, often that of another patient, and sometimes nothing readable."""
    rng, told = random.Random(3), {(row.study, row.topic): row.sentence for row in true.itertuples()}
    usual = true.groupby("topic").sentence.agg(list).to_dict()
    rows = []
    for study in studies.study:
        for topic in ASKED:
            others = [*usual.get(topic, ["Unchanged."]), "The the of.", "", "Possible edema."]
            said = told.get((study, topic), "Unchanged.") if rng.random() < 0.5 else rng.choice(others)
            rows.append((study, topic, said, rng.random()))
    return pd.DataFrame(rows, columns=["study", "topic", "sentence", "score"])


@pytest.fixture(scope="module")
def narrative(studies: pd.DataFrame) -> pd.DataFrame:
    """A system that gives every patient the report of the next."""
    said = [*studies.findings[1:], studies.findings[0]]
    return pd.DataFrame({"study": studies.study, "topic": "", "sentence": said, "score": 0.5})


@pytest.fixture(scope="module")
def table(answers: pd.DataFrame, narrative: pd.DataFrame, studies: pd.DataFrame, true: pd.DataFrame) -> pd.DataFrame:
    """The errors of both systems."""
    systems = {"topics": answers, "narrative": narrative}
    return pd.concat([error_table(said, studies, true, system=name) for name, said in systems.items()],
                     ignore_index=True)


# ---- the rows are what the scores count


@pytest.mark.parametrize("evaluation", EVALUATIONS)
@pytest.mark.parametrize("system", ["answers", "narrative"])
def test_counts_are_those_of_the_score(
    request: pytest.FixtureRequest, studies: pd.DataFrame, true: pd.DataFrame, system: str, evaluation: str,
):
    said = request.getfixturevalue(system)
    pairs = paired_texts(evaluation, said, studies, true)
    found = error_table(said, studies, true, evaluation)
    if pairs.empty:
        assert found.empty and list(found) == list(ERROR_COLUMNS)
        return
    sides = [pairs.prediction.tolist(), pairs.reference.tolist()]
    hits, alarms, misses = label_counts(*map(label_matrix, sides)).sum(axis=0)
    counted = found.groupby(["label", "kind"]).size()
    for place, label in enumerate(CHEXPERT_14):
        expected = {"missed": misses[place], "false alarm": alarms[place], "hit": hits[place]}
        assert {kind: counted.get((label, kind), 0) for kind in KINDS} == expected, label
    scored = chexpert_f1(*sides)["labels"]
    for label, numbers in scored.items():
        own = found[found.label == label].kind.value_counts().reindex(KINDS, fill_value=0)
        f1 = 2 * own["hit"] / max(2 * own["hit"] + own["missed"] + own["false alarm"], 1)
        assert f1 == pytest.approx(numbers["f1"]) and own["hit"] + own["missed"] == numbers["support"]
    assert not found.duplicated(["study", "topic", "label"]).any()
    assert found.row.tolist() == [100 + int(study[1:]) for study in found.study]


def test_sentences_say_what_the_row_says(table: pd.DataFrame):
    """Where a report states, doubts or denies a label, the sentence that is shown does so too."""
    labeler, read = RuleLabeler(), 0
    for row in table[table.label != "No Finding"].itertuples():
        for words, status, whole in ((row.truth, row.true_status, row.reference),
                                     (row.said, row.said_status, row.prediction)):
            assert labeler.label(whole)[row.label] == status
            if status != "unmentioned":
                assert labeler.label(words)[row.label] == status, (words, row.label)
                read += 1
            elif row.system == "narrative":
                assert row.said == "" or words != row.said
    assert read > 100


def test_silence_shows_the_answer_to_the_topic(answers: pd.DataFrame, table: pd.DataFrame):
    said = answers.set_index(["study", "topic"]).sentence
    silent = table[(table.system == "topics") & (table.said_status == "unmentioned") & (table.label != "No Finding")]
    assert len(silent) > 5 and [said[row.study, row.topic] for row in silent.itertuples()] == silent.said.tolist()


def test_scores_are_those_of_the_sentence(answers: pd.DataFrame, table: pd.DataFrame):
    scores = answers.groupby(["study", "sentence"]).score.agg(list)
    own = table[(table.system == "topics") & (table.said != "") & (table.label != "No Finding")]
    alone = own[[(row.study, row.said) in scores.index for row in own.itertuples()]]
    assert len(alone) > 50 and all(row.score in scores[row.study, row.said] for row in alone.itertuples())
    assert set(table[table.system == "narrative"].score) == {0.5}


def test_topics_without_a_label_are_seen(answers: pd.DataFrame, studies: pd.DataFrame, true: pd.DataFrame):
    found = error_table(answers, studies, true, "topic")
    found = found[found.label == OTHER]
    assert set(found.kind) == set(KINDS)
    assert all(TOPICS[topic].chexpert is None for topic in found.topic)
    decomposed = [{one.topic: one.polarity for one in RuleDecomposer().decompose(text)} for text in found.truth]
    stated = [said.get(topic) == "present" for said, topic in zip(decomposed, found.topic)]
    assert stated == (found.kind != "false alarm").tolist()


def test_another_labeler_reads_together_and_once(narrative: pd.DataFrame, studies: pd.DataFrame, true: pd.DataFrame):
    labeler = Together()
    found = error_table(narrative, studies, true, labeler=labeler)
    pd.testing.assert_frame_equal(found, error_table(narrative, studies, true))
    assert len(labeler.seen) == len(set(labeler.seen)) > REPORTS


# ---- filters and counts


def test_filters_part_the_table(table: pd.DataFrame):
    for name, values in {"system": ("topics", "narrative"), "label": CHEXPERT_14, "kind": KINDS}.items():
        parts = [filter_errors(table, **{name: value}) for value in values]
        assert sum(map(len, parts)) == len(table) and all((part[name] == value).all()
                                                          for part, value in zip(parts, values))
    assert len(filter_errors(table, kind="wrong")) == (table.kind != "hit").sum()
    pd.testing.assert_frame_equal(filter_errors(table), table)


def test_filters_together(table: pd.DataFrame):
    found = filter_errors(table, system="topics", kind="missed", contains="LUNG", order="least confident")
    assert len(found) and found.score.is_monotonic_increasing
    assert (found.reference + found.prediction).str.contains("lung", case=False).all()
    assert filter_errors(table, contains="s7 | ").study.unique().tolist() == ["s7"]
    assert filter_errors(table, contains="(*").empty
    assert filter_errors(table, order="most confident").score.is_monotonic_decreasing


@pytest.mark.parametrize(("name", "value", "allowed"), [
    ("system", "T", "narrative, topics"), ("label", "edema", "Edema"),
    ("kind", "miss", "missed, false alarm, hit, wrong"),
    ("topic", "edema", "disease-edema"), ("order", "first", "least confident, most confident")])
def test_unknown_names_are_refused(table: pd.DataFrame, name: str, value: str, allowed: str):
    with pytest.raises(ValueError, match=f"^{name} '{value}': allowed are .*{re.escape(allowed)}"):
        filter_errors(table, **{name: value})


def test_count(table: pd.DataFrame):
    counts = count_errors(table)
    assert counts[["hit", "missed", "false alarm"]].to_numpy().sum() == len(table)
    assert (counts[["denied", "doubted", "silent"]].sum(axis=1) == counts.missed).all()
    for _, rows in counts.groupby(level="system", sort=False):
        assert (rows.missed + rows["false alarm"]).is_monotonic_decreasing


# ---- pages


class Tags(HTMLParser):
    """Collects the tags of a page, and refuses those that do not nest."""

    def __init__(self, page: str):
        super().__init__()
        self.opened, self.seen = [], []
        self.feed(page)
        assert not self.opened, self.opened

    def handle_starttag(self, tag: str, attrs: list) -> None:
        """Note a tag."""
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "input"):
            self.opened.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        """Note a tag without content."""
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Close the tag that was opened last."""
        assert self.opened.pop() == tag


@pytest.fixture(scope="module")
def pictures() -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Noise for films, and squares for masks: all but the first are empty."""
    rng, masks = np.random.default_rng(0), np.zeros((len(REGIONS), 16, 16), bool)
    masks[0, 4:8, 4:8] = True
    return ({100 + n: rng.random((32, 24), dtype=np.float32) for n in range(REPORTS)},
            {100 + n: masks for n in range(REPORTS)})


def test_page_is_whole_and_opens_alone(table: pd.DataFrame, pictures: tuple[dict, dict]):
    hostile = table.assign(said="<b>x</b> & <script>", study='"><img>', prediction="</article>")
    for rows in (table, hostile):
        tags = Tags(error_page(rows, *pictures, first=5)).seen
        assert sum(tag == "article" for tag, _ in tags) == 5
        assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in tags}
        assert all(value.startswith("data:image/png") for _, found in tags for name, value in found.items()
                   if name in ("href", "src"))
    assert error_page(table[:3], *pictures).count("<article") == 3


def test_masks_lie_on_the_film(pictures: tuple[dict, dict]):
    films, masks = pictures
    tags = Tags(film_svg(films[100], masks[100], size=64)).seen
    (path,) = [found for tag, found in tags if tag == "path"]
    numbers = np.array(re.findall(r"-?[\d.]+", path["d"]), float).reshape(-1, 2)
    assert path["class"] == REGIONS[0]  # the film is 24 pixels wide and 32 high
    assert np.allclose([numbers.min(axis=0), numbers.max(axis=0)], [[5.5, 7.5], [11.5, 15.5]], atol=1)


def test_browser_refuses_nothing_it_offers(table: pd.DataFrame, pictures: tuple[dict, dict]):
    browser = ErrorBrowser(table, *pictures)
    for name, field in browser.fields.items():
        for _, value in getattr(field, "options", ()):
            field.value = value
            assert len(browser.chosen) == len(filter_errors(table, **{name: value})) > 0
            assert len(browser.page.outputs) == 1
        field.value = ""
    assert f"1 of {len(table)}" in browser.said.value
    for _ in range(3):
        browser.on.click()
    browser.back.click()
    assert browser.place.value == 3 and f"3 of {len(table)}" in browser.said.value
    browser.place.value = 10**6
    assert browser.place.value == len(table)


# ---- runs


@pytest.fixture
def run(tmp_path: Path, answers: pd.DataFrame, narrative: pd.DataFrame, studies: pd.DataFrame, true: pd.DataFrame):
    """What a run has to offer: tables of two systems, one of them with a blind film."""
    profile = load_profile("tiny", "train.modes=[narrative, topic], generate.films=[real, black]")

    def path(step: str, **variant: object) -> Path:
        return tmp_path / ref(step, **variant).folder

    for mode, said in {"narrative": narrative, "topic": answers}.items():
        for film in ("real", "black"):
            folder = path("generate", mode=mode, stage=2, seed=0, film=film)
            folder.mkdir(parents=True)
            said.assign(score=said.score * (film == "real")).to_parquet(folder / "predictions.parquet")
    for step, name, rows in (("data", "studies", pd.concat([studies, studies.assign(study="t", split="train")])),
                             ("mapping", "samples", pd.concat([true.assign(origin="report"),
                                                               true.assign(origin="unmentioned")]))):
        path(step).mkdir()
        rows.to_parquet(path(step) / f"{name}.parquet")
    return SimpleNamespace(profile=profile, path=path)


def test_run(run: SimpleNamespace, table: pd.DataFrame):
    assert list(systems_of(run)) == ["narrative", "narrative, black", "topic (T)", "topic (T), black"]
    found = run_errors(run, evaluation="report-all")
    assert set(found.system) == {"narrative", "topic (T)"} and len(found) == len(table)
    assert set(run_errors(run, "topic (T), black", "report-all").score) == {0.0}
    assert set(run_errors(run, evaluation="topic").system) == {"topic (T)"}
    with pytest.raises(ValueError, match=r"^system 'topic': allowed are narrative, narrative, black, topic \(T\)"):
        run_errors(run, "topic")
    with pytest.raises(ValueError, match="^evaluation 'all': allowed are report-predicted"):
        run_errors(run, evaluation="all")
