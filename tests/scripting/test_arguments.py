# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest

from hf_robust import RobustTrainingArguments
from hf_robust.errors import ConfigError
from hf_robust.scripting.arguments import parse_arguments, setting


@dataclass
class Settings:
    """A script's."""

    train_data: str | None = None
    words: str = "a photo"
    rates: list[float] = field(default_factory=lambda: [0.1])
    targets: list[str] | None = None
    sets: dict | str | None = None
    shots: int | None = None
    dtype: Literal["float32", "float16"] = "float32"
    wise_ft: bool = False
    inner: bool = True


def parse(*flags, defaults=None):
    return parse_arguments([Settings, RobustTrainingArguments], defaults, flags)


@pytest.fixture
def parse_file(tmp_path):
    """Reads a config file of these lines, and flags."""

    def call(text, *flags):
        (tmp_path / "my.yaml").write_text(text)
        return parse("--config", str(tmp_path / "my.yaml"), *flags)

    return call


def test_flags_win_over_the_config_and_the_config_over_the_defaults(tmp_path):
    (tmp_path / "my.yaml").write_text("words: from the file\nshots: 4\nrates: [1, 2]\nlearning_rate: 0.5\n")
    flags = ["--config", str(tmp_path / "my.yaml"), "--shots", "5"]
    ours, training = parse(*flags, defaults={"words": "x", "wise_ft": True, "logging_steps": 7})
    assert (ours.words, ours.shots, ours.rates, ours.wise_ft) == ("from the file", 5, [1.0, 2.0], True)
    assert training.learning_rate == 0.5 and training.logging_steps == 7
    assert training.remove_unused_columns is False  # of RobustTrainingArguments


@pytest.mark.parametrize("flag", ["--learning_rate", "--learning-rate"])
def test_both_spellings_of_a_flag_are_legal(flag):
    assert parse(flag, "1e-3")[1].learning_rate == parse(f"{flag}=1e-3")[1].learning_rate == 0.001


@pytest.mark.parametrize("flag", ["--learning_rat", "--learning-rat", "--learning_rat=1", "--lerning_rate"])
def test_abbreviated_and_misspelt_flags_are_errors_with_the_closest_name(flag):
    with pytest.raises(ConfigError, match=f"unknown flag: got '{flag.split('=')[0]}'. Did you mean '--learning_rate'"):
        parse(flag, "1")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--word", "x"], "unknown flag: got '--word'. Did you mean '--words'"),
        (["--no_iner"], "unknown flag: got '--no_iner'. Did you mean"),
        (["--xyz"], "unknown flag: got '--xyz'. --help lists them."),
        (["stray"], "value of no flag: got 'stray'"),
        (["--shots", "1", "2"], "value of no flag: got '2'"),
        (["--shots"], "--shots: expected one argument"),
        (["--shots", "many"], "--shots: invalid int value: 'many'"),
        (["--rates", "fast"], "--rates: invalid float value: 'fast'"),
        (["--dtype", "float31"], "--dtype: invalid choice: 'float31'.*float32.*float16"),
        (["--wise_ft", "perhaps"], "--wise_ft.*: Truthy value expected"),
        (["--load_best_model_at_end", "true", "--eval_strategy", "no"], "load_best_model_at_end requires"),
        (["--config", "no/where.yaml"], "file cannot be read .at no/where.yaml.: got 'No such file"),
    ],
)
def test_wrong_flags_are_errors(flags, message):
    with pytest.raises(ConfigError, match=message):
        parse(*flags)


def test_values_of_a_file_are_read_as_flags_would_be(parse_file):
    text = "learning_rate: 1e-3\nrates: [1e-3, '2', 3]\nshots: '4'\nwise_ft: true\nmax_grad_norm: -1e-3\nwords: 5\n"
    ours, training = parse_file(text)
    assert training.learning_rate == 0.001 and training.max_grad_norm == -0.001
    assert ours.rates == [0.001, 2.0, 3.0] and type(ours.shots) is int and ours.wise_ft is True and ours.words == "5"


def test_values_that_no_flag_has_are_kept(parse_file):
    text = "sets: {a: b.parquet}\ntargets: [q_proj, v_proj]\nreport_to: [none]\nshots: null\nwords: --words x\n"
    ours, training = parse_file(text)
    assert (ours.sets, ours.targets, ours.shots) == ({"a": "b.parquet"}, ["q_proj", "v_proj"], None)
    assert ours.words == "--words x" and training.report_to == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "unknown setting .at .*my.yaml.: got 'learning_rat'. Did you mean 'learning_rate'"),
        ("learning-rate: 1", "unknown setting .*'learning_rate'"),
        ("1: 2", "unknown setting .*got 1"),
        ("learning_rate: fast", "wrong value .at learning_rate in .*my.yaml.: got 'fast'.*invalid float value"),
        ("shots: 1.5", "wrong value .at shots in .*my.yaml.: got 1.5"),
        ("shots: [1, 2]", r"wrong value .at shots in .*my.yaml.: got \[1, 2\]"),
        ("rates: [1, x]", "wrong value .at rates in .*my.yaml.: got .*'x'"),
        ("rates: []", "wrong value .at rates in .*my.yaml.: got .*expected at least one argument"),
        ("wise_ft: perhaps", "wrong value .at wise_ft in .*my.yaml.: got 'perhaps'"),
        ("save_strategy: no", "wrong value .at save_strategy in .*my.yaml.: got False.*choose from.*no"),
        ("words:", "wrong value .at words in .*my.yaml.: got 'no value'"),
        ("words: {a: b}", "wrong value .at words in .*my.yaml.: got {'a': 'b'}"),
        ("a: [", "file is no YAML .while parsing.* .at .*my.yaml"),
        ("", "config file has no settings .at .*my.yaml."),
        ("- words", "config file has no settings .at .*my.yaml."),
    ],
)
def test_wrong_files_are_errors_that_name_file_setting_and_value(parse_file, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_file(text)
    assert "\n" not in str(caught.value)


def test_help_is_printed(capsys):
    with pytest.raises(SystemExit) as leaving:
        parse("--help")
    assert leaving.value.code == 0 and "--learning_rate" in capsys.readouterr().out


@dataclass
class Places:
    """Two settings without flags."""

    model: str | None = setting(None, "A model.", positional=True)
    images: list[str] = setting([], "Images.", "data", positional=True)
    top: int = setting(1, "Answers.", "data")


def test_settings_without_flags_come_first_on_the_command_line_and_by_name_in_a_config(tmp_path):
    expected = Places("saft", ["a.png", "b.png"], 2)
    assert parse_arguments([Places], flags=["saft", "a.png", "b.png", "--top", "2"]) == (expected,)
    (tmp_path / "my.yaml").write_text("model: saft\nimages: [a.png, b.png]\ntop: 2\n")
    assert parse_arguments([Places], flags=["--config", str(tmp_path / "my.yaml")]) == (expected,)
    (tmp_path / "my.yaml").write_text("images: photos\n")
    assert parse_arguments([Places], flags=["--config", str(tmp_path / "my.yaml")]) == (Places(None, ["photos"]),)
    with pytest.raises(ConfigError, match="unknown flag: got '--images'. Give it first, without a flag."):
        parse_arguments([Places], flags=["saft", "--images", "a.png"])
