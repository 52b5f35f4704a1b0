# SPDX-License-Identifier: Apache-2.0
"""What a task is: a dual encoder with what is learned around it, as `RobustTrainer` trains it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import ProcessorMixin
from transformers.utils import ModelOutput

from ..data.collator import ImageCollator
from ..data.columns import IMAGE_EMBEDS, Target
from ..data.draws import Draws
from ..data.embeds_cache import IMAGE_INPUTS
from ..data.rows import LabelledImages, LabelledStream
from ..encoders.chunks import in_chunks
from ..encoders.dual_encoder import base_model, image_embeds
from ..errors import ConfigError
from .inference import InferenceModule
from .measure import Measure
from .progress import Progress
from .task_loss import TaskLoss, check_plain

CONFIG_FILE, WEIGHTS_FILE = "classifier.json", "classifier.safetensors"  # where a task's own part is saved
PROCESSOR_FOLDER = "processor"  # beside an adapter; that of a whole model lies with it
Rows = LabelledImages | LabelledStream
Batch = Mapping[str, Tensor]
Inputs = Mapping[str, Tensor | None]  # of a forward


@dataclass
class TaskOutput(ModelOutput):
    """What a task returns at least; a subclass adds `image_embeds`, and as its last field `terms`.

    `image_embeds` are `(batch, dim)`, L2-normalised; `terms`, in training, what pulls on Δ beside the loss: 0-dim
    each, with their weights, by name.

    Args:
        loss: 0-dim, a mean over the batch; None where there is nothing to learn from.
    """

    loss: Tensor | None = None


class Task(InferenceModule):
    """A dual encoder with what is learned around it.

    A subclass has a `forward(**batch)` that returns a `TaskOutput`, ended by `self.with_terms(output, batch)`, and
    says below what is particular to it; so a trainer, checkpoints and cards need not know which task it is.

    Args:
        model: a dual encoder, plain or a `PeftModel` around one.
        processor: its processor.

    Example:
        >>> type(Task.from_pretrained("my-adapter"))  # whichever was trained
        <class 'hf_robust.tasks.class_names.ZeroShotClassifier'>
    """

    main_input_name = "pixel_values"  # what `Trainer` hands to metrics as inputs
    name: ClassVar[str]  # in files, configs and on the command line
    purpose: ClassVar[str]  # what a model is trained for, as a card says it: "to …"
    pipeline_tag: ClassVar[str] = "zero-shot-image-classification"  # of the Hub
    target: ClassVar[Target]  # what rows have beside their image, see `labelled_images`
    label_names: ClassVar[tuple[str, ...]] = ("labels",)  # what of a batch says what is right
    kept_outputs: ClassVar[tuple[str, ...]] = ("logits",)  # what predictions are made of
    loss_name: ClassVar[str]  # what its loss is logged as, `loss_<name>`
    metrics: ClassVar[tuple[str, ...]] = ("loss",)  # what an evaluation gives, the one to choose by first
    output_type: ClassVar[type[TaskOutput]] = TaskOutput
    batch_loss: ClassVar[bool] = True  # whether an evaluation has a loss of every batch, not of the set alone
    trains_encoder: ClassVar[bool] = False  # whether nothing would come of training its own tensors alone
    whole_batch: ClassVar[bool] = False  # whether the loss is over a batch, so that micro-batches do not add up to it

    def __init__(self, model: nn.Module, processor: ProcessorMixin) -> None:
        super().__init__(model, processor)
        self.terms: Any = nn.ModuleDict()  # what is added to the loss, see `hf_robust.losses.Term`, by name
        self.reference: Any = None  # θ₀ for the terms, see `hf_robust.losses.add_terms`
        self.progress = Progress()
        self.rows_at_once: int | None = None  # in training, where `whole_batch` makes one of several micro-batches

    # --- what is particular to a task ---

    @classmethod
    @abstractmethod
    def build(
        cls, model: nn.Module, processor: ProcessorMixin, rows: Rows | None, class_names: Any, args: Any
    ) -> Task:
        """Builds the task around a dual encoder for a training.

        Args:
            model: the dual encoder.
            processor: its processor.
            rows: the training set; None where there is none.
            class_names: what the user gave the trainer.
            args: the `RobustTrainingArguments`.
        """

    @abstractmethod
    def collator(self, images: ImageCollator) -> Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]:
        """Returns what makes batches of rows.

        Args:
            images: makes a batch of images of them.
        """

    def check_rows(self, rows: Rows, targets: bool = True) -> None:
        """Refuses a set that cannot be trained or evaluated on.

        Args:
            rows: the set.
            targets: whether rows must say what is right.

        Raises:
            DataError: it is none.
        """

    def check_evaluation(self, rows: Rows) -> None:
        """Refuses a set that cannot be evaluated on, beside what `check_rows` refuses.

        Args:
            rows: the set.

        Raises:
            DataError: there is nothing to measure.
        """

    def check_training(self, rows: Rows) -> None:
        """Refuses a training set from which nothing would be learned.

        Args:
            rows: the training set.

        Raises:
            DataError: it is none.
        """

    def prepare(self, batches: Callable[[], Iterator[Batch]], accelerator: Accelerator) -> None:
        """Takes from the training set what the task starts from; called before a training that is not resumed.

        Args:
            batches: yields this rank's share of the training set, without augmentation.
            accelerator: the trainer's, to bring together what ranks have found.
        """

    def sampler(self, rows: Rows, batch_size: int, draws: Draws) -> Sampler | None:
        """Returns the order of the training set, the same on every rank; None for that of `Trainer`.

        Args:
            rows: the training set.
            batch_size: images in a batch, of one rank.
            draws: of the run; they know the epoch, on every rank of a resumed run, too.
        """
        return None

    def after_step(self) -> None:
        """Called after every optimizer step, before anything is saved or evaluated."""

    def without_decay(self) -> list[str]:
        """Returns the names of parameters that get no weight decay, beside biases and those of norms."""
        return []

    def beside(self) -> list[str]:
        """Returns the names of parameters that are no part of θ, and that WiSE-FT leaves as they are."""
        return [name for name, _ in self.named_parameters() if name.startswith("terms.")]

    @contextmanager
    def answering(self, rows: Rows) -> Iterator[None]:
        """Inside the context the task answers for the rows of a set to evaluate.

        Args:
            rows: the set.
        """
        yield

    def take_names(self, rows: Rows) -> None:
        """Lets a task that was built without data know what the training set calls its classes.

        Args:
            rows: the training set.
        """

    @contextmanager
    def as_in_training(self) -> Iterator[None]:
        """Inside the context eval mode draws as train mode does, in each process by itself: for SAFT's selection."""
        yield

    def knows(self, rows: Rows) -> bool:
        """Whether a set is of what was learned; else it is another task, on which forgetting shows.

        Args:
            rows: the set.
        """
        return True

    def training_loss(self, rows: Rows | None, args: Any, function: Callable[..., Tensor] | None) -> TaskLoss:
        """Returns the loss that training minimises.

        Args:
            rows: the training set; None where there is none.
            args: the `RobustTrainingArguments`.
            function: the user's `compute_loss_func`.

        Raises:
            ConfigError: the arguments have settings of another task's loss.
        """
        check_plain(args.class_weights, args.label_smoothing_factor, self.name)
        images = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if self.whole_batch and images < 2:
            what = "an image by itself has nothing to be told apart from, so its gradient is zero"
            where, allowed = "per_device_train_batch_size", "2 images or more in an optimizer step"
            raise ConfigError(what, where=where, got=images, allowed=allowed)
        return TaskLoss(function=function)

    @abstractmethod
    def measure(self, rows: Rows, whole: bool) -> Measure:
        """Returns what an evaluation of a set computes.

        Args:
            rows: the set.
            whole: whether the predictions themselves are wanted, so that `of_batch` must keep them.
        """

    def settings(self) -> dict[str, Any]:
        """Returns what has to be written beside the encoder to build the task again, of what JSON can hold."""
        return {}

    def tokens(self) -> dict[str, Tensor]:
        """Returns its tokenised prompts, by name: what a resumed run must share."""
        buffers = {n: b for n, b in self.named_buffers() if not n.startswith(("model.", "terms."))}
        return {name: buffer for name, buffer in buffers.items() if not buffer.is_floating_point()}

    def take_settings(self, saved: Mapping[str, Any]) -> None:
        """Takes over those settings of a saved task that have been chosen since it was built.

        Args:
            saved: what `settings` returned.
        """

    def check_settings(self, saved: Mapping[str, Any], where: str) -> None:
        """Refuses a checkpoint of another task.

        Args:
            saved: what `settings` returned.
            where: the folder.

        Raises:
            AdapterFileError: it is of other classes, say.
        """

    # --- what is the same for all ---

    def own_tensors(self) -> dict[str, Tensor]:
        """Returns the tensors that are neither the encoder's nor those of terms, by name: a head's."""
        return {n: t for n, t in self.state_dict().items() if not n.startswith(("model.", "terms."))}

    def embed(self, inputs: Inputs, size: int | None = None) -> Tensor:
        """Returns the embeddings of a batch's images, `(batch, dim)`, L2-normalised, or those that it brings.

        Args:
            inputs: the batch; None for what it does not have.
            size: images that are embedded at once, see `in_chunks`.

        Raises:
            ConfigError: there are neither images nor embeddings, or both.
        """
        pixels, embeds = inputs.get("pixel_values"), inputs.get(IMAGE_EMBEDS)
        if (pixels is None) == (embeds is None):
            raise ConfigError("the task takes images or their embeddings", allowed="one of the two")
        if embeds is not None:
            return embeds
        return in_chunks(partial(image_embeds, self.model), [inputs.get(name) for name in IMAGE_INPUTS], size)

    def with_terms(self, output: Any, inputs: Inputs) -> Any:
        """Adds to an output the terms of the loss, with their weights.

        Args:
            output: the `TaskOutput`.
            inputs: the batch; None for what it does not have.

        Raises:
            ConfigError: two of them would be logged under one name.
        """
        if not self.training or not self.terms or output.loss is None:
            return output
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        reference = self.reference.of_batch(self, output, given)
        found: dict[str, Tensor] = {}
        owners = {self.loss_name: "the task's own loss"}
        for name, term in self.terms.items():
            for logged, part in term.weighted(name, output, reference, self.progress).items():
                if logged in owners:
                    what, remedy = "two losses have one name to log them by", "Give one of them another `name`."
                    where = f"{owners[logged]}, and the loss {name!r}"
                    raise ConfigError(what, where=where, got=logged, remedy=remedy)
                owners[logged], found[logged] = f"the loss {name!r}", part
        output.terms = found
        return output

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None) -> None:
        """Recomputes activations in the backward; called by the `Trainer` of older transformers.

        Args:
            gradient_checkpointing_kwargs: passed on to `torch.utils.checkpoint.checkpoint`.
        """
        base_model(self.model).gradient_checkpointing_enable(gradient_checkpointing_kwargs)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict | None = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Recomputes activations in the backward; called by `Trainer`.

        Args:
            activation_checkpointing_kwargs: passed on to `torch.utils.checkpoint.checkpoint`.
            every_n_layers: of how many layers one is recomputed.
            offload: whether what is kept for the recomputation waits in host memory.
        """
        base_model(self.model).activation_checkpointing_enable(
            activation_checkpointing_kwargs, every_n_layers, offload
        )


def chunk_size(task: Task, given: int | None) -> int | None:
    """Returns how many rows a task with `whole_batch` embeds at once; None for all of them.

    Args:
        task: it is the smaller of `rows_at_once` and `given` in training, else all.
        given: what the user has set.

    Example:
        >>> task.train().rows_at_once = 8  # micro-batches of 8
        >>> chunk_size(task, 32)
        8
    """
    known = [size for size in (given, task.rows_at_once) if size is not None]
    return min(known, default=None) if task.training else None
