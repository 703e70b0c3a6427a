"""The whole pipeline at its smallest, through papermill, as a user would run it."""

import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest

from llava_ta.core import STEPS, Ref, Run, all_variants, check_params, load_profile, read_json, ref
from llava_ta.features import open_features
from llava_ta.generate import answer_studies
from llava_ta.llava_rad import export_llava_rad
from llava_ta.masks import MaskStore
from llava_ta.model import LlavaTA
from llava_ta.ontology import CHEXPERT_14, REGIONS, TOPICS
from llava_ta.packing import Pruner
from llava_ta.pipeline import make_beside, without_examples
from pipeline import Ran, chapter, command, kill_tree, papermill, pipeline, surroundings
from repository import ROOT, run_python

TINY = load_profile("tiny")
STUDIES = TINY.data.train + TINY.data.val


def artefacts() -> list[Ref]:  # every artefact of the tiny profile
    """List what a finished run holds."""
    return [found for step, row in STEPS.items() for found in (all_variants(step, TINY) if row.keys else [ref(step)])]


def record(
    runs: Path,  # the folder of runs
    artefact: Ref,  # of the tiny run
) -> dict:
    """Read an artefact's record."""
    return read_json(runs / "tiny" / artefact.folder / "record.json")


def table(
    runs: Path,  # the folder of runs
    name: str,  # e.g. "decompose/findings"
) -> pd.DataFrame:
    """Read a table of the tiny run."""
    return pd.read_parquet(runs / "tiny" / f"{name}.parquet")


# ---- running


@pytest.mark.parametrize("name", sorted({row.notebook for row in STEPS.values()}))
def test_no_run_needs_an_example(name: str, tmp_path: Path):
    chapter = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4)
    nbformat.write(without_examples(chapter), tmp_path / f"{name}.ipynb")
    found = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--no-cache", tmp_path],
        capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_step_makes_what_it_lacks(trained: Ran, runs: Path):
    assert trained.status == 0, trained.said
    assert trained.seconds < 120, f"{trained.seconds:.0f} s"
    needed = ("data", "decompose", "segment", "mapping", "tower", "lm", "features")
    folders = [*needed, *(ref("train", mode="anatomy", stage=stage, seed=0).folder for stage in (1, 2))]
    assert [folder for folder in folders if not (runs / "tiny" / folder / "record.json").exists()] == []


def test_whole_pipeline(finished: Ran, runs: Path):
    assert finished.status == 0, finished.said
    missing = [a.folder for a in artefacts() if not (runs / "tiny" / a.folder / "record.json").exists()]
    assert not missing
    assert str(runs / "tiny" / "report.html") in finished.said or "tiny/report.html" in finished.said


def test_records_say_what_was_made_from_what(finished: Ran, runs: Path):
    for artefact in artefacts():
        found = record(runs, artefact)
        assert found["profile"] == "tiny" and found["artefact"] == artefact.folder
        for folder, fingerprint in found["made_from"]["inputs"].items():
            assert read_json(runs / "tiny" / folder / "record.json")["fingerprint"] == fingerprint, (artefact, folder)


def test_no_litter_is_left(finished: Ran, runs: Path):
    hidden = [path for path in (runs / "tiny").rglob(".*") if path.name != ".locks" and path.parent.name != ".locks"]
    pickled = [path for path in (runs / "tiny").rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".bin", ".npy")]
    assert not hidden + pickled


def stamps(
    runs: Path,  # the folder of runs
) -> dict[str, int]:  # folder -> time of its record
    """Note when each artefact was made."""
    return {a.folder: (runs / "tiny" / a.folder / "record.json").stat().st_mtime_ns for a in artefacts()}


def test_nothing_is_made_twice(finished: Ran, runs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLAVA_TA_RUNS", str(runs))
    before = stamps(runs)
    chapter("11_reproduce", profile="tiny")
    assert stamps(runs) == before


def test_nothing_is_started_where_nothing_has_changed(finished: Ran, runs: Path):
    again = pipeline(runs, "tiny")
    assert again.status == 0 and again.said.splitlines() == ["report: unchanged", str(runs / "tiny" / "report.html")]
    assert again.worked < 10, f"{again.worked:.0f} s of processor time"


def test_trainings_beside_each_other(finished: Ran, runs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLAVA_TA_RUNS", str(runs))
    run = Run(check_params("tiny", overrides="beside=2, train.seeds=[1]"))
    chains = [[ref("train", mode=mode, stage=stage, seed=1) for stage in (1, 2)] for mode in ("narrative", "topic")]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "make", lambda *step, **variant: pytest.fail(f"{step} is made in this process"))
        folders = make_beside(run, chains)
    beside = [pd.read_parquet(folder / "curve.parquet").loss for folder in folders]
    for folder in folders:
        shutil.rmtree(folder)
    alone = [pd.read_parquet(run.make(one.step, **dict(one.variant)) / "curve.parquet").loss for one in sum(chains, [])]
    assert [len(curve) for curve in alone] == [len(curve) for curve in beside]
    assert all(np.allclose(*pair, rtol=1e-3) for pair in zip(alone, beside))


def test_a_change_remakes_only_what_depends_on_it(finished: Ran, runs: Path):
    before = stamps(runs)
    changed = pipeline(runs, "tiny", "bias.sentences=2, bias.changes=4")
    assert changed.status == 0, changed.said
    remade = {folder for folder, stamp in stamps(runs).items() if stamp != before[folder]}
    assert remade == {"bias", "report"}
    flips = pd.read_parquet(runs / "tiny" / "bias" / "flips.parquet")
    assert len(flips) == 4 * 3 * 3  # films, given sentences from 0 to 2, systems: narrative, anatomy, anatomy told


# ---- what came out


def test_studies(finished: Ran, runs: Path):
    studies = table(runs, "data/studies")
    assert studies.study.is_unique
    counts = studies.split.value_counts()
    assert counts["val"] == TINY.data.val and counts["train"] + counts["valid"] == TINY.data.train
    assert counts["valid"] >= 1
    assert not set(studies[studies.split == "val"].patient) & set(studies[studies.split != "val"].patient)


def test_findings_and_samples(finished: Ran, runs: Path):
    studies, findings = table(runs, "data/studies"), table(runs, "decompose/findings")
    samples = table(runs, "mapping/samples")
    assert set(findings.study) <= set(studies.study) and len(set(findings.study)) >= 0.9 * STUDIES
    assert set(findings.topic) <= set(TOPICS) and set(samples.topic) <= set(TOPICS)
    assert not findings.duplicated(["study", "topic"]).any(), "strictly one sentence a topic"
    assert set(findings.polarity) <= {"present", "absent", "uncertain"} and len(set(findings.polarity)) > 1
    named = {part for regions in samples.region_set for part in re.findall(r"[a-z]+", str(regions))}
    assert named and named <= {*REGIONS, "all"}


def test_losses_fall(finished: Ran, runs: Path):
    words = table(runs, "lm/curve").loss
    assert words.tail(5).mean() < 0.9 * words.head(5).mean(), "the language model learns its texts"
    for mode in TINY.train.modes:
        first, second = (
            table(runs, f"{ref('train', mode=mode, stage=stage, seed=0).folder}/curve").loss for stage in (1, 2)
        )
        assert second.mean() < first.mean(), f"{mode}: stage 2 goes on where stage 1 ended"


def test_predictions(finished: Ran, runs: Path):
    val = set(table(runs, "data/studies").query("split == 'val'").study)
    for variant in all_variants("generate", TINY):
        found = table(runs, f"{variant.folder}/predictions")
        chosen = dict(variant.variant)
        assert set(found.study) == val and set(found.film) == {chosen["film"]}
        assert set(found.topic) == {""} if chosen["mode"] == "narrative" else set(found.topic) <= set(TOPICS)
        assert not found.duplicated(["study", "topic", *(["asked"] if "asked" in found else [])]).any()


def test_the_film_matters(finished: Ran, runs: Path):
    """Scores of sentences differ between the real and the black film: the model is given the film."""
    variants = [ref("generate", mode="anatomy", stage=2, seed=0, film=film) for film in ("real", "black")]
    real, black = (table(runs, f"{variant.folder}/predictions") for variant in variants)
    both = real.merge(black, on=["study", "topic"], suffixes=("_real", "_black"))
    assert len(both) and (both.score_real - both.score_black).abs().max() > 1e-4


def test_several_reports_are_drawn_and_one_is_kept(finished: Ran, runs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLAVA_TA_RUNS", str(runs))
    run = Run(check_params("tiny"))
    model = LlavaTA.from_pretrained(run.path("train", mode="narrative", stage=2, seed=0))
    studies = table(runs, "data/studies").query("split == 'val'")
    studies = studies.assign(shown=studies.row.astype(object))

    def written(**changed: object) -> pd.DataFrame:
        settings = TINY.generate.model_copy(update=changed)
        pruner = Pruner(model, MaskStore(run.path("segment")))
        return answer_studies(model, studies, open_features(run), pruner, settings)

    kept, again = (written(report_draws=4, report_temperature=1.0) for _ in range(2))
    alone = [written(temperature=1.0, seed=seed) for seed in range(4)]
    assert kept.study.tolist() == studies.study.tolist() and kept.equals(again)
    drawn = pd.concat(alone).groupby("study").sentence.agg(set)
    assert all(sentence in drawn[study] for study, sentence in zip(kept.study, kept.sentence))
    assert any(len(texts) > 1 for texts in drawn)


def test_scores(finished: Ran, runs: Path):
    scores = table(runs, "evaluate/scores")
    assert {"system", "evaluation", "metric", "convention", "value", "low", "high", "n"} <= set(scores.columns)
    assert set(TINY.evaluate.modes) <= set(scores.evaluation)
    known = scores.dropna(subset=["value"])
    assert len(known) and (known.value >= 0).all() and (known.value <= 100).all()
    bounded = known.dropna(subset=["low", "high"])
    assert len(bounded) and (bounded.low <= bounded.value + 1e-9).all() and (bounded.value <= bounded.high + 1e-9).all()
    for mode in TINY.train.modes:
        assert scores.system.str.contains(mode).any(), mode
    assert scores.metric.str.contains("chexpert", case=False).any() and len(CHEXPERT_14) == 14


def test_report_opens_without_a_network(finished: Ran, runs: Path):
    page = (runs / "tiny" / "report.html").read_text(encoding="utf-8")
    outside = re.findall(r'<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)=["\'](?!data:|#)([^"\']+)', page)
    assert not outside, outside
    assert not re.search(r'import\s*\(?["\']https?://', page)
    assert "not for clinical use" in page.lower()
    val = table(runs, "data/studies").query("split == 'val'").study
    assert sum(str(study) in page for study in val) >= 1, "films of the test split are shown"


def test_errors_of_a_run(finished: Ran, runs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LLAVA_TA_RUNS", str(runs))
    chapter("07a_errors", evaluation="topic", kind="missed", show=3)
    page = (runs / "tiny" / "errors.html").read_text()
    assert page.count("<article") == 3 and page.count('<span class="missed">') == 3
    assert not re.search(r"<script|https?://", page)


def test_five_lines_of_python(finished: Ran, runs: Path, tmp_path: Path):
    """The example of the README."""
    code = f"""
import numpy as np
from PIL import Image
from llava_ta.phantom import Finding, draw
film = draw([], seed=7, size=128).film
Image.fromarray((film * 255).astype(np.uint8)).save("film.png")
from llava_ta.generate import load
model = load({str(runs / 'tiny' / 'train' / 'anatomy-stage2-seed0')!r})
for finding in model.report("film.png"):
    print(finding.topic, finding.region, f"{{finding.score:.2f}}", finding.sentence, sep="|")
"""
    done = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.count("|") >= 3]
    assert rows and {row[0] for row in rows} <= set(TOPICS)
    assert all(set(re.split(r"[^a-z]+", row[1])) & {*REGIONS, "all"} for row in rows)


def test_published_narrative_is_imported(finished: Ran, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint in LLaVA-Rad's layout takes the place of training, and writes what the model behind it writes."""
    made = runs / "tiny" / ref("train", mode="narrative", stage=2, seed=0).folder
    export_llava_rad(LlavaTA.from_pretrained(made), tmp_path / "rad")
    wanted = ", ".join([
        "train.modes=[narrative]", f"train.published={tmp_path / 'rad'}", "tower.pretrain=null", "lm.pretrain=null",
        f"tower.checkpoint={runs / 'tiny' / 'tower' / 'tower.safetensors'}", f"lm.checkpoint={runs / 'tiny' / 'lm'}"])
    monkeypatch.setenv("LLAVA_TA_RUNS", str(runs))
    chapter("06a_generate", profile="tiny", run="published", overrides=wanted, mode="narrative")
    assert not (runs / "published" / "train" / "narrative-stage1-seed0").exists()
    film = ref("generate", mode="narrative", stage=2, seed=0, film="real").folder
    here, there = (pd.read_parquet(runs / run / film / "predictions.parquet") for run in ("tiny", "published"))
    assert here.sentence.tolist() == there.sentence.tolist() and here.score.nunique() > 1
    assert (here.score - there.score).abs().max() < 1e-5


# ---- interruption


def same_tables(
    one: Path,  # a run
    other: Path,  # another
) -> list[str]:  # tables that differ
    """Compare all tables of two runs."""
    names = sorted(str(path.relative_to(one)) for path in one.rglob("*.parquet"))
    assert names == sorted(str(path.relative_to(other)) for path in other.rglob("*.parquet"))
    timed = ["seconds", "time", "elapsed"]

    def read(path: Path) -> pd.DataFrame:
        return pd.read_parquet(path).drop(columns=timed, errors="ignore")

    return [name for name in names if not read(one / name).equals(read(other / name))]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_killed_and_run_again(tmp_path: Path, seed: int):
    """SIGKILL at random moments, then to the end: the tables are those of an undisturbed run."""
    chance = random.Random(seed)
    undisturbed = papermill("11_reproduce", tmp_path / "undisturbed", profile="tiny")
    assert undisturbed.status == 0, undisturbed.said
    killed = 0
    line, around = command("11_reproduce", tmp_path / "out.ipynb", profile="tiny"), surroundings(tmp_path / "killed")
    for number in range(5):
        process = subprocess.Popen(line, cwd=ROOT, env=around, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=chance.uniform(6, max(10.0, undisturbed.seconds / 2)))
        except subprocess.TimeoutExpired:
            if number % 2:
                kill_tree(process)
            else:  # papermill alone: its kernel lives on for a moment, and the next run has to wait for it
                process.kill()
                process.wait()
            killed += 1
    assert killed >= 1
    resumed = papermill("11_reproduce", tmp_path / "killed", profile="tiny")
    assert resumed.status == 0, resumed.said
    assert not same_tables(tmp_path / "undisturbed" / "tiny", tmp_path / "killed" / "tiny")


# ---- a GPU


@pytest.mark.gpu
def test_training_on_a_gpu(tmp_path: Path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: what runs on a GPU has NOT been tested")
    ran = papermill("06_train", tmp_path, stage=2)
    assert ran.status == 0, ran.said
    trained = read_json(tmp_path / "tiny" / ref("train", mode="anatomy", stage=2, seed=0).folder / "record.json")
    assert trained["metrics"]["device"].startswith("cuda")
