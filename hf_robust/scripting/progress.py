# SPDX-License-Identifier: Apache-2.0
"""What a training looks like on the screen."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments


def is_verbose(training_args: TrainingArguments) -> bool:
    """Whether the user wants to see more than results, by `log_level`.

    Args:
        training_args: of the training.
    """
    return training_args.log_level in ("debug", "info", "warning")


def is_silent(training_args: TrainingArguments) -> bool:
    """Whether this process shows no progress.

    Args:
        training_args: of the training.
    """
    return training_args.disable_tqdm or training_args.process_index > 0


def show_progress(trainer: Trainer, title: str = "Training", lines: bool = True) -> None:
    """Replaces the trainer's own display by `Progress`; not where the user wants to see more.

    Args:
        trainer: before its training.
        title: as in `Progress`.
        lines: as in `Progress`.

    Example:
        >>> trainer = RobustTrainer(model, args, train_dataset=train, processing_class=processor)
        >>> show_progress(trainer)
        >>> trainer.train()
    """
    if not is_verbose(trainer.args):
        trainer.pop_callback(ProgressCallback)
        trainer.pop_callback(PrinterCallback)
        trainer.add_callback(Progress(title, lines))


class Progress(ProgressCallback):
    """One bar for what is running, and one line for every evaluation in training, with what is measured in percent.

    Args:
        title: of the bar of the training.
        lines: whether evaluations in training are shown.

    Example:
        >>> trainer = Trainer(model, args, train_dataset=train, callbacks=[Progress()])
    """

    training_bar: Any
    prediction_bar: Any

    def __init__(self, title: str = "Training", lines: bool = True) -> None:
        super().__init__()
        self.title, self.lines = title, lines
        self.loss = ""
        self.accuracies: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Opens the bar."""
        self.loss, self.accuracies = "", {}
        self.training_bar = self._bar(args, state.max_steps, self.title, "step", state)
        self.training_bar.update(state.global_step)  # of a checkpoint to resume from

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Shows the evaluation before it."""
        self._show_evaluation(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Moves the bar."""
        self.training_bar.set_postfix_str(self._text(state), refresh=False)
        self.training_bar.update(state.global_step - self.training_bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Takes the loss."""
        if "loss" in logs and self.training_bar is not None:
            self.loss = f", loss {logs['loss']:.3f}"
            self.training_bar.set_postfix_str(self._text(state))

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        """Moves the bar of an evaluation; in training there is one bar for both."""
        if self.training_bar is not None:
            self.training_bar.set_postfix_str(f"{self._text(state)}, evaluating")
            return
        if self.prediction_bar is None:
            self.prediction_bar = self._bar(args, len(eval_dataloader), "Evaluating", "batch", state)
        self.prediction_bar.update()

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, model: Any = None, **kwargs: Any
    ) -> None:
        """Closes the bar, takes what the task is measured by."""
        super().on_evaluate(args, state, control, **kwargs)
        if self.training_bar is not None:
            first = f"_{model.metrics[0]}"
            others = tuple(f"_{name}" for name in model.metrics[1:])  # of which one may end as the first does
            found = {k: v for k, v in (metrics or {}).items() if k.endswith(first) and not k.endswith(others)}
            names = {key: key.removeprefix("eval_").removesuffix(first) for key in found}
            self.accuracies |= {names[key]: value for key, value in found.items()}

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Closes the bar."""
        self._show_evaluation(state)
        self.training_bar.close()
        self.training_bar = None

    def _bar(self, args: Any, total: int, title: str, unit: str, state: Any) -> tqdm:
        silent = args.disable_tqdm or not state.is_world_process_zero
        return tqdm(total=total, desc=title, unit=unit, leave=False, dynamic_ncols=True, disable=silent)

    def _text(self, state: Any) -> str:
        return f"epoch {state.epoch or 0:.1f}/{state.num_train_epochs}{self.loss}"

    def _show_evaluation(self, state: Any) -> None:
        if self.accuracies and self.lines and state.is_world_process_zero:
            shown = ", ".join(f"{name} {100 * value:.1f} %" for name, value in self.accuracies.items())
            tqdm.write(f"{self._text(state)}, {shown}")
            self.loss = ""  # until there is a new one
        self.accuracies = {}
