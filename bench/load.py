"""What clients do: loops over libnbd and runs of fio, at random offsets of a part of the volume."""

import importlib
import importlib.util
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.latency import Latencies

#: The part of the volume that is written to: bounds the memory that images in memory take.
SPAN_BYTES = 256 << 20
_FILL_BYTES = 1 << 20
_OFFSETS = 4096


def libnbd() -> Any | None:
    """libnbd's module, or None. Debian installs it for the system's Python; a virtual environment does not see that."""
    if importlib.util.find_spec("nbd") is None:
        sys.path.append("/usr/lib/python3/dist-packages")
    return importlib.import_module("nbd") if importlib.util.find_spec("nbd") is not None else None


@dataclass(frozen=True)
class Workload:
    """``kind`` is "write", "read", "fua" or "flush" (a write, then a flush); ``depth`` are under way at once."""

    kind: str
    length: int
    depth: int = 1
    span_bytes: int = SPAN_BYTES

    @property
    def name(self) -> str:
        """ "write 4 KiB, depth 16"."""
        size = f"{self.length >> 20} MiB" if self.length >= 1 << 20 else f"{self.length >> 10} KiB"
        verb = {"flush": "write+flush", "fua": "write with FUA"}.get(self.kind, self.kind)
        return f"{verb} {size}, depth {self.depth}"


@dataclass(frozen=True)
class Seen:
    """What a client saw: how many requests were answered, how many in a second, and how long each took."""

    requests: int
    rate: float
    latencies: Latencies


def offsets(length: int, seed: int = 1, span_bytes: int = SPAN_BYTES) -> list[int]:
    """Random multiples of ``length``; the same for every server, so that all do the same work."""
    rng = random.Random(seed)
    return [rng.randrange(span_bytes // length) * length for _ in range(_OFFSETS)]


class Client:
    """One libnbd connection and a place in the list of offsets."""

    def __init__(self, uri: str, workload: Workload) -> None:
        nbd = libnbd()
        assert nbd is not None
        self._handle = nbd.NBD()
        self._fua = nbd.CMD_FLAG_FUA
        self._handle.connect_uri(uri)
        self._workload = workload
        self._data = random.Random(2).randbytes(workload.length)
        self._buffers = [nbd.Buffer.from_bytearray(bytearray(self._data)) for _ in range(workload.depth)]
        self._offsets = offsets(workload.length, span_bytes=workload.span_bytes)
        self._next = 0

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.shutdown()

    def warm_up(self, span_bytes: int = SPAN_BYTES) -> None:
        """Write the whole span once: the first write to a place costs more (activity log, memory), later ones do not.

        It also leaves no holes, which some servers read faster than data.
        """
        data = random.Random(3).randbytes(_FILL_BYTES)
        for offset in range(0, span_bytes, _FILL_BYTES):
            self._handle.pwrite(data, offset)
        self._handle.flush()

    def one(self) -> None:
        """One request, or a write and a flush."""
        offset = self._offset()
        match self._workload.kind:
            case "write":
                self._handle.pwrite(self._data, offset)
            case "read":
                self._handle.pread(self._workload.length, offset)
            case "fua":
                self._handle.pwrite(self._data, offset, self._fua)
            case "flush":
                self._handle.pwrite(self._data, offset)
                self._handle.flush()

    def flush(self) -> None:
        """Everything answered so far is durable when this returns."""
        self._handle.flush()

    def many(self, count: int) -> None:
        """``count`` requests, always ``depth`` of them under way."""
        if self._workload.depth == 1:
            for _ in range(count):
                self.one()
            return
        handle, free, errors = self._handle, list(self._buffers), []
        start = handle.aio_pwrite if self._workload.kind == "write" else handle.aio_pread
        started = 0
        while started < count or len(free) < len(self._buffers):
            while free and started < count:
                buffer = free.pop()
                start(buffer, self._offset(), completion=_completion(buffer, free, errors))
                started += 1
            handle.poll(-1)
        if errors:
            raise OSError(errors[0], "a request failed")

    def watch(self, seconds: float) -> Seen:
        """One request after the other for about so many seconds, each of them timed."""
        latencies, done = Latencies(), 0
        began_ns = now_ns = time.perf_counter_ns()
        end_ns = began_ns + round(seconds * 1e9)
        while now_ns < end_ns:
            before_ns = now_ns
            self.one()
            now_ns = time.perf_counter_ns()
            latencies.add(now_ns - before_ns)
            done += 1
        return Seen(done, done / ((now_ns - began_ns) / 1e9), latencies)

    def _offset(self) -> int:
        self._next = (self._next + 1) % _OFFSETS
        return self._offsets[self._next]


def _completion(buffer: Any, free: list[Any], errors: list[int]) -> Any:
    def completed(error: int) -> int:
        if error:
            errors.append(error)
        free.append(buffer)
        return 1  # libnbd may forget the request

    return completed


def has_fio() -> bool:
    """Whether fio is there, with its NBD engine."""
    if shutil.which("fio") is None:
        return False
    engines = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=False).stdout
    return "nbd" in engines.split()


def fio(uris: Sequence[str], workload: Workload, seconds: float, *, most_bytes: int = 0) -> Seen:
    """What fio sees, on a connection to each of `uris`, with the workload's depth on each; a write and a flush in one
    it cannot time. With `most_bytes` it ends when so much was written, though the time is not over.
    """
    kind = {"write": "randwrite", "read": "randread"}[workload.kind]
    command: Sequence[str] = (
        *("fio", "--name=global", "--ioengine=nbd", f"--rw={kind}", f"--bs={workload.length}"),
        *(f"--iodepth={workload.depth}", f"--size={workload.span_bytes}", f"--runtime={round(seconds * 1e3)}ms"),
        f"--io_size={most_bytes}" if most_bytes else "--time_based",
        *("--randrepeat=1", "--norandommap", "--thread", "--group_reporting", "--output-format=json+"),
        *(word for number, uri in enumerate(uris) for word in (f"--name=job{number}", f"--uri={uri}")),
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=True)
    return read_fio(done.stdout, workload.kind)


def read_fio(output: str, kind: str) -> Seen:
    """Its report of one group of jobs, in the form json+ (which has the histogram of all latencies)."""
    report = json.loads(output[output.index("{") :])  # its first line is not JSON
    seen = report["jobs"][0][kind]
    return Seen(seen["total_ios"], seen["iops"], Latencies.from_bins(seen["clat_ns"]["bins"]))


def watch(uri: str, workload: Workload, seconds: float) -> Seen:
    """fio where it can do that, libnbd for a write and a flush."""
    if workload.kind != "flush":
        return fio([uri], workload, seconds)
    with Client(uri, workload) as client:
        return client.watch(seconds)
