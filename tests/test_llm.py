"""Decomposition by a language model, against servers on the loopback: a faulty one, and one with a tiny model."""

import json
import time
from pathlib import Path

import pytest

from faults import asked, served, serving


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
        found = finish(asked(url, tmp_path / "answers.jsonl", 400, 3))
        check(found, served(url), 400)


def test_resuming(tmp_path: Path):
    with serving(0.02, 0.1, 0.1) as url:
        resume(url, tmp_path / "answers.jsonl", 400, 3)


@pytest.mark.slow
def test_five_thousand_reports(tmp_path: Path):
    """64 slots are kept busy for 90 % of the time that the answers and faults take, and memory does not grow."""
    with serving(0.5, 0.1, 1) as url:
        found = finish(asked(url, tmp_path / "answers.jsonl", 5000, 5))
        stats = served(url)
    check(found, stats, 5000)
    hangs = stats["served"]["hang"]
    least = (0.5 * (sum(stats["served"].values()) - hangs) + 5 * hangs) / 64  # seconds, were no slot ever idle
    grown = (max(found["memory"][25:]) - max(found["memory"][5:10])) / 2**20
    print(f"{found['seconds']:.1f} s, {least / found['seconds']:.1%} of what is possible, {grown:+.1f} MB;", stats)
    assert least / found["seconds"] >= 0.9
    assert grown < 16


@pytest.mark.slow
def test_five_thousand_reports_resumed(tmp_path: Path):
    with serving(0.5, 0.1, 1) as url:
        resume(url, tmp_path / "answers.jsonl", 5000, 5)
