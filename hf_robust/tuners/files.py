# SPDX-License-Identifier: Apache-2.0
"""What the files of a saved adapter must be.

`adapter_config.json` says, under `saved`, which format the adapter has, the SHA-256 of its tensors, and what base it
belongs to. `adapter_model.safetensors` has the same digest once more, as a tensor: PEFT loads the tensors without the
config where an adapter of that name is there already.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.tensor_files import read_weights
from ..errors import AdapterFileError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT_VERSION = 1
SEAL = "sha256"  # name of the tensor with the digest, behind the prefix of the method
PEFT_PREFIX = "base_model.model."
WORTH_A_THREAD = 2**20  # bytes


def digest(tensors: Mapping[str, Tensor]) -> str:
    """The SHA-256 of tensors: of their names, formats, shapes and bytes, in the order of the names.

    Args:
        tensors: by name.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> digest({"values": torch.zeros(2)})[:8]
        '232317d6'
    """
    named = sorted(tensors.items())
    if sum(tensor.nbytes for tensor in tensors.values()) < WORTH_A_THREAD:
        return hashlib.sha256(b"".join(map(_digest_of_one, named))).hexdigest()
    with ThreadPoolExecutor(2) as pool:  # hashing leaves Python's lock to the other
        return hashlib.sha256(b"".join(pool.map(_digest_of_one, named))).hexdigest()


def _digest_of_one(named: tuple[str, Tensor]) -> bytes:
    name, tensor = named
    head = f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode()
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)
    found = hashlib.sha256(head)
    found.update(content.numpy().data)
    return found.digest()


def as_seal(sha256: str) -> Tensor:
    """A digest as a tensor, `(8,)`, of 32-bit integers, as 8-bit ones are taken for quantised weights."""
    return torch.tensor(list(bytes.fromhex(sha256)), dtype=torch.uint8).view(torch.int32)


def check_seal(
    tensors: Mapping[str, Tensor], seal: Tensor | None, saved: Mapping[str, Any] | None, where: str
) -> None:
    """Looks whether tensors are those that were saved.

    Args:
        tensors: by the names they have in their file, without PEFT's prefix and the seal.
        seal: the tensor with the digest of those that were saved, if there is one.
        saved: what the config says, if it is of the same file.
        where: the file, for the message.

    Raises:
        AdapterFileError: they are not.
    """
    if saved is not None and seal is None:
        raise AdapterFileError("an adapter's file lacks its digest", where=where, remedy="Save the adapter again.")
    if seal is None:
        return
    sha256 = digest(tensors)
    if saved is not None and saved["sha256"] != sha256:
        remedy = "Are config and tensors of two savings? Get the files again."
        raise AdapterFileError("an adapter's tensors are not those that were saved", where=where, remedy=remedy)
    if not torch.equal(seal.cpu(), as_seal(sha256)):
        remedy = f"Get the files again. Of a state dict you have changed yourself, take out what ends in {SEAL!r}."
        raise AdapterFileError("an adapter's tensors have been changed since", where=where, remedy=remedy)


# --- files -------------------------------------------------------------------------------------------------------


def check_files(folder: Path, saved: Mapping[str, Any] | None, prefix: str) -> dict[str, Tensor] | None:
    """Looks whether an adapter's folder holds tensors that can be read; their digest is compared when they are loaded.

    Args:
        folder: of the adapter.
        saved: what its config says under `saved`; None for one of an older version, which cannot be checked.
        prefix: of the method's tensors.

    Returns:
        The tensors by name, without PEFT's prefix and the digest; None if there is no safetensors file. (Of a pickle
        PEFT unpickles tensors only, which are checked afterwards.)

    Raises:
        UnsafeFileError: the file is no regular one.
        AdapterFileError: the format is newer than this version, or the file is none of tensors of the method.
    """
    path = folder / WEIGHTS_FILE
    if not path.exists():
        return None
    check_format(saved, str(folder))
    tensors = plain_names(read_weights(path))
    seal = _take_seal(tensors, prefix)
    if seal is not None and saved is None:
        raise AdapterFileError("an adapter's config lacks what its file had", where=str(folder), allowed="saved")
    if seal is None and not any(prefix in name for name in tensors):
        raise AdapterFileError("file holds no tensor of its method", where=str(path), got=sorted(tensors)[:3])
    return tensors


def check_digest(folder: Path, saved: Mapping[str, Any] | None, prefix: str) -> None:
    """Looks whether the tensors in an adapter's folder are those that were saved, as loading them does.

    Args:
        folder: of the adapter, which passes `check_files`.
        saved: what its config says under `saved`.
        prefix: of the method's tensors.

    Raises:
        AdapterFileError: they are not.
    """
    tensors = plain_names(read_weights(folder / WEIGHTS_FILE))
    check_seal(tensors, _take_seal(tensors, prefix), saved, str(folder))


def _take_seal(tensors: dict[str, Tensor], prefix: str) -> Tensor | None:
    seals = [tensors.pop(name) for name in list(tensors) if name.endswith(f".{prefix}{SEAL}")]
    return seals[0] if seals else None


def plain_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by their names without PEFT's prefix."""
    return {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}


def check_format(saved: Mapping[str, Any] | None, where: str) -> None:
    """Refuses a format that this version does not know, and a description that lacks something.

    Args:
        saved: what a config says under `saved`.
        where: the file, for the message.

    Raises:
        AdapterFileError: it is such a one.
    """
    if saved is None:
        return
    version = saved.get("format_version")
    if type(version) is not int or version < 1:
        raise AdapterFileError("unknown format of an adapter", where=where, got=version)
    if version > FORMAT_VERSION:
        remedy = "pip install --upgrade hf_robust"
        allowed = f"up to {FORMAT_VERSION}"
        raise AdapterFileError(
            "an adapter's format is newer", where=where, got=version, allowed=allowed, remedy=remedy
        )
    if not isinstance(saved.get("sha256"), str) or not isinstance(saved.get("base"), dict):
        raise AdapterFileError("an adapter's config lacks its digest or its base", where=where, got=sorted(saved))
