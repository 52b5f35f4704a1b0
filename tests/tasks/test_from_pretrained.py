# SPDX-License-Identifier: Apache-2.0
"""What was trained is loaded again, to the bit, by one call."""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from hf_robust import FLYP, Identities, ImageTextPairs, SeveralLabels, ZeroShotClassifier
from hf_robust.commands.merge import MergeArguments
from hf_robust.commands.merge import main as merge
from hf_robust.encoders.dual_encoder import base_model
from hf_robust.errors import AdapterFileError, ConfigError, DataError, NonFiniteError, UnsafeFileError
from hf_robust.tasks.task import Task
from tests.fake_hub import FakeHub
from tests.tiny_models import tiny_model, tiny_processor
from tests.trainers import NAMES, build

from .saved import PICTURES, TEST, Saved, captioned, people, save_base, save_trained, several

BY_HEAD = [(method, "live") for method in ("full", "saft", "aclip", "radapter", "lora")]
BY_HEAD += [("saft", "frozen"), ("full", "frozen")] + [(method, "trainable") for method in ("full", "saft", "lora")]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def base(root):
    return save_base(root)


@pytest.fixture(scope="module")
def classifiers(root, base):
    """Trained by method and head, each once."""

    def train(method, head):
        return save_trained(root, base, f"{method}-{head}", method, head=head, templates=["a {}", "the {}"])

    return functools.cache(train)


@pytest.fixture(scope="module")
def saft(classifiers):
    return classifiers("saft", "trainable")


@pytest.fixture(scope="module")
def full(classifiers):
    return classifiers("full", "live")


@pytest.fixture
def copied(saft, tmp_path):
    """A copy of an adapter's folder, to be spoiled."""
    return Path(shutil.copytree(saft.folder, tmp_path / "copied"))


def loaded(folder, cls=ZeroShotClassifier, **how):
    return cls.from_pretrained(folder, device="cpu", **how)


def assert_same_predictions(saved: Saved, task: ZeroShotClassifier) -> None:
    logits = torch.tensor(saved.trainer.predict(TEST).predictions)  # (images, classes)
    scores = logits.softmax(dim=1)
    found = task.predict(TEST, top_k=len(NAMES))
    for image, answers in enumerate(found):
        assert [one["label"] for one in answers] == [NAMES[i] for i in logits[image].argsort(descending=True)]
        assert [one["score"] for one in answers] == sorted(scores[image].tolist(), reverse=True)


@pytest.mark.parametrize(("method", "head"), BY_HEAD)
def test_predictions_are_the_trainers_to_the_bit(classifiers, method, head):
    saved = classifiers(method, head)
    before = torch.get_rng_state()
    task = loaded(saved.folder)
    assert torch.equal(before, torch.get_rng_state())
    assert type(task) is ZeroShotClassifier and task.head == head and task.templates == ("a {}", "the {}")
    assert not any(module.training for module in task.modules())
    assert isinstance(task.model, PeftModel) is (method != "full")
    assert_same_predictions(saved, task)


def test_flyp_and_its_class(root, base):
    saved = save_trained(root, base, "flyp", "aclip", task={"flyp": {"positives": "positive", "margin": 0.05}})
    task = loaded(saved.folder, FLYP)
    assert (task.positives, task.margin) == ("positive", 0.05)
    assert_same_predictions(saved, task)
    with pytest.raises(ConfigError, match=r"trained as FLYP.*got 'ZeroShotClassifier'.*Use FLYP.from_pretrained"):
        loaded(saved.folder)
    assert type(loaded(saved.folder, Task)) is FLYP


def test_a_class_of_the_users_own(saft):
    class Mine(ZeroShotClassifier):
        pass

    assert type(loaded(saft.folder, Mine)) is Mine


def test_several_labels_with_scale_bias_and_threshold(root, base):
    saved = save_trained(root, base, "several", "saft", task="several_labels", train_dataset=several())
    logits = torch.tensor(saved.trainer.predict(several(5, seed=9)).predictions)
    saved.trainer.model.threshold = float(logits.median())
    saved.trainer.save_model(saved.folder)
    task = loaded(saved.folder, Task)
    assert type(task) is SeveralLabels and task.threshold == float(logits.median()) and task.prepared == 1
    found = task.predict(several(5, seed=9))
    assert 0 < sum(map(len, found)) < logits.numel()
    for image, answers in enumerate(found):
        scores = logits[image].sigmoid()
        has = [i for i in logits[image].argsort(descending=True).tolist() if logits[image, i] >= task.threshold]
        assert answers == [{"label": NAMES[i], "score": scores[i].item()} for i in has]


def test_identities_and_their_head(root, base):
    saved = save_trained(root, base, "people", "lora", task="identities", train_dataset=people())
    task = loaded(saved.folder, Identities)
    assert task.identities == ["ann", "bob"] and torch.equal(task.head.W, saved.trainer.model.head.W)
    expected = saved.trainer.predict(people()).predictions
    assert np.array_equal(task.embed_images(people()), expected)


def test_pairs_of_images_and_texts(root, base):
    how = {"task": {"pairs": {"truncate": True}}, "train_dataset": captioned()}
    saved = save_trained(root, base, "pairs", "full", **how)
    task = loaded(saved.folder, ImageTextPairs)
    assert task.truncates and np.array_equal(
        task.embed_images(captioned()), saved.trainer.predict(captioned()).predictions
    )
    with torch.no_grad():
        own = saved.trainer.model.eval()
        tokens = own.tokenizer(["red 1", "x" * 200])
        expected = torch.nn.functional.normalize(own.model.get_text_features(**tokens).pooler_output, dim=-1)
    assert torch.equal(task.embed_texts(["red 1", "x" * 200]), expected)
    with pytest.raises(ConfigError, match="Use ImageTextPairs.from_pretrained"):
        loaded(saved.folder, Identities)


# --- where things are ---


def test_a_checkpoint_is_a_folder_like_others(root, base):
    save_trained(root, base, "of-checkpoint", "saft", save_strategy="steps", save_steps=2)
    assert loaded(root / "runs" / "checkpoint-2").class_names == NAMES
    (root / "run").mkdir()
    shutil.copytree(root / "runs" / "checkpoint-2", root / "run" / "checkpoint-2")
    shutil.copy(root / "run" / "checkpoint-2" / "classifier.json", root / "run")
    with pytest.raises(AdapterFileError, match=r"there is no model.*Give one of its checkpoints: checkpoint-2"):
        loaded(root / "run")


def test_from_the_hub_adapter_base_and_whole_model(hub: FakeHub, root, base, copied, full):
    def upload(repo, folder):
        names = [path for path in Path(folder).glob("**/*") if path.is_file()]
        hub.branches[repo] = {"main": [{}, {str(path.relative_to(folder)): path.read_bytes() for path in names}]}

    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "alice/base"}))
    for repo, folder in {"alice/base": base, "alice/saft": copied, "alice/full": full.folder}.items():
        upload(repo, folder)
    assert loaded("alice/saft").predict(PICTURES) == loaded(copied, base=base).predict(PICTURES)
    assert loaded("alice/full", revision="main").predict(PICTURES) == loaded(full.folder).predict(PICTURES)
    names = loaded("alice/base", class_names=["cat", "dog"], templates="photo")
    assert names.class_names == ["cat", "dog"] and len(names.templates) > 1
    hub.faults = {"info": [404]}
    with pytest.raises(ConfigError, match="no such model on the Hub.*got 'alice/nothing'"):
        loaded("alice/nothing")


def test_the_base_may_lie_elsewhere(copied, base, tmp_path):
    config = json.loads((copied / "adapter_config.json").read_text())
    for name, message in (
        (str(tmp_path / "gone"), r"the adapter's base.*got '.*gone'.*base="),
        (None, "not name its"),
    ):
        (copied / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        with pytest.raises((ConfigError, AdapterFileError), match=message):
            loaded(copied)
        assert loaded(copied, base=base).class_names == NAMES


def test_images_of_another_size_in_training(root, base):
    saved = save_trained(root, base, "larger", "saft", image_size=64)
    task = loaded(saved.folder)
    assert task.processor.image_processor.crop_size["height"] == 64
    assert_same_predictions(saved, task)


def test_merged_models_and_soups(root, base, classifiers):
    saved = classifiers("saft", "live")
    merge(MergeArguments(zero_shot=base, fine_tuned=saved.folder, output=str(root / "merged"), alpha=[1.0]))
    assert not isinstance(loaded(root / "merged").model, PeftModel)
    assert_same_predictions(saved, loaded(root / "merged"))
    other = save_trained(root, base, "other", "saft", seed=3, templates=["a {}", "the {}"])
    merge(MergeArguments(soup=[saved.folder, other.folder], output=str(root / "soup"), use_cpu=True))
    assert loaded(root / "soup").class_names == NAMES


def test_the_active_ones_of_several_adapters(root, base):
    def with_two(active):
        torch.manual_seed(0)
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        model = get_peft_model(AutoModel.from_pretrained(base), config, adapter_name="first")
        model.add_adapter("second", config)
        model.base_model.set_adapter(active)
        return model

    trainer = build(root / "runs", eval_dataset=None)
    for active in (["first"], ["second", "first"]):
        trainer.model = ZeroShotClassifier(with_two(active), tiny_processor("clip"), NAMES).eval()
        folder = root / f"{len(active)}-of-two"
        trainer.save_model(str(folder))
        task = loaded(folder)
        assert task.model.active_adapters == active
        assert torch.equal(task.embed_images(PICTURES), trainer.model.embed_images(PICTURES))
    settings = json.loads((folder / "classifier.json").read_text())
    (folder / "classifier.json").write_text(json.dumps({**settings, "adapters": ["../first"]}))
    with pytest.raises(AdapterFileError, match="active is not there"):
        loaded(folder)
    del settings["adapters"]
    (folder / "classifier.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterFileError, match="not known which were active"):
        loaded(folder)


def test_of_an_early_version(copied):
    """It named no task, and the processor lay beside the adapter."""
    settings = json.loads((copied / "classifier.json").read_text())
    (copied / "classifier.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "task"}))
    for path in (copied / "processor").iterdir():
        path.rename(copied / path.name)
    (copied / "processor").rmdir()
    assert loaded(copied).class_names == NAMES


# --- without classifier.json ---


def test_any_dual_encoder_with_class_names(base):
    task = loaded(base, class_names=["cat", "dog"])
    expected = ZeroShotClassifier(tiny_model("clip"), tiny_processor("clip"), ["cat", "dog"]).eval()
    assert task.head == "live" and task.predict(PICTURES) == expected.predict(PICTURES)
    with pytest.raises(AdapterFileError, match=r"not said what was trained.*classifier.json.*class_names=\["):
        loaded(base)
    with pytest.raises(AdapterFileError, match="not said what was trained"):
        loaded(base, SeveralLabels, class_names=["cat", "dog"])


def test_an_adapter_of_another_program(base, tmp_path):
    model = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert loaded(tmp_path, class_names=["cat", "dog"]).processor is not None


def test_class_names_are_not_given_twice(saft):
    with pytest.raises(ConfigError, match="has class names.*at class_names.*predict"):
        loaded(saft.folder, class_names=["cat", "dog"])


# --- what is refused ---


def without(name):
    return lambda folder: (folder / name).unlink()


def rewritten(**settings):
    def change(folder):
        saved = json.loads((folder / "classifier.json").read_text())
        (folder / "classifier.json").write_text(json.dumps({**saved, **settings}))

    return change


def rewritten_adapter(**settings):
    def change(folder):
        saved = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**saved, **settings}))

    return change


def with_head(change):
    def spoil(folder):
        tensors = load_file(folder / "classifier.safetensors")
        save_file(change(tensors), folder / "classifier.safetensors")

    return spoil


def as_pipe(name):
    def replace(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return replace


BAD = {
    "no settings": (without("classifier.json"), AdapterFileError, "not said what was trained"),
    "settings are a list": (
        lambda f: (f / "classifier.json").write_text("[]"),
        AdapterFileError,
        "no settings of a task",
    ),
    "no JSON": (lambda f: (f / "classifier.json").write_text("{"), DataError, "no valid JSON"),
    "unknown task": (rewritten(task="clasnames"), AdapterFileError, "unknown task.*'class_names'"),
    "no name of a task": (rewritten(task=3), AdapterFileError, "unknown task"),
    "no class names": (rewritten(class_names=None), AdapterFileError, "settings of the task cannot be used"),
    "class names in an object": (
        rewritten(class_names={"a": 1}),
        AdapterFileError,
        "class_names.*a list with one name",
    ),
    "a number as data names": (rewritten(data_names=5), AdapterFileError, "data_names.*got 5; allowed a list"),
    "numbers as data names": (rewritten(data_names=[1, 2, 3]), AdapterFileError, "data_names.*one name per class"),
    "too few data names": (rewritten(data_names=["n1"]), AdapterFileError, "data_names.*one name per class"),
    "a list as adapter": (rewritten(adapters=[["a"]]), AdapterFileError, "active is not there"),
    "a number as base": (rewritten_adapter(base_model_name_or_path=5), AdapterFileError, "name its base.*got 5"),
    "a list as base": (rewritten_adapter(base_model_name_or_path=["a"]), AdapterFileError, "name its base.*got"),
    "a base with a long name": (rewritten_adapter(base_model_name_or_path=5000 * "a"), ConfigError, "adapter's base"),
    "templates of numbers": (rewritten(templates=[3]), ConfigError, "template"),
    "no head": (without("classifier.safetensors"), AdapterFileError, "head that was trained is not there"),
    "a pickle as head": (
        lambda f: (f / "classifier.safetensors").write_bytes(b"\x80\x02}q\x00."),
        AdapterFileError,
        "pickle",
    ),
    "half a head": (with_head(lambda t: {"class_head.bias": t["class_head.bias"]}), AdapterFileError, "lacks 1"),
    "a head of other classes": (
        with_head(lambda t: {n: x[:2] for n, x in t.items()}),
        AdapterFileError,
        "wrong shape",
    ),
    "NaN in the head": (with_head(lambda t: {n: x * torch.nan for n, x in t.items()}), NonFiniteError, "class_head"),
    "no tensors of the adapter": (without("adapter_model.safetensors"), AdapterFileError, "tensors are not there"),
    "no config of the adapter": (without("adapter_config.json"), AdapterFileError, "there is no model.*save_model"),
    "no processor": (lambda f: shutil.rmtree(f / "processor"), AdapterFileError, "processor is not there.*a folder"),
    "a file as processor": (
        lambda f: (shutil.rmtree(f / "processor"), (f / "processor").write_text("x")),
        AdapterFileError,
        "processor is not there.*a folder processor",
    ),
    "a pipe": (as_pipe("adapter_model.safetensors"), UnsafeFileError, "not a regular file"),
    "a pipe among the processor's": (as_pipe("processor/vocab.json"), UnsafeFileError, "not a regular file"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_is_not_whole_is_refused(copied, name):
    spoil, error, message = BAD[name]
    spoil(copied)
    with pytest.raises(error, match=message):
        loaded(copied)


def test_the_head_takes_no_tensor_of_the_encoder(copied, saft):
    """A file of a head must not be another way to the weights."""
    tensors = load_file(copied / "classifier.safetensors")
    stranger = torch.full((), 9.0)
    save_file({**tensors, "model.base_model.model.logit_scale": stranger}, copied / "classifier.safetensors")
    assert base_model(loaded(copied).model).logit_scale != stranger


def test_stock_adapters_without_all_tensors_are_refused(classifiers, tmp_path):
    folder = shutil.copytree(classifiers("lora", "live").folder, tmp_path / "half")
    path = Path(folder, "adapter_model.safetensors")
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)
    with pytest.raises(AdapterFileError, match="cannot be loaded on its base.*missing adapter keys"):
        loaded(folder)


def test_whole_models_without_all_tensors_or_with_pickles_are_refused(full, tmp_path):
    folder = Path(shutil.copytree(full.folder, tmp_path / "whole"))
    tensors = load_file(folder / "model.safetensors")
    dropped = next(name for name in tensors if "fc1" in name)
    save_file({n: t for n, t in tensors.items() if n != dropped}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(AdapterFileError, match="lacks 1 tensors"):
        loaded(folder)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(AdapterFileError, match="no whole model can be loaded"):
        loaded(folder)
    for file in ("pytorch_model.bin", "../model.safetensors"):
        weight_map = {name: file for name in tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        with pytest.raises(UnsafeFileError, match="file that is not read"):
            loaded(folder)


@pytest.mark.parametrize("content", ["[]", "5", "null"])
def test_an_index_that_is_none(full, tmp_path, content):
    folder = Path(shutil.copytree(full.folder, tmp_path / "whole"))
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(AdapterFileError, match="does not say where weights are.*allowed a JSON object"):
        loaded(folder)


def test_weights_that_are_none(full, tmp_path):
    folder = Path(shutil.copytree(full.folder, tmp_path / "whole"))
    (folder / "model.safetensors").write_bytes(bytes(20))
    with pytest.raises(AdapterFileError, match="no whole model can be loaded.*SafetensorError"):
        loaded(folder)


@pytest.mark.parametrize("name", [None, 5, ["a"], 5000 * "a", "a\0b"])
def test_names_that_are_none(name):
    with pytest.raises(ConfigError, match="no name of a model.*a folder, or an id|no such folder"):
        loaded(name)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"dtype": "float33"}, "no precision.*float33"),
        ({"dtype": "torch.float32"}, "no precision.*torch.float32'; allowed float32,"),
        ({"dtype": ["float32"]}, "no precision"),
        ({"device": "abacus"}, "no device.*abacus"),
        ({"device": f"cuda:{torch.cuda.device_count()}"}, "no device.*cuda"),
        ({"device": [1]}, "no device"),
        ({"device": "meta"}, "holds no values.*'meta'"),
        ({"revision": "v1"}, "folder has no revisions"),
        ({"base": "x"}, "whole model has no base"),
    ],
)
def test_settings_that_are_none(full, how, message):
    with pytest.raises(ConfigError, match=message):
        ZeroShotClassifier.from_pretrained(full.folder, **{"device": "cpu", **how})


def test_another_precision(saft):
    task = loaded(saft.folder, dtype=torch.bfloat16)
    assert base_model(task.model).dtype == torch.bfloat16
    assert task.embed_images(PICTURES).dtype == torch.float32
