"""The reading room: what it knows, what it writes for other programs, and how it behaves in a real browser."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import highdicom as hd
import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image, ImageDraw
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

from llava_ta.app import MAX_UPLOAD, ReadingRoom, frozen_room, open_room, run_model
from llava_ta.core import Run, check_params, seed_everything
from llava_ta.dicom_seg import dicom_files, read_segmentation
from llava_ta.films import read_film
from llava_ta.masks import RegionMasks
from llava_ta.model import LlavaConfig, LlavaTA, VisionTower, small_llama, train_tokenizer
from llava_ta.ontology import ASKED, REGIONS
from llava_ta.phantom import Finding, draw
from llava_ta.room import Room, Stopped
from repository import ROOT, run_python

SENTENCES = {"organ-heart": "The heart is enlarged.", "disease-edema": "There is mild pulmonary edema.",
             "disease-pneumothorax": "No pneumothorax."}


# ---- films, good and bad


def phantom(size: int = 320) -> np.ndarray:  # float32 [size, 0.8 size], higher than wide
    """Draw a film with a large heart."""
    film = draw([Finding("cardiomegaly", severity="severe")], seed=8, size=size).film
    return film[:, size // 10 : size - size // 10]


def save_png(path: Path, film: np.ndarray) -> Path:
    """Write a grey film, or a colour picture."""
    Image.fromarray(np.uint8(np.clip(film, 0, 1) * 255 + 0.5)).save(path, "PNG")
    return path


def save_dicom(path: Path, stored: np.ndarray, photometric: str = "MONOCHROME2", **more: object) -> Path:
    """Write values of 12 bits as they are, uint16 [H, W]."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID, data.SOPInstanceUID = ComputedRadiographyImageStorage, generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID = generate_uid(), generate_uid()
    data.PatientName, data.PatientID, data.Modality = "Phantom^Anna", "phantom-8", "CR"
    data.Rows, data.Columns = stored.shape
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PixelRepresentation = 1, photometric, 0
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PixelData = stored.astype("<u2").tobytes()
    for name, value in more.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


def cat(side: int = 400, grey: bool = False) -> np.ndarray:  # float [side, side, 3], or [side, side]
    """Draw a photograph of a cat, as far as a segmenter is concerned."""
    picture = Image.new("RGB", (side, side), (110, 150, 90))
    pen, fur = ImageDraw.Draw(picture), (205, 130, 60)
    for left in (0.2, 0.6):
        pen.polygon([(side * x, side * y) for x, y in ((left, 0.45), (left + 0.1, 0.1), (left + 0.2, 0.4))], fill=fur)
    pen.ellipse([side * 0.18, side * 0.28, side * 0.82, side * 0.88], fill=fur)
    for left in (0.32, 0.56):
        pen.ellipse([side * left, side * 0.46, side * (left + 0.12), side * 0.58], fill=(240, 240, 120))
        pen.ellipse([side * (left + 0.04), side * 0.46, side * (left + 0.08), side * 0.58], fill=(10, 10, 10))
    pen.polygon([(side * x, side * y) for x, y in ((0.46, 0.66), (0.54, 0.66), (0.5, 0.71))], fill=(220, 120, 130))
    noise = np.random.default_rng(0).normal(0, 0.04, (side, side, 1))
    photo = np.clip(np.asarray(picture) / 255 + noise, 0, 1)
    return photo.mean(axis=2) if grey else photo


def lateral(side: int = 400) -> np.ndarray:  # float [side, side]
    """Draw a chest from the side: one dark lung field before a spine at the back."""
    y, x = np.mgrid[0:side, 0:side] / side
    body = ((x - 0.5) / 0.42) ** 2 + ((y - 0.55) / 0.6) ** 2 < 1
    lung = ((x - 0.48) / 0.28) ** 2 + ((y - 0.42) / 0.34) ** 2 < 1
    heart = ((x - 0.36) / 0.13) ** 2 + ((y - 0.58) / 0.14) ** 2 < 1
    spine = np.abs(x - 0.74 - 0.06 * np.sin(3 * y)) < 0.05
    film = 0.05 + 0.5 * body - 0.3 * lung + 0.35 * (heart & body) + 0.25 * (spine & body)
    return np.clip(film + np.random.default_rng(0).normal(0, 0.02, film.shape), 0, 1)


def bad_films(folder: Path) -> dict[str, tuple[Path, str]]:  # name -> file, and what the room must say of it
    """Write what people drop by mistake."""
    good = save_png(folder / "good.png", phantom()).read_bytes()
    (folder / "corrupt.png").write_bytes(good[: len(good) // 3])
    stored = np.round(phantom() * 4095)
    return {
        "corrupt": (folder / "corrupt.png", "damaged or cut off"),
        "cat": (save_png(folder / "cat.png", cat()), "is a colour picture"),
        "grey cat": (save_png(folder / "grey-cat.png", cat(grey=True)), "not look like an upright frontal chest film"),
        "lateral": (save_dicom(folder / "lateral.dcm", stored, ViewPosition="LL"), "is a lateral view"),
        "lateral picture": (save_png(folder / "side.png", lateral()), "may be a lateral"),
        "text": (ROOT / "README.md", "neither DICOM nor PNG"),
    }


# ---- a room without a browser


@pytest.fixture(scope="module")
def models() -> dict[str, LlavaTA]:
    """Untrained models of the tiny size."""
    def model(mode: str) -> LlavaTA:
        seed_everything(0)
        tiny = check_params("tiny").profile
        tokenizer = train_tokenizer([*SENTENCES.values(), "Consolidation is absent."] * 5, 300)
        config = LlavaConfig(mode, "v1", "plus", 0.0, "offline", "squash", tiny.tower.model_dump())
        return LlavaTA(config, VisionTower(tiny.tower), small_llama(tiny.lm, len(tokenizer)), tokenizer).eval()
    return {mode: model(mode) for mode in ("anatomy", "narrative")}


@pytest.fixture
def room(models: dict[str, LlavaTA]) -> Room:
    """A room with two models and no film."""
    return Room(models["anatomy"], models["narrative"], tokens=(8, 20))


def write_and_edit(room: Room) -> None:
    """Ask about three topics and put sense into the answers."""
    room.choose(list(SENTENCES))
    room.write()
    for topic, words in SENTENCES.items():
        room.edit(topic, words)


def test_a_film_from_beginning_to_end(room: Room, tmp_path: Path):
    told: list[str] = []
    room.told = told.append
    room.open_film(str(save_png(tmp_path / "film.png", phantom())))
    assert told.index("film") < told.index("masks") < told.index("topics")
    assert room.state["sign"] == {"level": "ok", "text": "This looks like an upright frontal chest film."}
    assert {one["region"] for one in room.state["masks"] if one["path"]} == set(REGIONS)
    write_and_edit(room)
    said = room.state["sentences"]
    assert [one["topic"] for one in said] == sorted(SENTENCES, key=ASKED.index)
    assert all(one["edited"] for one in said) and room.state["busy"] == {}
    assert room.state["report"]["text"].startswith("FINDINGS\nThere is mild pulmonary edema.")
    json.dumps(room.state)  # plain data


def test_sentences_arrive_one_at_a_time(room: Room, tmp_path: Path):
    room.open_film(str(save_png(tmp_path / "film.png", phantom())))
    seen: list[int] = []
    room.told = lambda name: seen.append(len(room.state["sentences"])) if name == "sentences" else None
    room.choose(list(SENTENCES))
    room.write()
    assert seen == [0, 1, 2, 3]


def test_a_new_film_stops_the_writing(room: Room, tmp_path: Path):
    room.open_film(str(save_png(tmp_path / "film.png", phantom())))
    room.choose("all")
    room.stopped = lambda: len(room.state["sentences"]) >= 2
    with pytest.raises(Stopped):
        room.write()
    assert 2 <= len(room.state["sentences"]) < len(ASKED) and room.state["busy"] == {}
    room.stopped = lambda: False
    assert room.do("open_film", source=str(tmp_path / "film.png")) and room.state["sentences"] == []


def test_every_word_of_every_sentence_can_be_looked_at(room: Room, tmp_path: Path):
    room.open_film(str(save_png(tmp_path / "film.png", phantom())))
    write_and_edit(room)
    for one in [*room.state["sentences"], *room.state["narrative"]]:
        maps = set()
        for word in range(-1, len(one["words"])):
            room.look(one["item"], word)
            gaze = room.state["gaze"]
            assert abs(sum(gaze["shares"].values()) - 1) < 1e-3 and bool(gaze["part"]) == bool(one["topic"])
            maps.add(gaze["film"])
        assert len(maps) > 1 or len(one["words"]) < 2


def test_a_repeated_sentence_of_a_narrative_is_looked_at_where_it_stands(
    room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said = "The heart is large. No edema.The heart is large. No edema."  # a blank is missing
    table = pd.DataFrame([("film", "", said, 0.5)], columns=["study", "topic", "sentence", "score"])
    room.open_film(str(save_png(tmp_path / "film.png", phantom())))
    room.choose(list(SENTENCES))
    room.write()
    monkeypatch.setattr("llava_ta.room.answer", lambda *_, **__: table)
    room._write_narrative()
    same = [one for one in room.state["narrative"] if one["text"] == "The heart is large."] or room.state["narrative"]
    maps = []
    for one in [*same, *room.state["narrative"]]:
        assert room.do("look", item=one["item"]), room.state["sign"]
        maps.append(room.state["gaze"]["film"])
    assert len(same) < 2 or maps[0] != maps[1]


def test_bad_films_give_a_sign_and_the_room_goes_on(room: Room, tmp_path: Path):
    for name, (path, reason) in bad_films(tmp_path).items():
        opened = room.do("open_film", source=str(path), name=f"my {name}")
        assert reason in room.state["sign"]["text"], (name, room.state["sign"])
        assert room.state["sign"]["level"] == ("warn" if opened else "error")
        assert str(path) not in room.state["sign"]["text"] and room.state["busy"] == {}
        assert not room.do("write") and room.state["sentences"] == []
        assert room.state["sign"]["level"] in ("warn", "error")
    assert room.do("open_film", source=str(tmp_path / "good.png"))


def test_too_many_pixels_are_refused_by_the_header(room: Room, tmp_path: Path):
    Image.new("1", (11_000, 10_000)).save(tmp_path / "huge.png")
    assert not room.do("open_film", source=str(tmp_path / "huge.png"), name="huge.png")
    assert "more than the limit of 100000000" in room.state["sign"]["text"]


def test_what_goes_wrong_inside_is_said(room: Room, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    room.open_film(str(save_png(tmp_path / "film.png", phantom())))
    monkeypatch.setattr("llava_ta.room.answer", lambda *_, **__: 1 / 0)
    assert not room.do("write")
    assert "ZeroDivisionError" in room.state["sign"]["text"] and "Traceback" in capsys.readouterr().err
    monkeypatch.undo()
    assert room.do("write") and room.state["sentences"]


def test_a_large_film_comes_in_pieces(models: dict[str, LlavaTA], tmp_path: Path):
    reading = ReadingRoom(Room(models["anatomy"], tokens=(4, 8)))
    sent: list[dict] = []
    reading.send = lambda content, buffers=None: sent.append(content)
    data = save_png(tmp_path / "film.png", phantom(512)).read_bytes()
    step = 1 << 14
    for offset in range(0, len(data), step):
        piece = memoryview(data[offset : offset + step])
        work = reading.receive([piece], id=1, name="../../film.png", size=len(data), offset=offset)
        assert sent[-1]["have"] == min(offset + step, len(data))
    work.result(60)
    assert reading.film["name"] == "../../film.png" and len(reading.sentences) == len(ASKED)
    assert [path.name for path in Path(reading.folder.name).iterdir()] == ["upload-1"]  # the name is only shown
    assert reading.receive([b"x"], id=2, name="b.png", size=MAX_UPLOAD + 1, offset=0) is None
    assert reading.sign["level"] == "error" and sent[-1]["stop"]


# ---- what it writes for other programs


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("turn", ["as it was taken", "mirrored", "turned left", "upside down"])
def test_a_seg_lies_on_the_stored_pixels_of_its_film(tmp_path: Path, photometric: str, turn: str):
    """Regions are painted into the film's own pixels; what the SEG says must lie where they were painted."""
    turned = {"as it was taken": np.asarray, "mirrored": np.fliplr, "turned left": np.rot90, "upside down": np.flipud}
    rng = np.random.default_rng(5)
    film, truth = 0.2 + 0.1 * rng.random((190, 130)), np.zeros((7, 190, 130), bool)
    for number in range(7):  # asymmetric, overlapping
        top, left = rng.integers(0, 110), rng.integers(0, 70)
        truth[number, top : top + 30 + 7 * number, left : left + 25 + 4 * number] = True
    painted = np.where(truth.any(axis=0), 0.9, film)
    stored = np.round(turned[turn](painted if photometric == "MONOCHROME2" else 1 - painted) * 4095)
    path = save_dicom(tmp_path / "film.dcm", np.ascontiguousarray(stored), photometric)
    seen = read_film(path)
    masks = np.ascontiguousarray(np.stack([turned[turn](layer) for layer in truth]))
    assert (seen[masks.any(axis=0)] > 0.8).all() and (seen[~masks.any(axis=0)] < 0.5).all()

    (written,) = dicom_files(seen, masks, path).values()
    source = pydicom.dcmread(path)
    seg = hd.seg.segread(io.BytesIO(written))
    assert (seg.Rows, seg.Columns) == (source.Rows, source.Columns) == seen.shape
    assert seg.PatientID == "phantom-8" and seg.StudyInstanceUID == source.StudyInstanceUID
    assert np.array_equal(read_segmentation(written, source.SOPInstanceUID), masks)
    # by pydicom alone: one frame for each segment, in the order of their numbers
    plain = pydicom.dcmread(io.BytesIO(written))
    frames = plain.pixel_array.astype(bool)
    for frame, group in zip(frames, plain.PerFrameFunctionalGroupsSequence, strict=True):
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        region = plain.SegmentSequence[number - 1].SegmentLabel
        assert np.array_equal(frame, masks[REGIONS.index(region)])
        referred = group.DerivationImageSequence[0].SourceImageSequence[0]
        assert referred.ReferencedSOPInstanceUID == source.SOPInstanceUID
    bright = source.pixel_array > 0.8 * 4095 if photometric == "MONOCHROME2" else source.pixel_array < 0.2 * 4095
    assert np.array_equal(frames.any(axis=0), bright)


class Painted:
    """A segmenter that finds what is painted white: the same box for each region, a little larger each time."""

    convention = "phantom"

    def segment(self, films: list[np.ndarray], rows: object = None) -> list[RegionMasks]:
        """Find bright pixels."""
        return [RegionMasks(np.stack([film > 0.95] * 7), ("ok",) * 7, self.convention) for film in films]


@pytest.mark.parametrize("resize", ["squash", "pad"])
@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2", "png", "turned jpeg"])
def test_what_the_room_exports_lies_where_it_was_found(
    models: dict[str, LlavaTA], tmp_path: Path, kind: str, resize: str
):
    """All the way: a file is read, made square, segmented there, drawn back, and exported."""
    film = 0.1 + 0.3 * np.random.default_rng(1).random((240, 160))
    film[30:110, 100:150] = 1.0
    if kind == "png":
        path = save_png(tmp_path / "film", film)
    elif kind == "turned jpeg":  # stored lying down, with a note that it has to be turned
        path, note = tmp_path / "film", Image.Exif()
        note[0x0112] = 6
        Image.fromarray(np.uint8(np.rot90(film) * 255)).save(path, "JPEG", exif=note, quality=95)
    else:
        stored = np.round((film if kind == "MONOCHROME2" else 1 - film) * 4095)
        path = save_dicom(tmp_path / "film", stored, kind)
    model = models["anatomy"]
    former = model.config
    model.config = replace(former, resize=resize)
    try:
        room = Room(model)
        room.segmenter = Painted()
        room.open_film(str(path))
    finally:
        model.config = former
    files = room.export("dicom")
    source = pydicom.dcmread(io.BytesIO(files["film.dcm"]) if "film.dcm" in files else path)
    assert (source.Rows, source.Columns) == (240, 160) and ("film.dcm" in files) == (not kind.startswith("MONO"))
    found = read_segmentation(files["masks.dcm"], source.SOPInstanceUID)[0]
    bright = source.pixel_array < 200 if kind == "MONOCHROME1" else source.pixel_array > 0.95 * source.pixel_array.max()
    overlap = (found & bright).sum() / (found | bright).sum()
    assert overlap > 0.85, overlap  # the square has 96 pixels a side, the film 240 by 160


def test_fhirclient_accepts_what_the_room_exports(room: Room, tmp_path: Path):
    diagnosticreport = pytest.importorskip("fhirclient.models.diagnosticreport", reason="fhirclient: make install")
    room.open_film(str(save_png(tmp_path / "film.png", phantom())))
    room.choose(list(SENTENCES))
    room.write()
    as_written = room.export("fhir")["report.fhir.json"]
    for topic, words in SENTENCES.items():
        room.edit(topic, words)
    for data in (as_written, room.export("fhir")["report.fhir.json"]):
        resource = json.loads(data)
        assert diagnosticreport.DiagnosticReport(resource, strict=True).as_json() == resource
        assert "Not for clinical use." in resource["conclusion"]
    found = [one for one in resource["contained"] if one["resourceType"] == "Observation"]
    assert len(found) == 3 and all(one["performer"] and "device" not in one for one in found)


def test_exports_say_what_they_are_and_name_nobody(room: Room, tmp_path: Path):
    room.open_film(str(save_png(tmp_path / "film.png", phantom())), "Jane Doe.png")
    write_and_edit(room)
    room.edit("disease-edema", "")
    for kind in ("text", "json", "fhir"):
        for data in room.export(kind).values():
            assert b"Not for clinical use." in data and b"edited by a person" in data and b"Jane" not in data
    told = json.loads(room.export("json")["report.json"])
    assert told["sentences"][1]["text"] == "" and "edema" not in told["report"]["text"]


def test_a_frozen_room_loads_nothing(room: Room, tmp_path: Path):
    room.open_film(str(save_png(tmp_path / "film.png", phantom())))
    write_and_edit(room)
    page = frozen_room(room, words=2)
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "") and page.count("</script>") == 1


def test_the_front_end_is_one_module_without_imports():
    code = (ROOT / "llava_ta" / "front" / "room.js").read_text(encoding="utf-8")
    assert "import " not in code.replace("important", "") and "fetch(" not in code
    assert "http" not in code.replace("http://www.w3.org/2000/svg", "")
    if node := shutil.which("node"):
        copy = ["--input-type=module", "--check"]
        done = subprocess.run([node, *copy], input=code, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr


# ---- a finished run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny run, as far as the room wants it."""
    folder = tmp_path_factory.mktemp("runs")
    code = ("from llava_ta.core import Run, check_params\n"
            "run = Run(check_params('tiny'))\n"
            "for mode in ('anatomy', 'narrative'):\n"
            "    run.make('generate', mode=mode, stage=2, seed=0, film='real')\n"
            "run.make('select')")
    done = run_python("-c", code, LLAVA_TA_RUNS=str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    before = os.environ.get("LLAVA_TA_RUNS")
    os.environ["LLAVA_TA_RUNS"] = str(folder)
    yield folder
    os.environ.pop("LLAVA_TA_RUNS")
    if before is not None:
        os.environ["LLAVA_TA_RUNS"] = before


@pytest.mark.slow
def test_the_room_writes_what_the_run_predicts(runs: Path):
    reading = open_room(check_params("tiny"), say=lambda text: None)
    room, run = reading.room, Run(check_params("tiny"), lambda text: None)
    said = pd.read_parquet(run.path("generate", mode="anatomy", stage=2, seed=0, film="real") / "predictions.parquet")
    assert reading.about["selector"] and len(reading.about["films"]) == 12
    for study in reading.about["films"][:3]:
        room.open_film(study)
        chosen = [one["topic"] for one in room.state["topics"] if one["asked"]]
        table = pd.read_parquet(run.path("select") / "probabilities.parquet").query("study == @study and chosen")
        assert set(table.topic) <= set(chosen)
        room.choose("all")
        room.write()
        wanted = said[said.study == study].set_index("topic").sentence
        assert {one["topic"]: one["text"] for one in room.state["sentences"]} == wanted.to_dict()
        assert room.state["truth"]["report"] and room.state["narrative"]
    assert run_model(run, "topic") is None  # it was not trained


@pytest.mark.slow
def test_a_run_without_a_checkpoint_says_so(runs: Path):
    told: list[str] = []
    reading = open_room(check_params("tiny", run="empty"), say=told.append)
    assert "Run empty has no checkpoint yet" in reading.about["model"] and "which takes a minute" in told[0]
    assert len(reading.about["films"]) == 12  # those of the tiny run


@pytest.mark.slow
def test_a_film_of_100_megapixels_is_read(models: dict[str, LlavaTA], tmp_path: Path):
    film = Image.fromarray(np.uint8(phantom(400) * 255)).resize((8_944, 11_180))
    film.save(tmp_path / "large.png", compress_level=1)
    assert 99_000_000 < film.width * film.height <= 100_000_000
    room = Room(models["anatomy"], tokens=(4, 8))
    assert room.do("open_film", source=str(tmp_path / "large.png")), room.state["sign"]
    assert room.state["film"]["status"] == "ok" and len(room.state["film"]["picture"]) < 500_000
    room.write()
    files = room.export("dicom")
    with zipfile.ZipFile(tmp_path / "out.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("masks.dcm", files["masks.dcm"])
        assert packed.getinfo("masks.dcm").compress_size < 3_000_000
    capture = pydicom.dcmread(io.BytesIO(files["film.dcm"]), stop_before_pixels=True)
    assert (capture.Rows, capture.Columns) == (11_180, 8_944)


# ---- in a browser


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """Chromium without a screen, whose downloads land in `browser.downloads`."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium, for the browser test: make install")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("the reading room was NOT tested in a browser: chromium or chromedriver is not installed "
                    "(apt-get install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1280,1000"):
        options.add_argument(argument)
    downloads = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.downloads = downloads
    opened.shots = Path(os.environ.get("ROOM_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    yield opened
    opened.quit()


@pytest.fixture
def served(runs: Path, tmp_path: Path) -> Iterator[Callable[[list[str], str], str]]:
    """Start a server on a free port, and end it by its id."""
    started: list[subprocess.Popen] = []

    def serve(command: list[str], ready: str) -> str:  # the address
        port = free_port()
        log = (tmp_path / "server.log").open("w")
        filled = [part.replace("PORT", str(port)) for part in command]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        surroundings = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "LLAVA_TA_RUNS": str(runs)}
        started.append(subprocess.Popen(filled, stdout=log, stderr=log, env=surroundings, start_new_session=True))
        wait(lambda: ready in (tmp_path / "server.log").read_text(), 90, lambda: (tmp_path / "server.log").read_text())
        return f"http://localhost:{port}"
    yield serve
    for process in started:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def wait(true: Callable[[], object], seconds: float = 30, why: Callable[[], str] = lambda: "") -> float:  # it took
    """Wait until something is so."""
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        if true():
            return time.monotonic() - start
        time.sleep(0.05)
    raise AssertionError(f"not within {seconds} s: {why()}")


class Page:
    """The room in a browser, as a reader sees it."""

    def __init__(self, browser: object):
        self.browser = browser

    def ask(self, script: str, *arguments: object) -> object:
        """Ask the page; `every(css)` are elements of the room."""
        every = "const every = (css) => [...document.querySelectorAll(`.llava-room ${css}`)];"
        return self.browser.execute_script(every + script, *arguments)

    def count(self, css: str) -> int:
        """How many elements there are."""
        return self.ask("return every(arguments[0]).length", css)

    def text(self, css: str, number: int = 0) -> str:
        """What an element says, also if it is folded away; nothing if it is not there."""
        return self.ask("return every(arguments[0])[arguments[1]]?.textContent ?? ''", css, number)

    def attribute(self, css: str, name: str, number: int = 0) -> str:
        """An attribute of an element; nothing if it is not there."""
        return self.ask("return every(arguments[0])[arguments[1]]?.getAttribute(arguments[2]) ?? ''", css, number, name)

    def one(self, css: str) -> object:
        """An element to type into."""
        return self.browser.find_element("css selector", f".llava-room {css}")

    def click(self, css: str) -> None:
        """Click something, wherever it is on the page."""
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", self.one(css))
        self.one(css).click()

    def idle(self, seconds: float = 60) -> None:
        """Wait until nothing is going on."""
        time.sleep(0.3)
        wait(lambda: self.count(".busy.idle"), seconds, lambda: self.text(".busy"))

    def upload(self, path: Path, sign: str, seconds: float = 60) -> float:  # it took
        """Give the room a file, and wait for what it says."""
        self.one(".file").send_keys(str(path))
        return wait(lambda: sign in self.text(".sign"), seconds, lambda: self.text(".sign") + self.text(".busy"))

    def key(self, *keys: str) -> None:
        """Press keys where the focus is."""
        for key in keys:
            self.browser.switch_to.active_element.send_keys(key)

    def shot(self, name: str, width: int = 1280) -> None:
        """Photograph the whole page at a width."""
        for _ in range(2):  # the page is another one at another width
            tall = self.ask("return document.querySelector('.llava-room').scrollHeight + 80")
            self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
                "width": width, "height": max(700, tall), "deviceScaleFactor": 1, "mobile": False})
            time.sleep(0.6)
        self.browser.save_screenshot(str(self.browser.shots / f"{name}-{width}.png"))
        over = self.ask("const room = every('')[0]; return room.scrollWidth - room.clientWidth")
        self.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        assert over <= 0, f"{name} is {over} pixels too wide at {width}"

    def exported(self, kind: str, *names: str) -> dict[str, bytes]:
        """Press a button of export and read the files."""
        self.click(f'[data-export="{kind}"]')
        paths = [self.browser.downloads / name for name in names]
        wait(lambda: all(path.exists() for path in paths), 60, lambda: str(list(self.browser.downloads.iterdir())))
        time.sleep(0.3)
        found = {path.name: path.read_bytes() for path in paths}
        for path in paths:
            path.unlink()
        return found


def read_a_film(page: Page) -> None:
    """Choose a film of the run, click a sentence and a word, by mouse and by keys; edit."""
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    select = pytest.importorskip("selenium.webdriver.support.ui").Select(page.one(".open select"))
    assert "Not for clinical use." in page.text(".warning") and len(select.options) == 13
    select.select_by_index(1)
    first = wait(lambda: page.count(".sentences .finding"), 30)
    page.idle()
    controls = ".llava-room :is(button, input, select, summary, [tabindex='0'])"
    every = [one for one in page.browser.find_elements("css selector", controls) if one.is_displayed()]
    nameless = [one.get_attribute("outerHTML") for one in every if not one.accessible_name]
    assert len(every) > 20 and not nameless  # for those who hear the room
    assert first < 5 and "upright frontal" in page.text(".sign") and "true report" in page.text(".compared")
    assert page.count(".film .region") == 7 and not page.count(".film .heat")
    page.click(".sentences .finding .name")
    wait(lambda: page.count(".film .heat"))
    of_sentence = page.attribute(".film .heat", "href")
    page.click(".sentences .finding .word")
    wait(lambda: page.attribute(".film .heat", "href") != of_sentence)
    of_word = page.attribute(".film .heat", "href")
    assert "text" in page.text(".caption") and page.count(".word.lit") == 1
    page.click(".sides input[value=part]")
    assert page.attribute(".film .heat", "href") != of_word
    page.click(".sentences .finding .word")  # from here on by keys
    page.key(keys.ARROW_RIGHT, keys.ENTER)
    wait(lambda: page.count(".word.lit") == 1 and page.text(".word.lit") == page.text(".sentences .finding .word", 1))
    page.key(keys.ARROW_DOWN, keys.ENTER)
    wait(lambda: "lit" in page.attribute(".sentences .finding", "class", 1))
    page.idle()
    page.key("m")
    assert not page.count(".film .region")
    page.key("m", "6")
    assert page.count(".film .region") == 6 and not page.count('.film [data-region="heart"]')
    page.key("6", keys.ESCAPE)
    wait(lambda: not page.count(".film .heat"))
    page.key("e")
    area = page.browser.switch_to.active_element
    area.clear()
    area.send_keys("There is a small left pleural effusion.", keys.ENTER)
    wait(lambda: "small left pleural effusion" in page.text(".report pre"))
    assert page.count(".by.edited") and page.text(".sentences .finding", 1).count("effusion") == 1


def export_and_read(page: Page) -> None:
    """Export everything and read it back."""
    (text,) = page.exported("text", "report.txt").values()
    assert b"small left pleural effusion" in text and b"Not for clinical use." in text
    told = json.loads(page.exported("json", "report.json")["report.json"])
    assert [one["edited"] for one in told["sentences"]].count(True) == 1
    resource = json.loads(page.exported("fhir", "report.fhir.json")["report.fhir.json"])
    diagnosticreport = pytest.importorskip("fhirclient.models.diagnosticreport")
    assert diagnosticreport.DiagnosticReport(resource, strict=True).as_json() == resource
    archive = zipfile.ZipFile(io.BytesIO(page.exported("dicom", "dicom.zip")["dicom.zip"]))
    files = {name: archive.read(name) for name in archive.namelist()}
    capture = pydicom.dcmread(io.BytesIO(files["film.dcm"]))
    masks = read_segmentation(files["masks.dcm"], capture.SOPInstanceUID)
    assert masks.shape == (7, 96, 96) and masks.any(axis=(1, 2)).all()


@pytest.mark.slow
def test_the_room_in_voila(served: Callable, browser: object, tmp_path: Path):
    address = served([sys.executable, "-m", "llava_ta.serve", "--run", "tiny", "--port", "PORT", "--no-browser"],
                     "is running at")
    browser.get(address)
    page = Page(browser)
    wait(lambda: page.count(".open select option"), 120)
    page.shot("empty")
    read_a_film(page)
    page.click(".sentences .finding .word")
    wait(lambda: page.count(".film .heat"))
    for width in (1280, 420):
        page.shot("looking", width)
    export_and_read(page)
    for number, (name, (path, reason)) in enumerate(bad_films(tmp_path).items()):
        page.upload(path, reason)
        page.idle()
        assert not page.count(".sentences .finding"), name
        if name in ("cat", "lateral picture"):
            page.shot(name.replace(" ", "-"), (1280, 420)[number % 2])
    large = tmp_path / "large.png"
    Image.fromarray(np.uint8(phantom(400) * 255)).resize((8_944, 11_180)).save(large, compress_level=0)
    assert large.stat().st_size > 90_000_000  # far beyond any limit of one message
    page.one(".file").send_keys(str(large))
    wait(lambda: "loading large.png" in page.text(".busy"))  # a sign of progress
    wait(lambda: page.count(".sentences .finding"), 180, lambda: page.text(".busy") + page.text(".sign"))
    page.idle()
    assert "11180 x 8944" in page.text(".caption")
    good = save_dicom(tmp_path / "good.dcm", np.round((1 - phantom()) * 4095), "MONOCHROME1")
    page.upload(good, "upright frontal")
    wait(lambda: "good.dcm: DICOM" in page.text(".caption"))
    page.idle()
    source = pydicom.dcmread(good)
    masks = read_segmentation(page.exported("dicom", "masks.dcm")["masks.dcm"], source.SOPInstanceUID)
    assert masks.shape == (7, source.Rows, source.Columns) and not (browser.downloads / "film.dcm").exists()
    for width in (1280, 420):
        page.shot("dicom", width)
    # Voila's own template asks for icons from a network, which the room does not need
    severe = [line["message"] for line in browser.get_log("browser") if line["level"] == "SEVERE"]
    assert not [message for message in severe if "cdn." not in message], severe


@pytest.mark.slow
def test_the_room_in_jupyterlab(served: Callable, browser: object, tmp_path: Path):
    from llava_ta.serve import room_notebook

    room_notebook(tmp_path / "room.ipynb", profile="tiny", run="tiny")
    address = served([
        sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--port=PORT", f"--notebook-dir={tmp_path}",
        "--IdentityProvider.token=", "--ServerApp.password=", "--LabApp.news_url="], "is running at")
    browser.get(f"{address}/lab/tree/room.ipynb")
    page = Page(browser)
    action = pytest.importorskip("selenium.webdriver").ActionChains
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    wait(lambda: browser.find_elements("css selector", ".jp-Notebook .jp-Cell"), 90)
    time.sleep(3)
    for cell in browser.find_elements("css selector", ".jp-Notebook .jp-Cell .jp-InputArea-editor")[:2]:
        cell.click()
        action(browser).key_down(keys.SHIFT).send_keys(keys.ENTER).key_up(keys.SHIFT).perform()
        time.sleep(0.5)
    wait(lambda: page.count(".open select option"), 120, lambda: browser.find_element("tag name", "body").text[-2000:])
    read_a_film(page)  # "m", "e" and the arrows must not reach the notebook
    assert len(browser.find_elements("css selector", ".jp-Notebook .jp-MarkdownCell")) == 0
    browser.save_screenshot(str(browser.shots / "jupyterlab-1280.png"))
    export_and_read(page)
