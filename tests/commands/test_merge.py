# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from hf_robust import ACLIPConfig, SAFTConfig, select_saft, with_image_size
from hf_robust.commands import merge as merging
from hf_robust.errors import AdapterFileError, ConfigError, DataError, MergeError
from hf_robust.interpolation.arithmetic import interpolate_tensor
from hf_robust.scripting.arguments import parse_arguments
from tests.tiny_models import tiny_model, tiny_processor


@pytest.fixture
def merge(monkeypatch, tmp_path):
    """The command line of the script, beside the folder `base` of a model and its processor."""
    monkeypatch.chdir(tmp_path)
    tiny_model("clip").save_pretrained("base")
    tiny_processor("clip").save_pretrained("base")

    def run(*flags, zero_shot="base", output="merged"):
        flags = ["--zero_shot", zero_shot, "--output", output, *flags]
        merging.main(*parse_arguments(merging.TYPES, flags=flags))

    return run


def save_adapter(folder, config, dtype=torch.float32):
    """Writes an adapter with values that change the model; returns the state dict of the model merged with it."""
    model = get_peft_model(tiny_model("clip").to(dtype), copy.deepcopy(config))
    if isinstance(config, SAFTConfig):
        select_saft(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.merge_and_unload().state_dict()


def state(folder):
    return AutoModel.from_pretrained(folder).state_dict()


def oracle(fine_tuned, alpha):
    zero_shot = tiny_model("clip").state_dict()
    return {
        name: (1 - alpha) * zero_shot[name].double() + alpha * tensor.double() for name, tensor in fine_tuned.items()
    }


def assert_close(folder, expected):
    got = state(folder)
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)


CONFIGS = {
    "saft": SAFTConfig(density=0.05, score="random"),
    "aclip": ACLIPConfig(),
    "lora": LoraConfig(r=2, target_modules=["q_proj", "fc1"], modules_to_save=["visual_projection"]),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_goes_part_of_the_way(merge, method, capsys):
    fine_tuned = save_adapter("adapter", CONFIGS[method])
    merge("--fine_tuned", "adapter", "--alpha", "0.25", "0", "1")
    folders = {0.25: "merged/alpha=0.250", 0.0: "merged/alpha=0.000", 1.0: "merged/alpha=1.000"}
    assert capsys.readouterr().out.splitlines() == [f"alpha {alpha:g}: {folder}" for alpha, folder in folders.items()]
    for alpha, folder in folders.items():
        assert_close(folder, oracle(fine_tuned, alpha))
    base, start, quarter = state("base"), state(folders[0.0]), state(folders[0.25])
    assert all(torch.equal(start[name], base[name]) for name in base)
    assert not all(torch.equal(quarter[name], base[name]) for name in base)
    AutoProcessor.from_pretrained(folders[0.25])
    assert sorted(os.listdir("merged")) == sorted(Path(folder).name for folder in folders.values())
    assert not list(Path(folders[0.25]).glob("adapter*"))


@pytest.mark.parametrize("place", ["adapter/processor", "adapter"])
def test_the_processor_of_the_adapter_comes_before_that_of_the_base(merge, place):
    """In its own folder, or beside the adapter, as early versions wrote it."""
    save_adapter("adapter", CONFIGS["lora"])
    with_image_size(tiny_processor("clip"), 64, tiny_model("clip")).save_pretrained(place)
    merge("--fine_tuned", "adapter")
    assert AutoProcessor.from_pretrained("merged").image_processor.crop_size["height"] == 64
    assert not Path("merged/processor").exists()


def test_all_files_may_be_read_by_whom_the_folder_may(merge):
    """The safetensors library writes a file that only its owner may read."""
    save_adapter("tuned", CONFIGS["lora"])
    merge("--fine_tuned", "tuned")
    modes = {path.stat().st_mode & 0o777 for path in Path("merged").iterdir()}
    assert modes == {Path("merged").stat().st_mode & 0o666}


def dtypes(folder):
    return {tensor.dtype for tensor in load_file(Path(folder) / "model.safetensors").values()}


def halved(adapter):
    """The adapter with its values in bfloat16, as a user may have saved it."""
    file = Path(adapter) / "adapter_model.safetensors"
    tensors = {name: one.bfloat16() if one.is_floating_point() else one for name, one in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["aclip", "saft"])
def test_an_adapter_is_merged_in_the_precision_that_holds_both(merge, capsys, method, adapter):
    tiny_model("clip").bfloat16().save_pretrained("half")
    save_adapter("adapter", CONFIGS[method])
    if adapter == torch.bfloat16:
        halved("adapter")
        with pytest.raises(AdapterFileError, match="not those that were saved"):  # they are kept in float32
            merge("--fine_tuned", "adapter", zero_shot="half")
        return
    merge("--fine_tuned", "adapter", zero_shot="half")
    assert dtypes("merged") == {adapter}
    said = "zero-shot weights are bfloat16, fine-tuned ones float32: merged in float32\n"
    assert capsys.readouterr().out == said + "alpha 0.5: merged\n"


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [
        (torch.float16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
)
def test_whole_checkpoints_of_two_precisions_are_cast_up(merge, capsys, first, second, merged):
    tiny_model("clip").to(first).save_pretrained("zero")
    tiny_model("clip", seed=1).to(second).save_pretrained("full")
    merge("--fine_tuned", "full", "--alpha", "0.25", zero_shot="zero")
    names = [str(one).removeprefix("torch.") for one in (first, second, merged)]
    said = "zero-shot weights are {}, fine-tuned ones {}: merged in {}\n".format(*names)
    assert capsys.readouterr().out == said + "alpha 0.25: merged\n"
    model = AutoModel.from_pretrained("merged", dtype="auto")
    assert model.dtype == merged and dtypes("merged") == {merged}
    start, end = (AutoModel.from_pretrained(one, dtype=torch.float64).state_dict() for one in ("zero", "full"))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, interpolate_tensor(start[name], end[name], 0.25).to(merged))


def test_whole_checkpoints(merge, capsys):
    tiny_model("clip", seed=1).save_pretrained("full", max_shard_size="90KB")
    merge("--fine_tuned", "full")
    first, second = state("base"), state("full")
    for name, tensor in state("merged").items():
        assert torch.equal(tensor, interpolate_tensor(first[name], second[name], 0.5))
    assert capsys.readouterr().out == "alpha 0.5: merged\n"
    with pytest.raises(MergeError, match="not empty"):
        merge("--fine_tuned", "full", "--alpha", "0.1")
    merge("--fine_tuned", "full", "--alpha", "0.1", "--overwrite")
    assert torch.equal(
        state("merged")["logit_scale"], interpolate_tensor(first["logit_scale"], second["logit_scale"], 0.1)
    )


def test_fisher_information(merge):
    tiny_model("clip", seed=1).save_pretrained("full")
    name = "visual_projection.weight"
    first, second = state("base")[name], state("full")[name]
    fishers = torch.rand_like(first), torch.rand_like(first)
    for file, fisher in zip(("f0", "f1"), fishers, strict=True):
        save_file({name: fisher}, file)
    merge("--fine_tuned", "full", "--fisher", "f0", "f1")
    assert torch.equal(state("merged")[name], interpolate_tensor(first, second, 0.5, fishers))
    save_adapter("adapter", CONFIGS["aclip"])
    with pytest.raises(ConfigError, match="not adapters"):
        merge("--fine_tuned", "adapter", "--fisher", "f0", "f1", output="other")


def test_a_head_trained_beside_an_adapter(merge):
    save_adapter("adapter", CONFIGS["lora"])
    heads = [{"class_head.weight": torch.randn(2, 24)} for _ in range(2)]
    Path("adapter/classifier.json").write_text(json.dumps({"class_names": ["x", "y"]}))
    save_file(heads[1], "adapter/classifier.safetensors")
    with pytest.raises(MergeError, match="only one.*trained head.*at base.*that has not trained"):
        merge("--fine_tuned", "adapter")
    save_file(heads[0], "base/classifier.safetensors")
    merge("--fine_tuned", "adapter", "--alpha", "0.25")
    merged = load_file("merged/classifier.safetensors")["class_head.weight"]
    assert torch.equal(merged, interpolate_tensor(*(head["class_head.weight"] for head in heads), 0.25))
    assert json.loads(Path("merged/classifier.json").read_text()) == {"class_names": ["x", "y"]}


def test_a_name_of_the_hub_is_downloaded_without_pickles(merge, monkeypatch):
    asked = []
    monkeypatch.setattr(merging, "snapshot_download", lambda name, **only: asked.append((name, only)) or "base")
    tiny_model("clip", seed=1).save_pretrained("full")
    merge("--fine_tuned", "full", zero_shot="owner/model")
    (name, only), patterns = asked[0], asked[0][1]["allow_patterns"]
    assert name == "owner/model" and only.keys() == {"allow_patterns"}
    assert not any(Path(file).match(one) for one in patterns for file in ("pytorch_model.bin", "x.py", "x.pt"))
    assert state("merged").keys() == state("base").keys()


def test_bad_input_leaves_no_output(merge):
    save_adapter("adapter", CONFIGS["saft"])
    for flags, error, message in [
        (["--alpha", "1.5"], ConfigError, "alpha"),
        (["--alpha", "0.1", "0.1"], ConfigError, "two alphas"),
        (["--alpha", "0.1", "0.1001"], ConfigError, "two alphas"),
    ]:
        with pytest.raises(error, match=message):
            merge("--fine_tuned", "adapter", *flags)
    with pytest.raises(MergeError, match="overlap"):
        merge("--fine_tuned", "adapter", output="adapter/merged")
    with pytest.raises(MergeError, match="no such folder"):
        merge("--fine_tuned", "nowhere")
    with pytest.raises(ConfigError, match="no such folder.*zero_shot.*'no/where'"):
        merge("--fine_tuned", "adapter", zero_shot="no/where")
    with pytest.raises(ConfigError, match="not given.*fine_tuned"):
        merge()
    assert sorted(os.listdir()) == ["adapter", "base"]
    PeftModel.from_pretrained(tiny_model("clip"), "adapter")


@pytest.mark.parametrize("flags", [["--fine_tuned"], ["--soup"]], ids=["merge", "soup"])
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_what_a_card_cannot_be_made_of_leaves_no_output(merge, kind, flags):
    flags = flags if kind == "full" and flags == ["--soup"] else ["--zero_shot", "base", *flags]
    save_adapter("adapter", CONFIGS["saft"]) if kind == "adapter" else tiny_model("clip", seed=1).save_pretrained(kind)
    for content, error, message in [
        ('{"task": "my_own"}', AdapterFileError, f"unknown task .at {kind}/classifier.json.: got 'my_own'"),
        ("[]", AdapterFileError, "no settings of a task"),
        ("{", DataError, "no valid JSON"),
    ]:
        Path(kind, "classifier.json").write_text(content)
        with pytest.raises(error, match=message):
            merging.main(*parse_arguments(merging.TYPES, flags=[*flags, kind, "--output", "merged"]))
    Path(kind, "classifier.json").unlink()
    processor = (
        Path("full/preprocessor_config.json") if kind == "full" else Path("adapter/processor/processor_config.json")
    )
    processor.parent.mkdir(exist_ok=True)
    processor.write_text("[]")
    with pytest.raises(DataError, match="malformed"):
        merging.main(*parse_arguments(merging.TYPES, flags=[*flags, kind, "--output", "merged"]))
    assert sorted(os.listdir()) == sorted([kind, "base"])


def test_an_output_in_a_file_is_refused(merge):
    Path("file").write_text("")
    for flags in (["--zero_shot", "base", "--fine_tuned", "base"], ["--soup", "base"]):
        with pytest.raises(ConfigError, match="cannot lie in a file .at output.: got 'file/x/y'"):
            merging.main(*parse_arguments(merging.TYPES, flags=[*flags, "--output", "file/x/y"]))
