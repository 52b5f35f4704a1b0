# SPDX-License-Identifier: Apache-2.0
"""To know a base again: by the names and shapes of its tensors, and by some of its numbers."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import AdapterFileError

SAMPLES = 4  # of every tensor
ENTRIES = 512  # of those an adapter changes, at most
ALPHABET = b"+."  # the two last digits of base64; with / it would look like a path of this machine


def fingerprint(base: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> dict[str, Any]:
    """Describes a base: names and shapes, and some thousand of its numbers.

    Args:
        base: its floating-point tensors, by name.
        changed: flat positions in some of them that the adapter changes, sorted: those tell whether it is merged into
            the base.

    Returns:
        What `check_base` compares, of what JSON can hold.

    Example:
        >>> list(fingerprint({"weight": torch.ones(2, 2)}, {}))
        ['structure', 'values', 'places']
    """
    places = _places(base, changed)
    return {
        "structure": _structure(base),
        "values": _encode(_values(base, places)),
        "places": _encode(places),
    }


def check_base(saved: Mapping[str, Any], base: Mapping[str, Tensor]) -> None:
    """Looks whether a base is the one that was described, in whatever precision it has been loaded.

    Args:
        saved: what `fingerprint` has returned.
        base: floating-point tensors, by name.

    Raises:
        AdapterFileError: it is another base, or one that an adapter was merged into.
    """
    if saved.get("structure") != _structure(base):
        what = "an adapter belongs to another base: names or shapes of its weights differ"
        raise AdapterFileError(what, got=f"{len(base)} weights")
    if any(tensor.is_meta for tensor in base.values()):
        return  # not there yet, or offloaded: nothing to compare
    values, places = _decoded(saved, base)
    found = _values(base, places)
    relative, absolute = map(max, zip(_resolution(found), _resolution(values), strict=True))
    close = torch.isclose(found, values, rtol=relative, atol=absolute, equal_nan=True)
    if not close.all():
        got = f"{int((~close).sum())} of {len(close)} compared weights differ"
        remedy = "Load the base that the adapter was trained on, before any adapter is merged into it."
        raise AdapterFileError("an adapter belongs to another base", got=got, remedy=remedy)


def _decoded(saved: Mapping[str, Any], base: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    what = "the description of an adapter's base is damaged"
    try:
        values, places = _decode(saved["values"], "float32"), _decode(saved["places"], "int64")
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterFileError(what, got=str(error)) from error
    inside = len(places) == 0 or (places[0] >= 0 and places[-1] < _size(base) and (places.diff() > 0).all())
    expected = sum(min(SAMPLES, tensor.numel()) for tensor in base.values()) + len(places)
    if not inside or len(values) != expected:
        raise AdapterFileError(what, got=f"{len(values)} numbers", allowed=str(expected))
    return values, places


def _size(base: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in base.values())


def _structure(base: Mapping[str, Tensor]) -> str:
    lines = [f"{name} {tuple(base[name].shape)}\n" for name in sorted(base)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _resolution(values: Tensor) -> tuple[float, float]:
    """The relative and the absolute step of the coarsest format that holds all values, whatever they are kept in."""
    for dtype, smallest in ((torch.bfloat16, 0.0), (torch.float16, 2.0**-24)):
        if torch.allclose(values.to(dtype).float(), values, rtol=0, atol=0, equal_nan=True):
            return torch.finfo(dtype).eps, smallest
    return torch.finfo(torch.float32).eps, 0.0


def _values(base: Mapping[str, Tensor], places: Tensor) -> Tensor:
    """The numbers that are compared, `(numbers,)`: some of every tensor, then those at the places."""
    some = [_take(base[name], _spread(base[name].numel(), SAMPLES)) for name in sorted(base)]
    at_places, offset = [], 0
    for name in sorted(base):
        start, stop = torch.searchsorted(places, torch.tensor([offset, offset + base[name].numel()])).tolist()
        if start < stop:
            at_places.append(_take(base[name], places[start:stop] - offset))
        offset += base[name].numel()
    return torch.cat(some + at_places)


def _take(tensor: Tensor, positions: Tensor) -> Tensor:
    return tensor.detach().flatten()[positions.to(tensor.device)].float().cpu()


def _places(base: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> Tensor:
    """Some of the changed positions, evenly spread, counted through all tensors in the order of their names."""
    found, offset = [torch.empty(0, dtype=torch.int64)], 0
    for name in sorted(base):
        if name in changed:
            found.append(changed[name].detach().cpu().long() + offset)
        offset += base[name].numel()
    positions = torch.cat(found)
    return positions[_spread(len(positions), ENTRIES)]


def _spread(size: int, count: int) -> Tensor:
    """At most `count` numbers below `size`, evenly spread, first and last among them."""
    if size <= count:
        return torch.arange(size)
    return torch.arange(count) * (size - 1) // (count - 1)


def _encode(tensor: Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes(), ALPHABET).decode()


def _decode(text: str, dtype: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text, ALPHABET, validate=True), dtype).copy())
