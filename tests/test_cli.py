# SPDX-License-Identifier: Apache-2.0
"""The command line, in a process of its own once, else in this one."""

from __future__ import annotations

import runpy
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from hf_robust.cli import COMMANDS, main
from hf_robust.scripting.arguments import parse_arguments

from .methods import CLIP
from .tiny_models import tiny_model


def test_as_a_module(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hf_robust", "check", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        runpy.run_module("hf_robust", run_name="__main__")
    assert "refused" in capsys.readouterr().out


def test_importing_the_module_runs_nothing(capsys: pytest.CaptureFixture) -> None:
    import_module("hf_robust.__main__")  # as pkgutil.walk_packages finds it
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("flags", [[], ["--help"], ["-h"]], ids=str)
def test_the_help_shows_every_command(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(flags)
    out = capsys.readouterr().out
    assert all(f"    {name} " in out and help in out for name, help in COMMANDS.items())


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_with_an_example_that_is_one(name: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    out = capsys.readouterr().out
    command = import_module(f"hf_robust.commands.{name}")
    assert out.startswith(f"usage: hf-robust {name} ") and out.endswith(f"example: {command.EXAMPLE}\n")
    program, called, *flags = command.EXAMPLE.split()
    assert (program, called) == ("hf-robust", name)
    if "--config" not in flags:  # of a file that the user has
        parse_arguments(command.TYPES, flags=flags)


def test_the_help_of_a_training_shows_what_is_used_and_all_on_request(capsys: pytest.CaptureFixture) -> None:
    texts = []
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit, match="0"):
            main(["train", flag])
        texts.append(capsys.readouterr().out)
    assert "--learning_rate" in texts[0] and "--torch_compile" not in texts[0]
    assert "--torch_compile" in texts[1] and "(default: openai/clip-vit-base-patch32)" in texts[0]
    assert texts[0].index("\ndata:") < texts[0].index("\nmethod:") < texts[0].index("\ntraining:")
    assert "--learning-rate" not in texts[0] and "--corruptions" not in texts[0] and "--no_corruptions" in texts[0]


@pytest.mark.parametrize("flags", [["trian"], ["--completion"], ["--completion", "fish"], ["--verbose"]], ids=str)
def test_what_is_no_command_is_refused(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(flags)
    assert "usage: hf-robust COMMAND" in capsys.readouterr().err


def test_an_error_of_a_command_is_one_line(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["merge", "--zero_shot", "a", "--output", "b"])
    assert capsys.readouterr().err == "hf-robust merge: error: not given (at fine_tuned). Set --fine_tuned.\n"


def test_merging_writes_a_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, seed in (("base", 0), ("full", 1)):
        tiny_model(CLIP, seed=seed).save_pretrained(tmp_path / name)
    flags = ["--zero_shot", str(tmp_path / "base"), "--output", str(tmp_path / "merged"), "--alpha", "0.25"]
    main(["merge", *flags, "--fine_tuned", str(tmp_path / "full")])
    assert capsys.readouterr().out == f"alpha 0.25: {tmp_path / 'merged'}\n"
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_bash_completes_commands_and_flags(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    main(["--completion", "bash"])
    (tmp_path / "complete.sh").write_text(capsys.readouterr().out)
    script = f"source {tmp_path}/complete.sh; COMP_WORDS=(hf-robust {{}}); COMP_CWORD=${{{{#COMP_WORDS[@]}}}}; "
    script += "((COMP_CWORD--)); $(complete -p hf-robust | sed 's/.* -F \\([^ ]*\\).*/\\1/'); echo ${{COMPREPLY[@]}}"
    for typed, expected in (("tr", "train"), ("train --learning_ra", "--learning_rate"), ("merge --so", "--soup")):
        found = subprocess.run(["bash", "-c", script.format(typed)], capture_output=True, text=True, check=True).stdout
        assert expected in found.split(), (typed, found)
