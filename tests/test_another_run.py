"""The pipeline without a finished run: what is refused at once, what is absent, other settings, two at a time."""

import re
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from llava_ta.core import read_json, ref
from pipeline import Ran, command, papermill, surroundings
from repository import ROOT, run_python


@pytest.mark.parametrize(
    ("parameters", "allowed"),
    [
        ({"stage": 3}, r"stage=3: allowed are 1, 2"),
        ({"profile": "nonsense"}, r"profile='nonsense': allowed are tiny, demo, openi, study, paper, llava-rad"),
        ({"overrides": "train.stage2.epoch=1"}, r"train\.stage2\.epoch: unknown key"),
        ({"overrides": "lora.rank=0"}, r"lora\.rank: .*greater than or equal to 1"),
        ({"run": "../elsewhere"}, r"run='\.\./elsewhere'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_parameters_fail_at_once(tmp_path: Path, parameters: dict, allowed: str):
    ran = papermill("06_train", tmp_path, **parameters)
    assert ran.status != 0
    assert 1 < ran.worked < 15, f"{ran.worked:.0f} s of processor time, {ran.seconds:.0f} s by the clock"
    assert re.search(allowed, ran.said), ran.said[-2000:]
    assert [path.name for path in tmp_path.iterdir()] == ["06_train.out.ipynb"], "nothing else is written"


@pytest.mark.parametrize("profile", ["paper", "llava-rad", "openi"])
def test_what_is_absent_is_listed(profile: str):
    code = f"from llava_ta.core import load_profile, preflight; print(preflight(load_profile({profile!r})))"
    done = run_python("-c", code, LLAVA_TA_OPENI_DIR="", LLAVA_TA_MIMIC_DIR="")
    assert done.returncode == 0, done.stderr
    assert re.search(r"absent: data\.dir", done.stdout) and re.search(r"needs: .* GB of disk", done.stdout)


def test_a_run_stops_where_data_is_absent(tmp_path: Path):
    ran = papermill("11_reproduce", tmp_path, profile="paper")
    assert ran.status != 0 and "absent: data.dir" in ran.said, ran.said[-2000:]


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


def test_other_wiring_runs_to_the_same_page(trained: Ran, runs: Path):
    """One system instead of three, a language model from a folder, tuned whole, in half precision."""
    base = runs / "tiny" / "lm"
    wanted = f"train.modes=[topic], train.tune=full, train.dtype=bfloat16, lm.checkpoint={base}, lm.pretrain=null"
    line = ("-m", "llava_ta.reproduce", "--profile", "tiny", "--run", "other", "--overrides", wanted)
    done = run_python(*line, PYTHONPATH=str(ROOT), LLAVA_TA_RUNS=str(runs), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert (runs / "other" / "report.html").read_text(encoding="utf-8").count("Not drawn") == 2
    first, second = (runs / "other" / ref("train", mode="topic", stage=stage, seed=0).folder for stage in (1, 2))
    assert read_json(first / "config.json")["lm_checkpoint"] == str(base) and not (first / "lm").exists()
    config = read_json(second / "config.json")
    assert (config["lm_checkpoint"], config["adapter"], config["dtype"]) == ("", False, "bfloat16")
    tuned, start = (load_file(folder / "model.safetensors") for folder in (second / "lm", base))
    changed = [name for name, weight in tuned.items() if not weight.float().allclose(start[name].bfloat16().float())]
    assert len(changed) > len(tuned) / 2, "what was learned is in the checkpoint"
