# SPDX-License-Identifier: Apache-2.0
"""The methods that are compared, and what is particular to the training of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import LoraConfig, PeftConfig

from ..training.losses import TERMS
from ..tuners.aclip import ACLIPConfig
from ..tuners.radapter import RAdapterConfig
from ..tuners.saft import SAFTConfig

After = Literal["wise-ft", "tpgm", "vrf"]
AFTER: tuple[After, ...] = get_args(After)


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Args:
        config: the adapter's; None for all weights.
        loss: the term that is added to the loss, by its name; its weight is chosen too.
        settings: training arguments that make the method.
        after: what is done with the trained model, each a row of its own.
        probe: a linear head alone, which starts as the zero-shot head.
        head_first: a linear head alone for as many epochs, at the rate chosen for `linear-probe`, then everything.
        ogen: a learned context, which starts as the words of the template, with OGEN.
        soup: a greedy soup of the models at the chosen learning rate and the rates beside it.
    """

    config: PeftConfig | None = None
    loss: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[After, ...] = ("wise-ft",)
    probe: bool = False
    head_first: bool = False
    ogen: bool = False
    soup: bool = False


@dataclass(frozen=True)
class Chosen:
    """What is chosen for a method.

    Args:
        learning_rate: of the training.
        weight: what the weight of the method's loss is multiplied by.
        head_learning_rate: of a head that is trained first.
        rates_beside: of the other ingredients of a soup.
    """

    learning_rate: float
    weight: float = 1.0
    head_learning_rate: float | None = None
    rates_beside: tuple[float, ...] = ()


# R-Adapter's own average, of a thousand steps, would hardly leave where a short training starts.
AVERAGED = RAdapterConfig(average_decay=0.9)
MPM_NCE = {"flyp": {"positives": "positive", "label_smoothing": 0.02, "margin": 0.05}}  # of the release
PROBE = "linear-probe"  # whose rate is that of a head that is trained first
FULL = "full"  # whose rates are those of a soup
LORA = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
METHODS = {
    PROBE: Method(probe=True),
    "lp-ft": Method(head_first=True),
    FULL: Method(after=AFTER),
    "full+soup": Method(soup=True),
    "full+similarity": Method(loss="similarity"),
    "full+lipsum-ft": Method(loss="lipsum"),
    "full+car-ft": Method(loss="context"),
    "full+ldifs": Method(loss="features"),
    "full+l2-sp": Method(loss="weights"),
    "flyp": Method(settings={"task": "flyp"}),
    "flyp+starft": Method(loss="spuriosity", settings={"task": "flyp"}),
    "lora": Method(LORA),
    "lora+similarity": Method(LORA, loss="similarity"),
    "aclip": Method(ACLIPConfig()),
    "radapter": Method(AVERAGED),
    "radapter+mpm-nce": Method(AVERAGED, settings={"task": MPM_NCE}),
    "saft": Method(SAFTConfig()),
    "saft+similarity": Method(SAFTConfig(), loss="similarity"),
    "context+ogen": Method(ogen=True, after=()),  # token vectors are not linear in their change
}
SCOPES: dict[str, Any] = {
    "global": {"scope": "global", "exclude_input_embeddings": False},
    "global-inner": {"scope": "global", "exclude_input_embeddings": True},
    "per-tensor": {"scope": "per_tensor", "exclude_input_embeddings": False},
}
SAFT_VARIANTS = {
    f"saft-{name}-{density:g}": Method(SAFTConfig(density=density, **scope))
    for name, scope in SCOPES.items()
    for density in (1e-4, 1e-3, 1e-2)
}
ALL_METHODS = {**METHODS, **SAFT_VARIANTS}
DEFAULT_METHODS = [name for name, method in METHODS.items() if not method.ogen]  # it needs new_class_names
LOSSES: dict[str, dict[str, Any]] = {name: {} for name in TERMS if name != "ogen"} | {"similarity": {"weight": 10.0}}
CACHEABLE = ("similarity", "context")  # losses that compare nothing but embeddings of images with those of θ₀
