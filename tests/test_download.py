"""Downloads against a server on this machine that misbehaves on purpose, and archives that want out of their folder."""

import bz2
import errno
import gzip
import hashlib
import io
import json
import lzma
import random
import shutil
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from llava_ta import download
from llava_ta.download import DiskFullError, fetch, unpack
from llava_ta.sources import fetch_openi

WHOLE = gzip.compress(random.Random(0).randbytes(3_000_000))
OTHER = gzip.compress(random.Random(1).randbytes(3_000_000))


class Server(ThreadingHTTPServer):
    """Serves one file; what it does wrong is set by the test, and each request is noted."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag, self.date = WHOLE, '"v1"', ""
        self.cuts: list[int] = []  # bytes after which the next answers end
        self.codes: list[int] = []  # error codes of the next answers
        self.flips: list[bool] = []  # whether the next answers have a wrong byte
        self.lengths: list[str] = []  # what the next answers say of their length
        self.turns = False  # whether every answer leads to the same address again
        self.ignores_range = self.ignores_condition = False
        self.seen: list[tuple[str | None, int]] = []  # Range header and status of each answer

    @property
    def url(self) -> str:
        """The address of the file."""
        return f"http://127.0.0.1:{self.server_port}/films.tgz"


class Handler(BaseHTTPRequestHandler):
    """Answers GET as the server's settings say."""

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        if server.turns:
            self.note(asked, 302)
            self.send_header("Location", server.url)
            self.end_headers()
            return
        if server.codes:
            self.note(asked, server.codes.pop(0))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        content, start = server.content, int(asked[6:-1]) if asked else 0
        same = server.ignores_condition or self.headers.get("If-Range") in (server.tag, server.date)
        if server.ignores_range or not same:
            start = 0
        if start > len(content):
            self.note(asked, 416)
            self.end_headers()
            return
        self.note(asked, 206 if start else 200)
        for name, value in (("ETag", server.tag), ("Last-Modified", server.date)):
            if value:
                self.send_header(name, value)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        body = bytearray(content[start:])
        self.send_header("Content-Length", server.lengths.pop(0) if server.lengths else str(len(body)))
        self.end_headers()
        if server.flips and server.flips.pop(0):
            body[len(body) // 2] ^= 1
        self.wfile.write(body[: server.cuts.pop(0)] if server.cuts else body)

    def note(self, asked: str | None, status: int):
        """Begin an answer and remember it."""
        self.server.seen.append((asked, status))
        self.send_response(status)

    def log_message(self, *_):
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    """A server that runs while a test does."""
    running = Server()
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


def get(server: Server, folder: Path, **options) -> tuple[Path, list[str]]:
    """Fetch the file, quickly; returns it and what was said."""
    news: list[str] = []
    return fetch(server.url, folder / "films.tgz", wait=0.001, timeout=5, say=news.append, **options), news


def one_line(told: pytest.ExceptionInfo) -> str:
    """What an error says, after checking that it is a single line."""
    assert len(str(told.value).splitlines()) == 1, told.value
    return str(told.value)


def hidden(folder: Path) -> list[str]:
    """Files that a download leaves behind, but for its lock."""
    names = (path.name for path in folder.iterdir() if path.name.startswith("."))
    return sorted(name for name in names if not name.endswith(".lock"))


def test_dropped_connections_are_taken_up(server: Server, tmp_path: Path):
    server.cuts = [1_000_000, 700_000, 1]
    file, news = get(server, tmp_path)
    assert file.read_bytes() == WHOLE
    assert [asked for asked, _ in server.seen] == [None, "bytes=1000000-", "bytes=1700000-", "bytes=1700001-"]
    assert [status for _, status in server.seen] == [200, 206, 206, 206]
    assert len(news) == 3 and "after 1,000,000 of" in news[0] and hidden(tmp_path) == []
    noted = json.loads((tmp_path / "films.tgz.lock.json").read_text())
    assert noted == {"url": server.url, "bytes": len(WHOLE), "sha256": hashlib.sha256(WHOLE).hexdigest()}


def test_a_later_call_goes_on(server: Server, tmp_path: Path):
    server.cuts = [1_000_000, 0, 0]
    with pytest.raises(OSError, match="what came is kept, and the next call goes on"):
        get(server, tmp_path, tries=2)
    assert not (tmp_path / "films.tgz").exists() and not (tmp_path / "films.tgz.lock.json").exists()
    server.cuts = []
    assert get(server, tmp_path)[0].read_bytes() == WHOLE
    assert server.seen[-1] == ("bytes=1000000-", 206)


def test_a_server_that_ignores_range(server: Server, tmp_path: Path):
    server.cuts, server.ignores_range = [1_000_000], True
    assert get(server, tmp_path)[0].read_bytes() == WHOLE
    assert server.seen == [(None, 200), ("bytes=1000000-", 200)]


@pytest.mark.parametrize("tag, date", [('"v1"', ""), ("", "Mon, 01 Jan 2024 00:00:00 GMT"), ('W/"v1"', ""), ("", "")])
def test_a_file_that_changes_between_attempts(server: Server, tmp_path: Path, tag: str, date: str):
    server.tag, server.date, server.cuts = tag, date, [1_000_000]
    with pytest.raises(OSError):
        get(server, tmp_path, tries=1)
    server.content, server.tag, server.date = OTHER, tag and '"v2"', date and "Tue, 02 Jan 2024 00:00:00 GMT"
    assert get(server, tmp_path)[0].read_bytes() == OTHER, "parts of two files were put together"
    assert server.seen[-1][1] == 200


def test_a_changed_file_behind_a_server_that_ignores_the_condition(server: Server, tmp_path: Path):
    """Length and CRC find what the server did not say."""
    server.cuts = [1_000_000]
    with pytest.raises(OSError):
        get(server, tmp_path, tries=1)
    server.content, server.ignores_condition = OTHER, True
    file, news = get(server, tmp_path)
    assert file.read_bytes() == OTHER and any("fetching it once more" in line for line in news)


def test_a_wrong_byte_is_fetched_again(server: Server, tmp_path: Path):
    server.flips = [True]
    file, news = get(server, tmp_path)
    assert file.read_bytes() == WHOLE and "is damaged" in news[0] and len(server.seen) == 2
    server.flips = [True, True]
    with pytest.raises(ValueError, match="what came is damaged"):
        get(server, tmp_path / "again")
    assert not (tmp_path / "again" / "films.tgz").exists() and hidden(tmp_path / "again") == []


def test_another_digest_than_at_the_first_time(server: Server, tmp_path: Path):
    file, _ = get(server, tmp_path)
    file.unlink()
    server.content, server.tag = OTHER, '"v2"'
    with pytest.raises(ValueError, match="of the first download; to accept another one delete .*films.tgz.lock.json"):
        get(server, tmp_path)
    assert not file.exists()
    (tmp_path / "films.tgz.lock.json").unlink()
    assert get(server, tmp_path)[0].read_bytes() == OTHER
    file.write_bytes(WHOLE)
    with pytest.raises(ValueError, match="if the file is wrong, delete it"):
        get(server, tmp_path)


def test_a_digest_that_is_known(server: Server, tmp_path: Path):
    assert get(server, tmp_path, sha256=hashlib.sha256(WHOLE).hexdigest())[0].is_file()
    assert get(server, tmp_path, sha256=f" {hashlib.sha256(WHOLE).hexdigest().upper()}\n")[0].is_file()
    with pytest.raises(ValueError, match="of the one that was asked for"):
        get(server, tmp_path / "other", sha256="0" * 64)
    asked = len(server.seen)
    with pytest.raises(ValueError, match="sha256 is 'abc'; a SHA-256 has 64 hexadecimal digits"):
        get(server, tmp_path / "third", sha256="abc")
    assert len(server.seen) == asked, "it was fetched before it was clear what it is compared with"


@pytest.mark.parametrize("content", ['{"sha256": "ab', "[]", "{}", '{"sha256": null}', '{"sha256": "abc"}', "\0"])
def test_a_damaged_note_is_told_before_anything_is_fetched(server: Server, tmp_path: Path, content: str):
    note = tmp_path / "films.tgz.lock.json"
    note.write_text(content)
    with pytest.raises(ValueError) as told:
        get(server, tmp_path)
    assert one_line(told).startswith(f"{note} is damaged") and "delete it" in str(told.value)
    assert server.seen == [] and not (tmp_path / "films.tgz").exists()
    note.unlink()
    assert get(server, tmp_path)[0].read_bytes() == WHOLE
    note.write_text(content)
    with pytest.raises(ValueError, match="is damaged: it does not say"):
        get(server, tmp_path)


def test_a_length_that_is_none(server: Server, tmp_path: Path):
    server.lengths = ["many"]
    file, news = get(server, tmp_path)
    assert file.read_bytes() == WHOLE and "the server says that the file has 'many' bytes" in news[0]
    server.lengths = ["-5"] * 2
    with pytest.raises(OSError) as told:
        get(server, tmp_path / "other", tries=2)
    assert one_line(told) == f"{server.url} could not be fetched: the server says that the file has '-5' bytes"


def test_a_circle_of_redirections_is_told_in_one_line(server: Server, tmp_path: Path):
    server.turns = True
    with pytest.raises(OSError) as told:
        get(server, tmp_path)
    assert "HTTP 302" in one_line(told) and "infinite loop" in str(told.value)


def test_a_page_instead_of_an_archive(server: Server, tmp_path: Path):
    server.content = b"<!DOCTYPE html>\n<html>404: it has moved</html>"
    with pytest.raises(ValueError) as told:
        get(server, tmp_path)
    assert one_line(told) == f"{server.url}: what came is a web page, not an archive"


def test_a_folder_in_the_place_of_the_file(server: Server, tmp_path: Path):
    (tmp_path / "films.tgz").mkdir()
    with pytest.raises(ValueError, match="films.tgz is a folder"):
        get(server, tmp_path)
    assert server.seen == []


def test_what_is_refused_for_good_is_not_asked_again(server: Server, tmp_path: Path):
    server.codes = [404]
    with pytest.raises(OSError) as told:
        get(server, tmp_path)
    assert one_line(told) == f"{server.url} could not be fetched: HTTP 404 Not Found"  # nothing came that could be kept
    assert len(server.seen) == 1
    server.codes = [503, 500]
    assert get(server, tmp_path)[0].read_bytes() == WHOLE and len(server.seen) == 4


def test_too_long_a_part_is_thrown_away(server: Server, tmp_path: Path):
    (tmp_path / ".films.tgz.part").write_bytes(b"x" * (len(WHOLE) + 5))
    (tmp_path / ".films.tgz.part.json").write_text(json.dumps({"validator": '"v1"', "total": len(WHOLE)}))
    assert get(server, tmp_path)[0].read_bytes() == WHOLE
    assert [status for _, status in server.seen] == [416, 200]


def test_a_full_disk_is_told_before_it_is_full(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(DiskFullError, match="films.tgz needs 0.00 GB, but .* has 0.00 GB free"):
        get(server, tmp_path)
    assert len(server.seen) == 1 and not (tmp_path / "films.tgz").exists()
    small = archive(tmp_path / "small.tgz", *((f"{i}.png", FILE, "") for i in range(3)))
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 0))
    with pytest.raises(DiskFullError, match="small.tgz: 0.png needs"):
        unpack(small, tmp_path / "small")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("code, full", [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)])
def test_what_the_disk_refuses_is_not_tried_again(
        server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, full: bool):
    def receive(*_: object):
        calls.append(1)
        raise OSError(code, "the disk says no")

    calls: list[int] = []
    monkeypatch.setattr(download, "_receive", receive)
    with pytest.raises(OSError) as told:
        get(server, tmp_path)
    assert len(calls) == 1 and isinstance(told.value, DiskFullError) == full and server.url in one_line(told)


def test_a_server_that_speaks_of_free_space_is_tried_again(
        server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Kinds of errors are told by their class, not by their words."""
    whole, calls = download._receive, []

    def receive(*arguments: object):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("the cache of the proxy has 0 GB free")
        whole(*arguments)

    monkeypatch.setattr(download, "_receive", receive)
    assert get(server, tmp_path)[0].read_bytes() == WHOLE and len(calls) == 2


def test_nobody_answers(tmp_path: Path):
    with pytest.raises(OSError, match="http://127.0.0.1:9/a.tgz could not be fetched: .*refused"):
        fetch("http://127.0.0.1:9/a.tgz", tmp_path / "a.tgz", tries=2, wait=0.001, say=lambda line: None)
    with pytest.raises(ValueError, match="http:// or https://"):
        fetch("file:///etc/passwd", tmp_path / "a.tgz")


# ---- unpacking


def archive(path: Path, *members: tuple[str, bytes, str]) -> Path:
    """Write a tar archive of (name, type, link target)."""
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, target in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname, content = kind, target, b"content" if kind == tarfile.REGTYPE else b""
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


FILE = tarfile.REGTYPE


@pytest.mark.parametrize(
    "members, why",
    [
        ([("../evil", FILE, "")], "leaves its folder"),
        ([("a/../../evil", FILE, "")], "leaves its folder"),
        ([("..\\evil", FILE, "")], "leaves its folder"),
        ([("/tmp/evil", FILE, "")], "is absolute"),
        ([("C:\\evil", FILE, "")], "is absolute"),
        ([("out", tarfile.SYMTYPE, ".."), ("out/evil", FILE, "")], "is a link"),
        ([("out", tarfile.SYMTYPE, "/etc/passwd")], "is a link"),
        ([("hard", tarfile.LNKTYPE, "/etc/passwd")], "is a link"),
        ([("tty", tarfile.CHRTYPE, "")], "neither a file nor a folder"),
        ([("pipe", tarfile.FIFOTYPE, "")], "neither a file nor a folder"),
        ([("a", FILE, ""), ("a", FILE, "")], "occurs twice"),
        ([("a", FILE, ""), ("a/b", FILE, "")], "lies in another entry that is a file"),
        ([("a", FILE, ""), ("a/b/c/d", FILE, "")], "lies in another entry that is a file"),
        ([("a", FILE, ""), ("a/b", tarfile.DIRTYPE, "")], "lies in another entry that is a file"),
        ([("a/b", FILE, ""), ("a", FILE, "")], "occurs twice"),
        ([("a", FILE, ""), ("a", tarfile.DIRTYPE, "")], "occurs twice"),
        ([("x" * 300, FILE, "")], "File name too long"),
    ],
)
def test_nothing_leaves_the_folder(tmp_path: Path, members: list, why: str):
    evil = archive(tmp_path / "evil.tgz", ("good.png", FILE, ""), *members)
    before = {str(path) for path in tmp_path.parent.rglob("*")}
    with pytest.raises(OSError if "too long" in why else ValueError, match=f"{why}; nothing was unpacked") as told:
        unpack(evil, tmp_path / "films", say=lambda line: None)
    assert one_line(told).startswith(f"{evil}: ")
    new = {str(path) for path in tmp_path.parent.rglob("*")} - before
    assert new <= {str(tmp_path / ".films.lock")} and not Path("/tmp/evil").exists()


def test_a_cut_archive_leaves_nothing(tmp_path: Path):
    whole = archive(tmp_path / "a.tgz", *((f"{i}.png", FILE, "") for i in range(500)))
    whole.write_bytes(whole.read_bytes()[:-200])
    with pytest.raises(ValueError, match="is damaged: .*; nothing was unpacked"):
        unpack(whole, tmp_path / "films")
    assert not (tmp_path / "films").exists() and hidden(tmp_path) == []
    (tmp_path / ".films.unpacking").mkdir()  # what a killed process leaves is no obstacle
    unpack(archive(tmp_path / "b.tgz", ("x/a.png", FILE, "")), tmp_path / "films", say=lambda line: None)
    assert [path.name for path in (tmp_path / "films").rglob("*.png")] == ["a.png"] and hidden(tmp_path) == []


def test_folders_may_be_named_before_after_and_twice(tmp_path: Path):
    folder = ("a/", tarfile.DIRTYPE, "")
    made = archive(tmp_path / "a.tgz", folder, ("a/b.png", FILE, ""), folder, ("./a/c.png", FILE, ""))
    unpack(made, tmp_path / "films", say=lambda line: None)
    assert sorted(path.name for path in (tmp_path / "films" / "a").iterdir()) == ["b.png", "c.png"]


PACKERS = {"": bytes, "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
ENTRIES = [(f"films/{i}.png", FILE, "") for i in range(40)]  # of 1,024 bytes each: a header, and the content filled up


def refused(path: Path, content: bytes) -> str:
    """Write an archive that must not be unpacked, and give the reason."""
    path.write_bytes(content)
    with pytest.raises(ValueError) as told:
        unpack(path, path.parent / "films", say=lambda line: None)
    said = one_line(told)
    assert said.startswith(f"{path} is damaged: ") and said.endswith("; nothing was unpacked"), said
    assert not (path.parent / "films").exists() and hidden(path.parent) == []
    return said


@pytest.mark.parametrize("packer", PACKERS)
def test_archives_cut_anywhere_are_refused(tmp_path: Path, packer: str):
    """Between two entries, in a header, in a content, in the packed bytes, in the checksum behind them."""
    plain = gzip.decompress(archive(tmp_path / "whole.tgz", *ENTRIES).read_bytes())
    for cut in (1024, 2048, 2 * 1024 + 100, 2 * 1024 + 515, 39 * 1024, 40 * 1024):
        said = refused(tmp_path / "cut.tar", PACKERS[packer](plain[:cut]))
        assert ("no end mark" in said) == (cut % 1024 < 512), said
    spoilt = bytearray(plain)
    spoilt[5 * 1024 + 3] ^= 1
    assert "bad checksum at byte 5,120" in refused(tmp_path / "spoilt.tar", PACKERS[packer](bytes(spoilt)))
    if packer:
        packed = PACKERS[packer](plain)
        for cut in (1, 3, 5, 9, len(packed) // 2):
            refused(tmp_path / "cut.tar", packed[:-cut])
    if packer == "gz":
        refused(tmp_path / "crc.tar", packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:])
    refused(tmp_path / "empty.tar", b"")
    (tmp_path / "whole.tar").write_bytes(PACKERS[packer](plain))
    unpack(tmp_path / "whole.tar", tmp_path / "films", say=lambda line: None)
    assert len(list((tmp_path / "films" / "films").iterdir())) == 40


def test_a_file_in_the_place_of_the_folder(tmp_path: Path):
    (tmp_path / "films").touch()
    with pytest.raises(ValueError, match="films is a file"):
        unpack(archive(tmp_path / "a.tgz", ("a.png", FILE, "")), tmp_path / "films")


def test_no_archive_there(tmp_path: Path):
    with pytest.raises(OSError) as told:
        unpack(tmp_path / "absent.tgz", tmp_path / "films")
    assert "absent.tgz: No such file or directory" in one_line(told)


def test_open_i_is_fetched_and_unpacked(server: Server, tmp_path: Path):
    server.content = archive(tmp_path / "made.tgz", ("CXR1_1_IM-0001-4001.png", FILE, "")).read_bytes()
    server.cuts = [50]
    news: list[str] = []
    folder = fetch_openi(tmp_path / "openi", {"NLMCXR_png": server.url}, say=news.append)
    assert (folder / "NLMCXR_png" / "CXR1_1_IM-0001-4001.png").read_bytes() == b"content"
    asked = len(server.seen)
    fetch_openi(folder, {"NLMCXR_png": server.url}, say=news.append)
    assert len(server.seen) == asked, "what is there was fetched again"
