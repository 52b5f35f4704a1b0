# SPDX-License-Identifier: Apache-2.0
"""wise_ft of classifiers and of models trained whole."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from hf_robust import SAFTConfig, select_saft
from hf_robust.errors import ConfigError, MergeError, NonFiniteError
from hf_robust.interpolation.adapters import wise_ft, zero_shot_heads
from hf_robust.tasks.class_names import ZeroShotClassifier
from tests.methods import all_families, same_bits
from tests.tiny_models import tiny_batch, tiny_model, tiny_processor

NAMES = ["red", "green", "blue"]
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "query", "value"])


def classifier(head, family="clip", config=LORA, **settings):
    model = tiny_model(family, **settings)
    model = model if config is None else get_peft_model(model, config)
    built = ZeroShotClassifier(model, tiny_processor(family), NAMES, "a {}.", head).eval()
    if isinstance(config, SAFTConfig):
        select_saft(built, [{**tiny_batch(family, 4), "labels": labels()}], lambda m, b: m(**b).loss)
    return built


def labels():
    return torch.tensor([0, 1, 2, 0])


def fit(model, family="clip", steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(**tiny_batch(family, 4)).logits, labels()).backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def logits(model, family="clip"):
    return model(**tiny_batch(family, 4)).logits


def copies(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@all_families
def test_a_trainable_head_goes_back_to_the_head_of_the_class_names(family):
    model = classifier("trainable", family)
    zero_shot, built = logits(model, family), copies(model.class_head)
    fit(model, family)
    tuned, trained = logits(model, family), copies(model.class_head)
    heads = zero_shot_heads(model, {})
    assert all(same_bits(heads[f"class_head.{name}"], tensor) for name, tensor in built.items())
    wise_ft(model, 0.25)
    for name, tensor in model.class_head.state_dict().items():
        expected = 0.75 * built[name].double() + 0.25 * trained[name].double()
        torch.testing.assert_close(tensor, expected.float(), rtol=1e-7, atol=1e-9)
    wise_ft(model, 0)
    assert same_bits(logits(model, family), zero_shot)
    wise_ft(model, 1)
    assert same_bits(logits(model, family), tuned) and not torch.equal(tuned, zero_shot)


def test_the_head_is_that_of_theta0_though_adapters_in_the_text_tower_are_tuned():
    trained = fit(classifier("live"))
    model = ZeroShotClassifier(trained.model, tiny_processor("clip"), NAMES, "a {}.", "trainable").eval()
    flags = [parameter.requires_grad for parameter in model.parameters()]
    wise_ft(model, 0)
    assert same_bits(logits(model), logits(classifier("trainable")))
    assert flags == [parameter.requires_grad for parameter in model.parameters()]


def test_a_linear_probe_needs_no_zero_shot_weights():
    model = classifier("trainable", config=None)
    model.model.requires_grad_(False)
    zero_shot = logits(model)
    tuned = logits(fit(model))
    wise_ft(model, 0)
    assert same_bits(logits(model), zero_shot)
    wise_ft(model, 1)
    assert same_bits(logits(model), tuned)


@pytest.mark.parametrize("config", [LORA, SAFTConfig(density=0.02)], ids=lambda config: config.peft_type.value)
def test_a_live_head_follows_at_once_in_eval_mode(config):
    model = fit(classifier("live", config=config))
    found = {}
    for alpha in (1, 0.5, 0, 0.5, 1):
        wise_ft(model, alpha)
        kept = logits(model)
        assert same_bits(logits(model.eval()), kept)  # eval() forgets the kept class embeddings
        assert same_bits(found.setdefault(alpha, kept), kept)
    assert same_bits(found[0], logits(classifier("live", config=None)))
    assert not torch.equal(found[0.5], found[1])


def test_a_frozen_head_is_refused_only_where_its_text_tower_is_tuned():
    model = classifier("frozen")
    zero_shot = logits(model)
    fit(model)
    wise_ft(model, 0)
    assert same_bits(logits(model), zero_shot)
    tuned = fit(classifier("live"))
    model = ZeroShotClassifier(tuned.model, tiny_processor("clip"), NAMES, "a {}.", "frozen").eval()
    before = logits(model)
    with pytest.raises(ConfigError, match="frozen head"):
        wise_ft(model, 0.5)
    assert same_bits(logits(model), before)


# --- models trained whole ---


@pytest.mark.parametrize("head", ["live", "trainable", "frozen"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_full_fine_tuning_is_the_official_formula(family, head):
    model = classifier(head, family, config=None).double()
    zero_shot, before = copies(model), logits_of(model, family)
    fit_double(model, family)
    tuned, after = copies(model), logits_of(model, family)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for alpha in (0.3, 0.8):
        wise_ft(model, alpha, zero_shot)
        for name, tensor in model.state_dict().items():
            expected = (1 - alpha) * zero_shot[name] + alpha * tuned[name]
            torch.testing.assert_close(tensor, expected.to(tensor.dtype), rtol=1e-14, atol=1e-15)
            assert name in trained or same_bits(tensor, tuned[name])
    assert "model.logit_scale" in trained or head == "trainable"
    wise_ft(model, 0, zero_shot)
    assert same_bits(logits_of(model, family), before)
    wise_ft(model, 1, zero_shot)
    assert same_bits(logits_of(model, family), after)


@torch.no_grad()
def logits_of(model, family):
    inputs = tiny_batch(family, 4)
    return model(inputs["pixel_values"].double()).logits


def fit_double(model, family):
    inputs = tiny_batch(family, 4)["pixel_values"].double()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(inputs).logits, labels()).backward()
        optimizer.step()
    model.eval()


def test_wrong_zero_shot_weights_are_refused_and_nothing_is_changed():
    model = classifier("live", config=None)
    zero_shot = copies(model)
    fit(model)
    before = copies(model)
    name = "model.visual_projection.weight"

    def refused(error, match, given):
        with pytest.raises(error, match=match):
            wise_ft(model, 0.5, given)
        assert all(same_bits(tensor, before[key]) for key, tensor in model.state_dict().items())

    refused(ConfigError, "θ₀ of trained parameters is not known.*model.logit_scale", None)
    refused(MergeError, "zero_shot lacks 78 trained parameters.*model.logit_scale.*\\(\\+73 more\\)", {})
    refused(MergeError, f"another form.*{name}", {**zero_shot, name: zero_shot[name][:1]})
    refused(MergeError, f"another form.*{name}", {**zero_shot, name: zero_shot[name].half()})
    refused(
        NonFiniteError, f"{name} in the zero-shot", {**zero_shot, name: torch.full_like(zero_shot[name], torch.inf)}
    )
    refused(MergeError, "shares the model's memory", model.state_dict())
    model.model.logit_scale.data.fill_(torch.nan)
    before = copies(model)
    refused(NonFiniteError, "model.logit_scale", zero_shot)


def test_a_parameter_trained_beside_an_adapter_needs_its_zero_shot_value():
    model = classifier("live")
    model.model.get_base_model().logit_scale.requires_grad_(True)
    name = "model.base_model.model.logit_scale"
    zero_shot = {name: dict(model.named_parameters())[name].detach().clone()}
    before = logits(model)
    tuned = logits(fit(model))
    with pytest.raises(ConfigError, match=name):
        wise_ft(model, 0.5)
    wise_ft(model, 0, zero_shot)
    assert same_bits(logits(model), before)
    wise_ft(model, 1, zero_shot)
    assert same_bits(logits(model), tuned)


def test_tied_parameters_stay_tied():
    model = tiny_model("clip")
    model.text_model.twin = model.text_model.final_layer_norm
    zero_shot = copies(model)
    with torch.no_grad():
        model.text_model.twin.weight.add_(1)
    wise_ft(model, 0.5, zero_shot)
    assert model.text_model.twin.weight is model.text_model.final_layer_norm.weight
    expected = zero_shot["text_model.final_layer_norm.weight"] + 0.5
    torch.testing.assert_close(model.text_model.twin.weight.detach(), expected)


def test_changed_buffers_are_refused():
    model = torch.nn.BatchNorm1d(3)
    zero_shot = copies(model)
    model(torch.randn(4, 3))
    with pytest.raises(ConfigError, match="buffers have changed.*running_mean"):
        wise_ft(model, 0.5, zero_shot)
