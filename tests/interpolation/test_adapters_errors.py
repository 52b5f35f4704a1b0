# SPDX-License-Identifier: Apache-2.0
"""Everything wise_ft refuses, before it has changed anything."""

from __future__ import annotations

import pytest
import torch
import transformers
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TrainableTokensConfig,
    get_peft_model,
    inject_adapter_in_model,
)

from hf_robust import ACLIPConfig, SAFTConfig
from hf_robust.errors import ConfigError, NonFiniteError, SelectionError
from hf_robust.interpolation.adapters import wise_ft
from tests.methods import CLIP, Method, assert_same, trained
from tests.tiny_models import TRANSFORMER, tiny_model

QV = {"target_modules": ["q_proj", "v_proj"]}
LORA = Method("LoRA", lambda: LoraConfig(r=2, **QV))


def own(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_refused(model, match, error=ConfigError, alpha=0.5):
    before, modules = own(model), len(list(model.modules()))
    with pytest.raises(error, match=match):
        wise_ft(model, alpha)
    assert_same(own(model), before)
    assert len(list(model.modules())) == modules
    assert not any(vars(module).get("_wise_ft") for module in model.modules())


@pytest.mark.parametrize(
    "config, match",
    [
        (LoraConfig(r=2, use_dora=True, **QV), "DoraLinearVariant: its change is not linear in B"),
        (LoraConfig(r=2, init_lora_weights="mica", **QV), "'mica'"),
        (LoraConfig(r=2, init_lora_weights="pissa", **QV), "'pissa'.*changes the base's weights.*merge_and_unload"),
        (LoraConfig(r=2, init_lora_weights="pissa_niter_4", **QV), "'pissa_niter_4'.*changes the base's weights"),
        (LoraConfig(r=2, init_lora_weights="olora", **QV), "'olora'.*changes the base's weights"),
        (LoraConfig(r=2, bias="lora_only", **QV), "bias='lora_only': it trains the base's biases"),
        (LoraConfig(r=2, trainable_token_indices={"token_embedding": [3]}, **QV), "trainable_token_indices"),
        (
            AdaLoraConfig(total_step=10, init_r=4, target_r=2, **QV),
            "cannot scale ADALORA.*allowed SAFT, A-CLIP, R-Adapter",
        ),
        (IA3Config(target_modules=["q_proj", "fc2"], feedforward_modules=["fc2"]), "cannot scale IA3"),
        (OFTConfig(r=2, oft_block_size=0, **QV), "cannot scale OFT"),
        (
            TrainableTokensConfig(token_indices=[3], target_modules=["token_embedding"]),
            "cannot scale TRAINABLE_TOKENS",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else value.peft_type.value,
)
def test_methods_that_alpha_cannot_scale_are_refused_by_name(config, match):
    assert_refused(get_peft_model(tiny_model(CLIP), config), match)


@pytest.mark.filterwarnings("ignore:.*bias.*:UserWarning")
def test_trained_biases_of_the_base_are_refused():
    assert_refused(get_peft_model(tiny_model(CLIP), LoraConfig(r=2, bias="all", **QV)), "bias='all'")


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig])
def test_prompts_are_refused(kind):
    bert = transformers.BertModel(transformers.BertConfig(**TRANSFORMER, vocab_size=20))
    config = kind(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2)
    assert_refused(get_peft_model(bert, config), f"cannot scale {config.peft_type.value}")


def test_layers_are_refused_where_no_config_tells_the_method():
    layers = inject_adapter_in_model(
        OFTConfig(r=2, oft_block_size=0, target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(4, 4))
    )
    assert_refused(torch.nn.ModuleList(layers.children()), r"oft\.layer\.Linear")


def test_an_inactive_method_is_not_asked_about():
    model = get_peft_model(tiny_model(CLIP), LoraConfig(r=2, **QV))
    model.add_adapter("dora", LoraConfig(r=2, use_dora=True, **QV))
    wise_ft(model, 0.5)
    model.set_adapter("dora")
    assert_refused(model, "DoraLinearVariant")


@pytest.mark.parametrize("config", [LORA.config(), ACLIPConfig(), LNTuningConfig(target_modules=["layer_norm1"])])
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_merged_adapters_are_refused(config):
    model = get_peft_model(tiny_model(CLIP), config)
    model.merge_adapter()
    assert_refused(model, "adapters are merged.*unmerge_adapter")
    model.unmerge_adapter()
    wise_ft(model, 0.5)


def test_a_saft_adapter_without_entries_is_refused():
    model = get_peft_model(tiny_model(CLIP), SAFTConfig(density=0.01))
    assert_refused(model, "has not selected its entries.*select_saft", SelectionError)


def test_a_model_without_adapters_is_refused():
    assert_refused(tiny_model(CLIP), "θ₀ of trained parameters is not known.*zero_shot=")
    assert_refused(tiny_model(CLIP).requires_grad_(False), "no active adapter.*zero_shot=")


def test_a_weight_trained_beside_its_adapter_is_refused():
    model = get_peft_model(tiny_model(CLIP), LORA.config())
    model.get_base_model().text_model.encoder.layers[0].self_attn.q_proj.base_layer.bias.requires_grad_(True)
    assert_refused(model, "trained beside its adapter.*q_proj.base_layer.bias")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["lora_A", "lora_B"])
@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_values_that_are_not_finite_are_refused_by_name(key, value, alpha):
    model = get_peft_model(tiny_model(CLIP), LORA.config())
    layer = model.get_base_model().vision_model.encoder.layers[1].self_attn.v_proj
    with torch.no_grad():
        getattr(layer, key)["default"].weight[0, 1] = value
    assert_refused(model, r"vision_model.encoder.layers.1.self_attn.v_proj.*1 of", NonFiniteError, alpha)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), None, "0.5", True])
def test_alpha_must_be_a_share(alpha):
    assert_refused(get_peft_model(tiny_model(CLIP), LORA.config()), "alpha is no share", alpha=alpha)


def test_a_refused_call_leaves_alpha_as_it_was():
    model = trained(LORA)
    tuned = own(model)
    wise_ft(model, 0.5)
    before = own(model)
    model.merge_adapter()
    with pytest.raises(ConfigError, match="merged"):
        wise_ft(model, 0.25)
    model.unmerge_adapter()
    wise_ft(model, 0.5)
    found = own(model)
    assert all(torch.equal(found[name], before[name]) for name in before if "lora" in name)
    wise_ft(model, 1)
    assert all(torch.equal(model.state_dict()[name], tuned[name]) for name in tuned if "lora" in name)


def test_modules_to_save_around_an_adapter_are_refused():
    model = get_peft_model(tiny_model(CLIP), LORA.config())
    model.add_adapter("other", LoraConfig(r=2, target_modules=["fc1"], modules_to_save=["self_attn"]))
    model.set_adapter("other")
    assert_refused(model, "modules_to_save around an adapter.*self_attn")
