# SPDX-License-Identifier: Apache-2.0
"""`hf-robust merge --soup`."""

from __future__ import annotations

import copy
import json
import os
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel

from hf_robust import RobustTrainer, RobustTrainingArguments, SAFTConfig, select_saft
from hf_robust.cli import main
from hf_robust.interpolation.soups import uniform_soup
from hf_robust.tasks.class_names import ZeroShotClassifier
from hf_robust.tasks.files import save_head
from hf_robust.training.checkpoint import save_encoder
from tests.interpolation.folders import content
from tests.methods import assert_same
from tests.tiny_models import image_dataset, tiny_model, tiny_processor

NAMES = ["cat", "dog"]


@pytest.fixture
def soup(monkeypatch, tmp_path, capsys):
    """The command in a folder with a base and its processor; returns exit status and what it printed."""
    monkeypatch.chdir(tmp_path)
    tiny_model("clip").save_pretrained("base")
    tiny_processor("clip").save_pretrained("base")

    def run(*flags, output="soup"):
        capsys.readouterr()
        status = 0
        try:
            main(["merge", "--output", output, "--use_cpu", *flags])
        except SystemExit as leaving:
            status = leaving.code
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def save_task(folder, model, head="live", names=NAMES):
    """As `RobustTrainer.save_model` does."""
    task = ZeroShotClassifier(model, tiny_processor("clip"), names, head=head)
    if head == "trainable":
        with torch.no_grad():
            task.class_head.weight.add_(torch.randn_like(task.class_head.weight))
    Path(folder).mkdir()
    save_encoder(task, Path(folder))
    save_head(task, Path(folder))
    tiny_processor("clip").save_pretrained(Path(folder, "processor") if isinstance(model, PeftModel) else folder)


def save_adapter(folder, config, seed, base="base", **settings):
    torch.manual_seed(seed)
    model = get_peft_model(AutoModel.from_pretrained(base), copy.deepcopy(config))
    if isinstance(config, SAFTConfig):
        select_saft(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    save_task(folder, model, **settings)


def saft(seed):
    return SAFTConfig(density=0.02, score="random", seed=seed)


def test_whole_models(soup):
    models = [tiny_model("clip", seed=seed) for seed in (1, 2, 3)]
    for name, model in zip("abc", models, strict=True):
        save_task(name, model, head="trainable")
    assert soup("--soup", "a", "b", "c") == (0, "soup of 3 models: soup\n")
    assert_same(AutoModel.from_pretrained("soup").state_dict(), uniform_soup(models).state_dict())
    heads = [load_file(f"{name}/classifier.safetensors")["class_head.weight"] for name in "abc"]
    torch.testing.assert_close(load_file("soup/classifier.safetensors")["class_head.weight"], sum(heads) / 3)
    status, line = soup("--soup", "a", "b")
    assert (
        status == 2 and line.startswith("hf-robust merge: error: output folder is not empty") and line.count("\n") == 1
    )


def test_adapters_become_an_adapter_that_goes_part_of_the_way(soup):
    for seed, name in enumerate("ab"):
        save_adapter(name, saft(seed), seed, head="trainable")
    assert soup("--soup", "a", "b") == (0, "soup of 2 adapters: soup\n")
    found, first, second = (merged(folder) for folder in ("soup", "a", "b"))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2, rtol=1e-6, atol=1e-7)
    heads = [load_file(f"{name}/classifier.safetensors")["class_head.weight"] for name in ("soup", "a", "b")]
    torch.testing.assert_close(heads[0], (heads[1] + heads[2]) / 2)
    assert Path("soup/processor/tokenizer.json").exists() and json.loads(Path("soup/classifier.json").read_text())
    main(["check", "soup"])  # else it leaves


def merged(folder):
    return PeftModel.from_pretrained(AutoModel.from_pretrained("base"), folder).merge_and_unload().state_dict()


@pytest.mark.parametrize("kind", ["models", "adapters"])
@pytest.mark.parametrize("head", ["live", "trainable"])
def test_greedy_takes_what_helps_on_validation_data(soup, kind, head):
    image_dataset(12, NAMES).save_to_disk("photos")
    for seed, name in enumerate("abc"):
        if kind == "models":
            save_task(name, tiny_model("clip", seed=seed), head=head)
        else:
            save_adapter(name, saft(seed), seed, head=head)
    status, printed = soup("--soup", "a", "b", "c", "--soup_greedy", "--validation_data", "photos")
    assert sorted(os.listdir()) == ["a", "b", "base", "c", "photos", "soup"]
    lines = printed.splitlines()
    assert status == 0 and lines[0].split() == ["ingredient", "validation_accuracy", *"of the soup with it".split()]
    table = {line[1:].split()[0]: (line[0] == "*", *map(float, line[1:].split()[1:])) for line in lines[1:4]}
    assert list(table) == sorted("abc", key=lambda name: -table[name][1])
    taken = [name for name, (mark, *_) in table.items() if mark]
    assert lines[4] == f"soup of {len(taken)} {kind if len(taken) > 1 else kind[:-1]}: soup"
    assert accuracy(taken[0], kind, head) == pytest.approx(table[taken[0]][1], abs=1e-4)
    assert accuracy("soup", kind, head) == pytest.approx(max(row[2] for row in table.values()), abs=1e-4)


def accuracy(folder, kind, head):
    """As one who has trained the model would measure it."""
    model = AutoModel.from_pretrained("base" if kind == "adapters" else folder)
    model = PeftModel.from_pretrained(model, folder) if kind == "adapters" else model
    task = ZeroShotClassifier(model, tiny_processor("clip"), NAMES, head=head)
    if head == "trainable":
        task.load_state_dict(load_file(f"{folder}/classifier.safetensors"), strict=False)
    args = RobustTrainingArguments("run", report_to="none", disable_tqdm=True, use_cpu=True)
    trainer = RobustTrainer(task, args, eval_dataset=image_dataset(12, NAMES), processing_class=tiny_processor("clip"))
    return trainer.evaluate()["eval_accuracy"]


def test_what_is_wrong_is_one_line_and_nothing_is_written(soup):
    save_adapter("a", saft(0), 0)
    save_adapter("l", LoraConfig(r=2, target_modules=["q_proj"]), 0)
    save_adapter("h", saft(1), 0, head="trainable")
    save_adapter("n", saft(1), 0, names=["x", "y"])
    tiny_model("clip", seed=5).save_pretrained("base2")
    save_adapter("o", LoraConfig(r=2, target_modules=["q_proj"]), 0, base="base2")
    save_task("whole", tiny_model("clip", seed=1))
    before = content(Path())
    for flags, message in [
        (["--soup", "a", "whole"], "of adapters or of whole models"),
        (["--soup", "a", "a"], "there twice"),
        (["--soup", "a", "l"], "different methods .at l.: got 'LORA and SAFT'"),
        (["--soup", "l", "o"], "name different base models: got .'base', 'base2'.*--zero_shot"),
        (["--soup", "a", "h"], "only some of the folders have a trained head"),
        (["--soup", "a", "n"], "heads are of other classes .at n."),
        (["--soup", "whole", "nowhere"], "no such folder"),
        (["--soup", "whole", "--zero_shot", "base"], "no base"),
        (["--soup", "a", "--alpha", "0.3"], "not a setting of a soup"),
        (["--soup", "a", "--fine_tuned", "a"], "does not go together.*fine_tuned"),
        (["--soup", "a", "--soup_greedy"], "not given .at validation_data"),
        (["--zero_shot", "base", "--fine_tuned", "a", "--soup_greedy"], "does not go together.*soup_greedy"),
        (["--zero_shot", "base", "--fine_tuned", "a", "--templates", "a {}."], "does not go together.*templates"),
        (["--zero_shot", "base", "--fine_tuned", "a", "--batch_size", "8"], "does not go together.*batch_size"),
        (["--soup", "a", "--validation_data", "photos"], "together.*validation_data.*Only --soup_greedy"),
        (["--soup", "a", "--class_names_file", "names.txt"], "does not go together.*class_names_file"),
        (["--soup", "a", "--image_column", "x"], "does not go together.*image_column"),
        (["--soup", "a", "--label_column", "x"], "does not go together.*label_column"),
    ]:
        status, line = soup(*flags)
        assert status == 2 and line.startswith("hf-robust merge: error: ") and line.count("\n") == 1
        assert re.search(message, line), line
    assert content(Path()) == before
