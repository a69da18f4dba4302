"""Debian's Apache on a host, as the package installs it; the page says who serves it."""

import signal
from pathlib import Path
from typing import Final

from tests.hosts.host import Host

_PROGRAM: Final = "/usr/sbin/apache2"
_DOCUMENTS: Final = "/var/www/html"


def missing() -> str:
    """Why it cannot be run here, "" when it can."""
    return "" if Path(_PROGRAM).exists() else "Apache is not installed (Debian package apache2)"


def install(host: Host, documents: str = _DOCUMENTS) -> None:
    """Configure it, not started. `documents`: where its page lies, by default on the host's own disk."""
    if documents == _DOCUMENTS:
        host.write(f"{_DOCUMENTS}/index.html", f"{host.name}\n")
    site = f"DocumentRoot {documents}\n<Directory {documents}>\n    Require all granted\n</Directory>\n"
    host.write("/etc/apache2/sites-enabled/000-default.conf", f"<VirtualHost *:80>\n{site}</VirtualHost>\n")
    host.write("/etc/apache2/conf-enabled/lab.conf", "ServerName cluster\n")


def kill(host: Host) -> None:
    """SIGKILL for all of it."""
    if not host.signal(signal.SIGKILL, _PROGRAM):
        raise AssertionError(f"Apache does not run on {host.name}")
