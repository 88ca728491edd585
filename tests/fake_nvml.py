"""NVIDIA's management library over GPUs that are not there; without anything of BlockFlow."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

GIB = 1 << 30


class NVMLError(Exception):
    pass


class NVMLError_LibraryNotFound(NVMLError):  # noqa: N801 - pynvml's name
    pass


class NVMLError_DriverNotLoaded(NVMLError):  # noqa: N801 - pynvml's name
    pass


class NVMLError_NotSupported(NVMLError):  # noqa: N801 - pynvml's name
    pass


@dataclass
class FakeNvml:
    """pynvml's functions over a list of UUIDs; counts what is opened and closed."""

    uuids: list[str]
    init_error: NVMLError | None = None
    broken: str | None = None
    processes: dict[str, dict[int, int | None]] = field(default_factory=dict)
    mps_clients: dict[str, dict[int, int | None]] = field(default_factory=dict)
    sensor_error: NVMLError | None = None
    sessions: int = 0

    NVMLError = NVMLError
    NVMLError_NotSupported = NVMLError_NotSupported
    NVML_TEMPERATURE_GPU = 0
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

    def nvmlDeviceGetMPSComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:  # noqa: N802
        if not self.mps_clients:
            raise NVMLError_NotSupported
        return [
            SimpleNamespace(pid=pid, usedGpuMemory=used)
            for pid, used in self.mps_clients.get(handle, {}).items()
        ]

    def _sense(self, value: Any) -> Any:
        if self.sensor_error is not None:
            raise self.sensor_error
        return value

    def nvmlDeviceGetUtilizationRates(self, _handle: str) -> SimpleNamespace:  # noqa: N802
        return self._sense(SimpleNamespace(gpu=37, memory=12))  # type: ignore[no-any-return]

    def nvmlDeviceGetPowerUsage(self, _handle: str) -> int:  # noqa: N802
        return self._sense(123_456)  # type: ignore[no-any-return]

    def nvmlDeviceGetTotalEnergyConsumption(self, _handle: str) -> int:  # noqa: N802
        return self._sense(7_000_500)  # type: ignore[no-any-return]

    def nvmlDeviceGetTemperature(self, _handle: str, sensor: int) -> int:  # noqa: N802
        assert sensor == self.NVML_TEMPERATURE_GPU
        return self._sense(54)  # type: ignore[no-any-return]
