"""Only public addresses are connected to, however a name or a redirect may try otherwise."""

from __future__ import annotations

import ipaddress
import socket
from typing import Any
from urllib.parse import urlsplit

from dinov2_kernels._extras import require

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
UNICAST = ipaddress.IPv6Network("2000::/3")  # all that has been given out of IPv6; more than is_global asks


class PrivateAddressError(OSError):
    """A name leads to no public address."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's: not private, loopback, link-local, multicast or reserved, nor one
    of these within an IPv6 address (mapped, 6to4, Teredo, NAT64)."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address):
        inner = [ip.ipv4_mapped, ip.sixtofour, *(ip.teredo or ())]
        if ip in NAT64:  # which Python counts among the reserved
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
        if any(v4 is not None and not is_public(str(v4)) for v4 in inner):
            return False
        if ip not in UNICAST:
            return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def check_literal(url: str) -> None:
    """Refuse a normal URL whose host is an address that is not public; names are for :func:`public_resolver`.

    Raises:
        PrivateAddressError: it is one.
    """
    host = urlsplit(url).hostname or ""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return  # a name
    if not is_public(host):
        raise PrivateAddressError(host)


def public_resolver(inner: Any = None) -> Any:
    """A resolver of aiohttp that gives public addresses only.

    The addresses that it has checked are those that aiohttp connects to, so a name that answers differently the second
    time gains nothing.

    Args:
        inner: resolver that is asked; the system's by default.
    """
    aiohttp = require("aiohttp", extra="curate", purpose="downloading")
    abc = require("aiohttp.abc", extra="curate", purpose="downloading")
    asked = inner or aiohttp.ThreadedResolver()

    class PublicResolver(abc.AbstractResolver):  # type: ignore[misc, name-defined]
        async def resolve(
            self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
        ) -> list[dict[str, Any]]:
            found = await asked.resolve(host, port, family)
            public = [entry for entry in found if is_public(entry["host"])]
            if not public:
                raise PrivateAddressError(host)
            return public

        async def close(self) -> None:
            await asked.close()

    return PublicResolver()
