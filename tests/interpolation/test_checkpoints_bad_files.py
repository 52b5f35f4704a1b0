# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import shutil
import socket
import struct

import pytest
import torch
from safetensors.torch import save_file

from hf_robust.errors import MergeError, UnsafeFileError
from tests.interpolation.folders import pair, put, refused, save, save_pair

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folders(tmp_path):
    return save_pair(tmp_path)


def edit(path, change):
    """Rewrites a JSON file."""
    parsed = json.loads(path.read_text())
    change(parsed)
    path.write_text(json.dumps(parsed))


def shards(folders):
    return sorted((folders / "b").glob("*.safetensors"))


QUANTISED = {
    "a.quant_state.nf4": torch.ones(1),
    "a.absmax": torch.ones(1),
    "a.SCB": torch.ones(1),
    "a.qweight": torch.ones(1, dtype=torch.int32),
    "a.qzeros": torch.ones(1, dtype=torch.int32),
    "a.scales": torch.ones(1),
    "a.weight_format": torch.ones(1),
    "int": torch.ones(1, dtype=torch.int8),
    "packed": torch.ones(1, dtype=torch.uint8),
    "float8": torch.ones(1).to(torch.float8_e4m3fn),
    "complex": torch.ones(1, dtype=torch.complex64),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised(folders, name):
    for side in "ab":
        put(folders, side, **{name: QUANTISED[name]})
    refused(folders, MergeError, f"'{name}' of type .* looks quantised.*unquantised")


def test_quantisation_in_the_configuration(folders):
    save(folders / "a", pair()[0], config={"quantization_config": {"load_in_4bit": True}})
    refused(folders, MergeError, "model is quantised.*config.json")


ONE = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HEADERS = {
    "not JSON": b"{nonsense",
    "not JSON but an array": b"[]",
    "not UTF-8": b'{"\xff": 1}',
    "too deep": b'{"a":' + b"[" * 100_000,
    "a long number": b'{"a": ' + b"1" * 5000 + b"}",
    "a name twice": b'{"w":' + ONE + b',"w":' + ONE + b"}",
    "a shape that does not fit": b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}',
    "a negative shape": b'{"w":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}',
    "a shape of bools": b'{"w":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
    "an offset missing": b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0]}}',
    "a hole": b'{"w":{"dtype":"F16","shape":[1],"data_offsets":[2,4]}}',
    "an overlap": b'{"v":' + ONE + b',"w":' + ONE + b"}",
    "values missing": b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "values too many": b'{"w":{"dtype":"F16","shape":[1],"data_offsets":[0,2]}}',
    "a field missing": b'{"w":{"shape":[1],"data_offsets":[0,4]}}',
    "no entry": b'{"w":3}',
    "metadata of numbers": b'{"__metadata__":{"a":1},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
    "a leading space": b' {"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("name", HEADERS)
def test_damaged_header(folders, name):
    header = HEADERS[name]
    (folders / "a" / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    refused(folders, MergeError, "file is damaged.*model.safetensors")


@pytest.mark.parametrize("text", [b"", b"1234567", struct.pack("<Q", 2**63), struct.pack("<Q", 0), b"PK\3\4zip file"])
def test_damaged_file(folders, text):
    (folders / "a" / WEIGHTS).write_bytes(text)
    refused(folders, MergeError, "file is damaged: got 'a header of|file is damaged .*a header of")


def test_cut_file(folders):
    data = (folders / "a" / WEIGHTS).read_bytes()
    for cut in range(0, len(data), 7):
        (folders / "a" / WEIGHTS).write_bytes(data[:cut])
        refused(folders, MergeError, "file is damaged")


def test_pickles_are_not_read(folders):
    (folders / "a" / WEIGHTS).rename(folders / "a" / "pytorch_model.bin")
    refused(folders, UnsafeFileError, "pickled.*save_pretrained")
    (folders / "a" / "pytorch_model.bin").unlink()
    refused(folders, MergeError, "folder has no model.safetensors")


ELSEWHERE = [
    "../a/model.safetensors",
    "/etc/x.safetensors",
    "x.bin",
    r"\\host\x.safetensors",
    "b/../x.safetensors",
    "",
    3,
]


@pytest.mark.parametrize("shard", ELSEWHERE)
def test_index_names_a_file_elsewhere(folders, shard):
    edit(folders / "b" / INDEX, lambda index: index["weight_map"].update({"logit_scale": shard}))
    refused(folders, UnsafeFileError, "index names a shard that is no file of its folder")


def test_index_and_shards_disagree(folders):
    first, second = shards(folders)
    index = (folders / "b" / INDEX).read_text()
    edit(folders / "b" / INDEX, lambda index: index["weight_map"].update({"logit_scale": first.name}))
    refused(folders, MergeError, "disagree on 1 tensors.*logit_scale in .*2-of-.* instead of .*1-of")
    edit(folders / "b" / INDEX, lambda index: index["weight_map"].pop("logit_scale"))
    refused(folders, MergeError, "disagree on 1 tensors.*logit_scale in .* instead of None")
    edit(folders / "b" / INDEX, lambda index: index["weight_map"].update(logit_scale=second.name, other=second.name))
    refused(folders, MergeError, "disagree on 1 tensors.*other in None instead of")
    (folders / "b" / INDEX).write_text(index.replace("{", '{"weight_map": {}, ', 1))
    refused(folders, MergeError, "damaged.*'weight_map' is there twice")
    (folders / "b" / INDEX).write_text("{}")
    refused(folders, MergeError, "index has no weight_map")


def test_shard_is_missing_or_holds_a_tensor_again(folders):
    first, second = shards(folders)
    save_file(pair()[1], first)
    refused(folders, MergeError, "tensor is in two files.*got ")
    first.unlink()
    refused(folders, MergeError, "weight file is missing.*1-of-00002")


@pytest.mark.parametrize("name", ["a/" + WEIGHTS, "b/" + INDEX])
def test_not_a_regular_file(folders, name):
    (folders / name).unlink()
    os.mkfifo(folders / name)
    refused(folders, UnsafeFileError, f"not a regular file.*{name}")
    (folders / name).unlink()
    (folders / name).mkdir()
    refused(folders, UnsafeFileError, f"not a regular file.*{name}")


@pytest.mark.parametrize("side", ["a", "b"])
def test_no_configuration(folders, side):
    (folders / side / "config.json").write_text("[]")
    refused(folders, MergeError, f"damaged.*/{side}/config.json.*no JSON object but a list")
    (folders / side / "config.json").unlink()
    refused(folders, MergeError, f"folder has no config.json.*/{side}")
    os.mkfifo(folders / side / "config.json")
    refused(folders, MergeError, "folder has no config.json")


def test_sockets_are_not_opened(folders, monkeypatch):
    (folders / "a" / WEIGHTS).unlink()
    monkeypatch.chdir(folders / "a")  # the name of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(WEIGHTS)
        refused(folders, UnsafeFileError, "not a regular file")


def test_no_checkpoint(folders):
    (folders / "a" / "adapter_config.json").write_text("{}")
    refused(folders, MergeError, "holds an adapter.*hf-robust merge")
    shutil.rmtree(folders / "a")
    refused(folders, MergeError, "no such folder")
