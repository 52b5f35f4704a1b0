# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_robust import RobustTrainingArguments
from hf_robust.errors import ConfigError
from hf_robust.scripting.arguments import setting
from hf_robust.scripting.checks import check_file, check_given, check_same_settings, check_training, check_values


@dataclass
class Arguments:
    train_data: str | None
    test_data: str | None
    images: str | None = setting(None, "Images.", positional=True)


@pytest.mark.parametrize("value", [None, ""])
def test_what_is_missing_is_named(value):
    args = Arguments("a", value, value)
    check_given(args, "train_data")
    with pytest.raises(ConfigError, match="not given .at test_data.. Set --test_data."):
        check_given(args, "train_data", "test_data")
    with pytest.raises(ConfigError, match="not given .at images.. Give it first, without a flag"):
        check_given(args, "images")


def test_training_arguments_of_the_script_are_refused(tmp_path):
    check_training(RobustTrainingArguments(str(tmp_path)), {"head": "live"}, {"seed": "seeds"})
    with pytest.raises(ConfigError, match="seed.*Set seeds"):
        check_training(RobustTrainingArguments(str(tmp_path), seed=7), {}, {"seed": "seeds"})
    with pytest.raises(ConfigError, match="head.*'frozen'.*'live'"):
        check_training(RobustTrainingArguments(str(tmp_path), head="frozen"), {"head": "live"}, {})


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").touch()
    check_file(None, "output")
    check_file(str(tmp_path / "new" / "a.json"), "output")
    check_file(str(tmp_path / "file"), "output")
    bad = {tmp_path: "it is a folder", tmp_path / "file" / "a.json": "no file can be written there"}
    for path, message in bad.items():
        with pytest.raises(ConfigError, match=f"{message} .at output."):
            check_file(str(path), "output")


def test_lists_hold_each_value_once():
    check_values(["saft"], ["saft", "lora"], seeds=[1, 2])
    with pytest.raises(ConfigError, match="unknown method.*'sfat'.*'saft'"):
        check_values(["sfat"], ["saft", "lora"])
    for seeds in ([1, 1], []):
        with pytest.raises(ConfigError, match="seeds are empty or repeated"):
            check_values(["saft"], ["saft"], seeds=seeds)


def test_other_settings_are_named():
    found = {"config": {"a": 1, "b": 2}, "more": {}}
    check_same_settings(found, {"config": {"a": 1}}, Path("results.json"))
    with pytest.raises(ConfigError, match=r"results.json.*\['config.b', 'config.c'\].*another output_dir"):
        check_same_settings(found, {"config": {"a": 1, "b": 3, "c": 4}}, Path("results.json"))
