# SPDX-License-Identifier: Apache-2.0
"""Results of an evaluation as tables and metadata of a card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import get_args

from huggingface_hub import EvalResult

from ..evaluation.roles import ROLES
from .markdown import code, escape, plain
from .results import TITLES, Accuracy, CardResults, Column


def eval_results(results: CardResults | None, task: str = "zero-shot-image-classification") -> list[EvalResult]:
    """Returns the saved model's accuracies on ID and OOD sets, as the metadata of a card holds them.

    Args:
        results: what the evaluation found; None if there was none.
        task: the Hub's name of it.
    """
    found = []
    for one in () if results is None else results.sets:
        if one.role in ("id", "ood") and results is not None and results.saved in one.accuracies:
            name, value = plain(one.name), round(one.accuracies[results.saved].value, 4)
            # without a configuration the Hub would take two sets of one dataset for the same images
            result = EvalResult(task, one.dataset or name, name, results.metric, value, dataset_config=name)
            result.metric_name = f"{results.metric} ({TITLES[one.role]})"
            found.append(result)
    return found


def results_table(results: CardResults) -> str:
    """Returns accuracies, the mean over OOD sets and forgetting as a Markdown table, in percent.

    Args:
        results: what the evaluation found.
    """
    heads: dict[Column, str] = {column: column for column in get_args(Column)}
    if results.chosen_alpha is not None:
        alpha = f"chosen (α = {results.chosen_alpha:g})"
        heads = {"zero-shot": "zero-shot (α = 0)", "fine-tuned": "fine-tuned (α = 1)", "chosen alpha": alpha}
    rows = [["set", "", "images", *(heads[column] for column in results.columns)]]
    rows.append(["---", "---", "---:", *("---:" for _ in results.columns)])
    for one in sorted(results.sets, key=lambda one: ROLES.index(one.role)):
        cells = [str(one.accuracies.get(column, "–")) for column in results.columns]
        rows.append([escape(one.name), TITLES[one.role], f"{one.images:,}", *cells])
    of_role = {role: {one.name: one.accuracies for one in results.sets if one.role == role} for role in ROLES}
    if len(of_role["ood"]) > 1:
        rows.append(["mean of OOD sets", "", "", *(_mean(of_role["ood"], column) for column in results.columns)])
    if of_role["other"]:
        rows.append(["forgetting", "", "", *(_forgetting(of_role["other"], column) for column in results.columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def more_table(results: CardResults) -> str | None:
    """Returns the other metrics of the saved model as a Markdown table, `zero-shot → saved` where both are known.

    Args:
        results: what the evaluation found.

    Returns:
        Shares in percent, ranks as they are; None where no set has other metrics.
    """
    sets = [one for one in results.sets if one.more.get(results.saved)]
    if not sets:
        return None
    names = list(dict.fromkeys(name for one in sets for name in one.more[results.saved]))
    rows = [["set", *map(_title, names)], ["---", *("---:" for _ in names)]]
    for one in sorted(sets, key=lambda one: ROLES.index(one.role)):
        columns = [one.more[column] for column in ("zero-shot", results.saved) if column in one.more]
        rows.append([escape(one.name), *(" → ".join(_figure(name, of) for of in columns) for name in names)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _title(metric: str) -> str:
    return code(metric.replace("_to_", "→").replace("_", " "))


def _figure(name: str, metrics: Mapping[str, float]) -> str:
    value = metrics.get(name, math.nan)
    if math.isnan(value):
        return "–"
    return f"{value:g}" if name.endswith("_rank") else f"{100 * value:.1f}"


def _mean(sets: Mapping[str, Mapping[Column, Accuracy]], column: Column) -> str:
    from ..evaluation.statistics import ood_average  # imports what few cards need, as below

    if not all(column in one for one in sets.values()):
        return "–"
    return f"{100 * ood_average(_values(sets, column)):.1f}"


def _forgetting(sets: Mapping[str, Mapping[Column, Accuracy]], column: Column) -> str:
    from ..evaluation.statistics import forgetting

    if column == "zero-shot" or not all(column in one and "zero-shot" in one for one in sets.values()):
        return "–"
    lost = round(100 * forgetting(_values(sets, "zero-shot"), _values(sets, column)), 1)
    return f"{lost + 0.0:.1f}"  # never -0.0


def _values(sets: Mapping[str, Mapping[Column, Accuracy]], column: Column) -> dict[str, float]:
    return {name: one[column].value for name, one in sets.items()}
