"""Write requirements/lock.txt from the versions installed in the running environment.

Run it in an environment whose tests have just passed: `.venv/bin/python tools/write_lock.py`.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "lock.txt"
HEADER = """\
# The versions that were tested together, written by tools/write_lock.py.
# `make install` passes this file to pip as constraints: what gets installed is what pyproject.toml asks for,
# and every version comes from here. A line for another platform, or for CUDA, counts only where it is needed.
"""
NOT_LOCKED = {"pip", "llava-ta"}
# Packages that the machine which writes the lock does not install itself.
ELSEWHERE = [
    'aiohappyeyeballs==2.7.1 ; python_version == "3.12"',
    'aiohttp==3.14.5 ; python_version == "3.12"',
    'aiosignal==1.4.0 ; python_version == "3.12"',
    'appnope==1.0.0 ; platform_system == "Darwin"',
    'frozenlist==1.8.0 ; python_version == "3.12"',
    'multidict==7.2.1 ; python_version == "3.12"',
    'propcache==0.5.4 ; python_version == "3.12"',
    'yarl==1.25.1 ; python_version == "3.12"',
]


def normalised(
    name: str,  # a distribution's name
) -> str:  # the name as package indexes compare it
    """Lower the case of a distribution's name and write its separators as one dash."""
    return re.sub(r"[-_.]+", "-", name).lower()


def marker(
    name: str,  # a normalised name
) -> str:  # " ; ..." or nothing
    """Name the platform that a package is confined to."""
    linux_only = name.startswith(("nvidia-", "cuda-")) or name == "triton"
    return ' ; platform_system == "Linux"' if linux_only else ""


def lock_lines() -> list[str]:  # one requirement each, sorted
    """List the installed distributions as exact requirements."""
    installed = {normalised(d.metadata["Name"]): d.version.split("+")[0] for d in distributions()}
    lines = {
        name: f"{name}=={version}{marker(name)}" for name, version in installed.items() if name not in NOT_LOCKED
    }
    for line in ELSEWHERE:
        lines.setdefault(line.split("==")[0], line)
    return [lines[name] for name in sorted(lines)]


if __name__ == "__main__":
    if sys.prefix == sys.base_prefix:
        sys.exit("tools/write_lock.py: run it with the Python of a virtual environment, e.g. .venv/bin/python")
    LOCK.parent.mkdir(exist_ok=True)
    LOCK.write_text(HEADER + "\n".join(lock_lines()) + "\n", encoding="utf-8")
    print(f"{LOCK.relative_to(ROOT)}: {len(lock_lines())} packages")
