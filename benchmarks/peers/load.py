"""A small load client for machines without wrk and oha: keep-alive connections, closed loop.

`python -m benchmarks.peers.load URL --connections N --seconds S ...`; one line of JSON, as from
wrk.lua. It costs the server's machine several times what wrk does: ratios stay, rates do not.
"""

import argparse
import asyncio
import json
import time
from collections import Counter
from pathlib import Path

import aiohttp


async def _ask(
    session: aiohttp.ClientSession,
    options: argparse.Namespace,
    deadline: float,
    taken: list[int],
    errors: Counter[str],
) -> None:
    """One connection's requests, one after the other."""
    while time.monotonic() < deadline:
        began = time.perf_counter_ns()
        try:
            async with session.request(
                options.method, options.url, data=options.data, headers=options.headers
            ) as answer:
                await answer.read()
        except TimeoutError:
            errors["timeout"] += 1
        except aiohttp.ClientConnectorError:
            errors["connect"] += 1
        except aiohttp.ClientError:
            errors["read"] += 1
        else:
            taken.append((time.perf_counter_ns() - began) // 1000)
            errors["status"] += answer.status > 399


async def _load(options: argparse.Namespace) -> dict[str, int]:
    taken: list[int] = []
    errors: Counter[str] = Counter()
    connector = aiohttp.TCPConnector(limit=options.connections)
    timeout = aiohttp.ClientTimeout(total=10)
    began = time.monotonic()
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        deadline = began + options.seconds
        work = [_ask(session, options, deadline, taken, errors) for _ in range(options.connections)]
        await asyncio.gather(*work)
    taken.sort()
    microseconds = int((time.monotonic() - began) * 1e6)
    figures = {"requests": len(taken), "microseconds": microseconds}
    for share in (50, 99):
        figures[f"p{share}_us"] = taken[len(taken) * share // 100] if taken else 0
    kinds = ("connect", "read", "write", "timeout", "status")
    return figures | {kind: errors[kind] for kind in kinds}


def main() -> None:
    """Load one address."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--method", default="GET")
    parser.add_argument("--body", type=Path, help="file of the body")
    parser.add_argument("--header", action="append", default=[], help="Name: value")
    options = parser.parse_args()
    options.data = options.body.read_bytes() if options.body else None
    pairs = (each.split(":", 1) for each in options.header)
    options.headers = {name: value.strip() for name, value in pairs}
    print(json.dumps(asyncio.run(_load(options))))


if __name__ == "__main__":
    main()
