"""A handshake that goes on and on, a byte at a time: the time for it runs from its beginning."""

import asyncio
from pathlib import Path

import uvloop

from nbdserver.limits import Limits
from nbdserver.server import Server


def test_bytes_that_drip_in_do_not_prolong_a_handshake(short_dir: Path) -> None:
    async def run() -> None:
        server = Server(limits=Limits(handshake_timeout_s=0.3))
        path = str(short_dir / "nbd")
        await server.listen_unix(path)
        reader, writer = await asyncio.open_unix_connection(path)
        await reader.readexactly(18)
        # An option of 64 KiB, which is in order: at this pace it would take a quarter of an hour.
        stream = b"\0\0\0\3IHAVEOPT\0\0\0\x4d\0\1\0\0" + bytes(64 * 1024)
        for at in range(len(stream)):
            try:
                writer.write(stream[at : at + 1])
                async with asyncio.timeout(0.015):  # the pace of the drip
                    assert await reader.read(1) == b""
            except TimeoutError:
                continue
            except ConnectionError:
                pass
            break
        assert at < 1000
        writer.close()
        await server.stop()

    uvloop.run(run())
