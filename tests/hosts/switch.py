"""The switches of a lab: bridges without an uplink, in a network namespace of their own, and what they lose.

Cables are veth pairs. What a switch drops is a list of nftables rules for the bridge family: netem is not in every
kernel. A rule is an expression of nft that names ports, as `Ports` has them: ``iifname "node1.0" … drop``.
"""

import re
import threading
from collections.abc import Iterable, Sequence

from tests.hosts.namespace import LabError, Namespace, run


class Switch:
    """All networks of a lab. Ports are called HOST.NUMBER, the number is that of the network."""

    def __init__(self, ground: Namespace, networks: int) -> None:
        self._ground = ground
        self._drops: list[str] = []
        self._lock = threading.Lock()
        for number in range(networks):
            bridge = f"br{number}"
            options = ("stp_state", "0", "forward_delay", "0", "mcast_snooping", "0")
            self._ip("link", "add", bridge, "type", "bridge", *options)
            self._ip("link", "set", bridge, "up")
        self._nft("add chain bridge lab forward { type filter hook forward priority 0; }")

    # ── cables ───────────────────────────────────────────────────────────────────────────────────────────────

    def connect(self, port: str, bridge: int, pid: int, interface: str, mac: str) -> None:
        """Lay a cable from a new port to a new interface in the network namespace of process `pid`."""
        self._ip(*("link", "add", port, "type", "veth", "peer", "name", interface, "address", mac, "netns", str(pid)))
        self._ip("link", "set", port, "master", f"br{bridge}", "up")

    def pull(self, *ports: str) -> None:
        """Take the cables out: the other ends lose their carrier."""
        for port in ports:
            self._ip("link", "set", port, "down")

    def plug(self, *ports: str) -> None:
        """Put them in again."""
        for port in ports:
            self._ip("link", "set", port, "up")

    def remove(self, *ports: str) -> None:
        """The ports are no more. They go with the other end's namespace, too."""
        for port in ports:
            try:
                self._ip("link", "del", port)
            except LabError as error:
                if not any(words in str(error) for words in ("Cannot find device", "No such device")):
                    raise

    # ── losses ───────────────────────────────────────────────────────────────────────────────────────────────

    def drop(self, *rules: str) -> None:
        """Drop what matches one of these; `pass_on` with the same texts undoes it."""
        with self._lock:
            self._drops += rules
            self._apply()

    def pass_on(self, *rules: str) -> None:
        """Undo `drop`."""
        with self._lock:
            for rule in rules:
                self._drops.remove(rule)
            self._apply()

    def frames_dropped(self) -> int:
        """How many were, since the last change of what is dropped."""
        listed = run([*self._ground.enter("-n"), "nft", "list", "chain", "bridge", "lab", "forward"])
        return sum(map(int, re.findall(r"counter packets (\d+) bytes \d+ drop", listed)))

    def _apply(self) -> None:
        self._nft(
            "flush chain bridge lab forward",
            *(f"add rule bridge lab forward {rule} counter drop" for rule in self._drops),
        )

    def _nft(self, *lines: str) -> None:
        run([*self._ground.enter("-n"), "nft", "-f", "-"], "\n".join(["add table bridge lab", *lines, ""]))

    def _ip(self, *arguments: str) -> None:
        run([*self._ground.enter("-n"), "ip", *arguments])


def between(source: str, target: str, match: str = "") -> str:
    """Frames from one port to another; `match` narrows it down: "udp dport 694"."""
    return f'iifname "{source}" oifname "{target}" {match}'.strip()


def all_of(ports: Iterable[str]) -> Sequence[str]:
    """All frames from and to these ports."""
    return [f'{way}ifname "{port}"' for port in ports for way in "io"]


def some(percent: int) -> str:
    """So many of a hundred frames, at random: the end of a `match`."""
    return f"numgen random mod 100 < {percent}"
