# SPDX-License-Identifier: Apache-2.0
"""A merged model is a model of transformers, for people who do not have this package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModel

from ..methods import batch
from ..programs import run_programs
from .models import MODELS, all_models, embeds

WITHOUT_US = """
import sys
import torch
from transformers import AutoModel
inputs = torch.load(sys.argv[1])
for folder in sys.argv[2:]:
    with torch.no_grad():
        torch.save(AutoModel.from_pretrained(folder)(**inputs).logits_per_image, folder + "/found.pt")
assert not [name for name in sys.modules if name.startswith("hf_robust")]
"""


@all_models
def test_a_merged_model_is_saved_and_loaded_as_any(build: Callable[[], PeftModel], tmp_path: Path) -> None:
    model = build()
    expected = embeds(model)
    with model.disable_adapter():
        assert not torch.allclose(embeds(model), expected, atol=1e-4)
    model.merge_and_unload().save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded).__name__ == "CLIPModel"
    torch.testing.assert_close(embeds(loaded), expected, rtol=0, atol=1e-6)


def test_without_this_package(tmp_path: Path) -> None:
    inputs = {name: tensor for name, tensor in batch("clip").items() if name != "labels"}
    torch.save(inputs, tmp_path / "inputs.pt")
    expected = {}
    for name, build in MODELS.items():
        model = build()
        with torch.no_grad():
            expected[name] = model(**inputs).logits_per_image
        model.merge_and_unload().save_pretrained(tmp_path / name)
    folders = [str(tmp_path / name) for name in MODELS]
    run_programs([sys.executable, "-c", WITHOUT_US, str(tmp_path / "inputs.pt"), *folders])
    for name, logits in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / name / "found.pt"), logits, rtol=1e-5, atol=1e-5)
