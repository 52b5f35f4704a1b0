# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from typing import get_args

import datasets
import pytest
import torch
from datasets import Value
from transformers import AutoModel, AutoProcessor

from hf_robust.commands import difficulty
from hf_robust.commands.adapters import MethodName
from hf_robust.errors import ConfigError, DataError
from hf_robust.evaluation.difficulty import task_difficulty
from hf_robust.evaluation.difficulty_report import TaskDifficulty
from hf_robust.scripting.arguments import parse_arguments
from tests.tiny_models import image_dataset, tiny_model, tiny_processor

NAMES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a parquet file."""
    folder = tmp_path_factory.mktemp("difficulty")
    tiny_model("clip").save_pretrained(folder / "model")
    tiny_processor("clip").save_pretrained(folder / "model")
    image_dataset(9, NAMES).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture
def script(folder, monkeypatch, tmp_path):
    """The script's module; `run` is its command line, with the model and data of `folder`."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def run(*flags, data=folder / "train.parquet"):
        command = [str(data), "--model_name_or_path", str(folder / "model"), *flags]
        difficulty.main(*parse_arguments(difficulty.TYPES, flags=command))

    monkeypatch.setattr(difficulty, "run", run, raising=False)
    return difficulty


def task(folder, **settings):
    model, processor = AutoModel.from_pretrained(folder / "model"), AutoProcessor.from_pretrained(folder / "model")
    return task_difficulty(model, image_dataset(9, NAMES), processor=processor, silent=True, **settings)


def with_silhouette(value):
    return TaskDifficulty("centroid", 9, 9, value, 0.2, 0.5, 0.0, ())


def test_figures_reading_and_suggestion_are_printed_and_written(script, folder, tmp_path, capsys):
    script.run("--output", str(tmp_path / "new" / "difficulty.json"), "--picture", str(tmp_path / "new" / "p.png"))
    found = task(folder)
    printed = capsys.readouterr().out
    assert str(found) in printed
    results = json.loads((tmp_path / "new" / "difficulty.json").read_text())
    assert results["difficulty"]["silhouette"] == pytest.approx(found.silhouette, abs=1e-6)
    assert [one["name"] for one in results["difficulty"]["classes"]] == NAMES
    assert results["config"]["templates"] == "single" and results["versions"]["torch"] == torch.__version__
    suggestion = results["suggestion"]
    assert suggestion == script.suggest(found)
    words = " ".join(printed.split())
    assert f"--method {suggestion['method']} of hf-robust train" in words
    assert suggestion["reason"] in words and suggestion["how"] in words
    assert (tmp_path / "new" / "p.png").read_bytes().startswith(b"\x89PNG")


def test_without_output_nothing_is_written(script, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    script.run()
    assert not list((tmp_path / "here").iterdir())


def test_settings_reach_the_measure(script, folder, tmp_path):
    flags = ["--silhouette", "image_only", "--sample_size", "7", "--seed", "3", "--templates", "abcd {}."]
    script.run(*flags, "--batch_size", "2", "--output", str(tmp_path / "difficulty.json"))
    results = json.loads((tmp_path / "difficulty.json").read_text())["difficulty"]
    found = task(folder, silhouette="image_only", sample_size=7, seed=3, templates="abcd {}.")
    assert (results["kind"], results["sampled"]) == ("image_only", 7)
    assert results["silhouette"] == pytest.approx(found.silhouette, abs=1e-4)
    assert results["acs"] == pytest.approx(found.acs, abs=1e-4)


def test_class_names_come_from_a_file_where_labels_are_bare_numbers(script, folder, tmp_path):
    image_dataset(9, NAMES).cast_column("label", Value("int64")).to_parquet(tmp_path / "bare.parquet")
    with pytest.raises(DataError, match="class names are missing"):
        script.run(data=tmp_path / "bare.parquet")
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    output = ["--output", str(tmp_path / "difficulty.json")]
    script.run("--class_names_file", str(tmp_path / "names.txt"), *output, data=tmp_path / "bare.parquet")
    results = json.loads((tmp_path / "difficulty.json").read_text())["difficulty"]
    assert results["acs"] == pytest.approx(task(folder).acs, abs=1e-6)


@pytest.mark.parametrize(("silhouette", "method"), [(0.001, "lora"), (0.0, "aclip"), (-0.3, "aclip")])
def test_suggestion_goes_by_the_sign_and_says_so(script, silhouette, method):
    suggestion = script.suggest(with_silhouette(silhouette))
    assert suggestion["method"] == method and method in get_args(MethodName)
    assert "2402.09613" in suggestion["how"] and "Thresholds are not known" in suggestion["how"]
    assert "sign of the silhouette alone" in suggestion["how"] and "validation" in suggestion["how"]


def test_without_data_it_is_refused(script):
    with pytest.raises(ConfigError, match="not given .at data."):
        script.DifficultyArguments()


@pytest.mark.parametrize("name", ["output", "picture"])
def test_a_folder_to_write_is_refused_before_anything_is_computed(script, tmp_path, name):
    with pytest.raises(ConfigError, match=f"it is a folder .at {name}.*allowed a file"):
        script.run(f"--{name}", str(tmp_path), data="nowhere")
