"""Topic selection: heads, calibration, storage, and that val decides nothing."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file, save_file
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import f1_score, roc_auc_score

from llava_ta.core import Run, SelectSettings, check_params, load_profile, ref
from llava_ta.ontology import ASKED, TOPICS
from llava_ta.select import (
    ALWAYS,
    SELECTED,
    Head,
    Selector,
    auroc_interval,
    best_threshold,
    calibrated,
    fit_head,
    make_select,
    platt,
    read_nih,
    reliability,
    selection_scores,
)

SETTINGS = SelectSettings()


def world(
    seed: int,
    number: int = 1200,
    width: int = 24,
) -> tuple[np.ndarray, np.ndarray, list[str]]:  # features, presence with a known logit, patients
    """Make features of which four say whether a finding is there."""
    rng = np.random.default_rng(seed)
    seen = rng.normal(3, 2, (number, width)).astype(np.float32)
    logits = (seen[:, :4] - 3) @ np.array([0.8, -0.6, 0.5, 0.4]) - 1.5
    return seen, rng.random(number) < 1 / (1 + np.exp(-logits)), [f"p{n // 3}" for n in range(number)]


# ---- decisions


@pytest.mark.parametrize("seed", range(30))
def test_threshold_is_the_best_of_all(seed: int):
    rng = np.random.default_rng(seed)
    probability = np.round(rng.random(60), int(rng.integers(1, 4)))  # with ties
    truth = rng.random(60) < probability
    truth[0] = True
    found = f1_score(truth, probability >= best_threshold(probability, truth))
    assert np.isclose(found, max(f1_score(truth, probability >= cut) for cut in np.unique(probability)))


def test_platt_never_turns_a_score_round():
    rng = np.random.default_rng(0)
    truth, noise = rng.random(500) < 0.3, rng.normal(size=500)
    slope, offset = platt(noise - truth, truth)
    assert slope == 0 and np.isclose(1 / (1 + np.exp(-offset)), truth.mean())
    (slope, _), (scaled, _) = platt(noise + truth, truth), platt(1e6 * (noise + truth), truth)
    assert slope > 0 and np.isclose(scaled * 1e6, slope, rtol=1e-3), "the unit of a score does not matter"


def test_intervals_and_scores():
    seen, truth, patients = world(0)
    score = seen[:, 0].astype(float)
    low, high = auroc_interval(score, truth, patients)
    assert low < roc_auc_score(truth, score) < high and high - low < 0.15
    assert np.isnan(auroc_interval(score, np.zeros(len(score), bool), patients)).all()
    none = selection_scores(np.full(10, 0.1), np.zeros(10, bool), None, [str(n) for n in range(10)])
    assert none["asked"] == 0 and np.isnan(none["f1"]) and none["brier"] == pytest.approx(0.01)
    assert reliability(np.array([0.0, 1.0, 0.05]), np.array([False, True, False])).n.tolist() == [2, 1]


# ---- heads


def test_a_head_is_calibrated_on_films_it_has_not_seen():
    head, crossed = fit_head("disease-edema", ("film",), *world(0), SETTINGS)
    seen, truth, patients = world(1)
    probability = head.probability(seen)
    found = selection_scores(probability, truth, head.threshold, patients)
    assert found["auroc"] > 0.85 and found["ece"] < 0.05
    ideal = IsotonicRegression(out_of_bounds="clip").fit_transform(probability, truth)
    assert found["brier"] < ((ideal - truth) ** 2).mean() + 0.01
    best = max(f1_score(truth, probability >= cut) for cut in np.linspace(0.05, 0.95, 91))
    assert found["f1"] > best - 0.03, "the threshold of the training split is near the best one here"
    assert abs(crossed.mean() - world(0)[1].mean()) < 0.02


def test_cross_fitting_does_not_believe_noise():
    rng = np.random.default_rng(0)
    seen, truth = rng.normal(size=(300, 400)).astype(np.float32), rng.random(300) < 0.3
    head, crossed = fit_head("disease-edema", ("film",), seen, truth, [str(n) for n in range(300)], SETTINGS)
    assert roc_auc_score(truth, crossed) < 0.65
    assert head.why or roc_auc_score(truth, head.probability(seen)) > 0.7, "on its own films it would look good"


def test_a_patient_stays_in_one_fold():
    """Two films of a patient with the same features tell the head nothing about other patients."""
    rng = np.random.default_rng(1)
    seen = np.repeat(rng.normal(size=(150, 200)), 2, axis=0).astype(np.float32)
    truth = np.repeat(rng.random(150) < 0.4, 2)
    apart, together = (fit_head("disease-edema", ("film",), seen, truth, patients, SETTINGS)[1]
                       for patients in ([str(n) for n in range(300)], [str(n // 2) for n in range(300)]))
    assert roc_auc_score(truth, apart) > roc_auc_score(truth, together) + 0.15


@pytest.mark.parametrize("positives", [0, 1, 9, 300])
def test_few_positives_fall_back_to_the_prevalence(positives: int):
    seen, _, _ = world(0, 300)
    truth = np.arange(300) < positives
    head, crossed = fit_head("disease-edema", ("film",), seen, truth, [str(n) for n in range(300)], SETTINGS)
    assert head.threshold is None and "are wanted" in head.why and np.ptp(crossed) == 0
    assert abs(crossed[0] - positives / 300) < 0.01 and np.isfinite(head.bias)
    assert calibrated(seen[:, 0], truth, [str(n) for n in range(300)], SETTINGS)[2] is None


# ---- storage


def heads() -> list[Head]:
    """Make a head for each topic, the last one without weights."""
    rng = np.random.default_rng(0)
    made = [Head(topic, ("film", "lungs"), rng.normal(size=8).astype(np.float32), 0.1, 0.5, 20, 100, 0.01)
            for topic in SELECTED]
    return [*made[:-1], replace(made[-1], weights=np.zeros(0, np.float32), threshold=None, why="too few")]


def test_what_is_saved_is_loaded(tmp_path: Path):
    before = Selector(heads())
    before.save(tmp_path)
    after = Selector.load(tmp_path)
    seen = np.random.default_rng(1).normal(size=(5, 2, 4)).astype(np.float32)
    assert (before.table(seen) == after.table(seen)).all()
    assert [after.heads[topic].why for topic in SELECTED] == [""] * 12 + ["too few"]


def spoil_schema(folder: Path) -> None:
    """Change the version."""
    told = json.loads((folder / "heads.json").read_text())
    (folder / "heads.json").write_text(json.dumps({**told, "schema": 99}))


def spoil_weights(folder: Path) -> None:
    """Leave out one topic's weights."""
    weights = load_file(folder / "heads.safetensors")
    del weights["disease-edema"]
    save_file(weights, folder / "heads.safetensors")


def spoil_shape(folder: Path) -> None:
    """Cut one topic's weights."""
    weights = load_file(folder / "heads.safetensors")
    save_file({**weights, "disease-edema": weights["disease-edema"][:3].copy()}, folder / "heads.safetensors")


def spoil_topic(folder: Path) -> None:
    """Leave out one topic."""
    told = json.loads((folder / "heads.json").read_text())
    (folder / "heads.json").write_text(json.dumps({**told, "heads": told["heads"][1:]}))


@pytest.mark.parametrize(("spoil", "expected"), [
    (lambda folder: (folder / "heads.json").unlink(), "nbs/06c_select.ipynb makes it"),
    (spoil_schema, "not of this version"), (spoil_weights, "lacks the weights of disease-edema"),
    (spoil_shape, "disease-edema are not for 2 images"), (spoil_topic, "wanted is one for each"),
])
def test_damage_is_named(tmp_path: Path, spoil, expected: str):
    Selector(heads()).save(tmp_path)
    spoil(tmp_path)
    with pytest.raises((FileNotFoundError, ValueError), match=expected):
        Selector.load(tmp_path)


def test_topics_are_those_of_the_ontology():
    assert set(SELECTED) | set(ALWAYS) == set(ASKED) - {"special-patient status"}
    assert all(TOPICS[topic].chexpert for topic in SELECTED)


# ---- settings and the step


def test_old_profiles_keep_working():
    for name in ("openi", "paper", "llava-rad"):
        assert load_profile(name).select == SelectSettings()


def test_a_judge_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="select.by: 'lm' needs"):
        load_profile("tiny", "select.by=lm, select.lm_studies=0")
    with pytest.raises(ValueError, match="select.by: 'lm' needs"):
        load_profile("tiny", "select.by=lm, train.modes=[narrative]")
    narrative = load_profile("tiny", "train.modes=[narrative]")
    assert narrative.select.checkpoint(narrative) == {}


def test_bad_nih_tables_are_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="LLAVA_TA_NIH_DIR"):
        read_nih("")
    (tmp_path / "index.csv").write_text("image,labels,patient\na.png,Edema,1\nb.png,,2\n")
    with pytest.raises(ValueError, match="line 3: nothing in labels"):
        read_nih(tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Make all that the heads of the tiny profile need; no language model is trained."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LLAVA_TA_RUNS", str(tmp_path_factory.mktemp("runs")))
    settings = check_params("tiny", overrides="select.lm_studies=0, tower.pretrain.epochs=1")
    run = Run(settings, say=lambda text: None)
    run.make("select")
    yield run
    patch.undo()


def test_the_step_needs_a_checkpoint_only_for_the_language_model(tiny: Run):
    assert not (tiny.dir / "train").exists() and not (tiny.path("select") / "lm.json").exists()
    with_lm = Run(check_params("tiny"), say=lambda text: None)
    assert ref("train", mode="anatomy", stage=2, seed=0) in with_lm.stale(ref("select"))


def test_the_tables_of_the_step(tiny: Run):
    folder = tiny.path("select")
    rows, scores = (pd.read_parquet(folder / f"{name}.parquet") for name in ("probabilities", "scores"))
    studies = pd.read_parquet(tiny.path("data") / "studies.parquet")
    assert len(rows) == (len(studies) + 1) * len(SELECTED)  # one more: the black film
    assert rows.heads.between(0, 1).all() and rows.lm.isna().all()
    assert scores.topic.tolist() == list(SELECTED) and set(scores.by) == {"heads"}
    selector = Selector.load(folder)
    cut = rows.topic.map({topic: head.threshold for topic, head in selector.heads.items()}).astype(float)
    assert (rows.chosen == (rows.heads >= cut)).all()
    assert any(head.threshold is not None for head in selector.heads.values())


def test_val_decides_nothing(tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Turn every truth of val round: the heads stay as they are."""
    read = pd.read_parquet

    def turned(path, *args, **kwargs):
        table = read(path, *args, **kwargs)
        if Path(path).name == "samples.parquet":
            val = table.split == "val"
            table.loc[val, "polarity"] = table.polarity[val].map({"present": "absent", "absent": "present"})
        return table

    monkeypatch.setattr(pd, "read_parquet", turned)
    make_select(tiny, tmp_path)
    for name in ("heads.json", "heads.safetensors"):
        assert (tmp_path / name).read_bytes() == (tiny.path("select") / name).read_bytes()
    before, after = read(tiny.path("select") / "scores.parquet"), read(tmp_path / "scores.parquet")
    assert not before.positives.equals(after.positives)
