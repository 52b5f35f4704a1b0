# SPDX-License-Identifier: Apache-2.0
"""What `--method` names: the model as it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

from peft import LNTuningConfig, LoraConfig, PeftConfig, get_peft_model
from torch import nn

from ..errors import ConfigError, HfRobustError
from ..scripting.arguments import setting
from ..tuners.aclip import ACLIPConfig
from ..tuners.radapter import RAdapterConfig
from ..tuners.saft import SAFTConfig

MethodName = Literal["zero_shot", "full", "saft", "aclip", "radapter", "lora", "ln_tuning"]
GROUP = "method"


@dataclass
class MethodArguments:
    """Which method, and its settings."""

    method: MethodName = setting("saft", "What is trained.", GROUP)
    target_modules: list[str] | None = setting(None, "Adapters: which modules.", GROUP)
    density: float = setting(0.001, "saft: share of the parameters to train.", GROUP)
    score: str = setting("signed_mean", "saft: what ranks the parameters.", GROUP)
    scope: str = setting("global", "saft: rank all at once, or per_tensor.", GROUP)
    towers: str = setting("both", "saft, aclip, radapter: both, vision or text.", GROUP)
    exclude_input_embeddings: bool = setting(True, "saft: none in patch, token embeddings.", GROUP)
    radapter_rank: int | None = setting(None, "radapter: rank, by default full.", GROUP)
    average_decay: float = setting(0.999, "radapter: 0.9 for a short training.", GROUP)
    lora_rank: int = setting(8, "lora: rank.", GROUP)


def add_method(model: nn.Module, args: MethodArguments) -> nn.Module:
    """Returns the model with the method's adapter; `zero_shot` and `full` have none.

    Args:
        model: a dual encoder.
        args: which method, and its settings.

    Raises:
        ConfigError: a setting is wrong.

    Example:
        >>> type(add_method(clip, MethodArguments("aclip"))).__name__
        'PeftModel'
    """
    config = _config(model, args)
    if config is None:
        return model
    try:
        return get_peft_model(model, config)
    except HfRobustError:
        raise
    except ValueError as error:  # PEFT's, for a rank of 0 or modules that are not there
        raise ConfigError(f"no adapter can be added ({error})", where="method", got=args.method) from error


def _config(model: nn.Module, args: MethodArguments) -> PeftConfig | None:
    where: dict[str, Any] = {"towers": args.towers, "target_modules": args.target_modules}
    if args.method == "saft":
        how: Any = {"exclude_input_embeddings": args.exclude_input_embeddings, "scope": args.scope}
        return SAFTConfig(density=args.density, score=args.score, **how, **where)  # type: ignore[arg-type]
    if args.method == "aclip":
        return ACLIPConfig(**where)
    if args.method == "radapter":
        return RAdapterConfig(r=args.radapter_rank, average_decay=args.average_decay, **where)
    if args.method == "lora":
        targets = args.target_modules or "all-linear"
        return LoraConfig(r=args.lora_rank, lora_alpha=2 * args.lora_rank, target_modules=targets)
    if args.method == "ln_tuning":
        norms = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
        return LNTuningConfig(target_modules=norms)
    if args.method not in ("zero_shot", "full"):
        allowed = ", ".join(get_args(MethodName))
        raise ConfigError("unknown method", where="method", got=args.method, allowed=allowed)
    return None
