"""Segmenters and the mask store: published networks, many films, many processes, and what is no chest film."""

import os
import random
import resource
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
from PIL import Image
from scipy import ndimage
from torchxrayvision.baseline_models import chestx_anatomy, chestx_det

import slow_segmenter
from llava_ta.films import Fit, read_film
from llava_ta.mask_speed import threads
from llava_ta.masks import MaskStore, MaskWriter, RegionMasks, encode_masks, merge_masks
from llava_ta.ontology import REGIONS
from llava_ta.phantom import Finding, draw, sample_findings
from llava_ta.published import CHESTX_DET_GROUPS, CXAS_GROUPS, CxasSegmenter
from llava_ta.segment import get_segmenter, write_shard
from miniature import cxas_file
from repository import ROOT, launch, run_python

STORE_FILES = ("masks.safetensors", "masks.parquet", "films.parquet", "masks.json")


def phantom_film(seed: int, size: int = 192, findings: Sequence[Finding] | None = None) -> np.ndarray:
    """Draw a phantom that no training saw."""
    shown = sample_findings(np.random.default_rng(seed)) if findings is None else findings
    return draw(list(shown), 930_000 + seed, size=size).film


def same_store(one: Path, other: Path) -> list[str]:
    """Files of two mask stores that differ."""
    return [name for name in STORE_FILES if (one / name).read_bytes() != (other / name).read_bytes()]


# ---- published networks


def cxas_names() -> list[str]:
    """Spell out the 159 classes as CXAS's authors list them."""
    def ordinal(n: int) -> str:
        return {1: "1st", 2: "2nd", 3: "3rd"}.get(n, f"{n}th")

    vertebrae = [f"vertebrae {part}{n}" for part, last in (("C", 7), ("T", 12), ("L", 5)) for n in range(1, last + 1)]
    both = [f"{name}{side}" for name in ("clavicle", "scapula") for side in ("s", " left", " right")]
    ribs = [f"{where} {ordinal(n)} rib {side}" for n in range(11, 0, -1) for side in ("right", "left")
            for where in ("anterior", "posterior")]
    joint = [f"{where} {ordinal(n)} rib" for n in range(11, 0, -1) for where in ("posterior", "anterior")]
    zones = [f"{side} {zone}" for side in ("right", "left")
             for zone in ("upper zone lung", "mid zone lung", "lung base", "apical zone lung")]
    return [
        "spine", "cervical spine", "thoracic spine", "lumbar spine", *vertebrae, "rib_cartilage", "sternum", *both,
        "posterior 12th rib right", "posterior 12th rib left", *ribs, "12th rib", *joint, "diaphragm",
        "left hemidiaphragm", "right hemidiaphragm", "stomach", "small bowel", "duodenum", "liver", "pancreas",
        "kidney left", "kidney right", "cardiomediastinum", "upper mediastinum", "lower mediastinum",
        "anterior mediastinum", "middle mediastinum", "posterior mediastinum", "heart", "heart atrium left",
        "heart atrium right", "heart myocardium", "heart ventricle left", "heart ventricle right", "aorta",
        "ascending aorta", "descending aorta", "aortic arch", "pulmonary artery", "inferior vena cava", "esophagus",
        "lung", "right lung", "left lung", "lung base", "mid zone lung", "upper zone lung", "apical zone lung", *zones,
        "lung lower lobe left", "lung upper lobe left", "lung lower lobe right", "lung middle lobe right",
        "lung upper lobe right", "trachea", "tracheal bifurcation", "breast", "breast left", "breast right",
    ]


@pytest.fixture(scope="module")
def cxas_net() -> torch.nn.Module:
    """CXAS with random weights, of which the last layer answers neither all nor nothing."""
    torch.manual_seed(3)
    return chestx_anatomy.UNetResNet50(weights=False)


def test_cxas_classes(cxas_net: torch.nn.Module):
    names = cxas_names()
    assert len(names) == 159 and list(cxas_net.targets) == names == list(chestx_anatomy.TARGETS)
    grouped = {region: [names[number] for number in numbers] for region, numbers in CXAS_GROUPS.items()}
    assert all(name.startswith("vertebrae ") for name in grouped["vertebrae"]) and len(grouped["vertebrae"]) == 24
    assert all(" rib " in name for name in grouped["ribs"]) and len(grouped["ribs"]) == 46
    every = [number for numbers in CXAS_GROUPS.values() for number in numbers]
    assert len(every) == len(set(every)), "no structure belongs to two regions"


def by_hand(predictions: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Group, drop islands of at most 3,000 of 512 x 512 pixels but the largest, and stretch, without our code."""
    layers = []
    for numbers in (range(4, 28), range(36, 82), range(105, 108), range(115, 121), range(108, 115), range(121, 127),
                    (135, 136)):
        union = np.zeros((512, 512), bool)
        for number in numbers:
            union |= predictions[number]
        pieces, count = ndimage.label(union, np.ones((3, 3)))
        areas = [int((pieces == piece).sum()) for piece in range(1, count + 1)]
        for piece, area in enumerate(areas, 1):
            if area <= 3000 and piece - 1 != int(np.argmax(areas)):
                union[pieces == piece] = False
        layers.append(union)
    rows, columns = (((2 * np.arange(n) + 1) * 512 // (2 * n)) for n in shape)
    return np.stack(layers)[:, rows][:, :, columns]


@pytest.mark.parametrize("shape", [(300, 200), pytest.param((512, 512), marks=pytest.mark.slow)])
def test_cxas_equals_an_independent_computation(
    cxas_net: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int]
):
    """On random weights in the layout of the authors, masks are theirs bit by bit."""
    monkeypatch.setattr("llava_ta.plausibility.explain", lambda found, film, again: found)  # spares four more passes
    weights = cxas_file(tmp_path / "cxas.pth", cxas_net)
    square = phantom_film(1, size=300)
    film = np.asarray(Image.fromarray(square).resize(shape[::-1], Image.Resampling.BILINEAR)).clip(0, 1)
    segmenter = CxasSegmenter(weights)
    rows, columns = (np.arange(512) * n // 512 for n in shape)
    squashed = film[rows][:, columns].astype(np.float32)
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    image = (np.stack([squashed] * 3) - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        logits = cxas_net({"data": torch.from_numpy(image)[None]})["logits"][0]
    wanted = (1 / (1 + np.exp(-logits.double().numpy()))) > 0.5
    clear = np.abs(logits.numpy()) > 1e-5  # beside the threshold the last bit of a float decides
    with torch.no_grad():
        found = segmenter.predict(film)
    assert np.array_equal(found[clear], wanted[clear]) and clear.mean() > 0.999
    masks = segmenter.segment([film])[0]
    assert masks.convention == "cxas" and np.array_equal(masks.masks, by_hand(found, shape))


@pytest.mark.slow
def test_chestx_det_equals_the_library(tmp_path: Path):
    """The library's own class, filled with the same random weights, gives the same masks."""
    from torchxrayvision.baseline_models.chestx_det.ptsemseg.pspnet import pspnet

    torch.manual_seed(4)
    name = "pspnet_chestxray_best_model_4.pth"
    torch.save({f"module.{key}": value for key, value in pspnet(14).state_dict().items()}, tmp_path / name)
    theirs = chestx_det.PSPNet(cache_dir=str(tmp_path))
    ours = get_segmenter("chestx-det", tmp_path / name, device="cpu")
    film = phantom_film(2, size=200)
    with torch.no_grad():
        logits = theirs(torch.from_numpy(film)[None, None] * 2048 - 1024)[0].numpy()
        found = ours.predict(film)
    clear = np.abs(logits) > 1e-3
    assert found.shape == logits.shape and np.array_equal(found[clear], logits[clear] > 0) and clear.mean() > 0.9
    masks = ours.segment([film])[0]
    assert masks.status[REGIONS.index("ribs")] == masks.status[REGIONS.index("abdomen")] == "empty"
    assert [theirs.targets[n] for n in CHESTX_DET_GROUPS["lungs"]] == ["Left Lung", "Right Lung"]


def test_a_damaged_checkpoint_is_refused_key_by_key(cxas_net: torch.nn.Module, tmp_path: Path):
    state = dict(cxas_net.state_dict())
    state["head.out.conv.bias"] = state["head.out.conv.bias"][:14]
    state["head.extra.weight"] = torch.zeros(1)
    del state["backbone.backbone.layer0.0.weight"]
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="absent: backbone.backbone.layer0.0.weight") as error:
        get_segmenter("cxas", tmp_path / "other.pth")
    assert "unknown: head.extra.weight" in str(error.value)
    assert "head.out.conv.bias [14] instead of [159]" in str(error.value)


# ---- what is no frontal chest film

FILM = phantom_film(5, findings=[])
NOISE = np.random.default_rng(0).random((200, 160), dtype=np.float32)
ODD = {
    "black": (np.zeros((100, 90), np.float32), {"blank"}),
    "white": (np.ones((100, 90), np.float32), {"blank"}),
    "grey": (np.full((40, 300), 0.4, np.float32), {"blank"}),
    "tiny": (FILM[:20, :31], {"tiny"}),
    "one pixel": (FILM[:1, :1], {"tiny"}),
    "inverted": (1 - FILM, {"inverted"}),
    "turned left": (np.rot90(FILM), {"sideways"}),
    "turned right": (np.rot90(FILM, 3), {"sideways"}),
    "turned by half": (np.rot90(FILM, 2), {"upside down"}),
    "noise": (NOISE, {"doubtful"}),
    "ramp": (np.linspace(0, 1, 150 * 150, dtype=np.float32).reshape(150, 150), {"doubtful"}),
    "a corner": (np.ascontiguousarray(np.kron(FILM[:48, :48], np.ones((4, 4), np.float32))), {"doubtful", "sideways"}),
}


@pytest.fixture(scope="module")
def offline():
    """The offline segmenter at 128 px."""
    return get_segmenter("offline", size=128, device="cpu")


@pytest.mark.parametrize("name", ODD)
def test_odd_films_say_so(offline, name: str):
    film, allowed = ODD[name]
    found = offline.segment([FILM, np.ascontiguousarray(film)])
    assert found[0].film == "ok" and found[1].film in allowed
    assert not {"ok", "filtered"} & set(found[1].status), "no region of such a film is called right"


def test_no_false_alarm_on_phantoms(offline):
    found = [offline.segment([phantom_film(seed)])[0].film for seed in range(40)]
    assert sum(status != "ok" for status in found) <= 1


def test_mirrored_films_keep_their_masks(offline):
    films = [np.ascontiguousarray(phantom_film(seed, findings=[])[:, ::-1]) for seed in range(8)]
    mirrored = offline.segment(films)
    assert sum(masks.film == "mirrored" for masks in mirrored) >= 3
    assert all("ok" in masks.status for masks in mirrored)


# ---- the store


def test_size_of_a_film():
    sizes = [len(encode_masks(draw(sample_findings(np.random.default_rng(s)), 940_000 + s, size=512).regions))
             for s in range(9)]
    assert np.median(sizes) <= 8192, sizes


@pytest.mark.parametrize(("ranks", "often"), [(1, 2), pytest.param(2, 5, marks=pytest.mark.slow)])
def test_killed_while_writing(tmp_path: Path, ranks: int, often: int):
    """SIGKILL at random moments: nothing is lost, nothing is done twice but the batch at hand."""
    chance, kills = random.Random(ranks), 0
    around = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for rank in range(ranks):
        for attempt in range(often + 1):
            command = [sys.executable, slow_segmenter.__file__, str(tmp_path), str(rank), str(ranks)]
            process = subprocess.Popen(command, env=around, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            log, before = tmp_path / f"log{rank}", time.monotonic()
            seen = len(log.read_text().split()) if log.exists() else 0
            while attempt < often and process.poll() is None and time.monotonic() - before < 60:
                if log.exists() and len(log.read_text().split()) > seen:  # it is at work: kill it soon
                    time.sleep(chance.uniform(0, 0.08))
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    break
                time.sleep(0.01)
            said = process.communicate(timeout=120)[1]
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL, said.decode()
    assert kills >= ranks * often - 1
    asked = [int(row) for rank in range(ranks) for row in (tmp_path / f"log{rank}").read_text().split()]
    assert set(asked) == set(range(slow_segmenter.FILMS)) and len(asked) <= slow_segmenter.FILMS + 4 * kills
    merge_masks(tmp_path, [f"s{row}" for row in range(slow_segmenter.FILMS)])
    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    slow_segmenter.write(undisturbed, 0, 1, 0)
    merge_masks(undisturbed, [f"s{row}" for row in range(slow_segmenter.FILMS)])
    assert not same_store(tmp_path, undisturbed)
    assert np.array_equal(MaskStore(tmp_path)[77], np.roll(draw([], 3, size=96).regions, 77, axis=2))


@pytest.mark.parametrize("cut", [1, 9, 40, 500])
def test_torn_records_are_cut_off(tmp_path: Path, cut: int):
    masks = RegionMasks(draw([], 3, size=64).regions, ("ok",) * 7, "phantom")
    with MaskWriter(tmp_path, (64, 64), "phantom") as writer:
        for row in range(5):
            writer.add(row, masks)
    shard = tmp_path / "shard-00000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-cut])
    with MaskWriter(tmp_path, (64, 64), "phantom") as writer:
        assert writer.rows == {0, 1, 2, 3}
        writer.add(4, masks)
    assert shard.read_bytes() == whole
    flipped = bytearray(whole)
    flipped[-cut] ^= 1
    shard.write_bytes(flipped)
    with MaskWriter(tmp_path, (64, 64), "phantom") as writer:
        assert writer.rows == {0, 1, 2, 3}


TOGETHER = """
import sys
from pathlib import Path
import pandas as pd
from llava_ta.core import Run, check_params
from llava_ta.phantom import draw
from llava_ta.segment import get_segmenter, store_masks
folder = Path(sys.argv[1])
films = [draw([], 950_000 + seed, size=96).film for seed in range(21)]
studies = pd.DataFrame({"study": [f"s{row}" for row in range(21)], "row": range(21)})
table = store_masks(folder / "store", studies, films, get_segmenter("offline", size=96, device="cpu"), 96, batch=4)
assert len(table) == 147
place = Run(check_params(profile="tiny", run="shared", overrides="segment.name=offline")).make("segment")
assert (place / "record.json").exists()
"""


def test_two_launched_processes_equal_one(tmp_path: Path):
    """Under `accelerate launch`, a store and a run's step are those of a single process, byte by byte."""
    (tmp_path / "work.py").write_text(TOGETHER)
    for name, command in (("one", ()), ("two", launch(2))):
        done = run_python(*command, str(tmp_path / "work.py"), str(tmp_path / name), PYTHONPATH=str(ROOT),
                          OMP_NUM_THREADS="1", LLAVA_TA_RUNS=str(tmp_path / name))
        assert done.returncode == 0, done.stderr[-3000:]
    assert not same_store(tmp_path / "one" / "store", tmp_path / "two" / "store")
    runs = [tmp_path / name / "shared" for name in ("one", "two")]
    assert not same_store(runs[0] / "segment", runs[1] / "segment")
    assert not [path for run in runs for path in run.glob("*shard*")]


# ---- many films


class Repeated(Sequence):
    """One film file, read and fitted again and again; notes the memory of this process."""

    def __init__(self, path: Path, number: int, size: int):
        self.path, self.number, self.size, self.memory = path, number, size, {}

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, row: int) -> np.ndarray:
        if not 0 <= row < self.number:
            raise IndexError(row)
        self.memory[row] = resident()
        film = read_film(self.path)
        return Fit(*film.shape, self.size, "squash").apply(film)


def resident() -> float:
    """Memory of this process that is not a mapped file, in MB; its peak where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = status.read_text().splitlines()
        return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def streamed(folder: Path, number: int, size: int) -> tuple[Repeated, float]:
    """Segment a film file many times, from JPEG to joined masks; seconds of processor time a film."""
    Image.fromarray(np.uint8(phantom_film(6, size=512) * 255)).save(folder / "film.jpg", quality=92)
    films, segmenter = Repeated(folder / "film.jpg", number, size), get_segmenter("offline", size=size, device="cpu")
    with threads(1):
        started = time.process_time()
        write_shard(folder / "store", films, segmenter, size)
        merge_masks(folder / "store", [f"s{row}" for row in range(number)])
    return films, (time.process_time() - started) / number


def test_memory_stays(tmp_path: Path):
    films, _ = streamed(tmp_path, 300, 128)
    assert len(MaskStore(tmp_path / "store")) == 300
    assert films.memory[299] - films.memory[100] < 25, "MB that 200 films left behind"


@pytest.mark.slow
def test_ten_thousand_films(tmp_path: Path):
    films, _ = streamed(tmp_path, 10_000, 128)
    assert films.memory[9_999] - films.memory[1_000] < 40
    assert (tmp_path / "store" / "masks.safetensors").stat().st_size < 8192 * 10_000


@pytest.mark.slow
def test_speed(tmp_path: Path):
    """From a JPEG of 512 pixels to stored masks of 512 pixels on one core."""
    _, seconds = streamed(tmp_path, 200, 512)
    assert seconds <= 0.070, f"{1000 * seconds:.0f} ms of processor time a film"
    assert (tmp_path / "store" / "masks.safetensors").stat().st_size / 200 <= 8192


@pytest.mark.gpu
def test_a_gpu_finds_the_same_masks():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: what runs on a GPU has NOT been tested")
    films = [phantom_film(seed) for seed in range(8)]
    one, other = (get_segmenter("offline", size=128, device=device).segment(films) for device in ("cpu", "cuda"))
    assert np.mean([(a.masks != b.masks).mean() for a, b in zip(one, other, strict=True)]) < 1e-3


def test_tables_of_a_store(tmp_path: Path, offline):
    films = [FILM, np.zeros((192, 192), np.float32), np.rot90(FILM).copy()]
    write_shard(tmp_path, films, offline, 128)
    table = merge_masks(tmp_path, ["a", "b", "c"])
    store = MaskStore(tmp_path)
    assert store.films["status"].tolist() == ["ok", "blank", "sideways"]
    assert store.films["study"].tolist() == ["a", "b", "c"]
    assert pd.Series(store[0].mean(axis=(1, 2))).sub(table["area"][:7].to_numpy()).abs().max() < 1e-6
    assert (table["status"][7:14] == "empty").all() and not (table["status"][14:] == "ok").any()
