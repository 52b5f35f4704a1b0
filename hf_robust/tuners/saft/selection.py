# SPDX-License-Identifier: Apache-2.0
"""Which entries SAFT trains: scores from the gradients at the pre-trained weights, and the largest of them.

SAFT (https://huggingface.co/papers/2407.03036) ranks |mean over the training set of the gradient|, signed gradients
added before the absolute value is taken, over all parameters at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...data.collator import n_images
from ...encoders.pretrained import pretrained_weights
from ...errors import NonFiniteError, SelectionError
from .config import SAFTConfig
from .layer import SAFTLayer, saft_layers
from .plan import floating_parameters

Batch = dict[str, Tensor]
LossFunction = Callable[[nn.Module, Batch], Tensor]
PER_IMAGE_SCORES = ("abs_mean", "fisher")


def select_saft(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    loss_fn: LossFunction | None = None,
    adapter_name: str | None = None,
) -> None:
    """Selects the entries that a SAFT adapter trains, from one pass over the data at the pre-trained weights.

    The model runs in eval mode with the adapter disabled; its flags, gradients and random state are left as they were.
    Sums are made in float32 or better and weighted by images, so the choice does not depend on the batch size. Under
    `torch.distributed` every rank passes its own share of the images, and all ranks get the same entries.

    `signed_mean` costs one forward and backward pass a batch. `abs_mean` and `fisher` need the gradient of every image
    by itself, so batches of one image, each with its own pass. `magnitude` and `random` need no data.

    Args:
        model: a `PeftModel` with a SAFT adapter, or a module that holds one.
        batches: dicts of tensors; `pixel_values` (or `image_embeds`) has one row an image. Each image once.
        loss_fn: `loss_fn(model, batch)` returns the mean loss over the batch's images, a 0-dim tensor.
        adapter_name: the adapter; by default the active one.

    Raises:
        SelectionError: the adapter has its entries already, the data give no gradient, or fewer entries than asked for
            have one, or a score of single images got larger batches.
        NonFiniteError: a score is NaN or infinite.

    Example:
        >>> def loss_fn(model, batch):
        ...     logits = model(**batch, input_ids=prompts).logits_per_image
        ...     return torch.nn.functional.cross_entropy(logits, labels)
        >>> select_saft(model, loader, loss_fn)  # doctest: +SKIP
    """
    layers, name = find_layers(model, adapter_name)
    if not unselected(layers, name):
        raise SelectionError(
            "the adapter has selected its entries already", got=name, remedy="Add a new adapter to select others."
        )
    config = layers[0].saft_configs[name]
    tensors = {
        f"{layer.unit}.{parameter}": layer.base_layer.get_parameter(parameter)
        for layer in layers
        for parameter in layer.saft_eligible.get(name, ())
    }
    chosen = _choose(_scores(model, tensors, config, batches, loss_fn), config)
    for layer in layers:
        layer.allocate(name, _positions_in_unit(layer, chosen))
        layer.has_selected(name)
        layer.expected_files.pop(name, None)
    for layer in layers:
        layer.set_adapter(layer.active_adapters)


def saft_unselected(model: nn.Module, adapter_name: str | None = None) -> bool:
    """Whether a model's active adapter is a SAFT adapter that has not selected its entries yet.

    Args:
        model: any module.
        adapter_name: the adapter; by default the active one.

    Example:
        >>> saft_unselected(get_peft_model(clip, SAFTConfig()))  # doctest: +SKIP
        True
    """
    layers = saft_layers(model)
    names = [adapter_name] if adapter_name else (layers[0].active_adapters if layers else [])
    return any(unselected(layers, name) for name in names)


def unselected(layers: list[SAFTLayer], adapter_name: str) -> bool:
    """Whether an adapter has not selected its entries yet, or not got them from a file."""
    return any(layer.is_unselected(adapter_name) for layer in layers)


def scores_single_images(model: nn.Module) -> bool:
    """Whether the active SAFT adapter's score needs batches of one image."""
    layers, name = find_layers(model, None)
    return layers[0].saft_configs[name].score in PER_IMAGE_SCORES


def find_layers(model: nn.Module, adapter_name: str | None) -> tuple[list[SAFTLayer], str]:
    """The units that a SAFT adapter is in, and its name.

    Args:
        model: a `PeftModel`, a model that PEFT injected an adapter into, or a module that holds one.
        adapter_name: the adapter; by default the active one.

    Raises:
        SelectionError: there is no such adapter.
    """
    layers = saft_layers(model)
    if not layers:
        raise SelectionError("the model has no SAFT adapter", remedy="Use get_peft_model(model, SAFTConfig()).")
    names = [adapter_name] if adapter_name else layers[0].active_adapters
    found = [layer for layer in layers if names and names[0] in layer.saft_configs]
    if not found:
        known = sorted({name for layer in layers for name in layer.saft_configs})
        raise SelectionError("the model has no such SAFT adapter", got=names, allowed=", ".join(known))
    return found, names[0]


def find_selected(model: nn.Module, adapter_name: str | None) -> tuple[list[SAFTLayer], str]:
    """As `find_layers`, for what needs the adapter's entries."""
    layers, name = find_layers(model, adapter_name)
    if unselected(layers, name):
        raise SelectionError("the adapter has not selected its entries", got=name, remedy="Call select_saft first.")
    return layers, name


# --- scores ------------------------------------------------------------------------------------------------------


def _scores(
    model: nn.Module,
    tensors: dict[str, nn.Parameter],
    config: SAFTConfig,
    batches: Iterable[Batch] | None,
    loss_fn: LossFunction | None,
) -> dict[str, Tensor]:
    """The score of every entry, flat, by tensor name; entries that must not be taken have −1."""
    if config.score == "magnitude":
        return {name: tensor.detach().abs().flatten().to(_sum_dtype(tensor)) for name, tensor in tensors.items()}
    if config.score == "random":
        generator = torch.Generator().manual_seed(config.seed)
        return {n: torch.rand(t.numel(), generator=generator).to(t.device) for n, t in tensors.items()}
    if batches is None or loss_fn is None:
        raise SelectionError(f"score {config.score!r} needs data", remedy="Pass batches and loss_fn.")
    with _at_pretrained_weights(model, tensors):
        sums, images = _gradient_sums(model, tensors, config, batches, loss_fn)
    _add_over_ranks(list(sums.values()), images)
    if images == 0:
        raise SelectionError("there is no batch to select from", got="0 images")
    scores = {name: (total / images).abs_().flatten() for name, total in sums.items()}
    return _without_noise(scores)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@contextmanager
def _at_pretrained_weights(model: nn.Module, tensors: dict[str, nn.Parameter]) -> Iterator[None]:
    """The adapters off, eval mode, gradients for the eligible tensors alone; everything put back afterwards."""
    cuda = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(cuda)), torch.enable_grad(), pretrained_weights(model):
        try:
            model.requires_grad_(False)
            for tensor in tensors.values():
                tensor.requires_grad_(True)
            yield
        finally:
            for tensor in tensors.values():
                tensor.grad = None


def _gradient_sums(
    model: nn.Module,
    tensors: dict[str, nn.Parameter],
    config: SAFTConfig,
    batches: Iterable[Batch],
    loss_fn: LossFunction,
) -> tuple[dict[str, Tensor], Tensor]:
    sums = {name: torch.zeros_like(tensor, dtype=_sum_dtype(tensor)) for name, tensor in tensors.items()}
    images = torch.zeros((), dtype=torch.float64, device=next(iter(tensors.values())).device)
    for batch in batches:
        count = n_images(batch)
        if config.score in PER_IMAGE_SCORES and count != 1:
            raise SelectionError(
                f"score {config.score!r} needs the gradient of each image by itself",
                got=f"a batch of {count} images",
                remedy="Pass batches of one image.",
            )
        loss = loss_fn(model, batch)
        if not loss.requires_grad:
            remedy = "Compute it from the model's outputs, without no_grad, detach or item."
            raise SelectionError("the loss has no gradient", where="loss_fn", got=loss.item(), remedy=remedy)
        loss.backward()
        images += count
        for name, tensor in tensors.items():
            if tensor.grad is not None:
                sums[name].add_(_contribution(tensor.grad.to(sums[name].dtype), config.score), alpha=count)
                tensor.grad = None
    return sums, images


def _contribution(gradient: Tensor, score: str) -> Tensor:
    if score == "signed_mean":
        return gradient
    return gradient.abs() if score == "abs_mean" else gradient.square()


def _add_over_ranks(sums: list[Tensor], images: Tensor) -> None:
    if dist.is_available() and dist.is_initialized():
        for tensor in [*sums, images]:
            dist.all_reduce(tensor)


def _without_noise(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Takes out entries whose gradient is nothing but rounding: zero in exact arithmetic, as that of `k_proj.bias`."""
    for name, score in scores.items():
        if not score.isfinite().all():
            raise NonFiniteError(
                "a gradient is NaN or infinite", where=name, remedy="Check the data; select in float32."
            )
    largest = max(score.max().item() for score in scores.values())
    if largest == 0:
        raise SelectionError(
            "all gradients are zero",
            got=f"{len(scores)} tensors",
            remedy="Is the loss detached, or the tower frozen out of it?",
        )
    for score in scores.values():
        score[score <= torch.finfo(score.dtype).eps * largest] = -1
    return scores


# --- the choice --------------------------------------------------------------------------------------------------


def _choose(scores: dict[str, Tensor], config: SAFTConfig) -> dict[str, Tensor]:
    """The flat positions of the chosen entries of each tensor, sorted."""
    if config.scope == "per_tensor":
        # A tensor may hold fewer entries with a gradient than its share (`k_proj.bias` holds none).
        budgets = {n: min(_budget(config.density, len(s)), int((s >= 0).sum())) for n, s in scores.items()}
        return {name: _top(score, budgets[name]) for name, score in scores.items() if budgets[name]}
    joined = torch.cat(list(scores.values()))
    positions = _top(joined, _budget(config.density, len(joined)))
    edges = torch.tensor([0, *(len(score) for score in scores.values())], device=joined.device).cumsum(0)
    bounds = torch.searchsorted(positions, edges).tolist()
    return {
        name: positions[start:stop] - edges[i]
        for i, (name, start, stop) in enumerate(zip(scores, bounds[:-1], bounds[1:], strict=True))
    }


def _budget(density: float, numel: int) -> int:
    # As a fraction of decimals: 0.1 * 30 in binary is 3.0000000000000004, and 0.29 * 100 is 28.999999999999996.
    return max(1, int(Fraction(str(density)) * numel))


def _top(score: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest scores, sorted; among equal ones those with the lowest positions."""
    eligible = int((score >= 0).sum())
    if eligible < count:
        raise SelectionError(
            "fewer entries than asked for have a gradient above rounding noise",
            got=f"{eligible} of {count}",
            remedy=f"Lower density below {eligible / len(score):.3g}, or select from more data.",
        )
    threshold = score.topk(count, sorted=False).values.min()
    above = (score > threshold).nonzero().squeeze(1)
    at = (score == threshold).nonzero().squeeze(1)[: count - len(above)]
    return torch.cat([above, at]).sort().values


def _positions_in_unit(layer: SAFTLayer, chosen: dict[str, Tensor]) -> Tensor:
    found, offset = [], 0
    for name, parameter in floating_parameters(layer.base_layer).items():
        if f"{layer.unit}.{name}" in chosen:
            found.append(chosen[f"{layer.unit}.{name}"] + offset)
        offset += parameter.numel()
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64)
