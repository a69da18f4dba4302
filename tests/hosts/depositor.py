"""The customer of a web server that keeps what it is sent: runs on the client, and stores numbered documents.

    depositor.py store ADDRESS EVERY_S     document after document, until its standard input ends
    depositor.py check ADDRESS FIRST LAST  reads them again; prints those that are missing or wrong

Each line that `store` prints is a JSON array: ``[received, number, host]``, for a document that the server says is on
the disk, with the time (CLOCK_BOOTTIME, seconds). What is not answered is sent again until it is.
"""

import asyncio
import hashlib
import json
import sys
import time

_BYTES = 4000
_PATIENCE_S = 1.0


def _document(number: int) -> bytes:
    """It tells which one it is, from the first to the last byte."""
    return hashlib.shake_256(str(number).encode()).hexdigest(_BYTES).encode()


async def _ask(address: str, request: str, body: bytes = b"") -> bytes | None:
    """The body of the answer; None when there is none, or when it says that something went wrong."""
    try:
        async with asyncio.timeout(_PATIENCE_S):
            reader, writer = await asyncio.open_connection(address, 80)
            try:
                head = f"{request} HTTP/1.0\r\nHost: cluster\r\nContent-Length: {len(body)}\r\n\r\n"
                writer.write(head.encode() + body)
                answer_head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
                return answer if b" 200 " in answer_head.partition(b"\r\n")[0] else None
            finally:
                writer.transport.abort()
    except (OSError, TimeoutError):
        return None


async def _store(address: str, every_s: float) -> None:
    loop = asyncio.get_running_loop()
    loop.add_reader(sys.stdin, sys.exit)
    number = 0
    while True:
        host = await _ask(address, f"POST /cgi-bin/store?{number}", _document(number))
        if host:
            received = time.clock_gettime(time.CLOCK_BOOTTIME)
            print(json.dumps([round(received, 4), number, host.decode().strip()]), flush=True)
            number += 1
        await asyncio.sleep(every_s)


async def _check(address: str, numbers: range) -> None:
    for number in numbers:
        if await _ask(address, f"GET /documents/{number}") != _document(number):
            print(number)


def main() -> None:
    """The command line."""
    match sys.argv[1:]:
        case ["store", address, every_s]:
            asyncio.run(_store(address, float(every_s)))
        case ["check", address, first, last]:
            asyncio.run(_check(address, range(int(first), int(last) + 1)))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
