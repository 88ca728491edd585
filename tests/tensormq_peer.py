"""The other process of the TensorMQ tests: `python tensormq_peer.py ROLE ENDPOINT REPLY DEVICE`.

echo:  receives on ENDPOINT and sends every message back, doubled, to REPLY.
hold:  receives on ENDPOINT and releases nothing.
flood: sends to ENDPOINT without end.
Prints "ready" once it is.
"""

from __future__ import annotations

import sys
import time

import torch

from tensormq import Carrier, Loop, Pull, Push


def main() -> None:
    role, endpoint, reply, device, carrier = sys.argv[1:6]
    carriers = None if carrier == "any" else [Carrier(carrier)]
    loop = Loop()
    if role == "flood":
        push = Push(slots=4, slot_bytes=1 << 20, device=device, loop=loop, carriers=carriers)
        print("ready", flush=True)
        peer = push.connect(endpoint)
        number = 0
        while True:
            number += 1
            push.send({"n": torch.full((1 << 16,), float(number), device=device)}, to=peer)
    pull = Pull(endpoint, device=device, loop=loop, carriers=carriers)
    print("ready", flush=True)
    if role == "hold":
        held = []
        while True:
            held.append(pull.recv())
    push = Push(slots=4, slot_bytes=32 << 20, device=device, loop=loop, carriers=carriers)
    peer = None
    while True:
        with pull.recv() as message:
            if message.note == b"quit":
                break
            peer = peer or push.connect(reply)
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
    time.sleep(0)


if __name__ == "__main__":
    main()
