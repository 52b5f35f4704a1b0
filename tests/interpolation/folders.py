# SPDX-License-Identifier: Apache-2.0
"""Small checkpoints on disk, and what a folder holds."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_robust.interpolation.checkpoints import interpolate_checkpoints


def save(folder, tensors, shards=1, config=None):
    """Writes tensors as transformers does: in one file, or dealt out to `shards` files with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "clip"}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = [f"model-{number:05}-of-{shards:05}.safetensors" for number in range(1, shards + 1)]
    for number, name in enumerate(names):
        shard = {key: tensors[key] for key in list(tensors)[number::shards]}
        save_file(shard, folder / name, metadata={"format": "pt"})
    weight_map = {key: names[number % shards] for number, key in enumerate(tensors)}
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def load(folder):
    """All tensors of all weight files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def content(folder):
    """Every file below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def pair(seed=0):
    """Tensors of a zero-shot and a fine-tuned model: of three float types, without dimensions, empty, and integers."""
    return [
        {
            "tower.weight": torch.randn(5, 7, generator=generator),
            "tower.half": torch.randn(9, generator=generator).half(),
            "tower.brain": torch.randn(3, 2, generator=generator).bfloat16(),
            "logit_scale": torch.randn((), generator=generator),
            "empty": torch.zeros(0, 3),
            "steps": torch.randint(100, (4,), generator=generator),
            "mask": torch.randint(2, (3,), generator=generator).bool(),
        }
        for generator in (torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1))
    ]


def same(first, second):
    """Whether tensors by name are the same bit for bit."""
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and first[name].reshape(-1).view(torch.uint8).equal(second[name].reshape(-1).view(torch.uint8))
        for name in first
    )


def save_pair(folder):
    """Two checkpoints that fit each other, `a` in one file and `b` in two shards, and an output that exists."""
    first, second = pair()
    save(folder / "a", first)
    save(folder / "b", second, shards=2)
    (folder / "out").mkdir()
    (folder / "out" / "old").write_text("old")
    return folder


def refused(folders, error, message, alpha=0.5, out="out", **settings):
    """Merging is refused; afterwards all files are what they were, and no others are there."""
    before = content(folders)
    with pytest.raises(error, match=message):
        interpolate_checkpoints(folders / "a", folders / "b", folders / out, alpha, overwrite=True, **settings)
    assert content(folders) == before
    assert not list(folders.glob(".hf_robust-tmp-*"))


def put(folders, side, **changes):
    """Saves one side anew in one file, with tensors added, replaced, or (None) taken away."""
    tensors = {**pair()["ab".index(side)], **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
    shutil.rmtree(folders / side)
    save(folders / side, {name: tensor for name, tensor in tensors.items() if tensor is not None})
