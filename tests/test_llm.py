"""Decomposition by a language model, against servers on the loopback: a faulty one, and one with a tiny model."""

import json
import logging
import socket
import threading
import time
import traceback
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

import tiny_llm
from faults import asked, served, serving
from llava_ta.core import read_json
from llava_ta.llm import LLMDecomposer
from llava_ta.rules import RuleDecomposer
from pipeline import chapter

KEY, WORD = "planted-key-5271", "Zibberwood"  # must turn up nowhere but in requests

# ---- faults


def finish(
    process,  # of a client
) -> dict:  # what it found
    """Wait for a client."""
    said, wrong = process.communicate(timeout=900)
    assert process.returncode == 0, wrong[-2000:]
    return json.loads(said.splitlines()[-1])


def check(
    found: dict,  # of a client
    stats: dict,  # of the server
    number: int,  # of reports
) -> None:
    """No report is lost, none is asked about twice, and faults were met."""
    assert found["done"] == sum(found["made_by"].values()) == number and not found["wrong"], found
    assert "no answer" not in found["made_by"], found["made_by"]
    assert stats["repeated"] == 0 and stats["most"] <= 64, stats
    assert {"llm", "llm-repaired"} <= set(found["made_by"]) and len(stats["served"]) == 8, (found, stats)


def interrupt(
    url: str,  # of the server
    cache: Path,  # file of answers
    number: int,  # of reports
    timeout: float,  # seconds
) -> tuple[int, int]:  # answers that the server has sent by then, and those in the file
    """Kill a client half-way."""
    process = asked(url, cache, number, timeout)
    while served(url)["answers"] < number // 2:
        assert process.poll() is None, process.communicate()[1][-2000:]
        time.sleep(0.05)
    process.kill()
    process.communicate()
    time.sleep(0.6)  # what was on the way arrives nowhere
    return served(url)["answers"], cache.read_bytes().count(b"\n")


def resume(
    url: str,  # of the server
    cache: Path,  # file of answers
    number: int,  # of reports
    timeout: float,  # seconds
) -> None:
    """Kill a client half-way and start another one: it asks for nothing that the first one has received."""
    sent, kept = interrupt(url, cache, number, timeout)
    assert number // 4 < kept <= sent <= kept + 64, "what was received is in the file"
    found, stats = finish(asked(url, cache, number, timeout)), served(url)
    assert found["done"] == number and not found["wrong"]
    assert stats["repeated"] <= sent - kept, "only what was in flight at the end is asked again"


def test_faults(tmp_path: Path):
    with serving(0.02, 0.1, 0.1) as url:
        found = finish(asked(url, tmp_path / "answers.jsonl", 300, 3))
        check(found, served(url), 300)


def test_resuming(tmp_path: Path):
    with serving(0.02, 0.1, 0.1) as url:
        resume(url, tmp_path / "answers.jsonl", 300, 3)


@pytest.mark.slow
def test_five_thousand_reports(tmp_path: Path):
    """64 slots are kept busy for 90 % of the time that the answers and faults take, and memory does not grow."""
    with serving(0.5, 0.1, 1) as url:
        found = finish(asked(url, tmp_path / "answers.jsonl", 5000, 5))
        stats = served(url)
    hangs = stats["served"]["hang"]
    least = (0.5 * (sum(stats["served"].values()) - hangs) + 5 * hangs) / 64  # seconds, were no slot ever idle
    grown = (max(found["memory"][25:]) - max(found["memory"][15:25])) / 2**20  # second half against the first
    print(f"\n{found['seconds']:.1f} s, {least / found['seconds']:.1%} of what is possible, {grown:+.1f} MB;", stats)
    check(found, stats, 5000)
    assert least / found["seconds"] >= 0.9
    assert grown < 8


@pytest.mark.slow
def test_five_thousand_reports_resumed(tmp_path: Path):
    with serving(0.5, 0.1, 1) as url:
        resume(url, tmp_path / "answers.jsonl", 5000, 5)


# ---- a real server


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with a tiny Llama."""
    with tiny_llm.serving(tmp_path_factory.mktemp("model")) as url:
        yield url


def test_the_server_decodes_under_a_schema(tiny: str, tmp_path: Path):
    """Left to itself the model begins with a courtesy; asked by us it answers, and its answer is checked."""
    body = {"messages": [{"role": "user", "content": "No pneumothorax."}], "max_tokens": 50, "temperature": 0}
    request = urllib.request.Request(f"{tiny}/chat/completions", json.dumps(body).encode())
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as response:
        assert json.load(response)["choices"][0]["message"]["content"].startswith(tiny_llm.COURTESY)
    decomposer = LLMDecomposer(tiny, "tiny", tmp_path / "answers.jsonl", concurrency=2)
    reports = ["No pneumothorax.", "The heart is enlarged."]
    results = [result for _, result in sorted(decomposer.decompose_all(reports), key=lambda pair: pair[0])]
    assert [result.made_by for result in results] == ["llm", "fallback"]
    assert [s.sentence for s in results[0].sentences] == ["Pneumothorax is absent."]
    assert results[1].sentences == RuleDecomposer().decompose(reports[1]) and results[1].problems == ("support",)
    assert decomposer.ledger.spent["requests"] == 3 and decomposer.ledger.spent["read"] > 1000


def test_the_notebook_runs_all_three(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By rules, by the tiny model, and by a file that holds what the rules have made."""
    monkeypatch.setenv("LLAVA_TA_RUNS", str(tmp_path))
    chapter("02_decompose", run="rules", decomposer="rules")
    findings = pd.read_parquet(tmp_path / "rules" / "decompose" / "findings.parquet")
    assert set(findings["made_by"]) == {"rules"} and set(findings["prompt"]) == {""}

    server = f"decompose.base_url={tiny}, decompose.model=tiny, decompose.concurrency=2"
    chapter("02_decompose", run="llm", decomposer="llm", overrides=server)
    made = read_json(tmp_path / "llm" / "decompose" / "record.json")["metrics"]
    assert set(made["made_by"]) <= {"llm", "llm-repaired", "fallback"} and made["made_by"]["fallback"]
    assert made["spent"]["requests"] == (tmp_path / "llm" / "llm" / "answers.jsonl").read_text().count("\n")

    columns = ["topic", "polarity", "sentence"]
    groups = findings.groupby("study")
    lines = [{"study": study, "findings": rows[columns].to_dict("records")} for study, rows in groups]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    chapter("02_decompose", run="import", decomposer="import", overrides=f"decompose.file={tmp_path / 'mine.jsonl'}")
    again = pd.read_parquet(tmp_path / "import" / "decompose" / "findings.parquet")
    order = ["study", "topic"]
    one, other = (table.sort_values(order)[["study", *columns]].reset_index(drop=True) for table in (findings, again))
    pd.testing.assert_frame_equal(one, other)
    assert set(again["made_by"]) == {"import"}


# ---- privacy


class Echo(BaseHTTPRequestHandler):
    """Answers with a status, and tells all that it was sent, as servers do that mean well."""

    def do_POST(self):
        """Answer."""
        sent = self.rfile.read(int(self.headers["content-length"])).decode()
        self.server.asked.append(self.headers["host"])
        body = json.dumps({"error": {"message": sent, "key": self.headers["authorization"]}}).encode()
        self.send_response(self.server.status)
        self.send_header("location", self.server.elsewhere)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object):
        """Say nothing."""


@contextmanager
def echoing(
    status: int,  # of every response
    elsewhere: str = "",  # where a redirect leads
) -> Iterator[ThreadingHTTPServer]:
    """Run an echo in a thread."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Echo)
    server.status, server.elsewhere, server.asked = status, elsewhere, []
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [200, 302, 400, 401, 429, 500])
def test_neither_key_nor_report_is_told(status: int, tmp_path: Path, caplog, capfd, monkeypatch):
    monkeypatch.setenv("LLAVA_TA_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    said, told = [], ""
    with echoing(status) as server:
        decomposer = LLMDecomposer(server.url, "toy", tmp_path / "answers.jsonl", say=said.append, retries=1)
        try:
            decomposer.decompose(f"{WORD} fracture of a rib.")
        except ConnectionError as error:
            told = "".join(traceback.format_exception(error))
            assert error.__context__ is None and error.__cause__ is None
    assert len(server.asked) == (2 if status in (200, 429, 500) else 1) and bool(told) == (status in (302, 401))
    told += "".join([caplog.text, *capfd.readouterr(), *said, str(decomposer.counts), str(vars(decomposer))])
    assert KEY not in told and WORD not in told


def test_redirects_are_not_followed(tmp_path: Path):
    with echoing(200) as second, echoing(307, second.url) as first:
        with pytest.raises(ConnectionError, match="redirects are not followed"):
            LLMDecomposer(first.url, "toy", tmp_path / "answers.jsonl").decompose("Small effusion.")
        assert first.asked and not second.asked


def test_only_addresses_that_were_checked_are_asked(tmp_path: Path, monkeypatch):
    """A name that comes to stand for another address, and proxies in the environment, lead nowhere else."""
    known, looked_up = socket.getaddrinfo, []

    def resolve(host, port, *args, **more):
        if host != "model.example":
            return known(host, port, *args, **more)
        looked_up.append(host)
        addresses = ["127.0.0.1"] if len(looked_up) == 1 else ["127.0.0.1", "8.8.8.8"]
        return [row for address in addresses for row in known(address, port, *args, **more)]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, "http://127.0.0.1:9/")
    with echoing(400) as server:
        url = f"http://model.example:{server.server_port}/v1"
        decomposer = LLMDecomposer(url, "toy", tmp_path / "answers.jsonl")
        decomposer.decompose("Small effusion.")
        assert server.asked == [f"model.example:{server.server_port}"] and looked_up == ["model.example"]
        for more in ({}, {"allow_external_endpoint": True}):
            with pytest.raises(ValueError, match="https"):
                LLMDecomposer(url, "toy", tmp_path / "answers.jsonl", **more)
        with pytest.raises(PermissionError, match="PhysioNet"):
            LLMDecomposer(url.replace("http:", "https:"), "toy", tmp_path / "answers.jsonl")


def test_a_name_is_resolved_before_texts_are_public(tmp_path: Path):
    """Public texts may go anywhere; the same call with credentialed ones is refused before anything is opened."""
    path = tmp_path / "answers.jsonl"
    LLMDecomposer("https://8.8.8.8/v1", "toy", path, credentialed=False)
    path.unlink()
    with pytest.raises(PermissionError, match="agreement"):
        LLMDecomposer("https://8.8.8.8/v1", "toy", path, allow_external_endpoint=True)
    assert not path.exists()
    LLMDecomposer("https://8.8.8.8/v1", "toy", path, allow_external_endpoint=True, agreement="Example agreement 7")


# ---- ceilings


def test_a_ceiling_holds_and_what_was_answered_stays(tmp_path: Path):
    """A run that reaches its ceiling stops; with a higher one it goes on and asks for nothing twice."""
    from faults import make_reports
    from llava_ta.llm import CeilingError

    reports = make_reports(60)
    with serving(0.02, 0.0, 0.1) as url:
        tight = LLMDecomposer(url, "toy", tmp_path / "answers.jsonl", max_tokens=150_000)
        with pytest.raises(CeilingError, match="max_tokens=150000 would be passed"):
            dict(tight.decompose_all(reports))
        spent = tight.ledger.spent
        assert spent["read"] + spent["written"] <= 150_000
        results = dict(LLMDecomposer(url, "toy", tmp_path / "answers.jsonl").decompose_all(reports))
        assert len(results) == 60 and served(url)["repeated"] == 0
