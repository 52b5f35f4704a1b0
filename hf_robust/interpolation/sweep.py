# SPDX-License-Identifier: Apache-2.0
"""How far to go: α chosen on validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import ConfigError, NonFiniteError
from .adapters import wise_ft, zero_shot_heads
from .arithmetic import check_alpha

MOST_COLUMNS = 9  # of a table on a terminal
Metrics = dict[str, float]


@dataclass(frozen=True)
class AlphaSweep:
    """What `alpha_sweep` found; printed as a table, of many metrics with the metric α was chosen by and the losses.

    Args:
        rows: for every α, in the order given, `alpha` and the metrics there.
        metric: the metric α was chosen by.
        best_alpha: the chosen α.

    Example:
        >>> print(AlphaSweep([{"alpha": 0.5, "validation_accuracy": 0.75}], "validation_accuracy", 0.5))
         alpha  validation_accuracy
        *  0.5               0.7500
    """

    rows: list[Metrics]
    metric: str
    best_alpha: float

    def __str__(self) -> str:
        names = list(self.rows[0])
        if len(names) > MOST_COLUMNS:
            sets = [name.removesuffix("_loss") for name in names if name.endswith("_loss")]
            own = max((one for one in sets if self.metric.startswith(f"{one}_")), key=len, default="")
            metrics = self.metric.removeprefix(f"{own}_"), "loss"
            shown = {"alpha", self.metric, *(f"{one}_{metric}" for one in sets for metric in metrics)}
            names = [name for name in names if name in shown]
        table = [names] + [[_text(name, row[name]) for name in names] for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        marks = [" ", *("*" if row["alpha"] == self.best_alpha else " " for row in self.rows)]
        lines = ["  ".join(map(str.rjust, cells, widths)) for cells in table]
        return "\n".join(mark + line for mark, line in zip(marks, lines, strict=True))


def _text(name: str, value: float) -> str:
    return f"{value:g}" if name == "alpha" else f"{value:.4f}"


def alpha_sweep(
    model: nn.Module,
    alphas: Sequence[float],
    evaluate: Callable[[nn.Module], Metrics],
    metric: str,
    zero_shot: Mapping[str, Tensor] | None = None,
    greater_is_better: bool = True,
    tolerance: float = 0.0,
) -> AlphaSweep:
    """Evaluates a fine-tuned model at every α, and leaves it at the one that is best on validation data.

    Of equally good ones that is the one with the lowest loss on the same set, if `evaluate` returns it beside the
    metric (`validation_loss` beside `validation_accuracy`), and then the smallest, which is nearest to what the model
    knew.

    WiSE-FT (Wortsman et al., CVPR 2022, https://huggingface.co/papers/2109.01903).

    Args:
        model: as in `wise_ft`.
        alphas: the α to evaluate, fractions in [0, 1].
        evaluate: returns the metrics of the model as it is now, by name.
        metric: the metric to choose by, with `validation` in its name.
        zero_shot: as in `wise_ft`.
        greater_is_better: False where the metric is a loss.
        tolerance: how much of the metric may be given up. Of the α within it of the best the smallest is taken, which
            keeps most of what the model knew; with the standard error of the metric that is the rule of one standard
            error (Breiman et al. 1984).

    Returns:
        The metrics at every α, and the chosen α.

    Raises:
        ConfigError: no α, an α twice or out of range; `tolerance` is negative; the metric is none of validation data,
            or is not among the results; or what `wise_ft` raises.
        NonFiniteError: the metric is NaN or infinite.

    Example:
        >>> sweep = alpha_sweep(model, [0, 0.5, 1], evaluate, "validation_accuracy")
        >>> sweep.best_alpha
        0.5
    """
    alphas = _check_alphas(alphas)
    if not 0 <= tolerance < math.inf:
        raise ConfigError("tolerance is out of range", got=tolerance, allowed="numbers from 0")
    check_validation(metric, "alpha is")
    wise_ft(model, 1.0, zero_shot)  # refuses before anything is evaluated
    heads = zero_shot_heads(model, zero_shot or {})  # once, not for every α
    zero_shot = {**heads, **(zero_shot or {})} if heads else zero_shot
    rows = []
    for alpha in alphas:
        wise_ft(model, alpha, zero_shot)
        try:
            rows.append({"alpha": alpha, **check_metrics(evaluate(model), metric, f"alpha {alpha}")})
        except BaseException:
            wise_ft(model, 1.0, zero_shot)
            raise
    sign = 1 if greater_is_better else -1
    loss = _loss_beside(metric, rows[0])
    best = max(rows, key=lambda row: (sign * row[metric], -_loss(row, loss), -row["alpha"]))
    if tolerance:
        near = [row for row in rows if sign * (best[metric] - row[metric]) <= tolerance]
        best = min(near, key=lambda row: row["alpha"])
    wise_ft(model, best["alpha"], zero_shot)
    return AlphaSweep(rows, metric, best["alpha"])


def _loss_beside(metric: str, names: Mapping[str, float]) -> str | None:
    """The loss of the metric's set."""
    losses = [name for name in names if name.endswith("_loss") and metric.startswith(name.removesuffix("loss"))]
    return max(losses, key=len, default=None)


def _loss(row: Metrics, name: str | None) -> float:
    loss = 0.0 if name is None else row[name]
    return math.inf if math.isnan(loss) else loss


def _check_alphas(alphas: Sequence[float]) -> list[float]:
    checked = [check_alpha(alpha) for alpha in alphas]
    if not checked or len(set(checked)) < len(checked):
        raise ConfigError("alphas are none, or one is there twice", got=checked, allowed="different numbers in [0, 1]")
    return checked


def check_validation(metric: str, chosen: str) -> None:
    """Refuses to choose by a metric of anything but validation data.

    Args:
        metric: its name.
        chosen: what is chosen, and its verb, for the message.

    Raises:
        ConfigError: it is none of validation data.

    Example:
        >>> check_validation("validation_accuracy", "alpha is")
    """
    if "validation" not in metric:
        what = f"{chosen} chosen on validation data, never on a test set"
        raise ConfigError(what, where="metric", got=metric, allowed="a name with 'validation' in it")


def check_metrics(metrics: Metrics, metric: str, where: str) -> Metrics:
    """Returns what `evaluate` found, if it can be chosen by.

    Args:
        metrics: by name.
        metric: the one to choose by.
        where: what was evaluated, for the message.

    Raises:
        ConfigError: they are none, or the metric is not among them.
        NonFiniteError: it is NaN or infinite.

    Example:
        >>> check_metrics({"validation_accuracy": 0.5}, "validation_accuracy", "alpha 0.5")
        {'validation_accuracy': 0.5}
    """
    if not isinstance(metrics, Mapping):
        raise ConfigError("evaluate returns no metrics", got=type(metrics).__name__, allowed="numbers by name")
    if metric not in metrics:
        raise ConfigError("evaluate does not return the metric", got=metric, allowed=", ".join(metrics))
    if not math.isfinite(metrics[metric]):
        raise NonFiniteError(f"{metric} is {metrics[metric]}", where=where)
    return metrics
