"""Hostile requests against a running server: `python -m benchmarks.fuzz --url http://...`.

Raw sockets, several processes, a seeded generator for every case: bodies mutated as JSON and as
bytes, wrong types, lengths, encodings and chunks, odd headers, paths and methods, pipelines, half
requests, sudden ends. Case N of a seed is always the same bytes (`--seed S --case N` sends it
alone and shows both sides).

What counts as a failure: a 5xx other than 503 with Retry-After; no answer in ten seconds; a
well-formed request left without an answer; a good request among the bad ones that is not answered
well; a worker that is not there afterwards. The last line of the output is one JSON object.
"""

import argparse
import asyncio
import json
import multiprocessing
import socket
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from benchmarks.fuzz_cases import Case, Maker

PATIENCE = 10.0
CONNECTIONS = 8
"""Connections of one process."""
ENOUGH, SHOWN = 100, 20
"""Failures after which a process stops; failures that are printed."""


@dataclass
class Report:
    """What came back."""

    requests: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def add(self, other: "Report") -> None:
        """Take in what another process saw."""
        self.requests += other.requests
        self.statuses += other.statuses
        self.kinds += other.kinds
        self.failures += other.failures


@dataclass
class Answer:
    """Status and headers of one response; `whole` when its body came to its end."""

    status: int
    headers: dict[str, str]
    body: bytes = b""


class Connection:
    """One raw connection that reads responses by the letter of HTTP/1.1."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.reusable = True

    async def answer(self, method: str) -> Answer | None:
        """The next final response, or None at the end of the stream.

        Raises:
            ValueError: what came is no response.
        """
        while True:
            line = await self.reader.readline()
            if not line:
                self.reusable = False
                return None
            status = _status(line)
            headers = await self._headers()
            if status >= 200 or status == 101:
                break
        body = b"" if method == "HEAD" or status in (101, 204, 304) else await self._body(headers)
        if headers.get("connection", "").lower() == "close" or status == 101:
            self.reusable = False
        return Answer(status, headers, body)

    async def _headers(self) -> dict[str, str]:
        found = {}
        while line := (await self.reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            found[name.lower()] = value.strip()
        return found

    async def _body(self, headers: dict[str, str]) -> bytes:
        if "chunked" in headers.get("transfer-encoding", ""):
            parts = []
            while size := int((await self.reader.readline()).split(b";")[0], 16):
                parts.append(await self.reader.readexactly(size))
                await self.reader.readline()
            await self.reader.readline()
            return b"".join(parts)
        if "content-length" in headers:
            return await self.reader.readexactly(int(headers["content-length"]))
        self.reusable = False
        return await self.reader.read()

    def close(self, abort: bool = False) -> None:
        """Close; with `abort`, by a reset."""
        if abort:
            raw = self.writer.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.writer.transport.abort()
        else:
            self.writer.close()


def _status(line: bytes) -> int:
    parts = line.split(b" ", 2)
    if not parts[0].startswith(b"HTTP/1.") or len(parts) < 2 or not parts[1].isdigit():
        raise ValueError(f"no status line: {line[:80]!r}")
    return int(parts[1])


class Fuzzer:
    """Sends the cases of one process."""

    def __init__(self, url: str, maker: Maker) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.maker = maker
        self.report = Report()

    async def run(self, numbers: list[int]) -> Report:
        """Send every case, over several connections."""
        waiting = iter(numbers)
        await asyncio.gather(*(self._work(waiting) for _ in range(CONNECTIONS)))
        return self.report

    async def _work(self, waiting: Any) -> None:  # noqa: ANN401  (one iterator for all)
        connection: Connection | None = None
        for number in waiting:
            if len(self.report.failures) >= ENOUGH:
                break
            case = self.maker.case(number)
            if connection is None:
                connection = await self._open()
            problem = await self.send(connection, case)
            self.report.requests += len(case.methods)
            self.report.kinds[case.kind] += len(case.methods)
            if problem:
                self.report.failures.append(f"case {number} ({case.kind}): {problem}")
            if problem or not connection.reusable or not case.keeps:
                connection.close()
                connection = None
        if connection is not None:
            connection.close()

    async def _open(self) -> Connection:
        reader, writer = await asyncio.open_connection(self.host, self.port, limit=2**22)
        return Connection(reader, writer)

    async def send(
        self,
        connection: Connection,
        case: Case,
        see: Callable[[Answer | None], object] = lambda _: None,
    ) -> str:
        """Send one case and read what comes; what was wrong with that, or an empty string."""
        try:
            async with asyncio.timeout(PATIENCE):
                return await self._exchange(connection, case, see)
        except TimeoutError:
            return f"no answer in {PATIENCE:.0f} s"
        except (ConnectionError, asyncio.IncompleteReadError) as error:
            connection.reusable = False
            self.report.statuses["reset"] += 1
            return f"{error!r} on a well-formed request" if case.answered else ""
        except ValueError as error:
            connection.reusable = False
            return f"no HTTP: {error}"

    async def _exchange(
        self, connection: Connection, case: Case, see: Callable[[Answer | None], object]
    ) -> str:
        for part in case.parts:
            connection.writer.write(part)
            await connection.writer.drain()
        if case.ends == "reset":
            connection.close(abort=True)
            connection.reusable = False
            self.report.statuses["aborted"] += 1
            return ""
        if case.ends == "half-close":
            connection.writer.write_eof()
        for method in case.methods:
            answer = await connection.answer(method)
            see(answer)
            problem = self._judge(case, answer)
            if problem or answer is None:
                return problem
            if not connection.reusable:
                break
        return ""

    def _judge(self, case: Case, answer: Answer | None) -> str:
        if answer is None:
            self.report.statuses["closed"] += 1
            return "closed without an answer to a well-formed request" if case.answered else ""
        status = answer.status
        self.report.statuses[str(status)] += 1
        if status == 503 and "retry-after" in answer.headers:
            return ""
        if status >= 500:
            return f"{status} {answer.body[:300]!r}"
        if case.good and status not in (200, 429):
            return f"a good request answered with {status} {answer.body[:300]!r}"
        return ""


def fuzz(
    url: str,
    requests: int,
    *,
    key: str = "",
    seed: int = 7,
    context: int = 64,
    processes: int = 2,
    server: int | None = None,
) -> Report:
    """Send at least `requests` requests.

    Args:
        url: of the server.
        key: API key; without one, all requests are anonymous.
        seed: of all cases.
        context: rows that the model needs.
        processes: that send.
        server: id of the server's process: those below it must all be there afterwards.
    """
    before = _workers(server)
    maker = Maker(seed, key, context)
    report, first = Report(), 0
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        while report.requests < requests and not report.failures:
            # a case is one request or several: as many cases as requests are missing
            count = max((requests - report.requests) // processes, 1)
            ranges = [
                list(range(first + i * count, first + (i + 1) * count)) for i in range(processes)
            ]
            first += processes * count
            for part in pool.starmap(_process, [(url, maker, each) for each in ranges]):
                report.add(part)
    if gone := before - _workers(server):
        report.failures.append(f"workers {sorted(gone)} are gone")
    report.failures += _health(url)
    return report


def _process(url: str, maker: Maker, numbers: list[int]) -> Report:
    return asyncio.run(Fuzzer(url, maker).run(numbers))


def _workers(server: int | None) -> set[int]:
    if server is None:
        return set()
    return {each.pid for each in psutil.Process(server).children(recursive=True)} | {server}


def _health(url: str) -> list[str]:
    """Whether the server is well at the end, over several connections, so that each worker is."""
    found = []
    for _ in range(8):
        try:
            status = httpx.get(f"{url}/health/live", timeout=PATIENCE).status_code
        except httpx.HTTPError as error:
            found.append(f"health afterwards: {error!r}")
            continue
        if status != 200:
            found.append(f"health afterwards: {status}")
    return found


async def _show(url: str, maker: Maker, number: int) -> None:
    fuzzer = Fuzzer(url, maker)
    case = maker.case(number)
    print(f"case {number}: {case.kind}, {len(case.methods)} requests, ends {case.ends or 'open'}")
    print(*(part[:2000] for part in case.parts), sep="\n")
    connection = await fuzzer._open()
    problem = await fuzzer.send(connection, case, print)
    connection.close()
    print(problem or "as it should be")


def show(report: Report) -> None:
    """Print what came back."""
    print("  ".join(f"{kind} {count}" for kind, count in sorted(report.kinds.items())))
    print("  ".join(f"{status}: {count}" for status, count in sorted(report.statuses.items())))
    for line in report.failures[:SHOWN]:
        print(f"FAILED {line}")


def main() -> int:
    """Fuzz a running server; 1 when something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--key", default="", help="API key, or the path of a file that holds it")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--server", type=int, help="id of the server's process")
    parser.add_argument("--case", type=int, help="send this one case and show it")
    options = parser.parse_args()
    key = Path(options.key).read_text().strip() if Path(options.key).is_file() else options.key
    if options.case is not None:
        asyncio.run(_show(options.url, Maker(options.seed, key, options.context), options.case))
        return 0
    began = time.monotonic()
    report = fuzz(
        options.url,
        options.requests,
        key=key,
        seed=options.seed,
        context=options.context,
        processes=options.processes,
        server=options.server,
    )
    show(report)
    found = {
        "fuzz_requests": report.requests,
        "fuzz_failures": len(report.failures),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(json.dumps(found))
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
