# SPDX-License-Identifier: Apache-2.0
"""What `--help` shows, and how."""

from __future__ import annotations

import argparse
from typing import Any

# Options of `RobustTrainingArguments` that are shown without being asked for
TRAINING_GROUPS = {
    "what is learned": (
        "task templates head head_first_epochs head_first_learning_rate class_weights label_smoothing_factor "
        "losses cache_reference_embeddings image_size on_bad_image"
    ).split(),
    "training": (
        "output_dir learning_rate num_train_epochs max_steps per_device_train_batch_size per_device_eval_batch_size "
        "gradient_accumulation_steps warmup_steps lr_scheduler_type weight_decay seed bf16 dataloader_num_workers "
        "selection_batch_size use_cpu disable_tqdm log_level"
    ).split(),
    "checkpoints": (
        "eval_strategy save_strategy save_total_limit load_best_model_at_end metric_for_best_model "
        "resume_from_checkpoint allow_changed push_to_hub hub_model_id"
    ).split(),
}
WIDTH = 110
WORDS = {int: "N", float: "X", str: "TEXT"}  # of other types: the setting's name


class HelpFormatter(argparse.HelpFormatter):
    """Shows each flag in one spelling, and defaults that say something."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=36, width=WIDTH)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        is_switch = action.nargs == 0 or (action.nargs == "?" and action.const is True)
        value = "" if is_switch else " " + self._format_args(action, self._word(action))
        return action.option_strings[0] + value

    def _word(self, action: Any) -> str:
        return WORDS.get(action.type, action.dest.upper())

    def _get_help_string(self, action: argparse.Action) -> str:
        says_nothing = action.default in (None, False, True, "", argparse.SUPPRESS) or action.default == []
        return f"{action.help or ''}{'' if says_nothing else ' (default: %(default)s)'}"


class HelpAll(argparse.Action):
    """Shows the help with all that it leaves out."""

    def __init__(self, option_strings: Any, dest: str, **options: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=argparse.SUPPRESS, **options)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Prints it, and ends the program."""
        for action, text in parser.seldom:
            action.help = text
        parser.print_help()
        parser.exit()
