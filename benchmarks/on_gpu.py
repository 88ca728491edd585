"""Everything that needs a GPU, part after part: tests, benchmarks, experiments.

    python benchmarks/on_gpu.py --out /tmp/results
    python benchmarks/on_gpu.py --out /tmp/results --only tests,tests-mps,runtime

Parts whose name ends in `two-gpus` need two GPUs that reach each other's memory, all else one.

A part that fails or takes longer than its limit does not keep the others from running. What each
prints is in <part>.log, what it measured in JSON beside it; the end of a failed part's log is
printed. Parts whose name ends in `-mps` run under a daemon of NVIDIA's MPS of their own, except the
tests of BlockFlow's own daemon (`tests-mps`). Nobody else may use the GPU meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_PYTEST = ("-m", "pytest", "-v", "-p", "no:cacheprovider", "--durations", "10", "-m")
_TESTS = ("tensormq", "soak", "program", "devices", "runtime", "gpu_runner", "gpu")
_EXPERIMENTS = ("latency", "throughput", "energy", "vram", "sharing")
_LAST_LINES = 40


@dataclass(frozen=True)
class Part:
    """`arguments` are Python's; `seconds` is the limit."""

    name: str
    seconds: float
    arguments: Sequence[str]
    under_mps: bool = False


def parts(device: str, out: Path, store: str, *, full: bool) -> list[Part]:
    def measured(script: str, seconds: float, *arguments: str) -> list[Part]:
        """A benchmark without and with MPS."""
        return [
            Part(
                f"{script}{suffix}",
                seconds,
                (
                    f"benchmarks/{script}.py",
                    *("--device", device, "--json", str(out / f"{script}{suffix}.json")),
                    *arguments,
                ),
                bool(suffix),
            )
            for suffix in ("", "-mps")
        ]

    tests = [f"tests/test_{name}.py" for name in _TESTS]
    quick = () if full else ("--quick",)
    return [
        Part("tests", 400, (*_PYTEST, "gpu and not two_gpus", *tests)),
        Part("tests-two-gpus", 300, (*_PYTEST, "two_gpus", *tests)),
        Part("tests-mps", 300, (*_PYTEST, "gpu", "tests/test_gpu_mps.py")),
        Part(
            "split-balance",
            180,
            (
                "benchmarks/split_balance.py",
                *("--device", device, "--rows", "1", "--precision", "tf32"),
                *("--output", str(out / "split-balance-gpu")),
            ),
        ),
        *measured("runtime", 240, "--precision", "tf32", "--store", store, *quick),
        *measured("hop", 120, *(() if full else ("--rounds", "12"))),
        Part(
            "hop-two-gpus",
            90,
            (
                "benchmarks/hop.py",
                *("--device", device, "--to", "cuda:1", "--only", "tensormq,raw", "--rounds", "12"),
                *("--json", str(out / "hop-two-gpus.json")),
            ),
        ),
        *measured("ping_pong", 60),
        *measured("fanout", 120),
        *(
            Part(
                name,
                900 if full else 180,
                (
                    f"experiments/run_{name}_test.py",
                    *("--device", device, "--out", str(out), "--store", store, *quick),
                ),
            )
            for name in _EXPERIMENTS
        ),
    ]


@contextlib.contextmanager
def mps_daemon() -> Iterator[Mapping[str, str]]:
    """The environment in which processes join a daemon that is there meanwhile."""
    with tempfile.TemporaryDirectory(prefix="mps-") as folder:
        places = {
            "CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe",
            "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log",
        }
        for place in places.values():
            Path(place).mkdir(mode=0o700)
        environment = os.environ | places
        subprocess.run(["nvidia-cuda-mps-control", "-d"], env=environment, check=True)
        try:
            yield places
        finally:
            subprocess.run(
                ["nvidia-cuda-mps-control"],
                input=b"quit\n",
                env=environment,
                check=True,
                timeout=30,
            )


def run(part: Part, log: Path) -> str | None:
    """Run a part; gives what went wrong, if anything."""
    with contextlib.ExitStack() as stack:
        environment = dict(os.environ)
        if part.under_mps:
            environment |= stack.enter_context(mps_daemon())
        output = stack.enter_context(log.open("wb"))
        process = subprocess.Popen(
            [sys.executable, *part.arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A group of its own, so that what it started can be ended with it.
            start_new_session=True,
        )
        try:
            status = process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            return f"not done after {part.seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return f"exit status {status}" if status else None


def run_all(chosen: Sequence[Part], out: Path, seconds: float | None) -> int:
    """Run parts until `seconds` have passed; gives how many failed or were not begun."""
    start = time.monotonic()
    failed = 0
    for part in chosen:
        began = time.monotonic()
        if seconds is not None and began - start > seconds:
            print(f"{part.name}: not begun", flush=True)
            failed += 1
            continue
        log = out / f"{part.name}.log"
        wrong = run(part, log)
        print(f"{part.name}: {wrong or 'ok'}, {time.monotonic() - began:.0f} s", flush=True)
        if wrong is not None:
            failed += 1
            lines = log.read_text(errors="replace").splitlines()
            print(*(f"    {line}" for line in lines[-_LAST_LINES:]), sep="\n", flush=True)
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--out", type=Path, required=True, help="where logs and results go")
    parser.add_argument("--only", help="names of parts, such as tests,runtime,runtime-mps")
    parser.add_argument("--full", action="store_true", help="experiments without --quick: an hour")
    parser.add_argument("--seconds", type=float, help="begin no part after so many")
    options = parser.parse_args()
    # So that what is running is ended too when this is told to end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="store-") as store:
        known = parts(options.device, options.out.resolve(), store, full=options.full)
        names = [part.name for part in known]
        wanted = options.only.split(",") if options.only else names
        if unknown := set(wanted) - set(names):
            parser.error(f"no such part: {', '.join(sorted(unknown))}; known: {', '.join(names)}")
        chosen = [part for part in known if part.name in wanted]
        failed = run_all(chosen, options.out, options.seconds)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
