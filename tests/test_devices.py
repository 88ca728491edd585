from __future__ import annotations

import logging
import os

import psutil
import pytest

from blockflow import devices
from blockflow.devices import Device, list_devices, process_memory, survey, visible_entries
from fake_nvml import (
    GIB,
    FakeNvml,
    NVMLError,
    NVMLError_DriverNotLoaded,
    NVMLError_LibraryNotFound,
    NVMLError_NotSupported,
)


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


def sensors(device: Device) -> tuple[float | None, ...]:
    return (
        device.utilization,
        device.power_watts,
        device.energy_joules,
        device.temperature_celsius,
    )


def test_sensors_are_read_in_plain_units() -> None:
    cpu, gpu = survey(FakeNvml(["GPU-aa"]), {}).devices
    assert sensors(gpu) == (0.37, 123.456, 7000.5, 54.0)
    assert sensors(cpu) == (None,) * 4


@pytest.mark.parametrize(
    ("error", "lines"), [(NVMLError_NotSupported(), 0), (NVMLError("Unknown error"), 1)]
)
def test_a_gpu_without_sensors_is_still_a_gpu(
    error: NVMLError, lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    nvml = FakeNvml(["GPU-aa"], sensor_error=error)
    for _ in range(2):
        found = survey(nvml, {})
        assert found.problem is None
        assert found.devices[1].memory_total == 80 * GIB
        assert sensors(found.devices[1]) == (None,) * 4
    assert len(caplog.records) == lines


@pytest.mark.gpu
def test_the_sensors_of_a_real_gpu() -> None:
    """Every data centre GPU has them all; energy only grows."""
    before, after = (
        next(device for device in list_devices() if device.kind == "cuda") for _ in range(2)
    )
    utilization, power, energy, temperature = sensors(after)
    assert utilization is not None
    assert 0 <= utilization <= 1
    assert power is not None
    assert 5 < power < 2000
    assert temperature is not None
    assert 5 < temperature < 110
    assert energy is not None
    assert before.energy_joules is not None
    assert energy >= before.energy_joules > 0


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


def test_memory_of_a_client_of_mps() -> None:
    nvml = FakeNvml(["GPU-aa"], mps_clients={"GPU-aa": {os.getpid(): 11}})
    assert process_memory(os.getpid(), nvml, {}).device_bytes == {"cuda:0": 11}


def test_a_process_that_is_gone_takes_no_memory() -> None:
    gone = max(psutil.pids()) + 100_000
    assert process_memory(gone).host_bytes == 0
