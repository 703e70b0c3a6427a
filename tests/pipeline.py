"""Running notebooks, through papermill or in this process, and reading what they leave behind."""

import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
import psutil

from llava_ta.pipeline import without_examples
from repository import NBS, ROOT


@dataclass(frozen=True)
class Ran:
    """A notebook that has been run."""

    status: int  # exit code
    said: str  # all that came out
    seconds: float  # by the clock
    worked: float  # seconds of processor time, of the kernel too: what the clock shows where nothing else is running


def command(
    name: str,  # a notebook, without its ending
    output: Path,  # where the executed notebook goes
    **parameters: object,  # papermill's
) -> list[str]:
    """Write papermill's command line."""
    pairs = [text for key, value in parameters.items() for text in ("-p", key, str(value))]
    quiet = ["--no-progress-bar", "--log-level", "WARNING"]
    return [sys.executable, "-m", "papermill", str(NBS / f"{name}.ipynb"), str(output), *pairs, *quiet]


def surroundings(
    runs: Path,  # the folder of runs
) -> dict[str, str]:  # environment variables
    """Let the notebooks write below a folder, with one thread each."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "LLAVA_TA_RUNS": str(runs), "OMP_NUM_THREADS": "1"}


def spent() -> float:
    """Processor time of all child processes that have ended, in seconds."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def execute(
    words: list[str],  # a command
    runs: Path,  # the folder of runs
    timeout: float,  # seconds
) -> Ran:
    """Run a command to its end."""
    runs.mkdir(parents=True, exist_ok=True)
    start, before = time.monotonic(), spent()
    done = subprocess.run(
        words, cwd=ROOT, env=surroundings(runs), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        timeout=timeout,
    )
    return Ran(done.returncode, done.stdout, time.monotonic() - start, spent() - before)


def papermill(
    name: str,  # a notebook, without its ending
    runs: Path,  # the folder of runs
    timeout: float = 600,  # seconds
    **parameters: object,  # papermill's
) -> Ran:
    """Run a notebook to its end."""
    words = [*command(name, runs / f"{name}.out.ipynb", **parameters), "--stdout-file", "/dev/stdout"]
    return execute(words, runs, timeout)


def pipeline(
    runs: Path,  # the folder of runs
    profile: str,  # its name
    overrides: str = "",  # changes to it
) -> Ran:
    """Run all notebooks that have something to do, as `make demo` does."""
    words = ["--profile", profile, "--overrides", overrides]
    return execute([sys.executable, "-m", "llava_ta.pipeline", *words], runs, 600)


def chapter(
    name: str,  # a notebook, without its ending
    **parameters: object,  # papermill's
) -> dict[str, object]:  # its names and their values at the end
    """Run a notebook's cells in this process, without its examples; raises what they raise.

    What papermill adds, a process of its own that imports everything anew, is tested where it matters."""
    names: dict[str, object] = {"__name__": __name__, "display": lambda *shown: None}
    for cell in without_examples(nbformat.read(NBS / f"{name}.ipynb", as_version=4)).cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, f"{name}.ipynb", "exec"), names)  # noqa: S102, our own cells
        if "parameters" in cell.metadata.get("tags", []):
            assert set(parameters) <= set(names), f"{name} lacks a parameter of {list(parameters)}"
            names.update(parameters)
    return names


def kill_tree(
    process: subprocess.Popen,  # papermill
) -> None:
    """SIGKILL a process and all its descendants: the kernel runs in a session of its own."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()
    psutil.wait_procs(family, timeout=30)
