# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, AutoProcessor, CLIPVisionModel

from hf_robust import SAFTConfig, select_saft, trainer
from hf_robust.collator import ImageCollator
from hf_robust.errors import AdapterFileError, ConfigError, DataError, NonFiniteError
from hf_robust.trainer import RobustTrainer
from hf_robust.training_args import RobustTrainingArguments
from hf_robust.zero_shot import ZeroShotClassifier
from tests.tiny_models import FAMILIES, image_dataset, tiny_model, tiny_processor

NAMES = ["red", "green", "blue"]
OTHER_NAMES = ["cat", "dog"]

# PEFT's own LN tuning warns about every LayerNorm
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")


def layer_norms(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]


METHODS = {
    "full": lambda model: model,
    "saft": lambda model: get_peft_model(model, SAFTConfig(density=0.01)),
    "lora": lambda model: get_peft_model(model, LoraConfig(target_modules="all-linear")),
    "ln_tuning": lambda model: get_peft_model(model, LNTuningConfig(target_modules=layer_norms(model))),
}


def build(folder, method="full", family="clip", model=None, **settings):
    """A trainer on 18 pictures of three classes, with an evaluation set of the same and one of two other classes."""
    cls, callbacks = settings.pop("cls", RobustTrainer), settings.pop("callbacks", None)
    datasets = {
        "train_dataset": settings.pop("train_dataset", image_dataset(18, NAMES)),
        "eval_dataset": {"id": image_dataset(7, NAMES, seed=50), "new": image_dataset(9, OTHER_NAMES, seed=90)},
    }
    datasets["eval_dataset"] = settings.pop("eval_dataset", datasets["eval_dataset"])
    class_names = settings.pop("class_names", None)
    defaults = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    quiet = {"use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
    args = RobustTrainingArguments(str(folder), **{**defaults, **quiet, **settings})
    torch.manual_seed(0)  # LoRA's first weights
    model = METHODS[method](tiny_model(family) if model is None else model)
    processor = tiny_processor(family)
    return cls(model, args, **datasets, processing_class=processor, class_names=class_names, callbacks=callbacks)


def weights(trainer):
    """The trained tensors; the weights of a model with SAFT show its values only from the next forward on."""
    named = trainer.model.named_parameters()
    return {name: parameter.detach().clone() for name, parameter in named if parameter.requires_grad}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- training ---


@pytest.mark.parametrize(
    ("method", "family"),
    [(method, family) for method in ("full", "saft") for family in FAMILIES]
    + [("lora", "clip"), ("ln_tuning", "clip")],
)
def test_every_method_learns_and_every_family_can_be_taught(tmp_path, method, family):
    trained = build(tmp_path, method, family)
    before = trained.evaluate()
    trained.train()
    after = trained.evaluate()
    assert after["eval_id_loss"] < before["eval_id_loss"]
    assert all(0 <= after[f"eval_{name}_accuracy"] <= 1 for name in ("id", "new"))


@pytest.mark.parametrize("method", ["full", "saft"])
def test_accumulated_micro_batches_equal_the_big_batch(tmp_path, method):
    """With 13 images the last step of an epoch has five; with micro-batches of four these are four and one."""

    def run(size, steps):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "optim": "sgd"}
        settings |= {
            "learning_rate": 0.05,
            "max_grad_norm": 0.5,
            "num_train_epochs": 1,
            "train_dataset": image_dataset(13, NAMES),
        }
        trained = build(tmp_path, method, model=tiny_model("clip").double(), **settings)
        trained.train()
        return weights(trained)

    big = run(8, 1)
    for size, steps in [(1, 8), (4, 2)]:
        for name, weight in run(size, steps).items():
            torch.testing.assert_close(weight, big[name], rtol=1e-9, atol=1e-12, msg=name)


class TwoTerms(RobustTrainer):
    def loss_terms(self, outputs, inputs):
        return {**super().loss_terms(outputs, inputs), "spread": outputs.image_embeds.var(dim=0).sum()}


def test_loss_is_the_sum_of_its_terms_and_each_is_logged(tmp_path):
    settings = {"logging_strategy": "steps", "logging_steps": 2, "gradient_accumulation_steps": 2}
    trained = build(tmp_path, cls=TwoTerms, **settings)
    trained.train()
    logs = [entry for entry in trained.state.log_history if "loss" in entry]
    assert len(logs) == 3
    for entry in logs:
        assert entry["loss_spread"] > 0
        assert entry["loss"] == pytest.approx(entry["loss_cross_entropy"] + entry["loss_spread"], rel=1e-5)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain, checkpointed = (build(tmp_path, "saft", activation_checkpointing=flag) for flag in (False, True))
    plain.train(), checkpointed.train()
    assert checkpointed.model.model.get_base_model().vision_model.is_activation_checkpointing
    for name, weight in weights(plain).items():
        torch.testing.assert_close(weights(checkpointed)[name], weight, rtol=1e-4, atol=1e-6)


def test_a_classifier_may_be_given(tmp_path):
    classifier = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), NAMES, head="trainable")
    trained = RobustTrainer(
        classifier,
        RobustTrainingArguments(str(tmp_path), use_cpu=True, disable_tqdm=True, max_steps=1, save_strategy="no"),
        train_dataset=[dict(row) for row in image_dataset(6, NAMES)],  # a dataset of another kind
        processing_class=tiny_processor("clip"),
    )
    trained.train()
    assert trained.model is classifier and classifier.class_head.weight.grad is None and classifier.head == "trainable"


# --- SAFT's entries ---


def entries(trainer):
    return {name: buffer for name, buffer in trainer.model.named_buffers() if "saft_indices" in name}


def test_selection_sees_every_image_once_in_order(tmp_path, monkeypatch, capsys):
    seen = []

    def spy(model, batches, loss_fn):
        batches = list(batches)
        seen.extend(batch["pixel_values"] for batch in batches)
        select_saft(model, batches, loss_fn)

    monkeypatch.setattr(trainer, "select_saft", spy)
    trained = build(tmp_path, "saft", selection_batch_size=4, train_dataset=image_dataset(13, NAMES))
    trained.train()
    rows = list(image_dataset(13, NAMES))
    assert [len(batch) for batch in seen] == [4, 4, 4, 1]
    assert torch.equal(torch.cat(seen), ImageCollator(tiny_processor("clip"))(rows)["pixel_values"])
    assert "SAFT selected 754 of" in capsys.readouterr().out
    trained.train()
    assert len(seen) == 4


def test_entries_do_not_depend_on_settings_and_the_run_not_on_the_selection(tmp_path):
    first = build(tmp_path, "saft")
    first.train()
    for settings in [
        {"selection_batch_size": 5},
        {"gradient_accumulation_steps": 2, "activation_checkpointing": True},
    ]:
        other = build(tmp_path, "saft", **settings)
        other.train()
        assert same(entries(other), entries(first))
    by_hand = build(tmp_path, "saft")
    by_hand.select_entries()
    by_hand.train()
    assert same(weights(by_hand), weights(first))


def test_entries_come_from_both_towers(tmp_path):
    trained = build(tmp_path, "saft")
    trained.select_entries()
    assert any("vision_model" in name for name in entries(trained))
    assert any("text_model" in name for name in entries(trained))


def test_selection_leaves_autocast_behind(tmp_path):
    fresh, evaluated = build(tmp_path, "saft", bf16=True), build(tmp_path, "saft", bf16=True)
    evaluated.evaluate()  # prepares the model, with autocast
    fresh.select_entries(), evaluated.select_entries()
    assert same(entries(fresh), entries(evaluated))
    evaluated.train()
    assert math.isfinite(evaluated.evaluate()["eval_id_loss"])


# --- evaluation ---


def expected_accuracy(model, names, dataset):
    classifier = ZeroShotClassifier(model, tiny_processor("clip"), names).eval()
    batch = ImageCollator(tiny_processor("clip"))(list(dataset))
    with torch.no_grad():
        output = classifier(**batch)
    return (output.logits.argmax(1) == batch["labels"]).double().mean().item(), output.loss.item()


@pytest.mark.parametrize("head", ["live", "frozen", "trainable"])
@pytest.mark.parametrize("size", [3, 8])
def test_each_set_is_classified_among_its_own_classes(tmp_path, head, size):
    trained = build(tmp_path, per_device_eval_batch_size=size, head=head)
    trained.train()
    metrics = trained.evaluate()
    accuracy, loss = expected_accuracy(trained.model.model, OTHER_NAMES, image_dataset(9, OTHER_NAMES, seed=90))
    assert metrics["eval_new_accuracy"] == accuracy
    assert metrics["eval_new_loss"] == pytest.approx(
        loss, rel=1e-4, abs=1e-6
    )  # mean over images, also with a short last batch
    assert trained.model.class_names == NAMES
    if head == "live":
        accuracy, loss = expected_accuracy(trained.model.model, NAMES, image_dataset(7, NAMES, seed=50))
        assert metrics["eval_id_accuracy"] == accuracy
        assert metrics["eval_id_loss"] == pytest.approx(loss, rel=1e-4, abs=1e-6)


def test_one_set_a_name_and_sets_at_call_time(tmp_path):
    trained = build(tmp_path)
    whole = trained.evaluate()
    assert trained.evaluate("new", metric_key_prefix="x")["x_accuracy"] == whole["eval_new_accuracy"]
    again = trained.evaluate({"late": image_dataset(9, OTHER_NAMES, seed=90)})
    assert again["eval_late_accuracy"] == whole["eval_new_accuracy"]
    alone = build(tmp_path, eval_dataset=image_dataset(7, NAMES, seed=50))
    assert alone.evaluate()["eval_accuracy"] == whole["eval_id_accuracy"]


def test_class_names_may_be_reworded(tmp_path):
    trained = build(tmp_path, class_names=["a red thing", "a green thing", "a blue thing"])
    accuracy, loss = expected_accuracy(tiny_model("clip"), trained.model.class_names, image_dataset(7, NAMES, seed=50))
    metrics = trained.evaluate()
    assert (metrics["eval_id_accuracy"], metrics["eval_id_loss"]) == (
        accuracy,
        pytest.approx(loss, rel=1e-4, abs=1e-6),
    )


def test_evaluation_during_training_and_prediction(tmp_path):
    trained = build(tmp_path, eval_strategy="epoch")
    trained.train()
    assert len([entry for entry in trained.state.log_history if "eval_new_accuracy" in entry]) == 2
    prediction = trained.predict(image_dataset(7, NAMES, seed=50))
    assert prediction.predictions.shape == (7, 3)
    assert prediction.metrics["test_accuracy"] == trained.evaluate("id")["eval_accuracy"]


# --- checkpoints ---


@pytest.mark.parametrize(
    ("method", "head"),
    [("saft", "live"), ("saft", "frozen"), ("saft", "trainable"), ("lora", "frozen")]
    + [("full", "trainable"), ("full", "frozen"), ("ln_tuning", "live")],
)
def test_resumed_run_ends_bit_identical(tmp_path, method, head, monkeypatch):
    settings = {"head": head, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    whole = build(tmp_path, method, **settings)
    whole.train()
    monkeypatch.setattr(trainer, "select_saft", lambda *args: pytest.fail("selected again"))
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
    trained = build(tmp_path, method, eval_dataset=image_dataset(7, NAMES, seed=50), **settings)
    trained.compute_metrics = after_one_epoch_is_best
    trained.train()
    assert trained.state.best_model_checkpoint.endswith("checkpoint-5")
    stopped = build(tmp_path / "stopped", method, head="trainable", num_train_epochs=2, callbacks=[StopAfter(5)])
    stopped.train()
    assert same(weights(trained), weights(stopped))


class StopAfter(trainer.TrainerCallback):
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
    classifier = ZeroShotClassifier(loaded, AutoProcessor.from_pretrained(tmp_path), NAMES).eval()
    batch = ImageCollator(tiny_processor("clip"))(list(image_dataset(7, NAMES, seed=50)))
    with torch.no_grad():
        assert torch.equal(classifier(**batch).logits, trained.model.eval()(**batch).logits)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert not any(name.endswith((".bin", ".pt", ".pkl")) or b"secret" in content for name, content in written.items())
    expected = {"class_names": NAMES, "templates": ["a photo of a {}."], "head": "live"}
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


def test_checkpoint_for_other_classes_or_head_is_refused(tmp_path):
    checkpoint = saved(tmp_path)
    with pytest.raises(AdapterFileError, match="another class_names"):
        build(tmp_path, "lora", class_names=["a", "b", "c"]).train(checkpoint)
    with pytest.raises(AdapterFileError, match="another head"):
        build(tmp_path, "lora", head="trainable").train(checkpoint)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_checkpoint_without_some_tensors_is_refused(tmp_path, method):
    checkpoint = saved(tmp_path, method)
    file = next(Path(checkpoint).glob("*model.safetensors"))
    tensors = load_file(file)
    tensors.pop(sorted(name for name in tensors if "v_proj" in name)[0])
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(AdapterFileError, match="lacks 1 tensors"):
        build(tmp_path, method).train(checkpoint)


def test_resuming_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="No valid checkpoint found"):
        build(tmp_path, "saft").train(resume_from_checkpoint=True)


# --- what is not finite ---


@pytest.mark.parametrize("method", ["full", "saft"])
def test_nan_loss_stops_before_the_step(tmp_path, method):
    class Broken(RobustTrainer):
        def loss_terms(self, outputs, inputs):
            terms = super().loss_terms(outputs, inputs)
            if self.state.global_step == 2:
                kept.update(weights(self))
                return {"cross_entropy": terms["cross_entropy"] * math.nan}
            return terms

    kept = {}
    trained = build(tmp_path, method, cls=Broken)
    with pytest.raises(NonFiniteError, match=r"loss is nan \(at step 3, rank 0\)"):
        trained.train()
    assert kept and same(weights(trained), kept)


def test_nan_gradient_stops_before_the_step(tmp_path):
    trained = build(tmp_path)
    weight = trained.model.model.visual_projection.weight
    weight.register_hook(lambda gradient: gradient * math.inf)
    before = weights(trained)
    with pytest.raises(NonFiniteError, match=r"gradient norm is (inf|nan) \(at step 1\)"):
        trained.train()
    assert same(weights(trained), before)


def test_nan_logits_stop_the_evaluation(tmp_path):
    trained = build(tmp_path)
    trained.model.model.visual_projection.weight.data[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="logits are not finite.*eval_id"):
        trained.evaluate()


# --- bad input ---


def two_labels(labels):
    return image_dataset(len(labels), NAMES).remove_columns("label").add_column("label", labels)


BAD_INPUT = {
    "no image column": ({"train_dataset": image_dataset(6, NAMES).rename_column("image", "x")}, DataError, "'image'"),
    "no label column": (
        {"train_dataset": image_dataset(6, NAMES).rename_column("label", "x"), "class_names": NAMES},
        DataError,
        "'label'",
    ),
    "label too large": (
        {"train_dataset": two_labels([0, 3]), "class_names": NAMES},
        DataError,
        "row 1 is no class.*train_dataset.*got 3",
    ),
    "fewer names than labels": ({"class_names": NAMES[:2]}, DataError, "row 2 is no class"),
    "bad evaluation set": (
        {"eval_dataset": {"id": image_dataset(3, NAMES), "ood": two_labels([0, 7])}},
        DataError,
        "row 1 is no class.*ood",
    ),
    "empty training set": ({"train_dataset": image_dataset(6, NAMES).select([])}, DataError, "empty.*train_dataset"),
    "empty evaluation set": ({"eval_dataset": {"ood": image_dataset(3, NAMES).select([])}}, DataError, "empty.*ood"),
    "no class names": ({"train_dataset": two_labels([0, 1])}, ConfigError, "class names are missing"),
    "repeated class name": ({"class_names": ["red", "Red ", "blue"]}, DataError, "twice"),
    "empty class name": ({"class_names": ["red", " ", "blue"]}, DataError, "empty"),
    "template without braces": ({"templates": "a photo"}, ConfigError, "without {}"),
    "unknown head": ({"head": "linear"}, ConfigError, "unknown head"),
    "label smoothing": ({"label_smoothing_factor": 0.1}, ConfigError, "label smoothing"),
    "one tower": (
        {"model": CLIPVisionModel(tiny_model("clip").config.vision_config)},
        ConfigError,
        "get_image_features/get_text_features",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_error_before_training(tmp_path, name):
    settings, error, message = BAD_INPUT[name]
    with pytest.raises(error, match=message):
        build(tmp_path, **settings)


def test_processor_is_required(tmp_path):
    with pytest.raises(ConfigError, match="processor"):
        RobustTrainer(tiny_model("clip"), RobustTrainingArguments(str(tmp_path), use_cpu=True))


def test_evaluation_set_at_call_time_is_checked(tmp_path):
    with pytest.raises(DataError, match="empty.*eval_late"):
        build(tmp_path).evaluate({"late": image_dataset(3, NAMES).select([])})


def test_defaults_that_differ(tmp_path):
    args = RobustTrainingArguments(str(tmp_path))
    assert (args.remove_unused_columns, args.ddp_broadcast_buffers, args.logging_nan_inf_filter) == (False,) * 3
    assert args.report_to == [] and args.dataloader_pin_memory == torch.accelerator.is_available()
    assert args.use_cpu == (not torch.accelerator.is_available())


# --- two ranks ---

TWO_RANKS = """
import sys
import torch
from hf_robust.errors import NonFiniteError
from hf_robust.trainer import RobustTrainer
from tests.test_trainer import NAMES, build, entries, image_dataset, weights

torch.set_num_threads(1)
folder = sys.argv[1]
result = {}

def scores(trained):
    return {name: value for name, value in trained.evaluate().items() if name.endswith(("accuracy", "loss"))}

for method in ("saft", "full"):
    trained = build(folder, method, train_dataset=image_dataset(13, NAMES))
    result["zero_shot"] = scores(trained)
    trained.train()
    result[method] = {"weights": weights(trained), "entries": entries(trained), "metrics": scores(trained)}

class Broken(RobustTrainer):
    def loss_terms(self, outputs, inputs):
        terms = super().loss_terms(outputs, inputs)
        bad = self.args.process_index == self.args.world_size - 1 and self.state.global_step == 1
        return {"cross_entropy": terms["cross_entropy"] * (float("nan") if bad else 1.0)}

try:
    build(folder, cls=Broken).train()
except NonFiniteError as error:
    result["error"] = str(error)
torch.save(result, f"{folder}/rank{trained.args.process_index}.pt")
trained.accelerator.end_training()
"""


def run_on_two_ranks(script, folder):
    """Runs a script as `accelerate launch` does, and returns what each rank saved."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "LOCAL_WORLD_SIZE": "2"}
    processes = []
    for rank in ("0", "1"):
        environment = {**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank}
        command = [sys.executable, str(script), str(folder)]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, error = process.communicate(timeout=240)
        assert process.returncode == 0, error[-4000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


def test_two_ranks_stay_bit_identical_and_agree_with_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS)
    first, second = run_on_two_ranks(script, tmp_path)
    for method in ("saft", "full"):
        assert same(first[method]["weights"], second[method]["weights"])
        assert same(first[method]["entries"], second[method]["entries"])
        assert first[method]["metrics"] == second[method]["metrics"]
    one = build(tmp_path, "saft", train_dataset=image_dataset(13, NAMES))
    zero_shot = one.evaluate()
    one.select_entries()
    assert entries(one) and same(entries(one), first["saft"]["entries"])
    for name, value in first["zero_shot"].items():  # padding that makes batches even is not counted
        assert value == pytest.approx(zero_shot[name], rel=1e-6)
    assert first["error"] == second["error"] and "loss is nan (at step 2, rank 1)" in first["error"]
