# SPDX-License-Identifier: Apache-2.0
"""Any change of a saved adapter's files is refused, or changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from hf_robust.errors import HfRobustError
from hf_robust.tuners.files import CONFIG_FILE, WEIGHTS_FILE

from ..methods import same_bits
from .bad_files import forged, join_header, split_header
from .tiny_adapters import CONFIGS, Tiny, save_tiny


@pytest.fixture(scope="module", params=CONFIGS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return save_tiny(request.param, tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_any_flipped_bit_is_refused_or_changes_nothing(tiny: Tiny, name: str) -> None:
    tiny.restore()
    path = tiny.folder / name
    content = path.read_bytes()
    wrong = []
    with path.open("r+b", buffering=0) as file:
        for position, byte in enumerate(content):
            for bit in range(8):
                file.seek(position)
                file.write(bytes([byte ^ 1 << bit]))
                if not tiny.is_refused_or_same():
                    wrong.append((position, bit))
            file.seek(position)
            file.write(bytes([byte]))
    assert wrong == []
    assert same_bits(tiny.load(), tiny.outputs)


# --- structure-aware ---------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["a", "b", "saft_values", "aclip_weight", "F32", "I64", "F4", "", "base_model.model.x", "\0", "é"]
)
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False), st.integers(-3, 40)
)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=4,
)
DTYPES = st.sampled_from(
    [torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]
)


def change_json(draw: st.DrawFn, tree: dict) -> None:
    """Replaces, drops, adds or renames something anywhere in a tree of dicts."""
    while True:
        name = draw(st.sampled_from(sorted(tree)))
        if not isinstance(tree[name], dict) or not tree[name] or draw(st.integers(0, 3)) == 0:
            break
        tree = tree[name]
    kind = draw(st.sampled_from(["replace", "drop", "add", "rename", "text"]))
    value = tree[name]
    if kind == "text" and isinstance(value, str) and value:
        place = draw(st.integers(0, len(value) - 1))
        tree[name] = value[:place] + draw(st.characters(codec="utf-8")) + value[place + 1 :]
    elif kind == "add":
        tree[draw(WORDS)] = draw(JSON)
    elif kind in ("drop", "rename"):
        del tree[name]
        tree |= {draw(WORDS): value} if kind == "rename" else {}
    else:
        tree[name] = draw(JSON)


def change_tensors(draw: st.DrawFn, tensors: dict[str, Tensor]) -> None:
    name = draw(st.sampled_from(sorted(tensors)))
    tensor = tensors[name]
    kind = draw(st.sampled_from(["value", "type", "shape", "longer", "drop", "add", "rename", "swap"]))
    if kind == "value" and tensor.numel():
        number = draw(st.floats(width=32)) if tensor.is_floating_point() else draw(st.integers(-1, 8)) % 256
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = number
    elif kind == "type":
        tensors[name] = (tensor.abs() if tensor.is_complex() else tensor).to(draw(DTYPES))
    elif kind == "shape":
        tensors[name] = tensor.reshape(draw(st.sampled_from([(-1,), (1, -1), (-1, 1), (1, 1, -1)])))
    elif kind == "longer":
        tensors[name] = torch.cat([tensor, tensor])[: draw(st.integers(0, 2 * len(tensor)))]
    elif kind == "add":
        tensors[draw(WORDS) + draw(WORDS)] = torch.ones(draw(st.integers(0, 3)))
    elif kind == "swap":
        other = draw(st.sampled_from(sorted(tensors)))
        tensors[name], tensors[other] = tensors[other], tensor.clone()
    else:
        del tensors[name]
        tensors |= {draw(WORDS): tensor} if kind == "rename" else {}


@st.composite
def changes(draw: st.DrawFn, whole: Tiny) -> tuple[dict, bytes, bool]:
    """Files of an adapter with something changed; and whether their digests were made to fit."""
    config, content = json.loads(json.dumps(whole.config_file)), whole.weights
    kind = draw(st.sampled_from(["config", "header", "bytes", "tensors", "tensors and digest"]))
    if kind == "config":
        for _ in range(draw(st.integers(1, 2))):
            change_json(draw, config)
    elif kind == "header":
        header, rest = split_header(content)
        tree = json.loads(header)
        change_json(draw, tree)
        content = join_header(json.dumps(tree).encode(), rest)
    elif kind == "bytes":
        start, length = draw(st.integers(0, len(content))), draw(st.integers(0, 9))
        content = content[:start] + draw(st.binary(max_size=9)) + content[start + length :]
    else:
        tensors = load(content)
        for _ in range(draw(st.integers(1, 2))):
            change_tensors(draw, tensors)
        if kind == "tensors":
            content = save(tensors)
        else:
            content, config = forged(tensors, config)
    return config, content, kind == "tensors and digest"


@settings(max_examples=1500)
@given(data=st.data())
def test_any_changed_file_gives_a_typed_error_or_the_same_adapter(tiny: Tiny, data: st.DataObject) -> None:
    config, content, has_digest = data.draw(changes(tiny))
    (tiny.folder / CONFIG_FILE).write_text(json.dumps(config))
    (tiny.folder / WEIGHTS_FILE).write_bytes(content)
    try:
        found = tiny.load()
    except HfRobustError:
        pass
    else:  # with digests that fit, it is another adapter, and a whole one
        assert has_digest or same_bits(found, tiny.outputs)
