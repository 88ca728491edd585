"""Compiles the modules that a message passes through, where BLOCKFLOW_COMPILE=1 asks for it.

    pip install 'mypy>=2.4' 'setuptools>=77' 'msgspec>=0.19'
    BLOCKFLOW_COMPILE=1 pip install --no-build-isolation .

mypyc makes an extension module of each, from the same source that runs without it: see
docs/adr/0023-the-hot-path-can-be-compiled.md. Without the variable everything stays Python.
"""

import os

from setuptools import setup

_COMPILED = [
    "src/tensormq/cuda.py",
    "src/tensormq/host.py",
    "src/tensormq/lane.py",
    "src/tensormq/loop.py",
    "src/tensormq/pool.py",
    "src/tensormq/pull.py",
    "src/tensormq/push.py",
    "src/tensormq/ring.py",
    "src/tensormq/statistics.py",
    "src/blockflow/batching.py",
    "src/blockflow/block.py",
    "src/blockflow/counting.py",
    "src/blockflow/launches.py",
    "src/blockflow/ledger.py",
    "src/blockflow/runner.py",
    "src/blockflow/runtime.py",
    "src/blockflow/ways.py",
]


def _modules():
    if os.environ.get("BLOCKFLOW_COMPILE") != "1":
        return []
    from mypyc.build import mypycify  # noqa: PLC0415

    return mypycify(["--config-file=mypyc.ini", *_COMPILED], opt_level="2", debug_level="0")


setup(ext_modules=_modules())
