# SPDX-License-Identifier: Apache-2.0
"""Identities through RobustTrainer: kinds of fine-tuning, resuming, ranks, the similarity loss and WiSE-FT."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_robust.errors import ConfigError, DataError
from hf_robust.interpolation.adapters import wise_ft
from tests.programs import run_on_ranks
from tests.tiny_models import image_dataset, tiny_model
from tests.trainers import build, entries, same, weights

NAMES = ["30", "7", "ann"]
SETTINGS = {"task": {"identities": {"loss": "arcface", "scale": 4.0, "images_per_identity": 2}}}


HELD = {"similarity": {"weight": 20.0}}


def people(images=18, names=NAMES, seed=0):
    """Pictures that do not show whose they are: there is something to learn."""
    dataset = image_dataset(images, names, seed=seed)
    labels = torch.randperm(images, generator=torch.Generator().manual_seed(seed)) % len(names)
    return dataset.remove_columns("label").add_column("identity", [names[label] for label in labels])


def of(folder, method="full", **settings):
    sets = {"train_dataset": people(), "eval_dataset": {"others": people(12, ["bob", "eve"], seed=5)}}
    return build(folder, method, **{**sets, **SETTINGS, **settings})


@pytest.mark.parametrize("method", ["full", "saft", "aclip", "lora"])
def test_resumed_run_ends_bit_identical(tmp_path, method):
    how = {"save_strategy": "steps", "save_steps": 5}
    whole = of(tmp_path, method, **how)  # 4 steps an epoch
    before = weights(whole)
    whole.train()
    resumed = of(tmp_path, method, **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    trained = weights(whole)
    assert all(not torch.equal(trained[name], start) for name, start in before.items() if name == "head.W")
    assert sum(not torch.equal(trained[name], before.get(name, torch.zeros(()))) for name in trained) > 1
    assert same(trained, weights(resumed)) and same(entries(whole), entries(resumed))


def test_other_identities_are_evaluated_and_wise_ft_leaves_the_head_alone(tmp_path):
    trainer = of(tmp_path)
    start = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    zero_shot = trainer.evaluate()
    trainer.train()
    head, tuned = trainer.model.head.W.clone(), trainer.evaluate()
    assert {f"eval_others_{name}" for name in trainer.model.metrics} <= tuned.keys()
    assert tuned["eval_others_loss"] == 1 - tuned["eval_others_mAP@R"] != zero_shot["eval_others_loss"]
    sweep = trainer.wise_ft_sweep(people(12, ["bob", "eve"], seed=6), alphas=(0.0, 1.0), metric="mAP@R")
    assert sweep.rows[0]["others_mAP@R"] == zero_shot["eval_others_mAP@R"]
    assert sweep.rows[1]["others_mAP@R"] == tuned["eval_others_mAP@R"]
    wise_ft(trainer.model, 0.0, trainer.zero_shot)
    assert all(torch.equal(t, start[name]) for name, t in trainer.model.state_dict().items() if name != "head.W")
    assert torch.equal(trainer.model.head.W, head)
    embeds = trainer.predict(people(12, ["bob", "eve"], seed=5)).predictions
    torch.testing.assert_close(torch.as_tensor(embeds).norm(dim=1), torch.ones(12))


def test_the_similarity_loss_holds_embeddings_with_its_cache_and_without(tmp_path):
    def moved(**settings):
        trainer = of(tmp_path, max_steps=6, **settings)
        before = torch.as_tensor(trainer.predict(people()).predictions)
        trainer.train()
        return trainer, (torch.as_tensor(trainer.predict(people()).predictions) - before).norm().item()

    (_, free), (held, near) = moved(), moved(losses=HELD)
    cached, _ = moved(losses=HELD, cache_reference_embeddings=True)
    assert near < 0.8 * free
    for name, tensor in weights(held).items():
        torch.testing.assert_close(tensor, weights(cached)[name], atol=1e-3, rtol=0)


def test_what_cannot_be_learned_from_is_refused_before_any_step(tmp_path):
    identities = people()["identity"]
    rows = [row for row, one in enumerate(identities) if one != "7"] + [identities.index("7")]
    with pytest.raises(DataError, match=r"1 of 3 identities have fewer than two images.*'7'"):
        of(tmp_path, train_dataset=people().select(rows)).train()
    with pytest.raises(ConfigError, match="identities have no class names in words"):
        of(tmp_path, class_names=NAMES)
    with pytest.raises(ConfigError, match="does not hold whole identities"):
        of(tmp_path, task={"identities": {"images_per_identity": 3}}).train()
    text = get_peft_model(tiny_model("clip"), LoraConfig(target_modules=r"text_model.*q_proj"))
    with pytest.raises(ConfigError, match="the adapter is frozen"):
        of(tmp_path, "full", model=text).train()


TWO_RANKS = """
import torch
from hf_robust.training.saving import SavingTrainer
from tests.training.test_identities_trainer import of, people
from tests.trainers import weights


def main(folder):
    how = {"save_strategy": "steps", "save_steps": 3, "num_train_epochs": 3}  # 2 steps an epoch
    whole = of(folder, **how)
    seen, starts, step, prepare = [], [], whole.training_step, whole.model.prepare

    def training_step(model, batch, *rest):
        seen.append(batch["labels"].tolist())
        return step(model, batch, *rest)

    def prepared(*args):
        prepare(*args)
        starts.append(whole.model.head.W.detach().clone())

    whole.training_step, whole.model.prepare = training_step, prepared
    whole.train()
    resumed = of(folder, **how)
    resumed.train(resume_from_checkpoint=f"{folder}/checkpoint-3")
    found = {"start": starts[0], "seen": seen, "weights": weights(whole), "resumed": weights(resumed)}
    torch.save(found, f"{folder}/rank{whole.args.process_index}.pt")
"""


def test_two_ranks_share_the_head_and_the_batches(tmp_path):
    run_on_ranks(2, TWO_RANKS, tmp_path)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    assert same(first["weights"], second["weights"]) and torch.equal(first["start"], second["start"])
    assert same(first["weights"], first["resumed"]) and same(second["weights"], second["resumed"])
    one = of(tmp_path / "one")
    one.model.prepare(one._training_set_in_order, one.accelerator)
    torch.testing.assert_close(first["start"], one.model.head.W.detach(), atol=1e-6, rtol=0)
    for batch in first["seen"] + second["seen"]:
        assert sorted(batch.count(label) for label in set(batch)) == [2, 2]
    assert first["seen"] != second["seen"]
