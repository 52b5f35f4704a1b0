# SPDX-License-Identifier: Apache-2.0
"""Learned context prompts: they are CoOp's, in a stock PEFT adapter."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from peft.tuners.trainable_tokens import TrainableTokensLayer
from safetensors.torch import load_file

from hf_robust.encoders import context
from hf_robust.encoders.context import context_prompt
from hf_robust.encoders.dual_encoder import input_embeddings, text_embeds, tokenize
from hf_robust.encoders.templates import class_prompts
from hf_robust.errors import ConfigError, DataError
from hf_robust.tasks.class_names import ZeroShotClassifier, class_embeddings
from tests.methods import assert_same, base_tensors, logits, loss_fn
from tests.tiny_models import FAMILIES, HIDDEN, tiny_batch, tiny_lora, tiny_model, tiny_processor

LEGACY = "clip with legacy EOS"
all_cases = pytest.mark.parametrize("case", [*FAMILIES, LEGACY])
INIT, NAMES = "j k m q", ["cat", "humming bird", "ox"]  # INIT is four tokens in every tiny tokenizer
LABELS = torch.tensor([0, 1, 2, 1])


def plain(case="clip"):
    """As PEFT leaves it, without gradients: SigLIP's pooling rounds otherwise with them."""
    model = tiny_model("clip", legacy_eos=True) if case == LEGACY else tiny_model(case)
    return model.requires_grad_(False)


def processor(case="clip"):
    return tiny_processor("clip", legacy_eos=True) if case == LEGACY else tiny_processor(case)


def images(case="clip"):
    return tiny_batch("clip" if case == LEGACY else case, 4)


def wrapped(case="clip", **settings):
    return context_prompt(plain(case), processor(case), **{"init": INIT, "class_names": NAMES, **settings})


def ids_of(case, text):
    return processor(case).tokenizer(text, add_special_tokens=False)["input_ids"]


def context_of(model):
    (parameter,) = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return parameter


def batch(case, template):
    texts = tokenize(processor(case), class_prompts(NAMES, [template]), plain(case))
    return {**images(case), **texts, "labels": LABELS}


def trained(case="clip"):
    """Five steps of AdamW through the classifier; the wrapped model, its template, and the losses."""
    model, template = wrapped(case)
    classifier = ZeroShotClassifier(model, processor(case), NAMES, template, head="live").eval()  # without dropout
    optimizer = torch.optim.AdamW([p for p in classifier.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = classifier(**images(case), labels=LABELS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, template, losses


# --- CoOp ---


@all_cases
def test_at_the_start_class_embeddings_are_those_of_the_hand_written_prompt(case):
    model, template = wrapped(case)
    assert INIT not in template
    expected = class_embeddings(plain(case), processor(case), NAMES, INIT + " {}.")
    assert torch.equal(class_embeddings(model, processor(case), NAMES, template), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_starts_there_too_and_trains_in_float32(dtype):
    model, template = context_prompt(plain().to(dtype), processor(), init=INIT, class_names=NAMES)
    expected = class_embeddings(plain().to(dtype), processor(), NAMES, INIT + " {}.")
    assert torch.equal(class_embeddings(model, processor(), NAMES, template), expected)
    assert context_of(model).dtype == torch.float32


def coop(case, vectors):
    """CoOp by hand: the token embeddings of `INIT` in every prompt give way to `vectors`, `(4, hidden)`."""
    model, known = plain(case).double(), batch(case, INIT + " {}.")
    first = known["input_ids"][0].tolist()
    start = first.index(ids_of(case, INIT)[0])
    assert first[start : start + 4] == ids_of(case, INIT)

    def replace(module, args, output):  # (prompts, tokens, hidden)
        middle = vectors.expand(len(output), -1, -1)
        return torch.cat([output[:, :start], middle, output[:, start + 4 :]], dim=1)

    input_embeddings(model)[1].register_forward_hook(replace)
    return model, known


@all_cases
def test_logits_and_gradients_are_those_of_coop_written_by_hand(case):
    vectors = torch.randn(4, HIDDEN, dtype=torch.float64, requires_grad=True)
    reference, known = coop(case, vectors)
    model, template = context_prompt(plain(case).double(), processor(case), init=INIT, class_names=NAMES)
    with torch.no_grad():
        context_of(model).copy_(vectors)
        own, expected = logits(model, batch(case, template)), logits(reference, known)
    assert own.dtype == torch.float64 and (own - own.mean()).abs().max() > 1e-2
    torch.testing.assert_close(own, expected, atol=1e-12, rtol=0)

    loss_fn(reference, known).backward()
    loss_fn(model, batch(case, template)).backward()
    assert vectors.grad.abs().max() > 1e-3
    torch.testing.assert_close(context_of(model).grad, vectors.grad, atol=1e-12, rtol=0)


@all_cases
def test_only_the_context_trains_and_the_base_keeps_every_bit(case):
    model, template, losses = trained(case)
    assert context_of(model).shape == (4, HIDDEN)
    assert losses[-1] < losses[0]
    assert_same(base_tensors(model), plain(case).state_dict())
    before = class_embeddings(plain(case), processor(case), NAMES, template)
    assert (class_embeddings(model, processor(case), NAMES, template) - before).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(class_embeddings(model, processor(case), NAMES, template), before)
    assert_same(dict(model.unload().state_dict()), plain(case).state_dict())


@all_cases
def test_the_saved_adapter_loads_in_stock_peft(case, tmp_path):
    model, template, _ = trained(case)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "TRAINABLE_TOKENS"
    assert [tensor.shape for tensor in load_file(tmp_path / "adapter_model.safetensors").values()] == [(4, HIDDEN)]
    loaded = PeftModel.from_pretrained(plain(case), tmp_path)
    expected = class_embeddings(model, processor(case), NAMES, template)
    assert torch.equal(class_embeddings(loaded, processor(case), NAMES, template), expected)


def test_without_init_the_context_is_normal_and_depends_on_the_seed_alone():
    state = torch.random.get_rng_state()
    first, again, other = (context_of(wrapped(init=None, n_tokens=8, seed=seed)[0]).detach() for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (8, HIDDEN) and 0.017 < first.std() < 0.023 and first.mean().abs() < 0.004


def test_with_init_no_random_number_is_drawn():
    state = torch.random.get_rng_state()
    wrapped()
    assert torch.equal(torch.random.get_rng_state(), state)


# --- the words that stand for the context ---


@all_cases
@pytest.mark.parametrize("init", [INIT, None])
def test_in_a_prompt_the_context_takes_the_place_of_init_token_by_token(case, init):
    model, template = wrapped(case, init=init)
    ids = model.peft_config["default"].token_indices
    assert len(set(ids)) == len(set(template.split()[:4])) == 4 and template.endswith(" {}.")
    assert ids_of(case, template.removesuffix(" {}.")) == ids
    for name in NAMES:
        expected = ids_of(case, f"{INIT} {name}.")
        assert expected[:4] == ids_of(case, INIT)
        assert ids_of(case, template.replace("{}", name)) == ids + expected[4:]


@all_cases
def test_tokens_of_the_class_names_are_not_taken(case):
    """Neither those at the start of a text nor those behind another word, where some tokenizers take others."""
    first, second, third, _, _ = wrapped(case)[1].split()
    names = [first, f"{second} bird", f"big {third}"]
    model, template = wrapped(case, n_tokens=2, init=None, class_names=names)
    ids = set(model.peft_config["default"].token_indices)
    assert len(ids) == 2 and template != f"{first} {second} {{}}."
    for name in names:
        assert ids.isdisjoint(ids_of(case, name)) and ids.isdisjoint(ids_of(case, "a " + name))
    class_embeddings(model, processor(case), names, template)


def test_words_of_init_are_not_taken():
    _, template = context_prompt(plain(), processor(), init=None)
    first = template.removesuffix(" {}.")
    _, other = context_prompt(plain(), processor(), init=first)
    assert set(first.split()).isdisjoint(other.split())


def test_special_tokens_are_not_taken():
    tokens = processor("vision-text-dual-encoder")
    tokens.tokenizer.add_special_tokens({"additional_special_tokens": ["special"]})
    assert tokens.tokenizer("special", add_special_tokens=False)["input_ids"] == [125]
    _, template = context_prompt(plain("vision-text-dual-encoder"), tokens, init=None)
    assert "special" not in template


def test_words_without_a_row_in_the_token_embedding_are_not_taken():
    tokens = processor()
    tokens.tokenizer.add_tokens(["extra", "more"])
    assert len(tokens.tokenizer) == 516 and plain().text_model.get_input_embeddings().num_embeddings == 514
    model, template = context_prompt(plain(), tokens, init=INIT)
    assert max(model.peft_config["default"].token_indices) < 514 and "extra" not in template


def test_the_context_does_not_move_the_pooling_of_a_legacy_clip():
    model, template = wrapped(LEGACY)
    eos = processor(LEGACY).tokenizer.eos_token_id
    texts = tokenize(processor(LEGACY), class_prompts(NAMES, [template]), model)
    with torch.no_grad():
        context_of(model).normal_()
        embeds = text_embeds(model, **texts)
        model.get_base_model().text_model.eos_token_id = eos  # pools at the first EOS from here on
        assert torch.equal(text_embeds(model, **texts), embeds)


def test_a_legacy_clip_takes_no_word_above_eos():
    """With this tokenizer every letter is above EOS, so that the pooling would sit on the context."""
    assert processor("clip").tokenizer.eos_token_id == 1
    with pytest.raises(ConfigError, match="too few words.*got '0 words'"):
        context_prompt(plain(LEGACY), processor("clip"), init=INIT)


# --- class names that contain a word of the context ---


@pytest.fixture(params=["clip", "siglip", "vision-text-dual-encoder"])
def clash(request):
    """A model with a context, its processor and template, and class names with the context's second word in one."""
    model, template = wrapped(request.param)
    return model, processor(request.param), template, ["cat", f"big {template.split()[1]} bird"]


def test_a_class_name_with_a_word_of_the_context_is_refused(clash):
    model, tokens, template, names = clash
    message = f"stands for the learned context.*got '{names[1]}'.*{template.split()[1]}.*context_prompt"
    with pytest.raises(DataError, match=message):
        ZeroShotClassifier(model, tokens, names, template)
    with pytest.raises(DataError, match=message):
        class_embeddings(model, tokens, names, ["a {}.", template])
    classifier = ZeroShotClassifier(model, tokens, NAMES, template)
    with pytest.raises(DataError, match=message), classifier.classes(names):
        pass
    assert classifier.class_names == NAMES


def test_other_templates_may_be_used_with_every_class_name(clash):
    model, tokens, _, names = clash
    assert class_embeddings(model, tokens, names, ["a {}.", "the {}"]).shape[0] == 2


@pytest.mark.parametrize(
    "tokens, names",
    [
        (["x", "z"], ["x ray", "z cat"]),  # not in the template
        (["a", "z"], ["a z", "the cat"]),  # not all in the template
        (["<|endoftext|>"], ["cat", "a very long name"]),  # in the template, but special: it also pads
    ],
)
def test_a_users_own_trained_tokens_are_not_refused(tokens, names):
    ids = [processor().tokenizer(token, add_special_tokens=False)["input_ids"][0] for token in tokens]
    model = get_peft_model(plain(), TrainableTokensConfig(target_modules=["token_embedding"], token_indices=ids))
    expected = class_embeddings(plain(), processor(), names, "a photo of a {}.")
    assert torch.equal(class_embeddings(model, processor(), names, "a photo of a {}."), expected)


def test_models_without_trained_tokens_are_not_checked(monkeypatch):
    monkeypatch.setattr(context, "tokenize", None)  # what a check would need first
    for model in (plain(), tiny_lora(plain())):
        assert class_embeddings(model, processor(), NAMES).shape[0] == 3


# --- together with other adapters, as the error says ---


def test_a_context_can_be_trained_together_with_lora():
    model, template = wrapped()
    ids = {"token_embedding": model.peft_config["default"].token_indices}
    both = get_peft_model(plain(), LoraConfig(target_modules=["q_proj"], trainable_token_indices=ids))
    classifier = ZeroShotClassifier(both, processor(), NAMES, template).train()
    classifier(**images(), labels=LABELS).loss.backward()
    (gradient,) = [p.grad for name, p in both.named_parameters() if "trainable_tokens_delta" in name]
    assert gradient.shape == (4, HIDDEN) and gradient.abs().max() > 0
    with pytest.raises(DataError, match="stands for the learned context"):
        class_embeddings(both, processor(), ["cat", "big " + template.split()[0]], template)


def test_a_context_can_be_learned_on_top_of_a_merged_adapter():
    merged = tiny_lora(plain(), init_lora_weights=False).merge_and_unload()
    expected = class_embeddings(merged, processor(), NAMES, INIT + " {}.")
    model, template = context_prompt(merged, processor(), init=INIT, class_names=NAMES)
    assert torch.equal(class_embeddings(model, processor(), NAMES, template), expected)


# --- errors ---


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n_tokens": 0, "init": None}, "needs tokens.*n_tokens.*got 0; allowed 1 or more"),
        ({"n_tokens": -1}, "needs tokens.*got -1"),
        ({}, r"number of tokens.*init.*a photo of a \(9 tokens\).*allowed 4 tokens.*n_tokens=9"),
        ({"init": ""}, r"number of tokens.*\(0 tokens\).*init=None"),
        ({"n_tokens": 60, "init": None}, "too few words.*allowed 60 words"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    model = plain()
    with pytest.raises(ConfigError, match=message):
        context_prompt(model, processor(), **settings)
    assert not any(isinstance(module, TrainableTokensLayer) for module in model.modules())


def test_a_model_with_an_adapter_is_refused():
    for model in (tiny_lora(plain()), wrapped()[0]):
        with pytest.raises(ConfigError, match="adapter already.*merge_and_unload.*trainable_token_indices"):
            context_prompt(model, processor(), init=INIT)


def test_a_model_that_is_no_dual_encoder_is_refused():
    with pytest.raises(ConfigError, match="get_image_features"):
        context_prompt(plain().text_model, processor(), init=INIT)


def test_a_tokenizer_that_joins_words_is_refused():
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *"catxyz.", *("▁" + letter for letter in "xyz")]
    tokens += [f"▁{letter}▁" for letter in "xyz"]
    merges = [("▁", letter) for letter in "xyz"] + [("▁" + letter, "▁") for letter in "xyz"]
    joining = transformers.Siglip2Tokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
    tokens = processor("siglip")
    tokens.tokenizer = joining
    with pytest.raises(ConfigError, match="joins the context and the class name.*cat"):
        context_prompt(plain("siglip"), tokens, n_tokens=2, init=None)
