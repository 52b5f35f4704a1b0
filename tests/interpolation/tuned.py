# SPDX-License-Identifier: Apache-2.0
"""The methods that WiSE-FT scales, each trained once."""

from __future__ import annotations

import copy
import functools

import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, ShiraConfig
from torch import Tensor, nn

from hf_robust import ACLIPConfig, RAdapterConfig, SAFTConfig
from tests.methods import CLIP, Method, trained

ATTENTION = ["q_proj", "v_proj", "query", "value"]
LAYER_NORMS = ["layer_norm1", "layer_norm2", "pre_layrnorm", "post_layernorm", "final_layer_norm"]
SAFT = Method("SAFT", lambda: SAFTConfig(density=0.02))
ACLIP = Method("A-CLIP", lambda: ACLIPConfig(modules_to_save=["visual_projection"]))
LORA = Method("LoRA", lambda: LoraConfig(r=2, target_modules=ATTENTION, modules_to_save=["visual_projection"]))
RANKS = {"rank_pattern": {"fc1": 3}, "alpha_pattern": {"fc1": 5}}
RSLORA = Method("rsLoRA", lambda: LoraConfig(r=2, target_modules=["q_proj", "fc1"], use_rslora=True, **RANKS))
SHIRA = Method("SHiRA", lambda: ShiraConfig(r=1, target_modules=["q_proj", "fc2"], random_seed=0))
AVERAGED = {"scale": 1.0, "average_decay": 0.5}
METHODS = [
    SAFT,
    ACLIP,
    Method("R-Adapter", lambda: RAdapterConfig(**AVERAGED)),
    Method("R-Adapter, low rank", lambda: RAdapterConfig(r=2, modules_to_save=["visual_projection"], **AVERAGED)),
    Method("R-Adapter, not averaged", lambda: RAdapterConfig(scale=1.0, average_decay=None)),
    LORA,
    RSLORA,
    Method("LoRA with bias", lambda: LoraConfig(r=2, target_modules=["q_proj", "fc1"], lora_bias=True)),
    Method("LoRA on inputs", lambda: LoraConfig(r=2, target_modules=["token_embedding", "patch_embedding", "k_proj"])),
    Method("orthogonal LoRA", lambda: LoraConfig(r=2, target_modules=["fc1"], init_lora_weights="orthogonal")),
    SHIRA,
    Method("LN tuning", lambda: LNTuningConfig(target_modules=LAYER_NORMS)),
]


@functools.cache
def _tuned(method: Method, family: str, dtype: torch.dtype) -> PeftModel:
    with torch.random.fork_rng(devices=[]):  # the same, and the same random state after it, in any order of the tests
        torch.manual_seed(0)
        return trained(method, family, dtype)


def tuned(method: Method, family: str = CLIP, dtype: torch.dtype = torch.float32) -> PeftModel:
    """A copy of the trained model: training takes most of a test's time."""
    return copy.deepcopy(_tuned(method, family, dtype))


def own(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
