# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import datasets
import torch
from safetensors.torch import load_file

from hf_robust.commands import train as command
from hf_robust.scripting.arguments import parse_arguments
from tests.examples.scripts import load_script
from tests.tiny_models import image_dataset, tiny_model, tiny_processor


def test_the_script_trains_what_the_command_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_model("clip").save_pretrained(tmp_path / "model")
    tiny_processor("clip").save_pretrained(tmp_path / "model")
    image_dataset(12, ["red", "green", "blue"]).to_parquet(tmp_path / "photos.parquet")
    flags = [str(tmp_path / "photos.parquet"), "--model_name_or_path", str(tmp_path / "model"), "--method", "lora"]
    found = []
    for name, main in (("script", load_script("train", monkeypatch).main), ("command", command.main)):
        more = ["--output_dir", str(tmp_path / name), "--max_steps", "2"]
        main(*parse_arguments(command.TYPES, flags=[*flags, *more]))
        found.append(load_file(tmp_path / name / "adapter_model.safetensors"))
        assert "Accuracy in %" in capsys.readouterr().out
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())
