"""The pipeline without a finished run: what is refused at once, what is absent, other settings, two at a time."""

import re
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llava_ta.core import load_profile, preflight, read_json, ref
from llava_ta.reproduce import main
from pipeline import Ran, chapter, command, papermill, surroundings
from repository import ROOT


@pytest.mark.parametrize(("parameters", "allowed"), [
    ({"stage": 3}, r"stage=3: allowed are 1, 2"),
    ({"profile": "nonsense"}, r"profile='nonsense': allowed are tiny, demo, openi, study, paper, llava-rad"),
], ids=["stage", "profile"])
def test_wrong_parameters_fail_at_once(tmp_path: Path, parameters: dict, allowed: str):
    ran = papermill("06_train", tmp_path, **parameters)
    assert ran.status != 0
    assert 1 < ran.worked < 15, f"{ran.worked:.0f} s of processor time, {ran.seconds:.0f} s by the clock"
    assert re.search(allowed, ran.said), ran.said[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["06_train.out.ipynb"], "nothing else is written"


@pytest.mark.parametrize(("parameters", "message"), [
    ({"overrides": "train.stage2.epoch=1"}, r"train\.stage2\.epoch: unknown key"),
    ({"overrides": "lora.rank=0"}, r"lora\.rank: .*greater than or equal to 1"),
    ({"run": "../elsewhere"}, r"run='\.\./elsewhere'"),
], ids=["key", "value", "run"])
def test_wrong_settings_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameters: dict, message: str):
    monkeypatch.setenv("LLAVA_TA_RUNS", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        chapter("06_train", **parameters)
    assert not list(tmp_path.iterdir()), "nothing is written"


@pytest.fixture
def without_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Name no folder of films; returns the folder of runs."""
    for name, place in {"OPENI_DIR": "", "MIMIC_DIR": "", "RUNS": str(tmp_path)}.items():
        monkeypatch.setenv(f"LLAVA_TA_{name}", place)
    return tmp_path


@pytest.mark.parametrize("profile", ["paper", "llava-rad", "openi"])
def test_what_is_absent_is_listed(without_data: Path, profile: str):
    said = str(preflight(load_profile(profile)))
    assert re.search(r"absent: data\.dir", said) and re.search(r"needs: .* GB of disk", said)


def test_a_run_stops_where_data_is_absent(without_data: Path):
    with pytest.raises(FileNotFoundError, match=r"absent: data\.dir"):
        chapter("11_reproduce", profile="paper")
    assert not (without_data / "paper" / "data" / "record.json").exists()


def test_two_processes_share_the_work(tmp_path: Path):
    """The second waits for the first, and neither makes what the other has made."""
    both = [
        subprocess.Popen(
            command("02_decompose", tmp_path / f"out{number}.ipynb"), cwd=ROOT, env=surroundings(tmp_path),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for number in (1, 2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert (tmp_path / "tiny" / "decompose" / "record.json").exists()


def test_other_wiring_runs_to_the_same_page(trained: Ran, runs: Path, monkeypatch: pytest.MonkeyPatch):
    """One system instead of three, a language model from a folder, tuned whole, in half precision."""
    base = runs / "tiny" / "lm"
    wanted = f"train.modes=[topic], train.tune=full, train.dtype=bfloat16, lm.checkpoint={base}, lm.pretrain=null"
    monkeypatch.setenv("LLAVA_TA_RUNS", str(runs))
    main(["--profile", "tiny", "--run", "other", "--overrides", wanted])
    assert (runs / "other" / "report.html").read_text(encoding="utf-8").count("Not drawn") == 2
    first, second = (runs / "other" / ref("train", mode="topic", stage=stage, seed=0).folder for stage in (1, 2))
    assert read_json(first / "config.json")["lm_checkpoint"] == str(base) and not (first / "lm").exists()
    config = read_json(second / "config.json")
    assert (config["lm_checkpoint"], config["adapter"], config["dtype"]) == ("", False, "bfloat16")
    tuned, start = (load_file(folder / "model.safetensors") for folder in (second / "lm", base))
    changed = [name for name, weight in tuned.items() if not weight.float().allclose(start[name].bfloat16().float())]
    assert len(changed) > len(tuned) / 2, "what was learned is in the checkpoint"
