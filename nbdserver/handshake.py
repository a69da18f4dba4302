"""The fixed newstyle handshake as a state machine without I/O: bytes in, bytes and an outcome out.

Source: NetworkBlockDevice/nbd, doc/proto.md, "Newstyle negotiation" and "Option types".
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from nbdserver import constants as c
from nbdserver import meta_context
from nbdserver.client_identity import ClientIdentity
from nbdserver.export import Export
from nbdserver.handshake_coding import (
    CLIENT_FLAGS,
    EXPORT_NAME_REPLY,
    INFO_BLOCK_SIZE,
    INFO_EXPORT,
    OPTION,
    OPTION_REPLY,
    SERVER_GREETING,
    U16,
    U32,
)
from nbdserver.transmission import Dialect

_KNOWN_CLIENT_FLAGS = c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES

GREETING = SERVER_GREETING.pack(c.INIT_MAGIC, c.OPTION_MAGIC, _KNOWN_CLIENT_FLAGS)


class Directory(Protocol):
    """Where the handshake looks exports up."""

    @property
    def shutting_down(self) -> bool: ...
    def find(self, name: str) -> Export | None: ...
    def listing(self) -> Iterable[Export]: ...


class TlsMode(StrEnum):
    """Whether clients may, or have to, speak TLS (doc/proto.md, "TLS support")."""

    OFF = "off"
    ALLOW = "allow"
    REQUIRE = "require"


@dataclass(frozen=True)
class Opened:
    """The client chose this export: what follows is the transmission phase."""

    export: Export
    dialect: Dialect


@dataclass
class Negotiated:
    """What options have negotiated so far. STARTTLS forgets it: all of it is here, to be replaced by a new one."""

    structured_replies: bool = False
    allocation_of: Export | None = None  # the export for which `base:allocation` was selected last

    def dialect(self, export: Export) -> Dialect:
        """What holds for this export; contexts that were selected for another one are dropped."""
        return Dialect(self.structured_replies, self.structured_replies and self.allocation_of is export)


@dataclass(frozen=True)
class Ended:
    """The connection has to be closed after sending what is left. `reason` is for the log."""

    reason: str


@dataclass(frozen=True)
class StartTls:
    """After sending what is left, TLS begins, and inside of it what `Handshake.secured` returns."""


Outcome = Opened | Ended | StartTls


class _OptionError(Exception):
    """An option is answered with this error; haggling goes on."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


class Handshake:
    """Feed it what the client sends after `GREETING`, send what it returns, until `outcome` is set.

    Bytes behind the end of the handshake are left in `rest`.
    """

    def __init__(self, directory: Directory, tls: TlsMode = TlsMode.OFF) -> None:
        self.outcome: Outcome | None = None
        #: A claim that waits for `claimed`; nothing more is taken from the input meanwhile.
        self.claim: ClientIdentity | None = None
        self._directory = directory
        self._tls = tls
        self._is_secured = False
        self._input = bytearray()
        self._output: list[bytes] = []
        self._have_client_flags = False
        self._no_zeroes = False
        self._options_seen = 0
        self._negotiated = Negotiated()
        # An option that is not in this table is drained and answered with ERR_UNSUP.
        self._handlers: dict[int, Callable[[bytes], None]] = {
            c.OPT_EXPORT_NAME: self._on_export_name,
            c.OPT_ABORT: self._on_abort,
            c.OPT_LIST: self._on_list,
            c.OPT_INFO: self._on_info,
            c.OPT_GO: self._on_go,
            c.OPT_STRUCTURED_REPLY: self._on_structured_reply,
            c.OPT_LIST_META_CONTEXT: self._on_list_meta_context,
            c.OPT_SET_META_CONTEXT: self._on_set_meta_context,
            c.OPT_CLAIM: self._on_claim,
        }
        if tls is not TlsMode.OFF:
            self._handlers[c.OPT_STARTTLS] = self._on_starttls

    @property
    def rest(self) -> bytes:
        return bytes(self._input)

    def secured(self) -> "Handshake":
        """What goes on inside TLS: a new handshake, so that nothing is left of what was negotiated in plain."""
        inside = Handshake(self._directory, self._tls)
        inside._is_secured = True
        # The client does not send its flags again.
        inside._have_client_flags, inside._no_zeroes = self._have_client_flags, self._no_zeroes
        inside._options_seen = self._options_seen
        return inside

    def feed(self, data: bytes | memoryview) -> bytes:
        """Take what was received, in whatever pieces, and return what has to be sent."""
        self._input += data
        while self.outcome is None and self.claim is None and self._step():
            pass
        output = b"".join(self._output)
        self._output.clear()
        return output

    def _step(self) -> bool:
        if not self._have_client_flags:
            if len(self._input) < CLIENT_FLAGS.size:
                return False
            (flags,) = CLIENT_FLAGS.unpack(self._take(CLIENT_FLAGS.size))
            self._on_client_flags(flags)
            return True
        if len(self._input) < OPTION.size:
            return False
        magic, option, length = OPTION.unpack_from(self._input)
        if magic != c.OPTION_MAGIC:
            self.outcome = Ended("it sent something that is not an NBD option")
            return False
        if length > c.MAX_OPTION_BYTES:
            self.outcome = Ended(f"it sent an option of {length} bytes (at most {c.MAX_OPTION_BYTES})")
            return False
        if len(self._input) < OPTION.size + length:
            return False
        self._take(OPTION.size)
        self._on_option(option, self._take(length))
        return True

    def _take(self, length: int) -> bytes:
        data = bytes(self._input[:length])
        del self._input[:length]
        return data

    def _on_client_flags(self, flags: int) -> None:
        if flags & ~_KNOWN_CLIENT_FLAGS:
            self.outcome = Ended(f"it sent unknown client flags {flags:#x}")
            return
        self._have_client_flags = True
        self._no_zeroes = bool(flags & c.FLAG_NO_ZEROES)

    def _on_option(self, option: int, data: bytes) -> None:
        self._options_seen += 1
        if self._options_seen > c.MAX_OPTIONS:
            self.outcome = Ended(f"it sent more than {c.MAX_OPTIONS} options")
            return
        handler = self._handlers.get(option)
        try:
            if self._needs_tls and option not in (c.OPT_ABORT, c.OPT_STARTTLS):
                raise _OptionError(c.REP_ERR_TLS_REQD, "this server serves only clients that use TLS")
            if self._directory.shutting_down and option not in (c.OPT_ABORT, c.OPT_EXPORT_NAME):
                raise _OptionError(c.REP_ERR_SHUTDOWN, "the server is shutting down")
            if handler is None:
                raise _OptionError(c.REP_ERR_UNSUP, f"option {option} is not supported")
            handler(data)
        except _OptionError as error:
            if option == c.OPT_EXPORT_NAME:  # this option has no reply that could carry an error
                self.outcome = Ended(error.text)
            else:
                self._reply(option, error.code, _cut(error.text))

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self._output.append(OPTION_REPLY.pack(c.OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    def _on_export_name(self, data: bytes) -> None:
        if self._directory.shutting_down:
            raise _OptionError(c.REP_ERR_SHUTDOWN, "the server is shutting down")
        export = self._open(_name(data))
        self._output.append(EXPORT_NAME_REPLY.pack(export.size_bytes, self._flags(export)))
        if not self._no_zeroes:
            self._output.append(bytes(124))
        self.outcome = Opened(export, self._negotiated.dialect(export))

    def _on_abort(self, data: bytes) -> None:
        _no_data("ABORT", data)
        self._reply(c.OPT_ABORT, c.REP_ACK)
        self.outcome = Ended("it ended the handshake")

    @property
    def _needs_tls(self) -> bool:
        return self._tls is TlsMode.REQUIRE and not self._is_secured

    def _on_starttls(self, data: bytes) -> None:
        _no_data("STARTTLS", data)
        if self._is_secured:
            raise _OptionError(c.REP_ERR_INVALID, "this connection uses TLS already")
        if self._input:
            # Whoever sits in between could have put it there, to be taken for what comes from inside TLS.
            self.outcome = Ended("it sent something behind STARTTLS before that was answered")
            return
        self._reply(c.OPT_STARTTLS, c.REP_ACK)
        self.outcome = StartTls()

    def _on_list(self, data: bytes) -> None:
        _no_data("LIST", data)
        for export in self._directory.listing():
            name = export.name.encode()
            self._reply(c.OPT_LIST, c.REP_SERVER, U32.pack(len(name)) + name + _cut(export.description))
        self._reply(c.OPT_LIST, c.REP_ACK)

    def _on_info(self, data: bytes) -> None:
        self._describe(c.OPT_INFO, data)

    def _on_go(self, data: bytes) -> None:
        export = self._describe(c.OPT_GO, data)
        self.outcome = Opened(export, self._negotiated.dialect(export))

    def _on_claim(self, data: bytes) -> None:
        try:
            self.claim = ClientIdentity.unpack(data)
        except ValueError as error:
            raise _OptionError(c.REP_ERR_INVALID, str(error)) from None

    def claimed(self, refusal: str | None) -> bytes:
        """The claim was granted, or refused with this sentence; goes on, and returns what has to be sent."""
        self.claim = None
        if refusal is None:
            self._reply(c.OPT_CLAIM, c.REP_ACK)
        else:
            self._reply(c.OPT_CLAIM, c.REP_ERR_POLICY, _cut(refusal))
        return self.feed(b"")

    def _describe(self, option: int, data: bytes) -> Export:
        name, wanted = _parse_info(data)
        export = self._open(name)
        self._reply(option, c.REP_INFO, INFO_EXPORT.pack(c.INFO_EXPORT, export.size_bytes, self._flags(export)))
        for info in wanted:  # an unknown one is ignored, as the protocol wants it
            if info == c.INFO_NAME:
                self._reply(option, c.REP_INFO, U16.pack(info) + export.name.encode())
            elif info == c.INFO_DESCRIPTION:
                self._reply(option, c.REP_INFO, U16.pack(info) + _cut(export.description))
            elif info == c.INFO_BLOCK_SIZE:
                sizes = (c.MIN_BLOCK_BYTES, c.PREFERRED_BLOCK_BYTES, c.MAX_BLOCK_BYTES)
                self._reply(option, c.REP_INFO, INFO_BLOCK_SIZE.pack(info, *sizes))
        self._reply(option, c.REP_ACK)
        return export

    def _flags(self, export: Export) -> int:
        return transmission_flags(export, structured_replies=self._negotiated.structured_replies)

    def _on_structured_reply(self, data: bytes) -> None:
        _no_data("STRUCTURED_REPLY", data)
        self._negotiated.structured_replies = True
        self._reply(c.OPT_STRUCTURED_REPLY, c.REP_ACK)

    def _on_list_meta_context(self, data: bytes) -> None:
        _, queries = self._parse_contexts(data)
        if meta_context.lists_allocation(queries):
            self._reply_context(c.OPT_LIST_META_CONTEXT, 0)
        self._reply(c.OPT_LIST_META_CONTEXT, c.REP_ACK)

    def _on_set_meta_context(self, data: bytes) -> None:
        self._negotiated.allocation_of = None  # an option that fails replaces what was selected, too
        export, queries = self._parse_contexts(data)
        if meta_context.selects_allocation(queries):
            self._negotiated.allocation_of = export
            self._reply_context(c.OPT_SET_META_CONTEXT, meta_context.BASE_ALLOCATION_ID)
        self._reply(c.OPT_SET_META_CONTEXT, c.REP_ACK)

    def _parse_contexts(self, data: bytes) -> tuple[Export, tuple[bytes, ...]]:
        if not self._negotiated.structured_replies:
            raise _OptionError(c.REP_ERR_INVALID, "metadata contexts need STRUCTURED_REPLY first")
        try:
            request = meta_context.parse(data)
        except meta_context.MetaContextError as error:
            raise _OptionError(c.REP_ERR_TOO_BIG if error.too_big else c.REP_ERR_INVALID, str(error)) from None
        return self._open(_name(request.export_name)), request.queries

    def _reply_context(self, option: int, number: int) -> None:
        self._reply(option, c.REP_META_CONTEXT, U32.pack(number) + meta_context.BASE_ALLOCATION.encode())

    def _open(self, name: str) -> Export:
        export = self._directory.find(name)
        if export is None:
            raise _OptionError(c.REP_ERR_UNKNOWN, f"there is no export named {name[:200]!r} here")
        refusal = export.refusal()
        if refusal is not None:
            raise _OptionError(c.REP_ERR_UNKNOWN, refusal)
        return export


def transmission_flags(export: Export, *, structured_replies: bool = False) -> int:
    """The 16 flag bits that tell a client what the export can do."""
    flags = c.EXPORT_HAS_FLAGS | c.EXPORT_SEND_FLUSH | c.EXPORT_SEND_FUA | c.EXPORT_CAN_MULTI_CONN | c.EXPORT_SEND_CACHE
    if structured_replies:
        flags |= c.EXPORT_SEND_DF
    if export.read_only:
        return flags | c.EXPORT_READ_ONLY
    return flags | c.EXPORT_SEND_TRIM | c.EXPORT_SEND_WRITE_ZEROES | c.EXPORT_SEND_FAST_ZERO


def _cut(text: str) -> bytes:
    """UTF-8 of at most the protocol's string length, never cut inside a character."""
    encoded = text.encode()[: c.MAX_STRING_BYTES]
    return encoded.decode(errors="ignore").encode()


def _no_data(what: str, data: bytes) -> None:
    if data:
        raise _OptionError(c.REP_ERR_INVALID, f"option {what} takes no data but had {len(data)} bytes")


def _name(data: bytes) -> str:
    if len(data) > c.MAX_STRING_BYTES:
        raise _OptionError(c.REP_ERR_TOO_BIG, f"the export name has {len(data)} bytes (at most {c.MAX_STRING_BYTES})")
    if b"\0" in data:
        raise _OptionError(c.REP_ERR_INVALID, "the export name contains a NUL byte")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise _OptionError(c.REP_ERR_INVALID, "the export name is not UTF-8") from None


def _parse_info(data: bytes) -> tuple[str, list[int]]:
    """Name and the wanted infos (each once) of an INFO or GO option."""
    lengths_error = _OptionError(c.REP_ERR_INVALID, "the lengths inside the option do not fit its length")
    if len(data) < U32.size + U16.size:
        raise lengths_error
    (name_length,) = U32.unpack_from(data)
    infos_at = U32.size + name_length
    if infos_at + U16.size > len(data):
        raise lengths_error
    (count,) = U16.unpack_from(data, infos_at)
    if infos_at + U16.size + count * U16.size != len(data):
        raise lengths_error
    name = _name(data[U32.size : infos_at])
    infos = [info for (info,) in U16.iter_unpack(data[infos_at + U16.size :])]
    return name, list(dict.fromkeys(infos))
