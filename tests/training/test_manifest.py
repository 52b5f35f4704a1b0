# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is whole to the last bit, or it is passed over."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import signal
from pathlib import Path

import pytest

from hf_robust.errors import CheckpointError
from hf_robust.training.checkpoint import checkpoint_to_resume
from hf_robust.training.manifest import MANIFEST, check_files, checkpoints_in, read_manifest, seal_checkpoint
from hf_robust.training.publishing import rotate
from tests.tiny_models import image_dataset
from tests.trainers import NAMES, build, same, trained, weights
from tests.training.test_stopping import Signals

SETTINGS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, trained(folder, "saft", **SETTINGS)


@pytest.fixture
def folder(run, tmp_path):
    shutil.copytree(run[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


def files_of(checkpoint):
    return sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != "README.md")


def test_the_manifest_lists_every_file_and_what_the_run_is(run):
    checkpoint = run[0] / "checkpoint-2"
    manifest = read_manifest(checkpoint)
    listed = {*manifest["files"], MANIFEST}
    assert listed == {path.relative_to(checkpoint).as_posix() for path in files_of(checkpoint)}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= listed
    assert manifest["step"] == 2 and manifest["run"]["seed"] == 42 and "torch" in manifest["versions"]


def test_any_missing_file_makes_the_one_before_the_last(run, folder, caplog):
    for path in files_of(run[0] / "checkpoint-3"):
        missing = folder / path.relative_to(run[0])
        content = missing.read_bytes()
        missing.unlink()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hf_robust"):
            assert checkpoint_to_resume(True, folder) == str(folder / "checkpoint-2")
        assert "Resumed from checkpoint-2" in caplog.text and path.name in caplog.text
        with pytest.raises(CheckpointError, match=path.name):
            checkpoint_to_resume(str(folder / "checkpoint-3"), folder)
        missing.write_bytes(content)
    assert checkpoint_to_resume(True, folder) == str(folder / "checkpoint-3")


def test_any_flipped_bit_or_lost_end_is_found(folder):
    checkpoint, draws = folder / "checkpoint-3", random.Random(0)
    for path in files_of(checkpoint):
        content = path.read_bytes()
        places = draws.sample(range(8 * len(content)), min(40, 8 * len(content)))
        changed = [content[: place // 8] + bytes([content[place // 8] ^ 1 << place % 8]) + content[place // 8 + 1 :]
                   for place in places]  # fmt: skip
        for other in [*changed, content[:-1], content[: len(content) // 2], b"", content + b"\0"]:
            path.write_bytes(other)
            assert checkpoint_to_resume(True, folder) == str(folder / "checkpoint-2"), path
        path.write_bytes(content)


def test_a_card_may_be_edited(folder):
    (folder / "checkpoint-3" / "README.md").write_text("Mine.")
    assert checkpoint_to_resume(True, folder) == str(folder / "checkpoint-3")


def test_what_is_no_checkpoint_is_passed_over(folder):
    (folder / "checkpoint-100").write_text("a file")
    for name in ("checkpoint-abc", "checkpoint-1e5", "checkpoint-99999999999999999999", "checkpoint-7"):
        (folder / name).mkdir()
    os.symlink(folder / "nowhere", folder / "checkpoint-8")
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9" / MANIFEST).mkdir()
    assert checkpoint_to_resume(True, folder) == str(folder / "checkpoint-3")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"sha256": 1}', '{"format_version": 1}', '"x"', "[" * 100_000]
)
def test_any_other_manifest_is_damaged(folder, text):
    (folder / "checkpoint-3" / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(folder / "checkpoint-3")


def test_a_newer_format_is_said(folder, monkeypatch):
    monkeypatch.setattr("hf_robust.training.manifest.FORMAT_VERSION", 2)
    (folder / "checkpoint-3" / MANIFEST).unlink()
    seal_checkpoint(folder / "checkpoint-3", {"step": 3, "order": 3})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="newer version.*got 2; allowed 1"):
        read_manifest(folder / "checkpoint-3")


def test_the_last_saved_is_resumed_not_that_of_most_steps(folder):
    """A second run in the folder of a longer one."""
    shorter = build(folder, "saft", **{**SETTINGS, "max_steps": 2})
    shorter.train()
    assert [path.name for path in checkpoints_in(folder)] == ["checkpoint-3", "checkpoint-1", "checkpoint-2"]
    assert checkpoint_to_resume(True, folder) == str(folder / "checkpoint-2")
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))
    assert checkpoint_to_resume(True, folder) == str(folder / "checkpoint-2")


def test_no_whole_checkpoint_says_what_is_wrong_with_the_last(folder):
    for number in (1, 2, 3):
        (folder / f"checkpoint-{number}" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="no whole checkpoint.*optimizer.pt has another size"):
        checkpoint_to_resume(True, folder)


def test_an_unreadable_file_is_an_error_of_ours(folder, monkeypatch):
    def broken(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("hf_robust.training.manifest._sha256", broken)
    with pytest.raises(CheckpointError, match="cannot be read.*Input/output error"):
        check_files(folder / "checkpoint-3", read_manifest(folder / "checkpoint-3"))


@pytest.mark.parametrize(
    ("limit", "best", "left"), [(None, None, "123"), (0, None, "123"), (2, None, "23"), (1, None, "3"), (1, "1", "13")]
)
def test_the_oldest_are_removed_and_the_best_and_the_new_stay(folder, limit, best, left):
    rotate(checkpoints_in(folder), folder / "checkpoint-3", limit, best and str(folder / f"checkpoint-{best}"))
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == [f"checkpoint-{number}" for number in left]


def test_broken_ones_do_not_count(folder):
    for number in (1, 2):
        (folder / f"checkpoint-{number}" / MANIFEST).unlink()
    rotate(checkpoints_in(folder), folder / "checkpoint-3", 1, None)
    assert len(list(folder.glob("checkpoint-*"))) == 3


def test_files_are_as_readable_as_folders(run):
    modes = {path.stat().st_mode & 0o777 for path in files_of(run[0] / "checkpoint-2")}
    assert modes == {(run[0] / "checkpoint-2").stat().st_mode & 0o666}


class Scores:
    """A metric that follows a script."""

    def __init__(self, *scores):
        self.scores = list(scores)

    def __call__(self, prediction):
        return {"score": self.scores.pop(0)}


CHOOSING = {"max_steps": 4, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
CHOOSING |= {"metric_for_best_model": "eval_score", "greater_is_better": True}


def choosing(folder, *scores, **settings):
    rows = image_dataset(7, NAMES, seed=50)
    given = {**SETTINGS, **CHOOSING, "eval_dataset": rows, "compute_metrics": Scores(*scores), **settings}
    return build(folder, **given)


def test_a_best_step_between_saves_is_no_missing_checkpoint(tmp_path):
    whole = choosing(tmp_path, 1, 2, 3, 2)
    whole.train()
    assert Path(whole.state.best_model_checkpoint).name == "checkpoint-2"
    resumed = choosing(tmp_path, 3, 2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(weights(resumed), weights(whole))


def test_a_checkpoint_that_a_signal_asked_for_is_not_chosen(tmp_path):
    whole = choosing(tmp_path / "whole", 1, 2, 3, 2)
    whole.train()
    with pytest.raises(SystemExit):
        choosing(tmp_path, 1, 2, 3, callbacks=[Signals("step", 2, signal.SIGTERM)]).train()
    assert (tmp_path / "checkpoint-3").exists()
    resumed = choosing(tmp_path, 2)
    resumed.train(resume_from_checkpoint=True)
    assert Path(resumed.state.best_model_checkpoint).name == "checkpoint-2"
    assert same(weights(resumed), weights(whole))


def test_a_checkpoint_of_an_earlier_run_is_not_chosen(tmp_path):
    build(tmp_path, seed=7, **{**SETTINGS, "max_steps": 4}).train()
    run = choosing(tmp_path, 1, 2, 3, 2)
    run.train()
    assert Path(run.state.best_model_checkpoint).name == "checkpoint-2"


def test_a_checkpoint_may_be_a_link_to_another_disk(tmp_path):
    build(tmp_path / "run", **{**SETTINGS, "max_steps": 2}).train()
    (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "big")
    (tmp_path / "run" / "checkpoint-1").symlink_to(tmp_path / "big")
    again = build(tmp_path / "run", **{**SETTINGS, "max_steps": 2}, save_total_limit=1)
    again.train()
    assert (tmp_path / "big" / MANIFEST).exists()
    assert [path.name for path in (tmp_path / "run").glob("[!.]*")] == ["checkpoint-2"]
    assert not list((tmp_path / "run").glob(".hf_robust-tmp-*"))


def test_a_manifest_of_the_format_lacks_nothing(folder):
    (folder / "checkpoint-3" / MANIFEST).unlink()
    seal_checkpoint(folder / "checkpoint-3", {"step": 3})
    with pytest.raises(CheckpointError, match="damaged"):
        read_manifest(folder / "checkpoint-3")


def test_a_path_that_is_not_there_is_said(tmp_path):
    for path in (str(tmp_path / "nope"), ""):
        with pytest.raises(CheckpointError, match="no such checkpoint|no manifest.json"):
            build(tmp_path, **SETTINGS).train(resume_from_checkpoint=path)


def test_the_best_checkpoint_is_found_where_the_folder_is_now(tmp_path):
    """The path in the state of the training may be one of another machine."""
    here = choosing(tmp_path / "here", 4, 3, 2, 1, save_steps=1)
    here.train()
    assert Path(here.state.best_model_checkpoint).name == "checkpoint-1"
    shutil.rmtree(tmp_path / "here" / "checkpoint-4")
    shutil.rmtree(tmp_path / "here" / "checkpoint-3")
    (tmp_path / "here").rename(tmp_path / "there")
    there = choosing(tmp_path / "there", 2, 1, save_steps=1)
    there.train(resume_from_checkpoint=True)
    assert there.state.best_model_checkpoint == str(tmp_path / "there" / "checkpoint-1")
    assert same(weights(there), weights(here))
    for number in (1, 3, 4):
        shutil.rmtree(tmp_path / "there" / f"checkpoint-{number}")
    with pytest.raises(CheckpointError, match="best checkpoint so far is missing.*checkpoint-1"):
        choosing(tmp_path / "there", 2, 1, save_steps=1).train(resume_from_checkpoint=True)


def test_a_manifest_says_nothing_of_tokens_and_paths(run):
    text = json.dumps(read_manifest(run[0] / "checkpoint-2"))
    assert str(run[0]) not in text and os.path.expanduser("~") not in text and "hub_token" not in text
