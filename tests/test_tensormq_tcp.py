"""tcp endpoints: keys, those who have none, and connections that end."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zmq

from tensormq import (
    Carrier,
    EndpointError,
    Keys,
    Loop,
    NegotiationError,
    Pull,
    Push,
    SecurityError,
    load_keys,
    make_keys,
    tcp,
    wire,
)
from tensormq.process import this_process

ANY_PORT = "tcp://127.0.0.1:*"


@pytest.fixture
def loop() -> Iterator[Loop]:
    with Loop() as loop:
        yield loop


@pytest.fixture
def mine(tmp_path: Path) -> Keys:
    return make_keys(tmp_path / "mine")


@pytest.fixture
def theirs(tmp_path: Path) -> Keys:
    return make_keys(tmp_path / "theirs")


def there_and_back(push: Push, pull: Pull, **how: object) -> None:
    peer = push.connect(pull.endpoint, **how)  # type: ignore[arg-type]
    push.send({"x": np.arange(3.0)}, to=peer)
    with pull.recv(timeout=5) as message:
        assert message.carrier is Carrier.INLINE
        assert message.tensors["x"].tolist() == [0.0, 1.0, 2.0]
    push.disconnect(peer)
    assert pull._channels == {}


def test_keys_are_their_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    keys = make_keys(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_keys(path) == keys
    assert keys.secret not in repr(keys)
    with pytest.raises(SecurityError, match="cannot hold new keys"):
        make_keys(path)
    for mode in (0o640, 0o604, 0o620):
        path.chmod(mode)
        with pytest.raises(SecurityError, match="mode 0600"):
            load_keys(path)


@pytest.mark.parametrize("content", ["", "x\n", f"{'a' * 40}\n", f"{'a' * 40}\n{'b' * 39}\n"])
def test_what_are_no_keys_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "keys"
    path.touch(mode=0o600)
    path.write_text(content)
    with pytest.raises(SecurityError):
        load_keys(path)
    with pytest.raises(SecurityError, match="cannot be read"):
        load_keys(tmp_path / "nothing")


def test_keys_are_made_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tensormq", "keys", str(tmp_path / "keys")]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    assert made.stdout.strip() == load_keys(tmp_path / "keys").public
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "cannot hold new keys" in again.stderr


def test_tcp_without_keys_has_to_be_asked_for(mine: Keys, theirs: Keys, run_dir: Path) -> None:
    for wrong in ({}, {"keys": mine}, {"allowed_keys": [theirs.public]}):
        with pytest.raises(SecurityError, match="insecure=True"):
            Pull(ANY_PORT, **wrong)
    with pytest.raises(SecurityError, match="is given keys"):
        Pull(ANY_PORT, keys=mine, allowed_keys=[theirs.public], insecure=True)
    with pytest.raises(SecurityError, match="no public key"):
        Pull(ANY_PORT, keys=mine, allowed_keys=["of nobody"])
    with pytest.raises(SecurityError, match="takes no keys"):
        Pull(f"ipc://{run_dir}/x", keys=mine, allowed_keys=[theirs.public])
    with Push(slot_bytes=256) as push:
        for wrong in ({}, {"keys": mine}, {"server_key": theirs.public}):
            with pytest.raises(SecurityError, match="insecure=True"):
                push.connect("tcp://127.0.0.1:1", **wrong)


def test_those_with_a_key_that_is_allowed_get_in(loop: Loop, mine: Keys, theirs: Keys) -> None:
    with (
        Pull(ANY_PORT, loop=loop, keys=mine, allowed_keys=[theirs.public]) as pull,
        Push(slot_bytes=256, loop=loop) as push,
    ):
        there_and_back(push, pull, keys=theirs, server_key=mine.public)
        assert pull.rejected == 0


def test_two_ends_of_a_process_allow_different_keys(loop: Loop, mine: Keys, theirs: Keys) -> None:
    with (
        Pull(ANY_PORT, loop=loop, keys=mine, allowed_keys=[theirs.public]) as pull,
        Pull(ANY_PORT, loop=loop, keys=mine, allowed_keys=[mine.public]) as another,
        Push(slot_bytes=256, loop=loop) as push,
    ):
        there_and_back(push, pull, keys=theirs, server_key=mine.public)
        with pytest.raises(SecurityError):
            push.connect(another.endpoint, keys=theirs, server_key=mine.public)
        there_and_back(push, another, keys=mine, server_key=mine.public)


def test_a_key_that_is_not_allowed_is_told_so(
    loop: Loop, mine: Keys, theirs: Keys, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = make_keys(tmp_path / "stranger")
    with (
        Pull(ANY_PORT, loop=loop, keys=mine, allowed_keys=[theirs.public]) as pull,
        Push(slot_bytes=256, loop=loop) as push,
    ):
        with pytest.raises(SecurityError, match="does not allow the producer's key"):
            push.connect(pull.endpoint, keys=stranger, server_key=mine.public, timeout=60)
        assert loop.run_until(lambda: pull.rejected == 1, timeout=5)
        assert stranger.public in caplog.text
        there_and_back(push, pull, keys=theirs, server_key=mine.public)


def test_ends_that_disagree_about_keys_do_not_wait(
    loop: Loop, mine: Keys, theirs: Keys, tmp_path: Path
) -> None:
    other = make_keys(tmp_path / "other").public
    with (
        Pull(ANY_PORT, loop=loop, keys=mine, allowed_keys=[theirs.public]) as pull,
        Pull(ANY_PORT, loop=loop, insecure=True) as open_to_all,
        Push(slot_bytes=256, loop=loop) as push,
    ):
        with pytest.raises(SecurityError, match="another public key"):
            push.connect(pull.endpoint, keys=theirs, server_key=other, timeout=60)
        with pytest.raises(SecurityError, match="the other none"):
            push.connect(pull.endpoint, insecure=True, timeout=60)
        with pytest.raises(SecurityError, match="the other none"):
            push.connect(open_to_all.endpoint, keys=theirs, server_key=mine.public, timeout=60)
        assert loop.run_until(lambda: pull.rejected > 1 and open_to_all.rejected > 0, timeout=5)
        assert pull._channels == open_to_all._channels == {}
        there_and_back(push, open_to_all, insecure=True)


def test_tensors_travel_inline_whatever_a_peer_says_of_itself(loop: Loop) -> None:
    """Both ends are of one process here, and neither looks for the other's memory or pid."""
    with (
        Pull(ANY_PORT, loop=loop, insecure=True) as pull,
        Push(slot_bytes=256, loop=loop) as push,
        Push(slot_bytes=256, loop=loop, carriers=[Carrier.SHM]) as picky,
    ):
        peer = push.connect(pull.endpoint, insecure=True)
        (channel,) = pull._channels.values()
        assert peer._pidfd is channel.pidfd is None
        assert peer._line is channel.line is None
        with pytest.raises(NegotiationError, match="inline: the producer does not do it"):
            picky.connect(pull.endpoint, insecure=True)


def test_a_frame_that_is_too_long_ends_its_connection(loop: Loop) -> None:
    with (
        Pull(ANY_PORT, loop=loop, insecure=True, max_slot_bytes=1 << 20) as pull,
        Push(slot_bytes=1 << 20, loop=loop) as push,
        Push(slot_bytes=2 << 20, loop=loop) as large,
    ):
        with pytest.raises(NegotiationError, match="takes 1048576 at most"):
            large.connect(pull.endpoint, insecure=True)
        peer = push.connect(pull.endpoint, insecure=True)
        stranger = zmq.Context.instance().socket(zmq.DEALER)
        stranger.setsockopt(zmq.LINGER, 0)
        stranger.connect(pull.endpoint)
        me = wire.Abilities(this_process(), (Carrier.INLINE,))
        stranger.send(wire.encode(wire.Hello(1, me)))
        assert loop.run_until(lambda: len(pull._channels) == 2, timeout=5)
        stranger.send(bytes(2 << 20))
        assert loop.run_until(lambda: len(pull._channels) == 1, timeout=5)
        stranger.close()
        push.send({"x": np.ones(1 << 17)}, to=peer)
        with pull.recv(timeout=5) as message:
            assert message.tensors["x"].sum() == 1 << 17


def test_what_arrived_before_the_connection_ended_stays(loop: Loop) -> None:
    with Pull(ANY_PORT, loop=loop, insecure=True) as pull:
        push = Push(slot_bytes=256, loop=loop)
        peer = push.connect(pull.endpoint, insecure=True)
        push.send({"x": np.arange(3.0)}, to=peer)
        loop.run_until(lambda: pull.waiting == 1, timeout=5)
        push._lose(peer, "the test says so")  # without a Bye
        (channel,) = pull._channels.values()
        assert loop.run_until(lambda: channel.ending, timeout=5)
        with pull.recv(timeout=0) as message:
            assert message.tensors["x"].tolist() == [0.0, 1.0, 2.0]
        assert pull._channels == {}
        push.close()


def test_a_consumer_that_leaves_is_noticed(loop: Loop, mine: Keys, theirs: Keys) -> None:
    pull = Pull(ANY_PORT, loop=loop, keys=mine, allowed_keys=[theirs.public])
    with Push(slot_bytes=256, loop=loop) as push:
        peer = push.connect(pull.endpoint, keys=theirs, server_key=mine.public)
        push.send({"x": np.ones(3)}, to=peer)
        pull.close()
        assert loop.run_until(lambda: peer.lost is not None, timeout=5)
        assert push.leased_slots == 0


def test_connections_leave_nothing_behind(loop: Loop, mine: Keys, theirs: Keys) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    def once() -> None:
        with (
            Pull(ANY_PORT, loop=loop, keys=mine, allowed_keys=[theirs.public]) as pull,
            Push(slot_bytes=256, loop=loop) as push,
        ):
            there_and_back(push, pull, keys=theirs, server_key=mine.public)

    once()
    before = descriptors()
    for _ in range(10):
        once()
    # ZeroMQ closes sockets in a thread of its own.
    assert loop.run_until(lambda: descriptors() <= before, timeout=5)


def test_an_endpoint_that_cannot_be(loop: Loop) -> None:
    with (
        Pull(ANY_PORT, loop=loop, insecure=True) as pull,
        pytest.raises(EndpointError, match="cannot be bound"),
    ):
        Pull(pull.endpoint, loop=loop, insecure=True)
    with Push(slot_bytes=256, loop=loop) as push:
        with pytest.raises(EndpointError, match="no endpoint"):
            push.connect("tcp://nonsense", insecure=True)
        # A port that is taken and not listened at: ZeroMQ closes in a thread of its own, so that of
        # a Pull end that was closed may still take a connection for a moment.
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            nobody = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(EndpointError, match="nobody answers"):
                push.connect(nobody, insecure=True, timeout=0.2)
    assert not tcp.is_tcp("ipc:///tcp://")
