"""The devices of this host, what they say of themselves, and the memory that processes take.

Without torch.

GPUs are counted as CUDA counts them: `cuda:<n>` is the n-th of CUDA_VISIBLE_DEVICES. NVML orders
GPUs by PCI bus, CUDA by speed unless CUDA_DEVICE_ORDER=PCI_BUS_ID; on a host with GPUs of several
models a process that computes must have that variable set, or its indices mean other GPUs.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import psutil
import pynvml
from pydantic import BaseModel, ConfigDict

_log = logging.getLogger(__name__)

Sensed = TypeVar("Sensed")


class Mps(BaseModel):
    """Whether a GPU's workers run under MPS.

    `failed`: they should and do not, or not all of them, for `reason`. `clients` are the workers
    that MPS itself names as its clients, with their pids.
    """

    model_config = ConfigDict(frozen=True)

    state: Literal["on", "off", "failed"]
    reason: str | None = None
    clients: dict[str, int] = {}


class Device(BaseModel):
    """A place where blocks can live; memory in bytes.

    What only some GPUs can say of themselves is None where they do not: MIG instances, for one,
    have no power meter of their own.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    """As topologies name it: "cpu", or "cuda:<index>"."""
    kind: Literal["cpu", "cuda"]
    model: str
    memory_total: int
    memory_available: int
    """Free for new allocations: on the CPU without swapping, on a GPU as the driver says."""
    cores: int | None = None
    """Of the CPU: those that this process may run on."""
    uuid: str | None = None
    driver: str | None = None
    utilization: float | None = None
    """Of a GPU: share of its last sample period, at most a second, in which a kernel ran; 0 to 1.

    A kernel on one multiprocessor counts like one on all: this is no measure of spare room.
    """
    power_watts: float | None = None
    """Of the whole board; an average over the last second on GPUs since Ampere."""
    energy_joules: float | None = None
    """Of the whole board, since the driver was loaded; its differences measure work."""
    temperature_celsius: float | None = None
    mps: Mps | None = None
    """Of a GPU, in a server's answer."""


class Survey(BaseModel):
    """The devices that were found; `problem` says why GPUs may be missing, None if none are."""

    model_config = ConfigDict(frozen=True)

    devices: tuple[Device, ...]
    problem: str | None = None

    def with_mps(self, known: Mapping[str, Mps]) -> Survey:
        """The same with what a server knows of MPS on each GPU; where it knows nothing, it is off.

        An instance of MPS by another hand is not seen here.
        """
        devices = tuple(
            device.model_copy(update={"mps": known.get(device.name, Mps(state="off"))})
            if device.kind == "cuda"
            else device
            for device in self.devices
        )
        return self.model_copy(update={"devices": devices})


class ProcessMemory(BaseModel):
    """Memory of one process, in bytes.

    `host_bytes` is the resident set, shared pages included. `device_bytes` has an entry for every
    GPU on which the driver reports the process; in a container the driver may know processes by
    other numbers, and then reports none.
    """

    model_config = ConfigDict(frozen=True)

    host_bytes: int
    device_bytes: dict[str, int]


def list_devices() -> list[Device]:
    """List the CPU and the visible NVIDIA GPUs. A failing driver is logged once, not raised."""
    return list(survey().devices)


def survey(nvml: Any = pynvml, environ: Mapping[str, str] = os.environ) -> Survey:
    """List the devices, and say what kept GPUs from being listed.

    `nvml` is a module with pynvml's functions.
    """
    devices = [_cpu()]
    problems: list[str] = []
    with _gpus(nvml, environ, problems) as handles:
        for index, handle in enumerate(handles):
            try:
                devices.append(_gpu(nvml, index, handle))
            except nvml.NVMLError as error:
                problems.append(_reported(f"the NVIDIA driver failed at cuda:{index}: {error}"))
    return Survey(devices=tuple(devices), problem="; ".join(problems) or None)


def process_memory(
    pid: int, nvml: Any = pynvml, environ: Mapping[str, str] = os.environ
) -> ProcessMemory:
    """Say how much memory process `pid` takes; one that is gone takes none."""
    try:
        host_bytes = psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return ProcessMemory(host_bytes=0, device_bytes={})
    device_bytes: dict[str, int] = {}
    with _gpus(nvml, environ, []) as handles:
        for index, handle in enumerate(handles):
            try:
                processes = list(nvml.nvmlDeviceGetComputeRunningProcesses(handle))
            except nvml.NVMLError as error:
                _reported(f"the NVIDIA driver failed at cuda:{index}: {error}")
                continue
            clients = _sensor(nvml, index, partial(_mps_clients, nvml, handle))
            for process in (*processes, *(clients or ())):
                if process.pid == pid and process.usedGpuMemory is not None:
                    device_bytes[f"cuda:{index}"] = process.usedGpuMemory
    return ProcessMemory(host_bytes=host_bytes, device_bytes=device_bytes)


@contextmanager
def _gpus(nvml: Any, environ: Mapping[str, str], problems: list[str]) -> Iterator[list[Any]]:
    """Hold NVML open and give the visible GPUs' handles; what fails is added to `problems`.

    A host without NVIDIA's driver has no GPUs, and no problem.
    """
    with ExitStack() as stack:
        handles: list[Any] = []
        try:
            nvml.nvmlInit()
            stack.callback(nvml.nvmlShutdown)
            handles = _visible(nvml, environ)
        except (nvml.NVMLError_LibraryNotFound, nvml.NVMLError_DriverNotLoaded):
            pass
        except nvml.NVMLError as error:
            problems.append(_reported(f"the NVIDIA driver failed: {error}"))
        yield handles


def _cpu() -> Device:
    memory = psutil.virtual_memory()
    return Device(
        name="cpu",
        kind="cpu",
        model=os.uname().machine,
        memory_total=memory.total,
        memory_available=memory.available,
        cores=len(os.sched_getaffinity(0)),
    )


def _gpu(nvml: Any, index: int, handle: object) -> Device:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return Device(
        name=f"cuda:{index}",
        kind="cuda",
        model=nvml.nvmlDeviceGetName(handle),
        memory_total=memory.total,
        memory_available=memory.free,
        uuid=nvml.nvmlDeviceGetUUID(handle),
        driver=nvml.nvmlSystemGetDriverVersion(),
        utilization=_sensor(
            nvml, index, lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100
        ),
        power_watts=_sensor(nvml, index, lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
        energy_joules=_sensor(
            nvml, index, lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        ),
        temperature_celsius=_sensor(
            nvml,
            index,
            lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        ),
    )


def _mps_clients(nvml: Any, handle: object) -> list[Any]:
    """The driver lists clients of MPS apart from other processes."""
    return list(nvml.nvmlDeviceGetMPSComputeRunningProcesses(handle))


def _sensor(nvml: Any, index: int, read: Callable[[], Sensed]) -> Sensed | None:
    """Read what a GPU may not be able to say. A sensor that fails never hides its GPU."""
    try:
        return read()
    except nvml.NVMLError_NotSupported:
        return None
    except nvml.NVMLError as error:
        _reported(f"a sensor of cuda:{index} failed: {error}")
        return None


def _visible(nvml: Any, environ: Mapping[str, str]) -> list[Any]:
    """Give the handles of the GPUs that CUDA would show, in its order."""
    handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    wanted = environ.get("CUDA_VISIBLE_DEVICES")
    if wanted is None:
        return handles
    uuids = [nvml.nvmlDeviceGetUUID(handle) for handle in handles]
    visible: list[Any] = []
    for entry in visible_entries(wanted, uuids):
        if isinstance(entry, int):
            visible.append(handles[entry])
        else:
            visible.append(nvml.nvmlDeviceGetHandleByUUID(entry))
    return visible


def visible_entries(wanted: str, uuids: Sequence[str]) -> list[int | str]:
    """Read CUDA_VISIBLE_DEVICES as the CUDA driver does.

    Entries are indices, or prefixes of GPU UUIDs, or UUIDs of MIG instances (given back as they
    are). The list ends at the first entry that names no device; one that names a device twice
    makes CUDA see none at all.
    """
    found: list[int | str] = []
    for entry in (part.strip() for part in wanted.split(",")):
        place: int | str
        if entry.startswith("MIG-"):
            place = entry
        elif entry.startswith("GPU-"):
            matches = [index for index, uuid in enumerate(uuids) if uuid.startswith(entry)]
            if len(matches) != 1:
                break
            place = matches[0]
        elif entry.isascii() and entry.isdecimal() and int(entry) < len(uuids):
            place = int(entry)
        else:
            break
        if place in found:
            return []
        found.append(place)
    return found


@functools.cache
def _reported(problem: str) -> str:
    """Log a problem the first time it is seen: memory is asked for many times a minute."""
    _log.warning("%s", problem)
    return problem
