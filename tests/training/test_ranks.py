# SPDX-License-Identifier: Apache-2.0
"""Ranks that differ, fail, stop or are told to stop do so together, and say which."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from hf_robust.errors import RankMismatchError
from hf_robust.training import ranks
from hf_robust.training.ranks import check_agreement
from tests.programs import run_on_ranks
from tests.trainers import same

TOGETHER = """
import json
import os
import signal
import time
from pathlib import Path

import torch
from transformers import TrainerCallback
from hf_robust import SAFTConfig
from hf_robust.errors import DataError, RankMismatchError
from hf_robust.training import starting as module
from peft import get_peft_model
from tests.tiny_models import image_dataset, tiny_model
from tests.trainers import NAMES, build, weights

RANK = int(os.environ["RANK"])
IS_ODD = RANK == int(os.environ["WORLD_SIZE"]) - 1
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


def another_base():
    model = tiny_model("clip")
    with torch.no_grad():
        model.visual_projection.weight[0, 0] += IS_ODD
    return get_peft_model(model, SAFTConfig(density=0.01))


class Changes(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if IS_ODD and state.global_step == 1:
            with torch.no_grad():
                next(p for p in model.parameters() if p.requires_grad).add_(1.0)


class Signals(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if IS_ODD and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def select_another(model, batches, loss):
    real_select(model, batches, loss)
    if IS_ODD:
        for name, buffer in model.named_buffers():
            if "saft_indices" in name and len(buffer):
                buffer[0] += -1 if buffer[0] else 1
                return


class Fails(torch.utils.data.Dataset):
    classes = NAMES
    targets = [number % 3 for number in range(18)]

    def __len__(self):
        return 18

    def __getitem__(self, index):
        if IS_ODD:
            raise OSError("no such picture")
        return image_dataset(18, NAMES)[index]["image"], self.targets[index]


real_select = module.select_saft


def main(folder):
    found = {}

    def error_of(name, run, **kwargs):
        start = time.monotonic()
        try:
            run().train(**kwargs)
        except (DataError, RankMismatchError) as error:
            found[name] = type(error).__name__, str(error), time.monotonic() - start

    def saft(**settings):
        return lambda: build(f"{folder}/errors", "saft", **{**SAVING, **settings})

    error_of("settings", saft(learning_rate=0.02 if IS_ODD else 0.01))
    error_of("names", saft(class_names=["a", "b", "c" if IS_ODD else "d"]))
    error_of("data", saft(train_dataset=image_dataset(18, NAMES, seed=int(IS_ODD))))
    error_of("base", lambda: build(f"{folder}/errors", model=another_base(), **SAVING))
    error_of("weights", saft(callbacks=[Changes()]))
    module.select_saft = select_another
    error_of("entries", saft(save_strategy="no"))
    module.select_saft = real_select

    error_of("picture", lambda: build(f"{folder}/errors", "lora", save_strategy="no", train_dataset=Fails()))

    whole = build(f"{folder}/whole", "saft", **SAVING)
    whole.train()
    run = build(f"{folder}/run", "saft", **{**SAVING, "save_steps": 10}, callbacks=[Signals()])
    try:
        run.train()
    except SystemExit as exit:
        found["status"] = exit.code
    found["saved"] = sorted(path.name for path in Path(folder, "run").glob("checkpoint-*"))
    resumed = build(f"{folder}/run", "saft", **SAVING)
    resumed.train(resume_from_checkpoint=True)
    Path(folder, f"rank{RANK}.json").write_text(json.dumps(found))
    torch.save([weights(whole), weights(resumed)], f"{folder}/rank{RANK}.pt")
"""


def test_ranks_that_differ_or_are_told_to_stop_do_so_together(tmp_path):
    run_on_ranks(2, TOGETHER, tmp_path)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    facts = {
        "settings": "learning_rate is elsewhere 0.01, here 0.02",
        "names": "class_names is elsewhere ['a', 'b', 'd'], here ['a', 'b', 'c']",
        "data": "data.",
        "base": "pretrained_weights",
        "weights": "weights",
        "entries": "entries",
    }
    for name, fact in facts.items():
        kind, text, seconds = first[name]
        assert kind == "RankMismatchError" and f"rank 1 differs from rank 0: {fact}" in text
        assert second[name][:2] == [kind, text] and seconds < 60
    assert first["picture"][:2] == second["picture"][:2] and "no such picture" in first["picture"][1]
    assert first["status"] == second["status"] == 143 and first["saved"] == ["checkpoint-3"]
    for rank in (0, 1):
        whole, resumed = torch.load(tmp_path / f"rank{rank}.pt")
        assert same(whole, resumed)


@pytest.mark.parametrize(("seeds", "text"), [((42, 42, 43), "rank 2 differs"), ((42, 43, 42), "rank 1 differs")])
def test_the_odd_one_of_three_is_named(monkeypatch, seeds, text):
    monkeypatch.setattr(ranks, "gather_object", lambda facts: [{"seed": seed} for seed in seeds])
    with pytest.raises(RankMismatchError, match=f"{text} from the others: seed is elsewhere 42, here 43"):
        check_agreement({"seed": 42}, SimpleNamespace(num_processes=3))


def test_all_that_differ_are_named(monkeypatch):
    monkeypatch.setattr(ranks, "gather_object", lambda facts: [{"seed": seed} for seed in (1, 2, 1, 3, 1)])
    with pytest.raises(RankMismatchError, match=r"rank 1 differs .*ranks \[1, 3\]"):
        check_agreement({"seed": 1}, SimpleNamespace(num_processes=5))


STOPPED = """
import os
import signal
import time
from pathlib import Path

from transformers import TrainerCallback
from hf_robust.errors import RankMismatchError
from tests.trainers import build

RANK = int(os.environ["RANK"])


class Stops(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if RANK == 1 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGSTOP)


def main(folder):
    Path(folder, f"pid{RANK}").write_text(str(os.getpid()))
    start = time.monotonic()
    try:
        build(folder, "lora", callbacks=[Stops()], ddp_timeout=3).train()
    except (RankMismatchError, RuntimeError) as error:
        if RANK == 0:
            Path(folder, "error").write_text(f"{type(error).__name__}: {error}")
            Path(folder, "seconds").write_text(str(time.monotonic() - start))
            os.kill(int(Path(folder, "pid1").read_text()), signal.SIGCONT)
    os._exit(0)
"""


def test_a_rank_that_has_stopped_is_named(tmp_path):
    run_on_ranks(2, STOPPED, tmp_path)
    text = (tmp_path / "error").read_text()
    assert text.startswith("RankMismatchError: rank 1 has stopped") and "ddp_timeout" in text
    assert float((tmp_path / "seconds").read_text()) < 30
