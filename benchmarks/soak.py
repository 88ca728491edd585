"""What must hold for a long time: TensorMQ's parsers under hostile bytes, its ends under kill -9.

    python benchmarks/soak.py fuzz --count 1000000
    python benchmarks/soak.py restarts --count 10000 --device cpu
    python benchmarks/soak.py reopen --count 10000 --device cuda:0

fuzz: random and damaged frames and rings. Each must be parsed or refused with the one error that is
meant for it; anything else ends the run with a traceback. Says how many there were of each.

restarts: a producer that floods this process' Pull end and a consumer that holds what this process'
Push end sends are killed and started again, by turns, at random moments of their work. Says what
this process holds after a tenth of them and at the end: file descriptors, threads, slabs and rings
(memfds), memory of the GPU, entries of /dev/shm, resident memory, and what of the GPU's memory is
taken by whomever. Ends with status 1 when one of the first four has grown, and with a traceback
when a message was torn and did not say so, a slot was lost or a death not noticed.

reopen: another process opens and closes its ends instead of being killed, by turns a Push end and a
Pull end: what a process takes to start with a GPU, most of a second, is left out. Says the same of
both processes.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import multiprocessing as mp
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NamedTuple

import measured
import psutil
import torch

from blockflow.devices import process_memory
from tensormq import Loop, Peer, ProtocolError, Pull, Push, Request, RingBroken, Timeout, wire
from tensormq.process import this_process
from tensormq.ring import HEADER_BYTES, Reader, Writer

_CAPACITY = 4096
_MESSAGES = 3
_OWN = "descriptors", "threads", "memfds", "GPU MiB of this process"
"""What nobody else holds, and must not grow. Other programs use shared memory and the GPU too."""


def fuzz(count: int, seed: int) -> dict[str, Any]:
    """`count` inputs, half of them frames and half rings."""
    random.seed(seed)
    found: Counter[str] = Counter()
    seeds = _frames()
    for _ in range(count // 2):
        frame = _hostile(random.choice(seeds))
        for decode in (wire.decode_to_consumer, wire.decode_to_producer):
            try:
                message = decode(frame)
                if isinstance(message, wire.Deliver):
                    wire.check_descriptor(message, slots=4)
                    layout = wire.parse_layout(bytes(message.tensors), slot_bytes=1 << 16)
                    assert all(
                        0 <= s.offset <= s.offset + s.nbytes <= 1 << 16 for s in layout.specs
                    )
                found[f"frames parsed as {type(message).__name__}"] += 1
            except ProtocolError:
                found["frames refused"] += 1
    for _ in range(count - count // 2):
        found[_fuzz_ring()] += 1
    return {"inputs": count, "seed": seed, "outcomes": dict(sorted(found.items()))}


def _frames() -> list[bytes]:
    specs = (wire.TensorSpec("x", "float32", (8, 256), 0), wire.TensorSpec("y", "int8", (), 8192))
    me = wire.Abilities(this_process(), tuple(wire.Carrier), "GPU-1")
    bell = wire.Bell(5, 99)
    rings = wire.Rings(4, 77, 1 << 16, 4096, bell)
    slab = wire.HostSlab(3, 55, 1 << 20)
    requests = (Request(1, 2, 3.0), Request(4, 5))
    messages: list[Any] = [
        wire.Hello(7, me),
        wire.Card(7, me),
        wire.Offer(1, wire.Carrier.SHM, 4, 1 << 16, slab, rings),
        wire.Welcome(7, bell),
        wire.Decline(7, "why"),
        wire.Deliver(7, 1, 2, wire.Layout(specs).encoded, requests, 3, b"note", 123456789),
        wire.Release(7, 1, 2, 5000),
        wire.Bye(7),
    ]
    return [wire.encode(message) for message in messages]


def _hostile(frame: bytes) -> bytes:
    how = random.randrange(4)
    if how == 0:
        return wire.MAGIC + random.randbytes(random.randrange(64))
    if how == 1:
        return frame[: random.randrange(len(frame))]
    damaged = bytearray(frame)
    for _ in range(random.randint(1, 6)):
        damaged[random.randrange(len(damaged))] = random.randrange(256)
    if how == 2:
        at = random.randrange(len(damaged))
        damaged[at:at] = random.randbytes(random.randint(1, 8))
    return bytes(damaged)


def _fuzz_ring() -> str:
    """Honest frames, then a header or content that the other end has damaged."""
    memory = memoryview(bytearray(HEADER_BYTES + _CAPACITY))
    writer, reader = Writer(memory, bell=-1), Reader(memory)
    for _ in range(random.randrange(6)):
        writer.write(bytes(random.randrange(900)))
        reader.read()
    writer.write(b"the last honest one")
    at = random.choice([0, 0, 64, 128, HEADER_BYTES + random.randrange(_CAPACITY - 8)])
    near = random.randrange(3 * _CAPACITY).to_bytes(8, "little")
    memory[at : at + 8] = near if random.random() < 0.5 else random.randbytes(8)
    outcome = "rings read to the end"
    try:
        for _ in range(_CAPACITY):
            frame = reader.read()
            if frame is None:
                break
            assert len(frame) <= _CAPACITY
        else:
            raise AssertionError("a ring was read for ever")
    except RingBroken:
        outcome = "rings refused by their reader"
    try:
        memory[128:136] = bytes(8)  # nobody sleeps: there is no bell here
        while writer.write(bytes(300)):
            pass
    except RingBroken:
        outcome = "rings refused by their writer"
    return outcome


class _Ends(NamedTuple):
    """The ends of this process, and where another is to open its Pull end."""

    loop: Loop
    pull: Pull
    push: Push
    outbox: str


@contextlib.contextmanager
def _ends(device: str) -> Iterator[_Ends]:
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as directory,
        Loop() as loop,
        Pull(f"ipc://{directory}/in", device=device, loop=loop) as pull,
        Push(slots=4, slot_bytes=1 << 16, device=device, loop=loop) as push,
    ):
        yield _Ends(loop, pull, push, f"ipc://{directory}/out")


class _Victim:
    """Another process, which has a context on `device` and will be told to open an end."""

    def __init__(
        self, context: ForkServerContext, role: Callable[..., None], endpoint: str, device: str
    ) -> None:
        self._here, there = context.Pipe()
        self._process = context.Process(
            target=_await_orders, args=(role, endpoint, device, there), daemon=True
        )
        self._process.start()
        there.close()  # should the process end, so does its pipe

    def begin(self, loop: Loop) -> None:
        """Have it open its end, and run `loop` until it has."""
        self._here.send("begin")
        while not self._here.poll():
            loop.run_once(0.002)
        self._here.recv()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._here.close()


def _await_orders(
    role: Callable[..., None], endpoint: str, device: str, orders: Connection
) -> None:
    torch.zeros(1, device=device)
    orders.recv()
    role(endpoint, device, lambda: orders.send("begun"))


def _flood(endpoint: str, device: str, begun: Callable[[], None]) -> None:
    with Push(slots=4, slot_bytes=1 << 16, device=device) as push:
        peer = push.connect(endpoint, timeout=60)
        begun()
        number = 0.0
        while True:
            number += 1.0
            push.send({"n": torch.full((4096,), number, device=device)}, to=peer)


def _hold(endpoint: str, device: str, begun: Callable[[], None]) -> None:
    with Pull(endpoint, device=device) as pull:
        begun()
        held = [pull.recv()]
        while True:
            held.append(pull.recv())
            if len(held) > 2:
                held.pop(0).release()


def restarts(count: int, device: str, seconds: float, ahead: int = 1) -> dict[str, Any]:
    """Kill and start again the producer and the consumer, `count` times in all or until `seconds`
    have passed. So many processes as `ahead` start while others are being killed."""
    logging.getLogger("tensormq").setLevel(logging.CRITICAL)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["tensormq", "torch"])
    counted: Counter[str] = Counter()
    victims: deque[_Victim] = deque()
    with _ends(device) as (loop, pull, push, outbox):
        tensor = torch.ones(4096, device=device)

        def start(number: int) -> None:
            role, endpoint = (_flood, pull.endpoint) if number % 2 == 0 else (_hold, outbox)
            victims.append(_Victim(context, role, endpoint, device))

        def turn(number: int) -> None:
            start(number + ahead)
            victim = victims.popleft()
            victim.begin(loop)
            # Connecting to a device may take longer than the whole of what follows.
            peer = push.connect(outbox, timeout=60) if number % 2 else None
            end = time.monotonic() + random.uniform(0.0, 0.02)
            if peer is None:
                _receive(pull, end, counted)
                victim.kill()
                assert loop.run_until(lambda: not pull._channels or pull.waiting > 0, 10)
                while pull._channels or pull.waiting:
                    _receive(pull, time.monotonic() + 0.01, counted)
            else:
                _send(push, peer, tensor, end, counted)
                victim.kill()
                assert loop.run_until(lambda: not push.peers, 10), "a death was not noticed"
                assert push.leased_slots == 0, "a slot was lost"
            counted["restarts"] += 1

        try:
            for number in range(ahead):
                start(number)
            early, late = _turns(count, seconds, turn, lambda: _held(device))
        finally:
            for victim in victims:
                victim.kill()
    return _compared(counted, early, late)


def _come_and_go(inbox: str, outbox: str, device: str, told: Connection) -> None:
    """Open an end, use it and close it, as often as it is told to."""
    tensor = torch.ones(4096, device=device)
    while (what := told.recv()) != "end":
        if what == "push":
            with Push(slots=4, slot_bytes=1 << 16, device=device) as push:
                peer = push.connect(inbox, timeout=60)
                for _ in range(_MESSAGES):
                    push.send({"n": tensor}, to=peer)
        elif what == "pull":
            with Pull(outbox, device=device) as pull:
                told.send("open")
                for _ in range(_MESSAGES):
                    pull.recv(timeout=60).release()
        else:
            told.send(_held(device))


def reopen(count: int, device: str, seconds: float) -> dict[str, Any]:
    """Have another process open and close ends, `count` in all or until `seconds` have passed."""
    context = mp.get_context("spawn")
    here, there = context.Pipe()
    counted: Counter[str] = Counter()
    with _ends(device) as (loop, pull, push, outbox):
        process = context.Process(
            target=_come_and_go, args=(pull.endpoint, outbox, device, there), daemon=True
        )
        tensor = torch.ones(4096, device=device)

        def held() -> dict[str, float]:
            here.send("held")
            theirs = {f"{name}, there": value for name, value in here.recv().items()}
            return _held(device) | theirs

        def turn(number: int) -> None:
            if number % 2 == 0:
                here.send("push")
                for _ in range(_MESSAGES):
                    pull.recv(timeout=60).release()
                assert loop.run_until(lambda: not pull._channels, 10), "a channel did not end"
            else:
                here.send("pull")
                assert here.recv() == "open"
                peer = push.connect(outbox)
                for _ in range(_MESSAGES):
                    push.send({"n": tensor}, to=peer)
                assert loop.run_until(lambda: not push.peers, 10), "a goodbye was not heard"
                assert push.leased_slots == 0, "a slot was lost"
            counted["ends"] += 1
            counted["messages"] += _MESSAGES

        process.start()
        there.close()  # should the process end, so does its pipe
        early, late = _turns(count, seconds, turn, held)
        here.send("end")
        process.join()
    return _compared(counted, early, late)


def _turns(
    count: int, seconds: float, turn: Callable[[int], None], held: Callable[[], dict[str, float]]
) -> tuple[dict[str, float], dict[str, float]]:
    """Take `count` turns, or until `seconds` have passed: what was held after a tenth of them, and
    in the end."""
    until = time.monotonic() + seconds
    early: dict[str, float] = {}
    for number in range(count):
        turn(number)
        if number == max(1, count // 10):
            early = held()
        if early and time.monotonic() > until:
            break
    return early, held()


def _compared(
    counted: Counter[str], early: dict[str, float], late: dict[str, float]
) -> dict[str, Any]:
    growth = {name: round(late[name] - early[name], 1) for name in late}
    return {
        "counted": dict(counted),
        "after a tenth": early,
        "at the end": late,
        "growth": growth,
        "grown": [name for name in growth if name.startswith(_OWN) and growth[name] > 0],
    }


def _receive(pull: Pull, end: float, counted: Counter[str]) -> None:
    while (left := end - time.monotonic()) > 0:
        with contextlib.suppress(Timeout), pull.recv(timeout=left) as message:
            content = message.tensors["n"]
            assert content.min() == content.max() or message.torn, "something else arrived"
            counted["messages torn" if message.torn else "messages received"] += 1


def _send(push: Push, peer: Peer, tensor: torch.Tensor, end: float, counted: Counter[str]) -> None:
    while (left := end - time.monotonic()) > 0:
        with contextlib.suppress(Timeout):
            push.send({"x": tensor}, to=peer, timeout=left)
            counted["messages sent"] += 1


def _held(device: str) -> dict[str, float]:
    """What this process holds now."""
    time.sleep(0.2)  # ZeroMQ closes sockets in its own thread
    descriptors = list(Path("/proc/self/fd").iterdir())
    memfds = 0
    for entry in descriptors:
        with contextlib.suppress(OSError):  # the descriptor that listed the directory
            memfds += "memfd:" in str(entry.readlink())
    found: dict[str, float] = {
        "descriptors": len(descriptors),
        "threads": threading.active_count(),
        "memfds": memfds,
        "shared memory": len(list(Path("/dev/shm").iterdir())),  # noqa: S108
        "resident MiB": round(psutil.Process().memory_info().rss / 2**20, 1),
    }
    if device.startswith("cuda"):
        free, total = torch.cuda.mem_get_info(device)
        found["GPU MiB"] = round((total - free) / 2**20, 1)
        own = process_memory(os.getpid()).device_bytes.get(device)
        if own is not None:  # the driver tells it of processes that it sees by this number
            found["GPU MiB of this process"] = round(own / 2**20, 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=["fuzz", "restarts", "reopen"])
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--seconds",
        type=float,
        default=float("inf"),
        help="not of fuzz: end after so long, but not before a tenth of the count",
    )
    parser.add_argument(
        "--ahead",
        type=int,
        default=1,
        help="of restarts: processes that start meanwhile, which takes a second with a GPU",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write the results")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    where = measured.conditions(options.device)
    begun = time.monotonic()
    if options.what == "fuzz":
        results = fuzz(options.count, options.seed)
    elif options.what == "restarts":
        results = restarts(options.count, options.device, options.seconds, options.ahead)
    else:
        results = reopen(options.count, options.device, options.seconds)
    results["seconds"] = round(time.monotonic() - begun, 1)
    for name, value in results.items():
        print(f"{name}: {value}")
    measured.write(options.json, {"conditions": where, "results": results})
    if results.get("grown"):
        sys.exit(1)


if __name__ == "__main__":
    main()
