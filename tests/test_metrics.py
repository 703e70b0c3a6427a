"""Scores against the libraries that define them, on real sentences: the texts come with torchxrayvision."""

import time

import numpy as np
import pandas as pd
import pytest
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import f1_score, precision_recall_fscore_support

from llava_ta.finding_graph import finding_graph
from llava_ta.metrics import (
    CHEXPERT_5,
    CONVENTIONS,
    GRAPH_NAME,
    R2GenReferences,
    bleu,
    bleu_counts,
    bleu_from_counts,
    chexpert_f1,
    label_matrix,
    not_computed,
    r2gen_references,
    r2gen_text,
    rouge_l_each,
    score,
    score_parts,
    score_table,
)
from llava_ta.ontology import CHEXPERT_14
from llava_ta.rules import RuleLabeler, split_sentences
from llava_ta.sources import openi_reports
from llava_ta.studies import says_nothing

PAIRS = 1_000
ONE, OTHER = ["Small left pleural effusion.", "The lungs are clear."], ["Rib fracture.", "Cardiomegaly with edema."]


@pytest.fixture(scope="module")
def reports() -> list[str]:  # findings sections
    """The findings of Open-i."""
    findings = openi_reports().findings.fillna("")
    return findings[~findings.map(says_nothing)].tolist()


@pytest.fixture(scope="module")
def pairs(reports: list[str]) -> tuple[list[str], list[str]]:  # predictions, references
    """Sentences beside their neighbours in the alphabet, so that many pairs share words, shuffled."""
    sentences = sorted({text[start:end] + "." for text in reports for start, end in split_sentences(text)})
    chosen = np.random.default_rng(0).choice(len(sentences) - 1, PAIRS, replace=False)
    return [sentences[i] for i in chosen], [sentences[i + 1] for i in chosen]


def close(ours: object, theirs: object) -> bool:
    """Equal to 1e-9."""
    return np.allclose(ours, theirs, rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def coco():  # functions of two lists of texts: BLEU-1 to BLEU-4, ROUGE-L of each pair
    """The scorers of pycocoevalcap, which need no Java."""
    module = pytest.importorskip("pycocoevalcap.bleu.bleu", reason="pip install pycocoevalcap")
    rouge = pytest.importorskip("pycocoevalcap.rouge.rouge").Rouge()

    def by_row(texts: list[str]) -> dict[int, list[str]]:
        return {row: [text] for row, text in enumerate(texts)}

    def bleus(said: list[str], true: list[str]) -> list[float]:
        return module.Bleu(4).compute_score(by_row(true), by_row(said), verbose=0)[0]

    return bleus, lambda said, true: rouge.compute_score(by_row(true), by_row(said))[1]


# ---- the libraries


def test_llava_rad_equals_sacrebleu_and_rouge_score(pairs):
    said, true = pairs
    for order in (1, 2, 3, 4):
        theirs = sacrebleu.BLEU(max_ngram_order=order).corpus_score(said, [true])
        assert close(bleu(said, true, order=order), theirs.score)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    assert close(rouge_l_each(said, true), [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(said, true)])


def test_radeval_equals_pycocoevalcap_and_rouge_score_with_stems(pairs, coco):
    said, true = pairs
    assert close([bleu(said, true, "radeval", n) for n in (1, 2, 3, 4)], coco[0](said, true))
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    theirs = [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(said, true)]
    assert close(rouge_l_each(said, true, "radeval"), theirs)


def test_r2gen_equals_pycocoevalcap_on_prepared_texts(pairs, coco):
    said, true = pairs
    prepared = [[r2gen_text(text) for text in side] for side in pairs]
    assert close([bleu(said, true, "r2gen", n) for n in (1, 2, 3, 4)], coco[0](*prepared))
    assert close(rouge_l_each(said, true, "r2gen"), coco[1](*prepared))


def test_r2gen_exact_equals_pycocoevalcap_on_its_references(reports, coco):
    """Whole reports, since a sentence is never cut; ids and back to words as R2Gen's loader and decoder have it."""
    training, said, true = reports[:2_000], reports[2_000:2_500], reports[2_500:3_000]
    count: dict[str, int] = {}
    for text in training:
        for word in r2gen_text(text).split():
            count[word] = count.get(word, 0) + 1
    index = {word: number for number, word in enumerate(sorted(w for w, n in count.items() if n >= 3), start=1)}
    references = []
    for text in true:
        ids = [0, *(index.get(word, -1) for word in r2gen_text(text).split()), 0][:60]
        names = {number: word for word, number in index.items()} | {-1: "<unk>"}
        references.append(" ".join(names[number] for number in ids[1:] if number))
    predictions = [" ".join(r2gen_text(text).split()) for text in said]
    assert any("<unk>" in text for text in references) and max(len(text.split()) for text in references) == 59
    ours = [bleu(said, true, "r2gen-exact", n, training) for n in (1, 2, 3, 4)]
    assert close(ours, coco[0](predictions, references))
    assert close(rouge_l_each(said, true, "r2gen-exact", training), coco[1](predictions, references))
    prepared = r2gen_references(training)
    assert isinstance(prepared, R2GenReferences) and list(map(prepared, true)) == references
    assert score(said, true, "r2gen-exact", training=prepared)["BLEU-4"] == ours[3]


@pytest.mark.parametrize("uncertain", ["negative", "positive"])
def test_f1_equals_scikit_learn(pairs, uncertain):
    found = chexpert_f1(*pairs, uncertain=uncertain)
    said, true = (label_matrix(side, uncertain=uncertain) for side in pairs)
    five = [CHEXPERT_14.index(label) for label in CHEXPERT_5]
    for name, columns in (("14", slice(None)), ("5", five)):
        for average in ("micro", "macro"):
            theirs = f1_score(true[:, columns], said[:, columns], average=average, zero_division=0)
            assert close(found[f"{average}-F1-{name}"], theirs)
    by_label = np.transpose(precision_recall_fscore_support(true, said, zero_division=0))
    assert close([list(row.values()) for row in found["labels"].values()], by_label)


def test_finding_graph_equals_a_count_by_hand(pairs):
    shared = alarms = misses = 0
    for said, true in zip(*pairs):
        left, right = finding_graph(said), finding_graph(true)
        shared += sum(item in right for item in left)
        alarms += sum(item not in right for item in left)
        misses += sum(item not in left for item in right)
    assert shared > 500 and close(score(*pairs)[GRAPH_NAME], 2 * shared / (2 * shared + alarms + misses))


# ---- limits, order, sums


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_limits(reports, convention):
    some, top = reports[:50], 100 if convention == "llava-rad" else 1
    same = score(some, some, convention, training=some * 3)
    if convention != "r2gen-exact":  # whose references are cut
        assert close([same[f"BLEU-{n}"] / top for n in (1, 2, 3, 4)], 1) and close(same["ROUGE-L"], 1)
    assert same["CheXpert micro-F1-14 (rules)"] == same["CheXpert micro-F1-14+ (rules)"] == same[GRAPH_NAME] == 1
    empty = score([""] * 50, some, convention, training=some * 3)
    assert max(empty[f"BLEU-{n}"] for n in (1, 2, 3, 4)) < 1e-9 and empty[GRAPH_NAME] == 0
    assert empty["ROUGE-L"] == 0
    nothing = score(["xx yy zz vv ww"] * 50, ["aa bb cc dd ee"] * 50, convention, training=["aa"])
    assert nothing["BLEU-1"] < (1 if convention == "llava-rad" else 0.2)  # a floor of smoothing; R2Gen's full stop
    apart = score(ONE, OTHER, convention, training=ONE)
    assert apart["CheXpert micro-F1-5 (rules)"] == apart[GRAPH_NAME] == 0


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_order_of_studies_does_not_matter(pairs, convention):
    order = np.random.default_rng(1).permutation(PAIRS)
    before = score(*pairs, convention, training=pairs[1])
    after = score(*([side[i] for i in order] for side in pairs), convention, training=pairs[1])
    assert before.keys() == after.keys() and close(list(before.values()), list(after.values()))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_score_is_a_function_of_sums(pairs, convention):
    """Halves add up to the whole, which the bootstrap relies on."""
    said, true = pairs
    halves = [score_parts(said[at], true[at], convention, training=true) for at in (slice(0, 400), slice(400, None))]
    whole = score(said, true, convention, training=true)
    for one, two in zip(*halves):
        sums = one.counts.sum(axis=0) + two.counts.sum(axis=0)
        assert close(one.statistic(sums[None])[0], whole[one.metric])
    counts = bleu_counts(said, true, convention, true).sum(axis=0)
    for n in (1, 2, 3, 4):
        assert close(bleu_from_counts(counts, convention, n), whole[f"BLEU-{n}"])


def test_intervals_hold_the_value_and_shrink(pairs):
    said, true = pairs
    small, large = score_table(said[:100], true[:100], resamples=300), score_table(said, true, resamples=300)
    by_name = large.set_index("metric").loc[["BLEU-1", "BLEU-4", "ROUGE-L", GRAPH_NAME]]
    assert ((by_name.low < by_name.value) & (by_name.value < by_name.high)).all()
    assert (large.high - large.low)[:5].mean() < (small.high - small.low)[:5].mean()


# ---- bad input


class Says:
    """A labeler that says one thing of every text."""

    def __init__(self, said: dict[str, str]):
        self.said = said

    def label(self, text: str) -> dict[str, str]:
        """What it always says."""
        return self.said


@pytest.mark.parametrize(("arguments", "options", "why"), [
    ((["a"], ["a", "b"]), {}, "1 predictions, but 2 references"),
    (([], []), {}, "no texts"),
    ((["a", None], ["a", "b"]), {}, "prediction 1 is None"),
    ((["a"], [float("nan")]), {}, "reference 0 is nan"),
    (({"s1": "a"}, {"s2": "a"}), {}, "no prediction for 1 studies (s2); no reference for 1 studies (s1)"),
    (({"s1": "a", "s2": None}, {"s1": "a", "s2": "b"}), {}, "prediction 1 is None"),
    ((pd.DataFrame({"study": ["s1", "s1"], "text": ["a", "b"]}), {"s1": "a"}), {}, "1 studies (s1) more than once"),
    ((["a"], {"s1": "a"}), {}, "cannot be joined"),
    ((["a"], ["a"]), {"convention": "rouge"}, "'rouge'; it must be one of llava-rad"),
    ((["a"], ["a"]), {"convention": "r2gen-exact"}, "needs training="),
    ((["a"], ["a"]), {"convention": "r2gen-exact", "training": []}, "no training reports"),
    ((["a"], ["a"]), {"labeler": Says({"Oedema": "present"})}, "labeler Says: unknown labels or statuses ['Oedema']"),
    ((["a"], ["a"]), {"labeler": Says({"Edema": "maybe"})}, "['maybe']"),
])
def test_bad_input_is_refused_by_name(arguments, options, why):
    with pytest.raises(ValueError) as raised:
        score(*arguments, **options)
    assert why in str(raised.value)


def test_texts_by_study_score_as_rows_do():
    studies = ["s1", "s2"]
    table = pd.DataFrame({"sentence": OTHER[::-1], "study": studies[::-1]})
    assert score(dict(zip(studies, ONE)), table) == score(ONE, OTHER)
    by_patient = score_table(dict(zip(studies, ONE)), table, {"s1": "p", "s2": "p"}, resamples=20)
    assert (by_patient.low == by_patient.high).all()  # one patient: every draw is the same


def test_what_is_not_computed_has_no_score():
    scored = score(ONE, OTHER)
    assert not [name for name in scored for absent in not_computed() if name.startswith(absent)]
    assert "BERTScore" not in not_computed(["BERTScore F1 (distilbert-base-uncased, layer 5)"])


# ---- speed


def test_all_offline_metrics_of_600_reports_take_less_than_20_seconds(reports):
    true, said = reports[:600], reports[600:1_200]
    label_matrix([""], RuleLabeler())  # what is loaded once is not counted
    start = time.perf_counter()
    for convention in CONVENTIONS:
        score_table(said, true, convention=convention, resamples=0, training=reports[1_200:], labeler=RuleLabeler())
    assert time.perf_counter() - start < 20
