# SPDX-License-Identifier: Apache-2.0
"""RobustTrainer on images with texts, and on class names as FLYP learns them."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from hf_robust import SAFTConfig, wise_ft
from hf_robust.errors import ConfigError, DataError
from hf_robust.losses import SimilarityLoss
from hf_robust.tasks.pairs import ImageTextPairs
from tests.programs import run_on_ranks
from tests.tiny_models import image_dataset, synthetic_picture, tiny_model, tiny_processor
from tests.trainers import NAMES, build, entries, same, weights

COLOURS, THINGS = ["red", "green", "blue", "grey"], ["ox", "cat", "dog"]


def captioned(n: int, seed: int = 0) -> Dataset:
    """Pictures with one or two texts each."""
    pictures = [synthetic_picture(index, n, 40, seed + index) for index in range(n)]
    texts = [[f"a {COLOURS[i % 4]} {THINGS[i % 3]}", f"{THINGS[i % 3]} {i % 5}"][: 1 + i % 2] for i in range(n)]
    return Dataset.from_dict({"image": pictures, "text": texts})


def pairs(folder, method="full", **settings):
    given = {"train_dataset": captioned(10), "eval_dataset": {"validation": captioned(6, seed=50)}}
    return build(folder, method, **{**given, "num_train_epochs": 1, **settings})


@pytest.mark.parametrize("method", ["full", "saft", "aclip", "lora"])
def test_resumed_run_of_pairs_ends_bit_identical(tmp_path, method):
    settings = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    settings["gradient_accumulation_steps"] = 2
    whole = pairs(tmp_path, method, **settings)
    before = whole.evaluate()
    whole.train()
    assert isinstance(whole.model, ImageTextPairs) and whole.state.global_step == 3
    assert whole.evaluate() != before
    resumed = pairs(tmp_path, method, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(weights(whole), weights(resumed)) and same(entries(whole), entries(resumed))
    assert set(ImageTextPairs.metrics) <= {name.removeprefix("eval_validation_") for name in before}


@pytest.mark.parametrize("task", ["pairs", "flyp"])
def test_micro_batches_are_one_batch(tmp_path, task):
    settings = {"task": task, "optim": "sgd", "learning_rate": 1e-3}
    labelled = {"train_dataset": image_dataset(10, NAMES), "eval_dataset": None, "templates": ["a {}", "the {}"]}
    settings |= {} if task == "pairs" else labelled
    big = pairs(tmp_path, per_device_train_batch_size=4, **settings)
    start = weights(big)
    big.train()
    small = pairs(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, **settings)
    seen = []
    small.model.model.vision_model.register_forward_hook(lambda module, args, out: seen.append(len(out[0])))
    small.train()
    assert big.state.global_step == small.state.global_step == 3 and max(seen) == 2
    found, expected = weights(small), weights(big)
    assert not same(start, expected)
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-6)


def test_a_row_gives_one_of_its_texts_drawn_anew_in_every_epoch(tmp_path):
    given: list[list[int]] = []

    class Seen(ImageTextPairs):
        def forward(self, **inputs):
            if self.training:
                given.append(inputs["input_ids"].tolist())
            return super().forward(**inputs)

    rows = Dataset.from_dict({**captioned(4).to_dict(), "text": [["a", "b", "c", "d"], ["e"], ["f"], ["g"]]})
    rows = rows.cast(captioned(4).features)
    model = Seen(tiny_model("clip"), tiny_processor("clip"))
    pairs(tmp_path, model=model, train_dataset=rows, num_train_epochs=6, learning_rate=0.0).train()
    assert len({str(sorted(batch)) for batch in given}) > 1


def test_scale_is_capped_in_what_is_saved_and_not_decayed(tmp_path):
    trainer = pairs(tmp_path, max_steps=1, weight_decay=0.1)
    with torch.no_grad():
        trainer.model.model.logit_scale.fill_(4.6051)
    trainer.train()
    groups = trainer.optimizer.param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    scale = trainer.model.model.logit_scale
    assert scale <= torch.tensor(100.0).log() and id(scale) not in decayed and decayed
    with torch.no_grad():
        scale.fill_(5.0)
    trainer.callback_handler.on_optimizer_step(trainer.args, trainer.state, trainer.control)
    assert scale <= torch.tensor(100.0).log()


@pytest.mark.parametrize("task", ["pairs", {"flyp": {"positives": "positive"}}])
def test_sweep_chooses_alpha_and_gives_the_zero_shot_model_back(tmp_path, task):
    settings = {"task": task}
    if task != "pairs":
        validation = {"validation": image_dataset(7, NAMES, seed=50)}
        settings |= {
            "train_dataset": image_dataset(10, NAMES),
            "eval_dataset": validation,
            "templates": ["a {}", "{}"],
        }
    trainer = pairs(tmp_path, "saft", **settings)
    zero_shot = trainer.evaluate()
    trainer.train()
    metric = trainer.model.metrics[0]
    sweep = trainer.wise_ft_sweep(alphas=(0.0, 1.0), metric=metric)
    assert sweep.rows[0][f"validation_{metric}"] == zero_shot[f"eval_validation_{metric}"]
    wise_ft(trainer.model, 0.0, trainer.zero_shot)
    assert trainer.evaluate()["eval_validation_loss"] == zero_shot["eval_validation_loss"]


def test_what_teaches_nothing_is_refused(tmp_path):
    for task, sets in (("pairs", {}), ("flyp", {"train_dataset": image_dataset(6, NAMES), "eval_dataset": None})):
        with pytest.raises(ConfigError, match="an image by itself.*got 1; allowed 2 images"):
            pairs(tmp_path, task=task, per_device_train_batch_size=1, **sets)
    with pytest.raises(DataError, match="one image"):
        pairs(tmp_path, train_dataset=captioned(4).select([0]), eval_dataset=None).train()
    with pytest.raises(ConfigError, match="no class names in words .at templates, head.: got .*'frozen'"):
        pairs(tmp_path, templates="a {}", head="frozen")
    same_texts = captioned(4).map(lambda row: {"text": ["an ox"]})
    with pytest.raises(DataError, match="all texts are the same"):
        pairs(tmp_path, train_dataset=same_texts, eval_dataset=None).train()
    both = captioned(4).add_column("label", [0, 1, 0, 1])
    with pytest.raises(DataError, match="label.*and text|text.*and label"):
        pairs(tmp_path, train_dataset=both, eval_dataset=None)
    long = captioned(4).map(lambda row: {"text": [100 * "ox "]})
    with pytest.raises(DataError, match="4 of 4 texts are longer"):
        pairs(tmp_path, train_dataset=long, eval_dataset=None)
    with pytest.raises(ConfigError, match="nothing to be told apart"):
        model = get_peft_model(tiny_model("clip"), SAFTConfig(density=0.01, score="fisher"))
        pairs(tmp_path, model=model).train()


TWO_RANKS = """
import torch
from tests.tasks import pairs_on_ranks
from tests.trainers import entries, weights
from tests.training.test_pairs_trainer import TASKS, pairs

def main(folder):
    pairs_on_ranks.main(folder)  # in the same processes, which take long to start
    result = {}
    for name, settings in TASKS.items():
        trainer = pairs(folder, per_device_train_batch_size=2, **settings)
        trainer.train()
        metrics = {key: value for key, value in trainer.evaluate().items() if "recall" in key or "accuracy" in key}
        result[name] = {"weights": weights(trainer), "entries": entries(trainer), "metrics": metrics}
    torch.save(result, f"{folder}/rank{trainer.args.process_index}.pt")
"""
COMMON = {"train_dataset": captioned(12), "optim": "sgd", "learning_rate": 1e-2, "selection_batch_size": 3}
TASKS = {
    "all texts": {**COMMON, "task": {"pairs": {"texts": "all", "contrastive_chunk_size": 1}}},
    "saft": {**COMMON, "task": "pairs", "method": "saft"},
    "flyp": {
        **COMMON,
        "task": "flyp",
        "templates": ["a {}", "the {}"],
        "train_dataset": image_dataset(12, NAMES),
        "eval_dataset": {"validation": image_dataset(7, NAMES, seed=50)},
    },
}


def test_two_ranks_train_as_one_process_does(tmp_path):
    run_on_ranks(2, TWO_RANKS, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for name, settings in TASKS.items():
        one = pairs(tmp_path, per_device_train_batch_size=4, **settings)
        start = weights(one)
        one.train()
        assert same(first[name]["weights"], second[name]["weights"])
        assert same(first[name]["entries"], entries(one))
        assert first[name]["metrics"] == second[name]["metrics"]
        metrics = one.evaluate()
        for metric, value in first[name]["metrics"].items():
            assert value == pytest.approx(metrics[metric]), metric
        assert not same(start, weights(one))
        for parameter, value in first[name]["weights"].items():
            torch.testing.assert_close(value, weights(one)[parameter], rtol=1e-4, atol=2e-6)


def test_terms_of_the_loss_are_the_same_in_chunks(tmp_path):
    logs = []
    for size in (None, 2):
        task = {"pairs": {"contrastive_chunk_size": size}}
        settings = {"task": task, "losses": [SimilarityLoss(towers="both")], "max_steps": 2}
        trainer = pairs(tmp_path, "saft", logging_strategy="steps", logging_steps=1, **settings)
        trainer.train()
        logs.append({key: value for key, value in trainer.state.log_history[1].items() if key.startswith("loss")})
    assert logs[0]["loss_similarity_vision"] > 0 and logs[0]["loss_similarity_text"] > 0
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)
