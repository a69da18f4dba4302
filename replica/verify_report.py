"""How far a verification is, and how it ended. Pure: loop time in seconds comes in."""

from dataclasses import dataclass, field
from typing import Any


class Front:
    """How far work has come whose pieces begin in order and end in any: everything before `position` is done."""

    def __init__(self, start: int) -> None:
        self._reached = start
        self._under_way: dict[int, None] = {}

    def begin(self, start: int) -> None:
        """The piece that begins at `start` is under way."""
        self._under_way[start] = None

    def end(self, start: int, stop: int) -> None:
        """It is done, up to `stop`."""
        if start in self._under_way:
            del self._under_way[start]
            self._reached = max(self._reached, stop)

    @property
    def position(self) -> int:
        """Where to go on if the work ends now."""
        return min(self._under_way, default=self._reached)


@dataclass
class VerifyProgress:
    """A verification that runs, as either node sees it. Offsets and sizes in bytes."""

    number: int
    driver: str
    start: int
    stop: int
    repair: bool
    began_s: float
    found_bytes: int = 0
    repaired_bytes: int = 0
    repairing: bool = False
    front: Front = field(init=False)

    def __post_init__(self) -> None:
        self.front = Front(self.start)

    def document(self, now_s: float) -> dict[str, Any]:
        """For the status."""
        done = self.front.position - self.start
        elapsed_s = now_s - self.began_s
        rate = done / elapsed_s if done and elapsed_s > 0 else 0.0
        return {
            "number": self.number,
            "driver": self.driver,
            "from_bytes": self.start,
            "to_bytes": self.stop,
            "position_bytes": self.front.position,
            "done_percent": round(100.0 * done / (self.stop - self.start), 1),
            "rate_bytes_s": round(rate),
            "eta_seconds": round((self.stop - self.front.position) / rate, 1) if rate else None,
            "found_bytes": self.found_bytes,
            "repair": self.repair,
            "repaired_bytes": self.repaired_bytes,
        }


@dataclass(frozen=True)
class VerifyResult:
    """How the last one ended. `position`: everything before it was compared; `reason`: why that is not all, or ""."""

    number: int
    driver: str
    start: int
    stop: int
    position: int
    found_bytes: int
    repair: bool
    repaired_bytes: int
    complete: bool
    reason: str
    took_s: float
    ended_s: float

    def sentence(self) -> str:
        """For the log and for the hook."""
        if self.found_bytes:
            words = f"{self.found_bytes} bytes differ between the two copies"
            if self.repair:
                words += f", of which {self.repaired_bytes} bytes were repaired"
        else:
            words = "no difference was found"
        if self.complete:
            return f"verified {self.start} to {self.stop}: {words}."
        return (
            f"the verification of {self.start} to {self.stop} ended at {self.position}: {words}; {self.reason} "
            f"(go on with --from {self.position})."
        )

    def document(self, now_s: float) -> dict[str, Any]:
        """For the status."""
        return {
            "number": self.number,
            "driver": self.driver,
            "seconds_ago": round(now_s - self.ended_s, 1),
            "took_seconds": round(self.took_s, 1),
            "from_bytes": self.start,
            "to_bytes": self.stop,
            "position_bytes": self.position,
            "complete": self.complete,
            "reason": self.reason,
            "found_bytes": self.found_bytes,
            "repair": self.repair,
            "repaired_bytes": self.repaired_bytes,
        }


def ended(progress: VerifyProgress, now_s: float, reason: str) -> VerifyResult:
    """The result of a run that ends now; `reason`: why before its time, or ""."""
    return VerifyResult(
        number=progress.number,
        driver=progress.driver,
        start=progress.start,
        stop=progress.stop,
        position=progress.front.position,
        found_bytes=progress.found_bytes,
        repair=progress.repair,
        repaired_bytes=progress.repaired_bytes,
        complete=not reason,
        reason=reason,
        took_s=now_s - progress.began_s,
        ended_s=now_s,
    )
