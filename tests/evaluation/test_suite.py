# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import yaml
from datasets import ClassLabel, Dataset, Features, Value

from hf_robust.data.class_spaces import ClassSpace
from hf_robust.data.sources import load_source
from hf_robust.errors import ConfigError, DataError
from hf_robust.evaluation.answers import load_labels
from hf_robust.evaluation.suite import RobustnessSuite, SuiteSet, shipped_suites
from tests.tiny_models import image_dataset

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
STL = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
NAMES = ["red", "green", "blue"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def labelled(labels, names=None, column="label"):
    """A dataset of labels; images are not needed to read these."""
    feature = ClassLabel(names=names) if names else Value("string" if isinstance(labels[0], str) else "int64")
    return Dataset.from_dict({column: labels}, features=Features({column: feature}))


def loaded(labels, names=None, **settings):
    return load_labels(SuiteSet("a", "ood", "a.parquet", **settings), labelled(labels, names))


# --- settings ---


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": " "}, "set without a name"),
        ({"role": "test"}, "unknown role .at a.: got 'test'; allowed id, ood, new, other"),
        ({"source": ""}, "no source"),
        ({"source": [1]}, "no source .at a.: got 'list'"),
        ({"templates": "a photo"}, "template without {}"),
        ({"subset": [0, 3]}, "subset is out of range .at a.: got 3; allowed different integers from 0 to 2"),
        ({"subset": [-1]}, "subset is out of range"),
        ({"subset": [True]}, "subset is out of range"),
        ({"subset": ["red"]}, "subset is out of range"),
        ({"subset": []}, "subset is empty"),
        ({"subset": [1, 1]}, "names a class twice"),
        ({"labels_in": "dataset"}, "unknown labels_in"),
        ({"subset": [0], "merge": {"x": [0]}}, "either a subset or a merge"),
        ({"merge": {"x": [0], "y": []}}, "merge leaves a label without class .at a, y.*null to leave its images out"),
        ({"merge": {"x": "red"}}, "merge leaves a label without class"),
        (
            {"merge": {"x": ["rde"]}},
            "merge names a class that does not exist .at a, x.: got 'rde'.*Did you mean 'red'",
        ),
        ({"merge": {"x": [3]}}, "merge names a class that does not exist"),
        ({"merge": {"x": None}}, "merge leaves all labels out"),
        ({"corruption": ("fog", 3)}, "unknown corruption: got 'fog'"),
        ({"corruption": ("contrast", 7)}, "severity is out of range"),
        ({"corruption": "contrast"}, "no corruption .at a."),
        ({"task": "captioning"}, "unknown task .at a.: got 'captioning'; allowed classification, retrieval, several"),
        ({"task": "retrieval"}, "class_names means nothing for retrieval .at a.*Leave it out, or set it to None"),
        ({"task": "retrieval", "class_names": None, "templates": "photo"}, "templates means nothing.*'single'"),
        ({"task": "several_labels", "merge": {"x": [0]}}, "merge means nothing for several_labels"),
        ({"truncate": True}, "truncate means nothing for classification"),
    ],
)
def test_wrong_settings_of_a_set_are_refused_at_once(settings, message):
    with pytest.raises(ConfigError, match=message):
        SuiteSet(**{"name": "a", "role": "id", "source": "a.parquet", "class_names": NAMES, **settings})


def test_class_names_are_checked_at_once():
    with pytest.raises(DataError, match="class name occurs twice"):
        SuiteSet("a", "id", "a.parquet", ["red", "Red"])


def test_a_suite_needs_an_id_set_and_different_names():
    with pytest.raises(ConfigError, match="no set has the role 'id': got {'a': 'ood'}"):
        RobustnessSuite([SuiteSet("a", "ood", "a.parquet")])
    with pytest.raises(ConfigError, match="no set has the role 'id'"):
        RobustnessSuite([])
    with pytest.raises(ConfigError, match="two sets have the same name: got 'a'"):
        RobustnessSuite([SuiteSet("a", "id", "a.parquet"), SuiteSet("a", "ood", "b.parquet")])


# --- labels ---


def test_answers_are_the_classes_of_the_dataset_by_default():
    found = loaded([2, 0, 2], ["sea_lion", "owl", "cat"])
    assert found.class_names == ["sea lion", "owl", "cat"]
    assert found.answers == {"sea lion": [0], "owl": [1], "cat": [2]}
    assert found.targets.tolist() == [2, 0, 2]


def test_labels_of_text_are_counted_in_the_order_of_the_class_names():
    assert loaded(["owl", "Sea_Lion"], class_names=["sea lion", "cat", "owl"]).targets.tolist() == [2, 0]
    own = loaded(["owl", "sea_lion", "owl"])
    assert own.class_names == ["owl", "sea lion"] and own.targets.tolist() == [0, 1, 0]
    with pytest.raises(DataError, match="label of row 1 is no class .at a.: got 'dog'"):
        loaded(["owl", "dog"], class_names=["owl"])


def test_imagenet_a_labels_count_the_subset_or_the_classes():
    subset = {"class_names": CIFAR, "subset": [1, 4, 7]}
    in_subset = loaded([0, 2, 1], **subset, labels_in="subset")
    in_classes = loaded([1, 7, 4], **subset)
    assert in_subset.answers == in_classes.answers == {"automobile": [1], "deer": [4], "horse": [7]}
    assert in_subset.targets.tolist() == in_classes.targets.tolist() == [0, 2, 1]
    with pytest.raises(DataError, match="label of row 1 is no class .at a.: got 3; allowed the 3 answers"):
        loaded([0, 3], **subset, labels_in="subset")
    with pytest.raises(DataError, match="label of row 1 is no class .at a.: got 2.*Check class_names, subset"):
        loaded([1, 2], **subset)


def test_a_subset_is_checked_against_class_names_of_the_dataset():
    with pytest.raises(ConfigError, match="subset is out of range .at a.: got 3"):
        loaded([0], NAMES, subset=[0, 3])


def test_stl10_labels_become_those_of_cifar10():
    suite = RobustnessSuite.from_yaml("cifar10")
    stl = next(one for one in suite.sets if one.name == "stl10")
    found = load_labels(stl, labelled(list(range(10)), STL))
    assert found.class_names == CIFAR
    assert [found.class_names[classes[0]] for classes in found.answers.values()] == [
        "airplane", "bird", "automobile", "cat", "deer", "dog", "horse", "ship", "truck"
    ]  # fmt: skip
    assert found.targets.tolist() == [0, 1, 2, 3, 4, 5, 6, -1, 7, 8]  # the monkey is left out


def test_class_names_in_another_order_than_the_datasets_are_refused():
    with pytest.raises(DataError, match="another order.*'bird': 'automobile', 'car': 'bird'"):
        loaded([0], STL, class_names=CIFAR)
    with pytest.raises(DataError, match="another order.*'bird': 'car', 'car': 'bird'"):
        loaded([0], STL, class_names=CIFAR, merge={"airplane": [0], "car": [1], "bird": [2]})


def test_objectnet_labels_have_several_classes():
    merge = {"vehicle": [0, "automobile", 8], "pet": ["cat", "dog"], "thing": None}
    found = loaded([1, 2, 0], class_names=CIFAR, merge=merge)
    assert found.answers == {"vehicle": [0, 1, 8], "pet": [3, 5]}
    assert found.targets.tolist() == [1, -1, 0]
    with pytest.raises(DataError, match="label of row 0 is no class .at a.: got 3"):
        loaded([3], class_names=CIFAR, merge=merge)
    with pytest.raises(DataError, match="all images are left out"):
        loaded([2, 2], class_names=CIFAR, merge=merge).with_rows(np.arange(2))


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (labelled([0, 1]), "class names are missing .at a.. Pass class_names"),
        (labelled([0], NAMES, column="kind"), r"no column 'label' .at a.: got \['kind'\].*label_column"),
        (Dataset.from_dict({"label": [0.5]}), "labels are no class indices"),
        (Dataset.from_dict({"label": [[0]]}), "labels are no class indices"),
        (Dataset.from_dict({"label": []}), "dataset is empty"),
    ],
)
def test_unusable_labels_are_refused(dataset, message):
    with pytest.raises(DataError, match=message):
        load_labels(SuiteSet("a", "id", dataset), dataset)


@pytest.mark.parametrize("label", [-1, 3, None])
def test_labels_outside_the_classes_are_refused(label):
    with pytest.raises(DataError, match="label of row 1 is no class"):
        loaded([0, label], class_names=NAMES)


def test_words_can_be_mapped_from_the_names_of_the_dataset():
    mapping = {"n02": "goldfish", "n01": "tench"}
    found = load_labels(
        SuiteSet("a", "id", labelled([1, 0], ["n01", "n02"]), mapping), labelled([1, 0], ["n01", "n02"])
    )
    assert found.class_names == ["tench", "goldfish"] and found.targets.tolist() == [1, 0]


def test_labels_of_text_can_be_mapped_too():
    names = {"blue": "red", "red": "blue"}
    found = loaded(["red", "blue", "red"], class_names=names)
    assert [found.class_names[target] for target in found.targets] == ["blue", "red", "blue"]


def test_a_setting_that_stands_twice_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("sets:\n  a: {role: id, source: x}\n  a: {role: ood, source: y}\n")
    with pytest.raises(ConfigError, match="'a' stands there twice"):
        RobustnessSuite.from_yaml(tmp_path / "a.yaml")


def test_classes_that_a_classifier_knows_and_a_set_lacks_stay_possible():
    space = ClassSpace(["tench", "goldfish", "shark"], ["n01", "n02", "n03"])
    found = loaded([1, 0], ["n03", "Goldfish"]).among_known(space)
    assert found.class_names == ["shark", "goldfish", "tench"] and list(found.answers.values()) == [[0], [1], [2]]
    assert found.targets.tolist() == [1, 0]
    other = loaded([0], ["n03", "whale"]).among_known(space)
    assert other.class_names == ["shark", "whale"] and len(other.answers) == 2
    chosen = loaded([0], class_names=["n03", "goldfish"], subset=[1], labels_in="subset")
    assert chosen.among_known(space).answers == chosen.answers == {"goldfish": [1]}
    assert chosen.among_known(space).class_names == ["shark", "goldfish"]


# --- sources ---


def test_labels_of_a_folder_of_images(tmp_path):
    for index, row in enumerate(image_dataset(4, ["sea_lion", "owl"])):
        file = tmp_path / "photos" / ["sea_lion", "owl"][row["label"]] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(file)
    found = load_labels(SuiteSet("photos", "id", "photos"), load_source(str(tmp_path / "photos")))
    assert found.class_names == ["owl", "sea lion"] and sorted(found.targets.tolist()) == [0, 0, 1, 1]


# --- YAML ---


def write(folder, content):
    path = folder / "suite.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return path


def test_a_suite_is_read_from_yaml(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("names.txt").write_text("red\ngreen\n\nblue\n")
    Path("subset.txt").write_text("0\n2\n")
    Path("merge.json").write_text(json.dumps({"warm": [0], "cold": ["green", 2]}))
    defaults = {"class_names_file": "names.txt", "templates": "photo"}
    sets = {
        "a": {"role": "id", "source": "a.parquet"},
        "b": {"role": "ood", "source": "b", "subset_file": "subset.txt", "corruption": ["contrast", 2]},
        "c": {"role": "other", "source": "c:train", "merge_file": "merge.json", "templates": ["a {}"]},
        "d": {"role": "new", "source": "d", "class_names": ["cat", "dog"]},
    }
    suite = RobustnessSuite.from_yaml(write(tmp_path, {"defaults": defaults, "sets": sets}))
    a, b, c, d = suite.sets
    assert (a.name, a.role, a.source, a.class_names, a.templates) == ("a", "id", "a.parquet", NAMES, "photo")
    assert b.subset == [0, 2] and b.corruption == ("contrast", 2) and b.class_names == NAMES
    assert c.answers(NAMES) == {"warm": [0], "cold": [1, 2]} and c.templates == ["a {}"]
    assert d.class_names == ["cat", "dog"]
    content = json.loads(json.dumps(suite.to_dict()))["sets"]
    assert [one["name"] for one in content] == ["a", "b", "c", "d"]
    assert content[1]["corruption"] == ["contrast", 2] and len(content[0]["templates"]) == 16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sets: [", "file is no YAML"),
        ("- a", "no suite"),
        ({"sets": {}, "set": {}}, "no suite"),
        (
            {"sets": {"a": {"role": "id", "sources": "a"}}},
            "unknown setting .at .*suite.yaml, a.: got 'sources'.*'source'",
        ),
        ({"sets": {"a": {"role": "id"}}}, "set without source"),
        ({"sets": {"a": {"source": "a"}}}, "set without role"),
        ({"sets": {}}, "no set has the role 'id'"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message):
        RobustnessSuite.from_yaml(write(tmp_path, content))


def test_missing_and_broken_files_that_a_suite_names_are_reported(tmp_path):
    settings = {"role": "id", "source": "a", "class_names_file": "nowhere.txt"}
    with pytest.raises(DataError, match="no file with the class_names .at .*, a.: got 'nowhere.txt'. Write it"):
        RobustnessSuite.from_yaml(write(tmp_path, {"sets": {"a": settings}}))
    (tmp_path / "subset.txt").write_text("one\n")
    settings = {"role": "id", "source": "a", "subset_file": str(tmp_path / "subset.txt")}
    with pytest.raises(DataError, match="file holds no indices .at .*, a, .*subset.txt.: got .*one"):
        RobustnessSuite.from_yaml(write(tmp_path, {"sets": {"a": settings}}))


def test_an_unknown_suite_is_reported_with_those_there_are():
    with pytest.raises(
        ConfigError, match="no such suite: got 'imagnet'; allowed a YAML file, or one of cifar10, coop"
    ):
        RobustnessSuite.from_yaml("imagnet")


@pytest.fixture
def imagenet_files(tmp_path, monkeypatch):
    """The files that users write for the suites of ImageNet and iWildCam, with made-up content."""
    monkeypatch.chdir(tmp_path)
    Path("imagenet_classes.txt").write_text("\n".join(f"class {index}" for index in range(1000)))
    Path("imagenet_a.txt").write_text("\n".join(str(5 * index) for index in range(200)))
    Path("imagenet_r.txt").write_text("\n".join(str(5 * index + 1) for index in range(200)))
    objectnet = {f"thing {label}": [7 * label, 7 * label + 3] for label in range(113)}
    Path("objectnet.json").write_text(json.dumps(objectnet))
    Path("iwildcam_classes.txt").write_text("\n".join(f"animal {index}" for index in range(182)))


def test_every_shipped_suite_can_be_read(imagenet_files):
    assert shipped_suites() == ["cifar10", "coop", "domainnet", "fmow", "imagenet", "iwildcam", "officehome", "pacs"]
    suites = {name: RobustnessSuite.from_yaml(name) for name in shipped_suites()}
    roles = {name: [one.role for one in suite.sets] for name, suite in suites.items()}
    assert roles["imagenet"] == ["id"] + 5 * ["ood"]
    assert roles["coop"] == ["id"] + 10 * ["other"]
    assert all(found[0] == "id" and found.count("id") == 1 for found in roles.values())


def test_the_shipped_imagenet_suite_relates_labels_to_classes(imagenet_files):
    suite = {one.name: one for one in RobustnessSuite.from_yaml("imagenet").sets}
    variant = load_labels(suite["imagenet_a"], labelled([0, 199, 3], column="cls"))
    assert len(variant.answers) == 200 and variant.targets.tolist() == [0, 199, 3]
    assert list(variant.answers.values())[3] == [15]
    objects = load_labels(suite["objectnet"], labelled([112, 0], column="cls"))
    assert len(objects.answers) == 113 and objects.answers["thing 112"] == [784, 787]
    assert objects.targets.tolist() == [112, 0]
    for name in ("imagenet_v2", "imagenet_sketch"):
        same = load_labels(suite[name], labelled([999, 0], column="cls"))
        assert len(same.answers) == 1000 and same.targets.tolist() == [999, 0]


def test_a_dataset_in_memory_is_described_by_its_fingerprint():
    dataset = image_dataset(3, NAMES)
    source = SuiteSet("a", "id", dataset).to_dict()["source"]
    assert source == {"fingerprint": dataset._fingerprint, "rows": 3}
