# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re

import pytest
from transformers import PrinterCallback, ProgressCallback

from hf_robust.scripting.progress import Progress, show_progress
from tests.tiny_models import image_dataset
from tests.trainers import NAMES, build


@pytest.fixture
def screen(capsys):
    """What has been written to stdout, and to stderr, since the last call."""
    return lambda: capsys.readouterr()


def last_text(bar_output):
    """The text of a bar, as it was last drawn."""
    drawn = [part for part in re.split(r"[\r\n]", bar_output) if part.startswith("Training")]
    return drawn[-1]


def make(tmp_path, lines=True, **settings):
    trainer = build(tmp_path, **{"disable_tqdm": False, **settings})
    show_progress(trainer, lines=lines)
    return trainer


def test_the_stock_displays_are_replaced(tmp_path):
    for disable in (True, False):
        callbacks = make(tmp_path, disable_tqdm=disable).callback_handler.callbacks
        shown = [one for one in callbacks if isinstance(one, ProgressCallback | PrinterCallback)]
        assert [type(one) for one in shown] == [Progress]


def test_a_user_who_wants_to_see_more_keeps_them(tmp_path):
    trainer = build(tmp_path, log_level="debug", disable_tqdm=True)
    show_progress(trainer)
    assert trainer.pop_callback(PrinterCallback) is not None and trainer.pop_callback(Progress) is None


def test_training_shows_one_bar_and_a_line_for_every_evaluation(tmp_path, screen):
    trainer = make(tmp_path, eval_strategy="epoch", logging_strategy="steps", logging_steps=1)
    trainer.train()
    out, err = screen()
    found = trainer.state.log_history
    lines = []
    for epoch in (1, 2):
        of_epoch = [entry for entry in found if entry.get("epoch") == epoch]
        loss = next(entry["loss"] for entry in of_epoch if "loss" in entry)
        shares = {}
        for name in ("id", "new"):
            shares[name] = next(e[f"eval_{name}_accuracy"] for e in of_epoch if f"eval_{name}_accuracy" in e)
        shown = ", ".join(f"{name} {100 * value:.1f} %" for name, value in shares.items())
        lines.append(f"epoch {epoch}.0/2, loss {loss:.3f}, {shown}")
    assert out.split("\n") == [*lines, ""]
    assert "{" not in err and "Evaluating" not in err and "evaluating" in err
    assert "10/10" in last_text(err) and "epoch 2.0/2, loss" in last_text(err)


def test_evaluations_may_be_left_out(tmp_path, screen):
    make(tmp_path, lines=False, eval_strategy="epoch").train()
    assert screen()[0] == ""


def test_without_bars_the_lines_remain(tmp_path, screen):
    make(tmp_path, eval_strategy="epoch", disable_tqdm=True).train()
    out, err = screen()
    assert out.count("\n") == 2 and err == ""


def test_an_evaluation_and_a_sweep_show_their_bars_alone(tmp_path, screen):
    trainer = make(tmp_path)
    trainer.train()
    screen()
    trainer.evaluate()
    out, err = screen()
    assert out == "" and "Evaluating" in err and "{" not in err
    trainer.wise_ft_sweep(image_dataset(7, NAMES, seed=60), alphas=[0, 1])
    out, err = screen()
    assert out == "" and "Evaluating over alpha" in err and "Evaluating:" not in err and "{" not in err
    trainer.evaluate()
    assert "Evaluating:" in screen()[1]  # the display is back


def test_other_ranks_write_nothing(tmp_path, screen):
    trainer = make(tmp_path, eval_strategy="epoch")
    trainer.is_world_process_zero = trainer.is_local_process_zero = lambda: False
    trainer.state.is_world_process_zero = False
    progress = next(one for one in trainer.callback_handler.callbacks if isinstance(one, Progress))
    trainer.state.max_steps, trainer.state.epoch, trainer.state.num_train_epochs = 3, 1.0, 2
    progress.on_train_begin(trainer.args, trainer.state, None)
    progress.on_log(trainer.args, trainer.state, None, logs={"loss": 1.0})
    progress.on_evaluate(trainer.args, trainer.state, None, metrics={"eval_id_accuracy": 0.5}, model=trainer.model)
    progress.on_train_end(trainer.args, trainer.state, None)
    assert screen() == ("", "")
