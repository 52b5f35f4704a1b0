# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is resumed as the run it is of, or not at all."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from dataclasses import fields

import pytest
import tokenizers
import torch
from datasets import ClassLabel
from peft import LoraConfig, get_peft_model
from PIL import ImageOps
from torch import nn
from transformers import EarlyStoppingCallback

from hf_robust import RobustTrainer, RobustTrainingArguments, SAFTConfig
from hf_robust.data.collator import ImageCollator
from hf_robust.data.digest import rows_digest
from hf_robust.data.rows import labelled_images
from hf_robust.errors import CheckpointError, ConfigError
from hf_robust.training import same_run
from hf_robust.training.same_run import KEPT_BY_THE_OPTIMIZER, WITHOUT_EFFECT, bit_digest, differences, listed
from tests.tiny_models import image_dataset, tiny_model, tiny_processor
from tests.trainers import NAMES, build, same, trained, weights

SETTINGS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "per_device_train_batch_size": 4}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, trained(folder, "saft", **SETTINGS)


def resume(run, tmp_path, method="saft", **changed):
    shutil.copytree(run[0] / "checkpoint-2", tmp_path / "checkpoint-2", dirs_exist_ok=True)
    resumed = build(tmp_path, method, **{**SETTINGS, **changed})
    resumed.train(resume_from_checkpoint=True)
    return resumed


def saft(**settings):
    return get_peft_model(tiny_model("clip"), SAFTConfig(**{"density": 0.01, **settings}))


def other_base():
    torch.manual_seed(7)
    base = tiny_model("clip")
    with torch.no_grad():
        base.visual_projection.weight[0, 0] += 1e-3
    return get_peft_model(base, SAFTConfig(density=0.01))


def with_dropout():
    base = tiny_model("clip")
    base.config.text_config.attention_dropout = 0.5
    return get_peft_model(base, SAFTConfig(density=0.01))


def other_size():
    processor = copy.deepcopy(tiny_processor("clip"))
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    return processor


def other_tokens():
    processor = copy.deepcopy(tiny_processor("clip"))
    processor.tokenizer.backend_tokenizer.normalizer = tokenizers.normalizers.Replace("d", "e")
    return processor


def another_loss(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits, labels)


STOPPING = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "eval_id_loss"}
STOPPING["allow_changed"] = ["metric_for_best_model", "greater_is_better", "evaluation_data", *same_run.CHOOSING]


class Collator:
    """A user's own."""

    def __call__(self, rows):
        return ImageCollator(tiny_processor("clip"))(rows)


class OtherTrainer(RobustTrainer):
    """A user's own, as for another loss."""


def transformed(rows):
    return rows.with_transform(lambda batch: batch)


CHANGES = {
    "seed": lambda: {"seed": 43},
    "learning_rate": lambda: {"learning_rate": 2e-2},
    "max_steps": lambda: {"max_steps": 5},
    "num_train_epochs": lambda: {"num_train_epochs": 3},
    "lr_scheduler_type": lambda: {"lr_scheduler_type": "cosine"},
    "per_device_train_batch_size": lambda: {"per_device_train_batch_size": 2},
    "gradient_accumulation_steps": lambda: {"gradient_accumulation_steps": 2},
    "losses": lambda: {"losses": {"similarity": {}}},
    "label_smoothing_factor": lambda: {"label_smoothing_factor": 0.1},
    "bf16": lambda: {"bf16": True},
    "optim": lambda: {"optim": "sgd"},
    "templates": lambda: {"templates": "b c {}."},
    "head": lambda: {"head": "trainable"},
    "class_names": lambda: {"class_names": ["cat", "dog", "owl"]},
    "adapters": lambda: {"method": "full", "model": saft(density=0.02)},
    "pretrained_weights": lambda: {"method": "full", "model": other_base()},
    "data": lambda: {"train_dataset": image_dataset(18, NAMES, seed=3)},
    "image_processor.image_mean": lambda: {"processing_class": other_size()},
    "collator": lambda: {"data_collator": ImageCollator(tiny_processor("clip"), ImageOps.mirror)},
    "compute_loss_func": lambda: {"compute_loss_func": another_loss},
    "optimizer": lambda: {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
    "model.text_config.attention_dropout": lambda: {"method": "full", "model": with_dropout()},
    "trainer": lambda: {"cls": OtherTrainer},
    "data_transform": lambda: {"train_dataset": transformed(image_dataset(18, NAMES))},
    "Collator": lambda: {"data_collator": Collator()},
    "image_processor": lambda: {"data_collator": ImageCollator(other_size())},
    "prompts": lambda: {"processing_class": other_tokens()},
    "callbacks": lambda: {"callbacks": [EarlyStoppingCallback()], **STOPPING},
    "data.rows": lambda: {"train_dataset": image_dataset(15, NAMES)},
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_run_is_refused_with_old_and_new_values(run, tmp_path, name):
    with pytest.raises(CheckpointError, match=rf"another run: .*{name}.* was .*, is .*allow_changed="):
        resume(run, tmp_path, **CHANGES[name]())


def test_another_method_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="another run: .*adapters.default"):
        resume(run, tmp_path, "lora")


def test_what_is_allowed_may_change(run, tmp_path, caplog):
    changed = {"max_steps": 6, "label_smoothing_factor": 0.1}
    with pytest.raises(CheckpointError, match="another run: label_smoothing_factor was 0.0, is 0.1"):
        resume(run, tmp_path, **changed, allow_changed=["max_steps"])
    with caplog.at_level(logging.WARNING, "hf_robust"):
        longer = resume(run, tmp_path, **changed, allow_changed=["max_steps", "label_smoothing_factor"])
    assert longer.state.global_step == 6
    assert "with changes: max_steps was 4, is 6; label_smoothing_factor was 0.0, is 0.1" in caplog.text
    with pytest.raises(ConfigError, match="nothing of that name.*allow_changed.*learnin_rate.*learning_rate"):
        resume(run, tmp_path, allow_changed=["learnin_rate"])


@pytest.mark.parametrize("name", KEPT_BY_THE_OPTIMIZER)
def test_what_the_saved_optimizer_brings_along_cannot_change(run, tmp_path, name):
    """It would be in the card, and in no step."""
    with pytest.raises(ConfigError, match=f"saved state.*allow_changed.*{name}"):
        resume(run, tmp_path, allow_changed=[name])


def test_a_group_and_a_part_of_it_may_be_allowed(run, tmp_path):
    with pytest.raises(CheckpointError, match="data.images was"):
        resume(run, tmp_path, train_dataset=image_dataset(18, NAMES, seed=3), allow_changed=["data.labels"])
    resume(run, tmp_path, train_dataset=image_dataset(18, NAMES, seed=3), allow_changed=["data"])


WITHOUT = {
    "logging_steps": 3,
    "logging_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 1,
    "dataloader_num_workers": 1,
    "per_device_eval_batch_size": 3,
    "eval_strategy": "epoch",
    "run_name": "another",
    "ddp_timeout": 30,
    "selection_batch_size": 2,
}


def test_an_optimizer_given_is_compared_by_its_class(tmp_path):
    def given(cls):
        run = build(tmp_path, **SETTINGS)
        return build(tmp_path, optimizers=(cls(run.model.parameters(), lr=1e-3), None), model=run.model, **SETTINGS)

    run = given(torch.optim.AdamW)
    run.train()
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(CheckpointError, match="optimizer was .*AdamW.*, is .*RAdam"):
        given(torch.optim.RAdam).train(resume_from_checkpoint=True)


def test_precision_of_the_launcher_is_compared(run, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(CheckpointError, match="mixed_precision was 'no', is 'bf16'"):
        resume(run, tmp_path)


def test_infinite_settings_are_described(tmp_path):
    build(tmp_path, max_grad_norm=float("inf"), **SETTINGS).train()
    build(tmp_path, max_grad_norm=float("inf"), **SETTINGS).train(resume_from_checkpoint=True)


def test_a_stream_is_resumed_in_its_first_pass_alone(tmp_path):
    """Trainer counts its steps as if a pass never ended."""

    def stream():
        rows = image_dataset(12, NAMES).to_iterable_dataset()
        return build(tmp_path, **{**SETTINGS, "save_steps": 1}, train_dataset=rows)

    whole = stream()
    whole.train()
    first = stream()
    first.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(first), weights(whole))
    with pytest.raises(CheckpointError, match="stream cannot be resumed.*got 'pass 2'"):
        stream().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_what_changes_nothing_may_differ(run, tmp_path):
    assert same(weights(resume(run, tmp_path, **WITHOUT)), weights(run[1]))


def test_a_folder_that_was_moved_is_the_same_data(tmp_path):
    table = image_dataset(6, NAMES)
    digests = []
    for folder in ("here", "there"):
        (tmp_path / folder / "red").mkdir(parents=True)
        for number, row in enumerate(table):
            row["image"].save(tmp_path / folder / "red" / f"{number}.png")
        names = [str(tmp_path / folder / "red" / f"{number}.png") for number in range(6)]
        paths = table.remove_columns("image").add_column("image", names)
        digests.append(rows_digest(labelled_images(paths, "train")))
    assert digests[0] == digests[1] and digests[0]["images"] is not None
    (tmp_path / "there" / "red" / "3.png").write_bytes(b"other")
    assert rows_digest(labelled_images(paths, "train")) != digests[0]


def test_order_of_rows_and_names_of_classes_count():
    rows = image_dataset(6, NAMES)
    digest = rows_digest(labelled_images(rows, "train"))
    assert digest == rows_digest(labelled_images(rows, "train").select(range(6)))
    assert digest != rows_digest(labelled_images(rows, "train").select([1, 0, 2, 3, 4, 5]))
    renamed = rows.cast_column("label", ClassLabel(names=["a", "b", "c"]))
    assert list(differences(digest, rows_digest(labelled_images(renamed, "train")))) == ["class_names"]


def test_data_that_shows_only_when_it_is_read_is_known_by_labels():
    rows = [(row["image"], row["label"]) for row in image_dataset(6, NAMES)]
    stream = image_dataset(6, NAMES).to_iterable_dataset()
    assert rows_digest(labelled_images(rows, "train"))["images"] is None
    assert rows_digest(labelled_images(stream, "train"))["rows"] is None


def test_evaluations_count_where_they_choose(run, tmp_path):
    chosen = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    chosen |= {"metric_for_best_model": "eval_id_loss"}
    build(tmp_path, "saft", **SETTINGS, **chosen).train()
    for changed, name in (
        ({"eval_steps": 1, "save_steps": 1}, "eval_steps was 2, is 1"),
        ({"eval_dataset": {"id": image_dataset(8, NAMES, seed=50)}}, "evaluation_data"),
    ):
        other = build(tmp_path, "saft", **{**SETTINGS, **chosen, **changed})
        with pytest.raises(CheckpointError, match=f"another run: .*{name}"):
            other.train(resume_from_checkpoint=True)


def test_other_versions_are_a_warning(run, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(same_run.__dict__, "version", lambda package: "0.0")
    with caplog.at_level(logging.WARNING, "hf_robust"):
        resumed = resume(run, tmp_path)
    assert "other versions" in caplog.text and "is '0.0'" in caplog.text
    assert same(weights(resumed), weights(run[1]))


def test_a_second_training_of_one_trainer_is_the_same_run(tmp_path):
    """A model that is trained whole is θ₀ no more; what is compared is the θ₀ that was kept."""
    again = build(tmp_path, "full", losses={"similarity": {}}, cache_reference_embeddings=True, **SETTINGS)
    again.train()
    once = weights(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(again), once)


def test_every_argument_is_compared_or_named_as_without_effect(run):
    described = json.loads((run[0] / "checkpoint-2" / "manifest.json").read_text())["run"]
    for field in fields(RobustTrainingArguments):
        is_compared = field.name in described
        of_the_task = field.name in ("task", "templates", "head", "losses")
        assert is_compared != bool(WITHOUT_EFFECT.fullmatch(field.name)) or of_the_task


def test_the_order_of_parameters_counts():
    """An optimizer's state is matched by position."""
    first, second = {"a": 1, "b": 1}, {"b": 1, "a": 1}
    assert differences({"parameters": first}, {"parameters": second}) == {"parameters.order": (["a", "b"], ["b", "a"])}
    assert differences({"parameters": first}, {"parameters": dict(first)}) == {}


def test_long_lists_of_differences_are_cut():
    text = listed({f"name{i}": ([0] * 1000, i) for i in range(9)})
    assert text.endswith("(+5 more)") and len(text) < 600


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (0,)])
def test_any_changed_bit_changes_the_digest(dtype, shape):
    tensor = torch.ones(shape, dtype=dtype)
    digest = bit_digest([("a", tensor)])
    assert digest == bit_digest([("a", tensor.clone())]) != bit_digest([("b", tensor)])
    for index in range(tensor.numel()):
        changed = tensor.clone()
        changed.view(-1)[index] = 0
        assert bit_digest([("a", changed)]) != digest
    if tensor.numel() > 1:  # a view that starts in the middle of a word
        assert bit_digest([("a", tensor.view(-1)[1:])]) == bit_digest([("a", tensor.view(-1)[1:].clone())])


def test_lora_is_compared_by_its_settings(tmp_path):
    def lora(rank):
        return get_peft_model(tiny_model("clip"), LoraConfig(r=rank, target_modules=["q_proj", "v_proj"]))

    build(tmp_path, model=lora(2), **SETTINGS).train()
    with pytest.raises(CheckpointError, match="adapters.default.r was 2, is 4"):
        build(tmp_path, model=lora(4), **SETTINGS).train(resume_from_checkpoint=True)
    build(tmp_path, model=lora(2), **SETTINGS).train(resume_from_checkpoint=True)
