# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys
import warnings
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from hf_robust.errors import ConfigError
from hf_robust.scripting import run as module
from hf_robust.scripting.run import end_processes, no_empty_folders, run
from tests.programs import ROOT

SCRIPT = """
from __future__ import annotations

import os
import time
from dataclasses import dataclass

from hf_robust.errors import DataError
from hf_robust.scripting.run import run


@dataclass
class Settings:
    \"\"\"A script's.\"\"\"

    rank: str = "0"


def main(settings: Settings) -> None:
    if os.environ.get("RANK", "0") == settings.rank:
        raise DataError("broken\\nimage", where="row 7", remedy="Look at it.")
    time.sleep(600)  # as a rank that waits for the others


if __name__ == "__main__":
    run(main, Settings)
"""
LINE = "broken image (at row 7). Look at it.\n"


@dataclass
class Settings:
    """A script's."""

    seed: int = 0


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs a script on a command line; returns its exit status and what it wrote to stderr."""
    monkeypatch.setattr(module, "quiet", lambda: None)

    def run_script(main, *flags):
        monkeypatch.setattr(sys, "argv", ["folder/my.py", *flags])
        with pytest.raises(SystemExit) as leaving:
            run(main, Settings)
        return leaving.value.code, capsys.readouterr().err

    return run_script


def fail(settings):
    raise ConfigError("out of range", where="seed", got=settings.seed)


def test_an_error_of_ours_is_one_line_and_status_2(call):
    assert call(fail, "--seed", "7") == (2, "my.py: error: out of range (at seed): got 7\n")


def test_a_wrong_flag_is_one_line_and_status_2(call):
    assert call(fail, "--sed", "7") == (2, "my.py: error: unknown flag: got '--sed'. Did you mean '--seed'?\n")


@pytest.mark.parametrize("flags", [["--debug", "--seed", "7"], ["--seed", "7", "--debug"]])
def test_debug_shows_the_traceback(call, flags):
    status, text = call(fail, *flags)
    assert status == 2 and "Traceback" in text and "in fail" in text and text.endswith("got 7\n")


def test_debug_with_a_value_is_left_to_the_training_arguments():
    assert module._without_debug(["--debug", "underflow_overflow"]) == (["--debug", "underflow_overflow"], False)
    assert module._without_debug([]) == ([], False)


def test_errors_of_others_are_not_hidden(call):
    def main(settings):
        raise KeyError("a mistake of ours")

    with pytest.raises(KeyError):
        call(main)


@pytest.mark.parametrize(("flags", "silenced"), [([], True), (["--debug"], False)])
def test_other_packages_are_silenced_unless_the_user_wants_to_see_more(monkeypatch, flags, silenced):
    called = []
    monkeypatch.setattr(module, "quiet", lambda: called.append(True))
    monkeypatch.setattr(sys, "argv", ["my.py", *flags])
    run(lambda settings: None, Settings)
    assert bool(called) == silenced


def test_warnings_of_other_packages_are_not_shown(tmp_path):
    (tmp_path / "noisy.py").write_text(
        "import warnings\n"
        "from transformers.utils import logging\n"
        "from hf_robust.scripting.run import quiet\n"
        "quiet()\n"
        "warnings.warn('noise', FutureWarning)\n"
        "warnings.warn('noise')\n"
        "logging.get_logger('transformers.x').warning('noise')\n"
        "print(list(logging.tqdm(range(2), desc='noise')))\n"
    )
    assert program(sys.executable, str(tmp_path / "noisy.py")) == (0, "[0, 1]\n", "")


def test_warnings_that_were_asked_for_are_shown(monkeypatch):
    monkeypatch.setattr(sys, "warnoptions", ["default"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module.quiet()
        warnings.warn("noise", FutureWarning, stacklevel=1)
    assert len(caught) == 1


def test_an_error_leaves_no_empty_folder_behind(tmp_path):
    (tmp_path / "old").mkdir()
    folders = [tmp_path / name for name in ("old", "new", "used", "never")]
    with pytest.raises(ConfigError), no_empty_folders(list(map(str, folders))):
        (tmp_path / "new").mkdir()
        (tmp_path / "used").mkdir()
        (tmp_path / "used" / "results.json").touch()
        raise ConfigError("stop")
    assert sorted(os.listdir(tmp_path)) == ["old", "used"]
    with no_empty_folders([str(tmp_path / "new")]):
        (tmp_path / "new").mkdir()
    assert (tmp_path / "new").exists()


def test_what_is_left_of_a_training_is_freed_before_the_group_of_processes_ends(monkeypatch):
    left = torch.nn.Identity()
    left.itself, reference, found = left, weakref.ref(left), []
    del left
    ends = SimpleNamespace(destroy_process_group=lambda: found.append(reference()))
    monkeypatch.setattr(module, "PartialState", lambda: ends)
    end_processes()
    assert found == [None]


def program(*command, **variables):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    return done.returncode, done.stdout, done.stderr


def test_a_program_ends_with_one_line(tmp_path):
    (tmp_path / "my.py").write_text(SCRIPT)
    assert program(sys.executable, str(tmp_path / "my.py")) == (2, "", f"my.py: error: {LINE}")


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_fails_says_so_and_ends_the_others(tmp_path, rank):
    (tmp_path / "my.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launch += [str(ROOT / "examples" / "accelerate_configs" / "cpu.yaml"), str(tmp_path / "my.py"), "--rank", rank]
    status, _, text = program(*launch, PET_STANDALONE="1", PET_LOCAL_ADDR="127.0.0.1")  # as in `launch_on_two`
    assert status != 0 and text.count(f"my.py: error on rank {rank}: {LINE}") == 1
