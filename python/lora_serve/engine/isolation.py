"""Who shares cached prefixes with whom."""

from __future__ import annotations

import hashlib

DEFAULT_DOMAIN = b""
"""The isolation domain of requests that name none."""
_PART_BYTES = 16


def make_domain(group: str | None, cache_salt: str | None) -> bytes:
    """Give the isolation domain of a request.

    Parameters
    ----------
    group : str or None
        Of the API key, or None.
    cache_salt : str or None
        The request's own field, or None.

    Returns
    -------
    bytes
        Empty where both are None, else a digest of each, which differ wherever one of the two does; so it is
        short, whatever clients send.
    """
    if group is None and cache_salt is None:
        return DEFAULT_DOMAIN
    return _digest(group) + _digest(cache_salt)


def group_of(domain: bytes) -> bytes:
    """Give what stands for the group of a domain, whatever its salt; empty for those without a group."""
    group = domain[:_PART_BYTES]
    return b"" if group == _NO_GROUP else group


def _digest(part: str | None) -> bytes:
    data = b"-" if part is None else b"+" + part.encode("utf-8", "surrogatepass")
    return hashlib.sha256(data).digest()[:_PART_BYTES]


_NO_GROUP = _digest(None)
