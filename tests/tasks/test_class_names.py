# SPDX-License-Identifier: Apache-2.0
"""What the classifier predicts, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments

from hf_robust.encoders.dual_encoder import base_model, text_embeds, tokenize
from hf_robust.encoders.templates import class_prompts
from hf_robust.errors import ConfigError, DataError
from hf_robust.tasks.class_names import TEMPLATES, ZeroShotClassifier, class_embeddings
from tests.tiny_models import FAMILIES, image_dataset, tiny_batch, tiny_lora, tiny_model, tiny_processor

NAMES = ["cat", "hummingbird", "ox", "50% {wool}"]
HEADS = ["frozen", "live", "trainable"]


def build(family="clip", head="live", names=NAMES, templates="single", wrap=lambda model: model):
    classifier = ZeroShotClassifier(wrap(tiny_model(family)), tiny_processor(family), names, templates, head)
    return classifier.eval()


# --- zero-shot predictions ---


@pytest.mark.parametrize("wrap", [lambda model: model, tiny_lora], ids=["plain", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", HEADS)
def test_at_the_start_every_head_gives_the_models_own_zero_shot_logits(family, head, wrap):
    images = tiny_batch(family, 6)
    prompts = tokenize(tiny_processor(family), [f"a photo of a {name}." for name in NAMES], tiny_model(family))
    with torch.no_grad():
        own = tiny_model(family)(**images, **prompts).logits_per_image
        output = build(family, head, wrap=wrap)(**images, labels=torch.tensor([0, 1, 2, 3, 0, 1]))
    torch.testing.assert_close(output.logits, own, atol=1e-5, rtol=0)
    assert torch.equal(output.logits.argmax(-1), own.argmax(-1))
    torch.testing.assert_close(output.loss, F.cross_entropy(own, torch.tensor([0, 1, 2, 3, 0, 1])))
    assert len(output.logits.argmax(-1).unique()) > 1  # else equal predictions mean nothing


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_start_the_heads_agree_to_the_last_digits_of_float64(family):
    images, logits = tiny_batch(family, 4), []
    for head in HEADS:
        model = tiny_model(family).double()
        with torch.no_grad():
            logits.append(ZeroShotClassifier(model, tiny_processor(family), NAMES, "drawings", head)(**images).logits)
    assert logits[0].dtype == torch.float64
    torch.testing.assert_close(logits[1], logits[0], atol=1e-13, rtol=0)
    torch.testing.assert_close(logits[2], logits[0], atol=1e-13, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_class_embeddings_are_the_normalised_mean_of_normalised_prompt_embeddings(family):
    model, processor, templates = tiny_model(family), tiny_processor(family), ["a {}.", "one {} and no other", "{}"]
    with torch.no_grad():
        for name, embed in zip(NAMES, class_embeddings(model, processor, NAMES, templates), strict=True):
            prompts = [template.replace("{}", name) for template in templates]
            mean = text_embeds(model, **tokenize(processor, prompts, model)).mean(dim=0)
            torch.testing.assert_close(embed, mean / mean.norm(), atol=1e-6, rtol=0)


def test_class_embeddings_ignore_dropout_and_leave_modes_as_they_were():
    model = tiny_lora(tiny_model("clip"), lora_dropout=0.5, init_lora_weights=False)
    base_model(model).text_model.train()
    before = [module.training for module in model.modules()]
    with torch.random.fork_rng(devices=[]):
        first = class_embeddings(model, tiny_processor("clip"), NAMES)
        torch.testing.assert_close(class_embeddings(model, tiny_processor("clip"), NAMES), first)
    assert not first.requires_grad
    assert [module.training for module in model.modules()] == before and any(before) and not all(before)


@pytest.mark.parametrize("head", HEADS)
def test_building_a_classifier_draws_no_random_number(head):
    state = torch.random.get_rng_state()
    model, processor = tiny_model("clip"), tiny_processor("clip")
    ZeroShotClassifier(model, processor, NAMES, head=head)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("case", ["autocast", "bfloat16 towers", "bfloat16 classifier"])
def test_similarities_are_float32(case, head):
    classifier = build(head=head, wrap=lambda model: model.bfloat16() if case == "bfloat16 towers" else model)
    if case == "bfloat16 classifier":
        classifier = classifier.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        output = classifier(**tiny_batch("clip", 3))
        weight, _ = classifier._weight_and_bias(output.class_embeds)
    assert {output.logits.dtype, output.image_embeds.dtype, output.class_embeds.dtype} == {torch.float32}
    torch.testing.assert_close(output.logits, output.image_embeds @ weight.T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("head", HEADS)
def test_the_output_has_the_class_embeddings(head):
    expected = class_embeddings(tiny_model("clip"), tiny_processor("clip"), NAMES)
    classifier = build(head=head).train()
    torch.testing.assert_close(classifier(**tiny_batch("clip", 2)).class_embeds, expected, atol=1e-6, rtol=0)
    assert classifier(**tiny_batch("clip", 2)).class_embeds.requires_grad == (head != "frozen")


# --- other classes ---


@pytest.mark.parametrize("head", HEADS)
def test_inside_classes_the_head_is_the_zero_shot_head_of_the_other_classes(head):
    classifier, images, others = build(head=head), tiny_batch("clip", 3), ["bus", "tram"]
    with torch.no_grad():
        expected = build(head=head, names=others)(**images, labels=torch.tensor([0, 1, 1]))
        before = classifier(**images).logits
        with classifier.classes(others):
            output = classifier(**images, labels=torch.tensor([0, 1, 1]))
            assert classifier.class_names == others
        torch.testing.assert_close(output.logits, expected.logits)
        torch.testing.assert_close(output.loss, expected.loss)
        assert classifier.class_names == NAMES and torch.equal(classifier(**images).logits, before)


def test_the_head_comes_back_after_an_error_among_other_classes():
    classifier = build()
    with pytest.raises(RuntimeError, match="stop"), classifier.classes(["bus", "tram"]):
        raise RuntimeError("stop")
    with pytest.raises(DataError), classifier.classes(["bus", "Bus"]):
        pass
    assert classifier.class_names == NAMES
    assert classifier(**tiny_batch("clip", 2)).logits.shape == (2, 4)


# --- input ---


@pytest.mark.parametrize("name", ["{}", "a{0}b", "{name}", "50%", "%s", "\\1"])
def test_class_names_are_never_interpreted(name):
    assert class_prompts([name, "cat"], ["a {}, the {}"]) == [f"a {name}, the {name}", "a cat, the cat"]


@pytest.mark.parametrize("key", TEMPLATES)
def test_templates_can_be_named(key):
    classifier = build(templates=key)
    assert classifier.templates == TEMPLATES[key] == tuple(dict.fromkeys(TEMPLATES[key]))
    assert classifier.prompts.input_ids.shape[0] == 4 * len(TEMPLATES[key])


def test_one_template_may_be_given_as_text():
    assert build(templates="look, a {}!").templates == ("look, a {}!",)


@pytest.mark.parametrize(
    "names, message",
    [
        ([], "no list of class names"),
        ("cat", "no list of class names.*'cat'"),
        (["cat", ""], "empty.*class 1"),
        (["cat", " \t"], "empty.*class 1"),
        (["cat", 7], "empty.*class 1.*7"),
        (["crane", "cat", "crane"], "twice.*classes 0 and 2.*'crane'"),
        (["crane", "Crane "], "twice.*classes 0 and 1.*'Crane '"),
        (["cat", "very " * 30 + "big cat"], "longer than the text tower"),
        (["<|endoftext|> cat", "<|endoftext|> dog"], r"special token.*class 0.*<\|endoftext\|> cat"),
        (["cat", "the <|startoftext|>"], "special token.*class 1"),
    ],
)
def test_bad_class_names_are_refused(names, message):
    with pytest.raises(DataError, match=message):
        build(names=names)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "clip"])  # CLIP's knows every letter
def test_names_that_the_tokenizer_does_not_know_are_refused(family):
    for names in (["cat", "漢字"], ["漢", "漢 字"]):
        with pytest.raises(DataError, match="knows no part of a class name.*got '漢"):
            build(family, names=names)
    with pytest.raises(DataError, match=r"same tokens \(at classes 0 and 2\).*'漢 cat', '字 cat'"):
        build(family, names=["漢 cat", "dog", "字 cat"])
    build(family, names=["cat 漢", "dog 漢"])


def test_names_that_only_the_tokenizer_takes_for_one_are_refused():
    name = "vision-text-dual-encoder"
    with pytest.raises(DataError, match="same tokens.*'résumé', 'resume'"):
        class_embeddings(tiny_model(name), tiny_processor(name), ["résumé", "resume"])
    build(names=["résumé", "resume"])  # CLIP's keeps accents
    with pytest.raises(DataError, match="knows no part"):  # nothing that can be seen
        build(name, names=["cat", "\u200b"])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"templates": ("a photo",)}, "without {}.*'a photo'"),
        ({"templates": ("a {}", "a {name}")}, "without {}.*'a {name}'"),
        ({"templates": "satelite"}, "without {}.*'satelite'.*'satellite'"),
        ({"templates": ()}, "no template"),
        ({"templates": 3}, "no template.*got 3"),
        ({"head": "linear"}, "unknown head.*'linear'.*'frozen'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        build(**settings)


@pytest.mark.parametrize("label", [-1, -100, len(NAMES)])
def test_labels_outside_the_classes_are_refused(label):
    inputs = tiny_batch("clip", 2)
    with pytest.raises(DataError, match=f"label is no class.*got {label}; allowed 0 to {len(NAMES) - 1}"):
        build()(**inputs, labels=torch.tensor([0, label]))


def test_a_model_that_is_no_dual_encoder_is_refused():
    with pytest.raises(ConfigError, match="get_image_features"):
        ZeroShotClassifier(tiny_model("clip").vision_model, tiny_processor("clip"), NAMES)


# --- in a stock Trainer ---


@pytest.mark.parametrize("head", HEADS)
def test_a_stock_trainer_trains_and_evaluates_it(head, tmp_path):
    names = ["red thing", "green thing", "blue thing"]
    processor = tiny_processor("clip")

    def collate(rows):
        batch = processor.image_processor(images=[row["image"] for row in rows], return_tensors="pt")
        return {"pixel_values": batch["pixel_values"], "labels": torch.tensor([row["label"] for row in rows])}

    trainer = Trainer(
        build(head=head, names=names),
        TrainingArguments(
            output_dir=tmp_path,
            max_steps=30,
            per_device_train_batch_size=12,
            learning_rate=3e-3,
            remove_unused_columns=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
        ),
        data_collator=collate,
        train_dataset=image_dataset(24, names),
        eval_dataset=image_dataset(24, names, seed=1000),
        compute_metrics=lambda p: {"accuracy": (p.predictions[0].argmax(-1) == p.label_ids).mean().item()},
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert before["eval_accuracy"] < 0.7 and after["eval_accuracy"] > 0.9
    assert after["eval_loss"] < before["eval_loss"] / 2
