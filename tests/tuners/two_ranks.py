# SPDX-License-Identifier: Apache-2.0
"""Run by `test_saft_distributed.py` on two gloo ranks: selection, DDP and FSDP, each against one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel

from hf_robust import SAFTConfig, mask_summary, select_saft
from hf_robust.errors import ConfigError
from tests.tuners.zoo import batches, exact_loss, zoo


def adapted(share: slice) -> nn.Module:
    """A zoo with entries selected from this rank's share of the images."""
    model = get_peft_model(zoo(), SAFTConfig(density=0.2))
    joined = {key: torch.cat([batch[key] for batch in batches()]) for key in batches()[0]}
    select_saft(model, [{key: value[share] for key, value in joined.items()}], exact_loss)
    return model.train()


def trained(model: nn.Module, called: nn.Module, rows: slice) -> list[torch.Tensor]:
    values = [p for n, p in model.named_parameters() if "saft_values" in n]
    optimizer = torch.optim.AdamW(values, lr=1e-2, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        exact_loss(called, {key: value[rows] for key, value in batches()[0].items()}).backward()
        optimizer.step()
    return [value.full_tensor() if hasattr(value, "full_tensor") else value.detach() for value in values]


def same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


def main(folder: str) -> None:
    expected_model = adapted(slice(None))  # before the process group: one process, all images
    expected = trained(expected_model, expected_model, slice(None))
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    uneven = [slice(0, 5), slice(5, None)][rank]
    half = [slice(0, 2), slice(2, 4)][rank]

    model = adapted(uneven)
    assert mask_summary(model) == mask_summary(expected_model)
    indices = [b for n, b in model.named_buffers() if "saft_indices" in n]
    assert all(map(torch.equal, indices, [b for n, b in expected_model.named_buffers() if "saft_indices" in n]))
    found = trained(model, DistributedDataParallel(model, broadcast_buffers=False), half)
    same(found, expected)
    other = [value.clone() for value in found]
    for value in other:
        dist.broadcast(value, 0)
    assert all(map(torch.equal, found, other)), "ranks differ"

    model = adapted(uneven)
    fully_shard(model.base_model.model.tower.patches)
    fully_shard(model, ignored_params={model.base_model.model.scale})
    same(trained(model, model, half), expected)
    with model.disable_adapter(), torch.no_grad():
        batch = batches()[0]
        logits = model(batch["pixel_values"], batch["ids"])
        torch.testing.assert_close(logits, zoo()(batch["pixel_values"], batch["ids"]), rtol=0, atol=0)

    model = adapted(uneven)
    flat = {"use_orig_params": True, "ignored_states": [model.base_model.model.scale]}
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), **flat)
    with pytest.raises(ConfigError, match="no parameters.*FSDP2.*fsdp_version: 2"):
        exact_loss(wrapped, batches()[0])
    print("two ranks agree")
