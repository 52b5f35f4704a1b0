# SPDX-License-Identifier: Apache-2.0
"""What a comparison found: a table, a picture, and the search behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, variance
from typing import Any

from ..cards.results import TITLES
from ..evaluation import plot_id_ood, standard_error
from ..evaluation.report import write_json
from ..scripting.results import percent
from .methods import ALL_METHODS
from .runs import Run
from .search import choose_rate, choose_weight
from .trainings import FINE_TUNED

NOTE = """Accuracy in %: mean over the sets and seeds ± half of its 95 % interval, which is about the choice of images
and of seeds. trained: number of trained parameters. seconds: of a training, loading and evaluation apart. weight: what
the weight of a loss was multiplied by. α: of WiSE-FT, the smallest within one standard error of the best on validation
data, for each seed. rank: the place by accuracy, averaged over the columns; the best is marked."""
Rows = dict[str, dict[str, Any]]


def report(common: Mapping[str, Any], runs: Mapping[str, Run], folder: Path) -> None:
    """Prints what there is, and writes it to results.json, table.md and, of several roles, scatter.png.

    Args:
        common: settings that all runs share.
        runs: what has ended, by name.
        folder: for the files.
    """
    write_json({**common, "runs": runs}, folder / "results.json")
    text = search_table(runs)
    if any("method" in run for run in runs.values()):
        rows = collect(runs)
        text = f"{table(rows)}\n{NOTE}\n\n{text}"
        if rows["zero-shot"]["accuracy"].keys() != {"id"}:
            draw(rows, folder / "scatter.png")
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)


# --- the rows ---


def collect(runs: Mapping[str, Run]) -> Rows:
    """Returns the rows of the table: by role accuracies, one per seed, each the mean over the role's sets; the rank.

    Args:
        runs: what has ended, by name.
    """
    rows: Rows = {"zero-shot": accuracies([runs["zero-shot"]])}
    for method in ALL_METHODS:
        ended = [run for run in runs.values() if run.get("method") == method]
        for way in ended[0]["ways"] if ended else ():
            rows[method if way == FINE_TUNED else f"{method}+{way}"] = _row(ended, way)
    for row, rank in zip(rows.values(), mean_ranks([row["accuracy"] for row in rows.values()]), strict=True):
        row["rank"] = rank
    return rows


def _row(ended: Sequence[Run], way: str) -> dict[str, Any]:
    found = [run["ways"][way] for run in ended]
    return {
        **accuracies(found),
        "alpha": [one["alpha"] for one in found if "alpha" in one] or ([1.0] if way == FINE_TUNED else []),
        "trained_parameters": ended[0]["trained_parameters"],
        "seconds": mean(run["training_seconds"] for run in ended),
        "learning_rate": ended[0]["learning_rate"],
        "weight": ended[0]["weight"] if ALL_METHODS[ended[0]["method"]].loss else None,
    }


def accuracies(evaluations: Sequence[Run]) -> dict[str, Any]:
    """Returns accuracies by role and by set, one per evaluation, and half of the 95 % interval of their mean.

    Args:
        evaluations: of the same sets.
    """
    sets = evaluations[0]["sets"]
    roles = {role: [n for n, one in sets.items() if one["role"] == role] for role in evaluations[0]["means"]}
    return {
        "accuracy": {role: mean_accuracies(evaluations, names) for role, names in roles.items()},
        "interval": {role: half_interval(evaluations, names) for role, names in roles.items()},
        "set_accuracy": {name: mean_accuracies(evaluations, [name]) for name in sets},
        "set_interval": {name: half_interval(evaluations, [name]) for name in sets},
    }


def mean_accuracies(evaluations: Sequence[Run], names: Sequence[str]) -> list[float]:
    """Returns the mean accuracy over the sets of these names, one per evaluation.

    Args:
        evaluations: of the same sets.
        names: of the sets.
    """
    return [mean(one["sets"][name]["accuracy"] for name in names) for one in evaluations]


def half_interval(evaluations: Sequence[Run], names: Sequence[str]) -> float:
    """Returns half of the 95 % interval of a mean accuracy over sets and seeds: from other images, other seeds.

    All seeds see the same images, so more seeds do not make the first part smaller.

    Args:
        evaluations: of the same sets, one per seed.
        names: of the sets.
    """
    means, sets = mean_accuracies(evaluations, names), [evaluations[0]["sets"][name] for name in names]
    of_images = sum(standard_error(one["accuracy"], one["images"]) ** 2 for one in sets) / len(sets) ** 2
    of_seeds = variance(means) / len(means) if len(means) > 1 else 0.0
    return 1.96 * math.sqrt(of_images + of_seeds)


def mean_ranks(accuracies: Sequence[Mapping[str, Sequence[float]]]) -> list[float]:
    """Returns the mean over the roles of the place that a row has there by its mean accuracy; 1 is the best.

    Args:
        accuracies: of each row, by role.
    """
    from scipy.stats import rankdata  # slow to import

    places = [rankdata([-mean(row[role]) for row in accuracies]) for role in accuracies[0]]  # (roles, rows)
    return [float(mean(of_row)) for of_row in zip(*places, strict=True)]


# --- as text ---


def table(rows: Rows) -> str:
    """Returns the table in Markdown.

    Args:
        rows: what `collect` returned.
    """
    roles = list(rows["zero-shot"]["accuracy"])
    best = min(row["rank"] for row in rows.values())
    cells = [
        ["method", "trained", "seconds", "learning rate", "weight", "α", *(TITLES[role] for role in roles), "rank"]
    ]
    for name, row in rows.items():
        settings = ["0", "", "", "", ""]
        if name != "zero-shot":
            alphas = ", ".join(f"{alpha:g}" for alpha in sorted(set(row["alpha"])))
            cost = [f"{row['trained_parameters']:,}", f"{row['seconds']:.0f}"]
            weight = "" if row["weight"] is None else f"× {row['weight']:g}"
            settings = [*cost, f"{row['learning_rate']:g}", weight, alphas]
        figures = [f"{percent(mean(row['accuracy'][role]))} ± {percent(row['interval'][role])}" for role in roles]
        title = f"**{name}**" if row["rank"] == best else name
        cells.append([title, *settings, *figures, f"{row['rank']:.1f}"])
    return aligned(cells)


def search_table(runs: Mapping[str, Run]) -> str:
    """Returns the validation accuracies and losses that rates and weights were chosen by, in Markdown.

    Args:
        runs: what has ended, by name.
    """
    found = [run for run in runs.values() if "searched" in run]
    rates = sorted({run["learning_rate"] for run in found})
    cells = [["validation accuracy (loss)", "weight", *(f"{rate:g}" for rate in rates)]]
    for method in ALL_METHODS:
        of_method = [run for run in found if run["searched"] == method]
        chosen = _chosen(method, of_method)
        for weight in sorted({run["weight"] for run in of_method}):
            by_rate = {run["learning_rate"]: run for run in of_method if run["weight"] == weight}
            times = "" if ALL_METHODS[method].loss is None else f"× {weight:g}"
            cells.append([method, times, *(_validation_cell(by_rate.get(rate), chosen) for rate in rates)])
    return aligned(cells)


def _chosen(method: str, found: Sequence[Run]) -> Run | None:
    if all("stopped" in run for run in found):  # another call may still be searching
        return None
    rate = choose_rate([run for run in found if run["weight"] == 1])
    if ALL_METHODS[method].loss is None:
        return rate
    return choose_weight([run for run in found if run["learning_rate"] == rate["learning_rate"]])


def _validation_cell(run: Run | None, chosen: Run | None) -> str:
    """Accuracy in percent and loss; empty where the search did not come, a dash where training stopped."""
    if run is None:
        return ""
    text = f"{100 * run['accuracy']:.1f} ({run['loss']:.2f})" if "accuracy" in run else "–"
    return f"**{text}**" if run is chosen else text


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table that can be read as it is, too.

    Args:
        cells: rows of cells; the first row is the head.
    """
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    rows = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], rule, *rows[1:]]) + "\n"


# --- as a picture ---


def draw(rows: Rows, path: Path) -> None:
    """Draws accuracy in distribution against every other role: zero-shot, by WiSE-FT, fine-tuned.

    Args:
        rows: what `collect` returned.
        path: of a PNG file.
    """
    from matplotlib import colormaps  # slow to import
    from matplotlib.figure import Figure

    roles = [role for role in rows["zero-shot"]["accuracy"] if role != "id"]
    figure = Figure(figsize=(1.8 + 5 * len(roles), 5), layout="constrained")
    panels = figure.subplots(1, len(roles), squeeze=False)[0]
    for role, axes in zip(roles, panels, strict=True):
        axes.set_prop_cycle(color=colormaps["tab20"].colors)  # type: ignore[attr-defined]  # one for each of 20 methods
        plot_id_ood({name: _way(rows, name, role) for name in ALL_METHODS if name in rows}, axes, lines=role == "ood")
        axes.set_ylabel(f"accuracy (%), {TITLES[role]}")
        axes.get_legend().remove()
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside right upper")
    figure.savefig(path, dpi=150)


def _way(rows: Rows, method: str, role: str) -> list[dict[str, float]]:
    """Mean accuracies at α = 0, at the chosen α and at α = 1."""
    by_alpha = {0.0: rows["zero-shot"], 1.0: rows[method]}
    if chosen := rows.get(f"{method}+wise-ft"):
        by_alpha = {mean(chosen["alpha"]): chosen, **by_alpha}
    return [
        {"alpha": alpha, "id": mean(row["accuracy"]["id"]), "ood": mean(row["accuracy"][role])}
        for alpha, row in by_alpha.items()
    ]
