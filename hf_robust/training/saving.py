# SPDX-License-Identifier: Apache-2.0
"""What a trainer of a task saves, resumes from, and pushes to the Hub."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Sequence, Sized
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy

from ..cards.card import model_card
from ..cards.push import push, write_card
from ..cards.results import PICTURE, CardResults, draw_curve
from ..data.publish import TEMPORARY
from ..data.rows import LabelledStream
from ..errors import CheckpointError, HfRobustError, NonFiniteError
from ..losses.state import load_terms, save_terms
from ..tasks.files import load_head, save_head
from ..tasks.task import CONFIG_FILE
from .arguments import RobustTrainingArguments
from .checkpoint import (
    check_not_base,
    checkpoint_to_resume,
    load_encoder,
    processor_folder,
    remove_others,
    save_encoder,
)
from .manifest import checkpoints_in, read_manifest
from .publishing import not_saved, publish_checkpoint, rotate, sweep
from .ranks import check_agreement, entries_digest, naming_the_missing, on_first_rank, raise_on_all
from .same_run import bit_digest, check_same_run, describe_run, versions
from .sharding import ShardingTrainer
from .stopping import StopAtSignal, locked

# Arguments without a say in the result that say when ranks meet
TOGETHER = ("save_steps", "eval_strategy", "eval_steps", "eval_on_start", "logging_strategy", "logging_steps")
TRAINING_ARGS = "training_args.json"


class SavingTrainer(ShardingTrainer):
    """`Trainer` with the checkpoints, cards and pushes of a task; the base of `RobustTrainer`.

    A checkpoint is the adapter's folder (without adapter, the whole model's) with the class names, the task's own
    tensors and a card beside it, and what is needed to go on training. The processor lies beside a whole model,
    and in the subfolder `processor` of an adapter's folder, see `processor_folder`.
    """

    model: Any  # a Task; mypy would take every attribute of a module for a tensor
    args: RobustTrainingArguments
    processing_class: Any
    train_dataset: Any
    card: ModelCard | None = None
    stop: StopAtSignal
    epoch = 0  # passes over the training set that have begun, less one
    run: dict[str, Any] | None = None  # what `describe_run` says of the training
    has_trained = False  # or has the weights of a checkpoint

    def card_results(self) -> CardResults | None:
        """Returns the results that a card shows if none is given; None for a card without."""
        return None

    def card_left_out(self) -> list[str]:
        """Returns what had no part in training and evaluations, in words, for a card."""
        return []

    def create_model_card(self, card: ModelCard | None = None) -> None:  # type: ignore[override]
        """Writes a card into the output folder, and beside every model that is saved from now on.

        Args:
            card: what `model_card` returned; None for one of this training, with what its evaluations found.
        """
        self.card = self.card if card is None else card
        if self.is_world_process_zero():
            self._write_card(Path(str(self.args.output_dir)))

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | None:
        """Saves the model, and pushes it with its card in one commit; see `push` for what is sent and what not.

        Args:
            commit_message: title of the commit.
            blocking: it always waits, as the commit is whole or not made.
            token: by default `args.hub_token`, then the one of `hf auth login` or `HF_TOKEN`.
            revision: the branch, by default `args.hub_revision`, then `main`.
            private: whether a new repository is private; by default `args.hub_private_repo`.

        Returns:
            The commit; None on other ranks than the first.

        Raises:
            HubError: nothing has been pushed; the message says why and how to resume.
        """
        args, folder = self.args, str(self.args.output_dir)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        return push(
            folder,
            args.hub_model_id or Path(folder).name,
            private=args.hub_private_repo if private is None else private,
            token=token or args.hub_token,
            revision=revision or args.hub_revision,
            commit_message=commit_message or "End of training",
            base_model_id=None if self.card is None else self.card.data.to_dict().get("base_model"),
        )

    def _write_card(self, folder: Path) -> None:
        card, results = self.card, self.card_results()
        if card is None:
            images = len(self.train_dataset) if isinstance(self.train_dataset, Sized) else None
            picture = None if results is None else draw_curve(results, folder)
            how: Any = {"train_images": images, "picture": picture, "left_out": self.card_left_out()}
            card = model_card(self.model, self.args, results, **how)
        write_card(folder, card)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes nothing: the stock method sends the whole folder, and a pickle that holds the token."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        check_not_base(self.model, folder)
        folder.mkdir(parents=True, exist_ok=True)
        is_ours = (folder / CONFIG_FILE).exists()
        save_encoder(self.model, folder, state_dict)
        save_head(self.model, folder)
        if is_ours:
            remove_others(self.model, folder)
            (folder / PICTURE).unlink(missing_ok=True)
        self.processing_class.save_pretrained(processor_folder(self.model, folder))
        (folder / TRAINING_ARGS).write_text(self.args.to_json_string())  # the Trainer's pickle would hold the token
        self._write_card(folder)  # last, as PEFT changes a card that is there

    # --- checkpoints ---

    @contextmanager
    def guarded(self, trial: Any = None) -> Iterator[None]:
        """Inside the context no other job saves into the folder of a training, and a signal to stop saves first.

        Args:
            trial: of a search.

        Raises:
            CheckpointError: another job has the folder, or it cannot be written to.
            RankMismatchError: a rank has stopped.
        """
        with naming_the_missing(self.accelerator, self.args.ddp_timeout), ExitStack() as stack:
            check_agreement({"save_strategy": str(self.args.save_strategy)}, self.accelerator)
            if self.args.save_strategy != SaveStrategy.NO:
                folder = Path(self._get_output_dir(trial))
                on_first_rank(lambda: stack.enter_context(locked(folder)), self.accelerator)
                on_first_rank(lambda: sweep(folder), self.accelerator)
                stack.enter_context(self.stop.listening())
            yield

    def _checkpoint(self, given: Any, trial: Any) -> str:
        output_dir = Path(self._get_output_dir(trial))
        return on_first_rank(lambda: checkpoint_to_resume(given, output_dir), self.accelerator)

    def _describe_run(self, checkpoint: str | None) -> None:
        """Looks whether all ranks train the same, and whether that is what the checkpoint was of."""
        ranks = self.accelerator.num_processes
        if self.args.save_strategy == SaveStrategy.NO and checkpoint is None and ranks == 1:
            return  # no one will ask
        self.run = describe_run(self)
        when = {name: getattr(self.args, name) for name in TOGETHER}
        check_agreement({**self.run, **when}, self.accelerator)
        if checkpoint is None:
            return
        manifest = read_manifest(Path(checkpoint))
        check_same_run(manifest, self.run, self.args.allow_changed, checkpoint)
        if isinstance(self.train_dataset, LabelledStream) and manifest["epoch"] > 0:
            what, remedy = "a stream cannot be resumed after its first pass", "Use a dataset with numbered rows."
            raise CheckpointError(what, where=checkpoint, got=f"pass {manifest['epoch'] + 1}", remedy=remedy)

    def _prepare_for_training(self, *args: Any) -> tuple[nn.Module, Any]:
        check_agreement({"entries": entries_digest(self.model)}, self.accelerator)  # selected, or of a checkpoint
        return super()._prepare_for_training(*args)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint aside; it gets its name, on the first rank, when all ranks have written their part."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        folder = Path(self._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        temporary = folder.with_name(TEMPORARY + folder.name)
        if not self.stop.is_extra:  # the uninterrupted run does not have it
            self._note_best(folder)
        with self.whole_model():
            facts = {"weights": bit_digest(self.model.named_parameters()), "entries": entries_digest(self.model)}
            check_agreement(facts, self.accelerator)
        saves = self.args.should_save
        self._together(temporary, [lambda: temporary.mkdir(parents=True)] if saves else [])
        self._together(temporary, self._parts(temporary))
        self._together(temporary, [lambda: self._publish(temporary, folder)] if saves else [])

    def _note_best(self, folder: Path) -> None:
        if self.state.best_global_step:
            best = folder.with_name(f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
            if best == folder or self._is_of_this_run(best):
                self.state.best_model_checkpoint = str(best)

    def _is_of_this_run(self, folder: Path) -> bool:
        try:
            manifest = read_manifest(folder)
        except CheckpointError:
            return False
        return manifest["run"] == self.run and not manifest["extra"]

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """`save_strategy="best"` would take a signal's checkpoint back, and NaN is better or worse than nothing."""
        metrics: Any = args[0] if args else kwargs["metrics"]
        name = f"eval_{(self.args.metric_for_best_model or '').removeprefix('eval_')}"
        if math.isnan(metrics.get(name, 0.0)):
            remedy = "Choose by another metric, or on a larger set."
            raise NonFiniteError("the metric to choose by is NaN", where=name, remedy=remedy)
        return super()._determine_best_metric(*args, **kwargs) or self.stop.is_due

    def _together(self, temporary: Path, parts: Sequence[Callable[[], object]]) -> None:
        """Does all parts even after an error, as each may ask something of all ranks; then all raise it."""
        problems = []
        for part in parts:
            try:
                part()
            except Exception as error:
                problems.append(not_saved(error, temporary))
        try:
            raise_on_all(problems[0] if problems else None, self.accelerator)
        except HfRobustError:
            if self.args.should_save:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _parts(self, folder: Path) -> list[Callable[[], object]]:
        parts: list[Callable[[str], object]] = [partial(self.save_model, _internal_call=True)]
        if not self.args.save_only_model:
            parts += [self._save_optimizer_and_scheduler, self._save_scaler, self._save_rng_state]
        if self.args.should_save:
            parts += [self._save_state, self._save_terms]
        return [partial(part, str(folder)) for part in parts]

    def _save_terms(self, folder: str) -> None:
        task = self.model if self.whole is None else self.whole  # which was gathered when it was saved
        save_terms(task.terms, Path(folder))

    def _save_state(self, folder: str) -> None:
        all_of_them: list[Any] = [*self.callback_handler.callbacks, self.control]
        stateful: list[Any] = [one for one in all_of_them if isinstance(one, ExportableState)]
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=stateful).stateful_callbacks
        self.state.save_to_json(str(Path(folder, TRAINER_STATE_NAME)))

    def _publish(self, temporary: Path, folder: Path) -> None:
        ranks = self.args.world_size
        missing = [i for i in range(ranks) if ranks > 1 and not (temporary / f"rng_state_{i}.pth").is_file()]
        if missing and not self.args.save_only_model:
            remedy = "Give them a folder that all machines share."
            raise CheckpointError("ranks write elsewhere", where=str(folder), got=f"ranks {missing}", remedy=remedy)
        before = checkpoints_in(folder.parent)
        order = 1 + max((m["order"] for m in before.values() if isinstance(m, dict)), default=0)
        facts: dict[str, Any] = {"step": self.state.global_step, "epoch": self.epoch, "order": order}
        facts |= {"extra": self.stop.is_extra, "run": self.run, "versions": versions()}
        publish_checkpoint(temporary, folder, facts)
        rotate(before, folder, self.args.save_total_limit, self.state.best_model_checkpoint)
        sweep(folder.parent)

    def _init_training_state(self, *args: Any) -> tuple[int, int]:
        done = super()._init_training_state(*args)
        resumed: Any = args[3]
        said = resumed and TrainerState.load_from_json(str(Path(resumed, TRAINER_STATE_NAME))).best_model_checkpoint
        if said:  # which may be a path of another machine
            beside = Path(resumed).resolve().with_name(Path(said).name)
            best = beside if beside.is_dir() else Path(said)
            self.state.best_model_checkpoint = str(best) if best.is_dir() else None
            if self.args.load_best_model_at_end and not best.is_dir():
                remedy = "Put it back, or resume with load_best_model_at_end=False."
                raise CheckpointError("the best checkpoint so far is missing", where=str(beside), remedy=remedy)
        return done

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.has_trained = True
        load_encoder(self.model, Path(resume_from_checkpoint))
        load_head(self.model, Path(resume_from_checkpoint))
        load_terms(self.model.terms, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
