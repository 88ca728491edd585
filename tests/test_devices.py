from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from types import SimpleNamespace

import psutil
import pytest

from blockflow import devices
from blockflow.devices import list_devices, process_memory, survey, visible_entries

GIB = 1 << 30


class NVMLError(Exception):
    pass


class NVMLError_LibraryNotFound(NVMLError):  # noqa: N801 - pynvml's name
    pass


class NVMLError_DriverNotLoaded(NVMLError):  # noqa: N801 - pynvml's name
    pass


@dataclass
class FakeNvml:
    """pynvml's functions over a list of UUIDs; counts what is opened and closed."""

    uuids: list[str]
    init_error: NVMLError | None = None
    broken: str | None = None
    processes: dict[str, dict[int, int | None]] = field(default_factory=dict)
    sessions: int = 0

    NVMLError = NVMLError
    NVMLError_LibraryNotFound = NVMLError_LibraryNotFound
    NVMLError_DriverNotLoaded = NVMLError_DriverNotLoaded

    def nvmlInit(self) -> None:  # noqa: N802
        if self.init_error:
            raise self.init_error
        self.sessions += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.sessions -= 1

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return len(self.uuids)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return self.uuids[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> str:  # noqa: N802
        return handle

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return f"Model of {handle}"

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.1"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> SimpleNamespace:  # noqa: N802
        if handle == self.broken:
            raise NVMLError("GPU is lost")
        return SimpleNamespace(total=80 * GIB, free=60 * GIB, used=20 * GIB)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:  # noqa: N802
        if handle == self.broken:
            raise NVMLError("GPU is lost")
        return [
            SimpleNamespace(pid=pid, usedGpuMemory=used)
            for pid, used in self.processes.get(handle, {}).items()
        ]


@pytest.fixture(autouse=True)
def _forget_what_was_logged() -> None:
    devices._reported.cache_clear()


def test_the_cpu_is_always_there() -> None:
    cpu = list_devices()[0]
    assert (cpu.name, cpu.kind) == ("cpu", "cpu")
    assert cpu.cores is not None
    assert cpu.cores >= 1
    assert 0 < cpu.memory_available <= cpu.memory_total


def test_gpus_are_described() -> None:
    nvml = FakeNvml(["GPU-aa", "GPU-bb"])
    found = survey(nvml, {})
    assert [device.name for device in found.devices] == ["cpu", "cuda:0", "cuda:1"]
    assert found.problem is None
    gpu = found.devices[2]
    assert (gpu.uuid, gpu.model, gpu.driver) == ("GPU-bb", "Model of GPU-bb", "580.1")
    assert (gpu.memory_total, gpu.memory_available) == (80 * GIB, 60 * GIB)
    assert nvml.sessions == 0


@pytest.mark.parametrize("error", [NVMLError_LibraryNotFound(), NVMLError_DriverNotLoaded()])
def test_a_host_without_a_driver_has_just_a_cpu(
    error: NVMLError, caplog: pytest.LogCaptureFixture
) -> None:
    found = survey(FakeNvml([], init_error=error), {})
    assert [device.name for device in found.devices] == ["cpu"]
    assert found.problem is None
    assert not caplog.records


def test_a_failing_driver_is_reported_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    nvml = FakeNvml(["GPU-aa"], init_error=NVMLError("Driver/library version mismatch"))
    for _ in range(3):
        found = survey(nvml, {})
        assert [device.name for device in found.devices] == ["cpu"]
        assert found.problem == "the NVIDIA driver failed: Driver/library version mismatch"
        assert process_memory(os.getpid(), nvml, {}).device_bytes == {}
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_a_broken_gpu_does_not_hide_the_others() -> None:
    nvml = FakeNvml(["GPU-aa", "GPU-bb"], broken="GPU-aa", processes={"GPU-bb": {os.getpid(): 7}})
    found = survey(nvml, {})
    assert [device.name for device in found.devices] == ["cpu", "cuda:1"]
    assert found.problem == "the NVIDIA driver failed at cuda:0: GPU is lost"
    assert process_memory(os.getpid(), nvml, {}).device_bytes == {"cuda:1": 7}
    assert nvml.sessions == 0


def test_indices_are_those_of_the_visible_gpus() -> None:
    nvml = FakeNvml(["GPU-aa", "GPU-bb"], processes={"GPU-bb": {os.getpid(): 5 * GIB}})
    only_second = {"CUDA_VISIBLE_DEVICES": "1"}
    assert [device.uuid for device in survey(nvml, only_second).devices] == [None, "GPU-bb"]
    assert process_memory(os.getpid(), nvml, only_second).device_bytes == {"cuda:0": 5 * GIB}
    assert process_memory(os.getpid(), nvml, {}).device_bytes == {"cuda:1": 5 * GIB}


@pytest.mark.parametrize(
    ("wanted", "entries"),
    [
        ("0,2", [0, 2]),
        ("2, 0", [2, 0]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [0]),
        ("0,7,1", [0]),
        ("nonsense", []),
        ("1,1", []),
        ("GPU-b", [1]),
        ("GPU-b,0", [1, 0]),
        ("GPU-", []),
        ("GPU-b,1", []),
        ("MIG-1234", ["MIG-1234"]),
        ("٢", []),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(
    wanted: str, entries: list[int | str]
) -> None:
    assert visible_entries(wanted, ["GPU-aa", "GPU-bb", "GPU-cc"]) == entries


def test_memory_of_a_process() -> None:
    assert process_memory(os.getpid()).host_bytes > 1 << 20


def test_memory_the_driver_does_not_know_is_left_out() -> None:
    nvml = FakeNvml(["GPU-aa"], processes={"GPU-aa": {os.getpid(): None}})
    assert process_memory(os.getpid(), nvml, {}).device_bytes == {}


def test_a_process_that_is_gone_takes_no_memory() -> None:
    gone = max(psutil.pids()) + 100_000
    assert process_memory(gone).host_bytes == 0
