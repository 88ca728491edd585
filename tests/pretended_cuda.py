"""CUDA as far as TensorMQ's words need it, in host memory: streams do their work in order, and one
that waits for a word does nothing more before it has come.

It shows in which order things are asked for, not that a GPU does them: the tests marked `gpu` do.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import tensormq

_DEFAULT = 1


class _Code(enum.IntEnum):
    DONE = 0
    WRONG = 1


class Gpu:
    """One GPU: `given` is what was asked of its streams, in that order."""

    def __init__(self) -> None:
        self.given: list[str] = []
        self.current = _DEFAULT
        self.allocated: dict[int, Any] = {}
        self.opened: list[int] = []
        self.registered: set[int] = set()
        self._streams: dict[int, list[Callable[[], bool]]] = {_DEFAULT: []}
        self._lock = threading.RLock()

    def stream(self) -> int:
        """A new stream."""
        number = max(self._streams) + 1
        self._streams[number] = []
        return number

    def waits(self) -> bool:
        """Whether a stream waits for a word."""
        self.work()
        return any(self._streams.values())

    def work(self) -> None:
        """Do what can be done."""
        with self._lock:
            done = True
            while done:
                done = False
                for stream in self._streams.values():
                    while stream and stream[0]():
                        del stream[0]
                        done = True

    def synchronize(self, *_: object) -> None:
        """Wait until all streams are done."""
        end = time.monotonic() + 10
        while self.waits():
            assert time.monotonic() < end, "this would wait for ever"
            time.sleep(0.001)

    def _give(self, what: str, stream: int, step: Callable[[], bool]) -> tuple[_Code]:
        with self._lock:
            self.given.append(what)
            self._streams[stream].append(step)
        self.work()
        return (_Code.DONE,)

    def runtime(self) -> Any:
        """What stands in for `cuda.bindings.runtime`."""

        def malloc(size: int) -> tuple[_Code, int]:
            memory = (ctypes.c_char * size)()
            self.allocated[ctypes.addressof(memory)] = memory
            return _Code.DONE, ctypes.addressof(memory)

        def free(pointer: int) -> tuple[_Code]:
            self.synchronize()
            del self.allocated[pointer]
            return (_Code.DONE,)

        def open_handle(handle: Any, _: int) -> tuple[_Code, int]:
            self.opened.append(int.from_bytes(handle.reserved, "little"))
            return _Code.DONE, self.opened[-1]

        def close_handle(pointer: int) -> tuple[_Code]:
            self.synchronize()
            self.opened.remove(pointer)
            return (_Code.DONE,)

        def register(address: int, *_: int) -> tuple[_Code]:
            self.registered.add(address)
            return (_Code.DONE,)

        def unregister(address: int) -> tuple[_Code]:
            self.registered.remove(address)
            return (_Code.DONE,)

        def end_stream(stream: int) -> tuple[_Code]:
            assert not self._streams.pop(stream)
            return (_Code.DONE,)

        def wait_for_stream(stream: int) -> tuple[_Code]:
            assert not self._streams[stream], "this would wait for ever"
            return (_Code.DONE,)

        def copy(to: int, source: int, size: int, _: object, stream: int) -> tuple[_Code]:
            def step() -> bool:
                ctypes.memmove(to, source, size)
                return True

            return self._give("copy", stream, step)

        module: Any = ModuleType("cuda.bindings.runtime")
        module.cudaMemcpyKind = SimpleNamespace(cudaMemcpyDefault=4)
        module.cudaIpcMemHandle_t = SimpleNamespace
        module.cudaMalloc, module.cudaFree = malloc, free
        module.cudaIpcGetMemHandle = lambda pointer: (
            _Code.DONE,
            SimpleNamespace(reserved=pointer.to_bytes(64, "little")),
        )
        module.cudaIpcOpenMemHandle, module.cudaIpcCloseMemHandle = open_handle, close_handle
        module.cudaHostRegister, module.cudaHostUnregister = register, unregister
        module.cudaHostGetDevicePointer = lambda address, _: (_Code.DONE, address)
        module.cudaDeviceGetStreamPriorityRange = lambda: (_Code.DONE, 0, -5)
        module.cudaStreamCreateWithPriority = lambda *_: (_Code.DONE, self.stream())
        module.cudaStreamSynchronize, module.cudaStreamDestroy = wait_for_stream, end_stream
        module.cudaMemcpyAsync = copy
        module.cudaGetErrorName = lambda _: (_Code.DONE, b"no")
        module.cudaGetErrorString = lambda _: (_Code.DONE, b"luck")
        return module

    def driver(self) -> Any:
        """What stands in for `cuda.bindings.driver`."""

        def write(stream: int, address: int, value: int, _: int) -> tuple[_Code]:
            word = ctypes.c_uint64.from_address(address)

            def step() -> bool:
                word.value = value
                return True

            return self._give("write", stream, step)

        def wait(stream: int, address: int, value: int, _: int) -> tuple[_Code]:
            word = ctypes.c_uint64.from_address(address)
            return self._give("wait", stream, lambda: word.value >= value)

        module: Any = ModuleType("cuda.bindings.driver")
        module.CUstreamWaitValue_flags = SimpleNamespace(CU_STREAM_WAIT_VALUE_GEQ=0)
        module.CUstreamWriteValue_flags = SimpleNamespace(CU_STREAM_WRITE_VALUE_DEFAULT=0)
        module.CUresult = type(None)
        module.cuStreamWriteValue64, module.cuStreamWaitValue64 = write, wait
        return module


@contextlib.contextmanager
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Gpu, Any]]:
    """A GPU, and a `tensormq.cuda` of its own that uses it."""
    gpu = Gpu()
    bindings: Any = ModuleType("cuda.bindings")
    bindings.driver, bindings.runtime = gpu.driver(), gpu.runtime()
    with monkeypatch.context() as patch:
        for name, module in {
            "cuda": ModuleType("cuda"),
            "cuda.bindings": bindings,
            "cuda.bindings.driver": bindings.driver,
            "cuda.bindings.runtime": bindings.runtime,
        }.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda *_: None)
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "synchronize", gpu.synchronize)
        patch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: gpu.current, raising=False)
        path = Path(tensormq.__file__).with_name("cuda.py")
        spec = importlib.util.spec_from_file_location("tensormq.pretended_cuda", path)
        assert spec is not None
        assert spec.loader is not None
        cuda: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(cuda)

        def as_bytes(pointer: int, size: int, _: object) -> torch.Tensor:
            memory = (ctypes.c_char * size).from_address(pointer)
            return torch.frombuffer(memory, dtype=torch.uint8)

        cuda._as_bytes = cuda._as_bytes_of_peer = as_bytes
        yield gpu, cuda
