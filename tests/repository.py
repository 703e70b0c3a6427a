"""What the tests need to know about the repository: its files, its notebooks and their cells."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
LIB = ROOT / "llava_ta"


@dataclass(frozen=True)
class Cell:
    """One cell of a notebook."""

    number: int  # from 0
    kind: str  # "code" or "markdown"
    source: str  # as it stands
    tags: tuple[str, ...]  # papermill's are among them

    @cached_property
    def directives(self) -> tuple[str, ...]:
        """The `#|` lines, without their mark."""
        return tuple(re.findall(r"^#\|\s*(.+?)\s*$", self.source, re.MULTILINE)) if self.kind == "code" else ()

    @property
    def exported(self) -> bool:
        """Whether the cell becomes part of a module."""
        return any(name.split()[0] in ("export", "exports", "exporti") for name in self.directives)

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed code, without magics."""
        return ast.parse(re.sub(r"^[%!].*$", "", self.source, flags=re.MULTILINE) if self.kind == "code" else "")

    @cached_property
    def imports(self) -> tuple[str, ...]:
        """The modules that are imported anywhere in the cell."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                found.append("." * node.level + (node.module or ""))
        return tuple(found)

    @cached_property
    def public(self) -> tuple[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, ...]:
        """The functions and classes without a leading underscore that an exported cell defines."""
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        return tuple(n for n in self.tree.body if self.exported and isinstance(n, kinds) and not n.name.startswith("_"))

    @cached_property
    def code_lines(self) -> int:
        """Lines of code. Comments, blank lines, docstrings and tables of constants do not count.

        A signature counts as one line: its others document an argument each.
        """
        text, left_out, lines = self.source.splitlines(), set(), set()
        for node in ast.walk(self.tree):
            if hasattr(node, "lineno"):
                lines |= set(range(node.lineno, node.end_lineno + 1))
            body = getattr(node, "body", None)
            first = body[0] if isinstance(body, list) and body else None
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                left_out |= set(range(node.lineno + 1, first.lineno))
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                left_out |= set(range(first.lineno, first.end_lineno + 1))
        for node in self.tree.body:
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Dict | ast.List | ast.Tuple):
                left_out |= set(range(node.lineno, node.end_lineno + 1))
        return sum(1 for n in lines - left_out if text[n - 1].strip() and not text[n - 1].strip().startswith("#"))


@dataclass(frozen=True)
class Notebook:
    """A notebook of nbs/."""

    path: Path

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All cells, in order."""
        raw = json.loads(self.path.read_text(encoding="utf-8"))["cells"]
        return tuple(
            Cell(number, cell["cell_type"], "".join(cell["source"]), tuple(cell["metadata"].get("tags", ())))
            for number, cell in enumerate(raw)
        )

    @cached_property
    def module(self) -> str:
        """The module that the notebook writes, or nothing."""
        for cell in self.cells:
            for directive in cell.directives:
                if directive.startswith("default_exp "):
                    return directive.split()[1]
        return ""

    @property
    def code(self) -> tuple[Cell, ...]:
        """The code cells."""
        return tuple(cell for cell in self.cells if cell.kind == "code")


def notebooks() -> list[Notebook]:  # the numbered ones, in the order in which data flows
    """List the chapters: the notebooks without the index."""
    return [Notebook(path) for path in sorted(NBS.glob("*.ipynb")) if path.stem != "index"]


def guides() -> list[Notebook]:  # tutorial, how-to guides, limits
    """List the notebooks that write no module and are read on their own."""
    return [Notebook(path) for path in sorted(NBS.glob("guides/*.ipynb"))]


@lru_cache(maxsize=1)
def tracked_files() -> tuple[Path, ...]:  # absolute
    """List the files that belong to the repository: what git tracks or would track."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        raise RuntimeError(f"the tests of the repository need a git checkout: {listed.stderr.strip()}")
    return tuple(path for name in sorted(set(listed.stdout.split("\0"))) if name and (path := ROOT / name).is_file())


def copy_tree(
    target: Path,  # a folder that does not exist yet
) -> Path:  # the copy's root
    """Copy the repository's files, so that a test may change them."""
    for path in tracked_files():
        copied = target / path.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, copied)
        copied.chmod(copied.stat().st_mode | 0o200)
    return target


def run_python(
    *arguments: str,  # after the interpreter
    cwd: Path = ROOT,  # where
    timeout: float = 600,  # seconds
    **environment: str,  # added to the present one
) -> subprocess.CompletedProcess:  # with text output, whatever the exit code
    """Run the Python of this environment, with its programs first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=timeout,
        env={**os.environ, "PATH": path, **environment},
    )


def launch(
    processes: int,  # on the CPU of this machine
) -> tuple[str, ...]:  # arguments of the interpreter, before those of the program
    """Let accelerate start several processes of a program.

    Without MPI its `--cpu` starts one, however many are asked for; `--multi_gpu` starts them all, GPUs or not."""
    return ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", str(processes),
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
