# SPDX-License-Identifier: Apache-2.0
"""RobustTrainer with images of another size than in pre-training."""

from __future__ import annotations

import datasets
import pytest
import torch
from peft import PeftModel
from transformers import AutoModel

from hf_robust import ImageCollator, ZeroShotClassifier, with_image_embeds, with_image_size
from hf_robust.encoders.dual_encoder import base_model
from hf_robust.errors import ConfigError
from hf_robust.evaluation.difficulty import task_difficulty
from hf_robust.evaluation.run import evaluate_suite
from hf_robust.evaluation.suite import RobustnessSuite, SuiteSet
from hf_robust.scripting.loading import load_processor
from tests.tiny_models import image_dataset, tiny_lora, tiny_model, tiny_processor
from tests.trainers import METHODS, NAMES, build, same, weights

# PEFT's own LN tuning warns about every LayerNorm
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
SIZE = 64


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def watched(model):
    """Notes the sizes of the images that the vision tower sees from now on."""
    sizes = set()

    def note(module, args, kwargs):
        sizes.add(tuple(kwargs["pixel_values"].shape[-2:]))

    base_model(model).vision_model.register_forward_pre_hook(note, with_kwargs=True)
    return sizes


def logits(classifier, processor):
    with torch.no_grad():
        return classifier.eval()(**ImageCollator(processor)(list(image_dataset(5, NAMES, seed=20)))).logits


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_evaluates_and_comes_back_at_the_size(tmp_path, method):
    model = tiny_model("clip")
    sizes = watched(model)
    sets = {"validation": image_dataset(7, NAMES, seed=50), "new": image_dataset(9, ["cat", "dog"], seed=90)}
    settings = {"losses": {"similarity": {}}, "cache_reference_embeddings": True, "eval_dataset": sets}
    trained = build(tmp_path, method, model=model, image_size=SIZE, **settings)
    before = logits(trained.model, trained.processing_class)
    trained.train()
    trained.evaluate()
    trained.wise_ft_sweep(alphas=(0.0, 0.5) if method != "ln_tuning" else (0.0, 1.0))
    trained.save_model()
    assert sizes == {(SIZE, SIZE)}
    after = logits(trained.model, trained.processing_class)

    processor, base = load_processor(str(tmp_path)), tiny_model("clip")
    encoder = AutoModel.from_pretrained(tmp_path) if method == "full" else PeftModel.from_pretrained(base, tmp_path)
    assert processor.image_processor.to_dict()["crop_size"] == {"height": SIZE, "width": SIZE}
    again = ZeroShotClassifier(encoder, processor, NAMES)
    assert torch.equal(logits(again, processor), after) and not torch.equal(before, after)


def test_what_is_evaluated_elsewhere_has_the_size_too(tmp_path):
    trained = build(tmp_path, "lora", image_size=SIZE)
    trained.train()
    trained.save_model()
    images = image_dataset(12, NAMES, seed=50)
    accuracy = trained.evaluate(images)["eval_accuracy"]

    processor = load_processor(str(tmp_path))
    model = PeftModel.from_pretrained(tiny_model("clip"), tmp_path).eval()
    sizes = watched(model)
    report = evaluate_suite(model, processor, RobustnessSuite([SuiteSet("photos", "id", images)]), silent=True)
    assert report.sets["photos"].accuracy == accuracy
    with_image_embeds(images, model, processor, silent=True)
    task_difficulty(model, images, processor=processor, silent=True)
    assert sizes == {(SIZE, SIZE)}


def test_the_given_processor_is_not_changed_and_no_size_uses_it_itself(tmp_path):
    given = tiny_processor("clip")
    before = given.image_processor.to_json_string()
    trained = build(tmp_path, processing_class=given)
    assert trained.processing_class is trained.model.processor is given
    trained = build(tmp_path, processing_class=given, image_size=SIZE)
    assert trained.processing_class is trained.model.processor is not given
    assert given.image_processor.to_json_string() == before


def test_ogen_embeds_its_images_at_the_size(tmp_path):
    model = tiny_lora(tiny_model("clip"), exclude_modules=r"vision_model.*")
    sizes = watched(model)
    trained = build(
        tmp_path, model=model, losses={"ogen": {"new_class_names": ["cat", "dog"], "neighbours": 2}}, image_size=SIZE
    )
    trained.train()
    assert trained.train_dataset.rows.column_names == ["label", "image_embeds"] and sizes == {(SIZE, SIZE)}


@pytest.mark.parametrize("method", ["full", "saft", "aclip"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_gradient_checkpointing_changes_nothing(tmp_path, method, family):
    settings = {"image_size": SIZE, "max_steps": 2, "family": family}
    plain, checkpointed = (
        build(tmp_path, method, activation_checkpointing=flag, **settings) for flag in (False, True)
    )
    plain.train(), checkpointed.train()
    assert same(weights(plain), weights(checkpointed))


def test_the_size_of_pretraining_changes_nothing(tmp_path):
    plain, sized = (build(tmp_path, image_size=size, max_steps=2) for size in (None, 32))
    plain.train(), sized.train()
    assert same(weights(plain), weights(sized))


def test_a_given_classifier_says_in_its_card_how_images_are_prepared(tmp_path):
    classifier = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), NAMES)
    build(tmp_path, model=classifier, image_size=SIZE).save_model()
    assert f"`crop_size` `{{'height': {SIZE}, 'width': {SIZE}}}`" in (tmp_path / "README.md").read_text()


def test_a_collator_must_make_the_size(tmp_path):
    model, processor = tiny_model("clip"), tiny_processor("clip")
    larger = ImageCollator(with_image_size(processor, SIZE, model))
    assert build(tmp_path, data_collator=larger, image_size=SIZE).data_collator is larger
    for collator in (ImageCollator(processor), lambda rows: larger(rows)):
        build(tmp_path, data_collator=collator)
        with pytest.raises(ConfigError, match="data collator makes images of another size.*with_image_size"):
            build(tmp_path, data_collator=collator, image_size=SIZE)


@pytest.mark.parametrize(
    ("family", "size", "message"), [("clip", 40, "nearest: 32, 48"), ("siglip2", SIZE, "max_num_patches")]
)
def test_a_wrong_size_is_refused_and_leaves_the_model_as_it_was(tmp_path, family, size, message):
    model = tiny_model(family)
    with pytest.raises(ConfigError, match=message):
        build(tmp_path, model=model, family=family, image_size=size, head="frozen")
    assert all(parameter.requires_grad for parameter in model.parameters())
