"""A server at its peak, at ten times that, and while it is told to stop.

    python benchmarks/serve_overload.py RUN [--seconds 10] [--times 10] [--rounds 3] [--apart] [--out FILE]

Peak is what clients get who each wait for an answer before they ask again; overload comes at a fixed rate, whoever answers.
The two alternate, and each overload is compared with the peaks before and after it. Goodput counts answers of status 200
up to the last one that comes while requests do: neither half a batch nor what is answered in quiet afterwards. The server
runs in a process of its own. The clients share the machine with it, and take from it under overload what they need
themselves; with --apart (Linux) the server has one core and they the others.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

WORDS = ("the", "film", "was", "a", "rather", "moving", "story", "of", "two", "people", "who", "never", "meet")
CLIENTS = 64  # that ask at the peak
OPEN_MOST = 800  # connections under overload, as many as a machine's limit on files allows


@dataclass
class Seen:
    """What clients got of a server in some seconds: numbers by status, and milliseconds to answers of status 200."""

    server: psutil.Popen
    seconds: float
    status: Counter[str] = field(default_factory=Counter)
    ms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.begin = self.last = self.now()
        self.end = self.begin[0] + self.seconds

    def now(self) -> tuple[float, float, float]:
        """The time, the CPU time that the server has taken, and that of other guests of the machine (Linux)."""
        stolen_s = getattr(psutil.cpu_times(), "steal", 0.0)
        return time.perf_counter(), sum(self.server.cpu_times()[:2]), stolen_s

    def answered(self, begin: float) -> None:
        """An answer to a request of then."""
        last = self.now()
        if last[0] <= self.end:
            self.last = last
            self.ms.append(1000 * (last[0] - begin))

    def told(self) -> dict[str, Any]:
        """Figures of the run, by wall-clock time and by the server's CPU time (the machine may be busy otherwise)."""
        seconds, cpu_s, stolen_s = (last - begin for last, begin in zip(self.last, self.begin, strict=True))
        ms = sorted(self.ms)
        return {
            "status": dict(self.status),
            "goodput_per_s": len(ms) / seconds,
            "goodput_per_cpu_s": len(ms) / cpu_s,
            "cpu_share": cpu_s / seconds,
            "stolen_share": stolen_s / seconds / psutil.cpu_count(),
            "ms_median": statistics.median(ms),
            "ms_p99": ms[int(0.99 * (len(ms) - 1))],
        }


def request(chance: random.Random) -> bytes:
    """A request for one text of 8 to 24 words, its connection kept."""
    body = json.dumps({"inputs": " ".join(chance.choices(WORDS, k=chance.randint(8, 24)))}).encode()
    head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Client:
    """One connection."""

    def __init__(self, port: int, seen: Seen) -> None:
        self.port, self.seen = port, seen
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, content: bytes) -> None:
        """One request and its answer."""
        begin = time.perf_counter()
        try:
            if self.streams is None or self.streams[0].at_eof():  # the server ends connections that idle
                self.streams = await asyncio.open_connection("127.0.0.1", self.port)
            reader, writer = self.streams
            writer.write(content)
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length"))
            await reader.readexactly(int(length.split(b":")[1]))
        except (OSError, asyncio.IncompleteReadError) as err:
            self.streams = None
            self.seen.status[type(err).__name__] += 1
            return
        status = head.split(b" ", 2)[1].decode()
        self.seen.status[status] += 1
        if status == "200":
            self.seen.answered(begin)


async def closed_loop(port: int, seen: Seen) -> dict[str, Any]:
    """Clients that wait for their answers."""
    chance = random.Random(0)

    async def work() -> None:
        client = Client(port, seen)
        while time.perf_counter() < seen.end:
            await client.ask(request(chance))

    await asyncio.gather(*(work() for _ in range(CLIENTS)))
    return seen.told()


async def open_loop(port: int, seen: Seen, rate: float) -> dict[str, Any]:
    """Requests at a fixed rate; those beyond the connections there are count as not sent."""
    chance = random.Random(1)
    free = [Client(port, seen) for _ in range(OPEN_MOST)]
    running: set[asyncio.Task[None]] = set()

    async def one(client: Client) -> None:
        await client.ask(request(chance))
        free.append(client)

    for number in itertools.count():
        if (wait := seen.begin[0] + number / rate - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        if time.perf_counter() > seen.end:
            break
        if free:
            task = asyncio.create_task(one(free.pop()))
            running.add(task)
            task.add_done_callback(running.discard)
        else:
            seen.status["not sent"] += 1
    await asyncio.gather(*running)
    return seen.told()


async def stopped(port: int, server: psutil.Popen) -> dict[str, Any]:
    """What becomes of requests in flight when SIGTERM comes, beside one that was sent by half."""
    seen, chance = Seen(server, 90), random.Random(2)
    _, half = await asyncio.open_connection("127.0.0.1", port)
    half.write(request(chance)[:-5])
    asking = [asyncio.create_task(Client(port, seen).ask(request(chance))) for _ in range(CLIENTS)]
    await asyncio.sleep(0.3)
    server.send_signal(signal.SIGTERM)
    begin = time.perf_counter()
    await asyncio.gather(*asking)
    code = await asyncio.to_thread(server.wait, 90)
    return {"status": dict(seen.status), "exit_s": time.perf_counter() - begin, "exit_code": code}


async def too_large(port: int, server: psutil.Popen) -> dict[str, Any]:
    """The answer to a body of 300 MB that is sent as fast as it is taken, and what the server's memory grew by."""
    before = server.memory_info().rss
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    sent = 0
    try:
        while sent < 300_000_000 and not reader._buffer:  # type: ignore[attr-defined]
            writer.write(b"10000\r\n" + b"a" * 65536 + b"\r\n")
            await writer.drain()
            sent += 65536
    except OSError:
        pass
    status = (await reader.read(12)).decode()
    return {"answer": status, "sent_mb": sent / 1e6, "rss_mb": (server.memory_info().rss - before) / 1e6}


async def measured(port: int, server: psutil.Popen, asked: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    await closed_loop(port, Seen(server, 2))  # warm up
    peaks = [await closed_loop(port, Seen(server, asked.seconds))]
    overloads = []
    for _ in range(asked.rounds):
        rate = asked.times * peaks[-1]["goodput_per_s"]
        overloads.append(await open_loop(port, Seen(server, asked.seconds), rate))
        peaks.append(await closed_loop(port, Seen(server, asked.seconds)))
    shares = {
        f"share_{key}": [
            over[key] / statistics.mean((before[key], after[key]))
            for before, over, after in zip(peaks, overloads, peaks[1:], strict=False)
        ]
        for key in ("goodput_per_s", "goodput_per_cpu_s")
    }
    medians = {f"median_{key}": statistics.median(values) for key, values in shares.items()}
    large = await too_large(port, server)
    return {"peaks": peaks, "overloads": overloads, **shares, **medians, "large": large}


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("run", type=Path)
    options.add_argument("--seconds", type=float, default=10)
    options.add_argument("--times", type=float, default=10)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--waiting", type=int, default=128)
    options.add_argument("--apart", action="store_true", help="the server on a core of its own, with one thread")
    options.add_argument("--out", type=Path)
    asked = options.parse_args()
    words = ["serve", str(asked.run), "--port", "0", "--json", "--waiting", str(asked.waiting)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if asked.apart else None
    server = psutil.Popen([sys.executable, "-m", "lorakit", *words], stdout=subprocess.PIPE, env=environment)
    if asked.apart:
        first, *others = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, others)
        server.cpu_affinity([first])
    port = int(json.loads(server.stdout.readline())["url"].rstrip("/").rpartition(":")[2])

    async def everything() -> dict[str, Any]:
        found = await measured(port, server, asked)
        return {**found, "stop": await stopped(port, server)}

    found = asyncio.run(everything())
    print(json.dumps(found, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
