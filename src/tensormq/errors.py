"""Every error TensorMQ raises on purpose.

TensorMQError
├── ProtocolError     the peer's fault: a frame that is not a message of this protocol
├── RingBroken        the peer's fault: shared memory that says what cannot be; ends the channel
├── EndpointError     an endpoint that cannot be bound safely or reached
├── SecurityError     keys that are missing, unsafe or not allowed, where a tcp endpoint needs them
├── NegotiationError  two ends that share no allowed carrier
├── TensorTooLarge    tensors that do not fit the slot they are meant for
├── UnsupportedTensor a dtype, device or layout that cannot be carried
├── PeerLost          the other end's process is gone
└── Timeout           nothing arrived, or no slot came free, in time (also a TimeoutError)
"""

from __future__ import annotations


class TensorMQError(Exception):
    """Root of the tree."""


class ProtocolError(TensorMQError):
    """A frame that the wire format does not allow; the channel ignores and counts it."""


class RingBroken(TensorMQError):
    """A ring whose positions or lengths cannot be; the channel is closed."""


class EndpointError(TensorMQError):
    pass


class SecurityError(TensorMQError):
    pass


class NegotiationError(TensorMQError):
    pass


class TensorTooLarge(TensorMQError):
    pass


class UnsupportedTensor(TensorMQError):
    pass


class PeerLost(TensorMQError):
    pass


class Timeout(TensorMQError, TimeoutError):
    pass
