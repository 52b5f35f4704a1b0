# SPDX-License-Identifier: Apache-2.0
"""RobustTrainer with OGEN: what is trained, logged, saved and resumed."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from hf_robust import ACLIPConfig, OGENConfig, OGENLoss, SAFTConfig, ZeroShotClassifier, add_terms, context_prompt
from hf_robust.data.collator import ImageCollator
from hf_robust.encoders.dual_encoder import image_embeds
from hf_robust.errors import AdapterFileError, CheckpointError, ConfigError, DataError
from tests.tiny_models import FAMILIES, image_dataset, tiny_model, tiny_processor
from tests.trainers import build, same, weights
from tests.training.test_trainer_checkpoints import StopAfter

KNOWN, NEW = ["red", "green", "blue", "pink"], ["cat", "dog", "owl"]
TEXT_LORA = LoraConfig(target_modules=r".*text_model.*(q_proj|v_proj|query|value)")
TEMPLATE = "b c d e {}."

METHODS = {
    "context": lambda family: context_prompt(
        tiny_model(family), tiny_processor(family), init=None, class_names=KNOWN + NEW
    ),
    "saft": lambda family: (get_peft_model(tiny_model(family), SAFTConfig(density=0.01, towers="text")), TEMPLATE),
    "aclip": lambda family: (get_peft_model(tiny_model(family), ACLIPConfig(towers="text")), TEMPLATE),
    "lora": lambda family: (get_peft_model(tiny_model(family), TEXT_LORA), TEMPLATE),
}
all_methods = pytest.mark.parametrize("method", METHODS)


def trainer(folder, method="lora", ogen=True, family="clip", config=None, **settings):
    torch.manual_seed(0)  # LoRA's first weights
    model, templates = METHODS[method](family)
    settings = {"train_dataset": image_dataset(18, KNOWN), "num_train_epochs": 4, "templates": templates, **settings}
    settings.setdefault(
        "eval_dataset", {"known": image_dataset(7, KNOWN, seed=50), "new": image_dataset(9, NEW, seed=90)}
    )
    losses = [OGENLoss(OGENConfig(NEW, **(config or {})))] if ogen else []
    return build(folder, model=model, family=family, losses=losses, **settings)


def loss_of(trained):
    return trained.model.terms["ogen"]


def tensors_of(trained):
    return dict([*trained.model.named_parameters(), *trained.model.named_buffers()])


def batch(family="clip"):
    return ImageCollator(tiny_processor(family))(list(image_dataset(6, KNOWN, seed=20)))


# --- training ---


@all_methods
def test_trains_text_tower_and_generator_and_nothing_else(tmp_path, method):
    trained = trainer(tmp_path, method)
    before = {name: tensor.clone() for name, tensor in tensors_of(trained).items()}
    base = {name: tensor.clone() for name, tensor in tiny_model("clip").state_dict().items()}
    trained.train()
    moved = [name for name, tensor in tensors_of(trained).items() if not torch.equal(tensor, before.get(name, tensor))]
    generator = "terms.ogen.generator."
    assert {generator + name for name, _ in loss_of(trained).generator.named_parameters()} <= set(moved)
    assert any("text_model" in name for name in moved) or method == "saft"
    assert not any("vision_model" in name or "visual_projection" in name for name in moved)
    with trained.model.model.disable_adapter():
        embeds = trained.model.model.base_model.model.get_image_features(batch()["pixel_values"]).pooler_output
    fresh = tiny_model("clip")
    fresh.load_state_dict(base)
    assert torch.equal(embeds, fresh.get_image_features(batch()["pixel_values"]).pooler_output)


@pytest.mark.parametrize("family", FAMILIES)
def test_works_for_every_family(tmp_path, family):
    trained = trainer(tmp_path, "context", family=family)
    before = weights(trained)
    trained.train()
    after = weights(trained)
    assert all(not torch.equal(after[name], before[name]) for name in before)
    assert all(math.isfinite(value) for value in trained.evaluate().values())


def test_every_term_is_logged_with_its_weight_and_the_generator_warms_up_alone(tmp_path):
    trained = trainer(tmp_path, num_train_epochs=5, logging_strategy="steps", logging_steps=1)
    trained.train()
    logs = [entry for entry in trained.state.log_history if "loss" in entry]
    terms = [{key: value for key, value in entry.items() if key.startswith("loss_")} for entry in logs]
    for entry, of_entry in zip(logs, terms, strict=True):
        assert sum(of_entry.values()) == pytest.approx(entry["loss"], rel=1e-4)
    generation = {"loss_ogen_generation_base", "loss_ogen_generation_reverse"}
    classification = {"loss_cross_entropy", "loss_ogen_base_as_unknown", "loss_ogen_reverse", "loss_ogen_new"}
    distillation = {"loss_ogen_distillation_known", "loss_ogen_distillation_new"}
    for of_entry in terms[:5]:  # the first of five epochs
        assert {name for name, value in of_entry.items() if value != 0} == generation
    for of_entry in terms[5:]:
        assert set(of_entry) == generation | classification | distillation
        assert all(of_entry[name] > 0 for name in generation | classification)
    assert terms[-1]["loss_ogen_distillation_known"] > 0 < terms[-1]["loss_ogen_distillation_new"]


def test_text_tower_waits_for_the_generator(tmp_path):
    trained = trainer(tmp_path, config={"warmup": 0.25}, callbacks=[StopAfter(5)])  # of 20 steps
    before = weights(trained)
    trained.train()
    changed = {name for name, value in weights(trained).items() if not torch.equal(value, before[name])}
    assert changed and all(name.startswith("terms.ogen.generator.") for name in changed)


def test_same_seed_gives_the_same_result_and_another_another(tmp_path):
    runs = []
    for seed in (0, 0, 1):
        runs.append(trainer(tmp_path, config={"seed": seed}))
        runs[-1].train()
    assert same(weights(runs[0]), weights(runs[1]))
    assert not same(weights(runs[0]), weights(runs[2]))


def test_construction_leaves_the_global_random_state():
    model, templates = METHODS["lora"]("clip")
    before = torch.get_rng_state()
    classifier = ZeroShotClassifier(model, tiny_processor("clip"), KNOWN, templates)
    add_terms(classifier, {"ogen": OGENLoss(OGENConfig(NEW))})
    assert torch.equal(before, torch.get_rng_state())


def test_prototypes_are_those_of_the_training_set_and_are_read_from_a_file_the_second_time(tmp_path, monkeypatch):
    first = trainer(tmp_path, max_steps=1)
    first.train()
    images = image_dataset(18, KNOWN)
    inputs = ImageCollator(tiny_processor("clip"))(list(images))
    with torch.no_grad():
        embeds = image_embeds(tiny_model("clip"), inputs["pixel_values"])  # (images, dim)
    for label in range(len(KNOWN)):
        own = embeds[inputs["labels"] == label]
        found = loss_of(first).prototypes
        torch.testing.assert_close(found.mean[label], own.mean(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(found.std[label], own.std(0, correction=0), rtol=0, atol=1e-6)
    for used in ("hf_robust.data.embeds_cache.pretrained_image_embeds", "hf_robust.tasks.task.image_embeds"):
        monkeypatch.setattr(used, lambda *args: pytest.fail("the vision tower was run again"))
    second = trainer(tmp_path, max_steps=1)
    second.train()
    assert torch.equal(loss_of(second).prototypes.mean, loss_of(first).prototypes.mean)


def test_prototypes_of_images_that_may_change_are_not_kept(tmp_path):
    turned = image_dataset(18, KNOWN).with_transform(lambda rows: rows)
    trained = trainer(tmp_path, train_dataset=turned, max_steps=1)
    trained.train()
    cached = trainer(tmp_path, max_steps=1)
    cached.train()
    torch.testing.assert_close(loss_of(trained).prototypes.mean, loss_of(cached).prototypes.mean, rtol=0, atol=1e-6)


def test_second_training_starts_without_the_epochs_of_the_first(tmp_path):
    trained = trainer(tmp_path)
    trained.train()
    assert len(loss_of(trained).history) == 3  # the last epoch teaches no other
    trained.train()
    assert len(loss_of(trained).history) == 3


# --- the teacher ---


def test_without_distillation_there_is_no_teacher(tmp_path):
    trained = trainer(tmp_path, config={"distillation_weight": 0.0})
    trained.train()
    assert loss_of(trained).teacher is None


@pytest.mark.parametrize("method", ["saft", "aclip", "lora"])
def test_wise_ft_leaves_the_generator_out(tmp_path, method):
    trained = trainer(tmp_path, method)
    zero_shot = trained.evaluate()
    trained.train()
    generator = [parameter.clone() for parameter in loss_of(trained).generator.parameters()]
    sweep = trained.wise_ft_sweep(image_dataset(7, KNOWN, seed=50), alphas=[0.0, 1.0])
    assert sweep.rows[0]["new_loss"] == pytest.approx(zero_shot["eval_new_loss"])
    assert sweep.rows[1]["new_loss"] != pytest.approx(zero_shot["eval_new_loss"])
    assert all(map(torch.equal, generator, loss_of(trained).generator.parameters()))


# --- what is saved ---


@all_methods
def test_saved_adapter_is_that_of_a_training_without_ogen(tmp_path, method):
    files, tensors, configs = [], [], []
    for ogen in (True, False):
        folder = tmp_path / str(ogen)
        trained = trainer(folder, method, ogen=ogen)
        trained.train()
        trained.save_model()
        files.append({path.name for path in folder.iterdir()})
        tensors.append(
            {name: tensor.dtype for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
        )
        configs.append(json.loads((folder / "adapter_config.json").read_text()))
        configs[-1].get("saved", {}).pop("sha256", None)  # of the values
    assert files[0] == files[1] and tensors[0] == tensors[1]
    assert configs[0] == configs[1]


@all_methods
def test_inference_costs_nothing_extra(tmp_path, method):
    trained = trainer(tmp_path, method)
    trained.train()
    trained.save_model()
    loaded = PeftModel.from_pretrained(tiny_model("clip"), tmp_path)
    plain = ZeroShotClassifier(loaded, tiny_processor("clip"), KNOWN, trained.model.templates).eval()
    with torch.no_grad():
        output, expected = trained.model.eval()(**batch()), plain(**batch())
    assert output.keys() == expected.keys()
    assert torch.equal(output.logits, expected.logits)


def test_saved_folder_says_which_new_names_were_given(tmp_path):
    trained = trainer(tmp_path)
    trained.train()
    trained.save_model()
    assert json.loads((tmp_path / "classifier.json").read_text())["new_class_names"] == NEW


# --- resuming ---


@pytest.mark.parametrize("noise", ["batch", "sample"])
@pytest.mark.parametrize("step", [10, 13], ids=["end of an epoch", "middle of an epoch"])
@pytest.mark.parametrize("method", ["context", "saft", "lora"])
def test_resumed_run_ends_bit_identical(tmp_path, method, step, noise):
    settings = {"save_strategy": "steps", "save_steps": step, "logging_strategy": "steps", "logging_steps": 1}
    config = {"largest_window": 3, "noise": noise}
    whole = trainer(tmp_path, method, config=config, **settings)
    whole.train()
    resumed = trainer(tmp_path, method, config=config, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert same(weights(whole), weights(resumed))
    kept = [loss_of(one).history.state_dict() for one in (whole, resumed)]
    assert same(*kept) and len(loss_of(whole).history) == 3
    logs = [
        [entry for entry in one.state.log_history if entry["step"] > step and "loss_ogen_new" in entry]
        for one in (whole, resumed)
    ]
    assert logs[0] == logs[1] and logs[0]


def test_checkpoint_of_another_training_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5, "max_steps": 5}
    others = {**settings, "allow_changed": ["losses", "parameters"]}
    checkpoint = str(tmp_path / "checkpoint-5")
    trainer(tmp_path, ogen=False, **settings).train()
    with pytest.raises(AdapterFileError, match="state of other losses"):
        trainer(tmp_path, **others).train(checkpoint)
    trainer(tmp_path, **settings, config={"layer_norm": True}).train()
    with pytest.raises(CheckpointError, match="layer_norm was True, is False"):
        trainer(tmp_path, **settings).train(checkpoint)
    with pytest.raises(AdapterFileError, match="state of other losses"):
        trainer(tmp_path, **others).train(checkpoint)


# --- errors ---


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="vision tower must stay as it is.*towers='text'"):
        build(tmp_path, "saft", train_dataset=image_dataset(8, KNOWN), losses=[OGENLoss(OGENConfig(NEW))])
    with pytest.raises(ConfigError, match="vision tower must stay as it is"):
        build(tmp_path, "full", train_dataset=image_dataset(8, KNOWN), losses=[OGENLoss(OGENConfig(NEW))])
    with pytest.raises(ConfigError, match="OGEN trains the text tower.*'frozen'"):
        trainer(tmp_path, head="frozen")


@pytest.mark.parametrize(
    ("known", "new", "message"),
    [
        (["red"], NEW, "too few known classes.*got 1; allowed at least 4"),
        (["red", "green", "blue"], NEW, "too few known classes.*got 3; allowed at least 4"),
        (KNOWN, ["cat", "dog"], "too few new classes.*got 2; allowed at least 3"),
        (KNOWN, ["cat", " Red", "owl"], "among the known ones.*' Red'"),
    ],
)
def test_bad_class_names_are_refused(tmp_path, known, new, message):
    model, templates = METHODS["lora"]("clip")
    settings = {"eval_dataset": None, "train_dataset": image_dataset(8, known), "templates": templates}
    with pytest.raises(DataError, match=message):
        build(tmp_path, model=model, losses=[OGENLoss(OGENConfig(new))], **settings)


def test_class_without_image_is_refused_before_training(tmp_path):
    images = image_dataset(18, KNOWN)
    trained = trainer(tmp_path, train_dataset=images.filter(lambda label: label != 2, input_columns="label"))
    before = weights(trained)
    with pytest.raises(DataError, match="1 classes have no image.*'blue'"):
        trained.train()
    assert same(before, weights(trained))
