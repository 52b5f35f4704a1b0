# SPDX-License-Identifier: Apache-2.0
"""Trainings that meet a fault at one of the calls by which a checkpoint is saved; run as a program, it forks them.

It reads orders from stdin, one JSON object a line, and answers each with the exit status of the training.
"""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from hf_robust.errors import CheckpointError, RankMismatchError
from hf_robust.training.trainer import RobustTrainer
from tests.tiny_models import image_dataset, tiny_model
from tests.trainers import METHODS, NAMES, build, weights

# what opens or changes files, by the system, Python, torch and safetensors
OF_THE_SYSTEM = {"open", "write", "fsync", "rename", "replace", "rmdir", "unlink", "mkdir", "chmod"}
OF_LIBRARIES = {"write_record", "write_end_of_file", "serialize_file"}
KILLED = "SIGKILL"
REFUSED = 3  # exit status after an error of ours
NEVER = 10**9
STEPS, FAULTY = 3, 2  # steps in all; in whose checkpoint the fault is
OGEN = {"new_class_names": ["cat", "dog", "owl"], "neighbours": 2}
RUNS = {
    "saft": {"method": "saft"},
    "aclip": {"method": "aclip"},
    "full": {"method": "full", "head": "trainable", "save_total_limit": 1},
    "similar": {"method": "full", "losses": {"similarity": {"weight": 2.0}}, "cache_reference_embeddings": True},
    "ogen": {"method": "lora", "templates": "b c d e {}.", "losses": {"ogen": OGEN}},
}


def touches_a_file(function):
    name, owner = function.__name__, getattr(function, "__self__", None)
    if name in OF_LIBRARIES or function is io.open:
        return True
    if name == "write":
        return isinstance(owner, io.TextIOWrapper | io.BufferedWriter)
    return name in OF_THE_SYSTEM and function.__module__ == "posix"


class Faulty(RobustTrainer):
    """Meets a fault at the `when`th call of the second checkpoint that could change a file."""

    fault: str | None = None
    when: int

    def _save_checkpoint(self, model, trial):
        if self.fault is None or self.state.global_step != FAULTY:
            return super()._save_checkpoint(model, trial)
        seen = 0

        def count(frame, event, argument):
            nonlocal seen
            if event == "c_call" and touches_a_file(argument):
                seen += 1
                if seen == self.when:
                    self._fail()

        sys.setprofile(count)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            sys.setprofile(None)
        if seen < self.when and self.is_world_process_zero():
            Path(self.args.output_dir, "calls").write_text(str(seen))

    def _fail(self):
        if self.fault == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(getattr(errno, self.fault), os.strerror(getattr(errno, self.fault)))


def text_lora(model):
    return get_peft_model(model, LoraConfig(target_modules=r".*text_model.*(q_proj|v_proj)"))


def trainer(name, folder):
    """A training of three steps that saves after each."""
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS, "ddp_timeout": 5, **RUNS[name]}
    settings |= {"per_device_train_batch_size": 4 // int(os.environ.get("WORLD_SIZE", 1))}
    method = settings.pop("method")
    torch.manual_seed(0)
    model = text_lora(tiny_model("clip")) if name == "ogen" else METHODS[method](tiny_model("clip"))
    small = {"train_dataset": image_dataset(12, NAMES), "eval_dataset": image_dataset(3, NAMES, seed=50)}
    return build(folder, model=model, cls=Faulty, **small, **settings)


def state(folder):
    """What a checkpoint resumes from."""
    rank = os.environ.get("RANK", "0") if int(os.environ.get("WORLD_SIZE", 1)) > 1 else None
    generators = "rng_state.pth" if rank is None else f"rng_state_{rank}.pth"
    files = ("optimizer.pt", "scheduler.pt", generators)
    return {name: torch.load(folder / name, weights_only=False) for name in files}


def train(order):
    """Trains as an order says: with a fault, resumed from the last whole checkpoint, or neither."""
    folder = Path(order["folder"])
    run = trainer(order["name"], folder)
    if order["fault"]:
        run.fault, run.when = order["fault"], order["when"] if run.args.process_index == order["rank"] else NEVER
    run.train(resume_from_checkpoint=order["resume"] or None)
    result = {"weights": weights(run), **state(folder / f"checkpoint-{STEPS}")}
    torch.save(result, folder / f"{order['result']}-{run.args.process_index}.pt")


def main():
    torch.set_num_threads(1)
    trainer("saft", sys.argv[1])  # imports what the children need
    gc.freeze()  # as in conftest.py
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os.environ |= order["environment"]
            sys.stdout = sys.stderr
            status = 1
            try:
                train(order)
                status = 0
            except (CheckpointError, RankMismatchError) as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
                status = REFUSED
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
