"""Checks of options that several choices share: `option=value: what is allowed`. Importing this file needs no torch."""

from __future__ import annotations


def require_whole(name: str, value: int, least: int) -> None:
    """Raise ValueError unless value is an integer of at least `least`.

    >>> require_whole("size", 0, 1)
    Traceback (most recent call last):
    ValueError: size=0: must be an integer of at least 1
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r}: must be an integer of at least {least}")


def require_bits(bits: int, least: int, most: int) -> None:
    """Raise ValueError unless bits is an integer from least to most."""
    if isinstance(bits, bool) or not isinstance(bits, int) or not least <= bits <= most:
        raise ValueError(f"bits={bits!r}: allowed are the integers {least} to {most}")


def require_bool(name: str, value: bool) -> None:
    """Raise ValueError unless value is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: allowed are true and false")
