# SPDX-License-Identifier: Apache-2.0
"""How long looking at an adapter's files takes, compared with loading and saving without a look.

    python examples/benchmarks/load_adapter.py --rounds 7

A randomly initialised CLIP of ViT-B/32's shapes, with SAFT at 0.1 % and with A-CLIP. Loading is `from_pretrained` of
the base and of the adapter; without checks, the digests and the description of the base are neither made nor compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import CLIPConfig, CLIPModel

from hf_robust import ACLIPConfig, SAFTConfig, saft_unselected, select_saft
from hf_robust.scripting.run import run
from hf_robust.scripting.timing import Step, interleaved_medians, print_medians

METHODS: dict[str, Callable[[], PeftConfig]] = {
    "SAFT 0.1 %": lambda: SAFTConfig(density=0.001, score="random"),
    "A-CLIP": ACLIPConfig,
}


@contextmanager
def without_checks() -> Iterator[None]:
    """Takes every check of an adapter's files away."""
    replaced = {
        "config.check_files": None,
        "loading.check_seal": None,
        "loading.check_base": None,
        "base.digest": "00" * 32,
        "base.fingerprint": {},
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch(f"hf_robust.tuners.{name}", return_value=value))
        yield


def unchecked(step: Step) -> Step:
    """The same without checks."""

    def run() -> None:
        with without_checks():
            step()

    return run


def trained(base: CLIPModel, config: PeftConfig) -> nn.Module:
    """The base with an adapter that changes something."""
    model = get_peft_model(base, config)
    if saft_unselected(model):
        select_saft(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-3)
    return model


@dataclass
class ScriptArguments:
    """How long looking at an adapter's files takes."""

    rounds: int = 7
    threads: int = field(default_factory=torch.get_num_threads)


def main(arguments: ScriptArguments) -> None:
    """Times loading and saving."""
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        CLIPModel(CLIPConfig()).save_pretrained(folder / "base")  # its defaults are ViT-B/32
        for method, config in METHODS.items():
            model = trained(CLIPModel.from_pretrained(folder / "base"), config())
            model.save_pretrained(folder / method)

            def load(method: str = method) -> None:
                PeftModel.from_pretrained(CLIPModel.from_pretrained(folder / "base"), folder / method)

            def save(model: nn.Module = model) -> None:
                model.save_pretrained(folder / "again")

            for task, step in (("loading", load), ("saving", save)):
                medians = interleaved_medians({"unchecked": unchecked(step), "checked": step}, arguments.rounds)
                print_medians(f"{task} {method}", medians, "unchecked")


if __name__ == "__main__":
    run(main, ScriptArguments)
