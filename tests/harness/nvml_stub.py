"""A libnvidia-ml.so.1 of the tests' own under the real nvidia-ml-py: GPUs that a test makes, loses, hangs and heals.

A program under test gets `environment`; `load` makes it this process's NVML as well, for good: nvidia-ml-py keeps the
library that it found first. The library is nvml/stub.c, compiled once per process of tests.
"""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from meshctl.sharing import Gpu
from tests.harness.tools import DEADLINE_S, require

SONAME = "libnvidia-ml.so.1"
_SOURCE = Path(__file__).parent / "nvml" / "stub.c"
_DIRECTORY = "MESHCTL_NVML_STUB"
MIB = 1 << 20


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """With the compiled library; gone when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="meshctl-nvml-")
    options = ["-shared", "-fPIC", "-nostdlib", f"-Wl,-soname,{SONAME}", "-o", f"{folder.name}/{SONAME}"]
    subprocess.run([require("cc"), *options, _SOURCE], check=True, timeout=DEADLINE_S)
    return folder


@functools.cache
def _loaded() -> ctypes.CDLL:
    return ctypes.CDLL(f"{_folder().name}/{SONAME}", mode=ctypes.RTLD_GLOBAL)


def v100(number: int) -> Gpu:
    """GPU-0000, GPU-0001, ..."""
    return Gpu(f"GPU-{number:04}", "Tesla V100-SXM2-16GB", 16384 * MIB, (7, 0), minor=number, index=number)


@dataclass(frozen=True, slots=True)
class _State:
    gpu: Gpu
    fault: str = "ok"

    def line(self) -> str:
        gpu = self.gpu
        minor = -1 if gpu.minor is None else gpu.minor
        capability = f"{gpu.compute_capability[0]} {gpu.compute_capability[1]}"
        mig = 1 if gpu.mig else -1
        return f"{gpu.uuid} {gpu.memory_bytes} {capability} {minor} {mig} {self.fault} {gpu.product}\n"


class NvmlStub:
    """The driver of one node. Its GPUs are changed at any time; whoever asks next sees it."""

    def __init__(self, directory: Path, gpus: Sequence[Gpu] = ()) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._states: dict[str, _State] = {}
        self.gpus(gpus)

    @property
    def environment(self) -> Mapping[str, str]:
        """What makes it a program's NVML; to be merged with the rest of the program's environment."""
        path = filter(None, (_folder().name, os.environ.get("LD_LIBRARY_PATH")))
        return {"LD_LIBRARY_PATH": ":".join(path), _DIRECTORY: str(self.directory)}

    def load(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make it the NVML of this process, until the next one is."""
        _loaded()
        monkeypatch.setenv(_DIRECTORY, str(self.directory))

    def gpus(self, gpus: Sequence[Gpu]) -> None:
        """There are these, and they are well."""
        self._states = {gpu.uuid: _State(gpu) for gpu in gpus}
        self._write()

    def xid(self, uuid: str, code: int) -> None:
        """The driver reports an error of the GPU."""
        with (self.directory / "xids").open("a") as file:
            file.write(f"{uuid} {code}\n")

    def fault(self, uuid: str, fault: str) -> None:
        """``hang``, ``no-events`` or the number of NVML's error; with ``@FUNCTION`` in that function only."""
        self._states[uuid] = replace(self._states[uuid], fault=fault)
        self._write()

    def lose(self, uuid: str) -> None:
        """The GPU falls off the bus."""
        self.fault(uuid, "15")

    def hang(self, uuid: str) -> None:
        """Calls for the GPU do not return until it is well again."""
        self.fault(uuid, "hang")

    def heal(self, uuid: str) -> None:
        self.fault(uuid, "ok")

    def refuse_init(self, error: int) -> None:
        """What nvmlInit returns; 0 when it works."""
        self._replace("init", f"{error}\n")

    def older(self) -> None:
        """It is a driver before 510."""
        self._replace("old", "")

    def compute_mode(self, uuid: str) -> int:
        """0 DEFAULT, 3 EXCLUSIVE_PROCESS."""
        path = self.directory / f"mode-{uuid}"
        return int(path.read_text()) if path.exists() else 0

    def processes(self, uuid: str, pids: Sequence[int], mps_clients: Sequence[int] = ()) -> None:
        """They compute on the GPU: those that NVML lists as such, and clients of an MPS server."""
        self._replace(f"pids-{uuid}", "".join(f"{pid}\n" for pid in pids))
        self._replace(f"mps-{uuid}", "".join(f"{pid}\n" for pid in mps_clients))

    def _write(self) -> None:
        self._replace("gpus", "".join(state.line() for state in self._states.values()))

    def _replace(self, name: str, text: str) -> None:
        new = self.directory / f".{name}.new"
        new.write_text(text)
        new.replace(self.directory / name)
