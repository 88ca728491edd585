"""The other process of the ring's tests: `python ring_peer.py ROLE ARGUMENTS`.

write ENDPOINT COUNT SPIN DOORBELL: sends numbered messages, some too long for a ring.
echo ENDPOINT REPLY BACKSTOP: sends the route of every message back, until it is -1.
idle ENDPOINT: after a first message, prints the processor time that a second of waiting took.
"""

from __future__ import annotations

import sys
import time

import numpy as np

import tensormq.loop
from tensormq import Doorbell, Loop, Pull, Push


def write(endpoint: str, count: str, spin: str, doorbell: str) -> None:
    with (
        Loop(spin=float(spin)) as loop,
        Push(slots=4, slot_bytes=256, loop=loop, doorbell=Doorbell(doorbell)) as push,
    ):
        peer = push.connect(endpoint)
        assert peer.statistics.doorbell is Doorbell(doorbell)
        for number in range(int(count)):
            if number % 1000 == 0:
                # Longer than the ring: it takes the socket, and must not change places.
                push.send({}, to=peer, route=number, note=bytes(80_000))
            elif number % 3 == 0:
                push.send({"n": np.array([number])}, to=peer, route=number)
            else:
                push.send({}, to=peer, route=number)


def echo(endpoint: str, back: str, backstop: str) -> None:
    tensormq.loop._BACKSTOP = float(backstop)
    with Loop(spin=0) as loop, Pull(endpoint, loop=loop) as pull:
        push = Push(slot_bytes=256, loop=loop)
        peer = None
        while True:
            with pull.recv(timeout=60) as message:
                peer = peer or push.connect(back)
                if message.route == -1:
                    break
                push.send({}, to=peer, route=message.route)
        push.close()


def idle(endpoint: str) -> None:
    with Loop(spin=0.0005) as loop, Pull(endpoint, loop=loop) as pull:
        pull.recv(timeout=30).release()
        begin = time.process_time()
        assert not loop.run_until(lambda: pull.waiting > 0, timeout=1.0)
        print(time.process_time() - begin, flush=True)
        pull.recv(timeout=30).release()


if __name__ == "__main__":
    {"write": write, "echo": echo, "idle": idle}[sys.argv[1]](*sys.argv[2:])
