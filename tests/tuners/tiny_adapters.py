# SPDX-License-Identifier: Apache-2.0
"""Saved adapters of a few numbers, which load in a millisecond."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from hf_robust import ACLIPConfig, SAFTConfig, select_saft
from hf_robust.errors import HfRobustError
from hf_robust.tuners.files import CONFIG_FILE, WEIGHTS_FILE

from ..methods import same_bits
from .bad_files import read_config

INPUTS = torch.tensor([[1.0, -2.0], [0.5, 3.0]])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.b(self.a(inputs).tanh())


@dataclass(frozen=True, repr=False)
class Tiny:
    """A saved adapter of a few numbers."""

    folder: Path
    base: Pair
    config: type[PeftConfig]
    outputs: Tensor
    config_file: dict
    weights: bytes

    def restore(self) -> None:
        """Makes the folder whole again."""
        (self.folder / CONFIG_FILE).write_text(json.dumps(self.config_file))
        (self.folder / WEIGHTS_FILE).write_bytes(self.weights)

    def load(self) -> Tensor:
        """Predictions with what is in the folder now."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of older files, and of settings that PEFT does not know
            self.config.from_pretrained(str(self.folder))
            return predict(PeftModel.from_pretrained(copy.deepcopy(self.base), self.folder))

    def is_refused_or_same(self) -> bool:
        try:
            return same_bits(self.load(), self.outputs)
        except HfRobustError:
            return True


@torch.no_grad()
def predict(model: nn.Module) -> Tensor:
    return model.eval()(INPUTS)


CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "SAFT": lambda: SAFTConfig(density=0.2, score="magnitude"),
    "A-CLIP": lambda: ACLIPConfig(target_modules=["b"]),
}


def save_tiny(method: str, folder: Path) -> Tiny:
    base = Pair().eval()
    model = get_peft_model(copy.deepcopy(base), CONFIGS[method]())
    if method == "SAFT":
        select_saft(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    model.save_pretrained(folder)
    config = {name: value for name, value in read_config(folder).items() if value is not None}
    weights = (folder / WEIGHTS_FILE).read_bytes()
    found = Tiny(folder, base, type(model.peft_config["default"]), predict(model), config, weights)
    found.restore()  # without the settings that say nothing
    assert not same_bits(found.outputs, predict(base)) and same_bits(found.load(), found.outputs)
    return found
