"""The wheel: what it carries, and that it works where there is neither repository nor development extra."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from repository import LIB, ROOT, copy_tree, run_python

TRY = """
import importlib, importlib.util, pkgutil
import llava_ta
from llava_ta.core import PROFILES, load_profile, outside_inputs, preflight
from llava_ta.ontology import REGIONS, TOPICS, ontology_hash
assert not importlib.util.find_spec("nbdev") and not importlib.util.find_spec("fastcore")
assert len(REGIONS) == 7 and TOPICS and ontology_hash()
for name in PROFILES:
    load_profile(name)
assert not preflight(load_profile("tiny")).absent and not preflight(load_profile("demo")).absent
from safetensors import safe_open
inputs = {path.name: path for path in outside_inputs("segment", load_profile("openi"))}
assert set(inputs) == {"offline.safetensors", "ontology.yaml"} and inputs["ontology.yaml"].is_file()
with safe_open(inputs["offline.safetensors"], "pt") as weights:
    assert len(list(weights.keys()))
modules = [m.name for m in pkgutil.iter_modules(llava_ta.__path__) if m.name != "_modidx"]
for name in modules:
    importlib.import_module(f"llava_ta.{name}")
print("works:", len(modules), "modules from", llava_ta.__path__[0])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree."""
    tree = copy_tree(tmp_path_factory.mktemp("wheel") / "tree")
    done = run_python("-m", "build", "--wheel", "--no-isolation", cwd=tree)
    assert done.returncode == 0, done.stdout + done.stderr
    return next((tree / "dist").glob("*.whl"))


def test_wheel_carries_everything_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        licences = [name for name in names if name.endswith("licenses/LICENSE")]
        assert licences and b"Apache License" in archive.read(licences[0])
    carried = {name for name in names if ".dist-info/" not in name}
    wanted = {
        str(path.relative_to(ROOT)) for path in LIB.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert carried == wanted
    for needed in ("llava_ta/ontology.yaml", "llava_ta/profiles/tiny.yaml", "llava_ta/front/room.js"):
        assert needed in carried
    assert any(re.fullmatch(r"llava_ta/weights/\w+\.safetensors", name) for name in carried)


@pytest.mark.slow
def test_wheel_in_a_clean_environment(wheel: Path, tmp_path: Path):
    """Needs an index of packages, and about 7 GB of disk (`TORCH_INDEX` makes that 2, as for `make install`)."""
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "clean"], check=True)
    python = tmp_path / "clean" / "bin" / "python"
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    lock = ROOT / "requirements" / "lock.txt"
    if index := os.environ.get("TORCH_INDEX"):
        torch = re.findall(r"^(?:torch|torchvision)==[^ ;\n]+", lock.read_text(encoding="utf-8"), re.MULTILINE)
        subprocess.run([*pip, "--no-deps", "--index-url", index, *torch], check=True, env=environment)
    done = subprocess.run([*pip, "--constraint", lock, wheel], capture_output=True, text=True, env=environment)
    if re.search(r"NewConnectionError|Temporary failure in name resolution", done.stderr):
        pytest.skip("no package index can be reached: the wheel has NOT been tried in a clean environment")
    assert done.returncode == 0, done.stderr
    tried = subprocess.run([python, "-c", TRY], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert tried.returncode == 0, tried.stderr
    assert "works:" in tried.stdout and str(tmp_path) in tried.stdout
