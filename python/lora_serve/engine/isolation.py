"""Who shares cached prefixes with whom."""

from __future__ import annotations

import hashlib

DEFAULT_DOMAIN = b""
"""The isolation domain of requests that name none."""


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
        Empty where both are None, else a digest that differs wherever one of the two does; so it is short,
        whatever clients send.
    """
    if group is None and cache_salt is None:
        return DEFAULT_DOMAIN
    digest = hashlib.sha256()
    for part in (group, cache_salt):
        # With the lengths in front, no two pairs give the same bytes.
        data = b"" if part is None else part.encode("utf-8", "surrogatepass")
        digest.update(b"-" if part is None else b"+%d:" % len(data))
        digest.update(data)
    return digest.digest()
