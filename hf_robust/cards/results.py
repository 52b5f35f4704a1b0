# SPDX-License-Identifier: Apache-2.0
"""What a model card shows of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import DataError
from ..evaluation.roles import ROLES, Role
from ..interpolation.sweep import AlphaSweep
from .markdown import hub_id, plain

if TYPE_CHECKING:
    from ..evaluation.report import SuiteReport

Column = Literal["zero-shot", "fine-tuned", "chosen alpha"]
PICTURE = "wise_ft.png"
OF_THE_SAME_CLASSES = ("eval", "evaluation", "test")  # what sets of the training's own distribution are called
TITLES: dict[Role, str] = {"id": "ID", "ood": "OOD", "new": "new classes", "other": "other task"}


@dataclass(frozen=True)
class Accuracy:
    """An accuracy and how sure it is.

    Args:
        value: a fraction.
        interval: lower and upper end of its 95 % interval, fractions; None where it is not known.

    Raises:
        DataError: a value is no fraction, or the ends are in the wrong order.

    Example:
        >>> Accuracy(0.75, (0.71, 0.79))
        Accuracy(value=0.75, interval=(0.71, 0.79))
    """

    value: float
    interval: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        low, high = self.interval or (0, 1)
        if not (0 <= self.value <= 1 and 0 <= low <= high <= 1):
            raise DataError("accuracy is no fraction", got=(self.value, self.interval), allowed="[0, 1]")

    def __str__(self) -> str:
        ends = "" if self.interval is None else " ({:.1f}–{:.1f})".format(*(100 * end for end in self.interval))
        return f"{100 * self.value:.1f}{ends}"


@dataclass(frozen=True)
class EvaluationSet:
    """What was found on one evaluation set.

    Args:
        name: as the card shows it.
        role: `"id"`, `"ood"`, `"new"` (classes without training images) or `"other"` (tasks that may be forgotten).
        images: number of images.
        accuracies: by column: `"zero-shot"`, `"fine-tuned"` (α = 1), `"chosen alpha"`; any of them may be missing.
        dataset: its id on the Hub, if it is there.
        more: other metrics than the one that stands for the accuracy, by column and name: fractions, and ranks.

    Raises:
        DataError: an unknown role or column, no images, or a dataset that is no id.

    Example:
        >>> EvaluationSet("sketches", "ood", 500, {"zero-shot": Accuracy(0.5), "fine-tuned": Accuracy(0.4)}).role
        'ood'
    """

    name: str
    role: Role
    images: int
    accuracies: Mapping[Column, Accuracy]
    dataset: str | None = None
    more: Mapping[Column, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise DataError("unknown role", where=self.name, got=self.role, allowed=", ".join(ROLES))
        if unknown := set(self.accuracies) - set(get_args(Column)):
            raise DataError("unknown column", where=self.name, got=unknown, allowed=", ".join(get_args(Column)))
        if self.images < 1:
            raise DataError("set without images", where=self.name, got=self.images)
        if self.dataset is not None and hub_id(self.dataset) is None:
            raise DataError("dataset is no id on the Hub", where=self.name, got=self.dataset)


@dataclass(frozen=True)
class CardResults:
    """What the card shows of an evaluation.

    Args:
        sets: the evaluation sets.
        chosen_alpha: the α the model was saved at; None where the fine-tuned model itself was.
        curve: of every α that was evaluated `alpha`, and the mean accuracies on the ID and the OOD sets, `id` and
            `ood`, fractions.
        metric: what stands in the place of the accuracy, as `"recall@1"`.

    Raises:
        DataError: two sets have the same name.

    Example:
        >>> photos = EvaluationSet("photos", "id", 500, {"zero-shot": Accuracy(0.6), "chosen alpha": Accuracy(0.8)})
        >>> CardResults([photos], chosen_alpha=0.7).columns
        ['zero-shot', 'chosen alpha']
    """

    sets: Sequence[EvaluationSet]
    chosen_alpha: float | None = None
    curve: Sequence[Mapping[str, float]] = ()
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        names = [plain(one.name) for one in self.sets]
        if len(set(names)) < len(names):
            raise DataError("evaluation sets have the same name", got=names)

    @property
    def columns(self) -> list[Column]:
        """The columns that any set has."""
        return [column for column in get_args(Column) if any(column in one.accuracies for one in self.sets)]

    @property
    def saved(self) -> Column:
        """The column of the model that was saved."""
        return "fine-tuned" if self.chosen_alpha is None else "chosen alpha"


def role_of(name: str, other_classes: bool) -> Role:
    """Returns the role of an evaluation set by its name (`"id"`, `"ood_sketch"`, `"other_pets"`) or by its classes.

    Args:
        name: as in `RobustTrainer(eval_dataset=...)`; `"test"` is ID where the classes are those of the training.
        other_classes: whether its classes are others than those of the training set.

    Example:
        >>> role_of("ood_sketch", other_classes=False), role_of("pets", other_classes=True)
        ('ood', 'other')
    """
    first: Any = name.split("_")[0]
    if first in ROLES:
        return first
    if other_classes:
        return "other"
    return "id" if first in OF_THE_SAME_CLASSES else "ood"


def results_from_sweep(
    sweep: AlphaSweep, sets: Mapping[str, tuple[Role, int]], metric: str = "accuracy"
) -> CardResults:
    """Returns the accuracies at α = 0, 1 and the chosen one, with 95 % intervals after Wilson (1927).

    Args:
        sweep: what `RobustTrainer.wise_ft_sweep` found.
        sets: role and number of images of the sets to show. Leave the one out that α was chosen on.
        metric: another fraction to show in the place of the accuracy.

    Raises:
        DataError: the sweep has no such metric of a set.

    Example:
        >>> results_from_sweep(sweep, {"id": ("id", 500), "sketch": ("ood", 500)}).chosen_alpha
        0.7
    """
    alphas: dict[Column, float] = {"zero-shot": 0.0, "fine-tuned": 1.0, "chosen alpha": sweep.best_alpha}
    rows = {row["alpha"]: row for row in sweep.rows}
    for name in sets:
        if f"{name}_{metric}" not in sweep.rows[0]:
            raise DataError(f"sweep has no {metric} of the set", got=name, allowed=", ".join(sweep.rows[0]))
    accuracies = {
        column: {name: rows[alpha][f"{name}_{metric}"] for name in sets}
        for column, alpha in alphas.items()
        if alpha in rows
    }
    curve = curve_of(sweep, {name: role for name, (role, _) in sets.items()}) if metric == "accuracy" else []
    return replace(results_from_accuracies(accuracies, sets, sweep.best_alpha, metric), curve=curve)


def results_from_accuracies(
    accuracies: Mapping[Column, Mapping[str, float]],
    sets: Mapping[str, tuple[Role, int]],
    chosen_alpha: float | None = None,
    metric: str = "accuracy",
) -> CardResults:
    """Returns accuracies with 95 % intervals after Wilson (1927); other metrics are no shares of images, so without.

    Args:
        accuracies: by column and set, fractions; sets that are not to be shown may be among them.
        sets: role and number of images of the sets to show.
        chosen_alpha: as in `CardResults`.
        metric: likewise.

    Example:
        >>> results_from_accuracies({"zero-shot": {"id": 0.5}, "fine-tuned": {"id": 0.75}}, {"id": ("id", 500)}).saved
        'fine-tuned'
    """
    found = []
    for name, (role, images) in sets.items():
        shares = {column: of_sets[name] for column, of_sets in accuracies.items()}
        known = metric == "accuracy"
        of_set = {column: with_interval(v, images) if known else Accuracy(v) for column, v in shares.items()}
        found.append(EvaluationSet(name, role, images, of_set))
    return CardResults(found, chosen_alpha, metric=metric)


def curve_of(sweep: AlphaSweep, roles: Mapping[str, Role]) -> list[dict[str, float]]:
    """Returns what `CardResults` takes as its curve; empty unless there are ID and OOD sets.

    Args:
        sweep: of accuracies.
        roles: of the sets to show.

    Example:
        >>> curve_of(sweep, {"id": "id", "sketch": "ood"})[0]
        {'alpha': 0.0, 'id': 0.5, 'ood': 0.5}
    """
    names = {role: [name for name, of_set in roles.items() if of_set == role] for role in ("id", "ood")}
    if not all(names.values()):
        return []
    means = [{r: mean(row[f"{name}_accuracy"] for name in names[r]) for r in names} for row in sweep.rows]
    return [{"alpha": row["alpha"], **of_row} for row, of_row in zip(sweep.rows, means, strict=True)]


def points_of(results: CardResults) -> list[dict[str, float]]:
    """Returns as a curve the three α that were evaluated: 0, the chosen one and 1; empty unless there are such sets.

    Args:
        results: of accuracies.

    Example:
        >>> [point["alpha"] for point in points_of(results)]
        [0.0, 0.7, 1.0]
    """
    alphas: dict[Column, float] = {"zero-shot": 0.0, "fine-tuned": 1.0}
    if results.chosen_alpha is not None:
        alphas["chosen alpha"] = results.chosen_alpha
    of_role = {role: [one for one in results.sets if one.role == role] for role in ("id", "ood")}
    if len(alphas) < 3 or not all(of_role.values()):
        return []
    if any(column not in one.accuracies for column in alphas for ones in of_role.values() for one in ones):
        return []
    points = {
        alpha: {role: mean(one.accuracies[column].value for one in ones) for role, ones in of_role.items()}
        for column, alpha in alphas.items()
    }
    return [{"alpha": alpha, **points[alpha]} for alpha in sorted(points)]


def with_interval(share: float, images: int) -> Accuracy:
    """Returns an accuracy with its 95 % interval after Wilson (1927).

    Args:
        share: the accuracy, a fraction.
        images: of how many images.

    Example:
        >>> str(with_interval(0.5, 100))
        '50.0 (40.4–59.6)'
    """
    from scipy.stats import binomtest  # slow to import

    interval = binomtest(round(share * images), images).proportion_ci(method="wilson")
    return Accuracy(share, (float(interval.low), float(interval.high)))


def results_from_reports(reports: Mapping[Column, SuiteReport], chosen_alpha: float | None = None) -> CardResults:
    """Returns the accuracies of several models on a suite's sets of classification, with bootstrap 95 % intervals.

    Args:
        reports: what `evaluate_suite` found, by column; all of the same suite.
        chosen_alpha: as in `CardResults`.

    Example:
        >>> reports = {"zero-shot": evaluate_suite(clip, processor, suite), "fine-tuned": report}
        >>> card = model_card(trainer.model, trainer.args, results_from_reports(reports))
    """
    from ..evaluation.statistics import bootstrap_interval  # not needed where cards are made from sweeps

    first = next(iter(reports.values()))
    found = []
    for name, one in first.classified.items():
        correct = {column: report.classified[name].correct for column, report in reports.items()}
        accuracies = {column: Accuracy(float(of.mean()), bootstrap_interval(of)) for column, of in correct.items()}
        role: Any = one.role
        found.append(EvaluationSet(name, role, len(one.targets), accuracies))
    return CardResults(found, chosen_alpha)


def draw_curve(results: CardResults, folder: Path) -> str | None:
    """Draws OOD against ID accuracy over α, the chosen one in another colour, into `wise_ft.png`.

    Args:
        results: what the evaluation found.
        folder: where to.

    Returns:
        The file's name; None without a curve.
    """
    if not results.curve:
        return None
    from matplotlib.figure import Figure  # with the plots it takes a second to import

    from ..evaluation.plots import plot_id_ood

    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    chosen = [row for row in results.curve if row["alpha"] == results.chosen_alpha]
    curves = {"WiSE-FT": results.curve, f"chosen, α = {results.chosen_alpha:g}": chosen}
    plot_id_ood(curves, figure.subplots())
    figure.savefig(folder / PICTURE, dpi=150)
    return PICTURE
