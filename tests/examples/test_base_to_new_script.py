# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import sys
from statistics import mean, stdev

import pytest
import torch
import yaml

from hf_robust import RobustTrainingArguments
from hf_robust.errors import ConfigError, DataError
from hf_robust.evaluation import harmonic_mean
from hf_robust.scripting.arguments import parse_arguments
from hf_robust.scripting.run import run
from tests.examples.scripts import image_sizes_seen, launch_on_two, load_training_script
from tests.programs import ROOT
from tests.tiny_models import image_dataset, tiny_model, tiny_processor

NAMES = ["red", "green", "blue", "sand", "sea", "sky", "snow"]
BASE, NEW = NAMES[:4], NAMES[4:]
ALL = ["zero_shot", "coop", "coop+ogen", "saft", "saft+ogen"]
EPOCHS, SHOTS = 2, 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, parquet files, and a config that names them."""
    folder = tmp_path_factory.mktemp("base_to_new")
    tiny_model("clip").save_pretrained(folder / "model")
    tiny_processor("clip").save_pretrained(folder / "model")
    image_dataset(35, NAMES).to_parquet(folder / "train.parquet")
    image_dataset(28, NAMES, seed=50).to_parquet(folder / "test.parquet")
    config = {
        "model_name_or_path": str(folder / "model"),
        "train_data": str(folder / "train.parquet"),
        "test_data": str(folder / "test.parquet"),
        "shots": SHOTS,
        "seeds": [1, 2],
        "templates": "abcd {}.",
        "context_init": "abcd",
        "density": 0.05,
        "context_learning_rate": "1e-1",  # how YAML reads 1e-1
        "saft_learning_rate": "1e-2",
        "num_train_epochs": EPOCHS,
        "per_device_train_batch_size": 6,
        "disable_tqdm": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def script(folder, monkeypatch):
    """The script's module; `run` is its command line, with the config of `folder`."""
    return load_training_script("base_to_new", folder, monkeypatch)


def by_method(results, method):
    return [one for one in results["runs"] if one["method"] == method]


def test_all_methods_and_seeds_end_in_results_a_table_and_a_picture(script, tmp_path, capsys):
    results = script.run(tmp_path)
    found = [(one["method"], one["seed"]) for one in results["runs"]]
    assert found == [(method, 1) for method in ALL] + [(method, 2) for method in ALL[1:]]
    assert results["class_names"] == {"base": BASE, "new": NEW} and results["names_given_to_ogen"] == NEW
    assert results["images"] == {"train": 12, "base": 16, "new": 12}
    assert results["config"]["shots"] == SHOTS and results["config"]["context_learning_rate"] == 0.1
    assert results["versions"]["torch"] == torch.__version__
    zero_shot = results["runs"][0]
    assert zero_shot["trained_parameters"] == 0
    for one in results["runs"][1:]:
        for half in ("base", "new"):
            assert len(one[half]) == EPOCHS + 1 and one[half][0] == zero_shot[half][0]
            assert all(0 <= value <= 1 for value in one[half])
    assert {one["trained_parameters"] for one in by_method(results, "coop")} == {4 * 32}
    assert by_method(results, "coop+ogen")[0]["trained_parameters"] == 4 * 32  # the generator is not of the model
    assert by_method(results, "saft")[0]["trained_parameters"] > 0
    assert_table_says(capsys.readouterr().out, results)
    assert (tmp_path / "over_epochs.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("checkpoint*"))


def assert_table_says(output, results):
    for method in ALL:
        base, new = ([one[half][-1] for one in by_method(results, method)] for half in ("base", "new"))
        cells = [mean(base), mean(new), harmonic_mean(mean(base), mean(new))]
        spreads = [[], [], []]
        if len(base) > 1:
            spreads = [base, new, [harmonic_mean(*pair) for pair in zip(base, new, strict=True)]]
        expected = [
            f"{100 * cell:.1f}" + (f" ± {100 * stdev(spread):.1f}" if spread else "")
            for cell, spread in zip(cells, spreads, strict=True)
        ]
        row = next(line for line in output.splitlines() if line.startswith(f"│ {method} "))
        assert [text.strip() for text in row.strip("│").split("│")] == [method, *expected]
    assert "H: harmonic mean of the mean base and the mean new accuracy" in output
    assert "OGEN also saw the names (not the images) of 3 new classes: sea, sky, snow" in output


def test_training_learns_the_base_classes_and_ogen_changes_it(script, tmp_path):
    results = script.run(tmp_path, "--seeds", "1", "--num_train_epochs", "6")
    zero_shot, coop, coop_ogen, saft, saft_ogen = results["runs"]
    assert saft["base"][-1] > zero_shot["base"][0] and coop["base"][-1] > zero_shot["base"][0]
    assert coop_ogen["base"] != coop["base"] and saft_ogen["base"] != saft["base"]


def test_runs_are_the_same_in_any_company(script, tmp_path):
    alone = script.run(tmp_path / "alone", "--methods", "saft+ogen", "--seeds", "2")
    beside = script.run(tmp_path / "beside", "--methods", "saft", "saft+ogen", "--seeds", "1", "2")
    accuracies = [{half: one[half] for half in ("base", "new")} for one in (*alone["runs"], beside["runs"][-1])]
    assert accuracies[0] == accuracies[1]


def test_finished_runs_are_not_repeated(script, tmp_path, capsys):
    flags = ["--methods", "zero_shot", "coop", "saft"]
    results = script.run(tmp_path, *flags)
    kept = results["runs"][:3]
    kept[1]["training_seconds"] = -1  # what no run gives
    (tmp_path / "results.json").write_text(json.dumps({**results, "runs": kept}))
    (tmp_path / "over_epochs.png").unlink()
    again = script.run(tmp_path, *flags)
    assert again["runs"][:3] == kept
    assert [(one["method"], one["seed"]) for one in again["runs"][3:]] == [("coop", 2), ("saft", 2)]
    assert [one["new"] for one in again["runs"]] == [one["new"] for one in results["runs"]]
    assert (tmp_path / "over_epochs.png").exists()
    complete = (tmp_path / "results.json").read_text()
    capsys.readouterr()
    assert script.run(tmp_path, *flags) == again  # nothing to run: the table alone
    assert "│ coop " in capsys.readouterr().out
    assert (tmp_path / "results.json").read_text() == complete


def test_results_are_kept_after_every_run(script, tmp_path):
    with pytest.raises(ConfigError, match="token"):  # coop's, after zero_shot was run
        script.run(tmp_path, "--methods", "zero_shot", "coop", "--context_init", "abc")
    kept = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [one["method"] for one in kept] == ["zero_shot"]
    assert not (tmp_path / "over_epochs.png").exists()


def test_a_call_that_stops_before_its_first_run_ends_leaves_nothing(script, folder, tmp_path, monkeypatch, capsys):
    flags = ["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path / "out"), "--methods", "coop"]
    monkeypatch.setattr(sys, "argv", ["base_to_new.py", *flags, "--context_init", "abc"])
    with pytest.raises(SystemExit) as leaving:
        run(script.main, script.ScriptArguments, RobustTrainingArguments, defaults=script.DEFAULTS)
    assert leaving.value.code == 2 and "token" in capsys.readouterr().err
    monkeypatch.setattr(script.RobustTrainer, "train", lambda self: self._stop("loss is nan", rank=None))
    monkeypatch.setattr(sys, "argv", ["base_to_new.py", *flags])
    with pytest.raises(SystemExit):
        run(script.main, script.ScriptArguments, RobustTrainingArguments, defaults=script.DEFAULTS)
    assert "loss is nan" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_results_of_other_settings_are_refused_and_left_alone(script, tmp_path):
    flags = ["--methods", "zero_shot"]
    script.run(tmp_path, *flags)
    before = (tmp_path / "results.json").read_text()
    with pytest.raises(
        ConfigError, match=r"other settings.*results.json.*'config.shots', 'config.density'.*another output_dir"
    ):
        script.run(tmp_path, *flags, "--shots", "2", "--density", "0.1")
    assert (tmp_path / "results.json").read_text() == before
    old = json.loads(before)
    old["versions"]["torch"] = "1.0"
    (tmp_path / "results.json").write_text(json.dumps(old))
    with pytest.raises(ConfigError, match="other settings.*'versions.torch'"):
        script.run(tmp_path, *flags)
    old["versions"]["torch"], old["class_names"]["new"] = torch.__version__, ["sea"]
    (tmp_path / "results.json").write_text(json.dumps(old))
    with pytest.raises(ConfigError, match="other settings.*'class_names.new'"):
        script.run(tmp_path, *flags)


def test_methods_without_ogen_are_given_no_new_names(script, tmp_path, capsys):
    results = script.run(tmp_path, "--methods", "zero_shot")
    assert results["names_given_to_ogen"] == [] and "OGEN" not in capsys.readouterr().out
    assert not (tmp_path / "over_epochs.png").exists()


def test_images_are_embedded_once(script, folder, tmp_path):
    flags = ["--methods", "zero_shot", "saft", "--shots", "2"]
    script.run(tmp_path / "first", *flags)
    files = {file: file.stat().st_mtime_ns for file in (folder / "cache" / "hf_robust").glob("*.arrow")}
    script.run(tmp_path / "second", *flags)
    assert files == {file: file.stat().st_mtime_ns for file in (folder / "cache" / "hf_robust").glob("*.arrow")}


def test_all_images_have_the_size_that_is_asked_for(script, tmp_path, monkeypatch):
    sizes = image_sizes_seen(monkeypatch)
    script.run(tmp_path, "--methods", "zero_shot", "saft", "--seeds", "1", "--image_size", "64")
    assert sizes == {(64, 64)}


def write(folder, dataset):
    dataset.to_parquet(folder / "other.parquet")
    return str(folder / "other.parquet")


BAD_INPUT = {
    "no training data": (lambda _: ["--train_data", ""], ConfigError, "not given.*train_data"),
    "no test data": (lambda _: ["--test_data", ""], ConfigError, "not given.*test_data"),
    "unknown method": (lambda _: ["--methods", "coop+ogn"], ConfigError, r"unknown method.*'coop\+ogn'.*'coop\+ogen'"),
    "repeated seed": (lambda _: ["--seeds", "1", "1"], ConfigError, r"seeds.*repeated.*\[1, 1\]"),
    "learning rate": (lambda _: ["--learning_rate", "1e-3"], ConfigError, "learning_rate.*context_learning_rate"),
    "seed": (lambda _: ["--seed", "7"], ConfigError, "seed.*Set seeds"),
    "curve without epochs": (lambda _: ["--eval_strategy", "no"], ConfigError, "eval_strategy.*'epoch'"),
    "frozen head": (lambda _: ["--head", "frozen"], ConfigError, "head.*'frozen'.*'live'"),
    "other classes": (
        lambda folder: ["--test_data", write(folder, image_dataset(6, NAMES[:6]))],
        DataError,
        "classes of train and test data differ.*other.parquet",
    ),
    "too few images": (lambda _: ["--shots", "9"], DataError, "class 'red' has too few images.*5.*at least 9"),
    "shots": (lambda _: ["--shots", "0"], ConfigError, "shots"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_error_before_training(script, tmp_path, name):
    make_flags, error, message = BAD_INPUT[name]
    with pytest.raises(error, match=message):
        script.run(tmp_path / "out", *make_flags(tmp_path))
    assert not (tmp_path / "out" / "results.json").exists()


def test_the_shipped_config_is_understood(script, tmp_path):
    config = ROOT / "examples" / "configs" / "base_to_new.yaml"
    flags = ["--config", str(config), "--output_dir", str(tmp_path), "--shots", "4"]
    types = script.ScriptArguments, RobustTrainingArguments
    args, training_args = parse_arguments(types, script.DEFAULTS, flags)
    assert (args.methods, args.seeds, args.shots) == (ALL, [1, 2, 3], 4)
    assert args.context_init + " {}." == training_args.templates


def test_two_processes_write_one_result(folder, script, tmp_path):
    script.run(tmp_path / "one", "--methods", "zero_shot")
    methods = ["zero_shot", "coop", "saft+ogen"]
    flags = ["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path / "two")]
    flags += ["--seeds", "1", "--num_train_epochs", "1", "--methods", *methods]
    printed = launch_on_two(folder, "examples/base_to_new.py", *flags)
    assert printed.count("Accuracy in %") == 1
    results = json.loads((tmp_path / "two" / "results.json").read_text())
    assert [one["method"] for one in results["runs"]] == methods
    alone = json.loads((tmp_path / "one" / "results.json").read_text())["runs"][0]
    assert [one["new"][0] for one in results["runs"]] == alone["new"] * len(methods)
