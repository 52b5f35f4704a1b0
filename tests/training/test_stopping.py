# SPDX-License-Identifier: Apache-2.0
"""Trainings that are told to stop, and folders that are in use."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading

import pytest
from transformers import TrainerCallback

from hf_robust.errors import CheckpointError
from hf_robust.training.stopping import HOLDER, LOCK, StopAtSignal, locked
from tests.programs import run_programs
from tests.trainers import build, same, weights

SAVING = {"save_strategy": "steps", "save_steps": 100, "lr_scheduler_type": "cosine"}


class Signals(TrainerCallback):
    """Sends signals to this process: before a step, in it, or while the set is evaluated after it."""

    def __init__(self, event, step, *numbers):
        self.event, self.step, self.numbers = event, step, numbers

    def send(self, event, state):
        if event == self.event and state.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)

    def on_step_begin(self, args, state, control, **kwargs):
        self.send("step", state)

    def on_evaluate(self, args, state, control, **kwargs):
        self.send("evaluation", state)

    def on_save(self, args, state, control, **kwargs):
        self.send("save", state)


def stopped(run, resume=None):
    with pytest.raises(SystemExit) as caught:
        run.train(resume_from_checkpoint=resume)
    return caught.value.code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_ends_the_step_saves_and_exits(tmp_path, number, caplog):
    whole = build(tmp_path / "whole", "saft", **SAVING)
    whole.train()
    before = signal.getsignal(number)
    with caplog.at_level(logging.WARNING, "hf_robust"):
        assert stopped(build(tmp_path, "saft", **SAVING, callbacks=[Signals("step", 2, number)])) == 128 + number
    assert f"{number.name}: saved after step 3" in caplog.text
    assert signal.getsignal(number) is before
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    resumed = build(tmp_path, "saft", **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), weights(whole))


def test_what_is_due_at_the_end_of_an_epoch_comes_before_the_exit(tmp_path):
    """Else the resumed run would lack an evaluation, and might choose another model as the best."""
    settings = {**SAVING, "eval_strategy": "epoch", "save_strategy": "epoch", "save_steps": 500}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_id_loss"}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    assert stopped(build(tmp_path, **settings, callbacks=[Signals("step", 4, signal.SIGTERM)])) == 143
    resumed = build(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(resumed), weights(whole))
    logs = [run.state.log_history for run in (resumed, whole)]
    losses = [[entry["eval_id_loss"] for entry in log if "eval_id_loss" in entry] for log in logs]
    assert losses[0] == losses[1] and len(losses[0]) == 2


@pytest.mark.parametrize("event", ["evaluation", "save"])
def test_a_signal_between_steps_stops_after_the_next(tmp_path, event):
    settings = {**SAVING, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = build(tmp_path, "saft", **settings, callbacks=[Signals(event, 2, signal.SIGTERM, signal.SIGTERM)])
    assert stopped(run) == 143
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    run = build(tmp_path, **SAVING, callbacks=[Signals("step", 2, signal.SIGINT, signal.SIGINT)])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*")) and not (tmp_path / HOLDER).exists()


def test_signals_of_the_program_stay_its_own(tmp_path, monkeypatch):
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    try:
        build(tmp_path, **SAVING, callbacks=[Signals("step", 2, signal.SIGUSR1)]).train()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


def test_without_checkpoints_ctrl_c_is_what_it_always_was(tmp_path):
    run = build(tmp_path / "out", callbacks=[Signals("step", 2, signal.SIGINT)])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert not list((tmp_path / "out").iterdir())


def test_in_another_thread_no_handler_is_set(tmp_path):
    found = []
    thread = threading.Thread(target=lambda: found.append(build(tmp_path, max_steps=1, **SAVING).train()))
    thread.start()
    thread.join()
    assert found[0].global_step == 1


def test_a_second_job_is_kept_out_of_the_folder(tmp_path):
    program = f"""
import sys
from pathlib import Path
from hf_robust.errors import CheckpointError
from hf_robust.training.stopping import locked
try:
    with locked(Path({str(tmp_path)!r})):
        print("has it")
except CheckpointError as error:
    print(error)
"""
    with locked(tmp_path):
        ((out, _),) = run_programs([sys.executable, "-c", program])
        assert f"another training saves into this folder (at {tmp_path}): got 'process {os.getpid()} on " in out
    ((out, _),) = run_programs([sys.executable, "-c", program])
    assert out == "has it\n"
    assert [path.name for path in tmp_path.iterdir()] in ([], [LOCK])


def test_a_training_holds_the_lock_and_gives_it_back(tmp_path):
    class Second(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(CheckpointError, match="another training saves into this folder"):
                build(tmp_path, **SAVING).train()

    run = build(tmp_path, max_steps=2, **SAVING, callbacks=[Second()])
    run.train()
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        build(tmp_path / "other", **SAVING).train(resume_from_checkpoint=True)
    run.train()


def test_a_folder_that_cannot_be_written_to_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    run = build(tmp_path, **SAVING)
    run.args.output_dir = str(tmp_path / "file" / "out")
    with pytest.raises(CheckpointError, match="folder cannot be written to"):
        run.train()


def test_leftovers_of_a_killed_job_are_swept(tmp_path):
    left = tmp_path / ".hf_robust-tmp-checkpoint-7"
    (left / "inside").mkdir(parents=True)
    build(tmp_path, max_steps=1, **SAVING).train()
    assert not left.exists()


def test_flags_of_an_earlier_training_are_forgotten():
    stop = StopAtSignal()
    stop.received = stop.agreed = signal.SIGTERM
    with stop.listening():
        assert stop.received == stop.agreed == 0
