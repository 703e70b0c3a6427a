"""An OpenAI-compatible server that misbehaves on purpose, and a client that asks it about many reports.

Both run as processes of their own: `python tests/faults.py serve ...` and `python tests/faults.py ask ...`.
"""

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil

from llava_ta.grammar import sample_study
from llava_ta.rules import RuleDecomposer

FAULTS = ("429", "500", "hang", "drop", "cut", "json", "topics")
HANG = 60.0  # seconds
ANSWERS = ("good", "json", "topics")  # what reaches the client whole


def make_reports(
    number: int,  # how many
) -> list[str]:  # all different
    """Write reports of phantoms, each with a measure of its own."""
    rng = np.random.default_rng(0)
    return [f"{sample_study(rng)[1]} There is a {i + 1} mm cyst in the left breast." for i in range(number)]


# ---- the server


class Server:
    """Answers as the rules would, except where it misbehaves."""

    def __init__(self, latency: float, faults: float, wait: float):
        self.latency, self.faults, self.wait = latency, faults, wait
        self.random, self.served = random.Random(0), Counter()
        self.answered: Counter = Counter()  # (report, turn) -> answers sent whole
        self.open = self.most = 0

    def stats(self) -> dict:  # for the client, as JSON
        """Sum up what has been served."""
        again = sum(count - 1 for count in self.answered.values())
        return {"served": self.served, "answers": self.answered.total(), "repeated": again, "most": self.most}

    def response(self, kind: str, report: str) -> tuple[bytes, bytes]:  # head and body
        """Write a response of some kind."""
        said = [{"topic": s.topic, "polarity": s.polarity, "sentence": s.sentence}
                for s in RuleDecomposer().decompose(report)]
        if kind == "topics":
            said[0] = {**said[0], "topic": "disease-hernia"}
        content = json.dumps({"findings": said})
        content = content[: len(content) // 2] if kind == "json" else content
        usage = {"prompt_tokens": 2400, "completion_tokens": 400}
        body = json.dumps({"choices": [{"message": {"content": content}}], "usage": usage}).encode()
        status, more = {"429": ("429 Too Many Requests", f"retry-after: {self.wait}\r\n"),
                        "500": ("500 Internal Server Error", "")}.get(kind, ("200 OK", ""))
        body = b"{}" if status != "200 OK" else body
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n{more}content-length: {len(body)}\r\n\r\n"
        return head.encode(), body[: len(body) // 2] if kind == "cut" else body

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: dict) -> bool:
        """Serve one request; whether the connection may be used again."""
        report, turn = request["messages"][1]["content"], len(request["messages"])
        kind = self.random.choice(FAULTS) if self.random.random() < self.faults else "good"
        self.served[kind] += 1
        if kind == "hang":
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(1), HANG)
            return False
        self.open += 1  # but for those that hang: when a client gives one up is noticed a little late
        self.most = max(self.most, self.open)
        await asyncio.sleep(self.latency)
        self.open -= 1
        if kind == "drop":
            return False
        head, body = self.response(kind, report)
        writer.write(head + body)
        await writer.drain()
        self.answered[report, turn] += kind in ANSWERS
        return kind != "cut"

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve the requests of one connection."""
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            again = True
            while again:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length:")[2].split("\r\n")[0] or 0)
                body = await reader.readexactly(length)
                if head.startswith("get"):
                    said = json.dumps(self.stats()).encode()
                    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(said) + said)
                    await writer.drain()
                    continue
                again = await self.answer(reader, writer, json.loads(body))
        writer.close()


async def serve(
    latency: float,  # seconds of every answer
    faults: float,  # share of requests
    wait: float,  # seconds of Retry-After
) -> None:
    """Serve on a free port of the loopback, which is printed."""
    server = await asyncio.start_server(Server(latency, faults, wait).connect, "127.0.0.1", 0, limit=1 << 20)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def serving(
    latency: float,  # seconds of every answer
    faults: float,  # share of requests
    wait: float,  # seconds of Retry-After
):  # the server's address
    """Run the server as a process of its own."""
    command = [sys.executable, __file__, "serve", str(latency), str(faults), str(wait)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    finally:
        process.kill()
        process.wait()


def served(
    url: str,  # of the server
) -> dict:  # kinds of responses, answers, repeated answers, most requests at a time
    """Ask the server what it has served."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{url}/stats", timeout=10) as response:
        return json.load(response)


# ---- the client


def ask(
    url: str,  # of the server
    cache: Path,  # file of answers
    number: int,  # of reports
    timeout: float,  # seconds
) -> dict:  # seconds, memory on the way, and how the reports came out
    """Decompose many reports, keeping nothing of them."""
    from llava_ta.llm import LLMDecomposer

    reports, rules = make_reports(number), RuleDecomposer()
    decomposer = LLMDecomposer(url, "toy", cache, timeout=timeout, max_requests=3 * number)
    memory, made_by, wrong, started = [], Counter(), 0, time.perf_counter()
    process, seen = psutil.Process(), set()
    for i, result in decomposer.decompose_all(reports):
        made_by["no answer" if "no answer" in result.problems else result.made_by] += 1
        if len(seen) % (number // 50) == 0:
            said = {s.topic: s.sentence for s in rules.decompose(reports[i])}
            wrong += {s.topic: s.sentence for s in result.sentences} != said
            memory.append(process.memory_info().rss)
        seen.add(i)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "memory": memory, "made_by": made_by, "wrong": wrong, "done": len(seen),
            "spent": decomposer.ledger.spent, "failed": decomposer.counts}


def asked(
    url: str,  # of the server
    cache: Path,  # file of answers
    number: int,  # of reports
    timeout: float,  # seconds
) -> subprocess.Popen:  # prints what `ask` returns, last
    """Run the client as a process of its own."""
    command = [sys.executable, __file__, "ask", url, str(cache), str(number), str(timeout)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("part", choices=["serve", "ask"])
    parser.add_argument("values", nargs="+")
    part, values = vars(parser.parse_args()).values()
    if part == "serve":
        asyncio.run(serve(*map(float, values)))
    else:
        print(json.dumps(ask(values[0], Path(values[1]), int(values[2]), float(values[3]))))
