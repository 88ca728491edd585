"""What docs/tensormq.md says, run as it is written, in processes of their own."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import tensormq

PAGE = (Path(__file__).parent.parent / "docs" / "tensormq.md").read_text()
SCRIPTS = {
    match[1]: match[0]
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    if (match := re.fullmatch(r"# (\w+\.py)\n.*", block, re.DOTALL))
}


class Scripts:
    """The page's scripts in a directory, and the processes that run them."""

    def __init__(self, directory: Path, run_dir: Path) -> None:
        self._directory = directory
        self._started: list[subprocess.Popen[str]] = []
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        for name, text in SCRIPTS.items():
            # The page says to make this directory with mode 0700, which `run_dir` has; and its
            # port may be taken.
            here = text.replace("/tmp/q/", f"{run_dir}/")  # noqa: S108
            (directory / name).write_text(here.replace(":5690", f":{port}"))

    def start(self, command: str) -> subprocess.Popen[str]:
        words = shlex.split(command)
        process = subprocess.Popen(
            [sys.executable, *words[1:]], cwd=self._directory, stdout=subprocess.PIPE, text=True
        )
        self._started.append(process)
        return process

    def run(self, command: str) -> str:
        said, _ = self.start(command).communicate(timeout=60)
        assert self._started[-1].returncode == 0
        return said

    def end(self) -> None:
        for process in self._started:
            process.kill()
            process.communicate()


@pytest.fixture
def scripts(tmp_path: Path, run_dir: Path) -> Iterator[Scripts]:
    scripts = Scripts(tmp_path, run_dir)
    yield scripts
    scripts.end()


def promised(carrier: str) -> str:
    """What the page says that a consumer prints."""
    (line,) = re.findall(rf"`({carrier} float32 [^`]*)`", PAGE)
    return f"{line}\n"


def test_two_processes(scripts: Scripts) -> None:
    consumer = scripts.start("python consumer.py")
    assert "messages=1, bytes=128, host_bytes=128" in scripts.run("python producer.py")
    assert consumer.communicate(timeout=60) == (promised("shm"), None)
    assert consumer.returncode == 0


def test_another_host(scripts: Scripts) -> None:
    (made,) = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    of_consumer, of_producer = (scripts.run(command).strip() for command in made.splitlines())
    # Keys may begin with a dash; scripts that read sys.argv do not mind.
    consumer = scripts.start(f"python far_consumer.py {shlex.quote(of_producer)}")
    scripts.run(f"python far_producer.py {shlex.quote(of_consumer)}")
    assert consumer.communicate(timeout=60) == (promised("inline"), None)
    assert consumer.returncode == 0


def test_each_script_has_about_ten_lines() -> None:
    assert SCRIPTS.keys() == {"consumer.py", "producer.py", "far_consumer.py", "far_producer.py"}
    for name, text in SCRIPTS.items():
        assert len(text.splitlines()) <= 12, name


def test_every_public_error_is_on_the_page() -> None:
    for name in tensormq.__all__:
        thing = getattr(tensormq, name)
        if isinstance(thing, type) and issubclass(thing, Exception):
            assert f"`{name}`" in PAGE, name
