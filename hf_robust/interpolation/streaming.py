# SPDX-License-Identifier: Apache-2.0
"""Averages the tensors of checkpoints in slices, so that models larger than memory can be merged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from io import BufferedReader, BufferedWriter
from pathlib import Path

import torch
from torch import Tensor

from ..errors import MergeError, NonFiniteError
from .arithmetic import is_finite
from .files import Checkpoint, Stamp, StoredTensor, header_of, stamp

SLICE = 2**15  # values at once: more of them torch would share among threads, which here costs more than it gains
Files = Mapping[Path, BufferedReader]
Average = Callable[[list[Tensor]], Tensor]  # of slices of all sides, `(values,)` each, float64, which it may overwrite


def merge_weights(
    sides: Sequence[dict[str, StoredTensor]],
    names: Sequence[str],
    layout: Checkpoint,
    dtypes: Mapping[str, torch.dtype],
    average: Average,
    folder: Path,
) -> None:
    """Writes weight files behind the headers of those of one checkpoint; integers and booleans are its own.

    Args:
        sides: tensors by name, of every model, or what else `average` takes; the first two or more have all tensors.
        names: of the sides, for messages.
        layout: the checkpoint whose files are written anew.
        dtypes: of tensors that get another one than there, by name.
        average: computes the values.
        folder: where the files go.

    Raises:
        MergeError: a file has become shorter.
        NonFiniteError: a value is NaN or infinite.
    """
    paths = {tensor.path for tensors in sides for tensor in tensors.values()}
    with ExitStack() as stack:
        sources = {path: stack.enter_context(path.open("rb")) for path in paths | layout.data_starts.keys()}
        buffers = [(bytearray(8 * SLICE), torch.empty(SLICE, dtype=torch.float64)) for _ in sides]
        for path, data_start in layout.data_starts.items():
            output = stack.enter_context((folder / path.name).open("xb"))
            held = {name: tensor for name, tensor in layout.tensors.items() if tensor.path == path}
            if dtypes.keys() & held.keys():
                output.write(header_of(path, held, dtypes))
            else:
                output.write(_read(sources[path], 0, memoryview(bytearray(data_start))))
            for name, tensor in held.items():
                tensors = {side: one[name] for side, one in zip(names, sides, strict=True) if name in one}
                if tensor.dtype.is_floating_point:
                    dtype = dtypes.get(name, tensor.dtype)
                    _merge_tensor(name, tensors, dtype, average, sources, buffers, output)
                else:
                    _copy_tensor(tensor, sources, buffers[0][0], output)


def _merge_tensor(
    name: str,
    tensors: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    average: Average,
    sources: Files,
    buffers: list[tuple[bytearray, Tensor]],
    output: BufferedWriter,
) -> None:
    n_values = values(next(iter(tensors.values())))
    for start in range(0, n_values, SLICE):
        count = min(SLICE, n_values - start)
        doubles = [
            _read_doubles(tensor, start, count, sources, *buffer)
            for tensor, buffer in zip(tensors.values(), buffers, strict=False)
        ]
        finite = all(is_finite(fisher) for fisher in doubles[2:])  # an infinite one may leave no trace in the mean
        merged = average(doubles)
        if not finite or not is_finite(merged):
            raise _non_finite(name, tensors, sources, buffers[0])
        torch.frombuffer(buffers[0][0], dtype=dtype, count=count).copy_(merged)
        output.write(memoryview(buffers[0][0])[: count * dtype.itemsize])


def _copy_tensor(tensor: StoredTensor, sources: Files, buffer: bytearray, output: BufferedWriter) -> None:
    for position in range(tensor.begin, tensor.end, len(buffer)):
        view = memoryview(buffer)[: min(len(buffer), tensor.end - position)]
        output.write(_read(sources[tensor.path], position, view))


def _read_doubles(
    tensor: StoredTensor, start: int, count: int, sources: Files, raw: bytearray, doubles: Tensor
) -> Tensor:
    width = tensor.dtype.itemsize
    _read(sources[tensor.path], tensor.begin + start * width, memoryview(raw)[: count * width])
    return doubles[:count].copy_(torch.frombuffer(raw, dtype=tensor.dtype, count=count))


def _read(source: BufferedReader, position: int, view: memoryview) -> memoryview:
    source.seek(position)
    if source.readinto(view) != len(view):
        raise MergeError("source changed during the merge", where=source.name, got="it ends early")
    return view


def _non_finite(
    name: str, tensors: Mapping[str, StoredTensor], sources: Files, buffer: tuple[bytearray, Tensor]
) -> NonFiniteError:
    counts = []
    for side, tensor in tensors.items():
        n_values = values(tensor)
        slices = [(start, min(SLICE, n_values - start)) for start in range(0, n_values, SLICE)]
        bad = sum(int((~_read_doubles(tensor, *part, sources, *buffer).isfinite()).sum()) for part in slices)
        counts += [f"{bad} of {n_values} in {side}"] if bad else []
    return NonFiniteError("tensor has NaN or infinity", where=name, got="; ".join(counts))


def values(tensor: StoredTensor) -> int:
    """Returns how many values a tensor has.

    Args:
        tensor: in a file.
    """
    return (tensor.end - tensor.begin) // tensor.dtype.itemsize


def same_bytes(first: StoredTensor, second: StoredTensor) -> bool:
    """Says whether two tensors of the same dtype and shape have the same bytes, read in slices.

    Args:
        first: in a file.
        second: in another.
    """
    size, at_once = first.end - first.begin, 8 * SLICE
    with first.path.open("rb") as one, second.path.open("rb") as other:
        for start in range(0, size, at_once):
            views = [memoryview(bytearray(min(at_once, size - start))) for _ in range(2)]
            if _read(one, first.begin + start, views[0]) != _read(other, second.begin + start, views[1]):
                return False
    return True


def check_unchanged(stamps: dict[Path, Stamp]) -> None:
    """Refuses files that have changed since they were looked at.

    Args:
        stamps: of the files.

    Raises:
        MergeError: one has.
    """
    for path, before in stamps.items():
        if not path.exists() or stamp(path) != before:
            raise MergeError("source changed during the merge", where=str(path), remedy="Merge again.")
