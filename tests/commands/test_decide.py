# SPDX-License-Identifier: Apache-2.0
"""`hf-robust train photos`, with nothing else said."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from hf_robust.commands import train as command
from hf_robust.commands.adapters import MethodArguments
from hf_robust.commands.decide import decide
from hf_robust.commands.train import TrainArguments, TrainingSettings
from hf_robust.comparison.search import GRID
from hf_robust.errors import ConfigError, DataError
from hf_robust.evaluation.corrupted_sets import FIVE
from hf_robust.scripting.arguments import parse_arguments
from hf_robust.training.learning_rates import OF_ADAPTERS
from tests.tiny_models import image_dataset, tiny_model, tiny_processor

NAMES = ["red", "green", "blue"]
CORRUPTED = {f"ood_{name}" for name in FIVE}


def save_images(folder, n, seed):
    for index, row in enumerate(image_dataset(n, NAMES, seed=seed)):
        path = folder / NAMES[row["label"]] / f"{seed}-{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A model; photographs with splits, some others, and photographs without splits."""
    folder = tmp_path_factory.mktemp("decide")
    tiny_model("clip").save_pretrained(folder / "model")
    tiny_processor("clip").save_pretrained(folder / "model")
    for split, n, seed in (("train", 12, 0), ("val", 6, 20), ("test", 9, 40), ("ood_night", 6, 60)):
        save_images(folder / "photos" / split, n, seed)
    save_images(folder / "tested" / "train", 12, 0)
    save_images(folder / "tested" / "test", 9, 40)
    save_images(folder / "plain", 24, 0)
    save_images(folder / "days" / "day", 6, 0)
    save_images(folder / "days" / "test", 3, 0)
    return folder


@pytest.fixture
def run(shared, tmp_path, monkeypatch, capsys):
    """The command in a folder beside the data; returns results.json of a folder, and what was printed."""
    (tmp_path / "data").symlink_to(shared)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def call(*flags, output):
        quick = [
            "--model_name_or_path",
            "data/model",
            "--density",
            "0.01",
            "--max_steps",
            "2",
            "--disable_tqdm",
            "false",
        ]
        command.main(*parse_arguments(command.TYPES, flags=[*flags, *quick]))
        return json.loads(Path(output, "results.json").read_text()), capsys.readouterr()

    return call


def test_splits_are_found_and_all_is_decided_and_said(run):
    results, printed = run("data/photos", output="photos-saft")
    assert set(results["fine_tuned"]) == {"validation", "id", "ood_night"}  # has another distribution already
    assert results["images"] == {"train": 12, "validation": 6, "id": 9, "ood_night": 6}
    config = results["config"]
    assert config["learning_rate"] == OF_ADAPTERS["SAFT"] and config["eval_strategy"] == "epoch"
    assert results["wise_ft"]["alpha"] in [step / 10 for step in range(11)] and results["method"] == "saft"
    words = " ".join(printed.out.split())
    assert "12 images of 3 classes, data/photos:train" in words and "6 images, data/photos:val" in words
    assert "id (9), ood_night (6)" in words and "learning rate 0.0003" in words and "photos-saft" in words
    assert Path("photos-saft/adapter_model.safetensors").exists()
    assert "wise_ft.png" in Path("photos-saft/README.md").read_text() and Path("photos-saft/wise_ft.png").exists()


def test_without_another_distribution_the_test_set_is_corrupted(run):
    results, printed = run("data/tested", "--method", "aclip", output="tested-aclip")
    assert set(results["fine_tuned"]) == {"validation", "id"} | CORRUPTED
    assert sum(results["images"][name] for name in CORRUPTED) == results["images"]["id"] == 9
    assert results["images"]["validation"] == 3 and results["images"]["train"] == 9  # one of each class is held out
    assert "3 images held out" in " ".join(printed.out.split())
    card = Path("tested-aclip/README.md").read_text().replace("\\", "")
    assert all(name in card for name in CORRUPTED)


def test_without_splits_images_are_held_out_and_stay_so_for_every_seed(run):
    sets = []
    for seed in ("1", "2"):
        flags = ["--seed", seed, "--no_corruptions", "--method", "lora", "--output_dir", f"out{seed}"]
        results, _ = run("data/plain", *flags, output=f"out{seed}")
        sets.append(results["zero_shot"])
        assert results["images"] == {"train": 15, "validation": 3, "id": 6}
    assert sets[0] == sets[1] and set(sets[0]) == {"validation", "id"}


def test_what_is_given_is_added_and_wins(run):
    given = '{"ood_other": "data/plain", "id": "data/photos:val"}'
    flags = ["--eval_data", given, "--validation_share", "0.25", "--wise_ft", "false", "--eval_strategy", "no"]
    results, _ = run("data/photos", *flags, output="photos-saft")
    assert results["images"] == {"train": 9, "validation": 3, "id": 6, "ood_night": 6, "ood_other": 24}
    assert results["wise_ft"] is None and results["config"]["eval_strategy"] == "no"


@pytest.mark.parametrize("flags", [["data/tested", "--train_data", "data/tested:train"], ["data/tested:train"]])
def test_training_images_are_never_an_evaluation_set(run, flags):
    results, _ = run(*flags, "--no_corruptions", output="tested-saft")
    assert set(results["zero_shot"]) == {"validation", "id"}
    images = {"train": 9, "validation": 3, "id": 9} if len(flags) > 1 else {"train": 6, "validation": 3, "id": 3}
    assert results["images"] == images


def test_a_learning_rate_is_searched_on_the_validation_data(run, monkeypatch):
    tried = []
    validate = {1e-3: 0.5, 3e-3: 0.7, 1e-2: 0.6}

    def validated(trainer, validation):
        tried.append((trainer.args.learning_rate, len(validation), trainer.optimizer is not None))
        accuracy = validate.get(trainer.args.learning_rate, 0.1)
        return {"accuracy": accuracy, "loss": 1 - accuracy, "error": 0.01}

    monkeypatch.setattr("hf_robust.commands.rates.validate", validated)
    flags = ["--learning_rate", "auto", "--method", "full", "--no_corruptions", "--wise_ft", "false"]
    results, printed = run("data/tested", *flags, output="tested-full")
    assert results["config"]["learning_rate"] == 3e-3
    assert [rate for rate, *_ in tried] == [0.0, 1e-3, 3e-3, 1e-2] and set(validate) < set(GRID)
    assert all(n == 3 for _, n, _ in tried) and all(trained for *_, trained in tried[1:])
    assert "Learning rate 0.003: 70.0 % on validation data" in printed.out
    assert "learning rate 0.003" in " ".join(printed.out.split())


def test_markup_in_names_is_no_markup(run):
    flags = ["--eval_data", '{"ood_[/a]": "data/plain"}', "--wise_ft", "false", "--method", "aclip"]
    _, printed = run("data/tested", *flags, output="tested-aclip")
    assert printed.out.count("ood_[/a]") >= 2


def test_what_is_named_validation_is_the_validation_set(run):
    given = '{"validation": "data/photos:val", "ood_x": "data/plain"}'
    results, _ = run("data/tested", "--eval_data", given, "--method", "aclip", output="tested-aclip")
    assert results["images"] == {"train": 12, "id": 9, "validation": 6, "ood_x": 24} and results["wise_ft"]
    results, _ = run("data/photos", "--validation_data", "data/photos:val", "--method", "aclip", output="photos-aclip")
    assert results["images"] == {"train": 12, "validation": 6, "id": 9, "ood_night": 6}
    flags = ["--train_data", "data/days:day", "--method", "aclip", "--no_corruptions"]
    results, _ = run("data/days", *flags, output="days-aclip")
    assert set(results["images"]) == {"train", "validation", "id"}


def test_after_an_error_no_folder_is_left(run, tmp_path):
    with pytest.raises(ConfigError, match="without {}"):
        run("data/tested", "--templates", "a photo", output="tested-saft")
    assert not Path("tested-saft").exists()
    Path("tested-saft").touch()
    with pytest.raises(ConfigError, match="a file is where results shall go .at output_dir"):
        run("data/tested", output="tested-saft")


BAD = {
    "negative rate": (["data/tested", "--learning_rate", "-1"], "no learning rate.*-1.*from 0"),
    "no rank": (["data/tested", "--method", "lora", "--lora_rank", "0"], "no adapter can be added.*lora"),
    "no module": (["data/tested", "--method", "lora", "--target_modules", "nope"], "no adapter can be added.*nope"),
    "two validations": (
        [
            "--train_data",
            "data/plain",
            "--validation_share",
            "0.1",
            "--eval_data",
            '{"validation": "data/photos:val"}',
        ],
        "a set is given, and shall be held out, too",
    ),
    "rate": (["data/tested", "--learning_rate", "fast"], "no learning rate.*'fast'.*a number, or auto"),
    "nothing": ([], "nothing to train on .at data, train_data.*hf-robust train photos"),
    "no training split": (["data/days"], "no split to train on.*day, test.*--train_data"),
    "nowhere": (["data/nowhere"], "no such file.*data/nowhere"),
    "share": (["data/plain", "--test_share", "1"], r"share is out of range.*test_share.*\[0, 1\)"),
    "share and set": (
        ["data/plain", "--validation_share", "0.1", "--validation_data", "data/photos:val"],
        "a set is given, and shall be held out, too",
    ),
    "search without validation": (
        ["--train_data", "data/plain", "--learning_rate", "auto"],
        "searched on validation data.*Set --validation_data or --validation_share",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_decided_is_refused(run, name):
    flags, message = BAD[name]
    with pytest.raises((ConfigError, DataError), match=message):
        run(*flags, output="out")


@pytest.mark.parametrize(
    ("data", "name"), [("photos/", "photos-saft"), ("a/my photos", "my-photos-saft"), (".", "here-saft")]
)
def test_results_are_named_after_data_and_method(tmp_path, monkeypatch, data, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("hf_robust.commands.decide.split_names", lambda *_: ["train", "test"])
    _, settings = decide(TrainArguments(data), MethodArguments(), TrainingSettings())
    assert settings.output_dir == name
    _, settings = decide(TrainArguments(data), MethodArguments(), TrainingSettings(output_dir="mine"))
    assert settings.output_dir == "mine"
