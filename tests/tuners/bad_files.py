# SPDX-License-Identifier: Apache-2.0
"""Folders of saved adapters, and what can be wrong with them."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor

from hf_robust.errors import AdapterFileError, ConfigError, HfRobustError, NonFiniteError, UnsafeFileError
from hf_robust.tuners.files import CONFIG_FILE, PEFT_PREFIX, WEIGHTS_FILE, as_seal, digest

Tensors = dict[str, Tensor]
BOTH = ("SAFT", "A-CLIP")


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG_FILE).read_text())


def write_config(folder: Path, config: Any) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True))


def read_tensors(folder: Path) -> Tensors:
    return {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}


def write_tensors(folder: Path, tensors: Tensors) -> None:
    (folder / WEIGHTS_FILE).unlink()  # or tensors that are mapped from it would change
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def seal_name(tensors: Tensors) -> str:
    return next(name for name in tensors if name.endswith("_sha256"))


def sealed(tensors: Tensors) -> tuple[Tensors, str]:
    """Tensors with their own digest, as one writes who knows how it is made; and the digest."""
    seal = next((name for name in tensors if name.endswith("_sha256")), "saft_sha256")
    sha256 = digest({n.removeprefix(PEFT_PREFIX): t for n, t in tensors.items() if n != seal})
    return {**tensors, seal: as_seal(sha256)}, sha256


def forged(tensors: Tensors, config: dict[str, Any]) -> tuple[bytes, dict[str, Any]]:
    """The files of tensors, with digests and numbers of entries that fit."""
    tensors, sha256 = sealed(tensors)
    config = {**config, "saved": {**config["saved"], "sha256": sha256}}
    if "entry_counts" in config:
        counts = {n.removeprefix(PEFT_PREFIX): t for n, t in tensors.items() if n.endswith(".saft_values")}
        config["entry_counts"] = {n.removesuffix(".saft_values"): t.numel() for n, t in counts.items()}
    return save(tensors, metadata={"format": "pt"}), config


def forge(folder: Path, tensors: Tensors) -> None:
    content, config = forged(tensors, read_config(folder))
    (folder / WEIGHTS_FILE).write_bytes(content)
    write_config(folder, config)


def strip(folder: Path) -> None:
    """Makes of a folder one that an older version has saved."""
    config, tensors = read_config(folder), read_tensors(folder)
    del config["saved"], tensors[seal_name(tensors)]
    write_config(folder, config)
    write_tensors(folder, tensors)


def first(tensors: Tensors, ending: str = "") -> str:
    """The name of a tensor with values."""
    values = [name for name in sorted(tensors) if name.endswith((f"_values{ending}", f"_weight{ending}"))]
    return values[0]


def split_header(content: bytes) -> tuple[bytes, bytes]:
    size = struct.unpack("<Q", content[:8])[0]
    return content[8 : 8 + size], content[8 + size :]


def join_header(header: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + rest


# --- damages -----------------------------------------------------------------------------------------------------

Damage = Callable[[Path], None]
TensorsDamage = Callable[[Tensors], None]


def in_config(change: Callable[[dict[str, Any]], Any]) -> Damage:
    def damage(folder: Path) -> None:
        config = read_config(folder)
        change(config)
        write_config(folder, config)

    return damage


def in_config_text(old: str, new: str) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / CONFIG_FILE
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return damage


def in_tensors(change: TensorsDamage, forged: bool) -> Damage:
    """Changes the tensors; `forged`: with digests that fit."""

    def damage(folder: Path) -> None:
        tensors = read_tensors(folder)
        change(tensors)
        (forge if forged else write_tensors)(folder, tensors)

    return damage


def in_bytes(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_bytes(change(content))

    return damage


def in_header(change: Callable[[bytes], bytes]) -> Damage:
    def changed(content: bytes) -> bytes:
        header, rest = split_header(content)
        return join_header(change(header), rest)

    return in_bytes(WEIGHTS_FILE, changed)


def as_pipe(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    os.mkfifo(folder / WEIGHTS_FILE)


def as_device(folder: Path) -> None:
    (folder / WEIGHTS_FILE).unlink()
    (folder / WEIGHTS_FILE).symlink_to("/dev/zero")


def one_tensor_x(folder: Path) -> None:
    write_tensors(folder, {"x": torch.zeros(2)})


def older_with_x(folder: Path) -> None:
    strip(folder)
    one_tensor_x(folder)


def other_saving(folder: Path) -> None:
    """Tensors that are whole by themselves, and a config of others."""
    tensors = read_tensors(folder)
    tensors[first(tensors)] += 1
    write_tensors(folder, sealed(tensors)[0])


def _flip_bit(tensors: Tensors) -> None:
    flat = tensors[first(tensors)].view(-1).view(torch.int32)
    flat[0] ^= 1 << 22


def _flip_seal(tensors: Tensors) -> None:
    tensors[seal_name(tensors)][0] ^= 1


def _fill(value: float) -> TensorsDamage:
    def change(tensors: Tensors) -> None:
        tensors[first(tensors)].view(-1)[-1] = value

    return change


def _to(dtype: torch.dtype, ending: str | None = None) -> TensorsDamage:
    def change(tensors: Tensors) -> None:
        name = first(tensors) if ending is None else next(n for n in sorted(tensors) if n.endswith(ending))
        tensors[name] = tensors[name].to(dtype)

    return change


def _drop(ending: str) -> TensorsDamage:
    def change(tensors: Tensors) -> None:
        del tensors[next(name for name in sorted(tensors) if name.endswith(ending))]

    return change


def _drop_module(tensors: Tensors) -> None:
    unit = first(tensors).rpartition(".")[0]
    for name in [name for name in tensors if name.startswith(f"{unit}.") and name != seal_name(tensors)]:
        del tensors[name]


def _reshape(tensors: Tensors) -> None:
    tensors[first(tensors)] = tensors[first(tensors)][None]


def _without_dimension(tensors: Tensors) -> None:
    tensors[first(tensors)] = tensors[first(tensors)].view(-1)[0].clone()


def _longer(tensors: Tensors) -> None:
    for name in tensors:
        if name.rpartition(".")[0] == first(tensors).rpartition(".")[0] and name != seal_name(tensors):
            tensors[name] = torch.cat([tensors[name], tensors[name][-1:] + 1])
            return


def _move(index: int, place: int) -> TensorsDamage:
    def change(tensors: Tensors) -> None:
        name = next(name for name in sorted(tensors) if name.endswith("saft_indices"))
        tensors[name][place] = index

    return change


def _swap(tensors: Tensors) -> None:
    name = next(name for name in sorted(tensors) if name.endswith("saft_indices") and len(tensors[name]) > 1)
    tensors[name] = tensors[name].flip(0)


def _rename(tensors: Tensors) -> None:
    name = first(tensors)
    tensors["base_model.model.nowhere." + name.rpartition(".")[2]] = tensors.pop(name)


def _add(name: str) -> TensorsDamage:
    def change(tensors: Tensors) -> None:
        tensors[name] = torch.zeros(2)

    return change


def _twice(header: bytes) -> bytes:
    name, place = next((n, p) for n, p in json.loads(header).items() if n.endswith(("_values", "_weight")))
    return b"{" + json.dumps({name: place}).encode()[1:-1] + b"," + header[1:]


@dataclass(frozen=True)
class Bad:
    """A damage, and how it is refused.

    Args:
        name: shown by pytest.
        damage: to a folder.
        error: its class.
        match: a regular expression for its message.
        of: whether it is in the `config`, in the `header` or in the `tensors`; or in the `place` of a file.
        methods: those it can be done to.
    """

    name: str
    damage: Damage
    error: type[HfRobustError]
    match: str
    of: str
    methods: tuple[str, ...] = BOTH


SAFT = ("SAFT",)
ACLIP = ("A-CLIP",)
CHANGED = "tensors are not those that were saved"


def bad(of: str, name: str, damage: Damage, error: type[HfRobustError], match: str, methods: Any = BOTH) -> Bad:
    return Bad(name, damage, error, match, of, methods)


def tensors(name: str, change: TensorsDamage, match: str, **more: Any) -> Bad:
    """Tensors that are refused although all digests fit."""
    return Bad(name, in_tensors(change, True), more.pop("error", AdapterFileError), match, "tensors", **more)


BADS: list[Bad] = [
    bad("tensors", "value bit", in_tensors(_flip_bit, False), AdapterFileError, CHANGED),
    bad("tensors", "seal bit", in_tensors(_flip_seal, False), AdapterFileError, "tensors have been changed since"),
    bad("tensors", "no seal", in_tensors(_drop("_sha256"), False), AdapterFileError, "lacks its digest"),
    bad("config", "not described", in_config(lambda c: c.pop("saved")), AdapterFileError, "lacks what its file had"),
    bad("config", "other saving", other_saving, AdapterFileError, CHANGED),
    bad("tensors", "one tensor x", one_tensor_x, AdapterFileError, "no tensor of its method|lacks its digest"),
    bad("header", "older, one tensor x", older_with_x, AdapterFileError, "file holds no tensor of its method"),
    tensors("NaN", _fill(float("nan")), "NaN or infinite", error=NonFiniteError),
    tensors("infinity", _fill(float("inf")), "NaN or infinite", error=NonFiniteError),
    tensors("float16", _to(torch.float16), "values have a wrong type"),
    tensors("int64 values", _to(torch.int64), "values have a wrong type"),
    tensors("complex", _to(torch.complex64), "values have a wrong type"),
    tensors("missing module", _drop_module, "file lacks tensors of 1 modules", methods=ACLIP),
    tensors("missing weight", _drop("_weight"), "an adapter has other tensors", methods=ACLIP),
    tensors("missing values", _drop("_values"), "tensors are missing", methods=SAFT),
    tensors("missing indices", _drop("_indices"), "tensors are missing", methods=SAFT),
    tensors("extra tensor", _add("base_model.model.x"), "tensors the adapter does not have"),
    tensors("extra base tensor", _add("base_model.model.logit_scale"), "tensors the adapter does not have"),
    tensors("nowhere", _rename, "an adapter has entries in modules that the model does not have", methods=SAFT),
    tensors("nowhere", _rename, "tensors the adapter does not have", methods=ACLIP),
    tensors("wrong shape", _reshape, "numbers of entries differ", methods=SAFT),
    tensors("wrong shape", _reshape, "tensor has a wrong shape", methods=ACLIP),
    tensors("no dimension", _without_dimension, "numbers of entries differ", methods=SAFT),
    tensors("longer indices", _longer, "numbers of entries differ", methods=SAFT),
    tensors("float indices", _to(torch.float32, "_indices"), "indices have a wrong type", methods=SAFT),
    tensors("index too large", _move(2**30, -1), "an index is outside the module", methods=SAFT),
    tensors("negative index", _move(-1, 0), "an index is outside the module", methods=SAFT),
    tensors("unsorted indices", _swap, "(not strictly increasing|outside the module)", methods=SAFT),
    bad(
        "header",
        "name twice",
        in_header(_twice),
        AdapterFileError,
        "header of a safetensors file is damaged.*there twice",
    ),
    bad("header", "header of nothing", in_bytes(WEIGHTS_FILE, lambda c: b""), AdapterFileError, "no safetensors file"),
    bad(
        "header", "truncated", in_bytes(WEIGHTS_FILE, lambda c: c[:-1]), AdapterFileError, "no whole safetensors file"
    ),
    bad("header", "too long", in_bytes(WEIGHTS_FILE, lambda c: c + b"\0"), AdapterFileError, "no whole safetensors"),
    bad("header", "pickle", in_bytes(WEIGHTS_FILE, lambda c: b"PK\x03\x04" + c), AdapterFileError, "Is it a pickle"),
    bad("place", "pipe", as_pipe, UnsafeFileError, "not a regular file"),
    bad("place", "device", as_device, UnsafeFileError, "not a regular file"),
    bad(
        "config",
        "newer format",
        in_config(lambda c: c["saved"].update(format_version=2)),
        AdapterFileError,
        "format is newer.*: got 2; allowed up to 1. pip install",
    ),
    bad(
        "config",
        "no format",
        in_config(lambda c: c["saved"].pop("format_version")),
        AdapterFileError,
        "unknown format of an adapter",
    ),
    bad(
        "config",
        "no values",
        in_config(lambda c: c["saved"]["base"].update(values="")),
        AdapterFileError,
        "is damaged",
    ),
    bad("config", "no base", in_config(lambda c: c["saved"].pop("base")), AdapterFileError, "lacks its digest or its"),
    bad("config", "list as saved", in_config(lambda c: c.update(saved=[])), AdapterFileError, "holds no settings"),
    bad("config", "key twice", in_config_text("{\n", '{\n"peft_type": "LORA",\n'), AdapterFileError, "there twice"),
    bad("config", "NaN in it", in_config_text('"revision": null', '"revision": NaN'), AdapterFileError, "no finite"),
    bad(
        "config",
        "other structure",
        in_config(lambda c: c["saved"]["base"].update(structure="0")),
        AdapterFileError,
        "another base: names or shapes",
    ),
    bad(
        "config",
        "other values",
        in_config(lambda c: c["saved"]["base"].update(values="AAAA")),
        AdapterFileError,
        "description of an adapter's base is damaged",
    ),
    bad(
        "config",
        "no number",
        in_config(lambda c: c["saved"]["base"].update(values="?")),
        AdapterFileError,
        "description of an adapter's base is damaged",
    ),
    bad(
        "config",
        "huge counts",
        in_config(lambda c: c.update(entry_counts=dict.fromkeys(c["entry_counts"], 3 * 10**8))),
        AdapterFileError,
        "numbers of entries differ",
        SAFT,
    ),
    bad(
        "config",
        "huge pattern",
        in_config(lambda c: c.update(target_modules="(a|a)*" * 2000 + "{999}")),
        ConfigError,
        "braces that are no count|too long|regular expression",
    ),
    bad(
        "config",
        "slow pattern",
        in_config(lambda c: c.update(target_modules="(.*)*" * 12 + "$x")),
        ConfigError,
        "longer than 1 s|matches no module",
    ),
]
