# SPDX-License-Identifier: Apache-2.0
"""What a trainer of a `ZeroShotClassifier` saves, resumes from, and pushes to the Hub."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCard
from torch import Tensor, nn
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..cards.card import model_card
from ..cards.push import push, write_card
from ..cards.results import CardResults, draw_curve
from ..ogen.training import OGENTraining
from .arguments import RobustTrainingArguments
from .checkpoint import load_encoder, load_head, processor_folder, save_encoder, save_head
from .sharding import ShardingTrainer

TRAINING_ARGS = "training_args.json"


class SavingTrainer(ShardingTrainer):
    """`Trainer` with the checkpoints, cards and pushes of a `ZeroShotClassifier`; the base of `RobustTrainer`.

    A checkpoint is the adapter's folder (without adapter, the whole model's) with the class names, the classifier's
    own weights and a card beside it, and what is needed to go on training. The processor lies beside a whole model,
    and in the subfolder `processor` of an adapter's folder, see `processor_folder`.
    """

    model: Any  # a ZeroShotClassifier; mypy would take every attribute of a module for a tensor
    args: RobustTrainingArguments
    processing_class: Any
    train_dataset: Any
    ogen: OGENTraining | None = None
    card: ModelCard | None = None

    def card_results(self) -> CardResults | None:
        """Returns the results that a card shows if none is given; None for a card without."""
        return None

    def create_model_card(self, card: ModelCard | None = None) -> None:  # type: ignore[override]
        """Writes a card into the output folder, and beside every model that is saved from now on.

        Args:
            card: what `model_card` returned; None for one of this training, with the results of `wise_ft_sweep` where
                that has been called.
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
            card = model_card(self.model, self.args, results, train_images=images, picture=picture)
        write_card(folder, card)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Pushes nothing: the stock method sends the whole folder, and a pickle that holds the token."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_encoder(self.model, folder, state_dict)
        save_head(self.model, folder)
        self.processing_class.save_pretrained(processor_folder(self.model, folder))
        (folder / TRAINING_ARGS).write_text(self.args.to_json_string())  # the Trainer's pickle would hold the token
        self._write_card(folder)  # last, as PEFT changes a card that is there

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.ogen is not None and self.args.should_save:
            folder = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            self.ogen.save(Path(self._get_output_dir(trial=trial)) / folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_encoder(self.model, Path(resume_from_checkpoint))
        load_head(self.model, Path(resume_from_checkpoint))
        if self.ogen is not None:
            self.ogen.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))
