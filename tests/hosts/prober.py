"""Asks, on the client, who has the address of the cluster: by ARP, by a datagram, and by HTTP on request.

    prober.py ADDRESS EVERY_S [http]

Each line that it prints is a JSON array that begins with a word and a time (CLOCK_BOOTTIME, seconds):
``["tick", asked]``, ``["holder", asked, mac]``, ``["answer", received, host]``, ``["http", received, first line]``.
ARP is spoken on spy0 as 192.168.2.9, a host that does not exist: neither the client's table nor the tables of the nodes
learn anything from that, so a client that is left with an old entry shows.
"""

import asyncio
import contextlib
import json
import os
import socket
import struct
import sys
import time

_SPY = "spy0"
_SPY_ADDRESS = "192.168.2.9"
_UDP_PORT = 7000
_ETHERTYPE_ARP = 0x0806
_REQUEST, _REPLY = 1, 2
#: Ethernet header, then ARP for IPv4 over Ethernet (RFC 826).
_FRAME = struct.Struct("!6s6sH HHBBH 6s4s6s4s")
_PRIORITY = -10  # what it measures is not this machine's load
_HTTP_PATIENCE_S = 1.0
_SEQUENCE = struct.Struct("!I")


def _say(word: str, moment: float, *more: str) -> None:
    sys.stdout.write(json.dumps([word, round(moment, 4), *more]) + "\n")
    sys.stdout.flush()


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Prober:
    """One address, asked again and again."""

    def __init__(self, address: str, every_s: float, http: bool) -> None:
        self._address = address
        self._every_s = every_s
        self._http = http
        self._asked_at = 0.0
        self._requests: set[asyncio.Task[None]] = set()
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.setblocking(False)
        self._arp = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETHERTYPE_ARP))
        self._arp.bind((_SPY, _ETHERTYPE_ARP))
        self._arp.setblocking(False)
        mac, wanted = self._arp.getsockname()[4], socket.inet_aton(address)
        asker = socket.inet_aton(_SPY_ADDRESS)
        ethernet = b"\xff" * 6, mac, _ETHERTYPE_ARP
        self._question = _FRAME.pack(*ethernet, 1, 0x0800, 6, 4, _REQUEST, mac, asker, bytes(6), wanted)
        self._wanted = wanted

    async def run(self) -> None:
        """Until its standard input ends."""
        loop = asyncio.get_running_loop()
        loop.add_reader(sys.stdin, sys.exit)
        loop.add_reader(self._udp, self._udp_answer)
        loop.add_reader(self._arp, self._arp_answer)
        next_at = loop.time()
        number = 0
        while True:
            self._ask(number)
            number += 1
            next_at = max(next_at + self._every_s, loop.time())
            await asyncio.sleep(next_at - loop.time())

    def _ask(self, number: int) -> None:
        self._asked_at = _now()
        _say("tick", self._asked_at)
        with contextlib.suppress(OSError):  # its cable may be out, or nobody may have the address
            self._arp.send(self._question)
        with contextlib.suppress(OSError):
            self._udp.sendto(_SEQUENCE.pack(number), (self._address, _UDP_PORT))
        if self._http:
            task = asyncio.create_task(self._get())
            self._requests.add(task)
            task.add_done_callback(self._requests.discard)

    def _arp_answer(self) -> None:
        frame = self._arp.recv(2048)
        if len(frame) < _FRAME.size:
            return
        target, *_, operation, mac, address, _, _ = _FRAME.unpack(frame[: _FRAME.size])
        if operation == _REPLY and address == self._wanted and target == self._question[6:12]:
            _say("holder", self._asked_at, mac.hex(":"))

    def _udp_answer(self) -> None:
        with contextlib.suppress(OSError):
            _say("answer", _now(), self._udp.recv(64)[_SEQUENCE.size :].decode())

    async def _get(self) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_HTTP_PATIENCE_S):
                reader, writer = await asyncio.open_connection(self._address, 80)
                try:
                    writer.write(b"GET / HTTP/1.0\r\nHost: cluster\r\n\r\n")
                    head, _, body = (await reader.read(4096)).partition(b"\r\n\r\n")
                    if b" 200 " in head.partition(b"\r\n")[0]:
                        _say("http", _now(), body.decode(errors="replace").partition("\n")[0])
                finally:
                    writer.transport.abort()


def main() -> None:
    """The command line."""
    os.setpriority(os.PRIO_PROCESS, 0, _PRIORITY)
    address, every_s, *mode = sys.argv[1:]
    asyncio.run(Prober(address, float(every_s), "http" in mode).run())


if __name__ == "__main__":
    main()
