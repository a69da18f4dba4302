"""Messages of the kernel's NBD driver over generic netlink, as bytes (pure).

Sources: linux/netlink.h, linux/genetlink.h, linux/nbd-netlink.h; numbers are in the host's byte order.
"""

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from struct import Struct

FAMILY_NAME = "nbd"
FAMILY_VERSION = 1
MULTICAST_GROUP = "nbd_mc_group"

CONTROL_FAMILY = 0x10  # GENL_ID_CTRL
_CONTROL_VERSION = 2
_GET_FAMILY = 3

_ERROR = 2  # NLMSG_ERROR
_REQUEST = 1  # NLM_F_REQUEST
_ACK = 4  # NLM_F_ACK
_TYPE_MASK = 0x3FFF  # without NLA_F_NESTED and NLA_F_NET_BYTEORDER
_NESTED = 0x8000

_HEADER = Struct("=IHHII")  # length, type, flags, sequence, port
_GENERIC = Struct("=BBH")  # command, version, reserved
_ATTRIBUTE = Struct("=HH")  # length with this header, type
_U16 = Struct("=H")
_U32 = Struct("=I")
_U64 = Struct("=Q")
_S32 = Struct("=i")


class Cmd(IntEnum):
    """enum of NBD_CMD_…"""

    CONNECT = 1
    DISCONNECT = 2
    RECONFIGURE = 3
    LINK_DEAD = 4
    STATUS = 5


class Attr(IntEnum):
    """enum of NBD_ATTR_…"""

    INDEX = 1
    SIZE_BYTES = 2
    BLOCK_SIZE_BYTES = 3
    TIMEOUT = 4
    SERVER_FLAGS = 5
    CLIENT_FLAGS = 6
    SOCKETS = 7
    DEAD_CONN_TIMEOUT = 8
    DEVICE_LIST = 9
    BACKEND_IDENTIFIER = 10


_SOCKET_ITEM = _SOCKET_FD = 1
_FAMILY_ID, _FAMILY_NAME, _MULTICAST_GROUPS = 1, 2, 7
_GROUP_NAME, _GROUP_ID = 1, 2


@dataclass(frozen=True)
class Settings:
    """What CONNECT and RECONFIGURE may say of a device; None and empty: nothing. Times in whole seconds."""

    sockets: Sequence[int] = ()
    size_bytes: int | None = None
    block_size_bytes: int | None = None
    server_flags: int | None = None
    timeout_s: int | None = None
    dead_conn_timeout_s: int | None = None
    backend: str | None = None

    def packed(self) -> bytes:
        """As attributes."""
        numbers = (
            (Attr.SIZE_BYTES, self.size_bytes),
            (Attr.BLOCK_SIZE_BYTES, self.block_size_bytes),
            (Attr.TIMEOUT, self.timeout_s),
            (Attr.SERVER_FLAGS, self.server_flags),
            (Attr.DEAD_CONN_TIMEOUT, self.dead_conn_timeout_s),
        )
        parts = [_attribute(kind, _U64.pack(value)) for kind, value in numbers if value is not None]
        if self.sockets:
            items = (_nested(_SOCKET_ITEM, _attribute(_SOCKET_FD, _U32.pack(fd))) for fd in self.sockets)
            parts.append(_nested(Attr.SOCKETS, b"".join(items)))
        if self.backend is not None:
            parts.append(_attribute(Attr.BACKEND_IDENTIFIER, self.backend.encode() + b"\0"))
        return b"".join(parts)


@dataclass(frozen=True)
class Family:
    """The numbers that the kernel gave the family "nbd" and its multicast group."""

    number: int
    group: int


@dataclass(frozen=True)
class Message:
    """One received message: an acknowledgement or error (`error`: an errno, 0 for success), or one with attributes."""

    kind: int
    sequence: int
    error: int | None = None
    command: int = 0
    attributes: bytes = b""


def get_family(sequence: int) -> bytes:
    """The question for `family_of`."""
    return _message(
        CONTROL_FAMILY, _GET_FAMILY, _CONTROL_VERSION, sequence, _attribute(_FAMILY_NAME, FAMILY_NAME.encode() + b"\0")
    )


def device_command(family: Family, command: Cmd, sequence: int, index: int | None, settings: Settings) -> bytes:
    """A command for device `index` (None: any that is free, for CONNECT)."""
    attributes = b"" if index is None else _attribute(Attr.INDEX, _U32.pack(index))
    return _message(family.number, command, FAMILY_VERSION, sequence, attributes + settings.packed())


def parse(data: bytes) -> Iterator[Message]:
    """The messages of one datagram; ends at what is none."""
    position = 0
    while len(data) - position >= _HEADER.size:
        length, kind, _, sequence, _ = _HEADER.unpack_from(data, position)
        if not _HEADER.size <= length <= len(data) - position:
            return
        body = data[position + _HEADER.size : position + length]
        position += _aligned(length)
        if kind == _ERROR:
            if len(body) >= _S32.size:
                yield Message(kind, sequence, error=-_S32.unpack_from(body)[0])
        elif len(body) >= _GENERIC.size:
            command, _, _ = _GENERIC.unpack_from(body)
            yield Message(kind, sequence, command=command, attributes=body[_GENERIC.size :])


def family_of(message: Message) -> Family | None:
    """The answer to `get_family`; None when it lacks something."""
    found = dict(_attributes(message.attributes))
    groups = (dict(_attributes(group)) for _, group in _attributes(found.get(_MULTICAST_GROUPS, b"")))
    ids = [group.get(_GROUP_ID, b"") for group in groups if _text(group.get(_GROUP_NAME, b"")) == MULTICAST_GROUP]
    number = found.get(_FAMILY_ID, b"")
    if len(number) != _U16.size or not ids or len(ids[0]) != _U32.size:
        return None
    return Family(_U16.unpack(number)[0], _U32.unpack(ids[0])[0])


def index_of(message: Message) -> int | None:
    """The device that a message is about: the answer to CONNECT, LINK_DEAD."""
    data = dict(_attributes(message.attributes)).get(Attr.INDEX, b"")
    return _U32.unpack(data)[0] if len(data) == _U32.size else None


def error_text(number: int, device: str) -> str:
    """What an errno of CONNECT, RECONFIGURE or DISCONNECT means: one sentence."""
    if number == errno.EPERM:
        return f"attaching {device} is not permitted: run this as root"
    if number == errno.EBUSY:
        return f"{device} is in use already: choose another device, or detach it first (`nbd-client -d {device}`)"
    if number in (errno.ENOENT, errno.ENODEV):
        return f"there is no {device}: choose another one, or load more of them (`modprobe nbd nbds_max=…`)"
    if number == errno.EINVAL:
        return f"the kernel refuses this for {device}: it is not attached, or by another program; see dmesg"
    return f"the kernel cannot do this for {device} (errno {number}): see dmesg"


def _message(kind: int, command: int, version: int, sequence: int, attributes: bytes) -> bytes:
    body = _GENERIC.pack(command, version, 0) + attributes
    return _HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | _ACK, sequence, 0) + body


def _attribute(kind: int, data: bytes) -> bytes:
    length = _ATTRIBUTE.size + len(data)
    return _ATTRIBUTE.pack(length, kind) + data + bytes(_aligned(length) - length)


def _nested(kind: int, data: bytes) -> bytes:
    return _attribute(kind | _NESTED, data)


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    position = 0
    while len(data) - position >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data, position)
        if not _ATTRIBUTE.size <= length <= len(data) - position:
            return
        yield kind & _TYPE_MASK, data[position + _ATTRIBUTE.size : position + length]
        position += _aligned(length)


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")
