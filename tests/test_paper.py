"""The profile `paper` from films to scores, with nothing but its sizes changed, in two processes."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pandas as pd
import pytest
import torch
from fhirclient.models.diagnosticreport import DiagnosticReport
from PIL import Image
from torchxrayvision.baseline_models.chestx_anatomy import UNetResNet50

from faults import served, serving
from llava_ta.assemble import assemble
from llava_ta.core import Evaluation, Shown, load_profile
from llava_ta.generate import load
from llava_ta.grammar import sample_study
from llava_ta.phantom import draw
from llava_ta.reproduce import main
from miniature import Film, annotation, cxas_file, llama_folder, mimic_tree, tower_file, write_lists
from repository import ROOT, launch, run_python

SPLITS = {"train": ("train", 10), "dev": ("validate", 3), "test": ("test", 4)}  # LLaVA-Rad's: PhysioNet's, studies
SAYS = "There is a small left pleural effusion."
SIZES = (
    "data.size=70, segment.size=64, tower.image_size=56, tower.args={depth: 3, embed_dim: 24, num_heads: 2}, "
    "lm.hidden=64, lm.layers=2, lm.heads=2, lm.intermediate=48, lm.vocab=600, lora.rank=4, lora.alpha=8, "
    "train.stage1.batch=4, train.stage2.batch=4, train.stage2.epochs=1, "
    "generate.budget=4096, generate.topic_tokens=16, generate.report_tokens=16, "
    "select.folds=2, select.min_positives=2, select.lm_studies=6, evaluate.bootstrap=20")


class Miniature(NamedTuple):
    """What the profile reads, and how it is told."""

    films: list[Path]  # of the test split
    places: str  # of the files and of the server, as overrides
    url: str  # of the language model's server


def made_up_studies() -> dict[str, list[tuple[Film, str, np.ndarray]]]:  # split of LLaVA-Rad -> film, report, pixels
    """Draw phantoms, each with its report."""
    rng, found, number = np.random.default_rng(7), {}, 0
    for name, (split, studies) in SPLITS.items():
        found[name] = []
        for _ in range(studies):
            number += 1
            findings, report = sample_study(rng)
            row = Film(f"{number:08x}-0-0-0-0", str(19_000_000 + number), str(59_000_000 + number), "PA", split)
            found[name].append((row, f"{report} Film {number}.", draw(findings, number, size=96).film))
    return found


def write_mimic(folder: Path) -> tuple[list[Path], list[str]]:  # films of the test split, all reports
    """Write the tree of MIMIC-CXR-JPG with LLaVA-Rad's lists in it, as the profile expects them."""
    studies = made_up_studies()
    every = [one for some in studies.values() for one in some]
    pixels = {row.dicom: film for row, _, film in every}

    def write_film(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(pixels[path.stem] * 255)).save(path, quality=95)

    typed = {row.study: f"FINAL REPORT\n FINDINGS:\n {report}" for row, report, _ in every}
    mimic_tree(folder, [row for row, _, _ in every], typed, write_film)
    write_lists(folder, {name: [annotation(row, "gpt4", report) for row, report, _ in some]
                         for name, some in studies.items()})
    test = [folder / "files" / row.folder / f"{row.dicom}.jpg" for row, _, _ in studies["test"]]
    return test, [report for _, report, _ in every]


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Miniature]:
    """Films, lists, tower, language model and a server, all small."""
    folder = tmp_path_factory.mktemp("paper")
    films, reports = write_mimic(folder / "mimic")
    small = load_profile("paper", SIZES)
    torch.manual_seed(0)
    tower = tower_file(folder / "biomedclipcxr.pt", small.tower)
    llama = llama_folder(folder / "vicuna", small.lm, reports, SAYS)
    with serving(0.0, 0.0, 1.0) as url:
        places = (f"data.dir={folder / 'mimic'}, tower.checkpoint={tower}, lm.checkpoint={llama}, "
                  f"decompose.name=llm, decompose.base_url={url}, decompose.model=toy")
        yield Miniature(films, places, url)


OPTIONS = ("--profile", "paper", "--run", "r", "--step", "evaluate")


def reproduce(
    runs: Path,  # the folder of runs
    overrides: str,  # of the profile paper
) -> str:  # what was said
    """Make the scores and all that they need with one command, in two processes."""
    done = run_python(*launch(2), "-m", "llava_ta.reproduce", *OPTIONS, "--overrides", overrides, timeout=3000,
                      PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", LLAVA_TA_RUNS=str(runs))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def metrics(run: Path, artefact: str) -> dict:
    """The numbers of a record."""
    return json.loads((run / artefact / "record.json").read_text())["metrics"]


def check_scores(run: Path) -> None:
    """The score table has every system, with every film and in every mode, and numbers where it promises some."""
    scores = pd.read_parquet(run / "evaluate" / "scores.parquet")
    known = scores[~scores.convention.str.startswith("not computed")]
    assert len(known) > 1000 and np.isfinite(known[["value", "low", "high"]].to_numpy()).all()
    real = known.query("film == 'real' and evaluation == 'report-predicted'")
    assert set(real["mode"]) == {"narrative", "topic", "anatomy", "selector"}
    anatomy = known[known["mode"] == "anatomy"]
    assert set(anatomy.film) == set(get_args(Shown)) and set(anatomy.evaluation) == set(get_args(Evaluation))
    assert (real.query("mode == 'anatomy' and metric == 'ROUGE-L'").value > 0).all()
    written = (run / "evaluate" / "table.md").read_text()
    assert "report-predicted | topic + anatomy (TA) | real" in written


def check_fhir(run: Path, film: Path) -> None:
    """The report that the trained model writes of a film is a DiagnosticReport, and says what the model said."""
    found = load(run / "train" / "anatomy-stage2-seed0").report(film, tokens=16)
    assert {finding.sentence for finding in found} == {SAYS}
    resource = assemble(found, film.parent.name).to_fhir()
    read = DiagnosticReport(json.loads(json.dumps(resource)), strict=True)
    assert read.as_json() == resource and len(read.contained) > 1 and "effusion" in read.conclusion


@pytest.mark.parametrize("segmenter", ["offline", pytest.param("cxas", marks=pytest.mark.slow)])
def test_from_films_to_scores(
    paper: Miniature, tmp_path: Path, segmenter: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """CXAS is the profile's own; as it takes seconds a film, whatever its masks' size, others may stand in."""
    overrides = f"{SIZES}, {paper.places}, segment.name=offline, segment.weights=''"
    if segmenter == "cxas":
        torch.manual_seed(0)
        weights = cxas_file(tmp_path / "cxas.pth", UNetResNet50(weights=False))
        overrides = f"{SIZES}, {paper.places}, segment.weights={weights}, data.train=6, data.val=2"
    asked = served(paper.url)["answers"]
    said = reproduce(tmp_path, overrides)
    made, run = re.findall(r"^making (\S+?),? ", said, re.MULTILINE), tmp_path / "r"
    assert len(made) == len(set(made)) and made[0] == "data" and made[-1] == "evaluate"
    studies = pd.read_parquet(run / "data" / "studies.parquet")
    assert set(studies.source) == {"mimic"} and set(studies.split) == {"train", "valid", "val"}
    assert metrics(run, "decompose")["made_by"] == {"llm": len(studies)}
    assert served(paper.url)["answers"] == asked + len(studies), "only one process asks"
    assert metrics(run, "segment")["segmenter"] == segmenter
    trained = sorted(path.name for path in (run / "train").iterdir() if path.name[0] != ".")
    assert len(trained) == 6 and {metrics(run, f"train/{name}")["processes"] for name in trained} == {2}
    check_scores(run)
    check_fhir(run, paper.films[0])
    monkeypatch.setenv("LLAVA_TA_RUNS", str(tmp_path))
    capsys.readouterr()
    main([*OPTIONS, "--overrides", overrides])
    assert capsys.readouterr().out == "evaluate: unchanged\n"
