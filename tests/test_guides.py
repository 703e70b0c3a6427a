"""What guides, chapters and README tell a reader to type: run where it can be, and else compared with what exists."""

import ast
import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from papermill.inspection import inspect_notebook

from llava_ta.core import PROFILES, STEPS, Profile, check_params, load_profile, preflight
from llava_ta.reproduce import main
from miniature import Film, annotation, mimic_tree, write_lists
from repository import NBS, ROOT, Notebook, copy_tree, guides, notebooks

FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Programs that are not part of the project; what follows them is not looked at.
OTHERS = {"source", "pre-commit", "tensorboard", "vllm", "nbdev_install_hooks"}
WRITTEN = {"mimic.yaml", "own.yaml"}  # profiles that a guide has its reader write


class Block(NamedTuple):
    """A fenced block."""

    page: str  # notebook or document
    language: str  # of the fence
    text: str  # inside


def blocks(
    *languages: str,  # of the fences
    page: str = "",  # one notebook; empty for all
) -> list[Block]:  # in order
    """List the blocks of the index, the chapters, the guides and the documents."""
    pages = [Notebook(NBS / "index.ipynb"), *notebooks(), *guides()]
    texts = {one.name: [cell.source for cell in one.cells if cell.kind == "markdown"] for one in pages}
    texts["CONTRIBUTING"] = [(ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")]
    return [Block(name, *found) for name, parts in texts.items() if page in ("", name)
            for part in parts for found in FENCE.findall(part) if found[0] in languages]


def commands(text: str) -> list[str]:  # of a shell block, a line each
    """Join continued lines and leave out comments."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


# ---- what is named exists


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the profiles that readers of the guides have written."""
    folder = tmp_path_factory.mktemp("written")
    [addition] = [block.text for block in blocks("yaml", page="mimic")]
    paper = (ROOT / "llava_ta/profiles/paper.yaml").read_text(encoding="utf-8")
    (folder / "mimic.yaml").write_text(paper + addition, encoding="utf-8")
    [own] = [block.text for block in blocks("yaml", page="own_films")]
    (folder / "own.yaml").write_text(own, encoding="utf-8")
    return folder


@cache
def options_of(module: str) -> set[str]:  # e.g. {"--profile"}
    """Ask a module for its options."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", [module, "--help"])
        patch.delitem(sys.modules, module, raising=False)  # as in a new process
        runpy.run_module(module, run_name="__main__")
    assert not ended.value.code, f"python -m {module} --help"
    return set(re.findall(r"--[\w-]+", said.getvalue()))


def check_settings(given: dict[str, str], written: Path) -> None:
    """Load the profile with its overrides, as the command would."""
    profile = given.get("profile", "tiny")
    assert profile in PROFILES or profile in WRITTEN, f"no profile {profile}"
    load_profile(str(written / profile) if profile in WRITTEN else profile, given.get("overrides", ""))
    assert given.get("step", "report") in STEPS
    assert given.get("mode", "all") in ("narrative", "topic", "anatomy", "all")


def check_module(words: list[str], written: Path) -> None:
    """`llava_ta.reproduce --profile tiny ...`: the module has these options, and they take these values."""
    module, *rest = words
    unknown = {word for word in rest if word.startswith("--")} - options_of(module)
    assert not unknown, f"{module} has no {unknown}"
    pairs = zip(rest, rest[1:], strict=False)
    check_settings({key[2:]: value for key, value in pairs if key.startswith("--")}, written)


def check_papermill(words: list[str], written: Path) -> None:
    """The notebook exists, and has these parameters."""
    notebook, output, *rest = words
    assert (ROOT / notebook).is_file() and output.endswith(".ipynb") and output != notebook
    assert len(rest) % 3 == 0 and set(rest[::3]) <= {"-p"}, rest
    given = dict(zip(rest[1::3], rest[2::3], strict=True))
    unknown = set(given) - set(inspect_notebook(str(ROOT / notebook)))
    assert not unknown, f"{notebook} has no parameter {unknown}"
    check_settings(given, written)


def check_launch(words: list[str], written: Path) -> None:
    """accelerate knows these options, and the configuration is there."""
    given = launch_command_parser().parse_args(words)
    assert (ROOT / given.config_file).is_file() and given.module
    check_module([given.training_script, *given.training_script_args], written)


def check_command(line: str, written: Path) -> None:
    """Compare one command with what exists; raises AssertionError, or ValueError for a setting that is none."""
    program, *words = shlex.split(line, comments=True)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    if program == "export":
        name = words[0].partition("=")[0]
        assert any(name in path.read_text(encoding="utf-8") for path in (ROOT / "llava_ta").glob("*.py")) \
            or re.fullmatch("LLAVA_TA_(OPENI|MIMIC|FOLDER)_DIR", name), name
    elif program == "make":
        assert set(words) - {word for word in words if "=" in word} <= set(targets), line
    elif program == "papermill":
        check_papermill(words, written)
    elif program == "accelerate":
        check_launch(words[1:], written)
    elif program == "python" and words[0] == "-m":
        assert words[1].startswith("llava_ta.")
        check_module(words[1:], written)
    elif program == "python" and words[0] == "-c":
        check_python(words[1])
    elif program in ("cp", "nbdev_test"):
        assert (ROOT / (words[0] if program == "cp" else words[1])).is_file(), line
    else:
        assert program in OTHERS or shutil.which(program), f"no program {program}"


def check_python(text: str) -> None:
    """The text is Python, and what it imports is there."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            lacking = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not lacking, f"{node.module} has no {lacking}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


@pytest.mark.parametrize("block", blocks("sh", "bash"), ids=lambda block: block.page)
def test_commands_are_real(block: Block, written: Path):
    for line in commands(block.text):
        check_command(line, written)


@pytest.mark.parametrize("wrong", [
    "papermill nbs/06_train.ipynb out.ipynb -p stag 2", "papermill nbs/06_training.ipynb out.ipynb", "make everything",
    "python -m llava_ta.reproduce --profil tiny", "python -m llava_ta.reproduce --step scores", "frobnicate now",
    "accelerate launch --config_file configs/none.yaml -m llava_ta.train", "export LLAVA_TA_NOTHING=1",
    'papermill nbs/06_train.ipynb out.ipynb -p overrides "train.stage2.epoch=1"', "cp llava_ta/none.yaml a.yaml",
])
def test_a_command_that_is_not_real_is_noticed(wrong: str, written: Path):
    with pytest.raises((AssertionError, ValueError)):
        check_command(wrong, written)


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.page)
def test_settings_are_real(block: Block):
    """Sections of a profile are valid in the profile `paper`; tables of the package stand under their file's name."""
    content = yaml.safe_load(block.text)
    if isinstance(content, list):
        [name] = re.findall(r"# (llava_ta/\w+\.yaml)", block.text)
        assert (ROOT / name).is_file()
        return
    paper = yaml.safe_load((ROOT / "llava_ta/profiles/paper.yaml").read_text(encoding="utf-8"))
    Profile.model_validate(content if "data" in content else {**paper, **content})


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.page)
def test_python_in_texts_is_real(block: Block):
    check_python("{" + block.text + "}" if re.match(r'"[^"]+": ', block.text) else block.text)


@pytest.mark.parametrize("notebook", guides(), ids=lambda notebook: notebook.name)
def test_cells_that_are_not_run_are_real(notebook: Notebook):
    for cell in notebook.code:
        if "eval: false" in cell.directives:
            check_python(cell.source)


def test_a_reader_is_told_of_each_file():
    """Whatever the profile `paper` may lack is in the guide."""
    nowhere = "data.dir=nowhere, tower.checkpoint=no.pt, lm.checkpoint=nothing, segment.weights=no.pth"
    text = "".join(cell.source for cell in Notebook(NBS / "guides/mimic.ipynb").cells)
    for _, _, how in preflight(load_profile("paper", nowhere)).absent:
        for name in re.findall(r"[\w.-]+\.(?:pth?|zip)\b|vicuna-7b-v1\.5|\$(LLAVA_TA_\w+)", how):
            assert name in text, f"{name}: {how}"


# ---- figures


def numbers_of(text: str) -> set[str]:  # e.g. {"0.951", "3,955"}
    """Find what is a measured number and not part of a name, a link or code."""
    prose = re.sub(r"`[^`]*`|\]\([^)]*\)", " ", text)
    return set(re.findall(r"(?<![\w.,-])(?:\d+\.\d+|\d{2,}(?:,\d{3})*|\d,\d{3})(?![\w-])(?!\.\d)", prose))


def written_in(name: str) -> str:  # all that a chapter says and shows
    """Read a chapter with its stored outputs."""
    [path] = [path for path in NBS.rglob("*.ipynb") if re.sub(r"^\d\d[a-z]?_", "", path.stem) == name]
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return json.dumps(cells, ensure_ascii=False)


def paragraphs() -> Iterator[str]:  # of the page of limits
    """Cut the page where one statement ends; what is measured with the command below it has its source there."""
    for cell in Notebook(NBS / "guides/limits.ipynb").cells[1:]:
        text = re.sub(r"\n\n[^\n]+(?:\n[^\n]+)*Measured with:\n\n```sh\n.*?```\n", "\n", cell.source, flags=re.DOTALL)
        yield from (part for part in re.split(r"\n\n|\n(?=[-|])", text) if not part.startswith("#"))


def test_each_number_on_the_page_of_limits_stands_in_a_chapter():
    wrong, seen = [], 0
    for text in paragraphs():
        sources = "".join(written_in(name) for name in re.findall(r"\]\((?:\.\./)?(\w+)\.html\)", text))
        numbers = numbers_of(text)
        seen += len(numbers)
        absent = [number for number in numbers if not re.search(rf"(?<![\d.]){number}(?!\d)", sources)]
        wrong += [f"{number}: {text[:80]}" for number in absent]
    assert not wrong, "\n".join(wrong)
    assert seen > 15, "the numbers were not found"


# ---- what can be run


def run_block(
    block: Block,  # shell
    tree: Path,  # where
    **environment: str,  # added to the present one
) -> str:  # what was said
    """Run a block as a reader would, in a copy of the repository."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    around = {**os.environ, "PATH": path, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", **environment}
    command = ["bash", "-euc", block.text]
    done = subprocess.run(command, cwd=tree, env=around, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{block.text}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository without the runs."""
    return copy_tree(tmp_path_factory.mktemp("reader") / "tree")


@pytest.mark.slow
def test_the_tutorial_runs(tree: Path):
    """The second command uses the checkpoint of the first, and the page that it promises needs no network."""
    training, page = blocks("sh", page="tutorial")
    runs = {"LLAVA_TA_RUNS": str(tree / "runs")}
    run_block(training, tree, **runs)
    assert (tree / "out.ipynb").is_file()
    place = tree / "runs/tutorial/train/anatomy-stage2-seed0/record.json"
    record = place.read_text(encoding="utf-8")
    assert json.loads(record)["metrics"]["steps"] > 0
    run_block(page, tree, **runs)
    assert place.read_text(encoding="utf-8") == record  # not made again
    written = (tree / "runs/tutorial/report.html").read_text(encoding="utf-8")
    assert "Not for clinical use" in written and not re.search(r'<(?:script|img|iframe)[^>]*\bsrc="https?:', written)


def test_own_films_become_a_run(tree: Path, written: Path, tmp_path: Path):
    """The folder that the guide makes, the profile that it prints, the command that it gives."""
    cells = [cell.source for cell in Notebook(NBS / "guides/own_films.ipynb").code]
    made: dict[str, object] = {}
    for source in cells[:3]:  # imports, films, table
        exec(source, made)  # noqa: S102, our own cells
    shutil.copy(written / "own.yaml", tree)
    [look] = [block for block in blocks("sh", page="own_films") if "--step mapping" in block.text]
    here = look._replace(text=look.text.replace("/data/films", str(made["films"])))
    run_block(here, tree, LLAVA_TA_RUNS=str(tmp_path))
    samples = pd.read_parquet(tmp_path / "own/mapping/samples.parquet")
    assert samples.query("origin == 'report'").study.nunique() == 24
    assert (pd.read_parquet(tmp_path / "own/data/studies.parquet").split == "new").sum() == 1


def test_a_new_topic_is_read(tree: Path):
    """The three changes of the guide, and the command that shows them."""
    ontology, lexicon = blocks("yaml", page="own_topics")
    [meaning] = blocks("python", page="own_topics")
    entry = [line for line in ontology.text.splitlines() if line.startswith("- ")][0]
    path = tree / "llava_ta/ontology.yaml"
    path.write_text(re.sub(r"(?=  - \{id: special-support devices)", f"  {entry}\n", path.read_text(), count=1))
    rule = [line for line in lexicon.text.splitlines() if line.startswith("- ")][0]
    path = tree / "llava_ta/lexicon.yaml"
    path.write_text(re.sub(r"- \{id: hernia, .*", lambda found: rule, path.read_text(), count=1))
    chapter = tree / "nbs/01d_answers.ipynb"
    content = json.loads(chapter.read_text(encoding="utf-8"))
    [cell] = [cell for cell in content["cells"] if "MEANINGS: dict" in "".join(cell["source"])]
    last = '    "special-other"'
    cell["source"] = "".join(cell["source"]).replace(last, f"    {meaning.text.strip()}\n{last}")
    chapter.write_text(json.dumps(content), encoding="utf-8")
    run_block(Block("", "sh", "nbdev_export"), tree)
    [look] = blocks("sh", page="own_topics")
    said = run_block(look, tree)
    assert "disease-hiatal hernia" in said and "polarity='present'" in said
    told = run_block(Block("", "sh", "nbdev_test --path nbs/01d_answers.ipynb"), tree)
    assert "Success" in told or "error" not in told.lower()


def test_mimic_is_complete_when_the_guide_says_so(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """The files of the guide's table, in miniature: nothing is absent then, and the first step reads them."""
    rows = [Film(f"{n:08x}-0", str(19_000_000 + n), str(59_000_000 + n), "PA", split)
            for n, split in enumerate(["train"] * 4 + ["validate", "test"])]
    reports = {row.study: f"FINDINGS: The heart is normal. Film {row.study}." for row in rows}
    mimic_tree(tmp_path / "mimic", rows, reports, zipped=True)
    names = {"train": "train", "validate": "dev", "test": "test"}
    lists = {name: [annotation(row, "gpt4", "The heart is normal.") for row in rows if names[row.split] == name]
             for name in names.values()}
    write_lists(tmp_path / "mimic", lists)
    (tmp_path / "weights/vicuna-7b-v1.5").mkdir(parents=True)
    for name in ("biomedclipcxr_518_checkpoint.pt", "UNet_ResNet50_default.pth"):
        (tmp_path / "weights" / name).touch()
    shutil.copy(written / "mimic.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    for line in commands(blocks("sh", page="mimic")[0].text):
        name, _, place = line.removeprefix("export ").partition("=")
        monkeypatch.setenv(name, str(tmp_path / {"/data/mimic-cxr-jpg": "mimic", "/data/runs": "runs"}[place]))
    assert not preflight(check_params("mimic.yaml").profile).absent
    [folder] = main(["--profile", "mimic.yaml", "--run", "pilot", "--overrides", "data.size=64", "--step", "data"])
    studies = pd.read_parquet(folder / "studies.parquet")
    assert np.array_equal(studies.split.value_counts()[["train", "val"]], [4, 1]) and folder.parent.name == "pilot"
