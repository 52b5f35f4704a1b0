# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from hf_robust import ACLIPConfig, SAFTConfig
from hf_robust.errors import ConfigError
from hf_robust.training.checkpoint import save_encoder
from hf_robust.tuners.matching import check_adapter_name, matching

from ..methods import Method, trained
from ..tiny_models import tiny_model
from ..trainers import build

NAMES = {
    f"text_model.layers.{index}.{part}" for index in range(12) for part in ("self_attn.q_proj.weight", "fc1.bias")
}

# --- patterns ---


@pytest.mark.parametrize(
    ("patterns", "found"),
    [
        (["fc1"], {f"text_model.layers.{index}.fc1.bias" for index in range(12)}),
        (["layers.3", "q_proj.weight"], {"text_model.layers.3.fc1.bias"} | {n for n in NAMES if "q_proj" in n}),
        (["text_model"], NAMES),
        (r".*\.(1|2)\.fc1", {"text_model.layers.1.fc1.bias", "text_model.layers.2.fc1.bias"}),
        (r".*\.\d{2}\.fc1", {"text_model.layers.10.fc1.bias", "text_model.layers.11.fc1.bias"}),
        (r"(?i)TEXT_MODEL\.layers\.1{1,2}\..*bias", {"text_model.layers.1.fc1.bias", "text_model.layers.11.fc1.bias"}),
        (r"text_model.layers.0", {"text_model.layers.0.fc1.bias", "text_model.layers.0.self_attn.q_proj.weight"}),
    ],
)
def test_names_are_chosen_by_pattern_or_ending(patterns, found):
    assert matching(patterns, NAMES, "target_modules") == found


@pytest.mark.parametrize(
    "patterns", [["fc"], ["ayers.3"], ["layers.*"], [".fc1"], [""], "fc1", ".*fc", "", ["fc1", "q"]]
)
def test_what_matches_nothing_is_refused(patterns):
    with pytest.raises(ConfigError, match="target_modules matches no module"):
        matching(patterns, NAMES, "target_modules")


SLOW = r"(([a-z_.0-9])+)+!"  # nothing for this engine, for ever in `re`
ENDLESS = r"(?:(.)|(..)|(...))+!|.*fc1"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (SLOW, "matches no module"),
        (ENDLESS, r"takes longer than 1 s to match: got .*\. Simplify it, or give a list of names"),
        ("(?:(?:(?:.{99}){99}){99}){99}", "repeats too much"),
        (".{9999}", "braces that are no count"),
        ("(fc1){e<=2}", "braces that are no count"),
        ("|".join(["fc1"] * 20_000), "too long"),
        ("(" * 2000 + ")" * 2000, "no regular expression"),
        (r"\p{L}+", "braces"),
        (r"\h*", "no regular expression"),  # known to regex, not to re
        ("(", "no regular expression"),
    ],
    ids=lambda value: value[:20],
)
def test_a_pattern_cannot_take_for_ever(pattern, message):
    start = time.monotonic()
    with pytest.raises(ConfigError, match=message):
        matching(pattern, NAMES, "target_modules")
    assert time.monotonic() - start < 20


def test_many_names_take_no_time():
    """As many as a file can hold: looked up, and not compared with every module."""
    patterns = ["fc1"] + [f"text_model.layers.{index}" for index in range(200_000)]
    with pytest.raises(ConfigError, match="matches no module: got 'text_model.layers.12'"):
        matching(patterns, NAMES, "target_modules")


@pytest.mark.parametrize("config", [SAFTConfig, ACLIPConfig])
@pytest.mark.parametrize("argument", ["target_modules", "exclude_modules"])
def test_endless_patterns_are_refused_before_the_model_is_touched(config, argument):
    """So PEFT, which asks `re` for the embeddings when it saves, is not reached."""
    model = tiny_model("clip")
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ConfigError, match=f"{argument} takes longer"):
        get_peft_model(model, config(**{argument: ENDLESS}))
    assert names == [name for name, _ in model.named_modules()]


def test_an_endless_pattern_in_a_file_is_refused(tmp_path: Path):
    """Of A-CLIP; a SAFT file names its entries, and its pattern is not asked."""
    model = get_peft_model(tiny_model("clip"), ACLIPConfig())
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": ENDLESS}))
    with pytest.raises(ConfigError, match="target_modules takes longer"):
        PeftModel.from_pretrained(tiny_model("clip"), tmp_path)
    with pytest.raises(ConfigError, match="target_modules takes longer"):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("config", [SAFTConfig, ACLIPConfig])
@pytest.mark.parametrize("value", [5, ["fc1", 5], {"fc1": None}, [["fc1"]]])
def test_what_is_no_text_is_no_pattern(config, value):
    with pytest.raises(ConfigError, match="target_modules is no list of names: got"):
        config(target_modules=value)


# --- names of adapters ---

BAD = [
    "/abs/x",
    "../x",
    "..",
    ".",
    "x/y",
    "x\\y",
    "",
    "a b ",
    "a.b",
    "con",
    "NUL",
    "com1",
    "keys",
    "training",
    "_keys",
    "processor",
    "x" * 65,
    "x\u202ey",
    "ü",
    "x\n",
]
bad = pytest.mark.parametrize("name", BAD, ids=ascii)


@bad
def test_bad_names_are_refused(name):
    with pytest.raises(ConfigError, match="adapter's name (cannot be used: got .*; allowed 1 to 64 of|is taken)"):
        check_adapter_name(name)


@pytest.mark.parametrize("name", ["default", "A-b_9", "x" * 64, "console", "-"])
def test_good_names_are_not(name):
    check_adapter_name(name)


def state(model):
    """Everything of a model that an adapter could change."""
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    return tensors, frozen, [(name, type(module)) for name, module in model.named_modules()]


def assert_untouched(model, before):
    tensors, *rest = state(model)
    assert rest == list(before[1:]) and tensors.keys() == before[0].keys()
    assert all(torch.equal(tensor, before[0][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["/abs/x", "../x", "a b ", "keys"])
def test_a_bad_name_leaves_the_model_untouched(method: Method, tmp_path: Path, name):
    model = tiny_model("clip")
    before = state(model)
    with pytest.raises(ConfigError, match="adapter's name"):
        get_peft_model(model, method.config(), adapter_name=name)
    with pytest.raises(ConfigError, match="adapter's name"):
        model.add_adapter(method.config(), adapter_name=name)
    assert_untouched(model, before)
    model = trained(method)
    model.save_pretrained(tmp_path / "saved")
    before = state(model)
    with pytest.raises(ConfigError, match="adapter's name"):
        model.add_adapter(name, method.config())
    with pytest.raises(ConfigError, match="adapter's name"):
        model.load_adapter(tmp_path / "saved", name)
    assert_untouched(model, before)
    assert list(model.peft_config) == ["default"]
    model.load_adapter(tmp_path / "saved", "other")
    assert list(model.peft_config) == ["default", "other"]


def test_a_stock_adapter_with_a_bad_name_is_neither_trained_nor_saved(tmp_path: Path):
    outside = str(tmp_path / "outside")  # torch itself refuses names with a dot
    model = get_peft_model(tiny_model("clip"), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name=outside)
    trainer = build(tmp_path / "run", model=model)
    with pytest.raises(ConfigError, match="adapter's name"):
        trainer.train()
    (tmp_path / "saved").mkdir()
    with pytest.raises(ConfigError, match="adapter's name"):
        save_encoder(trainer.model, tmp_path / "saved")
    assert not list((tmp_path / "saved").iterdir()) and not Path(outside).exists()
