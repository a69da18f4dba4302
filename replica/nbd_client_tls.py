"""TLS of an NBD client of the nodes: whom it believes, and what it shows."""

import ssl
from dataclasses import dataclass
from pathlib import Path

from nbdserver.tls import TlsFiles, load_authority


@dataclass(frozen=True, slots=True)
class ClientTls:
    """PEM files: the authority of the nodes' certificates; the client's own certificate and key, both or neither."""

    ca: Path
    cert: Path | None = None
    key: Path | None = None

    def check(self) -> None:
        """Look at the files, as a server does at its own. Raises TlsFileError."""
        own = self._own
        if own is not None:
            own.check()
        self.context()

    def context(self) -> ssl.SSLContext:
        """TLS 1.3, as the peer link's. The files are read anew, so that renewed ones are taken. Raises TlsFileError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        # A node is known by its name, wherever it is: `replica.peer_names`.
        context.check_hostname = False
        own = self._own
        if own is None:
            load_authority(context, self.ca)
        else:
            own.load_into(context)
        return context

    @property
    def _own(self) -> TlsFiles | None:
        return None if self.cert is None or self.key is None else TlsFiles(self.cert, self.key, self.ca)
