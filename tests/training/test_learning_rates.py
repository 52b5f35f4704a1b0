# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model

from hf_robust import ACLIPConfig, RAdapterConfig, RobustTrainingArguments, SAFTConfig, ZeroShotClassifier
from hf_robust.training.learning_rates import FULL, HEAD_ALONE, OF_ADAPTERS, method_rate, with_learning_rate
from tests.programs import ROOT
from tests.tiny_models import tiny_model, tiny_processor
from tests.trainers import build, layer_norms

CONFIGS = {
    "saft": SAFTConfig(),
    "aclip": ACLIPConfig(),
    "radapter": RAdapterConfig(),
    "lora": LoraConfig(target_modules=["q_proj"]),
}
NAMES = {"saft": "SAFT", "aclip": "ACLIP", "radapter": "RADAPTER", "lora": "LORA"}


def test_rates_are_those_that_the_comparison_chose():
    text = (ROOT / "examples" / "benchmarks" / "compare_methods.md").read_text()
    table = text.partition("# Most of them on photographs")[2]
    found = {row[1]: row[3] for line in table.splitlines() if (row := re.split(r"\s*\|\s*", line)) and len(row) > 5}
    chosen = {name: float(found[method]) for method, name in NAMES.items()}
    assert {name: rate for name, rate in OF_ADAPTERS.items() if name in chosen} == chosen
    assert (FULL, HEAD_ALONE) == (float(found["full"]), float(found["linear-probe"]))


@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_has_the_rate_of_its_method(method):
    model = get_peft_model(tiny_model("clip"), CONFIGS[method])
    task = ZeroShotClassifier(model, tiny_processor("clip"), ["cat", "dog"])
    assert method_rate(model) == method_rate(task) == OF_ADAPTERS[NAMES[method]]


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # PEFT's own LN tuning
def test_other_models():
    model = tiny_model("clip")
    assert method_rate(model) == FULL
    assert method_rate(get_peft_model(tiny_model("clip"), LNTuningConfig(target_modules=layer_norms(model)))) == 5e-5
    assert method_rate(model.requires_grad_(False)) == HEAD_ALONE
    injected = tiny_model("clip")
    injected.add_adapter(LoraConfig(target_modules=["q_proj"]))
    assert method_rate(injected) == OF_ADAPTERS["LORA"]
    injected = inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny_model("clip"))
    assert method_rate(injected) == OF_ADAPTERS["LORA"]


def test_a_head_on_a_frozen_adapter_is_a_head_alone(tmp_path):
    get_peft_model(tiny_model("clip"), CONFIGS["lora"]).save_pretrained(tmp_path, save_embedding_layers=False)
    assert method_rate(PeftModel.from_pretrained(tiny_model("clip"), tmp_path)) == HEAD_ALONE
    assert method_rate(PeftModel.from_pretrained(tiny_model("clip"), tmp_path, is_trainable=True)) == 1e-3
    unselected = get_peft_model(tiny_model("clip"), SAFTConfig())
    assert method_rate(unselected) == OF_ADAPTERS["SAFT"]


def test_a_trainer_takes_it_where_none_is_given_and_leaves_the_arguments_alone(tmp_path):
    trainer = build(tmp_path, "saft", learning_rate=None, max_steps=1)
    assert trainer.args.learning_rate == OF_ADAPTERS["SAFT"]
    trainer.train()
    assert trainer.optimizer.defaults["lr"] == OF_ADAPTERS["SAFT"]
    assert build(tmp_path, "saft", learning_rate=0.5).args.learning_rate == 0.5


def test_arguments_serve_several_methods(tmp_path):
    args = RobustTrainingArguments(str(tmp_path), report_to="none")
    models = get_peft_model(tiny_model("clip"), SAFTConfig()), tiny_model("clip")
    rates = [with_learning_rate(args, model).learning_rate for model in models]
    assert rates == [OF_ADAPTERS["SAFT"], FULL] and args.learning_rate is None
