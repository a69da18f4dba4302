"""Layouts of the handshake, which both of its sides use.

Source: NetworkBlockDevice/nbd, doc/proto.md, "Newstyle negotiation" and "Option types".
"""

from struct import Struct

SERVER_GREETING = Struct(">QQH")
CLIENT_FLAGS = Struct(">I")
OPTION = Struct(">QII")
OPTION_REPLY = Struct(">QIII")
U32 = Struct(">I")
U16 = Struct(">H")
EXPORT_NAME_REPLY = Struct(">QH")
INFO_EXPORT = Struct(">HQH")
INFO_BLOCK_SIZE = Struct(">HIII")
