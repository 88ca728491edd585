from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensormq import wire
from tensormq.errors import ProtocolError, TensorTooLarge, UnsupportedTensor

HOST = wire.Host("boot", "pid:[1]", 1000)
EVERY = tuple(wire.Carrier)


def abilities(pid: int, *carriers: wire.Carrier, gpu: str | None = None) -> wire.Abilities:
    return wire.Abilities(wire.Process(HOST, pid, 1), carriers or EVERY, gpu)


specs = st.builds(
    wire.TensorSpec,
    name=st.text(max_size=8),
    dtype=st.sampled_from(sorted(wire.ITEMSIZE)),
    shape=st.lists(st.integers(0, 9), max_size=4).map(tuple),
    offset=st.integers(0, 1 << 40).map(lambda n: n * wire.ALIGNMENT),
)
requests = st.builds(
    wire.Request,
    id=st.integers(0, 1 << 62),
    rows=st.integers(0, 9),
    deadline=st.floats(0, 1e9),
)
delivers = st.builds(
    wire.Deliver,
    epoch=st.integers(0, 1 << 62),
    sequence=st.integers(1, 1 << 62),
    slot=st.integers(-1, 99),
    tensors=st.lists(specs, max_size=3).map(lambda found: wire.Layout(tuple(found)).encoded),
    requests=st.lists(requests, max_size=3).map(tuple),
    route=st.integers(0, 1 << 31),
    note=st.binary(max_size=20),
)


@given(delivers)
def test_a_descriptor_survives_the_wire(message: wire.Deliver) -> None:
    found = wire.decode_to_consumer(wire.encode(message))
    assert isinstance(found, wire.Deliver)
    tensors = bytes(found.tensors)
    assert tensors == bytes(message.tensors)
    assert msgspec.structs.replace(found, tensors=message.tensors) == message
    assert bytes(wire.parse_layout(tensors, 1 << 50).encoded) == tensors


@pytest.mark.parametrize(
    "message",
    [
        wire.Card(7, abilities(1, gpu="GPU-1")),
        wire.Welcome(7),
        wire.Decline(7, "why"),
        wire.Release(7, 1, 0),
        wire.Bye(7),
    ],
)
def test_answers_survive_the_wire(message: wire.ToProducer) -> None:
    assert wire.decode_to_producer(wire.encode(message)) == message


@settings(max_examples=500)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_parsed_or_refused(body: bytes, magic: bool) -> None:
    frame = (wire.MAGIC if magic else b"") + body
    for decode in (wire.decode_to_consumer, wire.decode_to_producer):
        with contextlib.suppress(ProtocolError):
            decode(frame)
    for decode_in_ring in (wire.decode_deliver, wire.decode_release):
        with contextlib.suppress(ProtocolError):
            decode_in_ring(frame)


@settings(max_examples=300)
@given(delivers, st.data())
def test_damaged_descriptors_never_point_outside_the_slab(
    message: wire.Deliver, data: st.DataObject
) -> None:
    frame = bytearray(wire.encode(message))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        parsed = wire.decode_to_consumer(bytes(frame))
        if isinstance(parsed, wire.Deliver):
            wire.check_descriptor(parsed, slots=4)
            layout = wire.parse_layout(bytes(parsed.tensors), slot_bytes=4096)
    except ProtocolError:
        return
    if isinstance(parsed, wire.Deliver):
        assert 0 <= parsed.slot < 4
        assert all(s.offset >= 0 and s.offset + s.nbytes <= 4096 for s in layout.specs)


def test_another_version_is_named() -> None:
    frame = b"TMQ\x09" + wire.encode(wire.Bye(1))[4:]
    with pytest.raises(ProtocolError, match="version 9"):
        wire.decode_to_consumer(frame)
    with pytest.raises(ProtocolError, match="does not speak TensorMQ"):
        wire.decode_to_consumer(b"GET / HTTP/1.1")
    with pytest.raises(ProtocolError, match="at most"):
        wire.decode_to_consumer(wire.MAGIC + bytes(wire.MAX_FRAME))


def test_tensors_are_laid_out_aligned_and_within_the_slot() -> None:
    x, y = wire.lay_out({"x": ("float32", (3, 5)), "y": ("uint8", (7,))}, 4096)
    assert (x.offset, y.offset) == (0, 256)
    with pytest.raises(TensorTooLarge, match=r"y uint8\[300\].*take 556 bytes.*holds 512"):
        wire.lay_out({"x": ("float32", (3, 5)), "y": ("uint8", (300,))}, 512)
    with pytest.raises(UnsupportedTensor, match="'x' has dtype quint8"):
        wire.lay_out({"x": ("quint8", (1,))}, 512)


def test_carriers_are_chosen_best_first() -> None:
    gpu = abilities(1, gpu="GPU-a")
    assert wire.candidates(gpu, abilities(2, gpu="GPU-a")) == (EVERY, {})
    carriers, reasons = wire.candidates(gpu, abilities(2, gpu="GPU-b"))
    assert carriers == (wire.Carrier.SHM, wire.Carrier.INLINE)
    assert "(GPU-b) cannot reach the producer's (GPU-a)" in reasons[wire.Carrier.CUDA_IPC]
    near = msgspec.structs.replace(abilities(2, gpu="GPU-b"), reaches=("GPU-c", "GPU-a"))
    assert wire.candidates(gpu, near) == (EVERY, {})
    # It is the consumer's GPU that reads and writes the producer's memory.
    assert wire.Carrier.CUDA_IPC not in wire.candidates(near, gpu)[0]
    same = wire.candidates(gpu, abilities(1, gpu="GPU-a"))[1]
    assert "exported it" in same[wire.Carrier.CUDA_IPC]
    elsewhere = wire.Abilities(wire.Process(wire.Host("other", "pid:[1]", 1000), 2, 1), EVERY)
    assert wire.candidates(abilities(1), elsewhere)[0] == (wire.Carrier.INLINE,)
    assert wire.candidates(abilities(1, wire.Carrier.SHM), elsewhere)[0] == ()
