# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in transformers' format, read without loading them.

A safetensors file is the length of its header (8 bytes, little-endian), the header in JSON, and the values one tensor
after the other. The header is read here and not by the library, which accepts repeated names and has no writer that
takes a tensor in slices; what is merged is written behind the header of the file it takes the place of.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.text_files import parse_json, read_text
from ..errors import DataError, MergeError, UnsafeFileError
from ..tasks.task import CONFIG_FILE, WEIGHTS_FILE

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
COMPANION_FILES = (  # what model, processor, tokenizer and classifier write beside the weights
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    CONFIG_FILE,
    "config.json",  # last: without it a folder that is not complete does not load as a model
)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "BOOL": torch.bool,
}
QUANTISED = {"quant_state", "absmax", "SCB", "qweight", "qzeros", "scales", "weight_format"}  # parts of tensor names
UNQUANTISED = "Quantised weights cannot be averaged; load the model unquantised, dtype=torch.bfloat16, and save it."
HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Args:
        path: the file.
        dtype: of the values.
        shape: of the tensor.
        begin: position of the first byte in the file.
        end: position behind the last byte.
    """

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Args:
        folder: the folder.
        data_starts: the weight files, each with the position of its first value.
        tensors: all tensors by name, within a file in its order.
        index: the file that says which shard holds which tensor, if there are shards.
        stamps: size, modification time and inode of every file that a merge reads.
    """

    folder: Path
    data_starts: dict[Path, int]
    tensors: dict[str, StoredTensor]
    index: Path | None
    stamps: dict[Path, Stamp]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads which tensors a folder holds and where; no values.

    Args:
        folder: as `save_pretrained` writes it, in one file or in shards; with a trainable head also as
            `RobustTrainer.save_model` does.

    Returns:
        What it holds, also the tensors of the head.

    Raises:
        MergeError: it is no whole checkpoint, holds an adapter or quantised weights, or is damaged.
        UnsafeFileError: the weights are pickled, no regular file, or outside the folder.

    Example:
        >>> read_checkpoint(Path("runs/full")).tensors["logit_scale"].shape
        ()
    """
    _check_is_model(folder)
    index = folder / INDEX_FILE if not (folder / SINGLE_FILE).exists() and (folder / INDEX_FILE).exists() else None
    weight_map = _read_index(index) if index else {}
    paths = [folder / shard for shard in dict.fromkeys(weight_map.values())] if index else [folder / SINGLE_FILE]
    paths += [folder / WEIGHTS_FILE] if (folder / WEIGHTS_FILE).exists() else []
    companions = [folder / name for name in COMPANION_FILES if (folder / name).is_file()]
    stamps = {path: stamp(path) for path in [*paths, *([index] if index else []), *companions] if path.exists()}
    data_starts: dict[Path, int] = {}
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        data_starts[path], found = read_header(path)
        twice = sorted(tensors.keys() & found.keys())
        if twice:
            raise MergeError("tensor is in two files of a checkpoint", where=str(path), got=twice[0])
        tensors |= found
    if index:
        _check_index(index, weight_map, tensors)
    return Checkpoint(folder, data_starts, tensors, index, stamps)


def read_header(path: Path) -> tuple[int, dict[str, StoredTensor]]:
    """Reads the header of a safetensors file, and checks it against the file.

    Args:
        path: the file.

    Returns:
        The position of the first value, and the tensors in the order they lie in.

    Raises:
        MergeError: it is missing, damaged, or has values of a type that cannot be averaged.
        UnsafeFileError: it is no regular file.

    Example:
        >>> start, tensors = read_header(Path("runs/full/model.safetensors"))
        >>> tensors["logit_scale"].dtype
        torch.float32
    """
    if not path.exists():
        raise MergeError("weight file is missing", where=str(path))
    if not path.is_file():
        raise UnsafeFileError("not a regular file", where=str(path))
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise _damaged(path, f"a header of {length} bytes in a file of {size}")
        if file.peek(1)[:1] != b"{":
            raise _damaged(path, "a header that does not begin with {")
        header = _object(file.read(length), path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "metadata that is not text")
    start = 8 + length
    tensors = {name: _stored_tensor(path, name, entry, start) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)))
    position = start
    for name, tensor in tensors.items():
        if tensor.begin != position or tensor.end - position != math.prod(tensor.shape) * tensor.dtype.itemsize:
            raise _damaged(path, f"offsets of {name!r} that do not fit its place and shape")
        position = tensor.end
    if position != size:
        raise _damaged(path, f"{size} bytes where the header describes {position}")
    return start, tensors


def header_of(path: Path, tensors: Mapping[str, StoredTensor], dtypes: Mapping[str, torch.dtype]) -> bytes:
    """Makes the header of a safetensors file with the tensors of another one, some of them in other dtypes.

    Args:
        path: the other file, whose metadata is kept.
        tensors: its tensors by name, in their order.
        dtypes: of those that are to have another one, by name.

    Returns:
        All that comes before the values.

    Example:
        >>> _, tensors = read_header(Path("model.safetensors"))
        >>> header_of(Path("model.safetensors"), tensors, {"logit_scale": torch.float32})[8:9]
        b'{'
    """
    with path.open("rb") as file:
        header = _object(file.read(int.from_bytes(file.read(8), "little")), path)
    entries = {"__metadata__": header["__metadata__"]} if "__metadata__" in header else {}
    end, names = 0, {dtype: name for name, dtype in DTYPES.items()}
    for name, tensor in tensors.items():
        dtype = dtypes.get(name, tensor.dtype)
        begin, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        entries[name] = {"dtype": names[dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode("utf-8")
    text += b" " * (-len(text) % 8)  # values begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object in which no name may be repeated.

    Args:
        path: the file.

    Raises:
        MergeError: it is no such object.
        UnsafeFileError: it is no regular file.

    Example:
        >>> read_json(Path("runs/full/config.json"))["model_type"]
        'clip'
    """
    return _object(read_text(path, error=MergeError), path)


def stamp(path: Path) -> Stamp:
    """Returns size, modification time in ns and inode of a file, by which a change shows.

    Args:
        path: the file, or a link to it.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def some(names: list[str]) -> str:
    """Names the first five and counts the others, for error messages.

    Args:
        names: any number.

    Example:
        >>> some(["a", "b", "c", "d", "e", "f", "g"])
        'a, b, c, d, e (+2 more)'
    """
    return ", ".join(names[:5]) + (f" (+{len(names) - 5} more)" if len(names) > 5 else "")


def _check_is_model(folder: Path) -> None:
    if not folder.is_dir():
        raise MergeError("no such folder", got=str(folder))
    if (folder / "adapter_config.json").exists():
        remedy = "An adapter is merged by hf-robust merge."
        raise MergeError("folder holds an adapter, not a whole checkpoint", where=str(folder), remedy=remedy)
    if not (folder / SINGLE_FILE).exists() and not (folder / INDEX_FILE).exists():
        remedy = "Save it with AutoModel.from_pretrained(folder).save_pretrained(other_folder)."
        if any(folder.glob("pytorch_model*.bin")):
            raise UnsafeFileError("pickled weights could run code", where=str(folder), remedy=remedy)
        raise MergeError(f"folder has no {SINGLE_FILE}", where=str(folder), remedy=remedy)
    config = folder / "config.json"
    if not config.is_file():
        raise MergeError("folder has no config.json", where=str(folder))
    if "quantization_config" in read_json(config):
        raise MergeError("model is quantised", where=str(config), remedy=UNQUANTISED)


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise MergeError("index has no weight_map", where=str(path))
    for shard in weight_map.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[\w.-]+\.safetensors", shard):
            what = "index names a shard that is no file of its folder"
            raise UnsafeFileError(what, where=str(path), got=shard, allowed="*.safetensors")
    return weight_map


def _check_index(index: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    held = {name: tensor.path.name for name, tensor in tensors.items() if tensor.path.name != WEIGHTS_FILE}
    wrong = sorted(name for name in weight_map.keys() | held.keys() if weight_map.get(name) != held.get(name))
    if wrong:
        name = wrong[0]
        what = f"index and shards disagree on {len(wrong)} tensors: {name} in {held.get(name)} instead of "
        raise MergeError(what + str(weight_map.get(name)), where=str(index))


def _object(text: str | bytes, path: Path) -> dict[str, Any]:
    try:
        parsed = parse_json(text, str(path))
    except DataError as error:
        raise _damaged(path, f"{error.what}, {error.got}") from error
    if not isinstance(parsed, dict):
        raise _damaged(path, f"no JSON object but a {type(parsed).__name__}")
    return parsed


def _stored_tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"an entry {name!r} without dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [shape, offsets]
    if not all(isinstance(one, list) and all(type(n) is int and n >= 0 for n in one) for one in numbers):
        raise _damaged(path, f"a shape or offsets of {name!r} that are not numbers")
    if len(offsets) != 2:
        raise _damaged(path, f"offsets of {name!r} that are not two")
    if dtype not in DTYPES or QUANTISED & set(name.split(".")):
        what = f"tensor {name!r} of type {dtype} looks quantised or has no average"
        raise MergeError(what, where=str(path), allowed=", ".join(DTYPES), remedy=UNQUANTISED)
    return StoredTensor(path, DTYPES[dtype], tuple(shape), start + offsets[0], start + offsets[1])


def _damaged(path: Path, got: str) -> MergeError:
    return MergeError("file is damaged", where=str(path), got=got, remedy="Save or download it again.")
