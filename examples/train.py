# SPDX-License-Identifier: Apache-2.0
# /// script
# requires-python = ">=3.10"
# dependencies = ["hf_robust"]
# ///
"""What `hf-robust train` does, to copy: fine-tune a dual encoder, and compare it with its zero-shot self.

accelerate launch examples/train.py --config examples/configs/demo.yaml
accelerate launch examples/train.py --config examples/configs/demo.yaml --method lora --learning_rate 1e-4
"""

from __future__ import annotations

from hf_robust.commands.adapters import MethodArguments
from hf_robust.commands.decide import decide
from hf_robust.commands.train import TrainArguments, TrainingSettings, load_data, prepare, show, train_and_save
from hf_robust.scripting.run import run


def main(args: TrainArguments, method: MethodArguments, training_args: TrainingSettings) -> None:
    """Loads, trains, and shows what came of it."""
    args, training_args = decide(args, method, training_args)
    train, sets = load_data(args, training_args)
    trainer, sets = prepare(args, method, training_args, train, sets)  # an adapter, and a `RobustTrainer`
    results = train_and_save(trainer, sets, checkpoint=None, wise_ft=bool(args.wise_ft))
    if trainer.is_world_process_zero():
        show({**results, "method": method.method, "metric": trainer.model.metrics[0]}, sets)


if __name__ == "__main__":
    run(main, TrainArguments, MethodArguments, TrainingSettings)
