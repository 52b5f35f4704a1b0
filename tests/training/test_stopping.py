# SPDX-License-Identifier: Apache-2.0
"""Trainings that are told to stop, and folders that are in use."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading

import psutil
import pytest
from transformers import TrainerCallback

from hf_robust.errors import CheckpointError
from hf_robust.training.stopping import HOLDER, LOCK, StopAtSignal, locked
from tests.programs import ABORT_LIMIT, run_programs
from tests.trainers import build, same, weights

SAVING = {"save_strategy": "steps", "save_steps": 100, "lr_scheduler_type": "cosine"}


@pytest.fixture(autouse=True)
def in_the_foreground():
    """Ctrl-C is ignored by what a shell starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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

    def on_train_end(self, args, state, control, **kwargs):
        self.send("end", state)

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


def test_the_schedule_by_evaluations_is_resumed_at_the_end_of_an_epoch(tmp_path):
    """A checkpoint of an epoch's last step would be saved before the evaluation that the schedule waits for."""
    settings = {**SAVING, "save_steps": 5, "eval_strategy": "epoch", "metric_for_best_model": "eval_id_accuracy"}
    settings |= {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.1}}
    settings |= {"num_train_epochs": 3, "greater_is_better": False, "eval_on_start": True}
    whole = build(tmp_path, **settings)
    whole.train()
    resumed = build(tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same(weights(resumed), weights(whole))
    assert len(resumed.state.log_history) == len(whole.state.log_history)


def test_the_best_alone_is_saved_but_for_a_signal(tmp_path):
    settings = {**SAVING, "save_strategy": "best", "eval_strategy": "steps", "eval_steps": 1}
    settings |= {"metric_for_best_model": "eval_id_loss", "greater_is_better": True}  # it falls
    assert stopped(build(tmp_path, **settings, callbacks=[Signals("step", 3, signal.SIGTERM)])) == 143
    assert (tmp_path / "checkpoint-4").exists()


def test_a_signal_after_the_last_step_is_handed_on(tmp_path):
    run = build(tmp_path, **SAVING, max_steps=2, callbacks=[Signals("end", 2, signal.SIGINT)])
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert run.state.global_step == 2


def test_workers_leave_signals_to_the_trainer(tmp_path):
    """A scheduler sends them to all processes of a job."""
    others = psutil.Process().children()  # of other tests: the server that their ranks are forked from

    class ToAll(Signals):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == self.step:
                workers = set(psutil.Process().children()) - {*others}
                for child in workers:
                    for number in self.numbers:
                        child.send_signal(number)
                ended, alive = psutil.wait_procs(workers, timeout=0.5)
                assert alive and not ended
            super().on_step_begin(args, state, control, **kwargs)

    numbers = signal.SIGTERM, signal.SIGUSR1
    run = build(tmp_path, **SAVING, dataloader_num_workers=1, callbacks=[ToAll("step", 2, *numbers)])
    assert stopped(run) in (128 + number for number in numbers)
    assert (tmp_path / "checkpoint-3").exists()


@pytest.mark.parametrize("event", ["evaluation", "save"])
def test_a_signal_between_steps_stops_after_the_next(tmp_path, event):
    settings = {**SAVING, "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    run = build(tmp_path, "saft", **settings, callbacks=[Signals(event, 2, signal.SIGTERM, signal.SIGTERM)])
    assert stopped(run) == 143
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_workers_that_are_left_end_when_python_tells_them_to(tmp_path):
    """It does so when it exits, by SIGTERM, and waits for them: the program would never end."""

    class Fails(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            raise ZeroDivisionError

    others = multiprocessing.active_children()
    run = build(tmp_path, **SAVING, dataloader_num_workers=1, callbacks=[Fails()])
    with pytest.raises(ZeroDivisionError) as caught:  # its traceback holds the iterator, as that of a program's end
        run.train()
    (worker,) = (process for process in multiprocessing.active_children() if process not in others)
    try:
        for number in (signal.SIGINT, signal.SIGUSR1):  # of others, as before
            os.kill(worker.pid, number)
        worker.join(0.5)
        assert worker.is_alive() and caught
        worker.terminate()
        worker.join(ABORT_LIMIT)
        assert worker.exitcode == 0
    finally:
        worker.kill()  # else a failure of this test would wait for it, too


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
