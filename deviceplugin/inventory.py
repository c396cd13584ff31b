"""Where the agent learns of the node's GPUs: NVML, or a file for nodes and tests without GPUs.

The file is a list, YAML or JSON:

    - {uuid: GPU-0001, product: Tesla-V100, memory: 16Gi, computeCapability: "7.0", minor: 0}

It is read again when it has changed; a GPU that is taken out of it has fallen off the bus, and comes back when it is
put in again. A change that can't be used is told in the log, and the GPUs stay those of the last good file: a slip of
the pen must not take the GPUs of running pods away. At the first reading it is an InputError instead.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import structlog
from kubernetes.utils.quantity import parse_quantity
from pydantic import AfterValidator, Field

from deviceplugin.nvml import NvmlInventory
from deviceplugin.ports import GpuLostError, Inventory, Xid
from meshctl.api.base import GpuProduct, Strict, validated, wrong
from meshctl.api.document import Document, Fault, ManifestError, Place, parse, read_bounded, short
from meshctl.api.gpu import QUANTITY
from meshctl.errors import InputError
from meshctl.sharing import LONGEST_DEVICE_ID, SEPARATOR, Gpu

log = structlog.get_logger(__name__)

FILE = "file:"
LONGEST_QUANTITY = 20
LONGEST_UUID = LONGEST_DEVICE_ID - len(f"{SEPARATOR}99")


def open_inventory(spec: str) -> Inventory:
    """``nvml`` or ``file:PATH``. Reads nothing yet: `gpus` does. Raises InputError for anything else."""
    if spec == "nvml":
        return NvmlInventory()
    if spec.startswith(FILE) and spec != FILE:
        return FileInventory(Path(spec.removeprefix(FILE)))
    raise InputError(f"the inventory {short(spec)} is unknown; write nvml, or {FILE}PATH of a list of GPUs")


def _bytes(text: str) -> int:
    return int(parse_quantity(text))  # type: ignore[no-untyped-call]  # kubernetes has no types


def _memory(text: str) -> str:
    # Not by trying: 1e1000000 is a quantity of Kubernetes, and takes a minute.
    if len(text) > LONGEST_QUANTITY or not re.fullmatch(QUANTITY, text) or _bytes(text) < 1:
        wrong(f"{short(text)} is not a GPU's memory; write 16Gi, for example")
    return text


class GpuEntry(Strict):
    """One GPU of an inventory file."""

    uuid: Annotated[str, Field(pattern=r"^[A-Za-z0-9]([-A-Za-z0-9]*[A-Za-z0-9])?$", max_length=LONGEST_UUID)]
    """In small letters it is the name of the GPU object, with ``::99`` a label's value."""
    product: GpuProduct
    memory: Annotated[str, AfterValidator(_memory)]
    compute_capability: Annotated[str, Field(pattern=r"^[0-9]{1,3}\.[0-9]{1,3}$")]
    minor: Annotated[int, Field(ge=0)] | None = None
    mig: bool = False

    def gpu(self, index: int) -> Gpu:
        major, _, minor = self.compute_capability.partition(".")
        capability = int(major), int(minor)
        return Gpu(self.uuid, self.product, _bytes(self.memory), capability, self.minor, index, self.mig)


def read_gpus(path: Path) -> tuple[Gpu, ...]:
    """The GPUs of an inventory file, in its order. Raises ManifestError with every fault and its line."""
    documents = parse(read_bounded(path), str(path))
    if len(documents) != 1 or not isinstance(documents[0].data, list):
        raise ManifestError((Fault(Place(str(path)), "", "must be one list of GPUs; write [] when there are none"),))
    entries, faults = _entries(documents[0])
    faults += _repeated(documents[0], entries, "uuid", lambda entry: entry.uuid.lower())
    faults += _repeated(documents[0], entries, "minor", lambda entry: entry.minor)
    if faults:
        raise ManifestError(tuple(faults))
    return tuple(entry.gpu(index) for index, entry in entries)


def _entries(document: Document) -> tuple[list[tuple[int, GpuEntry]], list[Fault]]:
    entries: list[tuple[int, GpuEntry]] = []
    faults: list[Fault] = []
    for index, data in enumerate(document.data):
        marks = {path[1:]: mark for path, mark in document.marks.items() if path[:1] == (index,)}
        try:
            entries.append((index, validated(GpuEntry, Document(data, document.file, marks))))
        except ManifestError as error:
            faults += (replace(fault, field=f"[{index}].{fault.field}".rstrip(".")) for fault in error.faults)
    return entries, faults


def _repeated(
    document: Document,
    entries: Sequence[tuple[int, GpuEntry]],
    field: str,
    key: Callable[[GpuEntry], str | int | None],
) -> Iterator[Fault]:
    first: dict[str | int, int] = {}
    for index, entry in entries:
        value = key(entry)
        if value is not None and first.setdefault(value, index) != index:
            said = short(getattr(entry, field))
            yield document.fault((index, field), f"{said} is that of [{first[value]}] too; each GPU has its own")


class FileInventory:
    """`Inventory` of a file. There are no XIDs, and nobody can say which processes compute."""

    driver = ""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] | None = None
        """Of the file that was read last, good or not."""
        self._gpus: tuple[Gpu, ...] | None = None

    async def gpus(self) -> tuple[Gpu, ...]:
        return await asyncio.to_thread(self._read)

    async def probe(self, uuid: str) -> None:
        if all(gpu.uuid != uuid for gpu in await self.gpus()):
            raise GpuLostError(f"{uuid}: it is not in {self._path} any more")

    async def next_xid(self) -> Xid:
        never: asyncio.Future[Xid] = asyncio.get_running_loop().create_future()
        return await never

    async def set_exclusive(self, uuid: str, exclusive: bool) -> None:
        """There is no driver to tell."""

    async def processes(self, uuid: str) -> tuple[int, ...] | None:
        return None

    async def close(self) -> None:
        pass

    def _read(self) -> tuple[Gpu, ...]:
        seen = _identity(self._path)
        if self._gpus is not None and seen == self._seen:
            return self._gpus
        try:
            self._gpus, self._seen = read_gpus(self._path), seen
        except ManifestError as error:
            if self._gpus is None:
                raise
            self._seen = seen
            log.warning("the inventory file cannot be used; the GPUs stay as they are", error=str(error))
        return self._gpus


def _identity(path: Path) -> tuple[int, ...]:
    """Differs when the file does; empty when there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
