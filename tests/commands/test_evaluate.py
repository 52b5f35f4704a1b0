# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from hf_robust import SAFTConfig, select_saft, with_image_size
from hf_robust.commands import evaluate
from hf_robust.errors import ConfigError
from hf_robust.evaluation.report import SuiteReport
from hf_robust.scripting.arguments import parse_arguments
from tests.examples.scripts import command_on_two, image_sizes_seen
from tests.tiny_models import image_dataset, tiny_model, tiny_processor
from tests.trainers import build

NAMES, OTHER_NAMES = ["red", "green", "blue"], ["cat", "dog"]


def save_adapter(folder, config, base="base"):
    model = get_peft_model(tiny_model("clip"), config)
    if isinstance(config, SAFTConfig):
        select_saft(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.peft_config["default"].base_model_name_or_path = base
    model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would look for the base


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, two adapters, data and a suite."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny_model("clip").save_pretrained(folder / "base")
    tiny_processor("clip").save_pretrained(folder / "base")
    save_adapter(folder / "saft", SAFTConfig(density=0.3, score="random"))
    save_adapter(folder / "dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    save_adapter(folder / "orphan", LoraConfig(r=2, target_modules=["q_proj"]), base=None)
    image_dataset(9, NAMES).to_parquet(folder / "photos.parquet")
    image_dataset(8, OTHER_NAMES, seed=50).to_parquet(folder / "other.parquet")
    sets = {
        "photos": {"role": "id", "source": "photos.parquet"},
        "blurred": {"role": "ood", "source": "photos.parquet", "corruption": ["gaussian_blur", 3]},
        "noisy": {"role": "ood", "source": "photos.parquet", "corruption": ["shot_noise", 5]},
        "other": {"role": "other", "source": "other.parquet"},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump({"sets": sets}, sort_keys=False))
    return folder


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """The command line of the script, in `folder`; returns its JSON and what it printed."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")

    def call(*flags):
        flags = [*flags[:1], "--suite", "suite.yaml", "--output", "out/results.json", "--silent", *flags[1:]]
        evaluate.main(*parse_arguments(evaluate.TYPES, flags=flags))
        return json.loads((folder / "out" / "results.json").read_text()), capsys.readouterr().out

    return call


def test_a_base_and_its_adapter_are_compared_at_every_alpha(run):
    results, table = run("saft", "--alphas", "0", "0.5", "1")
    models = {name: SuiteReport.from_dict(content) for name, content in results["models"].items()}
    assert list(models) == ["base", "alpha 0", "alpha 0.5", "alpha 1"]
    found = {name: report.sets["photos"].confidences.tolist() for name, report in models.items()}
    assert found["base"] == found["alpha 0"]
    assert len({tuple(values) for values in found.values()}) == 3
    assert len({report.sets["photos"].fingerprint for report in models.values()}) == 1
    assert results["config"]["model"] == "saft" and results["config"]["alphas"] == [0.0, 0.5, 1.0]
    assert (
        models["alpha 1"].config["model"]["adapters"] == ["SAFT"] and models["base"].config["model"]["adapters"] == []
    )
    rows = {
        tuple(cells[:2]): cells for cells in (line.replace("│", " ").split() for line in table.splitlines()) if cells
    }
    for name in ("photos", "blurred", "noisy", "other"):
        role = models["base"].sets[name].role
        accuracies = [f"{100 * report.sets[name].accuracy:.1f}" for report in models.values()]
        assert rows[role, name][2:] == [str(len(models["base"].sets[name].targets)), *accuracies]
    assert rows["ood", "mean"][2:] == [f"{100 * report.means['ood']:.1f}" for report in models.values()]
    assert ("id", "mean") not in rows


def test_a_base_alone_is_evaluated(run):
    results, table = run("base")
    assert list(results["models"]) == ["model"] and "alpha" not in table


def test_a_method_without_alphas_is_evaluated_whole(run):
    results, _ = run("dora")
    assert list(results["models"]) == ["base", "model"]
    with pytest.raises(ConfigError):
        run("dora", "--alphas", "0.5")


def test_the_base_can_be_given(run):
    with pytest.raises(ConfigError, match="does not name its base model .at orphan.. Give --base"):
        run("orphan")
    results, _ = run("orphan", "--base", "base")
    assert results["models"]["base"]["sets"] != results["models"]["model"]["sets"]


@pytest.mark.parametrize("place", ["processor", ""])  # the second as early versions wrote it
def test_an_adapter_is_evaluated_with_images_of_its_own_size(run, folder, monkeypatch, place):
    name = f"larger {place}"
    with_image_size(tiny_processor("clip"), 64, tiny_model("clip")).save_pretrained(folder / name / place)
    save_adapter(folder / name, SAFTConfig(density=0.3, score="random"))
    sizes = image_sizes_seen(monkeypatch)
    run("base")
    assert sizes == {(32, 32)}
    run(name)
    assert sizes == {(32, 32), (64, 64)}


def test_a_trained_head_answers_for_its_classes(run, folder, monkeypatch):
    trainer = build(folder / "run", "saft", head="trainable")
    trainer.model.model.peft_config["default"].base_model_name_or_path = "base"
    with torch.no_grad():
        trainer.model.class_head.bias.copy_(torch.tensor([0.0, 1e3, 0.0]))  # the second class, whatever the image
    trainer.select_entries()
    trainer.save_model(str(folder / "head"))
    models = run("head")[0]["models"]
    assert set(models["model"]["sets"]["photos"]["predictions"]) == {1}
    assert set(models["base"]["sets"]["photos"]["predictions"]) != {1}
    with pytest.raises(ConfigError, match="an adapter alone can go part of the way"):
        run("head", "--alphas", "0.5")


def test_class_names_are_those_that_the_model_was_trained_with(folder, monkeypatch):
    """By what the data call the classes; of adapters with a name of their own, too."""
    monkeypatch.chdir(folder)
    data = image_dataset(9, ["n01", "n02", "n03"])
    data.to_parquet("synsets.parquet")
    words = {"n01": "red", "n02": "green", "n03": "blue"}
    trainer = build(folder / "run", "aclip", train_dataset=data, eval_dataset={"id": data}, class_names=words)
    trainer.model.model.peft_config["default"].base_model_name_or_path = "base"
    trainer.train()
    expected = trainer.evaluate()["eval_id_accuracy"]
    trainer.save_model(str(folder / "synsets"))
    evaluate.main(*parse_arguments(evaluate.TYPES, flags="synsets --data synsets.parquet --output o --silent".split()))
    models = json.loads(Path("o").read_text())["models"]
    assert models["model"]["sets"]["synsets.parquet"]["accuracy"] == expected
    named = image_dataset(9, NAMES)
    named.to_parquet("named.parquet")
    evaluate.main(*parse_arguments(evaluate.TYPES, flags="base --data named.parquet --output o --silent".split()))
    zero_shot = json.loads(Path("o").read_text())["models"]["model"]["sets"]["named.parquet"]["predictions"]
    assert models["base"]["sets"]["synsets.parquet"]["predictions"] == zero_shot


def test_prompts_are_those_that_the_model_was_trained_with(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    trainer = build(folder / "run", "saft", templates="wxyz {}.")
    trainer.model.model.peft_config["default"].base_model_name_or_path = "base"
    trainer.select_entries()
    trainer.save_model(str(folder / "prompts"))
    found = []
    for flags in (["prompts"], ["base", "--templates", "wxyz {}."], ["base"]):
        evaluate.main(
            *parse_arguments(evaluate.TYPES, flags=[*flags, *"--data photos.parquet --output o --silent".split()])
        )
        found.append(
            [*json.loads(Path("o").read_text())["models"].values()][-1]["sets"]["photos.parquet"]["confidences"]
        )
    assert found[0] == found[1] != found[2]


def test_images_can_be_given_in_the_place_of_a_suite(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    evaluate.main(*parse_arguments(evaluate.TYPES, flags=["base", "--data", "photos.parquet", "--silent"]))
    assert "photos.parquet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "not given .at model."),
        (["base", "--alphas", "0.5"], "an adapter alone can go part of the way here"),
        (["base", "--data", "photos.parquet"], "two things to evaluate on"),
        (["base", "--templates", "photo"], "a suite has templates of its own"),
        (["base", "--alphas", "1.5"], "alpha"),
        (["saft", "--alphas", "0.5", "0.5001"], "two alphas are the same in three digits"),
        (["nowhere"], "no such folder, and no such model on the Hub.*nowhere"),
        (["base", "--suite", ""], "nothing to evaluate on .at suite, data"),
        (["base", "--suite", "nothing"], "no such suite: got 'nothing'"),
    ],
)
def test_wrong_flags_are_refused(run, flags, message):
    with pytest.raises(ConfigError, match=message):
        run(*flags)


def test_two_processes_print_one_table_with_the_same_answers(run, folder):
    one, _ = run("saft", "--use_cpu")
    flags = ["saft", "--suite", "suite.yaml", "--use_cpu"]
    flags += ["--batch_size", "2", "--output", "out/two.json", "--silent"]
    printed = command_on_two("evaluate", folder, *flags, cwd=folder)
    assert printed.count("Accuracy in %") == 1
    two = json.loads((folder / "out" / "two.json").read_text())
    for name, content in two["models"].items():
        assert content["config"]["ranks"] == 2 and content["means"] == one["models"][name]["means"]
        for key, found in content["sets"].items():
            assert found["predictions"] == one["models"][name]["sets"][key]["predictions"]
