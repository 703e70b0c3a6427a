"""The rules of the repository, as far as a machine can check them. CONTRIBUTING.md tells them in prose."""

import ast
import configparser
import json
import re
import statistics
import sys
import tarfile
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path
from xml.etree import ElementTree

import pytest
from packaging.requirements import Requirement
from papermill.inspection import inspect_notebook

from check_sizes import too_large
from clean_notebooks import without_copies
from llava_ta.core import STEPS
from repository import LIB, NBS, ROOT, Cell, Notebook, copy_tree, guides, notebooks, run_python, tracked_files

LINE = 120  # characters
CELL_LINES = 40  # of code in an exported cell
MEDIAN_LINES = 12
MODULE_LINES = 400
# Modules that may be longer, how long, and why.
LONGER = {
    "rules": (600, "the grammar of a report sentence: it reads best in one piece"),
    "films": (430, "each kind of file that is read or refused is a few lines, and all of them make one kind of film"),
    "core": (800, "every setting of a profile is one documented line; the run machinery reads best in one piece"),
    "phantom": (720, "each structure of the chest and each finding is a few lines, and they share one picture"),
}
FORWARDS = {"pretrain": {"packing"}}  # towers come before features, features before packing, and stage 0 is packed
ALL = notebooks()
PIPELINE = sorted({step.notebook for step in STEPS.values()})
GUIDES = guides()
each = pytest.mark.parametrize("notebook", ALL, ids=lambda notebook: notebook.name)
every_page = pytest.mark.parametrize("notebook", [*ALL, *GUIDES], ids=lambda notebook: notebook.name)
each_pipeline = pytest.mark.parametrize("name", PIPELINE)


def listed(
    found: list,  # offenders
) -> str:  # for an assertion's message
    """Put one offender on a line."""
    return "\n" + "\n".join(str(item) for item in found)


# ---- the form of a notebook


@every_page
def test_opening(notebook: Notebook):
    title, second, *rest = notebook.cells
    assert title.kind == "markdown", "cell 0 is the title"
    assert re.fullmatch(r"# \S.*\n\s*> \S.*", title.source), "cell 0: '# Title', then '> one line', nothing else"
    if notebook.module:
        assert second.source.strip() == f"#| default_exp {notebook.module}", "cell 1: `#| default_exp module` alone"
    introduction = next((cell for cell in (second, *rest) if cell.kind == "markdown"), None)
    code = [cell.number for cell in notebook.code if not cell.source.startswith("#| default_exp")]
    assert introduction and introduction.number < min(code, default=2), "an introduction comes before the code"


@pytest.mark.parametrize("notebook", GUIDES, ids=lambda notebook: notebook.name)
def test_a_guide_writes_no_module(notebook: Notebook):
    assert not notebook.module and not [cell.number for cell in notebook.cells if cell.exported]
    assert re.fullmatch(r"[a-z_]+", notebook.name) and notebook.name not in {chapter.module for chapter in ALL}


def test_module_named_by_stem():
    stems = [re.sub(r"^\d\d[a-z]?_", "", notebook.name) for notebook in ALL]
    assert all(re.fullmatch(r"\d\d[a-z]?_[a-z_]+", notebook.name) for notebook in ALL)
    assert len(set(stems)) == len(stems), "two notebooks share a stem, hence a page"
    assert [n.name for n, stem in zip(ALL, stems, strict=True) if n.module and n.module != stem] == []


@every_page
def test_import_cells_hold_imports_only(notebook: Notebook):
    found = []
    for cell in notebook.code:
        at_top = [isinstance(node, ast.Import | ast.ImportFrom) for node in cell.tree.body]
        mixed = any(at_top) and not all(at_top)
        # the site's build executes every unexported cell with an import in it, however deep
        inside = cell.imports and not any(at_top) and not cell.exported and "eval: false" not in cell.directives
        if mixed or inside:
            found.append(f"cell {cell.number}: {cell.source[:80]!r}")
    assert not found, listed(found)


@each
def test_imports_point_backwards(notebook: Notebook):
    earlier = {other.module for other in ALL if other.name < notebook.name} | FORWARDS.get(notebook.module, set())
    found = []
    for cell in notebook.code:
        for module in cell.imports:
            top, *rest = module.split(".")
            later = top == "llava_ta" and rest and rest[0] not in earlier | {notebook.module}
            if top in ("nbdev", "fastcore", "") or later:
                found.append(f"cell {cell.number} imports {module}")
        if any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in ast.walk(cell.tree)):
            found.append(f"cell {cell.number}: star import")
    assert not found, listed(found)


@each
def test_exported_cells_are_small(notebook: Notebook):
    cells = [cell for cell in notebook.cells if cell.exported]
    long = [f"cell {c.number}: {c.code_lines} lines" for c in cells if c.code_lines > CELL_LINES]
    many = [f"cell {c.number}: {[n.name for n in c.public]}" for c in cells if len(c.public) > 1]
    assert not long + many, listed(long + many)
    if cells:
        assert statistics.median(cell.code_lines for cell in cells) <= MEDIAN_LINES


@every_page
def test_lines_are_short(notebook: Notebook):
    long = [f"cell {c.number}: {x[:60]} ..." for c in notebook.code for x in c.source.splitlines() if len(x) > LINE]
    assert not long, listed(long)


@each
def test_module_is_not_long(notebook: Notebook):
    allowed, _ = LONGER.get(notebook.module, (MODULE_LINES, ""))
    lines = sum(cell.code_lines for cell in notebook.cells if cell.exported)
    assert lines <= allowed, f"{lines} lines of code"


def documented(
    cell: Cell,  # whose source holds the comments
    function: ast.FunctionDef | ast.AsyncFunctionDef,  # a public one
) -> list[str]:  # what is missing
    """Look for the comment behind every argument and behind the return value."""
    lines = cell.source.splitlines()
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    missing = []
    for argument in filter(None, every):
        if argument.arg not in ("self", "cls") and "#" not in lines[argument.end_lineno - 1][argument.end_col_offset :]:
            missing.append(f"cell {cell.number}: {function.name}: no comment behind {argument.arg}")
    returned = function.returns
    if returned is None:
        missing += [] if function.name == "__init__" else [f"cell {cell.number}: {function.name}: returns what?"]
        return missing
    nothing = isinstance(returned, ast.Constant) and returned.value is None
    if not nothing and "#" not in lines[returned.end_lineno - 1][returned.end_col_offset :]:
        missing.append(f"cell {cell.number}: {function.name}: no comment behind the return value")
    return missing


@each
def test_public_names_are_documented(notebook: Notebook):
    missing = []
    for cell in notebook.cells:
        for node in cell.public:
            members = [n for n in node.body if isinstance(n, ast.FunctionDef)] if isinstance(node, ast.ClassDef) else []
            for part in [node, *(m for m in members if not m.name.startswith("_") and len(m.body) > 2)]:
                doc = ast.get_docstring(part)
                if not doc or not re.search(r"[.!?:]$", doc.split("\n\n")[0].strip()):
                    missing.append(f"cell {cell.number}: {part.name}: no docstring that begins with a sentence")
                if doc and re.search(r"^(Args|Arguments|Parameters|Returns):?\s*$", doc, re.MULTILINE):
                    missing.append(f"cell {cell.number}: {part.name}: a comment behind each argument, no section")
            if not isinstance(node, ast.ClassDef):
                missing += documented(cell, node)
            for member in members:
                missing += documented(cell, member) if member.name == "__init__" else []
    assert not missing, listed(missing)


@each
def test_enough_is_asserted(notebook: Notebook):
    def does_something(node: ast.AST) -> bool:  # a class of fields alone does not
        functions = ast.FunctionDef | ast.AsyncFunctionDef
        return isinstance(node, functions) or any(isinstance(part, functions) for part in node.body)

    exported = sum(1 for cell in notebook.cells if any(does_something(node) for node in cell.public))
    asserting = [
        cell for cell in notebook.code
        if not cell.exported and any(isinstance(node, ast.Assert) for node in ast.walk(cell.tree))
    ]
    assert 2 * len(asserting) >= exported, f"{len(asserting)} asserting cells for {exported} exported ones"


@every_page
def test_no_litter(notebook: Notebook):
    assert not [cell.number for cell in notebook.cells if not cell.source.strip()], "empty cells"
    assert not [cell.number for cell in notebook.code if "nbdev_export(" in cell.source], "cells that export"
    raw = json.loads(notebook.path.read_text(encoding="utf-8"))
    assert raw["metadata"]["kernelspec"] == {"display_name": "python3", "language": "python", "name": "python3"}
    failed = [c.get("id") for c in raw["cells"] for out in c.get("outputs", ()) if out["output_type"] == "error"]
    assert not failed, "stored errors"
    outputs = [out for c in raw["cells"] for out in c.get("outputs", ())]
    assert [without_copies([out]) for out in outputs] == [[out] for out in outputs], "run make clean"


# ---- pipeline notebooks


@each_pipeline
def test_parameters(name: str):
    notebook = Notebook(NBS / f"{name}.ipynb")
    tagged = [cell for cell in notebook.cells if "parameters" in cell.tags]
    assert len(tagged) == 1, "one cell tagged parameters"
    cell = tagged[0]
    before = [c for c in notebook.code if c.number < cell.number and not c.source.startswith("#| default_exp")]
    assert not before, "the parameters come first"
    lines = cell.source.splitlines()
    for node in cell.tree.body:
        assert isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Constant), ast.unparse(node)
        assert "#" in lines[node.end_lineno - 1][node.end_col_offset :], f"no comment behind {node.target.id}"
    names = {node.target.id for node in cell.tree.body}
    asked = {key for step in STEPS.values() if step.notebook == name for key in step.parameters}
    assert {"profile", "run", "overrides"} | asked <= names
    hidden = names - set(inspect_notebook(str(notebook.path)))
    assert not hidden, f"papermill does not see {hidden}: it skips a line with a second '=', in a comment too"


@each_pipeline
def test_parameters_are_checked_first(name: str):
    notebook = Notebook(NBS / f"{name}.ipynb")
    start = next(cell.number for cell in notebook.cells if "parameters" in cell.tags)
    code = [cell for cell in notebook.code if cell.number > start]
    assert set(code[0].imports) == {"llava_ta.core"}, "first comes the import of check_params alone: it is light"
    assert re.search(r"\bsettings = check_params\(", code[1].source), "then the check"


@each_pipeline
def test_run_section_is_last_and_skipped_by_the_tests(name: str):
    notebook = Notebook(NBS / f"{name}.ipynb")
    headings = [c.number for c in notebook.cells if c.kind == "markdown" and re.search(r"^## Run\b", c.source, re.M)]
    assert len(headings) == 1, "one section '## Run'"
    below = [cell for cell in notebook.code if cell.number > headings[0]]
    assert below and all("eval: false" in cell.directives for cell in below)
    assert not [cell.number for cell in below if cell.exported], "exported cells stand above"
    above = [c.number for c in notebook.code if c.number < headings[0] and "eval: false" in c.directives]
    assert not above, "what stands above '## Run' is tested"


def test_papermill_lists_the_parameters():
    done = run_python("-m", "papermill", "--help-notebook", str(NBS / "06_train.ipynb"))
    assert done.returncode == 0
    for name in ("profile", "run", "overrides", "stage"):
        assert re.search(rf"^\s+{name}: ", done.stdout, re.MULTILINE), done.stdout


# ---- what is generated agrees with what it is generated from


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree after export and clean."""
    tree = copy_tree(tmp_path_factory.mktemp("regenerated") / "tree")
    code = (
        "from nbdev.doclinks import nbdev_export; from nbdev.clean import nbdev_clean; "
        "nbdev_export.__wrapped__(); nbdev_clean.__wrapped__()"
    )
    done = run_python("-c", code, cwd=tree, PYTHONPATH=str(tree))
    assert done.returncode == 0, done.stderr
    return tree


def test_export_is_current(regenerated: Path):
    names = {path.name for path in LIB.glob("*.py")} | {path.name for path in (regenerated / "llava_ta").glob("*.py")}
    stale = [
        name for name in sorted(names)
        if not (LIB / name).exists() or not (regenerated / "llava_ta" / name).exists()
        or (LIB / name).read_text() != (regenerated / "llava_ta" / name).read_text()
    ]
    assert not stale, f"run make export: {stale}"


def test_modules_come_from_notebooks():
    modules = {path.stem for path in LIB.glob("*.py")} - {"__init__", "_modidx"}
    assert modules == {notebook.module for notebook in ALL if notebook.module}


def test_notebooks_are_clean(regenerated: Path):
    every = [*NBS.glob("*.ipynb"), *NBS.glob("guides/*.ipynb")]
    names = sorted(path.relative_to(NBS) for path in every)
    dirty = [str(name) for name in names if (NBS / name).read_bytes() != (regenerated / "nbs" / name).read_bytes()]
    assert not dirty, f"run make clean: {dirty}"


def test_versions_agree():
    settings = configparser.ConfigParser(interpolation=None)
    settings.read(ROOT / "settings.ini")
    stated = settings["DEFAULT"]["version"]
    assert f'__version__ = "{stated}"' in (LIB / "__init__.py").read_text()
    assert re.search(rf"^## {re.escape(stated)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert version("llava_ta") == stated, "the environment holds another version: make install"


# ---- files


def test_sizes():
    assert not (found := too_large(list(tracked_files()))), listed(found)


def text_files() -> list[Path]:  # tracked
    """List the tracked files that hold text."""
    endings = {".py", ".md", ".ipynb", ".yaml", ".toml", ".ini", ".txt", ".csv", ".css", ".json", ""}
    return [path for path in tracked_files() if path.suffix in endings]


def test_no_paths_of_one_machine():
    pattern = re.compile(r"(?<![\w.:/])/(?:work|root|home/\w+|Users/\w+)/\w")
    found = [
        f"{path.relative_to(ROOT)}: {hit.group(0)}" for path in text_files() if path != Path(__file__).resolve()
        for hit in pattern.finditer(path.read_text(encoding="utf-8"))
    ]
    assert not found, listed(found)


def test_links_of_documents_exist():
    found = []
    for path in tracked_files():
        if path.suffix != ".md":
            continue
        for link in re.findall(r"\]\(([^)#\s]+)", path.read_text(encoding="utf-8")):
            if not re.match(r"https?:|mailto:", link) and not (path.parent / link).exists():
                found.append(f"{path.relative_to(ROOT)}: {link}")
    assert not found, listed(found)


def long_runs(
    text: str,  # any
    length: int = 12,  # words
) -> set[str]:  # every run of so many words
    """Cut a text into overlapping runs of words."""
    words = re.findall(r"[a-z]+", text.lower())
    return {" ".join(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_no_real_report_is_stored():
    """Open-i reports may not be redistributed: no run of twelve words from one sentence stands in a tracked file."""
    import torchxrayvision

    archive = Path(torchxrayvision.__file__).parent / "data" / "NLMCXR_reports.tgz"
    sentences: set[str] = set()
    with tarfile.open(archive) as reports:
        for member in reports:
            if member.name.endswith(".xml"):
                for part in ElementTree.parse(reports.extractfile(member)).iter("AbstractText"):
                    if part.get("Label") in ("FINDINGS", "IMPRESSION"):
                        for sentence in re.split(r"[.;:?]\s", part.text or ""):
                            sentences |= long_runs(sentence)
    assert len(sentences) > 5_000, "the reports were not read"
    found = [
        f"{path.relative_to(ROOT)}: {run}" for path in text_files()
        for run in sorted(long_runs(path.read_text(encoding="utf-8")) & sentences)[:3]
    ]
    assert not found, listed(found)


# ---- the package


def test_core_is_light():
    code = (
        "import sys, time; start = time.perf_counter(); import llava_ta.core; "
        "print(time.perf_counter() - start, sorted({'torch', 'transformers', 'pandas', 'plotly'} & set(sys.modules)))"
    )
    runs = [run_python("-c", code) for _ in range(3)]
    assert all(done.returncode == 0 for done in runs), runs[0].stderr
    assert {done.stdout.split(maxsplit=1)[1].strip() for done in runs} == {"[]"}
    assert min(float(done.stdout.split()[0]) for done in runs) < 1.0


def test_the_package_imports_itself_relatively():
    """So that a copy of it uses its own modules. nbdev rewrites imports of one line only."""
    found = []
    for path in sorted(LIB.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if "llava_ta" in {name.split(".")[0] for name in names}:
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)[:80]}: write it on one line")
    assert not found, listed(found)


def imported_from_elsewhere() -> set[str]:  # top-level names
    """Collect what the package and the notebooks import, but for the standard library."""
    pages = [*ALL, *GUIDES]
    names = {name.split(".")[0] for notebook in pages for cell in notebook.code for name in cell.imports}
    return names - set(sys.stdlib_module_names) - {"llava_ta"}


def declared(
    extra: str = "",  # nothing: what the package itself needs
) -> dict[str, Requirement]:  # normalised name -> requirement
    """Read the dependencies from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = project["optional-dependencies"][extra] if extra else project["dependencies"]
    return {re.sub(r"[-_.]+", "-", (r := Requirement(line)).name).lower(): r for line in lines}


# Needed without being imported by a module.
INDIRECT = {
    "torchvision": "by torchxrayvision and open_clip",
    "tensorboard": "the tracker of a training, by accelerate",
    "ipykernel": "runs the notebooks",
    "ipywidgets": "interactive figures in JupyterLab",
    "pyarrow": "Parquet, by pandas",
    **dict.fromkeys(
        ("pyjpegls", "pylibjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle", "python-gdcm"), "decoders of pydicom"),
}


def test_dependencies_are_declared_and_used():
    distributions = packages_distributions()
    names = {dist for name in imported_from_elsewhere() for dist in distributions.get(name, [name])}
    used, stated = {re.sub(r"[-_.]+", "-", name).lower() for name in names}, set(declared())
    assert not used - stated, f"imported but not in pyproject.toml: {used - stated}"
    assert not stated - used - set(INDIRECT), f"declared but not used: {stated - used - set(INDIRECT)}"


def test_lock_answers_every_dependency():
    lock = {}
    for line in (ROOT / "requirements" / "lock.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), line
            lock[re.sub(r"[-_.]+", "-", requirement.name).lower()] = str(requirement.specifier)[2:]
    wanted = {**declared(), **declared("dev"), **declared("lab")}
    assert not (missing := sorted(set(wanted) - set(lock))), f"not in the lock: {missing}"
    assert not (wrong := [str(r) for name, r in wanted.items() if not r.specifier.contains(lock[name])]), wrong
    if Path(sys.prefix) == ROOT / ".venv":
        other = [f"{n}: {version(n)}, locked {lock[n]}" for n in wanted if version(n).split("+")[0] != lock[n]]
        assert not other, "the environment is not the tested one (make install):" + listed(other)


def test_no_pickles():
    found = []
    for path in LIB.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import) and {alias.name for alias in node.names} & {"pickle", "dill", "shelve"}:
                found.append(f"{path.name}:{node.lineno}: {ast.unparse(node)}")
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                safe = any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
                found += [] if safe else [f"{path.name}:{node.lineno}: torch.load without weights_only=True"]
    assert not found, listed(found)


def test_ruff():
    done = run_python("-m", "ruff", "check", "llava_ta", "tests", "tools")
    assert done.returncode == 0, done.stdout
