"""Training in several processes, and training that is killed: the results are those of one that was left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from torch import nn

from llava_ta import generate, trainer
from llava_ta.core import ScheduleSettings
from llava_ta.train import main
from llava_ta.trainer import Part, train
from repository import ROOT, launch, run_python

TWENTY = "lm.pretrain.epochs=2, train.stage1.epochs=1, train.stage2.epochs=4, train.stage2.batch=2, lora.dropout=0"


def trained(runs: Path, *command: str, overrides: str = TWENTY) -> Path:
    """Train the anatomy mode of the tiny profile, in this process or from a command line; returns the run's folder."""
    options = ("--run", "r", "--overrides", overrides)
    if command:
        done = run_python(*command, "-m", "llava_ta.train", *options, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1",
                          LLAVA_TA_RUNS=str(runs))
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LLAVA_TA_RUNS", str(runs))
            main(options)
    return runs / "r"


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every weight that stage 2 learned."""
    files = [checkpoint / "projector.safetensors", checkpoint / "adapter" / "adapter_model.safetensors"]
    return {f"{file.name} {name}": weight for file in files for name, weight in load_file(file).items()}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a single process."""
    return trained(tmp_path_factory.mktemp("one"))


def test_two_processes_train_as_one(one: Path, tmp_path: Path):
    """Tower, language model, features, stage 1 and 2 under `accelerate launch`: curves and weights within 1e-5."""
    two = trained(tmp_path / "two", *launch(2))
    for part in ("tower", "lm", "train/anatomy-stage1-seed0", "train/anatomy-stage2-seed0"):
        curves = [pd.read_parquet(run / part / "curve.parquet") for run in (one, two)]
        assert len(curves[0]) == len(curves[1]) > 3
        assert np.allclose(curves[0].loss, curves[1].loss, atol=1e-5), part
        assert (curves[0].tokens * (2 if part == "tower" else 1) == curves[1].tokens).all()
    checkpoints = [run / "train/anatomy-stage2-seed0" for run in (one, two)]
    assert len(pd.read_parquet(checkpoints[0] / "curve.parquet")) >= 20
    here, there = map(weights_of, checkpoints)
    assert here.keys() == there.keys()
    assert max(float((here[name] - there[name]).abs().max()) for name in here) < 1e-5
    metrics = [json.loads((path / "record.json").read_text())["metrics"] for path in checkpoints]
    assert [found["processes"] for found in metrics] == [1, 2]
    assert abs(metrics[0]["valid_loss"] - metrics[1]["valid_loss"]) < 1e-5


def test_the_tower_may_run_inside_the_step(one: Path, tmp_path: Path):
    """Without a feature store, training and what it learns are the same up to rounding."""
    live = trained(tmp_path, overrides=f"{TWENTY}, tower.features=live")
    assert sorted(path.name for path in (live / "features").glob("*.safetensors")) == ["black.safetensors"]
    here, there = (pd.read_parquet(run / "train/anatomy-stage2-seed0/curve.parquet").loss for run in (one, live))
    assert len(here) == len(there) and np.allclose(here, there, atol=1e-3)


GENERATE = f"""
from llava_ta import generate
from llava_ta.core import Run, check_params
generate.PART = 3
run = Run(check_params(profile="tiny", run="r", overrides={TWENTY!r}))
run.make("generate", mode="anatomy", stage=2, seed=0, film="real")
"""


def test_two_processes_generate_as_one(one: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Under `accelerate launch` the studies are shared, and nobody's sentence is lost or changed."""
    (tmp_path / "work.py").write_text(GENERATE)
    shutil.copytree(one, tmp_path / "two" / "r")
    done = run_python(*launch(2), str(tmp_path / "work.py"), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1",
                      LLAVA_TA_RUNS=str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    monkeypatch.setattr(generate, "PART", generate.PART)  # put back at the end
    monkeypatch.setenv("LLAVA_TA_RUNS", str(one.parent))
    exec(GENERATE, {})  # noqa: S102, our own text
    here, there = (pd.read_parquet(run / "generate/anatomy-stage2-seed0-real/predictions.parquet")
                   for run in (one, tmp_path / "two" / "r"))
    assert len(here) > 20 and here.drop(columns="score").equals(there.drop(columns="score"))
    assert np.allclose(here.score, there.score, atol=1e-5)


PART = """
import atexit
import torch
from llava_ta.core import launched
atexit.register(lambda: print("still joined" if torch.distributed.is_initialized() else "parted"))
launched().wait()
"""


def test_processes_part_before_they_end(tmp_path: Path):
    """Threads between them that outlive the interpreter abort or hang a run that is finished."""
    (tmp_path / "part.py").write_text(PART)
    done = run_python(*launch(2), str(tmp_path / "part.py"), PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("parted") == 2 and "joined" not in done.stdout, done.stdout  # lines may run together


OFTEN = """
import sys
from llava_ta import trainer
trainer.PATIENCE, trainer.SHARE = 0.0, 0
from llava_ta.train import main
main(sys.argv[1:])
"""


def start(runs: Path, overrides: str) -> subprocess.Popen:
    """Start a training that keeps its state after every step."""
    around = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LLAVA_TA_RUNS": str(runs)}
    command = [sys.executable, "-c", OFTEN, "--run", "r", "--overrides", overrides]
    return subprocess.Popen(command, env=around, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_at(process: subprocess.Popen, run: Path, step: int) -> None:
    """Kill a training as soon as it has kept this step of stage 2, or a later one."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        states = list(run.glob("train/.anatomy-stage2-seed0.*/resume/state-*"))
        if any(int(state.name.removeprefix("state-")) >= step for state in states):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.005)
    raise AssertionError(f"never came to step {step}: {process.communicate()[1][-2000:]}")


@pytest.mark.slow
def test_killed_training_ends_at_the_same_weights(tmp_path: Path):
    """Three kills at random steps, dropout on; in between, other settings are refused by name."""
    settings = TWENTY.replace("lora.dropout=0", "lora.dropout=0.1")
    process = start(tmp_path / "whole", settings)
    assert process.wait(300) == 0, process.stderr.read()[-3000:]
    checkpoint = "r/train/anatomy-stage2-seed0"
    wanted = weights_of(tmp_path / "whole" / checkpoint)
    steps = sorted(random.Random(0).sample(range(2, 18), 3))
    for step in steps:
        kill_at(start(tmp_path / "killed", settings), tmp_path / "killed" / "r", step)
    other = start(tmp_path / "killed", settings.replace("dropout=0.1", "dropout=0.2"))
    refusal = other.communicate()[1]
    assert other.returncode and "lora.dropout was 0.1 and is 0.2" in refusal, refusal[-2000:]
    last = start(tmp_path / "killed", settings)
    assert last.wait(300) == 0, last.stderr.read()[-3000:]
    found = weights_of(tmp_path / "killed" / checkpoint)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not (tmp_path / "killed" / checkpoint / "resume").exists()


@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed", "nodes"])
def test_configurations_are_read(name: str):
    """accelerate knows every key, and the file says how it is called."""
    path = ROOT / "configs" / f"{name}.yaml"
    found = load_config_from_file(str(path))
    assert found.distributed_type.value == {"fsdp": "FSDP", "deepspeed": "DEEPSPEED"}.get(name, "MULTI_GPU")
    assert "-m llava_ta.train" in path.read_text(encoding="utf-8")


class Point(nn.Module):
    """One weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, at: torch.Tensor) -> torch.Tensor:
        return (self.weight * at).sum(1).square()


def points(step: int) -> Sequence[Part]:
    """Three points, drawn by the step."""
    at = torch.randn(3, 3, generator=torch.Generator().manual_seed(step))
    return [Part(3, lambda: {"at": at})]


def test_full_disk_keeps_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A state that cannot be written whole does not replace the one before it, and training goes on from there."""
    monkeypatch.setattr(trainer, "PATIENCE", 0.0)
    monkeypatch.setattr(trainer, "SHARE", 0)
    settings, save = ScheduleSettings(epochs=1, batch=3, lr=0.1), Accelerator.save_state
    whole = Point()
    train(whole, points, 12, settings, "whole")

    def full(self: Accelerator, folder: Path) -> None:
        save(self, folder)
        if folder.name.endswith("5"):
            (folder / "model.safetensors").write_bytes(b"half")
            raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(Accelerator, "save_state", full)
    with pytest.raises(OSError, match="No space left"):
        train(Point(), points, 12, settings, "full disk", tmp_path)
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-00000004"]
    monkeypatch.setattr(Accelerator, "save_state", save)
    again = Point()
    curve = train(again, points, 12, settings, "room again", tmp_path).curve
    assert torch.equal(again.weight, whole.weight) and curve.step.tolist() == list(range(12))
    assert [path.name for path in tmp_path.iterdir()] == ["state-00000012"]


# ---- several GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["ddp", "fsdp", "deepspeed"])
def test_two_gpus_train_as_one_process(tmp_path: Path, name: str):
    """Copies, shards and ZeRO-2 on two GPUs follow the curve of one process."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"fewer than two CUDA devices: configs/{name}.yaml has NOT been tested")
    if name == "deepspeed":
        pytest.importorskip("deepspeed", reason="not installed: configs/deepspeed.yaml has NOT been tested")
    one = trained(tmp_path / "one")
    config = ("-m", "accelerate.commands.launch", "--config_file", str(ROOT / "configs" / f"{name}.yaml"))
    two = trained(tmp_path / "two", *config, "--num_processes", "2")
    curves = [pd.read_parquet(run / "train/anatomy-stage2-seed0/curve.parquet") for run in (one, two)]
    assert np.allclose(curves[0].loss, curves[1].loss, rtol=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("setting", ["train.dtype=bfloat16", "train.checkpointing=true", "lm.bits=4", "lm.bits=8"])
def test_saving_memory_on_a_gpu(tmp_path: Path, setting: str):
    """Half precision, checkpointing and quantised weights learn, too."""
    if not torch.cuda.is_available():
        pytest.skip(f"no CUDA device: {setting} has NOT been tested")
    base = trained(tmp_path / "base")
    more = f"lm.checkpoint={base / 'lm'}, lm.pretrain=null, " if "bits" in setting else ""
    run = trained(tmp_path / "run", overrides=f"{TWENTY}, {more}{setting}")
    curve = pd.read_parquet(run / "train/anatomy-stage2-seed0/curve.parquet")
    assert curve.loss.iloc[-5:].mean() < curve.loss.iloc[:5].mean()
