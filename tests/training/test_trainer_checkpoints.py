# SPDX-License-Identifier: Apache-2.0
"""What RobustTrainer saves, and resuming from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, TrainerCallback

from hf_robust import SAFTConfig
from hf_robust.data.collator import ImageCollator
from hf_robust.errors import AdapterFileError, CheckpointError
from hf_robust.tasks.class_names import ZeroShotClassifier
from hf_robust.training import starting
from hf_robust.training.manifest import MANIFEST, read_manifest, seal_checkpoint
from tests.tiny_models import image_dataset, tiny_model, tiny_processor
from tests.trainers import METHODS, NAMES, build, entries, same, weights

# PEFT's own LN tuning warns about every LayerNorm
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")


@pytest.mark.parametrize(
    ("method", "head"),
    [("saft", "live"), ("saft", "frozen"), ("saft", "trainable"), ("lora", "frozen")]
    + [("full", "trainable"), ("full", "frozen"), ("ln_tuning", "live"), ("radapter", "live")],
)
def test_resumed_run_ends_bit_identical(tmp_path, method, head, monkeypatch):
    settings = {"head": head, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = build(tmp_path, method, **settings)
    whole.train()
    monkeypatch.setattr(starting, "select_saft", lambda *args: pytest.fail("selected again"))
    resumed = build(tmp_path, method, **settings)
    before = weights(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert not same(before, weights(resumed))
    assert same(weights(whole), weights(resumed))
    assert same(entries(whole), entries(resumed))
    flags = [{name: p.requires_grad for name, p in one.model.named_parameters()} for one in (whole, resumed)]
    assert flags[0] == flags[1]


@pytest.mark.parametrize("method", METHODS)
def test_best_model_is_loaded_at_the_end(tmp_path, method):
    def after_one_epoch_is_best(prediction):
        return {"score": float(trained.state.global_step <= 5)}

    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    settings |= {"metric_for_best_model": "eval_score", "head": "trainable"}
    settings |= {"compute_metrics": after_one_epoch_is_best, "eval_dataset": image_dataset(7, NAMES, seed=50)}
    trained = build(tmp_path, method, **settings)
    trained.train()
    assert trained.state.best_model_checkpoint.endswith("checkpoint-5")
    stopped = build(tmp_path / "stopped", method, head="trainable", num_train_epochs=2, callbacks=[StopAfter(5)])
    stopped.train()
    assert same(weights(trained), weights(stopped))


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("method", METHODS)
def test_saved_folder_is_read_by_stock_libraries(tmp_path, method):
    trained = build(tmp_path, method, hub_token="secret")
    trained.train()
    trained.save_model()
    if method == "full":
        loaded = AutoModel.from_pretrained(tmp_path)
    else:
        loaded = PeftModel.from_pretrained(tiny_model("clip"), tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path, subfolder="" if method == "full" else "processor")
    classifier = ZeroShotClassifier(loaded, processor, NAMES).eval()
    batch = ImageCollator(tiny_processor("clip"))(list(image_dataset(7, NAMES, seed=50)))
    with torch.no_grad():
        assert torch.equal(classifier(**batch).logits, trained.model.eval()(**batch).logits)
    written = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert not any(name.endswith((".bin", ".pt", ".pkl")) or b"secret" in content for name, content in written.items())
    expected = {"task": "class_names", "class_names": NAMES, "templates": ["a photo of a {}."], "head": "live"}
    assert json.loads(written["classifier.json"]) == expected


def test_named_adapter_is_resumed(tmp_path):
    def named():
        return get_peft_model(tiny_model("clip"), SAFTConfig(density=0.01), adapter_name="mine")

    settings = {"save_strategy": "steps", "save_steps": 5}
    whole = build(tmp_path, model=named(), **settings)
    whole.train()
    resumed = build(tmp_path, model=named(), **settings)
    resumed.train(str(tmp_path / "checkpoint-5"))
    assert same(weights(whole), weights(resumed))


def saved(folder, method="lora", **settings):
    trained = build(folder, method, max_steps=1, save_strategy="steps", save_steps=1, **settings)
    trained.train()
    return str(folder / "checkpoint-1")


def seal_again(checkpoint):
    """As if the checkpoint had been saved with what its files hold now."""
    facts = read_manifest(Path(checkpoint))
    for name in ("files", "format_version"):
        del facts[name]
    Path(checkpoint, MANIFEST).unlink()
    seal_checkpoint(Path(checkpoint), facts)


def test_checkpoint_for_other_classes_or_head_is_refused(tmp_path):
    checkpoint, settings = (
        saved(tmp_path),
        {"max_steps": 1, "allow_changed": ["class_names", "prompts", "head", "parameters"]},
    )
    with pytest.raises(AdapterFileError, match="other classes"):
        build(tmp_path, "lora", class_names=["a", "b", "c"], **settings).train(checkpoint)
    with pytest.raises(AdapterFileError, match="another head"):
        build(tmp_path, "lora", head="trainable", **settings).train(checkpoint)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpoint_without_some_tensors_is_refused(tmp_path, method):
    checkpoint = saved(tmp_path, method)
    file = next(Path(checkpoint).glob("*model.safetensors"))
    tensors = load_file(file)
    tensors.pop(sorted(name for name in tensors if "v_proj" in name)[0])
    save_file(tensors, file, metadata={"format": "pt"})
    seal_again(checkpoint)
    with pytest.raises(AdapterFileError, match="lacks 1 tensors"):
        build(tmp_path, method, max_steps=1).train(checkpoint)


@pytest.mark.parametrize("method", ["saft", "aclip"])
def test_checkpoint_with_the_settings_of_another_adapter_is_refused(tmp_path, method):
    checkpoint = saved(tmp_path, method)
    file = Path(checkpoint, "adapter_config.json")
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 2'))
    seal_again(checkpoint)
    with pytest.raises(AdapterFileError, match="format is newer"):
        build(tmp_path, method, max_steps=1).train(checkpoint)


def test_resuming_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        build(tmp_path, "saft").train(resume_from_checkpoint=True)
