# SPDX-License-Identifier: Apache-2.0
"""The pre-trained model θ₀ while another is trained: what terms of the loss compare with, once a batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..data.collator import REFERENCE_EMBEDS
from ..data.embeds_cache import pretrained_image_embeds
from ..encoders.dual_encoder import base_model, text_embeds, tokenize, tower_modules
from ..encoders.pretrained import pretrained_weights
from ..errors import ConfigError
from ..tasks.class_names import ZeroShotClassifier
from ..tasks.task import Batch, Task
from .layers import HiddenStates, check_layers, showing
from .term import Term, check_known, check_term

NEEDS = ("image_embeds", "class_embeds", "text_embeds", "weights")
OTHER: dict[str, Literal["vision", "text"]] = {"vision": "text", "text": "vision"}
Texts = Sequence[str] | Mapping[str, Tensor]


class Moved(NamedTuple):
    """A trained tensor in which Δ is linear, and where it started.

    Args:
        tuned: as it is now, with gradient.
        start: its value in θ₀, on the same device.
    """

    tuned: Tensor
    start: Tensor


Weights = Callable[[Task], Mapping[str, Moved]]


def pretrained_prompts(task: ZeroShotClassifier) -> Tensor:
    """Embeds the prompts of a classifier with θ₀, in every wording.

    Args:
        task: a classifier whose model is θ₀, or θ₀ with adapters.

    Returns:
        `(classes * wordings, dim)`, L2-normalised, in float32 or better, without gradient.

    Example:
        >>> pretrained_prompts(ZeroShotClassifier(clip, processor, ["cat", "dog"])).shape
        torch.Size([2, 512])
    """
    at_once = task.prompts.wordings == 1  # as in training, which gives the same bits; of more it draws some
    with torch.set_grad_enabled(at_once), pretrained_weights(task.model):
        return task.prompts.embed(task.model).detach()


def pretrained_tower(model: nn.Module, tower: Literal["vision", "text"]) -> nn.Module:
    """Returns what embeds images or texts as θ₀ while `model` is trained: itself, or a copy of that tower.

    Args:
        model: a `PeftModel`, which can always be θ₀ again, or a model that is θ₀ now and may be trained whole.
        tower: `"vision"` or `"text"`.

    Raises:
        ConfigError: weights of the tower are trained beside an adapter.
    """
    base = base_model(model)
    if isinstance(model, PeftModel):
        with pretrained_weights(model):
            trained = _trained(base, tower)
        if trained:
            remedy = "Freeze them (bias='none' in the adapter's config), or train without an adapter."
            raise ConfigError("weights of θ₀ are trained beside the adapter", got=trained[:3], remedy=remedy)
        return model
    if not _trained(base, tower):
        return model
    other = {id(base.get_submodule(name)): nn.Identity() for name in tower_modules(model, OTHER[tower])}
    # deepcopy takes what is in `other` for copied. Flags stay: SigLIP's head is rounded otherwise with frozen weights.
    return copy.deepcopy(model, other).eval()


def _trained(base: nn.Module, tower: Literal["vision", "text"]) -> list[str]:
    parts = [(name, base.get_submodule(name)) for name in tower_modules(base, tower)]
    return [f"{part}.{name}" for part, m in parts for name, p in m.named_parameters() if p.requires_grad]


class Reference:
    """θ₀ while a task is trained, for the terms of its loss; `Reference.of` makes one, and keeps what they need alone.

    It is no module: neither state dict nor optimizer of the task see it, and copies of the task share it.

    Args:
        cached: whether batches bring θ₀'s embeddings of their images.
        vision: what embeds images as θ₀; None if nothing asks for it.
        text: what embeds texts as θ₀, likewise.
        processor: tokenises texts.
        prompts: `(classes * wordings, dim)`, embeddings by θ₀; None if nothing asks for class embeddings.
        weights: returns the trained tensors of a task and where they started, by name.
        tuned: the hidden states of what is trained, of those layers of the vision tower that are compared.

    Example:
        >>> add_terms(task, {"similarity": SimilarityLoss()})
        >>> task.reference.text_embeds(["a photo of a cat."]).shape
        torch.Size([1, 512])
    """

    def __init__(
        self,
        cached: bool,
        vision: nn.Module | None,
        text: nn.Module | None,
        processor: Any,
        prompts: Tensor | None,
        weights: Weights | None,
        tuned: HiddenStates,
    ) -> None:
        self.cached, self.vision, self.text, self.processor = cached, vision, text, processor
        self.prompts, self.weights, self.tuned = prompts, weights, tuned

    @classmethod
    def of(cls, task: Task, terms: Mapping[str, Term], cached: bool, weights: Weights | None = None) -> Reference:
        """Takes from a task that is θ₀ now what its terms will need.

        Args:
            task: the task to train.
            terms: what is added to its loss, attached to it.
            cached: whether batches bring the embeddings of their images.
            weights: returns the trained tensors of a task and where they started, by name.

        Raises:
            ConfigError: a need is unknown or cannot be met for this task, a layer is none of the vision tower, or
                weights of the base are trained beside an adapter.
        """
        needs = {need for name, term in terms.items() for need in _checked_needs(name, term, task)}
        for name, term in terms.items():
            _check_tuple(f"{name}, layers", term.layers)
        layers = list(dict.fromkeys(layer for term in terms.values() for layer in term.layers))
        check_layers(task.model, layers)
        _check_use(needs, layers, cached)
        if "weights" in needs and weights is None:
            raise ConfigError("no one has said where the trained weights started", where="losses", got="weights")
        live = bool(layers) or ("image_embeds" in needs and not cached)
        return cls(
            cached,
            pretrained_tower(task.model, "vision") if live else None,
            pretrained_tower(task.model, "text") if "text_embeds" in needs else None,
            task.processor,
            _prompts(task) if "class_embeds" in needs else None,
            weights if "weights" in needs else None,
            HiddenStates(task.model, layers),
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Reference:
        return self  # sharded training and evaluation in half precision copy the task, which brings no other θ₀

    def asks(self, model: nn.Module) -> bool:
        """Returns whether θ₀ is computed by a model itself, with its adapters off.

        Args:
            model: a dual encoder.
        """
        return model is self.vision or model is self.text

    def of_batch(self, task: Task, output: Any, inputs: Batch) -> BatchReference:
        """Returns θ₀'s answers for a batch.

        Args:
            task: what is trained.
            output: what it returned.
            inputs: the batch.

        Raises:
            ConfigError: a layer whose hidden states are compared has not run, or without gradient, or in chunks.
        """
        tuned = self.tuned.pop()
        sizes = {len(states) for states in tuned.values() if isinstance(states, Tensor)}
        if sizes - {len(output.image_embeds)}:
            what = "hidden states are compared of images that are embedded in chunks"
            remedy = "Leave contrastive_chunk_size out, and set gradient_accumulation_steps=1."
            raise ConfigError(what, where="losses, layers", got=sorted(tuned), remedy=remedy)
        return BatchReference(self, task, output, inputs, tuned)

    @torch.no_grad()
    def text_embeds(self, texts: Texts) -> Tensor:
        """Embeds texts with θ₀.

        Args:
            texts: strings, or tokens: `input_ids` and, where the tower uses one, `attention_mask`, each
                `(texts, tokens)`, on the model's device; other entries are ignored, so that a batch will do.

        Returns:
            `(texts, dim)`, L2-normalised, in float32 or better, without gradient.

        Raises:
            ConfigError: no term asked for them.
            DataError: a text is too long.
        """
        if self.text is None:
            raise _undeclared("text_embeds")
        tokens = texts if isinstance(texts, Mapping) else tokenize(self.processor, list(texts), self.text)
        device = base_model(self.text).device
        parts = [tokens[name].to(device) for name in ("input_ids", "attention_mask") if name in tokens]
        with pretrained_weights(self.text):
            return text_embeds(self.text, *parts)

    def images_and_layers(self, inputs: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Runs θ₀ on the images of a batch; returns `(batch, dim)`, L2-normalised, and the layers' hidden states.

        Args:
            inputs: the batch.

        Raises:
            ConfigError: no term asked for them.
        """
        if self.vision is None:
            raise _undeclared("image_embeds")
        with showing(self.vision, self.tuned.layers) as found:
            return pretrained_image_embeds(self.vision, inputs), found


class BatchReference:
    """θ₀'s answers for one batch, each computed when it is first asked for, and once.

    Args:
        whole: θ₀.
        task: what is trained, whose parameters have gradients.
        output: what it returned.
        inputs: the batch.
        tuned_hidden_states: `(batch, tokens, width)`, say, by layer: those of the tuned model, with gradient.
    """

    def __init__(
        self, whole: Reference, task: Task, output: Any, inputs: Batch, tuned_hidden_states: dict[str, Tensor]
    ) -> None:
        self.whole, self.task, self.output, self.inputs = whole, task, output, inputs
        self.tuned_hidden_states = tuned_hidden_states
        self._texts: dict[Any, tuple[Texts, Tensor]] = {}

    @cached_property
    def image_embeds(self) -> Tensor:
        """θ₀'s embeddings of the images, `(batch, dim)`, L2-normalised, without gradient."""
        return self.inputs[REFERENCE_EMBEDS] if self.whole.cached else self._forward[0]

    @property
    def hidden_states(self) -> dict[str, Tensor]:
        """θ₀'s hidden states of the images by layer, as `tuned_hidden_states`, without gradient."""
        return self._forward[1]

    @cached_property
    def class_embeds(self) -> Tensor:
        """θ₀'s embeddings of the output's `class_embeds`: `(classes, dim)`, L2-normalised, without gradient."""
        if self.whole.prompts is None:
            raise _undeclared("class_embeds")
        classifier: Any = self.task
        return classifier.prompts.pick(self.whole.prompts, self.output.prompt_rows)

    @cached_property
    def weights(self) -> Mapping[str, Moved]:
        """The trained tensors in which Δ is linear, and where they started, by name."""
        if self.whole.weights is None:
            raise _undeclared("weights")
        return self.whole.weights(self.task)

    def text_embeds(self, texts: Texts) -> Tensor:
        """Returns θ₀'s embeddings of texts, as `Reference.text_embeds`.

        Args:
            texts: strings, or their tokens.
        """
        key = id(texts["input_ids"]) if isinstance(texts, Mapping) else tuple(texts)
        if key not in self._texts:
            self._texts[key] = texts, self.whole.text_embeds(texts)  # kept, so that no other gets its id
        return self._texts[key][1]

    @cached_property
    def _forward(self) -> tuple[Tensor, dict[str, Tensor]]:
        return self.whole.images_and_layers(self.inputs)


def add_terms(task: Task, terms: Mapping[str, Term], cached: bool = False, weights: Weights | None = None) -> None:
    """Adds terms to the loss of a task that is θ₀ now; a copy of each, so that one can be given to several tasks.

    Args:
        task: the task to train.
        terms: by name; in the place of those it has.
        cached: whether batches bring θ₀'s embeddings of their images.
        weights: returns the trained tensors of a task and where they started, by name.

    Raises:
        ConfigError: a term cannot be computed for the task, or has a name that is taken or cannot be logged.

    Example:
        >>> add_terms(classifier, {"similarity": SimilarityLoss(weight=10.0)})
        >>> classifier.train()(**batch).terms
        {'similarity_vision': tensor(0., grad_fn=<MulBackward0>)}
    """
    if task.loss_name in terms:
        allowed = "any name but that of the task's own loss"
        raise ConfigError("a loss has a name to log it by that is taken", got=task.loss_name, allowed=allowed)
    for name, term in terms.items():
        check_term(name, term)
    own = {name: copy.deepcopy(term) for name, term in terms.items()}
    for term in own.values():
        term.attach(task)
    task.terms = nn.ModuleDict(own).to(base_model(task.model).device)
    task.reference = Reference.of(task, own, cached, weights)


# --- what is refused ---


def _checked_needs(name: str, term: Term, task: Task) -> tuple[str, ...]:
    needs = term.needs_for(task)
    _check_tuple(f"{name}, needs", needs)
    for need in needs:
        check_known(f"need of {name}", need, NEEDS)
    return needs


def _check_tuple(where: str, got: Any) -> None:
    if isinstance(got, str) or not isinstance(got, Collection):
        allowed = f"a tuple of names, as ({got!r},)" if isinstance(got, str) else "a tuple of names"
        raise ConfigError("this is no tuple of names", where=f"losses, {where}", got=got, allowed=allowed)


def _check_use(needs: set[str], layers: Sequence[str], cached: bool) -> None:
    if cached and (layers or "image_embeds" not in needs):
        what = "no forward of the pre-trained model would be spared"
        got = f"layers {list(layers)}" if layers else sorted(needs)
        remedy = "Do without the cache, or add a loss that needs 'image_embeds' and no hidden states."
        raise ConfigError(what, where="cache_reference_embeddings", got=got, remedy=remedy)


def _prompts(task: Task) -> Tensor:
    if not isinstance(task, ZeroShotClassifier):
        what = "a loss needs class embeddings, and the task has no classes by name"
        raise ConfigError(what, where="losses", got=type(task).__name__, allowed=ZeroShotClassifier.__name__)
    return pretrained_prompts(task)


def _undeclared(need: str) -> ConfigError:
    remedy = f"Name {need!r} in the class's `needs`."
    return ConfigError("a loss asks for what it did not say it needs", where="losses", got=need, remedy=remedy)
