"""The agent of kind "map", against a kernel without network block devices and a replicad-map by the script."""

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from replica.errors import ReplicaError
from replica.heartbeat.agents.base import AgentError, Start, Surroundings
from replica.heartbeat.agents.mapped import KINDS, MapAgent
from replica.heartbeat.node_state import Readiness
from replica.heartbeat.settings import Auth, AuthMethod, HeartbeatSettings, ResourceSettings
from tests.processes import PATIENCE_S
from tests.unit.scripted_daemon import running

START = Start(peer_is_dead=False)


class Bench:
    """An agent, and when it has had news."""

    def __init__(self, config: Path, device: str = "") -> None:
        (kind,) = KINDS
        options = {"map": "r0", "device": device}
        settings = HeartbeatSettings(
            "test",
            "node1",
            "node2",
            Auth(AuthMethod.CRC, b""),
            (),
            (),
            config.parent / "state",
            config.parent / "run",
            config_path=config,
        )
        self.news = asyncio.Event()
        self.agent = MapAgent(
            ResourceSettings("map", kind.title(options), options, "test:1"), Surroundings(settings, self.news.set)
        )


def run(work: Coroutine[Any, Any, None]) -> None:
    """In an event loop of its own."""
    asyncio.run(asyncio.wait_for(work, PATIENCE_S))


@pytest.mark.parametrize("device", ["/dev/sda", "nbd0", "", 7])
def test_only_network_block_devices_are_named(device: object) -> None:
    with pytest.raises(ValueError, match=r"no network block device|non-empty"):
        KINDS[0].options["device"].parse(device)


@pytest.mark.root
def test_a_kernel_without_network_block_devices(make_config: Callable[..., Path]) -> None:
    if Path("/sys/block/nbd0").exists():
        pytest.skip("this kernel has network block devices")

    async def work() -> None:
        bench = Bench(make_config())
        while "load its module" not in bench.agent.ready().why:
            await bench.news.wait()
            bench.news.clear()
        assert bench.agent.ready().readiness is Readiness.NO
        assert 'mount `device = "nbd:NAME"`' in bench.agent.ready().why
        assert not await bench.agent.active()
        with pytest.raises(AgentError, match="modprobe nbd"):
            await bench.agent.start(START)
        with pytest.raises(AgentError, match="replicad-map has ended"):
            await bench.agent.monitor()
        await bench.agent.stop()
        await bench.agent.close()

    run(work())


def test_a_device_that_is_there_is_used(make_config: Callable[..., Path], short_dir: Path) -> None:
    with running(short_dir / "run/map/r0.sock") as daemon:

        async def work() -> None:
            daemon.answers["status"] = {"device": "/dev/nbd3", "ready": True, "state": "attached"}
            bench = Bench(make_config(), "/dev/nbd3")
            await bench.agent.start(START)
            await bench.agent.monitor()
            assert await bench.agent.active()
            with pytest.raises(AgentError, match="is /dev/nbd3 already, and not /dev/nbd0"):
                await Bench(make_config(), "/dev/nbd0").agent.start(START)
            daemon.answers["status"] = {"device": "", "ready": False, "state": "searching", "last_error": "no Primary"}
            with pytest.raises(AgentError, match=r"is not attached \(no Primary\)"):
                await bench.agent.monitor()
            await bench.agent.stop()
            assert daemon.requests[-1] == ("unmap", {})
            daemon.answers["unmap"] = ReplicaError("/dev/nbd3 is in use: unmount it first")
            with pytest.raises(AgentError, match="unmount it first"):
                await bench.agent.stop()

        run(work())


def test_a_resource_that_is_not_configured(make_config: Callable[..., Path]) -> None:
    async def work() -> None:
        bench = Bench(make_config("r7"))
        for call in (bench.agent.start(START), bench.agent.stop(), bench.agent.monitor(), bench.agent.active()):
            with pytest.raises(AgentError, match=r"cannot be found: .*no \[resource.r0\]"):
                await call

    run(work())
