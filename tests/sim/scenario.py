"""What a seed stands for: its own sizes, settings, mix of requests and rates of faults ("swarm testing")."""

import dataclasses
import functools
import random
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from replica import config as cfg
from replica.hooks import Event, HookSettings
from replica.split_brain import Policies
from tests.sim.disk import SECTOR, DiskFaults
from tests.sim.network import NetworkFaults
from tests.sim.policies import draw_parting_rate, draw_policies


@dataclasses.dataclass
class Scenario:
    """One seed's draw. Rates are per virtual second."""

    seed: int
    size_bytes: int
    #: How much larger a node's disk is than the volume.
    extra_bytes: dict[str, int]
    extent_shift: int
    al_slots: int
    protocol: str
    duration_s: float
    request_every_s: float
    depth: int
    longest_sectors: int
    locality: float
    overlap: bool
    most_extents: int
    mix: list[tuple[str, float]]
    fresh: bool
    split_brain: bool
    policies: dict[str, Policies]  # by node; in force where a split brain is accepted
    restart_s: float
    heal_s: float
    fault_rates: dict[str, float]
    verb_rates: dict[str, float]
    constants: dict[tuple[str, str], int | float]
    side: dict[str, Any]
    network: NetworkFaults
    disk: dict[str, tuple[DiskFaults, DiskFaults]]
    final_power_cut: bool
    rot: float
    #: How much larger both disks are than the volume, which can grow.
    room_bytes: int = 0
    #: On which node that is not empty; "": on neither.
    leftovers: str = ""
    #: How long hooks may take; 0: there are none.
    hook_timeout_s: float = 0.0

    def extents(self, first: int, count: int) -> range:
        """The extents that these sectors touch."""
        shift = self.extent_shift - 9
        return range(first >> shift, ((first + count - 1) >> shift) + 1)

    def policies_of(self, node: str) -> Policies:
        """What this node's configuration says."""
        return self.policies[node] if self.split_brain else Policies()

    def rng(self, name: str) -> random.Random:
        """A stream of its own for each part, so that one part's draws do not shift another's."""
        return random.Random(f"{self.seed}/{name}")

    def _split_brain_words(self) -> str:
        if not self.split_brain:
            return ""
        one, two = self.policies.values()
        return f", split brain accepted ({one}{'' if one == two else f'; node2: {two}'})"

    def summary(self) -> str:
        """One line for the trace."""
        rates = {**self.fault_rates, **self.verb_rates}
        bits = self.constants.get(("bitmap", "SECTOR_BITS"))
        return (
            f"{self.size_bytes >> 10} KiB, extents of {1 << self.extent_shift >> 10} KiB, {self.al_slots} slots, "
            f"protocol {self.protocol}, {self.duration_s:.1f} s"
            f"{self._split_brain_words()}{', new copies' if self.fresh else ''}"
            f"{''.join(f', {name} has {extra} bytes more' for name, extra in self.extra_bytes.items())}"
            f"{f', {self.room_bytes >> 10} KiB behind it' if self.room_bytes else ''}"
            f"{f', {bits} bits in a sector of the bitmap' if bits else ''}"
            f"{', hooks' if self.hook_timeout_s else ''}; "
            + ", ".join(f"{name} {rate:.2f}" for name, rate in rates.items() if rate)
        )


FAULTS = (
    "kill",
    "power",
    "kill_both",
    "power_both",
    "fuse_kill",
    "fuse_power",
    "cut",
    "half_cut",
    "reset",
    "slow",
    "stop",
    "power_other_soon",
    "kill_cut",
)
VERBS = (
    "promote",
    "demote",
    "takeover",
    "connect",
    "disconnect",
    "invalidate",
    "invalidate_remote",
    "outdate",
    "detach",
    "pause",
)


def draw(seed: int, bias: Callable[[Scenario, random.Random], None] | None = None) -> Scenario:
    """The scenario of a seed; `bias` makes some faults likelier (for planted bugs that need them)."""
    rng = random.Random(f"{seed}/scenario")
    extent_shift = rng.choice((12, 13, 14, 14, 15, 16))
    size_bytes = rng.choice((16, 24, 40, 64, 100)) << extent_shift
    size_bytes = max(min(size_bytes, 2 << 20), 64 << 10)
    if rng.random() < 0.3:
        size_bytes += SECTOR * rng.randint(1, 7)
    al_slots = rng.choice((1, 2, 3, 3, 4, 5, 7, 12))
    calm = rng.random() < 0.1
    activity = 0.0 if calm else rng.choice((0.5, 1.0, 2.0, 4.0))
    faults = {name: rng.choice((0.0, 0.0, 0.1, 0.3, 0.6)) * activity for name in FAULTS}
    verbs = {name: rng.choice((0.0, 0.0, 0.1, 0.3, 0.8)) * activity for name in VERBS}
    mix = {
        "write": 10.0,
        "read": 3.0,
        "flush": rng.choice((0.0, 0.3, 1.0, 3.0)),
        "fua": rng.choice((0.0, 0.5, 2.0)),
        "trim": rng.choice((0.0, 0.0, 0.5)),
        "zero": rng.choice((0.0, 0.3)),
    }
    total = sum(mix.values())
    longest = rng.choice((1, 8, 8, 24, 64))
    scenario = Scenario(
        seed=seed,
        size_bytes=size_bytes,
        extra_bytes={},
        extent_shift=extent_shift,
        al_slots=al_slots,
        protocol=rng.choice("CCCCCCCCCBA"),
        duration_s=rng.choice((1.0, 2.0, 2.0, 4.0)),
        request_every_s=rng.choice((0.002, 0.005, 0.01, 0.03)),
        depth=rng.choice((1, 4, 16, 64)),
        longest_sectors=longest,
        locality=rng.choice((0.0, 0.3, 0.8)),
        overlap=rng.random() < 0.2,
        most_extents=al_slots,
        mix=[(name, weight / total) for name, weight in mix.items()],
        fresh=rng.random() < 0.15,
        split_brain=rng.random() < 0.15,
        policies=draw_policies(seed),
        restart_s=rng.choice((0.02, 0.1, 0.3, 0.8)),
        heal_s=rng.choice((0.05, 0.2, 0.6, 1.5)),
        fault_rates=faults,
        verb_rates=verbs,
        constants=_constants(rng),
        side=_side(rng),
        network=NetworkFaults(
            latency_s=rng.choice((0.0001, 0.0005, 0.002, 0.01)),
            split=rng.choice((0.0, 0.1, 0.4)),
            socket_bytes=rng.choice((2 << 10, 8 << 10, 64 << 10, 1 << 20)),
        ),
        disk={name: (_disk(rng, calm), _disk(rng, calm)) for name in ("node1", "node2")},
        final_power_cut=rng.random() < 0.4,
        rot=rng.choice((0.0, 0.0, 0.2)),
    )
    scenario.constants |= _bitmap(scenario.rng("bitmap"))
    scenario.constants |= _pace(scenario.rng("pace"))
    scenario.side["al_extents"] = al_slots
    scenario.side["protocol"] = scenario.protocol
    sizes = scenario.rng("sizes")
    if not scenario.fresh and sizes.random() < 0.08:
        scenario.extra_bytes[sizes.choice(("node1", "node2"))] = sizes.choice((SECTOR, 4 << 10, 72 << 10, 1 << 20))
    hooks = scenario.rng("hooks")
    if hooks.random() < 0.25:
        scenario.hook_timeout_s = hooks.choice((0.05, 0.3, 1.0))
    memory = scenario.rng("memory")
    for data, _ in scenario.disk.values():
        data.flushes_at_once = memory.random() < 0.2
    _verification(scenario, scenario.rng("verify"))
    sizes = scenario.rng("resize")
    if sizes.random() < 0.15 and not scenario.extra_bytes:
        scenario.room_bytes = sizes.choice((4 << 10, 36 << 10, 64 << 10, 200 << 10))
        scenario.verb_rates["resize"] = sizes.choice((0.3, 1.0, 3.0))
        scenario.leftovers = sizes.choice(("", "node1", "node2"))
    if scenario.split_brain:
        scenario.verb_rates["part"] = draw_parting_rate(seed)
    if bias is not None:
        bias(scenario, rng)
    return scenario


def _constants(rng: random.Random) -> dict[tuple[str, str], int | float]:
    chunk = rng.choice((4 << 10, 8 << 10, 32 << 10))
    return {
        ("resync", "CHUNK_BYTES"): chunk,
        ("backpressure", "LEAST_BETWEEN_LOOKS"): 4 << 10,
        ("backpressure", "_ENOUGH_BYTES"): 512,
        ("resync", "WINDOW_BYTES"): chunk * rng.choice((1, 2, 8)),
        ("resync", "RUN_BYTES"): rng.choice((16 << 10, 64 << 10, 256 << 20)),
        ("resync", "MIN_HOLE_BYTES"): rng.choice((4 << 10, 16 << 10, 64 << 10)),
        ("resync", "CHECKPOINT_BYTES"): rng.choice((8 << 10, 32 << 10, 256 << 10)),
        ("link", "RECEIVE_BUFFER_BYTES"): 128 << 10,
        ("link", "RECEIVE_BYTES"): rng.choice((1 << 10, 8 << 10, 64 << 10)),
        ("connector", "DIAL_TIMEOUT_S"): 1.0,
        ("session", "HANDSHAKE_TIMEOUT_S"): 5.0,
        ("verbs", "REQUEST_TIMEOUT_S"): 3.0,
    }


def _verification(scenario: Scenario, rng: random.Random) -> None:
    """In some seeds the copies are verified now and then, and when all is over."""
    scenario.verb_rates["verify"] = rng.choice((0.0, 0.0, 0.5, 2.0, 6.0))
    chunk = rng.choice((4 << 10, 8 << 10, 32 << 10))
    scenario.constants |= {
        ("verify_walk", "CHUNK_BYTES"): chunk,
        ("verify_walk", "WINDOW_BYTES"): chunk * rng.choice((1, 2, 8)),
        ("verify_walk", "MIN_HOLE_BYTES"): rng.choice((4 << 10, 16 << 10)),
        ("verify_walk", "MAX_HOLE_BYTES"): rng.choice((16 << 10, 256 << 10)),
        ("verify_walk", "ANSWER_TIMEOUT_S"): 5.0,
        ("verify", "REQUEST_TIMEOUT_S"): 3.0,
        ("verify", "REPAIR_BYTES"): chunk * 2,
        ("verify", "REPAIR_PIECE_BYTES"): chunk,
    }
    scenario.side["verify_rate_bytes_s"] = rng.choice((None, None, 256 << 10, 4 << 20))


def _bitmap(rng: random.Random) -> dict[tuple[str, str], int | float]:
    """In some seeds a sector of the bitmap has so few bits that a small volume needs many."""
    if rng.random() < 0.7:
        return {}
    bits = rng.choice((1, 5, 8, 24, 60))
    return {("bitmap", "SECTOR_BITS"): bits, ("bitmap", "_FULL"): (1 << bits) - 1}


def _pace(rng: random.Random) -> dict[tuple[str, str], int | float]:
    """What a resync asks about before it sends, and how soon clients count as gone."""
    return {
        ("sync_hash", "LEAST_BLOCKS"): rng.choice((1, 1, 2, 4, 1 << 30)),
        ("sync_hash", "WORTH_SHARE"): rng.choice((0.0, 0.25, 0.25, 0.9)),
        ("sync_hash", "SAMPLE_EVERY"): rng.choice((2, 16)),
        ("sync_rate", "CLIENTS_GONE_S"): rng.choice((0.01, 0.1, 3.0)),
        ("sync_rate", "PIECE_BYTES"): rng.choice((4 << 10, 8 << 10)),
    }


def _side(rng: random.Random) -> dict[str, Any]:
    return {
        "data_integrity": rng.random() < 0.2,
        "timeout_s": rng.choice((0.2, 0.5, 1.0)),
        "ping_interval_s": rng.choice((0.1, 0.3)),
        "connect_interval_s": rng.choice((0.05, 0.2)),
        "settle_interval_s": rng.choice((0.02, 0.1, 0.5, 5.0)),
        "settle_bytes": rng.choice((4 << 10, 64 << 10, 1 << 20)),
        "resync_rate_bytes_s": rng.choice((None, None, None, 256 << 10, 4 << 20)),
        "on_io_error": rng.choice(("detach", "detach", "pass-on")),
    }


def _disk(rng: random.Random, calm: bool) -> DiskFaults:
    bad = 0.0 if calm or rng.random() < 0.8 else 1.0
    return DiskFaults(
        write_s=rng.choice((0.00005, 0.0005, 0.002)),
        read_s=rng.choice((0.00005, 0.0005, 0.002)),
        flush_s=rng.choice((0.0005, 0.003, 0.01, 0.03)),
        uncached_read=rng.choice((0.0, 0.1, 0.5)),
        write_back=rng.choice((0.0, 0.05, 0.3)),
        read_error=bad * rng.choice((0.0, 0.002)),
        write_error=bad * rng.choice((0.0, 0.001)),
        flush_error=bad * rng.choice((0.0, 0.01)),
        full_cache=rng.choice((0.0, 0.0, 0.1, 0.7)),
    )


# ── what a scenario needs of the node's modules ──────────────────────────────────────────────────────────────


@functools.lru_cache(maxsize=1)
def _node_modules(_loaded: int) -> list[Any]:
    """The node's modules among the loaded ones; looked for anew when there are more."""
    return [module for name, module in sorted(sys.modules.items()) if name.startswith("replica.")]


@contextmanager
def patched(scenario: Scenario) -> Iterator[None]:
    """The node's constants as this seed has them; the extent size in every module that has taken it over."""
    changes: list[tuple[Any, str, Any]] = []

    def put(module: Any, name: str, value: Any) -> None:
        changes.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    try:
        for module in _node_modules(len(sys.modules)):
            if "EXTENT_SHIFT" in vars(module):
                put(module, "EXTENT_SHIFT", scenario.extent_shift)
            if "EXTENT_SIZE" in vars(module):
                put(module, "EXTENT_SIZE", 1 << scenario.extent_shift)
        for (name, constant), value in scenario.constants.items():
            put(sys.modules[f"replica.{name}"], constant, value)
        yield
    finally:
        for module, name, value in reversed(changes):
            setattr(module, name, value)


_TOML = """
[cluster]
name = "sim"
secret-file = "cluster.key"
state-dir = "state"
run-dir = "run"
[node.node1]
address = "192.0.2.1"
[node.node2]
address = "192.0.2.2"
[resource.r0]
port = 7789
nbd = "127.0.0.1:10809"
backing = "r0.img"
"""


@functools.cache
def _base_config(node: str) -> cfg.Config:
    with tempfile.TemporaryDirectory(prefix="rp-sim-") as folder:
        key = Path(folder, "cluster.key")
        key.touch(mode=0o600)
        key.write_text("0123456789abcdef" * 4)
        file = Path(folder, "replica.toml")
        file.write_text(_TOML)
        config = cfg.load_config(file, node)
    # The folder's random name must not get into anything.
    cluster = dataclasses.replace(config.cluster, state_dir=Path("/sim/state"), run_dir=Path("/sim/run"))
    return dataclasses.replace(config, path=Path("/sim/replica.toml"), cluster=cluster)


def configuration(scenario: Scenario, node: str) -> cfg.Config:
    """The configuration file as this node reads it, with the settings of the scenario."""
    config = _base_config(node)
    side = {**scenario.side, "after_split_brain": scenario.policies_of(node)}
    timeout_s = scenario.hook_timeout_s
    hooks = HookSettings(timeout_s, {event: ("/sim/hook",) for event in Event}) if timeout_s else HookSettings()
    resources = {
        name: dataclasses.replace(
            resource,
            local=dataclasses.replace(resource.local, backing=Path("/sim/r0.img"), **side),
            peer=dataclasses.replace(resource.peer, backing=Path("/sim/r0.img"), **side),
            hooks=hooks,
        )
        for name, resource in config.resources.items()
    }
    return dataclasses.replace(config, resources=resources)
