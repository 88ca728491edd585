"""Load from a process of its own: Poisson arrivals whatever the answers (open loop), or a fixed
number of requests under way (closed loop). Every answer is checked.

    python benchmarks/load.py PORT MODEL BODY.npz --seconds 20 (--rate 100 | --clients 8)

BODY.npz holds input arrays by name and the expected output `expected`. SIGTERM ends the load
early. Prints a JSON array that has for each request when it was due, the seconds from then to its
answer, and the HTTP status: 0 for a connection that broke, -1 for a wrong answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import uvloop

from blockflow import oip

WRONG = -1
BROKEN = 0
_IDLE = 2.0
"""Seconds; given up before the gateway does, or a request may meet a connection that closes."""
Row = tuple[float, float, int]


class Load:
    """Keeps connections open and opens another whenever all of them are in use."""

    def __init__(self, port: int, model: str, body: Path) -> None:
        arrays = dict(np.load(body))
        self._expected = arrays.pop("expected")
        tensors = [oip.TensorValue.from_numpy(name, array) for name, array in arrays.items()]
        encoded = oip.encode_request(tensors)
        content = b"".join(encoded.chunks)
        headers = {**encoded.headers, "Content-Length": str(len(content)), "Host": "127.0.0.1"}
        lines = [
            f"POST /v2/models/{model}/infer HTTP/1.1",
            *(f"{k}: {v}" for k, v in headers.items()),
        ]
        self._request = ("\r\n".join(lines) + "\r\n\r\n").encode() + content
        self._port = port
        self._free: deque[tuple[asyncio.StreamReader, asyncio.StreamWriter, float]] = deque()
        self.rows: list[Row] = []

    async def ask(self, due: float) -> None:
        try:
            status = await self._exchange()
        except (OSError, asyncio.IncompleteReadError, ValueError):
            status = BROKEN
        now = time.monotonic()
        self.rows.append((due, now - due, status))

    async def _exchange(self) -> int:
        now = time.monotonic()
        while self._free and self._free[0][2] < now - _IDLE:
            self._free.popleft()[1].close()
        if self._free:
            reader, writer, _ = self._free.pop()
        else:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 24)
        writer.write(self._request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower().split("\r\n")
        status = int(head[0].split()[1])
        headers = dict(line.split(": ", 1) for line in head[1:] if ": " in line)
        body = await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            writer.close()
        else:
            self._free.append((reader, writer, time.monotonic()))
        if status == 400:
            raise SystemExit(f"the server cannot read what this load sends: {body.decode()}")
        if status == 200:
            answer = oip.parse_response(body, headers.get(oip.HEADER_LENGTH.lower()))
            if not np.allclose(answer.outputs[0].numpy(), self._expected, atol=1e-3):
                return WRONG
        return status

    async def open_loop(self, rate: float, seconds: float, seed: int) -> None:
        randomly = random.Random(seed)
        due = time.monotonic()
        end = due + seconds
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        tasks: set[asyncio.Task[None]] = set()
        while (due := due + randomly.expovariate(rate)) < end and not stop.is_set():
            if (pause := due - time.monotonic()) > 0:
                await asyncio.sleep(pause)
            task = asyncio.ensure_future(self.ask(due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def closed_loop(self, clients: int, seconds: float) -> None:
        end = time.monotonic() + seconds

        async def client() -> None:
            while (now := time.monotonic()) < end:
                await self.ask(now)

        await asyncio.gather(*(client() for _ in range(clients)))

    async def close(self) -> None:
        for _, writer, _ in self._free:
            writer.close()
            await writer.wait_closed()


async def run(options: argparse.Namespace) -> list[Row]:
    load = Load(options.port, options.model, options.body)
    if options.rate is not None:
        await load.open_loop(options.rate, options.seconds, options.seed)
    else:
        await load.closed_loop(options.clients, options.seconds)
    await load.close()
    return load.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("port", type=int)
    parser.add_argument("model")
    parser.add_argument("body", type=Path)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--rate", type=float)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    json.dump(uvloop.run(run(parser.parse_args())), sys.stdout)


if __name__ == "__main__":
    main()
