"""Whom a certificate is for (pure)."""

from collections.abc import Mapping
from typing import Any

_MOST_SHOWN = 5


def refusal(certificate: Mapping[str, Any], node: str) -> str:
    """Why a (valid) certificate, as `ssl.SSLSocket.getpeercert` has it, will not do for `node`: "it is for …"; "" if it
    names the node. Names are compared as they are: no wildcards, and no addresses.
    """
    names = [value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"]
    if node in names:
        return ""
    return f"it is for {', '.join(names[:_MOST_SHOWN]) or 'nobody'}"
