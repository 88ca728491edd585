"""TensorMQ: hand a tensor to another process without moving it.

    # consumer                                   # producer
    pull = Pull("ipc:///run/me/in.sock",         push = Push(slot_bytes=4 << 20, device="cpu")
                device="cpu")                    peer = push.connect("ipc:///run/me/in.sock")
    with pull.recv(timeout=1.0) as message:      push.send({"x": tensor}, to=peer)
        use(message.tensors["x"])

A message is a small descriptor, carried by a ring in shared memory or by ZeroMQ; the tensors stay
in the producer's memory (shared memory on a CPU, CUDA IPC on a GPU) until the consumer releases
them.
"""

from . import push
from .errors import (
    EndpointError,
    NegotiationError,
    PeerLost,
    ProtocolError,
    RingBroken,
    SecurityError,
    TensorMQError,
    TensorTooLarge,
    Timeout,
    UnsupportedTensor,
)
from .keys import Keys, load_keys, make_keys
from .lane import Filling
from .loop import Loop
from .pull import Message, Pull
from .push import Peer, Push
from .statistics import ChannelStatistics, ConsumerStatistics, Histogram
from .wire import Carrier, Doorbell, Request, slot_size

COMPILED = not str(push.__file__).endswith(".py")
"""Whether the modules that a message passes through were compiled (see setup.py)."""

__all__ = [
    "COMPILED",
    "Carrier",
    "ChannelStatistics",
    "ConsumerStatistics",
    "Doorbell",
    "EndpointError",
    "Filling",
    "Histogram",
    "Keys",
    "Loop",
    "Message",
    "NegotiationError",
    "Peer",
    "PeerLost",
    "ProtocolError",
    "Pull",
    "Push",
    "Request",
    "RingBroken",
    "SecurityError",
    "TensorMQError",
    "TensorTooLarge",
    "Timeout",
    "UnsupportedTensor",
    "load_keys",
    "make_keys",
    "slot_size",
]
