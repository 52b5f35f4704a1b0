# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from tokenizers.processors import TemplateProcessing
from torch import nn

from hf_robust.encoders.dual_encoder import (
    FAMILIES as ROWS,
)
from hf_robust.encoders.dual_encoder import (
    base_model,
    family,
    image_embeds,
    input_embeddings,
    is_dual_encoder,
    logit_bias,
    logit_scale,
    text_embeds,
    tokenize,
    tower_modules,
)
from hf_robust.errors import ConfigError, DataError
from tests.tiny_models import FAMILIES, tiny_batch, tiny_lora, tiny_model, tiny_processor

PROMPTS = ["a photo of a cat.", "a photo of a hummingbird.", "an ox"]


def lora(model: nn.Module) -> PeftModel:
    return tiny_lora(model, init_lora_weights=False)  # so that the adapters change the outputs


@pytest.fixture(params=["plain", "lora"])
def wrap(request):
    return {"plain": lambda model: model, "lora": lora}[request.param]


def test_every_family_of_the_table_has_a_tiny_model():
    assert sorted(FAMILIES) == sorted(ROWS)


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_scale_and_bias_give_the_models_own_logits(name, wrap):
    model = wrap(tiny_model(name))
    images, prompts = tiny_batch(name, 4), tokenize(tiny_processor(name), PROMPTS, model)
    with torch.no_grad():
        own = base_model(model)(**images, **prompts)
        image, text = image_embeds(model, **images), text_embeds(model, **prompts)
        bias = logit_bias(model)
        logits = logit_scale(model) * image @ text.T + (0 if bias is None else bias)
    torch.testing.assert_close(image, own.image_embeds)
    torch.testing.assert_close(text, own.text_embeds)
    torch.testing.assert_close(logits, own.logits_per_image)
    torch.testing.assert_close(image.norm(dim=-1), torch.ones(4))
    assert (bias is not None) == name.startswith("siglip")


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_take_part(name):
    model = lora(tiny_model(name))
    images, prompts = tiny_batch(name, 2), tokenize(tiny_processor(name), PROMPTS, model)
    with torch.no_grad():
        adapted = image_embeds(model, **images), text_embeds(model, **prompts)
        with model.disable_adapter():
            base = image_embeds(model, **images), text_embeds(model, **prompts)
        frozen = tiny_model(name).requires_grad_(False)  # as PEFT leaves it: SigLIP's pooling rounds otherwise
        expected = image_embeds(frozen, **images), text_embeds(frozen, **prompts)
    for with_adapter, without, plain in zip(adapted, base, expected, strict=True):
        assert (with_adapter - without).abs().max() > 1e-3
        assert torch.equal(without, plain)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "dtype, expected",
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_results_are_float32_or_better(name, dtype, expected):
    model = tiny_model(name).to(dtype)
    prompts = tokenize(tiny_processor(name), PROMPTS, model)
    with torch.no_grad():
        image, text = image_embeds(model, **tiny_batch(name, 2)), text_embeds(model, **prompts)
        assert image.dtype == text.dtype == logit_scale(model).dtype == expected
    assert (image.norm(dim=-1) - 1).abs().max() < 1e-6  # normalised after the cast, not before


@pytest.mark.parametrize("name, legacy_eos", [("clip", False), ("clip", True), ("metaclip_2", False)])
def test_padding_to_the_longest_prompt_changes_nothing_where_the_tower_pools_at_eos(name, legacy_eos):
    model, processor = tiny_model(name, legacy_eos=legacy_eos), tiny_processor(name, legacy_eos=legacy_eos)
    short = tokenize(processor, PROMPTS, model)
    full = processor.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt")
    assert short["input_ids"].shape[1] < 30 and full["input_ids"].shape[1] == 77
    with torch.no_grad():
        expected = text_embeds(model, full["input_ids"], full["attention_mask"])
        torch.testing.assert_close(text_embeds(model, **short), expected, atol=1e-5, rtol=0)
        alone = text_embeds(model, **tokenize(processor, PROMPTS[2:], model))
    torch.testing.assert_close(alone, expected[2:], atol=1e-5, rtol=0)


def test_padding_to_the_longest_prompt_changes_nothing_behind_an_attention_mask():
    name = "vision-text-dual-encoder"
    model, processor = tiny_model(name), tiny_processor(name)
    with torch.no_grad():
        together = text_embeds(model, **tokenize(processor, PROMPTS, model))
        for prompt, embed in zip(PROMPTS, together, strict=True):
            alone = text_embeds(model, **tokenize(processor, [prompt], model))
            torch.testing.assert_close(alone[0], embed, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_siglip_prompts_have_full_length_and_no_mask(name):
    model, processor = tiny_model(name), tiny_processor(name)
    tokens = tokenize(processor, PROMPTS, model)
    assert list(tokens) == ["input_ids"] and tokens["input_ids"].shape == (3, 64)
    shorter = tokens["input_ids"][:, :30]
    with torch.no_grad():  # why: the tower pools at the last position
        assert (text_embeds(model, shorter) - text_embeds(model, **tokens)).abs().max() > 0.01


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_padded_on_the_right_whatever_the_tokenizer_prefers(name):
    model, processor = tiny_model(name), tiny_processor(name)
    expected = tokenize(processor, PROMPTS, model)
    processor.tokenizer.padding_side = "left"
    assert torch.equal(tokenize(processor, PROMPTS, model)["input_ids"], expected["input_ids"])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_longer_than_the_tower_is_refused(name):
    with pytest.raises(DataError, match="longer than the text tower.*tokens"):
        tokenize(tiny_processor(name), ["an ox", "a photo of a " + "very " * 30 + "big ox"], tiny_model(name))


WITHOUT_END = {  # a text tower, and a tokenizer that does not end a prompt as it needs
    "clip": (lambda: tiny_model("clip"), lambda: without_end("clip")),
    "clip of old, without": (lambda: tiny_model("clip", legacy_eos=True), lambda: without_end("clip", True)),
    "clip of old, not the largest": (lambda: tiny_model("clip", legacy_eos=True), lambda: tiny_processor("clip")),
    "metaclip_2": (lambda: tiny_model("metaclip_2"), lambda: without_end("metaclip_2")),
}


def without_end(name, legacy_eos=False):
    processor = tiny_processor(name, legacy_eos)
    processor.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=["$A"], special_tokens=[])
    return processor


@pytest.mark.parametrize("name", WITHOUT_END)
def test_prompts_without_the_token_at_which_the_tower_pools_are_refused(name):
    model, processor = (make() for make in WITHOUT_END[name])
    with pytest.raises(ConfigError, match="ends no prompt.*processor.tokenizer.*AutoProcessor"):
        tokenize(processor, PROMPTS, model)


@pytest.mark.parametrize("name", FAMILIES)
def test_tokens_that_the_tower_does_not_know_are_refused(name):
    processor = tiny_processor(name)
    processor.tokenizer.add_tokens([f"word{number}" for number in range(600)])
    tokenize(processor, PROMPTS, tiny_model(name))
    with pytest.raises(ConfigError, match=r"does not know.*allowed below \d+"):
        tokenize(processor, [*PROMPTS, "word599"], tiny_model(name))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_without_images_is_refused(name):
    inputs = {key: tensor[:0] for key, tensor in tiny_batch(name, 2).items()}
    with pytest.raises(DataError, match=r"batch has no images.*got \(0, "):
        image_embeds(tiny_model(name), **inputs)


def test_siglip2_ignores_padded_patches():
    model, batch = tiny_model("siglip2"), tiny_batch("siglip2", 2)
    padding = batch["pixel_attention_mask"] == 0
    assert padding.any()
    with torch.no_grad():
        expected = image_embeds(model, **batch)
        batch["pixel_values"][padding] = 5.0
        torch.testing.assert_close(image_embeds(model, **batch), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_tower_modules_divide_the_parameters_by_what_they_are_used_for(name, wrap):
    model = wrap(tiny_model(name)).requires_grad_(True)
    base = base_model(model)
    image_embeds(model, **tiny_batch(name, 2)).sum().backward()
    vision = {key for key, parameter in base.named_parameters() if parameter.grad is not None}
    base.zero_grad()
    text_embeds(model, **tokenize(tiny_processor(name), PROMPTS, model)).sum().backward()
    text = {key for key, parameter in base.named_parameters() if parameter.grad is not None}
    assert vision == below(base, tower_modules(model, "vision"))
    assert text == below(base, tower_modules(model, "text"))
    rest = {key for key, _ in base.named_parameters()} - below(base, tower_modules(model, "both"))
    assert rest == ({"logit_scale", "logit_bias"} if name.startswith("siglip") else {"logit_scale"})


def below(base: nn.Module, modules: list[str]) -> set[str]:
    return {f"{name}.{key}" for name in modules for key, _ in base.get_submodule(name).named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_input_embeddings_see_pixels_and_token_ids(name, wrap):
    model = wrap(tiny_model(name))
    images, prompts = tiny_batch(name, 2), tokenize(tiny_processor(name), PROMPTS, model)
    seen = []
    for module in input_embeddings(model):
        module.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    with torch.no_grad():
        image_embeds(model, **images)
        text_embeds(model, **prompts)
    assert (
        len(seen) == 2 and torch.equal(seen[0], images["pixel_values"]) and torch.equal(seen[1], prompts["input_ids"])
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_query_key_and_value_names_match_both_towers_and_nothing_else(name):
    model = tiny_model(name)
    matches = [key for key, _ in model.named_modules() if key.split(".")[-1] in family(model).qkv]
    assert len(matches) == 3 * 2 * 2  # query, key, value; two layers; two towers
    assert all(".layers." in key or ".layer." in key for key in matches)


def test_base_model_unwraps_peft():
    model = tiny_model("clip")
    assert base_model(model) is model and base_model(lora(model)) is model


@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
def test_one_tower_alone_is_refused(tower):
    model = getattr(tiny_model("clip"), tower)
    with pytest.raises(ConfigError, match=f"get_image_features.*{type(model).__name__}.*metaclip_2"):
        family(model)


def test_what_is_a_dual_encoder():
    assert is_dual_encoder(tiny_model("siglip")) and not is_dual_encoder(nn.Linear(2, 2))


@pytest.mark.parametrize("function", [family, tower_modules, input_embeddings, logit_bias])
def test_a_module_that_is_no_transformers_model_is_refused(function):
    with pytest.raises(ConfigError, match="get_image_features.*Linear.*open_clip"):
        function(nn.Linear(2, 2))


def test_an_unknown_tower_is_refused():
    with pytest.raises(ConfigError, match="got 'image'; allowed 'vision'"):
        tower_modules(tiny_model("clip"), "image")
