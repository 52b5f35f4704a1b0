# SPDX-License-Identifier: Apache-2.0
"""What each head of the classifier trains, and when it runs the text tower."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_robust.encoders import class_embeds
from hf_robust.encoders.dual_encoder import base_model, logit_bias, logit_scale, text_embeds
from hf_robust.tasks.class_names import ZeroShotClassifier, class_embeddings
from tests.tiny_models import FAMILIES, recompute_activations, tiny_batch, tiny_lora, tiny_model, tiny_processor

NAMES = ["cat", "hummingbird", "ox", "50% {wool}"]
HEADS = ["frozen", "live", "trainable"]


def build(family="clip", head="live", names=NAMES, templates="single", wrap=lambda model: model):
    classifier = ZeroShotClassifier(wrap(tiny_model(family)), tiny_processor(family), names, templates, head)
    return classifier.eval()


@pytest.fixture
def text_runs(monkeypatch):
    """The number of prompts in each run of a text tower."""
    runs = []

    def counted(model, input_ids, attention_mask=None):
        runs.append(len(input_ids))
        return text_embeds(model, input_ids, attention_mask)

    monkeypatch.setattr(class_embeds, "text_embeds", counted)
    return runs


@pytest.mark.parametrize("family", ["clip", "siglip"])  # with and without an attention mask
def test_class_embeddings_of_many_prompts_are_made_in_parts(family, monkeypatch, text_runs):
    model, processor = tiny_model(family), tiny_processor(family)
    whole = class_embeddings(model, processor, NAMES, "digits")
    monkeypatch.setattr(class_embeds, "PROMPTS_AT_ONCE", 6)
    parts = class_embeddings(model, processor, NAMES, "digits")
    assert text_runs == [20, 6, 6, 6, 2]
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


# --- training ---


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", HEADS)
def test_exactly_the_parameters_of_the_forward_are_trainable(family, head):
    classifier = build(family, head).train()
    classifier(**tiny_batch(family, 4), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    with_grad = {name for name, parameter in classifier.named_parameters() if parameter.grad is not None}
    assert with_grad == {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    assert any(name.startswith("model.text_model.") for name in with_grad) == (head == "live")
    assert ("model.logit_scale" in with_grad) == (head != "trainable")
    assert ({"class_head.weight", "class_head.bias"} <= with_grad) == (head == "trainable")
    assert "model.logit_bias" not in with_grad


@pytest.mark.parametrize("head, runs", [("frozen", []), ("live", [4, 4]), ("trainable", [])])
def test_only_the_live_head_runs_the_text_tower_in_training(head, runs, text_runs):
    classifier = build(head=head).train()
    text_runs.clear()
    for _ in range(2):
        classifier(**tiny_batch("clip", 2), labels=torch.tensor([0, 1])).loss.backward()
    assert text_runs == runs


@pytest.mark.parametrize("family", FAMILIES)
def test_live_gradients_reach_the_adapters_of_the_text_tower(family):
    classifier = build(family, wrap=lambda model: tiny_lora(model, init_lora_weights=False)).train()
    classifier(**tiny_batch(family, 4), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    gradients = [p.grad for name, p in classifier.named_parameters() if "text_model" in name and "lora_" in name]
    assert gradients and all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_live_has_gradients_in_eval_mode_too(text_runs):
    """As selection by gradients needs them: without dropout, but through both towers."""
    classifier = build()
    with torch.no_grad():
        classifier(**tiny_batch("clip", 2))  # keeps class embeddings, which have no gradient
    classifier(**tiny_batch("clip", 2), labels=torch.tensor([0, 1])).loss.backward()
    assert classifier.model.text_model.final_layer_norm.weight.grad.abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_trainable_head_starts_as_the_scaled_class_embeddings(family):
    classifier = build(family, "trainable")
    model = classifier.model
    embeds = class_embeddings(model, classifier.processor, NAMES)
    assert isinstance(classifier.class_head, torch.nn.Linear)
    torch.testing.assert_close(classifier.class_head.weight.detach(), logit_scale(model).detach() * embeds)
    bias = logit_bias(model)
    expected = torch.zeros(4) if bias is None else bias.detach().expand(4)
    assert torch.equal(classifier.class_head.bias.detach(), expected)
    assert {"class_head.weight", "class_head.bias"} <= set(classifier.state_dict())


@pytest.mark.parametrize("head", HEADS)
def test_prompts_and_frozen_embeddings_follow_the_device_and_stay_out_of_the_state_dict(head):
    classifier = build(head=head)
    others = [name for name in classifier.state_dict() if not name.startswith("model.")]
    assert others == (["class_head.weight", "class_head.bias"] if head == "trainable" else [])
    classifier.to("meta")
    assert all(buffer.device.type == "meta" for buffer in classifier.buffers())


def test_gradient_checkpointing_changes_no_gradient():
    images, labels = tiny_batch("clip", 4), torch.tensor([0, 1, 2, 3])
    plain, checkpointed = build().train(), build().train()
    recompute_activations(checkpointed)
    assert checkpointed.model.text_model.encoder.layers[0].gradient_checkpointing
    for classifier in (plain, checkpointed):
        classifier(**images, labels=labels).loss.backward()
    for expected, parameter in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


def test_other_classes_are_embedded_by_the_text_tower_as_it_is_now():
    classifier, images = build(), tiny_batch("clip", 3)
    step(classifier)
    with torch.no_grad(), classifier.classes(["bus", "tram"]):
        logits = classifier(**images).logits
        trained = ZeroShotClassifier(classifier.model, classifier.processor, ["bus", "tram"]).eval()
        torch.testing.assert_close(logits, trained(**images).logits)
        assert (logits - build(names=["bus", "tram"])(**images).logits).abs().max() > 1e-3


# --- class embeddings kept by the live head in eval mode ---


def fresh_logits(classifier, images):
    return copy.deepcopy(classifier).train().eval()(**images).logits


def test_kept_class_embeddings_spare_the_text_tower(text_runs):
    classifier = build()
    with torch.no_grad():
        first = classifier(**tiny_batch("clip", 2)).logits
        assert sum(text_runs) == 1 + 4  # one prompt as a probe, all four
        text_runs.clear()
        assert torch.equal(classifier(**tiny_batch("clip", 2)).logits, first)
    assert text_runs == [1]


def step(classifier):
    classifier.train()
    optimizer = torch.optim.AdamW([p for p in classifier.parameters() if p.requires_grad], lr=0.01)
    classifier(**tiny_batch("clip", 4), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    optimizer.step()
    classifier.eval()


def step_in_eval_mode(classifier):
    optimizer = torch.optim.AdamW([p for p in classifier.parameters() if p.requires_grad], lr=0.01)
    classifier(**tiny_batch("clip", 4), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    optimizer.step()


def write_to_a_token_of_the_second_class(classifier):
    token = classifier.processor.tokenizer.convert_tokens_to_ids("u")
    assert token not in classifier.prompts.input_ids[0] and token in classifier.prompts.input_ids[1]
    with torch.no_grad():
        base_model(classifier.model).text_model.get_input_embeddings().weight[token, 0] += 1


def switch_the_adapter_off(classifier):
    classifier.model.base_model.disable_adapter_layers()


def scale_the_adapter(classifier):
    for module in classifier.model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 0.5)


def edit_data(classifier):
    for name, parameter in classifier.named_parameters():
        if "text_model" in name and "lora_B" in name:
            parameter.data.mul_(0.5)


@pytest.mark.parametrize(
    "change",
    [
        step,
        step_in_eval_mode,
        write_to_a_token_of_the_second_class,
        switch_the_adapter_off,
        scale_the_adapter,
        edit_data,
    ],
)
def test_kept_class_embeddings_are_dropped_when_the_text_tower_changes(change):
    classifier = build(wrap=lambda model: tiny_lora(model, init_lora_weights=False))
    images = tiny_batch("clip", 2)
    with torch.no_grad():
        before = classifier(**images).logits
    kept = classifier.prompts._kept[2]
    change(classifier)
    with torch.no_grad():
        after = classifier(**images).logits
        torch.testing.assert_close(after, fresh_logits(classifier, images), atol=1e-6, rtol=0)
    assert (classifier.prompts._kept[2] - kept).abs().max() > 1e-4 and (after - before).abs().max() > 1e-4


def test_a_training_phase_drops_kept_class_embeddings_whoever_wrote_to_the_weights():
    """Some fused optimizers write past autograd, to rows that the first prompt need not have."""
    classifier, images = build(), tiny_batch("clip", 2)
    with torch.no_grad():
        classifier(**images)
        classifier.train()
        token = classifier.processor.tokenizer.convert_tokens_to_ids("u")
        classifier.model.text_model.get_input_embeddings().weight.data[token, 0] += 1
        logits = classifier.eval()(**images).logits
        torch.testing.assert_close(logits, fresh_logits(classifier, images))


def test_what_inference_mode_kept_can_be_used_with_gradients():
    classifier = build()
    with torch.inference_mode():
        classifier(**tiny_batch("clip", 2))
    assert not classifier.prompts._kept[2].is_inference()
