"""Films of every kind that users bring, all made here: what is read, what is refused, the way to a square and back."""

import io
import itertools
import pickle
import random
import struct
import tracemalloc
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut, get_decoder, get_encoder
from pydicom.uid import (
    MPEG2MPML,
    UID,
    DeflatedExplicitVRLittleEndian,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from llava_ta import films
from llava_ta.films import RESIZES, FilmError, Fit, film_header, fit_film, read_film
from llava_ta.phantom import draw

PHANTOM = draw([], seed=3, size=128).film[:112, :96]
RAW = np.uint16(PHANTOM * 3000 + 500)  # 12 bits
EIGHT = np.uint8(PHANTOM * 255 + 0.5)
PHOTOMETRIC = ("MONOCHROME1", "MONOCHROME2")


def dataset(
    pixels: np.ndarray,  # [H, W], or [H, W, 3] of uint8
    syntax: UID = ExplicitVRLittleEndian,
    photometric: str = "MONOCHROME2",
    **more: object,  # further tags; None removes one
) -> Dataset:
    """A DICOM film with a patient's name in it."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = syntax
    data.SOPClassUID, data.SOPInstanceUID = DigitalXRayImageStorageForPresentation, generate_uid()
    data.PatientName, data.PatientID, data.PatientBirthDate = "Doe^Jane", "4711", "19500101"
    data.Modality, data.PhotometricInterpretation = "DX", photometric
    data.Rows, data.Columns = pixels.shape[:2]
    data.SamplesPerPixel, data.PixelRepresentation = (3 if pixels.ndim == 3 else 1), int(pixels.dtype.kind == "i")
    if pixels.ndim == 3:
        data.PlanarConfiguration = 0
    data.BitsAllocated = 8 * pixels.itemsize
    data.BitsStored = 12 if pixels.itemsize == 2 else 8 * pixels.itemsize
    data.HighBit = data.BitsStored - 1
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    data.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    data["PixelData"].VR = "OW" if pixels.itemsize == 2 else "OB"
    for name, value in more.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    return data


def save(
    path: Path,  # where
    *arguments: object,  # of `dataset`
    **more: object,
) -> Path:
    """Write a DICOM film."""
    dataset(*arguments, **more).save_as(path, enforce_file_format=True)
    return path


def encapsulated(
    path: Path,  # where
    stream: bytes,  # of one compressed frame
    pixels: np.ndarray,  # for the header
    syntax: UID,
    photometric: str,
    **more: object,
) -> Path:
    """Write a DICOM film around a compressed stream."""
    data = dataset(pixels, syntax, photometric, **more)
    data.PixelData = encapsulate([stream])
    data["PixelData"].VR, data["PixelData"].is_undefined_length = "OB", True
    data.save_as(path, enforce_file_format=True)
    return path


def lossless_jpeg(
    pixels: np.ndarray,  # uint16 [H, W] of 12 bits
) -> bytes:
    """Encode with process 14, predictor 1: each value by its difference from the last, Huffman codes of 5 bits."""
    wide = pixels.astype(np.int64)
    before = np.empty_like(wide)
    before[:, 1:], before[1:, 0], before[0, 0] = wide[:, :-1], wide[:-1, 0], 2**11
    bits = []
    for difference in (wide - before).ravel().tolist():
        size = abs(difference).bit_length()
        bits.append(f"{size:05b}")
        if size:
            bits.append(f"{difference if difference > 0 else difference + 2**size - 1:0{size}b}")
    text = "".join(bits)
    text += "1" * (-len(text) % 8)
    coded = int(text, 2).to_bytes(len(text) // 8, "big").replace(b"\xff", b"\xff\x00")
    frame = struct.pack(">BHHB3B", 12, *pixels.shape, 1, 1, 0x11, 0)
    codes = bytes([0, 0, 0, 0, 0, 17, *[0] * 11, *range(17)])
    scan = bytes([1, 1, 0, 1, 0, 0])
    parts = [b"\xff" + mark + struct.pack(">H", len(body) + 2) + body for mark, body in
             ((b"\xc3", frame), (b"\xc4", codes), (b"\xda", scan))]
    return b"\xff\xd8" + b"".join(parts) + coded + b"\xff\xd9"


def refusal(
    path: Path,  # must be refused
    reader: object = read_film,
    **arguments: int,
) -> str:
    """The reason, after checking that the message is one line which names the file."""
    with pytest.raises(FilmError) as caught:
        reader(path, **arguments)
    message = str(caught.value)
    assert message.startswith(f"film {path}: ") and len(message.splitlines()) == 1, message
    return message.removeprefix(f"film {path}: ")


@pytest.fixture(autouse=True)
def silence(capfd: pytest.CaptureFixture):
    """No reader may warn or print: the one line of the error is all that a user sees."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    said = capfd.readouterr()
    assert said.out == said.err == ""


# ---- transfer syntaxes


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The film that all lossless encodings must give."""
    return read_film(save(tmp_path_factory.mktemp("plain") / "film.dcm", RAW))


@pytest.mark.parametrize("photometric", PHOTOMETRIC)
@pytest.mark.parametrize("syntax", [
    ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian, RLELossless,
    JPEG2000Lossless, JPEGLSLossless], ids=lambda syntax: syntax.keyword)
def test_lossless_syntaxes_give_equal_films(tmp_path: Path, plain: np.ndarray, syntax: UID, photometric: str):
    stored = 4095 - RAW if photometric == "MONOCHROME1" else RAW
    data = dataset(stored, syntax if not syntax.is_encapsulated else ExplicitVRLittleEndian, photometric)
    if syntax.is_encapsulated:
        if not get_encoder(syntax).is_available:
            pytest.skip(f"no encoder for {syntax.name} is installed: its films have NOT been read")
        data.compress(syntax)
    data.save_as(tmp_path / "film", enforce_file_format=True)
    film = read_film(tmp_path / "film")
    assert film.dtype == np.float32 and film.shape == RAW.shape and np.array_equal(film, plain)
    assert film_header(tmp_path / "film").transfer_syntax == syntax.name
    assert np.corrcoef(film.ravel(), PHANTOM.ravel())[0, 1] > 0.99  # bright bone


@pytest.mark.parametrize("photometric", PHOTOMETRIC)
def test_jpeg_2000_needs_no_plugin(tmp_path: Path, plain: np.ndarray, photometric: str):
    stored = np.uint16(65535 - RAW if photometric == "MONOCHROME1" else RAW)
    stream = io.BytesIO()
    Image.fromarray(stored).save(stream, "JPEG2000", no_jp2=True, irreversible=False)
    deep = dict(BitsStored=16, HighBit=15)
    path = encapsulated(tmp_path / "film", stream.getvalue(), stored, JPEG2000Lossless, photometric, **deep)
    assert np.array_equal(read_film(path), plain)


@pytest.mark.parametrize("photometric", PHOTOMETRIC)
def test_jpeg_baseline_within_a_tolerance(tmp_path: Path, photometric: str):
    """Quality 95 costs at most 12 of 255 grey levels at a pixel, and less than 2 on average."""
    stored = 255 - EIGHT if photometric == "MONOCHROME1" else EIGHT
    stream = io.BytesIO()
    Image.fromarray(stored).save(stream, "JPEG", quality=95)
    path = encapsulated(tmp_path / "film", stream.getvalue(), stored, JPEGBaseline8Bit, photometric)
    wrong = np.abs(read_film(path) - EIGHT / 255) * 255
    assert 0 < wrong.mean() < 2 and wrong.max() <= 12


@pytest.mark.parametrize("photometric", PHOTOMETRIC)
def test_lossless_jpeg_is_read_or_says_what_is_missing(tmp_path: Path, plain: np.ndarray, photometric: str):
    stored = 4095 - RAW if photometric == "MONOCHROME1" else RAW
    path = encapsulated(tmp_path / "film", lossless_jpeg(stored), stored, JPEGLosslessSV1, photometric)
    if get_decoder(JPEGLosslessSV1).is_available:
        assert np.array_equal(read_film(path), plain)
    else:
        assert "no decoder is installed; pip install python-gdcm" in refusal(path)


@pytest.mark.parametrize(("syntax", "command"), [
    (JPEGLSLossless, "pip install pyjpegls"), (JPEG2000Lossless, "pip install pylibjpeg pylibjpeg-openjpeg"),
    (HTJ2KLossless, "pip install pylibjpeg pylibjpeg-openjpeg"), (JPEGLosslessSV1, "pip install python-gdcm")])
def test_a_missing_decoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, syntax: UID, command: str):
    path = encapsulated(tmp_path / "film", b"\xff\xd8 stream", RAW, syntax, "MONOCHROME2")
    monkeypatch.setattr(films, "get_decoder", lambda syntax: SimpleNamespace(is_available=False))
    reason = refusal(path)
    assert command in reason and syntax.name in reason


# ---- greys of DICOM


def lut(
    first: int,  # input value of the first entry
    bits: int,  # of the outputs
    table: np.ndarray,  # outputs
) -> Dataset:
    """An item of a LUT sequence."""
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(table), first, bits], table.astype(np.uint16).tobytes()
    item["LUTDescriptor"].VR, item["LUTData"].VR = "US", "OW"
    return item


WINDOWS = {
    "linear": dict(WindowCenter=2000, WindowWidth=1500),
    "several": dict(WindowCenter=[2000, 900], WindowWidth=[1500, 20]),
    "exact": dict(WindowCenter=2000, WindowWidth=1500, VOILUTFunction="LINEAR_EXACT"),
    "sigmoid": dict(WindowCenter=2000, WindowWidth=1500, VOILUTFunction="SIGMOID"),
    "rescaled": dict(WindowCenter=3900, WindowWidth=3000, RescaleSlope=2, RescaleIntercept=-100),
    "falling": dict(WindowCenter=-2000, WindowWidth=1500, RescaleSlope=-1, RescaleIntercept=0),
    "one grey wide": dict(WindowCenter=2000, WindowWidth=1),
    "table": dict(VOILUTSequence=[lut(700, 12, np.linspace(0, 4095, 2000) ** 2 / 4095)]),
    "table before window": dict(VOILUTSequence=[lut(0, 16, np.arange(4096) * 16)], WindowCenter=1, WindowWidth=1),
}


@pytest.mark.parametrize("photometric", PHOTOMETRIC)
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_and_tables_agree_with_pydicom(tmp_path: Path, name: str, photometric: str):
    data = dataset(RAW, ExplicitVRLittleEndian, photometric, **WINDOWS[name])
    data.save_as(tmp_path / "film", enforce_file_format=True)
    theirs = apply_voi_lut(apply_modality_lut(RAW, data), data).astype(float)
    if "VOILUTSequence" in data:
        table = np.frombuffer(data.VOILUTSequence[0].LUTData, np.uint16)
        theirs = (theirs - table.min()) / np.ptp(table)
    else:
        ends = np.array([0, 4095]) * float(data.get("RescaleSlope", 1)) + float(data.get("RescaleIntercept", 0))
        theirs = (theirs - ends[0]) / (ends[1] - ends[0])
    theirs = 1 - theirs if photometric == "MONOCHROME1" else theirs
    assert np.abs(read_film(tmp_path / "film") - theirs).max() < 1e-6


def test_tables_of_signed_values(tmp_path: Path):
    """The first input value is negative; some write it without its sign."""
    stored, table, deep = RAW.astype(np.int16) - 1000, np.arange(4096) * 16, dict(BitsStored=16, HighBit=15)
    unsigned = lut(0, 16, table)
    plain = read_film(save(tmp_path / "film", RAW, VOILUTSequence=[unsigned]))
    signed = lut(0, 16, table)
    signed.add_new("LUTDescriptor", "SS", [4096, -1000, 16])
    assert np.array_equal(read_film(save(tmp_path / "signed", stored, VOILUTSequence=[signed], **deep)), plain)
    unsigned.LUTDescriptor = [4096, 2**16 - 1000, 16]
    assert np.array_equal(read_film(save(tmp_path / "unsigned", stored, VOILUTSequence=[unsigned], **deep)), plain)


def test_intent_and_shape_of_pixels_may_be_stated(tmp_path: Path, plain: np.ndarray):
    path = save(tmp_path / "film", RAW, PresentationIntentType="FOR PRESENTATION", PixelAspectRatio=[1, 1])
    assert np.array_equal(read_film(path), plain)


def test_an_eight_bit_table_does_not_wrap_around(tmp_path: Path):
    table = np.linspace(0, 255, 4096).round()
    path = save(tmp_path / "film", RAW, VOILUTSequence=[lut(0, 8, table)])
    assert np.abs(read_film(path) - table[RAW] / 255).max() < 1e-6
    packed = lut(0, 8, table)
    packed.LUTData = table.astype(np.uint8).tobytes()
    assert np.array_equal(read_film(save(tmp_path / "packed", RAW, VOILUTSequence=[packed])), read_film(path))


def test_a_modality_table_of_twelve_bits(tmp_path: Path, plain: np.ndarray):
    path = save(tmp_path / "film", RAW, ModalityLUTSequence=[lut(0, 12, 4095 - np.arange(4096))])
    assert np.abs(read_film(path) - (1 - plain)).max() < 1e-6


def test_signed_values(tmp_path: Path, plain: np.ndarray):
    assert np.array_equal(read_film(save(tmp_path / "film", RAW.astype(np.int16) - 2048)), plain)


def test_presentation_shape_says_monochrome1_once_more(tmp_path: Path, plain: np.ndarray):
    path = save(tmp_path / "film", 4095 - RAW, photometric="MONOCHROME1", PresentationLUTShape="INVERSE")
    assert np.array_equal(read_film(path), plain)


@pytest.mark.parametrize("photometric", PHOTOMETRIC)
def test_eight_bits_are_as_in_a_png(tmp_path: Path, photometric: str):
    stored = 255 - EIGHT if photometric == "MONOCHROME1" else EIGHT
    for path in (save(tmp_path / "grey", stored, photometric=photometric),
                 save(tmp_path / "rgb", np.dstack([EIGHT] * 3), photometric="RGB")):
        assert np.abs(read_film(path) - EIGHT / 255).max() < 1e-6


def test_a_falling_rescale_inverts_eight_bits(tmp_path: Path):
    path = save(tmp_path / "film", 255 - EIGHT, RescaleSlope=-1, RescaleIntercept=255)
    assert np.abs(read_film(path) - EIGHT / 255).max() < 1e-6


def test_a_window_without_width_is_absent(tmp_path: Path, plain: np.ndarray):
    for k, more in enumerate((dict(WindowCenter=0, WindowWidth=0), dict(WindowCenter="", WindowWidth=""))):
        assert np.array_equal(read_film(save(tmp_path / str(k), RAW, **more)), plain)


@pytest.mark.parametrize("value", [0, 4095])
@pytest.mark.parametrize("photometric", PHOTOMETRIC)
def test_padding_neither_shows_nor_counts(tmp_path: Path, value: int, photometric: str):
    framed = np.full((300, 300), value, np.uint16)
    framed[90:202, 100:196] = 4095 - RAW if photometric == "MONOCHROME1" else RAW
    film = read_film(save(tmp_path / "film", framed, photometric=photometric, PixelPaddingValue=value))
    alone = read_film(save(tmp_path / "alone", framed[90:202, 100:196].copy(), photometric=photometric))
    assert np.array_equal(film[90:202, 100:196], alone)
    film[90:202, 100:196] = 0
    assert not film.any()


def test_padding_may_be_a_range_of_signed_values(tmp_path: Path):
    stored = RAW.astype(np.int16) - 1000
    stored[:40] = np.random.default_rng(0).integers(-2000, -1500, (40, 96))
    deep = dict(BitsStored=16, HighBit=15)
    film = read_film(save(tmp_path / "film", stored, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1500, **deep))
    assert not film[:40].any() and film[40:].min() == 0 and film[40:].max() == 1 and np.median(film[40:]) > 0.1


def test_an_overlay_above_the_stored_bits_is_cut_away(tmp_path: Path, plain: np.ndarray):
    marked = RAW.copy()
    marked[2:7, 2:10] |= 2**15  # 40 of 10,752 pixels
    assert np.array_equal(read_film(save(tmp_path / "film", marked)), plain)


def test_colour_spaces_of_grey_films(tmp_path: Path):
    grey = np.full_like(EIGHT, 128)
    path = save(tmp_path / "film", np.dstack([EIGHT, grey, grey]), photometric="YBR_FULL")
    assert np.abs(read_film(path) - EIGHT / 255).max() < 1e-6


def test_a_lead_letter_does_not_set_the_white(tmp_path: Path, plain: np.ndarray):
    marked = RAW.copy()
    marked[2:7, 2:10] = 4095  # 40 of 10,752 pixels
    film = read_film(save(tmp_path / "film", marked))
    assert np.abs(film[20:] - plain[20:]).max() < 0.05


def test_floating_point(tmp_path: Path, plain: np.ndarray):
    data = dataset(RAW, PixelData=None, BitsStored=None, HighBit=None, PixelRepresentation=None, BitsAllocated=32)
    data.FloatPixelData = RAW.astype(np.float32).tobytes()
    data.save_as(tmp_path / "film", enforce_file_format=True)
    assert np.abs(read_film(tmp_path / "film") - plain).max() < 1e-6
    spoilt = RAW.astype(np.float32)
    spoilt[5, 5] = np.inf
    data.FloatPixelData = spoilt.tobytes()
    data.save_as(tmp_path / "spoilt", enforce_file_format=True)
    assert "infinite" in refusal(tmp_path / "spoilt")


# ---- images


def test_sixteen_bit_images_are_stretched_alike(tmp_path: Path, plain: np.ndarray):
    for name in ("film.png", "film.tiff"):
        Image.fromarray(RAW).save(tmp_path / name)
        Image.fromarray(RAW * 16).save(tmp_path / f"more_{name}")
        assert np.array_equal(read_film(tmp_path / name), plain)
        assert np.abs(read_film(tmp_path / f"more_{name}") - plain).max() < 1e-6
        assert film_header(tmp_path / name).bits == 16
    Image.fromarray(RAW.astype(np.float32)).save(tmp_path / "float.tiff")
    Image.fromarray(RAW.astype(np.int32)).save(tmp_path / "int.tiff")
    assert np.abs(read_film(tmp_path / "float.tiff") - plain).max() < 1e-6
    assert np.abs(read_film(tmp_path / "int.tiff") - plain).max() < 1e-6


def test_white_may_be_zero(tmp_path: Path, plain: np.ndarray):
    Image.fromarray(4095 - RAW).save(tmp_path / "deep.tiff", tiffinfo={262: 0})
    assert np.array_equal(read_film(tmp_path / "deep.tiff"), plain)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "CMYK", "YCbCr"])
def test_all_kinds_of_grey(tmp_path: Path, mode: str):
    image = Image.fromarray(EIGHT).convert("RGB" if mode == "YCbCr" else mode)
    name, options = ("film.jpg", dict(quality=100, subsampling=0)) if mode in ("CMYK", "YCbCr") else ("film.png", {})
    image.save(tmp_path / name, **options)
    assert np.abs(read_film(tmp_path / name) - EIGHT / 255).max() < 3 / 255
    assert film_header(tmp_path / name).photometric == ("RGB" if mode == "YCbCr" else mode)


def test_one_bit_is_black_and_white(tmp_path: Path):
    Image.fromarray(EIGHT > 100).save(tmp_path / "film.png")
    assert np.array_equal(read_film(tmp_path / "film.png"), EIGHT > 100)
    assert film_header(tmp_path / "film.png").bits == 1


def test_transparency_is_black(tmp_path: Path):
    alpha = np.full_like(EIGHT, 255)
    alpha[:30] = 0
    Image.merge("LA", [Image.fromarray(EIGHT), Image.fromarray(alpha)]).save(tmp_path / "film.png")
    film = read_film(tmp_path / "film.png")
    assert not film[:30].any() and np.array_equal(film[30:], np.float32(EIGHT[30:]) / 255)


def test_the_orientation_may_come_last(tmp_path: Path):
    """PNG allows it behind the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(EIGHT))).save(tmp_path / "film.png", exif=exif)
    whole, chunks, at = (tmp_path / "film.png").read_bytes(), [], 8
    while at < len(whole):
        chunks.append(whole[at : at + 12 + struct.unpack(">I", whole[at : at + 4])[0]])
        at += len(chunks[-1])
    last = sorted(chunks[:-1], key=lambda chunk: chunk[4:8] == b"eXIf")
    assert last != chunks[:-1]
    (tmp_path / "film.png").write_bytes(b"".join([whole[:8], *last, chunks[-1]]))
    assert np.array_equal(read_film(tmp_path / "film.png"), np.float32(EIGHT) / 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tiff"])
def test_the_orientation_is_applied(tmp_path: Path, ending: str, orientation: int):
    back = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose,
            6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, 3)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(quality=100) if ending == "jpg" else {}
    stored = Image.fromarray(np.ascontiguousarray(back[orientation](EIGHT)))
    stored.save(tmp_path / f"film.{ending}", exif=exif, **options)
    film, header = read_film(tmp_path / f"film.{ending}"), film_header(tmp_path / f"film.{ending}")
    assert (header.height, header.width) == film.shape == EIGHT.shape
    assert np.abs(film - EIGHT / 255).max() < 4 / 255


def test_the_suffix_does_not_matter(tmp_path: Path, plain: np.ndarray):
    assert np.array_equal(read_film(save(tmp_path / "film.jpg", RAW)), plain)
    Image.fromarray(RAW).save(tmp_path / "film.dcm", "PNG")
    assert np.array_equal(read_film(tmp_path / "film.dcm"), plain)


@pytest.mark.parametrize(("share", "read"), [(0.0, True), (0.04, True), (0.06, False), (1.0, False)])
def test_annotations_may_be_coloured_but_not_the_film(tmp_path: Path, share: float, read: bool):
    rgb = np.dstack([EIGHT] * 3)
    rgb[: round(share * len(rgb))] = (200, 30, 30)
    Image.fromarray(rgb).save(tmp_path / "film.png")
    if read:
        assert np.array_equal(read_film(tmp_path / "film.png")[10:], np.float32(EIGHT[10:]) / 255)
    else:
        assert "colour" in refusal(tmp_path / "film.png")


# ---- what is refused


def png_bytes(
    height: int,
    width: int,
    bits: int,  # for each value
    kind: int,  # 0 grey, 2 RGB, 4 grey with alpha, 6 RGB with alpha
    content: bytes,  # lines of pixels
) -> bytes:
    """A PNG of a kind that Pillow does not write."""
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(content))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


def png_header(
    height: int,  # promised
    width: int,
) -> bytes:
    """A PNG that promises much and holds nothing."""
    return png_bytes(height, width, 8, 0, bytes(1000))


def deep_png(
    path: Path,  # where
    kind: int,  # as in `png_bytes`
) -> None:
    """Write a PNG of 16 bits; a fourth or second channel is opaque."""
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[kind]
    pixels = np.repeat(RAW[..., None] * 16, channels, 2).astype(">u2")
    if kind >= 4:
        pixels[..., -1] = 65535
    path.write_bytes(png_bytes(*RAW.shape, 16, kind, b"".join(b"\0" + line.tobytes() for line in pixels)))


def deep_tiff(
    path: Path,  # where
) -> None:
    """Write an uncompressed TIFF of 16 bits in three channels."""
    tags = [(256, RAW.shape[1]), (257, RAW.shape[0]), (258, 8), (259, 1), (262, 2), (273, 14), (277, 3),
            (278, RAW.shape[0]), (279, RAW.size * 6)]
    start = 14 + RAW.size * 6
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags]
    entries[2] = struct.pack("<HHII", 258, 3, 3, 8)
    pixels = np.repeat(RAW[..., None] * 16, 3, 2).astype("<u2").tobytes()
    body = b"".join([struct.pack("<HHH", 16, 16, 16), pixels, struct.pack("<H", len(tags)), *entries, bytes(4)])
    path.write_bytes(b"II*\0" + struct.pack("<I", start) + body)


def misstated(
    path: Path,  # where
    **values: str,  # numbers that pydicom would not write: a tag and its text
) -> None:
    """Write a DICOM film and put other texts into its header."""
    save(path, RAW, **dict.fromkeys(values, "1.2345678"))
    whole = path.read_bytes()
    for value in values.values():
        whole = whole.replace(b"1.2345678 ", value.ljust(10).encode(), 1)
    path.write_bytes(whole)


def half_transparent(
    path: Path,  # where
) -> None:
    """Write a film with an alpha of one half."""
    Image.merge("LA", [Image.fromarray(EIGHT), Image.fromarray(EIGHT * 0 + 128)]).save(path)


def image(path: Path, pixels: np.ndarray, **options: object) -> None:
    """Write an image."""
    Image.fromarray(pixels).save(path, **options)


PHOTO = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
CODE = Dataset()
CODE.CodeValue, CODE.CodingSchemeDesignator, CODE.CodeMeaning = "399173006", "SCT", "left lateral"
BAD = {  # file: how it is made, what is said
    "absent.png": (lambda p: None, "does not exist"),
    "folder.png": (lambda p: p.mkdir(), "is a folder"),
    "empty.png": (lambda p: p.touch(), "is empty"),
    "text.png": (lambda p: p.write_text("not a film"), "is neither"),
    "text.dcm": (lambda p: p.write_text("not a film " * 50), "is neither"),
    "film.gif": (lambda p: image(p, EIGHT), "is neither"),
    "bomb.png": (lambda p: p.write_bytes(png_header(12_000, 12_000)), "is 12000 x 12000 pixels"),
    "big_bomb.png": (lambda p: p.write_bytes(png_header(60_000, 60_000)), "too many pixels"),
    "short.png": (lambda p: p.write_bytes(png_header(64, 64)), "cannot be read"),
    "small.png": (lambda p: image(p, EIGHT[:31, :40]), "is 31 x 40 pixels"),
    "strip.png": (lambda p: image(p, EIGHT[:33, :].repeat(2, 1)), "is 33 x 192 pixels"),
    "black.png": (lambda p: image(p, EIGHT * 0), "single grey"),
    "even.jpg": (lambda p: image(p, EIGHT * 0 + 90), "single grey"),
    "even16.png": (lambda p: image(p, RAW * 0 + 900), "single grey"),
    "photo.jpg": (lambda p: image(p, PHOTO.repeat(8, 0).repeat(8, 1)), "colour picture"),
    "photo.png": (lambda p: image(p, PHOTO), "colour picture"),
    "deep_rgb.png": (lambda p: deep_png(p, 2), "has 16 bits in several channels"),
    "deep_la.png": (lambda p: deep_png(p, 4), "has 16 bits in several channels"),
    "deep_rgba.png": (lambda p: deep_png(p, 6), "has 16 bits in several channels"),
    "deep_rgb.tiff": (deep_tiff, "has 16 bits in several channels"),
    "ghost.png": (half_transparent, "is half transparent (100% of its pixels)"),
    "nan.tiff": (lambda p: image(p, np.where(EIGHT > 200, np.nan, PHANTOM).astype(np.float32)), "NaN"),
    "pages.tiff": (lambda p: image(p, EIGHT, save_all=True, append_images=[Image.fromarray(EIGHT)]), "2 pictures"),
    "lateral_ll.dcm": (lambda p: save(p, RAW, ViewPosition="LL"), "lateral view"),
    "lateral_rl.dcm": (lambda p: save(p, RAW, ViewPosition="RL"), "lateral view"),
    "lateral_word.dcm": (lambda p: save(p, RAW, ViewPosition="LATERAL"), "lateral view"),
    "lateral_code.dcm": (lambda p: save(p, RAW, ViewCodeSequence=[CODE]), "lateral view"),
    "ct.dcm": (lambda p: save(p, RAW, Modality="CT"), "modality CT"),
    "frames.dcm": (lambda p: save(p, RAW, NumberOfFrames=12), "12 frames"),
    "bomb.dcm": (lambda p: save(p, RAW, Rows=65535, Columns=65535), "is 65535 x 65535 pixels"),
    "palette.dcm": (lambda p: save(p, EIGHT, photometric="PALETTE COLOR"), "PALETTE COLOR"),
    "photo.dcm": (lambda p: save(p, PHOTO, photometric="RGB"), "colour picture"),
    "report.dcm": (lambda p: save(p, RAW, Rows=None, Columns=None, PixelData=None), "without a picture"),
    "no_pixels.dcm": (lambda p: save(p, RAW, PixelData=None), "no pixel data"),
    "few_pixels.dcm": (lambda p: save(p, RAW, PixelData=RAW.tobytes()[:8000]), "cannot be decoded"),
    "blank.dcm": (lambda p: save(p, RAW * 0 + 7), "single grey"),
    "blind.dcm": (lambda p: save(p, RAW, WindowCenter=9000, WindowWidth=10), "(centre 9000, width 10) that does not"),
    "pale.dcm": (
        lambda p: save(p, EIGHT, WindowCenter=2048, WindowWidth=4096), "(centre 2048, width 4096) that does not fit"),
    "raw.dcm": (lambda p: save(p, RAW, PresentationIntentType="FOR PROCESSING"), "raw detector data"),
    "oblong.dcm": (lambda p: save(p, RAW, PixelAspectRatio=[1, 2]), "not square (1:2)"),
    "almost_blind.dcm": (lambda p: save(p, RAW, WindowCenter=4200, WindowWidth=1502), "does not fit its values"),
    "dots.png": (lambda p: image(p, np.uint8(255 * (np.indices((96, 96)) % 48 == 0).all(0))), "all but 1%"),
    "nan_slope.dcm": (lambda p: misstated(p, RescaleSlope="nan"), "has rescale slope nan"),
    "inf_slope.dcm": (lambda p: misstated(p, RescaleSlope="inf"), "has rescale slope inf"),
    "no_slope.dcm": (lambda p: save(p, RAW, RescaleSlope=0), "has rescale slope 0"),
    "nan_intercept.dcm": (lambda p: misstated(p, RescaleIntercept="nan"), ", intercept nan"),
    "inf_intercept.dcm": (lambda p: misstated(p, RescaleIntercept="-inf"), ", intercept -inf"),
    "high_bit.dcm": (lambda p: save(p, RAW * 16, HighBit=15), "has HighBit 15 with 12 bits stored"),
    "many_bits.dcm": (lambda p: save(p, RAW * 16), "more than the 12 bits that are stored"),
    "three_greys.dcm": (
        lambda p: save(p, np.dstack([255 - EIGHT] * 3), photometric="MONOCHROME1"), "MONOCHROME1 with pixels of shape"),
    "one_colour.dcm": (lambda p: save(p, EIGHT, photometric="RGB"), "RGB with pixels of shape"),
    "padding.dcm": (lambda p: save(p, RAW * 0, PixelPaddingValue=0), "padding throughout"),
    "unknown_window.dcm": (lambda p: save(p, RAW, WindowCenter=1, WindowWidth=9, VOILUTFunction="CUBIC"), "CUBIC"),
    "movie.dcm": (lambda p: encapsulated(p, b"\0\0", RAW, MPEG2MPML, "MONOCHROME2"), "still picture"),
    "jpeg_noise.dcm": (
        lambda p: encapsulated(p, b"\xff\xd8noise", EIGHT, JPEGBaseline8Bit, "MONOCHROME2"), "cannot be decoded"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_films_are_refused_in_one_line(tmp_path: Path, name: str):
    make, said = BAD[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom has its doubts about what is made here
        make(tmp_path / name)
    reason = refusal(tmp_path / name)
    assert said in reason, reason
    assert len(reason) < 400


def test_depth_of_channels_is_told(tmp_path: Path, plain: np.ndarray):
    """What is refused above differs from a good film in its channels alone."""
    deep_png(tmp_path / "grey.png", 0)
    deep_png(tmp_path / "rgb.png", 2)
    deep_tiff(tmp_path / "rgb.tiff")
    assert np.abs(read_film(tmp_path / "grey.png") - plain).max() < 1e-6
    assert [film_header(tmp_path / name).bits for name in ("grey.png", "rgb.png", "rgb.tiff")] == [16, 16, 16]


def test_what_the_system_refuses_is_said(tmp_path: Path):
    assert "cannot be opened (File name too long)" in refusal(tmp_path / ("x" * 300))


def test_odd_names_stay_on_one_line(tmp_path: Path):
    with pytest.raises(FilmError) as caught:
        read_film(tmp_path / "two\nlines.png")
    assert len(str(caught.value).splitlines()) == 1
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # as from a worker process


def test_the_limit_is_the_callers(tmp_path: Path):
    Image.fromarray(EIGHT).save(tmp_path / "film.png")
    assert "limit of 10000" in refusal(tmp_path / "film.png", max_pixels=10_000)
    assert read_film(tmp_path / "film.png", max_pixels=EIGHT.size).shape == EIGHT.shape
    assert "limit of 10000" in refusal(save(tmp_path / "film", RAW), max_pixels=10_000)


def test_a_deflated_bomb_is_not_unpacked(tmp_path: Path):
    save(tmp_path / "film", RAW, DeflatedExplicitVRLittleEndian, ImageComments="x")
    start = 144 + struct.unpack("<I", (tmp_path / "film").read_bytes()[140:144])[0]
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = (tmp_path / "film").read_bytes()[:start]
    (tmp_path / "bomb").write_bytes(head + packer.compress(bytes(2**27)) + packer.flush())
    tracemalloc.start()
    for reader in (read_film, film_header):
        assert "unpacks to more than" in refusal(tmp_path / "bomb", reader, max_pixels=1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


def damaged(
    whole: bytes,  # a good file
    count: int,  # of damaged ones
) -> list[bytes]:
    """Cut a file off at random places, most of its bytes or few of them kept."""
    rng = random.Random(len(whole))
    return [whole[: int(len(whole) * rng.uniform(0, 0.97))] for _ in range(count)]


@pytest.mark.parametrize("kind", [
    "png", "png16", "jpg", "tiff", "tiff_lzw", "bmp", "dicom", "deflated", "rle", "j2k", "baseline", "lossless jpeg",
    "jpeg-ls"])
def test_truncated_files_are_refused(tmp_path: Path, kind: str):
    path = tmp_path / "whole"
    stream = io.BytesIO()
    if kind == "tiff_lzw":
        Image.fromarray(EIGHT).save(path, "TIFF", compression=kind)
    elif kind in ("png", "png16", "jpg", "tiff", "bmp"):
        Image.fromarray(RAW if kind == "png16" else EIGHT).save(path, kind.strip("16").replace("jpg", "jpeg"))
    elif kind == "j2k":
        Image.fromarray(EIGHT).save(stream, "JPEG2000", no_jp2=True)
        encapsulated(path, stream.getvalue(), EIGHT, JPEG2000Lossless, "MONOCHROME2")
    elif kind == "baseline":
        Image.fromarray(EIGHT).save(stream, "JPEG")
        encapsulated(path, stream.getvalue(), EIGHT, JPEGBaseline8Bit, "MONOCHROME2")
    elif kind == "lossless jpeg":
        if not get_decoder(JPEGLosslessSV1).is_available:
            pytest.skip("python-gdcm is not installed: a truncated lossless JPEG has NOT been read")
        encapsulated(path, lossless_jpeg(RAW), RAW, JPEGLosslessSV1, "MONOCHROME2")
    elif kind in ("rle", "jpeg-ls"):
        syntax, data = (RLELossless if kind == "rle" else JPEGLSLossless), dataset(RAW)
        if not get_encoder(syntax).is_available:
            pytest.skip("pyjpegls is not installed: a truncated JPEG-LS has NOT been read")
        data.compress(syntax)
        data.save_as(path, enforce_file_format=True)
    else:
        save(path, RAW, DeflatedExplicitVRLittleEndian if kind == "deflated" else ExplicitVRLittleEndian)
    assert read_film(path).shape == EIGHT.shape
    for part in damaged(path.read_bytes(), 40):
        (tmp_path / "part").write_bytes(part)
        refusal(tmp_path / "part")


@pytest.mark.parametrize("kind", ["png", "jpg", "dicom"])
def test_random_bytes_give_a_film_or_one_line(tmp_path: Path, kind: str):
    path = tmp_path / "whole"
    if kind == "dicom":
        save(path, RAW)
    else:
        Image.fromarray(EIGHT).save(path, kind.replace("jpg", "jpeg"))
    whole, rng = path.read_bytes(), random.Random(1)
    refused = 0
    for _ in range(60):
        spoilt = bytearray(whole)
        for _ in range(8):
            spoilt[rng.randrange(min(len(whole), 900))] = rng.randrange(256)
        path.write_bytes(spoilt)
        try:
            film = read_film(path, max_pixels=1_000_000)
        except FilmError as error:
            refused += 1
            assert len(str(error).splitlines()) == 1 and str(path) in str(error)
        else:
            assert film.dtype == np.float32 and 0 <= film.min() < film.max() <= 1
    assert refused > 5


# ---- headers


def test_the_header_names_nobody(tmp_path: Path):
    path = save(tmp_path / "film", RAW, ViewPosition="AP", BodyPartExamined="CHEST")
    header = film_header(path)
    assert (header.height, header.width, header.format, header.bits) == (112, 96, "DICOM", 12)
    assert (header.view, header.body_part, header.modality) == ("AP", "CHEST", "DX")
    assert not [word for word in ("Jane", "4711", "1950") if word in repr(header)]
    read = films._dicom_header(path, films.MAX_PIXELS)
    assert not [name for name in read.dir() if "Patient" in name] and "PixelData" not in read


def test_the_header_describes_what_is_refused(tmp_path: Path):
    assert film_header(save(tmp_path / "film", RAW, ViewPosition="LL")).view == "LATERAL"
    assert film_header(save(tmp_path / "ct", RAW, Modality="CT")).modality == "CT"
    assert "is empty" in refusal((tmp_path / "empty", (tmp_path / "empty").touch())[0], film_header)
    (tmp_path / "text").write_text("not a film")
    assert "is neither" in refusal(tmp_path / "text", film_header)
    assert "does not exist" in refusal(tmp_path / "absent", film_header)


@pytest.mark.parametrize(("view", "tags"), [
    ("PA", dict(ViewPosition="PA")), ("AP", dict(ViewPosition="AP")), ("", dict(ViewPosition="")), ("", {}),
    ("AP", dict(ViewPosition="AP LLD")), ("", dict(ViewPosition="LLD")), ("", dict(ViewPosition="LAO")),
    ("LATERAL", dict(ViewPosition="XTABLE LATERAL")), ("", dict(ViewPosition="LAT DECUBITUS"))])
def test_views(tmp_path: Path, view: str, tags: dict):
    path = save(tmp_path / "film", RAW, **tags)
    assert film_header(path).view == view
    if view != "LATERAL":
        assert read_film(path).shape == RAW.shape


# ---- the square


SHAPES = [(300, 200), (200, 300), (257, 257), (97, 241), (241, 97), (64, 64), (131, 130), (40, 119)]
CASES = list(itertools.product(SHAPES, (64, 101, 224), RESIZES))
each_fit = pytest.mark.parametrize(("shape", "size", "resize"), CASES)


@each_fit
def test_every_point_comes_back_to_itself(shape: tuple[int, int], size: int, resize: str):
    """Coordinates as greys: what is drawn back at a pixel is the place that it was taken from, within a pixel."""
    fit = Fit(*shape, size, resize)
    seen = fit.back(np.ones((size, size), bool))
    for axis, length in enumerate(shape):
        place = np.indices(shape)[axis].astype(np.float32)
        back = fit.back(fit.apply(place / length)) * length
        step = max(length / fit.axes[axis][0], 1)  # one pixel of the coarser of the two grids
        border = 4 * max(other / resized for other, (resized, _) in zip(shape, fit.axes, strict=True)) + 4
        inner = np.zeros(shape, bool)
        inner[int(border) : -int(border), int(border) : -int(border)] = True
        if resize == "shortest":  # nor at the edge of the cut
            inner &= fit.back(np.pad(np.ones((size - 6, size - 6), bool), 3))
        assert inner.any()
        wrong = np.abs(back - place)[inner & seen]
        assert wrong.max() < 0.25 * step, (wrong.max(), step)


@each_fit
def test_a_dot_comes_back_to_its_place(shape: tuple[int, int], size: int, resize: str):
    fit, rng = Fit(*shape, size, resize), np.random.default_rng(size)
    steps = [max(length / axis[0], 1) for length, axis in zip(shape, fit.axes, strict=True)]
    ys, xs = np.nonzero(fit.back(np.pad(np.ones((size - 8, size - 8), bool), 4)))
    for k in rng.integers(len(ys), size=4):
        film = np.zeros(shape, np.float32)
        film[ys[k], xs[k]] = 1
        back = fit.back(fit.apply(film).astype(np.float64))
        weight = back / back.sum()
        centre = [(weight * place).sum() for place in np.indices(shape)]
        assert abs(centre[0] - ys[k]) <= steps[0] and abs(centre[1] - xs[k]) <= steps[1], (centre, ys[k], xs[k])


@each_fit
def test_masks_and_patches_come_back(shape: tuple[int, int], size: int, resize: str):
    fit = Fit(*shape, size, resize)
    grid = 7
    tiles, labels = np.full(shape, -1), np.arange(grid * grid).reshape(grid, grid)
    for row, column in itertools.product(range(grid), repeat=2):
        top, left, bottom, right = fit.patch_box(row, column, grid)
        assert (tiles[top:bottom, left:right] == -1).all()  # no overlap
        tiles[top:bottom, left:right] = labels[row, column]
    drawn = fit.back(labels + 1) - 1  # 0 is what lies outside
    assert ((tiles == -1) == (drawn == -1)).mean() > 0.97 and (tiles == drawn).mean() > 0.9
    if resize != "shortest":
        assert (drawn >= 0).all() and (tiles >= 0).all()
    stack = fit.back(np.ones((2, 3, size, size), bool))
    assert stack.shape == (2, 3, *shape) and stack.dtype == bool
    cut = [length - round(length * min(1, size / axis[0])) for length, axis in zip(shape, fit.axes, strict=True)]
    assert abs(stack[0, 0].any(1).sum() - (shape[0] - cut[0])) <= 1
    assert abs(stack[0, 0].any(0).sum() - (shape[1] - cut[1])) <= 1
    assert Fit.from_dict(fit.as_dict()) == fit


def test_a_square_film_of_the_right_size_is_left_alone():
    film = PHANTOM[:96, :96]
    for resize in RESIZES:
        fit = Fit(96, 96, 96, resize)
        assert np.array_equal(fit.apply(film), film) and np.abs(fit.back(film) - film).max() < 1e-6


def test_attention_of_few_patches_is_smooth():
    heat = np.zeros((5, 5), np.float32)
    heat[2, 2] = 1
    drawn = Fit(200, 200, 50, "squash").back(heat)
    assert drawn.dtype == np.float32 and np.abs(np.diff(drawn, axis=0)).max() < 0.03 and drawn.max() > 0.9
    assert np.unique(Fit(200, 200, 50, "squash").back(heat, order=0)).tolist() == [0, 1]


@pytest.mark.parametrize("shape", [(384, 270), (270, 384), (301, 512), (224, 224), (97, 131), (513, 259)])
@pytest.mark.parametrize(("contrast", "worst"), [(0.7, 1.5), (1.0, 10)])
def test_shortest_is_open_clips_own_transform(shape: tuple[int, int], contrast: float, worst: float):
    """open_clip resizes in 8 bits, once along each axis: that costs up to 1.5 of 255 at a pixel, 0.5 on average.

    Where noise spans black to white, it also cuts overshoot between the axes; then single pixels differ by up to 10."""
    from open_clip.transform import image_transform

    rng = np.random.default_rng(shape[0])
    coarse = rng.random((shape[0] // 4 + 1, shape[1] // 4 + 1)).repeat(4, 0).repeat(4, 1)[: shape[0], : shape[1]]
    film = np.uint8(127 + 255 * contrast * (0.7 * coarse + 0.3 * rng.random(shape) - 0.5))
    theirs = image_transform(224, is_train=False, mean=(0, 0, 0), std=(1, 1, 1))(Image.fromarray(film)).numpy()
    ours = fit_film(np.float32(film) / 255, 224, "shortest")
    wrong = np.abs(theirs - ours) * 255
    assert wrong.max() <= worst and wrong.mean() < 0.5


def test_impossible_fits_are_refused():
    with pytest.raises(ValueError, match="squash, shortest or pad"):
        fit_film(PHANTOM, 40, "crop")
    for bad in ((0, 10, 10), (10, -1, 10), (10, 10, 0), (10, 10.5, 10)):
        with pytest.raises(ValueError, match="whole number"):
            Fit(*bad, "pad")
    with pytest.raises(ValueError, match="112 x 96"):
        Fit(112, 96, 32, "pad").apply(PHANTOM.T)
