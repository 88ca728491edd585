"""The other process of the TensorMQ tests: `python tensormq_peer.py ROLE ENDPOINT REPLY DEVICE
CARRIER DOORBELL KEYS`.

echo:  receives on ENDPOINT and sends every message back, doubled, to REPLY.
hold:  receives on ENDPOINT and releases nothing.
flood: sends to ENDPOINT without end.
labour: as flood, and the GPU computes for 30 ms before each content is complete.
tear:  announces one whole message and one whose content the GPU computes for a minute.
cling: receives one message on ENDPOINT, uses it for a minute of the GPU's time and releases it.
KEYS is a directory with the keys of both ends, for tcp, or "-". Prints "ready" once it is, and
where it can be reached.
"""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path

import torch

from tensormq import Carrier, Doorbell, Loop, Pull, Push, load_keys


def busy_for_a_minute() -> None:
    busy(60)


def busy(seconds: float) -> None:
    torch.cuda._sleep(int(seconds * 1_700_000_000))  # clock cycles of the GPU


def main() -> None:
    role, endpoint, reply, device, carrier, bell, directory = sys.argv[1:8]
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    loop = Loop()
    open_push = functools.partial(
        Push, device=device, loop=loop, carriers=[Carrier(carrier)], doorbell=Doorbell(bell)
    )
    open_pull = functools.partial(
        Pull, device=device, loop=loop, carriers=[Carrier(carrier)], doorbell=Doorbell(bell)
    )
    connect = Push.connect
    if directory != "-":
        mine, theirs = (load_keys(Path(directory) / name) for name in ("there", "here"))
        open_pull = functools.partial(open_pull, keys=mine, allowed_keys=[theirs.public])
        connect = functools.partial(connect, keys=mine, server_key=theirs.public)
    if role in {"flood", "labour"}:
        push = open_push(slots=4, slot_bytes=1 << 20)
        print("ready", flush=True)
        peer = connect(push, endpoint)
        number = 0
        while True:
            number += 1
            if role == "labour":
                busy(0.03)
            push.send({"n": torch.full((1 << 16,), float(number), device=device)}, to=peer)
    if role == "tear":
        push = open_push(slots=2, slot_bytes=1 << 10)
        print("ready", flush=True)
        peer = connect(push, endpoint)
        push.send({"n": torch.ones(4, device=device)}, to=peer)
        busy_for_a_minute()
        push.send({"n": torch.ones(4, device=device)}, to=peer)
        time.sleep(60)
    pull = open_pull(endpoint)
    print("ready", pull.endpoint, flush=True)
    if role == "cling":
        with pull.recv():
            busy_for_a_minute()
        loop.run_until(lambda: False, 60)
    if role == "hold":
        held = []
        while True:
            held.append(pull.recv())
    push = open_push(slots=4, slot_bytes=32 << 20)
    peer = None
    while True:
        with pull.recv() as message:
            if message.note == b"quit":
                break
            peer = peer or connect(push, reply)
            doubled = {
                name: (t.to(device) * 2 if t.dtype != torch.bool else ~t.to(device))
                for name, t in message.tensors.items()
            }
            push.send(
                doubled,
                to=peer,
                requests=message.requests,
                route=message.route,
                note=str(message.carrier).encode(),
            )
    push.close()
    pull.close()
    loop.close()


if __name__ == "__main__":
    main()
