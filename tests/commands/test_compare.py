# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from math import sqrt
from statistics import mean

import pytest
import yaml

from hf_robust.comparison.methods import ALL_METHODS, SAFT_VARIANTS
from hf_robust.comparison.search import GRID, choose_rate, choose_weight
from hf_robust.comparison.tables import half_interval
from hf_robust.errors import ConfigError
from hf_robust.evaluation import RobustnessSuite
from hf_robust.evaluation.corrupted_sets import FIVE
from hf_robust.scripting.arguments import parse_arguments
from tests.examples.scripts import command_on_two, image_sizes_seen, load_command
from tests.programs import ROOT
from tests.tiny_models import image_dataset, tiny_model, tiny_processor

NAMES = ["red", "green", "blue", "yellow"]
MAIN = ["linear-probe", "lp-ft", "full", "full+similarity", "full+lipsum-ft", "flyp", "flyp+starft", "lora", "aclip"]
MAIN += ["radapter", "saft", "context+ogen"]  # one of each kind
OGEN = ["--new_class_names", "cyan", "pink", "grey", "black"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, parquet files, a suite, and a config that names them."""
    folder = tmp_path_factory.mktemp("compare")
    tiny_model("clip").save_pretrained(folder / "model")
    tiny_processor("clip").save_pretrained(folder / "model")
    sets = {
        "train": (18, NAMES, 0),
        "validation": (12, NAMES, 40),
        "id": (30, NAMES, 60),
        "pets": (9, ["cat", "dog"], 9),
    }
    for name, (images, names, seed) in sets.items():
        image_dataset(images, names, seed=seed).to_parquet(folder / f"{name}.parquet")
    suite = {
        "colours": {"role": "id", "source": str(folder / "id.parquet")},
        "pale": {"role": "ood", "source": str(folder / "id.parquet"), "corruption": ["contrast", 5]},
        "noisy": {"role": "ood", "source": str(folder / "id.parquet"), "corruption": ["gaussian_noise", 5]},
        "pets": {"role": "other", "source": str(folder / "pets.parquet")},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump({"sets": suite}))
    config = {
        "model_name_or_path": str(folder / "model"),
        "train_data": str(folder / "train.parquet"),
        "validation_data": str(folder / "validation.parquet"),
        "suite": str(folder / "suite.yaml"),
        "shots": 4,
        "seeds": [1, 2],
        "methods": ["linear-probe", "full", "saft"],
        "learning_rates": ["1e-3", "1e-2"],  # how YAML reads 1e-3
        "alphas": [0.5, 1.0],
        "after": ["wise-ft"],
        "cache_reference_embeddings": True,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 6,
        "disable_tqdm": True,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def script(folder, monkeypatch):
    """The script's module; `run` is its command line, with the config of `folder`, and returns what has ended."""
    module = load_command("compare", folder, monkeypatch)
    run = module.run
    monkeypatch.setattr(module, "run", lambda output, *flags: run(output, *flags)["runs"])
    monkeypatch.setattr(module, "folder", folder, raising=False)
    return module


def cells(table):
    """The rows of Markdown tables by their first cell."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {row[0].strip("*"): row[1:] for row in reversed(rows)}  # of a method the row in the first table


# --- the whole ---


def test_every_method_is_searched_trained_and_evaluated_with_every_seed(script, tmp_path, capsys):
    runs = script.run(tmp_path)
    assert {name for name in runs if "_seed_" in name} == {
        f"{method}_seed_{seed}" for method in ("linear-probe", "full", "saft") for seed in (1, 2)
    }
    for method in ("linear-probe", "full", "saft"):
        searched = [run for run in runs.values() if run.get("searched") == method]
        assert [run["learning_rate"] for run in searched] == [1e-3, 1e-2]
        chosen = choose_rate(searched)["learning_rate"]
        ended = [run for run in runs.values() if run.get("method") == method]
        assert [(run["learning_rate"], run["seed"]) for run in ended] == [(chosen, 1), (chosen, 2)]
        for run in ended:
            fine_tuned, wise_ft = run["ways"].values()
            assert run["trained_parameters"] > 0 and wise_ft["alpha"] in (0.5, 1.0)
            assert [row["alpha"] for row in wise_ft["sweep"]] == [0.5, 1.0]
            assert fine_tuned["sets"].keys() == {"colours", "pale", "noisy", "pets"}
            half, whole = (row["validation_accuracy"] for row in wise_ft["sweep"])
            error = sqrt(whole * (1 - whole) / 12)
            assert wise_ft["alpha"] == (0.5 if half >= max(half, whole) - error else 1.0)
            assert (wise_ft["means"] == fine_tuned["means"]) >= (wise_ft["alpha"] == 1)
    shown = cells((tmp_path / "table.md").read_text())
    assert (tmp_path / "table.md").read_text() in capsys.readouterr().out
    zero_shot = runs["zero-shot"]["means"]
    assert shown["zero-shot"][:5] == ["0", "", "", "", ""]
    for column, role in ((5, "id"), (6, "ood"), (7, "other")):
        assert shown["zero-shot"][column].startswith(f"{100 * zero_shot[role]:.1f} ± ")
        for row, part in (("full", "fine-tuned"), ("full+wise-ft", "wise-ft")):
            ended = [runs[f"full_seed_{seed}"]["ways"][part] for seed in (1, 2)]
            names = [name for name, one in ended[0]["sets"].items() if one["role"] == role]
            interval = 100 * half_interval(ended, names)
            assert shown[row][column] == f"{mean(100 * run['means'][role] for run in ended):.1f} ± {interval:.1f}"
    assert shown["full"][3:5] == ["", "1"]
    seconds = mean(runs[f"full_seed_{seed}"]["training_seconds"] for seed in (1, 2))
    assert shown["full"][1] == shown["full+wise-ft"][1] == f"{seconds:.0f}"
    assert (tmp_path / "scatter.png").read_bytes().startswith(b"\x89PNG")


def test_a_probe_learns_a_head_and_forgets_nothing(script, tmp_path):
    runs = script.run(tmp_path, "--methods", "linear-probe", "--learning_rates", "0.3", "--num_train_epochs", "8")
    probe, zero_shot = runs["linear-probe_seed_1"]["ways"]["fine-tuned"], runs["zero-shot"]
    assert probe["means"]["id"] > zero_shot["means"]["id"]
    assert probe["sets"]["pets"] == zero_shot["sets"]["pets"]
    assert runs["linear-probe_seed_1"]["trained_parameters"] == 4 * 24 + 4


def test_a_folder_of_photographs_is_enough(script, tmp_path):
    for split, n, seed in (("train", 16, 0), ("test", 12, 40)):
        for index, row in enumerate(image_dataset(n, NAMES, seed=seed)):
            path = tmp_path / "photos" / split / NAMES[row["label"]] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            row["image"].save(path)
    flags = ["--methods", "linear-probe", "--learning_rates", "1e-2", "--seeds", "1"]
    flags += ["--model_name_or_path", str(script.folder / "model"), "--output_dir", str(tmp_path / "out")]
    script.main(*parse_arguments(script.TYPES, flags=[str(tmp_path / "photos"), *flags]))
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    roles = {name: one["role"] for name, one in runs["zero-shot"]["sets"].items()}
    assert roles == {"id": "id", **dict.fromkeys([f"ood_{name}" for name in FIVE], "ood")}
    images = [one["images"] for one in runs["zero-shot"]["sets"].values()]
    assert images[0] == sum(images[1:]) == 12
    with pytest.raises(ConfigError, match="data is all of these"):
        parse_arguments(script.TYPES, flags=["photos", "--suite", "cifar10"])


def test_all_images_have_the_size_that_is_asked_for(script, tmp_path, monkeypatch):
    sizes = image_sizes_seen(monkeypatch)
    flags = ["--learning_rates", "1e-2", "--seeds", "1", "--image_size", "64"]
    script.run(tmp_path, "--methods", "linear-probe", "full", *flags)
    assert sizes == {(64, 64)}


def test_all_methods_run_and_differ(script, tmp_path):
    flags = ["--methods", *MAIN, "--learning_rates", "1e-2", "--seeds", "1", "--alphas", "1", "--weights", "1", *OGEN]
    flags += ["--after", "wise-ft", "tpgm", "vrf"]
    runs = script.run(
        tmp_path, *flags, "--losses", '{"similarity": {"weight": 30}}', "--templates", "a photo of a {}."
    )
    losses = {method: runs[f"{method}_rate_0.01"]["loss"] for method in MAIN}
    assert len(set(losses.values())) == len(losses)
    assert "wise-ft" not in runs["context+ogen_seed_1"]["ways"] and "context+ogen+wise-ft" not in (
        cells((tmp_path / "table.md").read_text())
    )
    afterwards = {way: found["sets"] for way, found in runs["full_seed_1"]["ways"].items()}
    assert list(afterwards) == ["fine-tuned", "wise-ft", "tpgm", "vrf"]
    assert afterwards["wise-ft"] == afterwards["fine-tuned"] not in (afterwards["tpgm"], afterwards["vrf"])
    trained = {method: runs[f"{method}_seed_1"]["trained_parameters"] for method in MAIN}
    assert trained["saft"] < trained["lora"] < trained["full"] == trained["full+similarity"]
    assert len(SAFT_VARIANTS) == 9


def test_weights_of_losses_are_chosen_and_soups_are_cooked(script, tmp_path):
    flags = ["--methods", "full+similarity", "full+soup", "--seeds", "1"]
    other = f'{{"pets": "{script.folder / "pets.parquet"}"}}'
    runs = script.run(tmp_path, *flags, "--selection", "id+other", "--other_validation_data", other)
    searched = [run for run in runs.values() if run.get("searched") == "full+similarity"]
    rate = choose_rate([run for run in searched if run["weight"] == 1])["learning_rate"]
    chosen = choose_weight([run for run in searched if run["learning_rate"] == rate])
    assert len([run for run in searched if run["learning_rate"] == rate]) == 3
    ended, soup = runs["full+similarity_seed_1"], runs["full+soup_seed_1"]
    assert (ended["learning_rate"], ended["weight"]) == (rate, chosen["weight"])
    assert sorted([soup["learning_rate"], *soup["rates_beside"]]) == [1e-3, 1e-2]
    assert list(soup["ways"]) == ["fine-tuned", "wise-ft"]
    for run in searched:
        assert run["accuracy"] == pytest.approx((run["id_accuracy"] + run["pets_accuracy"]) / 2)
        errors = [
            sqrt(run[f"{name}_accuracy"] * (1 - run[f"{name}_accuracy"]) / n) for name, n in (("id", 12), ("pets", 9))
        ]
        assert run["error"] == pytest.approx(sqrt(errors[0] ** 2 + errors[1] ** 2) / 2)
    assert cells((tmp_path / "table.md").read_text())["full+similarity"][3] == f"× {chosen['weight']:g}"


def test_every_method_has_a_card_with_the_figures_of_the_first_seed(script, tmp_path):
    runs = script.run(tmp_path, "--methods", "saft", "--learning_rates", "1e-2", "--seeds", "2", "1")
    assert {path.name for path in (tmp_path / "cards").iterdir()} == {"saft.md", "saft+wise-ft.md"}
    first, zero_shot = runs["saft_seed_2"], runs["zero-shot"]
    for name, run in (("saft", first["ways"]["fine-tuned"]), ("saft+wise-ft", first["ways"]["wise-ft"])):
        shown = cells((tmp_path / "cards" / f"{name}.md").read_text())["pale"]
        shares = [one["sets"]["pale"]["accuracy"] for one in (zero_shot, run)]
        assert [cell.split()[0] for cell in (shown[2], shown[-1])] == [f"{100 * share:.1f}" for share in shares]
        assert shown[:2] == ["OOD", "30"]


# --- the search ---


def test_search_alone_shows_what_was_chosen_and_what_stopped(script, tmp_path):
    rates = ["--learning_rates", "1e-3", "1e-2", "1e30"]
    runs = script.run(tmp_path, "--methods", "full", "--search_only", "true", *rates)
    assert {run.get("searched") for run in runs.values()} == {None, "full"}
    assert "stopped" in runs["full_rate_1e+30"] and not (tmp_path / "scatter.png").exists()
    shown = cells((tmp_path / "table.md").read_text())
    assert shown["validation accuracy (loss)"] == ["weight", "0.001", "0.01", "1e+30"] and shown["full"][3] == "–"
    chosen = choose_rate([run for run in runs.values() if run.get("searched") == "full"])
    expected = f"**{100 * chosen['accuracy']:.1f} ({chosen['loss']:.2f})**"
    assert shown["full"][1 + [1e-3, 1e-2].index(chosen["learning_rate"])] == expected
    assert sum("**" in cell for cell in shown["full"]) == 1


# --- interrupted and shared ---


def test_ended_runs_are_not_repeated_and_seeds_and_methods_can_be_added(script, tmp_path):
    flags = ["--methods", "saft", "--seeds", "1", "2"]
    first = script.run(tmp_path, *flags)
    kept = tmp_path / "runs" / "saft_seed_1.json"
    kept.write_text(json.dumps({**first["saft_seed_1"], "training_seconds": -1}))  # what no run gives
    (tmp_path / "runs" / "saft_seed_2.json").unlink()
    (tmp_path / "scatter.png").unlink()
    again = script.run(tmp_path, *flags)
    assert again["saft_seed_1"]["training_seconds"] == -1 and (tmp_path / "scatter.png").exists()
    assert again["saft_seed_2"]["ways"] == first["saft_seed_2"]["ways"]
    more = script.run(tmp_path, "--methods", "full", "--seeds", "3")
    assert more.keys() > again.keys() and "full_seed_3" in more and "full_seed_1" not in more
    assert {"saft", "full"} < cells((tmp_path / "table.md").read_text()).keys()


def test_what_has_ended_is_kept_when_a_later_run_fails(script, tmp_path, monkeypatch):
    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "train_and_evaluate", fail)
    with pytest.raises(KeyboardInterrupt):
        script.run(tmp_path, "--methods", "saft", "--learning_rates", "1e-2")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"zero-shot.json", "saft_rate_0.01.json"}


def test_a_folder_with_other_settings_is_refused_and_left_alone(script, tmp_path):
    flags = ["--methods", "saft", "--learning_rates", "1e-2", "--search_only", "true"]
    script.run(tmp_path, *flags)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    with pytest.raises(ConfigError, match=r"other settings.*settings.json.*'config.shots'.*another output_dir"):
        script.run(tmp_path, *flags, "--shots", "2")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


def test_a_call_that_stops_before_its_first_run_ends_claims_no_folder(script, tmp_path):
    flags = ["--methods", "saft", "--learning_rates", "1e-2", "--search_only", "true"]
    with pytest.raises(ConfigError, match="without {}"):
        script.run(tmp_path, *flags, "--templates", "a photo")
    assert list(tmp_path.iterdir()) == []
    assert script.run(tmp_path, *flags, "--templates", "a photo of a {}.").keys() > {"zero-shot"}


BAD_INPUT = {
    "no suite": (["--suite", ""], "not given.*suite"),
    "no validation data": (["--validation_data", ""], "not given.*validation_data"),
    "unknown method": (["--methods", "sfat"], "unknown method.*'sfat'.*'saft'"),
    "repeated seed": (["--seeds", "1", "1"], r"seeds.*repeated.*\[1, 1\]"),
    "no fine-tuned model": (["--alphas", "0.5"], r"fine-tuned model.*alphas.*\[0.5\]"),
    "learning rate": (["--learning_rate", "1e-3"], "learning_rate.*Set learning_rates"),
    "no learning rate": (["--learning_rates", "0", "1e-3"], "out of range.*learning_rates"),
    "weight below 0": (["--weights", "1", "-1"], "out of range.*weights"),
    "seed": (["--seed", "7"], "seed.*Set seeds"),
    "frozen head": (["--head", "frozen"], "head.*'frozen'.*'live'"),
    "no names for OGEN": (["--methods", "context+ogen"], "names of new classes.*new_class_names"),
    "no such loss": (["--losses", '{"ogen": {"new_class_names": ["cyan"]}}'], "no method adds this loss.*'ogen'"),
    "no other task": (["--selection", "id+other"], "id\\+other goes with images of other tasks"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_error_before_training(script, tmp_path, name):
    flags, message = BAD_INPUT[name]
    with pytest.raises(ConfigError, match=message):
        script.run(tmp_path / "out", *flags)
    assert not (tmp_path / "out" / "runs").exists()


def test_the_shipped_config_is_understood(script):
    config = ROOT / "examples" / "configs" / "compare_methods.yaml"
    args, training_args = parse_arguments(script.TYPES, flags=["--config", str(config)])
    script.check_training(training_args, script.FIXED, script.OWN)
    assert set(args.methods) <= set(ALL_METHODS) and args.learning_rates == sorted(GRID)
    suite = RobustnessSuite.from_yaml(ROOT / args.suite)
    assert [one.role for one in suite.sets] == ["id", "ood", "ood", "new", "other"]
    assert {one.templates for one in suite.sets if one.role != "other"} == {training_args.templates}


def test_two_processes_write_one_result(folder, script, tmp_path):
    flags = ["--config", str(folder / "config.yaml"), "--output_dir", str(tmp_path)]
    flags += ["--seeds", "1", "--learning_rates", "1e-2", "--alphas", "1", "--per_device_train_batch_size", "3"]
    printed = command_on_two("compare", folder, *flags, "--methods", "linear-probe", "saft")
    assert printed.count("rank: the place") == 1
    one = script.run(tmp_path / "one", "--methods", "linear-probe", "--learning_rates", "1e-2", "--seeds", "1")
    two = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert {"linear-probe_seed_1", "saft_seed_1"} < two.keys()
    assert two["zero-shot"]["means"] == one["zero-shot"]["means"]
