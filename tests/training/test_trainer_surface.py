# SPDX-License-Identifier: Apache-2.0
"""Every argument of Trainer and every option of TrainingArguments: served, refused, or without effect."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments

from hf_robust.data.collator import ImageCollator
from hf_robust.errors import CheckpointError, ConfigError
from hf_robust.training.arguments import RobustTrainingArguments
from hf_robust.training.trainer import RobustTrainer
from hf_robust.training.unsupported import UNSUPPORTED, check_accelerator
from tests.tiny_models import image_dataset, tiny_model, tiny_processor
from tests.trainers import NAMES, build, same, weights

# The tests that see the effect of an argument of RobustTrainer.
ARGUMENTS = {
    "model": "test_a_classifier_may_be_given",
    "args": "test_arguments_are_those_of_the_package_by_default",
    "data_collator": "test_another_collator_makes_the_batches",
    "train_dataset": "test_selection_sees_every_image_once_in_order",
    "eval_dataset": "test_each_set_is_classified_among_its_own_classes",
    "processing_class": "test_processor_is_required",
    "model_init": "test_training_is_that_of_a_model_and_starts_anew_every_time",
    "compute_loss_func": "test_first_loss_is_the_one_documented",
    "compute_metrics": "test_metrics_get_inputs_and_losses",
    "callbacks": "test_best_model_is_loaded_at_the_end",
    "optimizers": "test_an_optimizer_may_be_given",
    "optimizer_cls_and_kwargs": "test_an_optimizer_may_be_given",
    "preprocess_logits_for_metrics": "test_logits_may_be_preprocessed",
    "class_names": "test_class_names_may_be_reworded",
    "losses": "test_ogen_weights_real_images_alone",
}

# The tests that see the effect of an option.
TESTED = {
    "label_smoothing_factor": "test_first_loss_is_the_one_documented",
    "fp16": "test_a_cpu_refuses_fp16",
    "bf16_full_eval": "test_half_precision_leaves_weights_and_training_as_they_are",
    "fp16_full_eval": "test_half_precision_leaves_weights_and_training_as_they_are",
    "activation_checkpointing": "test_gradient_checkpointing_changes_nothing",
    "activation_checkpointing_kwargs": "test_every_second_layer_may_be_checkpointed",
    "gradient_checkpointing": "test_every_second_layer_may_be_checkpointed",
    "gradient_checkpointing_kwargs": "test_every_second_layer_may_be_checkpointed",
    "eval_strategy": "test_evaluation_during_training_and_prediction",
    "eval_steps": "test_evaluation_comes_when_it_is_asked_for",
    "eval_delay": "test_evaluation_comes_when_it_is_asked_for",
    "eval_on_start": "test_evaluation_comes_when_it_is_asked_for",
    "per_device_eval_batch_size": "test_metrics_are_those_of_all_logits",
    "prediction_loss_only": "test_the_loss_alone_may_be_computed",
    "eval_do_concat_batches": "test_of_every_image_two_numbers_are_kept",
    "eval_accumulation_steps": "test_of_every_image_two_numbers_are_kept",
    "include_for_metrics": "test_metrics_get_inputs_and_losses",
    "batch_eval_metrics": "test_metrics_may_be_computed_batch_by_batch",
    "save_only_model": "test_a_checkpoint_without_optimizer_is_not_resumed",
    "load_best_model_at_end": "test_best_model_is_loaded_at_the_end",
    "metric_for_best_model": "test_best_model_is_loaded_at_the_end",
    "greater_is_better": "test_the_smaller_metric_may_be_the_better",
    "ignore_data_skip": "test_a_resumed_training_may_start_with_the_first_images",
    "restore_callback_states_from_checkpoint": "test_callbacks_may_be_resumed",
    "full_determinism": "test_full_determinism",
    "accelerator_config": "test_steps_may_be_accumulated_by_accelerate",
    "dataloader_drop_last": "test_the_last_batch_is_dropped_in_training_alone",
    "dataloader_num_workers": "test_workers_that_stay_answer_for_the_set_that_is_asked",
    "dataloader_persistent_workers": "test_workers_that_stay_answer_for_the_set_that_is_asked",
}

# Settings of an option that change the trained weights, and what is set in both of the trainings that are compared.
TRAINS = {
    "per_device_train_batch_size": ({"per_device_train_batch_size": 6}, {}),
    "num_train_epochs": ({"num_train_epochs": 2}, {"max_steps": -1, "num_train_epochs": 1}),
    "max_steps": ({"max_steps": 3}, {}),
    "learning_rate": ({"learning_rate": 1e-3}, {}),
    "lr_scheduler_type": ({"lr_scheduler_type": "constant"}, {}),
    "lr_scheduler_kwargs": ({"lr_scheduler_kwargs": {"power": 3}}, {"lr_scheduler_type": "polynomial"}),
    "warmup_steps": ({"warmup_steps": 1}, {}),
    "optim": ({"optim": "sgd"}, {}),
    "weight_decay": ({"weight_decay": 0.5}, {}),
    "adam_beta1": ({"adam_beta1": 0.5}, {}),
    "adam_beta2": ({"adam_beta2": 0.5}, {}),
    "adam_epsilon": ({"adam_epsilon": 1e-2}, {}),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, {}),
    "max_grad_norm": ({"max_grad_norm": 1e-3}, {"optim": "sgd"}),
    "bf16": ({"bf16": True}, {}),
    "seed": ({"seed": 7}, {}),
    "data_seed": ({"data_seed": 7}, {}),
    "train_sampling_strategy": ({"train_sampling_strategy": "sequential"}, {}),
    "class_weights": ({"class_weights": [1.0, 2.0, 3.0]}, {}),
}

# A value of each option that is refused; `UNSUPPORTED` has the reason.
REFUSED = {
    "torch_compile": True,
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "default",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rms_norm": True},
    "neftune_noise_alpha": 5.0,
    "train_sampling_strategy": "group_by_length",
    "include_num_input_tokens_seen": "all",
    "label_names": ["targets"],
    "eval_use_gather_object": True,
    "dataloader_in_order": False,
    "auto_find_batch_size": True,
    "optim": "adalomo",
    "optim_target_modules": ["q_proj"],
    "optim_args": "momentum=0.9",
    "deepspeed": "zero3.json",
    "parallelism_config": object(),
    "enable_jit_checkpoint": True,
    "save_on_each_node": True,
    "remove_unused_columns": True,
    "logging_nan_inf_filter": True,
}

DEVICE = "where and how fast it is computed, not what"
RANKS = "how ranks talk to each other"
LOGGING = "what is logged and where"
SAVING = "what is saved and when"
HUB = "what is pushed: tests/training/test_trainer_hub.py"
SCRIPTS = "Trainer does not read it; scripts may"
NO_EFFECT = {
    "tf32": "torch's switch for matrix products on GPUs; transformers refuses it without one",
    **dict.fromkeys(("use_cpu", "local_rank", "debug", "torch_empty_cache_steps"), DEVICE),
    **dict.fromkeys(("dataloader_pin_memory", "dataloader_prefetch_factor"), DEVICE),
    "dataloader_multiprocessing_context": DEVICE,
    "use_cache": "there are no past keys in a classifier",
    "length_column_name": "for the grouping by length that is refused",
    "average_tokens_across_devices": "ranks have equally many images, as even_batches=False is refused",
    **dict.fromkeys(("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"), RANKS),
    **dict.fromkeys(("ddp_static_graph", "ddp_backend", "ddp_timeout"), RANKS),
    **dict.fromkeys(("fsdp", "fsdp_config"), "where weights lie: tests/training/test_trainer_sharding.py"),
    **dict.fromkeys(
        ("output_dir", "logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node"), LOGGING
    ),
    **dict.fromkeys(("log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project"), LOGGING),
    **dict.fromkeys(("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"), LOGGING),
    "skip_memory_metrics": LOGGING,
    **dict.fromkeys(("save_strategy", "save_steps", "save_total_limit"), SAVING),
    **dict.fromkeys(("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy"), HUB),
    **dict.fromkeys(("hub_always_push", "hub_revision"), HUB),
    **dict.fromkeys(("do_train", "do_eval", "do_predict", "resume_from_checkpoint"), SCRIPTS),
}


def test_every_option_has_a_row():
    """A new version of transformers may bring options that nobody here has looked at."""
    served = [*TESTED, *TRAINS, *NO_EFFECT]
    assert len(set(served)) == len(served)
    assert {field.name for field in fields(TrainingArguments)} == {*served, *UNSUPPORTED} - {"class_weights"}
    assert REFUSED.keys() == UNSUPPORTED.keys() and not {*TESTED, *NO_EFFECT} & REFUSED.keys()


def test_every_argument_has_a_row():
    found, stock = (list(inspect.signature(cls.__init__).parameters)[1:] for cls in (RobustTrainer, Trainer))
    assert set(found) == ARGUMENTS.keys()
    assert found[: len(stock)] == stock  # in the same order


def test_the_tests_named_exist():
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in Path(__file__).parent.glob("test_*.py"))
    known = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert {*ARGUMENTS.values(), *TESTED.values()} <= known


# --- refused ---


@pytest.mark.parametrize("option", REFUSED)
def test_options_are_refused_with_the_reason(tmp_path, option):
    _, reason, remedy = UNSUPPORTED[option]
    args = RobustTrainingArguments(str(tmp_path), use_cpu=True)
    setattr(args, option, REFUSED[option])
    settings = {"processing_class": tiny_processor("clip"), "class_names": NAMES}
    for construct in (
        lambda: RobustTrainingArguments(str(tmp_path), **{option: REFUSED[option]}),
        lambda: RobustTrainer(tiny_model("clip"), args, **settings),
    ):
        with pytest.raises(ConfigError) as caught:
            construct()
        assert all(part in str(caught.value) for part in (reason, f"(at {option})", remedy))


def test_metrics_get_nothing_else(tmp_path):
    with pytest.raises(ConfigError, match=r"include_for_metrics.*\['logits'\].*'inputs', 'loss'"):
        RobustTrainingArguments(str(tmp_path), include_for_metrics=["inputs", "logits"])


def test_uneven_batches_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="fewer images.*accelerator_config.*even_batches=True"):
        build(tmp_path, accelerator_config={"even_batches": False})


def test_a_cpu_refuses_fp16(tmp_path):
    """It would be ignored without a word; on GPUs Trainer serves it."""
    with pytest.raises(ConfigError, match="float32 as if.*fp16.*bf16=True"):
        build(tmp_path, fp16=True)


def test_deepspeed_is_refused():
    accelerator = SimpleNamespace(even_batches=True, state=SimpleNamespace(deepspeed_plugin=object()))
    with pytest.raises(ConfigError, match=r"DeepSpeed is not tested.*accelerate launch"):
        check_accelerator(accelerator, SimpleNamespace(fp16=False))


# --- served ---


def after(folder, **settings):
    run = build(folder, **{"max_steps": 2, "save_strategy": "no", **settings})
    run.train()
    return weights(run)


@pytest.mark.parametrize("option", TRAINS)
def test_options_change_the_training(tmp_path, option):
    changed, common = TRAINS[option]
    assert not same(after(tmp_path, **{**common, **changed}), after(tmp_path, **common))


def test_arguments_are_those_of_the_package_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RobustTrainer(tiny_model("clip"), processing_class=tiny_processor("clip"), class_names=NAMES)
    assert isinstance(run.args, RobustTrainingArguments) and run.args.remove_unused_columns is False


def test_another_collator_makes_the_batches(tmp_path):
    def darker(rows):
        batch = ImageCollator(tiny_processor("clip"))(rows)
        return {**batch, "pixel_values": batch["pixel_values"] / 2}

    assert not same(after(tmp_path, data_collator=darker), after(tmp_path))


@pytest.mark.parametrize("method", ["full", "saft"])
def test_an_optimizer_may_be_given(tmp_path, method):
    expected = after(tmp_path, method=method, optim="sgd", learning_rate=0.1)
    cls_and_kwargs = torch.optim.SGD, {"lr": 0.1}
    assert same(after(tmp_path, method=method, optimizer_cls_and_kwargs=cls_and_kwargs), expected)
    model = tiny_model("clip")
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    if method == "saft":
        with pytest.raises(ConfigError, match="before SAFT's entries are selected.*optimizer_cls_and_kwargs"):
            build(tmp_path, method, model=model, optimizers=(made, None))
    else:
        assert same(after(tmp_path, model=model, optimizers=(made, None)), expected)
    with pytest.raises(ConfigError, match="no parameter that is trained.*SGD"):
        build(tmp_path, "lora", optimizers=(made, None))


def test_every_second_layer_may_be_checkpointed(tmp_path):
    settings = {"max_steps": 2, "save_strategy": "no"}
    half = build(
        tmp_path, activation_checkpointing=True, activation_checkpointing_kwargs={"every_n_layers": 2}, **settings
    )
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):
        old = build(
            tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"every_n_layers": 1}, **settings
        )
    half.train(), old.train()
    flags = [
        [layer.gradient_checkpointing for layer in run.model.model.vision_model.encoder.layers] for run in (half, old)
    ]
    assert flags == [[True, False], [True, True]]


def test_evaluation_comes_when_it_is_asked_for(tmp_path):
    common = {"max_steps": 6, "eval_strategy": "steps", "eval_dataset": image_dataset(3, NAMES)}

    def steps(**settings):
        run = build(tmp_path, **common, **settings)
        run.train()
        return [entry["step"] for entry in run.state.log_history if "eval_accuracy" in entry]

    assert steps(eval_steps=2) == [2, 4, 6]
    assert steps(eval_steps=2, eval_delay=3) == [4, 6]
    assert steps(eval_steps=3, eval_on_start=True) == [0, 3, 6]


def test_the_smaller_metric_may_be_the_better(tmp_path):
    common = {"max_steps": 3, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    common |= {
        "load_best_model_at_end": True,
        "metric_for_best_model": "step",
        "eval_dataset": image_dataset(3, NAMES),
    }
    best = []
    for greater in (True, False):
        run = build(tmp_path, compute_metrics=lambda prediction: {}, greater_is_better=greater, **common)
        run.compute_metrics = lambda prediction, run=run: {"step": run.state.global_step}
        run.train()
        best.append(run.state.best_model_checkpoint[-1])
    assert best == ["3", "1"]


def test_full_determinism(tmp_path, monkeypatch):
    for name in ("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"):
        monkeypatch.setenv(name, "")  # which it sets
    monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", "")
    try:
        found = after(tmp_path, full_determinism=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert same(found, after(tmp_path))


def test_steps_may_be_accumulated_by_accelerate(tmp_path):
    config = {"gradient_accumulation_kwargs": {"num_steps": 2}}
    assert same(after(tmp_path, accelerator_config=config), after(tmp_path, gradient_accumulation_steps=2))


# --- checkpoints ---


def saved(folder, **settings):
    run = build(folder, **{"max_steps": 3, "save_strategy": "steps", "save_steps": 1, **settings})
    run.train()
    return run


@pytest.mark.parametrize("method", ["full", "saft"])
def test_the_last_complete_checkpoint_is_resumed(tmp_path, method):
    whole = saved(tmp_path, method=method, num_train_epochs=1, max_steps=11, save_steps=4)
    (tmp_path / "checkpoint-8" / "trainer_state.json").rename(tmp_path / "kept.json")
    (tmp_path / "checkpoint-11" / "trainer_state.json").unlink()
    resumed = build(tmp_path, method, max_steps=11, num_train_epochs=1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == 4 and same(weights(resumed), weights(whole))
    (tmp_path / "kept.json").rename(tmp_path / "checkpoint-8" / "trainer_state.json")
    resumed = build(tmp_path, method, max_steps=11, num_train_epochs=1)
    resumed.train(resume_from_checkpoint=True)
    assert resumed._initial_global_step == 8 and same(weights(resumed), weights(whole))


def test_a_checkpoint_without_optimizer_is_not_resumed(tmp_path):
    saved(tmp_path, save_only_model=True)
    run = build(tmp_path)
    before = weights(run)
    with pytest.raises(
        CheckpointError, match=r"no whole.*checkpoint-3: checkpoint has no optimizer state \(save_only_model"
    ):
        run.train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="no such checkpoint.*elsewhere"):
        run.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    assert same(weights(run), before)


def test_a_resumed_training_may_start_with_the_first_images(tmp_path):
    whole = saved(tmp_path)
    runs = [build(tmp_path, max_steps=3, ignore_data_skip=skip) for skip in (False, True)]
    for run in runs:
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(weights(runs[0]), weights(whole)) and not same(weights(runs[1]), weights(whole))


def test_callbacks_may_be_resumed(tmp_path):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    evaluated |= {"load_best_model_at_end": True, "eval_dataset": image_dataset(3, NAMES)}
    saved(tmp_path, callbacks=[EarlyStoppingCallback(5)], **evaluated)
    for restored, patience in ((True, 5), (False, 9)):
        settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, **evaluated}
        run = build(
            tmp_path,
            callbacks=[EarlyStoppingCallback(9)],
            restore_callback_states_from_checkpoint=restored,
            **settings,
        )
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        (callback,) = [one for one in run.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]
        assert callback.early_stopping_patience == patience
