# SPDX-License-Identifier: Apache-2.0
"""Model soups: the mean of models that were fine-tuned from the same start, of all or of those that help."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from ..errors import ConfigError, MergeError
from ..tasks.class_names import ZeroShotClassifier
from ..tasks.identities import Identities
from .arithmetic import mean_tensor
from .linear import equal_bits
from .models import check_alike, check_model, own_tensors
from .soup_adapters import add_soup, check_adapters, trying
from .sweep import check_metrics, check_validation

Metrics = dict[str, float]


@dataclass(frozen=True)
class GreedySoup:
    """What `greedy_soup` found, printed as a table: the ingredients from best to worst, those taken with a mark.

    Args:
        rows: for every ingredient, in the order they were tried, its `ingredient` (name, folder or number), the
            `metric` alone, that of the `soup` with it, and whether it was `taken`.
        metric: the metric the soup was chosen by.
        members: positions of those taken among the ingredients given, in the order they were taken.

    Example:
        >>> row = {"ingredient": "a", "metric": 0.75, "soup": 0.75, "taken": True}
        >>> print(GreedySoup([row], "validation_accuracy", [0]))
          ingredient  validation_accuracy  of the soup with it
        *          a               0.7500               0.7500
    """

    rows: list[dict[str, Any]]
    metric: str
    members: list[int]

    def __str__(self) -> str:
        cells = [[str(row["ingredient"]), f"{row['metric']:.4f}", f"{row['soup']:.4f}"] for row in self.rows]
        table = [["ingredient", self.metric, "of the soup with it"], *cells]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        marks = [" ", *("*" if row["taken"] else " " for row in self.rows)]
        lines = ["  ".join(map(str.rjust, cells, widths)) for cells in table]
        return "\n".join(f"{mark} {line}" for mark, line in zip(marks, lines, strict=True))


def uniform_soup(
    ingredients: Sequence[nn.Module] | Sequence[str], model: PeftModel | None = None, adapter_name: str = "soup"
) -> nn.Module:
    """Averages models, or adapters of one base: the mean of all θ, or of all Δ.

    All must have been trained from the same weights, heads too; of whole models this cannot be seen from here, and
    the mean of others is no model. Sums are in float64 and rounded once: equal ingredients give the same bits, and two
    models what `interpolate` gives at α = 1/2.

    A soup of adapters is an adapter of their method, added to `model` under a name of its own and made the active one;
    it can be saved, merged and trained on. SAFT's has the union of the entries, SHiRA's likewise, A-CLIP's copies are
    the mean copies, and LoRA's has the sum of the ranks (PEFT's `add_weighted_adapter`), because the mean of products
    B A is not the product of the means. Adapters are averaged as they stand, also at an α of `wise_ft`.

    Model soups (Wortsman et al., ICML 2022, https://huggingface.co/papers/2203.05482).

    Args:
        ingredients: whole models of one architecture; or names of adapters in `model`, where
            `model.load_adapter(folder, name)` brings them. They are not changed.
        model: holds the adapters.
        adapter_name: the name of the soup among them.

    Returns:
        A new model in eval mode, on the device of the first one; or `model`.

    Raises:
        ConfigError: there are no ingredients, a name is unknown, used or given twice, or Δ of the method has no exact
            mean, or adapters are merged.
        SelectionError: a SAFT adapter has no entries yet.
        MergeError: names, shapes, dtypes or integers of models differ, or the classes of their heads; a model is
            quantised, on the meta device, or has adapters; or adapters change different tensors of the base.
        NonFiniteError: a value is NaN or infinite.

    Example:
        >>> soup = uniform_soup([first, second, third])
        >>> model = PeftModel.from_pretrained(clip, "runs/a", adapter_name="a")
        >>> model.load_adapter("runs/b", "b")
        >>> uniform_soup(["a", "b"], model).save_pretrained("runs/soup", selected_adapters=["soup"])
    """
    _check_ingredients(ingredients, model, adapter_name)
    if model is None:
        return _mean_model(cast(Sequence[nn.Module], ingredients))
    add_soup(model, cast(Sequence[str], ingredients), adapter_name)
    return model


def greedy_soup(
    ingredients: Sequence[nn.Module] | Sequence[str],
    evaluate: Callable[[nn.Module], Metrics],
    metric: str,
    model: PeftModel | None = None,
    adapter_name: str = "soup",
    greater_is_better: bool = True,
) -> tuple[nn.Module, GreedySoup]:
    """Averages those models or adapters that make the mean better on validation data.

    From the best alone to the worst (equally good ones in the order given), each is taken if the soup with it is
    strictly better than without: (n θ̄ + θ) / (n + 1). The result is the `uniform_soup` of those taken.

    Greedy soup (Wortsman et al., ICML 2022, https://huggingface.co/papers/2203.05482).

    Args:
        ingredients: as in `uniform_soup`.
        evaluate: returns the metrics of a model by name; it is called with copies, or with `model` while a soup is
            active in it.
        metric: the metric to choose by, with `validation` in its name.
        model: as in `uniform_soup`.
        adapter_name: likewise.
        greater_is_better: False where the metric is a loss.

    Returns:
        What `uniform_soup` returns, and what was taken.

    Raises:
        ConfigError: the metric is none of validation data, or not among the results; or as `uniform_soup`.
        SelectionError, MergeError: as `uniform_soup`.
        NonFiniteError: the metric, or a value, is NaN or infinite.

    Example:
        >>> soup, found = greedy_soup([first, second, third], evaluate, "validation_accuracy")
        >>> print(found)
          ingredient  validation_accuracy  of the soup with it
        *          1               0.7500               0.7500
        *          0               0.7400               0.7700
                   2               0.6000               0.7600
    """
    check_validation(metric, "a soup is")
    _check_ingredients(ingredients, model, adapter_name)

    def score(members: Sequence[int]) -> Metrics:
        chosen: Any = [ingredients[member] for member in members]
        if model is None:
            return evaluate(uniform_soup(chosen))
        with trying(model, adapter_name, keep=False):
            return evaluate(uniform_soup(chosen, model, adapter_name))

    names = ingredients if model is not None else range(len(ingredients))
    found = choose_greedily([str(name) for name in names], score, metric, greater_is_better)
    taken: Any = [ingredients[member] for member in found.members]
    return uniform_soup(taken, model, adapter_name), found


def choose_greedily(
    names: Sequence[str], score: Callable[[Sequence[int]], Metrics], metric: str, greater_is_better: bool = True
) -> GreedySoup:
    """Chooses the members of a greedy soup, whatever the ingredients are.

    Args:
        names: of the ingredients, for the table and for messages.
        score: returns the metrics of the uniform soup of some of them, given by their positions.
        metric: as in `greedy_soup`.
        greater_is_better: likewise.

    Returns:
        What was taken.

    Raises:
        ConfigError: the metric is none of validation data, or not among the results.
        NonFiniteError: the metric is NaN or infinite.

    Example:
        >>> choose_greedily(["a", "b"], lambda members: {"validation_accuracy": 1 / len(members)}, METRIC).members
        [0]
    """
    check_validation(metric, "a soup is")
    sign = 1 if greater_is_better else -1

    def of_soup(members: Sequence[int]) -> float:
        where = ", ".join(names[member] for member in members)
        return check_metrics(score(members), metric, where)[metric]

    alone = [of_soup([index]) for index in range(len(names))]
    first, *others = sorted(range(len(names)), key=lambda index: -sign * alone[index])
    members, best = [first], alone[first]
    rows: list[dict[str, Any]] = [{"ingredient": names[first], "metric": best, "soup": best, "taken": True}]
    for index in others:
        value = of_soup([*members, index])
        taken = sign * value > sign * best
        if taken:
            members, best = [*members, index], value
        rows.append({"ingredient": names[index], "metric": alone[index], "soup": value, "taken": taken})
    return GreedySoup(rows, metric, members)


# --- whole models ---


@torch.no_grad()
def _mean_model(models: Sequence[nn.Module]) -> nn.Module:
    result = copy.deepcopy(models[0]).eval()
    sources = [own_tensors(model) for model in models]
    written: set[int] = set()
    for name, tensor in own_tensors(result).items():
        if id(tensor) not in written and tensor.is_floating_point():
            written.add(id(tensor))
            tensor.copy_(mean_tensor(source[name] for source in sources))
    return result


def _check_ingredients(ingredients: Sequence[Any], model: PeftModel | None, adapter_name: str) -> None:
    if isinstance(ingredients, str) or not isinstance(ingredients, Sequence):
        allowed = "a list of models, or of names of adapters in model="
        raise ConfigError("no list of ingredients", got=type(ingredients).__name__, allowed=allowed)
    if len(ingredients) == 0:
        raise ConfigError("a soup has no ingredients", allowed="at least one")
    if model is not None:
        check_different(ingredients)
        check_adapters(model, ingredients, adapter_name)
        return
    for number, one in enumerate(ingredients):
        if not isinstance(one, nn.Module):
            remedy = "Pass model=, which holds adapters of these names; load folders first."
            raise ConfigError("ingredient is no model", where=f"#{number}", got=one, remedy=remedy)
        check_model(one, f"#{number}")
    for number, one in enumerate(ingredients[1:], start=1):
        _check_same(ingredients[0], one, number)


def check_different(names: Sequence[Any]) -> None:
    """Refuses an ingredient that is there twice.

    Args:
        names: of the ingredients.

    Raises:
        ConfigError: one is.
    """
    twice = sorted({str(name) for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError("an ingredient is there twice", got=twice, allowed="each once")


def _check_same(first: nn.Module, other: nn.Module, number: int) -> None:
    names = [_classes(model) for model in (first, other)]
    if names[0] != names[1]:
        raise MergeError("heads are of other classes", where=f"model #{number}", got=f"{names[0]} and {names[1]}")
    tensors, others = own_tensors(first), own_tensors(other)
    check_alike(others, tensors, (f"#{number}", "#0"))
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and not equal_bits(tensor, others[name].to(tensor.device)):
            raise MergeError("models differ in whole numbers, which have no mean", where=name, got=f"model #{number}")


def _classes(model: nn.Module) -> list[list[str]]:
    heads = [module for module in model.modules() if isinstance(module, ZeroShotClassifier | Identities)]
    return [list(head.identities if isinstance(head, Identities) else head.class_names) for head in heads]
