# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPVisionModel

from hf_robust import ZeroShotClassifier
from hf_robust.errors import CheckpointError, ConfigError, DataError
from hf_robust.interpolation.sweep import AlphaSweep
from hf_robust.scripting.arguments import parse_arguments
from tests.examples.scripts import launch_on_two, load_command
from tests.programs import ROOT
from tests.tiny_models import image_dataset, tiny_model, tiny_processor

CONFIGS = ROOT / "examples" / "configs"
NAMES = ["red", "green", "blue"]

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's own LN tuning


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, parquet files, a folder of images, and a config that names them."""
    folder = tmp_path_factory.mktemp("script")
    tiny_model("clip").save_pretrained(folder / "model")
    tiny_processor("clip").save_pretrained(folder / "model")
    image_dataset(18, NAMES).to_parquet(folder / "train.parquet")
    image_dataset(7, NAMES, seed=50).to_parquet(folder / "validation.parquet")
    (folder / "split").mkdir()
    image_dataset(9, ["cat", "dog"], seed=90).to_parquet(folder / "split" / "part.parquet")
    for index, row in enumerate(image_dataset(6, ["sea_lion", "blue car"], seed=30)):
        path = folder / "images" / ["sea_lion", "blue car"][row["label"]] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    config = {
        "model_name_or_path": str(folder / "model"),
        "train_data": str(folder / "train.parquet"),
        "validation_data": str(folder / "validation.parquet"),
        "eval_data": {"other": str(folder / "split"), "photos": str(folder / "images")},
        "density": 0.01,
        "output_dir": str(folder / "out"),
        "learning_rate": "1e-2",  # how YAML reads 1e-2
        "max_steps": 3,
        "per_device_train_batch_size": 6,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def script(folder, monkeypatch):
    """The script's module; `run` is its command line, with the config of `folder`."""
    return load_command("train", folder, monkeypatch)


@pytest.mark.parametrize("method", ["zero_shot", "full", "saft", "aclip", "radapter", "lora", "ln_tuning"])
def test_every_method_ends_in_results(script, tmp_path, method, capsys):
    results = script.run(tmp_path, "--method", method, "--average_decay", "0")
    assert results["zero_shot"].keys() == results["fine_tuned"].keys() == {"validation", "other", "photos"}
    assert results["images"] == {"train": 18, "validation": 7, "other": 9, "photos": 6}
    assert results["config"]["method"] == method and results["config"]["learning_rate"] == 0.01
    assert results["versions"]["torch"] == torch.__version__
    table = capsys.readouterr().out
    assert "zero-shot" in table and all(name in table for name in results["zero_shot"])
    if method == "zero_shot":
        assert results["fine_tuned"] == results["zero_shot"] and results["trained_parameters"] == 0
    else:
        assert results["fine_tuned"]["validation"] > results["zero_shot"]["validation"]
        assert (tmp_path / ("model.safetensors" if method == "full" else "adapter_model.safetensors")).exists()
        assert results["training_seconds"] > 0
    if method == "saft":
        assert results["trained_parameters"] == 344  # without the input embeddings
        PeftModel.from_pretrained(tiny_model("clip"), tmp_path)
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("method", ["full", "aclip"])
def test_wise_ft_is_chosen_on_validation_data_and_saved(script, tmp_path, method, capsys):
    results = script.run(tmp_path, "--method", method, "--wise_ft", "--losses", '{"similarity": {"weight": 0.1}}')
    found = results["wise_ft"]
    by_alpha = {row["alpha"]: row["validation_accuracy"] for row in found["sweep"]}
    assert by_alpha[0] == results["zero_shot"]["validation"] and by_alpha[1] == results["fine_tuned"]["validation"]
    assert by_alpha[found["alpha"]] == max(by_alpha.values()) == found["accuracy"]["validation"]
    assert found["accuracy"].keys() == results["zero_shot"].keys()
    assert f"alpha {found['alpha']:.1f}" in capsys.readouterr().out
    again = script.run(tmp_path / "again", "--method", "zero_shot", *reloaded(tmp_path, method))
    assert again["zero_shot"]["validation"] == found["accuracy"]["validation"]


def reloaded(folder, method):
    """Flags for the model that was saved."""
    if method == "full":
        return ["--model_name_or_path", str(folder)]
    merged = PeftModel.from_pretrained(tiny_model("clip"), folder).merge_and_unload()
    merged.save_pretrained(folder / "merged")
    tiny_processor("clip").save_pretrained(folder / "merged")
    return ["--model_name_or_path", str(folder / "merged")]


def card_rows(folder):
    """Cells of the card's table by set, without intervals."""
    text = (folder / "README.md").read_text().replace("\\", "")
    rows = [re.sub(r" \(\d[^)]*\)", "", line).strip("|").split("|") for line in text.splitlines() if line[:1] == "|"]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


@pytest.mark.parametrize("flags", [["--method", "full"], ["--method", "saft", "--wise_ft"]], ids=["full", "wise_ft"])
def test_a_card_shows_what_was_printed(script, tmp_path, flags):
    results = script.run(tmp_path, *flags)
    rows = card_rows(tmp_path)
    columns = [results["zero_shot"], results["fine_tuned"]]
    columns += [results["wise_ft"]["accuracy"]] if results["wise_ft"] else []
    for name, images in (("other", "9"), ("photos", "6")):
        role = "other task"  # their classes are others than those of the training set
        assert rows[name] == [role, images, *(f"{100 * column[name]:.1f}" for column in columns)]
    assert "validation" not in rows
    assert ("WiSE-FT" in (tmp_path / "README.md").read_text()) == bool(results["wise_ft"])


def test_a_card_names_wise_ft_where_there_is_nothing_but_validation(script, tmp_path):
    results = script.run(tmp_path, "--eval_data", "{}", "--wise_ft")
    card = (tmp_path / "README.md").read_text()
    assert f"here α = {results['wise_ft']['alpha']:g}." in card and "What it cost" not in card


def test_a_training_that_was_undone_is_said(script, tmp_path, monkeypatch, capsys):
    undone = AlphaSweep([], "validation_x", 0.0)
    monkeypatch.setattr(script.RobustTrainer, "wise_ft_sweep", lambda self, data: undone)
    script.run(tmp_path, "--wise_ft")
    said = capsys.readouterr().err
    assert "Warning: alpha 0 is best on the validation data, so the training was undone" in said
    assert "--learning_rate auto; --wise_ft false" in said


def test_a_card_says_what_the_command_begins_with(script, tmp_path):
    script.run(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert all(f"- `{name}`:" in card for name in ("lr_scheduler_type", "warmup_steps", "per_device_train_batch_size"))


def test_a_folder_holds_one_model(script, folder, tmp_path):
    """That of the last training, whatever kind of model was there before."""
    script.run(tmp_path, "--method", "full", "--head", "trainable", "--wise_ft")
    assert (tmp_path / "classifier.safetensors").exists()
    script.run(tmp_path, "--method", "saft")
    assert not (tmp_path / "model.safetensors").exists() and not (tmp_path / "classifier.safetensors").exists()
    assert type(ZeroShotClassifier.from_pretrained(tmp_path, base=folder / "model").model) is PeftModel
    script.run(tmp_path, "--method", "full")
    assert not (tmp_path / "adapter_config.json").exists() and not (tmp_path / "adapter_model.safetensors").exists()
    assert type(ZeroShotClassifier.from_pretrained(tmp_path).model) is CLIPModel


def test_an_adapter_is_not_saved_over_its_base(script, folder):
    with pytest.raises(ConfigError, match="saved into the folder of its base .at output_dir"):
        script.run(folder / "model")
    assert not (folder / "model" / "adapter_config.json").exists()


@pytest.mark.parametrize("wish", ["true", "last", "checkpoint-1"])
@pytest.mark.parametrize("method", ["saft", "full"])
def test_a_training_goes_on_from_a_checkpoint(script, tmp_path, method, wish):
    flags = ["--method", method, "--save_strategy", "steps", "--save_steps", "1"]
    whole = script.run(tmp_path / "run", *flags)
    name = "adapter_model.safetensors" if method == "saft" else "model.safetensors"
    weights = load_file(tmp_path / "run" / name)
    (tmp_path / "run" / name).unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")  # as if it had been interrupted
    wish = wish if wish in ("true", "last") else str(tmp_path / "run" / wish)
    again = script.run(tmp_path / "run", *flags, "--resume_from_checkpoint", wish)
    assert again["zero_shot"] == whole["zero_shot"] and again["fine_tuned"] == whole["fine_tuned"]
    resumed = load_file(tmp_path / "run" / name)
    assert resumed.keys() == weights.keys() and all(torch.equal(resumed[key], weights[key]) for key in weights)


def labels_as_text(folder, labels):
    dataset = image_dataset(len(labels), NAMES).remove_columns("label").add_column("label", labels)
    dataset.to_parquet(folder / "text.parquet")
    return str(folder / "text.parquet")


def test_class_names_come_from_a_file(script, tmp_path):
    (tmp_path / "names.txt").write_text("a red thing\na green thing\na blue thing\n")
    script.run(tmp_path, "--class_names_file", str(tmp_path / "names.txt"), "--method", "lora")
    assert json.loads((tmp_path / "classifier.json").read_text())["class_names"][0] == "a red thing"


def write(folder, dataset):
    dataset.to_parquet(folder / "bad.parquet")
    return str(folder / "bad.parquet")


def vision_tower(folder):
    CLIPVisionModel(tiny_model("clip").config.vision_config).save_pretrained(folder / "tower")
    return str(folder / "tower")


BAD_INPUT = {
    "unknown method": (lambda _: ["--method", "soft"], ConfigError, "--method: invalid choice: 'soft'.*saft"),
    "no training data": (lambda _: ["--train_data", ""], ConfigError, "nothing to train on.*data, train_data"),
    "no such names": (lambda _: ["--class_names_file", "no.txt"], DataError, "file cannot be read .at no.txt"),
    "no such model": (lambda _: ["--model_name_or_path", "no/where"], ConfigError, "no model can be.*no/where"),
    "no JSON": (lambda _: ["--eval_data", "a.parquet"], ConfigError, "no sets by name.*eval_data.*a.parquet"),
    "no checkpoint": (
        lambda _: ["--resume_from_checkpoint", "true"],
        CheckpointError,
        "no whole checkpoint to resume from.*out",
    ),
    "wise_ft without validation": (
        lambda _: ["--wise_ft", "--validation_data", ""],
        ConfigError,
        "validation data.*validation_data",
    ),
    "no file": (lambda _: ["--train_data", "nowhere/of/images"], DataError, "no such file.*nowhere/of/images"),
    "no image column": (
        lambda folder: ["--train_data", write(folder, image_dataset(6, NAMES).rename_column("image", "x"))],
        DataError,
        "no column 'image'",
    ),
    "empty split": (
        lambda folder: ["--validation_data", write(folder, image_dataset(6, NAMES).select([]))],
        DataError,
        "empty.*bad.parquet",
    ),
    "label outside": (
        lambda folder: ["--train_data", labels_as_text(folder, [0, 1, 5]), "--class_names_file", names_file(folder)],
        DataError,
        "row 2 is no class.*got 5; allowed 0 to 2",
    ),
    "repeated class name": (
        lambda folder: ["--class_names_file", names_file(folder, "Red")],
        DataError,
        "twice",
    ),
    "template": (lambda _: ["--templates", "a photo"], ConfigError, "without {}"),
    "density": (lambda _: ["--density", "1.5"], ConfigError, r"density.*1.5.*\(0, 1\]"),
    "target module": (lambda _: ["--target_modules", "qproj"], ConfigError, "qproj.*q_proj"),
    "one tower": (lambda folder: ["--model_name_or_path", vision_tower(folder)], ConfigError, "dual encoder"),
}


def names_file(folder, last="blue"):
    (folder / "names.txt").write_text(f"red\ngreen\n{last}\n")
    return str(folder / "names.txt")


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_error_before_training(script, tmp_path, name):
    make_flags, error, message = BAD_INPUT[name]
    with pytest.raises(error, match=message):
        script.run(tmp_path / "out", *make_flags(tmp_path))
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("config", ["demo", "own_images", "pairs", "several_labels", "identities"])
def test_shipped_configs_are_understood(script, config, tmp_path):
    flags = ["--config", str(CONFIGS / f"{config}.yaml"), "--output_dir", str(tmp_path)]
    args, _, training_args = parse_arguments(script.TYPES, flags=flags)
    assert args.eval_data and training_args.learning_rate > 0


TARGETS = {
    "pairs": lambda rows: {"text": [f"a {NAMES[label]} thing, number {n}" for n, label in enumerate(rows["label"])]},
    "several_labels": lambda rows: {
        "labels": [[NAMES[label], "striped"][: 1 + n % 2] for n, label in enumerate(rows["label"])]
    },
    "identities": lambda rows: {"identity": [f"number {label}" for label in rows["label"]]},
}


@pytest.mark.parametrize("task", TARGETS)
def test_the_columns_say_what_is_learned(script, tmp_path, task):
    files = {}
    for name, n, seed in (("train", 12, 0), ("validation", 6, 50)):
        rows = image_dataset(n, NAMES, seed=seed)
        rows = rows.map(TARGETS[task], batched=True, remove_columns="label")
        rows.to_parquet(files.setdefault(name, tmp_path / f"{name}.parquet"))
    data = ["--train_data", str(files["train"]), "--validation_data", str(files["validation"])]
    results = script.run(
        tmp_path / "out", *data, "--eval_data", json.dumps({"id": str(files["validation"])}), "--wise_ft"
    )
    assert results["metric"] == {"pairs": "recall@1", "several_labels": "mAP_macro", "identities": "mAP@R"}[task]
    assert 0 <= results["fine_tuned"]["id"] <= 1 and results["wise_ft"]["alpha"] in [n / 10 for n in range(11)]
    assert json.loads((tmp_path / "out" / "classifier.json").read_text())["task"] == task
    assert f"{results['metric']} in %" in (tmp_path / "out" / "README.md").read_text()


def test_two_processes_select_the_same_entries_as_one(script, folder, tmp_path):
    script.run(tmp_path / "one")
    flags = ["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path / "two")]
    printed = launch_on_two(folder, "-m", "hf_robust", "train", *flags)
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert printed.count("Accuracy in %") == 1
    assert results["zero_shot"] == json.loads((tmp_path / "one" / "results.json").read_text())["zero_shot"]
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    indices = [name for name in one if "saft_indices" in name]
    assert indices and all(torch.equal(one[name], two[name]) for name in indices)
    assert not all(torch.equal(one[name], two[name]) for name in one)  # values from steps of twice as many images
