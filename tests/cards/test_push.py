# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file, save_file

from hf_robust import SAFTConfig
from hf_robust.cards.card import model_card
from hf_robust.cards.push import push, write_card
from hf_robust.errors import HubError, UnsafeFileError
from tests.fake_hub import TOKEN, FakeHub
from tests.programs import run_programs
from tests.trainers import build

# huggingface_hub uploads weights in a way that httpx deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "alice/clip-saft"
ADAPTER_FILES = {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "classifier.json",
    "curve.png",
    "processor/processor_config.json",
    "processor/tokenizer.json",
    "processor/tokenizer_config.json",
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves: a SAFT adapter with card and picture, and files that are nobody's business."""
    folder = tmp_path_factory.mktemp("saved")
    trainer = build(folder / "run", "saft")
    trainer.select_entries()
    trainer.save_model(str(folder))
    card = model_card(trainer.model, trainer.args, base_model_id="openai/clip-vit-base-patch32", picture="curve.png")
    write_card(folder, card)
    (folder / "curve.png").write_bytes(b"\x89PNG")
    (folder / "other.png").write_bytes(b"\x89PNG")
    (folder / "training_args.bin").write_text(TOKEN)
    (folder / "optimizer.pt").write_text(str(Path.home()))
    (folder / ".env").write_text(TOKEN)
    (folder / "checkpoint-9").mkdir()
    (folder / "checkpoint-9" / "README.md").write_text("no card")
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "saved")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    build(folder / "run", "full").save_model(str(folder))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(folder: Path, name: str, **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def set_base(folder: Path, base: str | None) -> None:
    edit(folder, "adapter_config.json", base_model_name_or_path=base)


# --- what is pushed ---


def test_listed_files_go_in_one_commit_and_nothing_else(hub: FakeHub, folder: Path) -> None:
    before = contents(folder)
    commit = push(folder, REPO, private=True, commit_message="A message")
    assert hub.files(REPO).keys() == ADAPTER_FILES and hub.commits(REPO) == 1 == hub.requests.count("commit")
    assert commit.commit_url == f"{hub.url}/{REPO}/commit/{hub.sha(REPO, 'main')}"
    assert hub.messages == ["A message"] and hub.visibility == {REPO: "private"}
    assert contents(folder) == before
    for name in ADAPTER_FILES - {"README.md", "adapter_config.json"}:
        if not name.endswith(".json") or name.endswith("tokenizer.json"):
            assert hub.files(REPO)[name] == before[name]
        else:
            assert json.loads(hub.files(REPO)[name]) == json.loads(before[name])


def test_what_was_pushed_loads_as_what_was_saved(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    push(folder, REPO)
    for name, content in hub.files(REPO).items():
        (tmp_path / "got" / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "got" / name).write_bytes(content)
    config = SAFTConfig.from_pretrained(str(tmp_path / "got"))
    assert config.entry_counts == SAFTConfig.from_pretrained(str(folder)).entry_counts and config.density == 0.01


def test_no_request_holds_token_or_home_folder(hub: FakeHub, folder: Path) -> None:
    set_base(folder, str(Path.home() / "models" / "clip"))
    edit(folder, "processor/tokenizer_config.json", name_or_path=str(Path.home() / "models" / "clip"))
    push(folder, REPO)
    sent = b"".join(hub.bodies) + b"".join(hub.files(REPO).values())
    for private in (TOKEN, str(Path.home()) + os.sep, str(folder)):
        assert private.encode() not in sent


def test_a_local_base_model_becomes_its_id_or_nothing(hub: FakeHub, folder: Path) -> None:
    set_base(folder, str(folder))
    push(folder, REPO)
    assert json.loads(hub.files(REPO)["adapter_config.json"])["base_model_name_or_path"] is None
    push(folder, REPO, base_model_id="openai/clip-vit-base-patch32")
    pushed = json.loads(hub.files(REPO)["adapter_config.json"])
    assert pushed["base_model_name_or_path"] == "openai/clip-vit-base-patch32" and pushed["peft_type"] == "SAFT"
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder)


def test_a_base_model_from_the_hub_keeps_its_id(hub: FakeHub, folder: Path) -> None:
    set_base(folder, "openai/clip-vit-base-patch32")
    push(folder, REPO)
    pushed = json.loads(hub.files(REPO)["adapter_config.json"])
    assert pushed["base_model_name_or_path"] == "openai/clip-vit-base-patch32"


def test_pefts_own_card_loses_the_path_of_the_base(hub: FakeHub, folder: Path) -> None:
    base = str(folder.parent)
    text = f"---\nbase_model: {base}\ntags:\n- saft\n- 'base_model:adapter:{base}'\n---\n# A card\n"
    (folder / "README.md").write_text(text)
    push(folder, REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert base not in card and "- saft\n" in card and card.endswith("# A card\n")


def test_the_card_gets_the_name_of_the_repository(hub: FakeHub, folder: Path) -> None:
    assert 'from_pretrained("this-repository")' in (folder / "README.md").read_text()
    push(folder, REPO)
    assert f'from_pretrained("{REPO}")' in hub.files(REPO)["README.md"].decode()


def test_a_name_without_owner_is_ones_own(hub: FakeHub, folder: Path) -> None:
    push(folder, REPO.split("/")[1])
    push(folder, REPO.split("/")[1])
    assert hub.commits(REPO) == 1 and hub.files(REPO).keys() == ADAPTER_FILES
    assert f'from_pretrained("{REPO}")' in hub.files(REPO)["README.md"].decode()


@pytest.mark.parametrize(
    "private",
    [
        "/home/alice/models/clip",
        "see /mnt/data/photos",
        "~/models",
        "C:\\Users\\alice",
        "\\\\server\\share",
        "file:///etc/passwd",
        "/home/al\\_ice/x",
        TOKEN,
    ],
)
@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "classifier.json"])
def test_paths_and_tokens_are_refused(hub: FakeHub, folder: Path, name: str, private: str) -> None:
    if name == "README.md":
        (folder / name).write_text((folder / name).read_text() + "\n" + private + "\n")
    else:
        edit(folder, name, note=private)
    with pytest.raises(HubError, match=f"private .at {name}") as caught:
        push(folder, REPO)
    assert not hub.requests and TOKEN not in str(caught.value)


def test_paths_in_the_metadata_of_weights_are_refused(hub: FakeHub, folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    save_file(load_file(path), path, metadata={"source": "/home/alice/run"})
    with pytest.raises(HubError, match="private .at adapter_model.safetensors"):
        push(folder, REPO)
    assert not hub.requests


def test_the_token_that_was_given_is_refused_whatever_it_looks_like(hub: FakeHub, folder: Path) -> None:
    edit(folder, "adapter_config.json", note="my s3cret")
    with pytest.raises(HubError, match="private"):
        push(folder, REPO, token="s3cret")
    assert not hub.requests


@pytest.mark.parametrize(
    "harmless", ["https://a.org/b/c", "and/or/both", "1/2", "`</s>`", "ID/OOD", "hf_robust", "a: b"]
)
def test_ordinary_text_is_not_taken_for_a_path(hub: FakeHub, folder: Path, harmless: str) -> None:
    (folder / "README.md").write_text((folder / "README.md").read_text() + harmless)
    edit(folder, "classifier.json", class_names=[harmless])
    push(folder, REPO)
    assert hub.files(REPO)["README.md"].decode().endswith(harmless)


# --- files that are refused ---


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "classifier.json", "README.md", "curve.png"])
def test_links_are_refused(hub: FakeHub, folder: Path, tmp_path: Path, name: str) -> None:
    shutil.move(folder / name, tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError, match=name):
        push(folder, REPO)
    assert not hub.requests


def test_a_linked_folder_of_the_processor_is_refused(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "processor", tmp_path / "elsewhere")
    (folder / "processor").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError, match="processor"):
        push(folder, REPO)
    assert not hub.requests


def test_a_processor_in_its_folder_takes_the_place_of_one_beside_the_adapter(hub: FakeHub, folder: Path) -> None:
    """Early versions wrote it there, where `AutoPeftModel` stumbles over it."""
    early = shutil.copytree(folder, folder.parent / "early")
    for file in (early / "processor").iterdir():
        file.rename(early / file.name)
    (early / "processor").rmdir()
    push(early, REPO)
    assert {"tokenizer.json", "tokenizer_config.json", "processor_config.json"} < hub.files(REPO).keys()
    shutil.copytree(folder / "processor", early / "processor")  # as after another training into the same folder
    push(early, REPO)
    assert hub.files(REPO).keys() == ADAPTER_FILES


def test_special_files_are_refused(hub: FakeHub, folder: Path) -> None:
    (folder / "processor" / "tokenizer.json").unlink()
    os.mkfifo(folder / "processor" / "tokenizer.json")
    with pytest.raises(UnsafeFileError, match="ordinary file"):
        push(folder, REPO)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/etc/passwd", "model.bin", "model-00001-of-00001.bin"])
def test_an_index_cannot_name_files_outside(hub: FakeHub, whole: Path, tmp_path: Path, shard: str) -> None:
    folder = shutil.copytree(whole, tmp_path / "whole")
    index = {"metadata": {}, "weight_map": {"logit_scale": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UnsafeFileError, match="no shards"):
        push(folder, REPO)
    assert not hub.requests


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "curve.png"])
def test_an_incomplete_folder_is_refused(hub: FakeHub, folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(HubError, match="missing|no complete model"):
        push(folder, REPO)
    assert not hub.requests


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "README.md"])
def test_a_broken_file_is_refused(hub: FakeHub, folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"---\nbase_model: [\n---\n")
    with pytest.raises(HubError, match="malformed|no valid JSON|no YAML"):
        push(folder, REPO)
    assert not hub.requests


# --- whole models ---


def test_a_whole_model_is_pushed(hub: FakeHub, whole: Path) -> None:
    push(whole, REPO)
    assert {"config.json", "model.safetensors", "classifier.json"} <= hub.files(REPO).keys()
    assert hub.files(REPO)["model.safetensors"] == (whole / "model.safetensors").read_bytes()
    assert "training_args.json" not in hub.files(REPO)


def test_a_model_in_shards_is_pushed(hub: FakeHub, whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "whole")
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for shard in shards:
        shutil.copy(folder / "model.safetensors", folder / shard)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": dict(zip(["a", "b"], shards, strict=True))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    push(folder, REPO)
    assert {*shards, "model.safetensors.index.json", "config.json"} <= hub.files(REPO).keys()


# --- repositories ---


def test_a_branch_is_made_and_main_left_alone(hub: FakeHub, folder: Path) -> None:
    push(folder, REPO, revision="second")
    push(folder, REPO, revision="second", commit_message="again")
    assert hub.commits(REPO) == 0 and hub.commits(REPO, "second") == 1


def test_pushing_the_same_again_makes_no_commit(hub: FakeHub, folder: Path) -> None:
    first = push(folder, REPO)
    again = push(folder, REPO)
    assert hub.commits(REPO) == 1 and again.oid == first.oid


def test_another_method_base_or_kind_is_not_overwritten_unasked(hub: FakeHub, folder: Path, whole: Path) -> None:
    set_base(folder, "openai/clip-vit-base-patch32")
    push(folder, REPO)
    set_base(folder, "openai/clip-vit-base-patch16")
    with pytest.raises(HubError, match="another base_model_name_or_path.*overwrite=True"):
        push(folder, REPO)
    edit(folder, "adapter_config.json", peft_type="LORA")
    with pytest.raises(HubError, match="another peft_type.*overwrite=True"):
        push(folder, REPO)
    with pytest.raises(HubError, match="another kind of model.*overwrite=True"):
        push(whole, REPO)
    assert hub.commits(REPO) == 1
    push(whole, REPO, overwrite=True)
    assert hub.commits(REPO) == 2 and "model.safetensors" in hub.files(REPO)
    assert not {"adapter_config.json", "adapter_model.safetensors"} & hub.files(REPO).keys()
    with pytest.raises(HubError, match="another kind of model.*overwrite=True"):
        push(folder, REPO)


@pytest.mark.parametrize("repo", ["a/b/c", "with blank/x", "alice/--x", ""])
def test_a_malformed_repository_id_is_refused(hub: FakeHub, folder: Path, repo: str) -> None:
    with pytest.raises(HubError, match="push failed"):
        push(folder, repo)
    assert not hub.requests


# --- faults ---


def fails(folder: Path, match: str, **settings: str) -> None:
    """The push fails with a message that says how to go on, and changes nothing in the folder."""
    before = contents(folder)
    with pytest.raises(HubError, match=match) as caught:
        push(folder, REPO, **settings)
    assert contents(folder) == before
    assert f"The local copy in '{folder}' is complete" in str(caught.value)
    assert f"call push('{folder}', '{REPO}') again" in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_no_token(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    fails(folder, "not logged in.*hf auth login.*HF_TOKEN")
    assert not hub.requests


def test_wrong_token(hub: FakeHub, folder: Path) -> None:
    fails(folder, "refuses the token .401", token="hf_" + "b" * 30)
    assert REPO not in hub.branches


def test_offline(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    fails(folder, "offline mode is on.*HF_HUB_OFFLINE")
    assert not hub.requests


def test_nobody_listens(hub: FakeHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as bound:  # a port that no one else can take meanwhile
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{bound.getsockname()[1]}")
        fails(folder, "connection to the Hub failed")


MESSAGES = {
    401: "refuses the token .401",
    403: "refuses the token .403",
    409: "changed meanwhile .409",
    412: "changed meanwhile .412",
    418: "the Hub refuses .418",
    429: "too many requests",
    500: "the Hub has a problem .500",
    "cut": "connection to the Hub failed",
}


@pytest.mark.parametrize("fault", MESSAGES)
@pytest.mark.parametrize("endpoint", ["info", "preupload", "lfs_batch", "lfs_upload", "commit"])
def test_a_fault_that_stays_leaves_no_commit_and_the_push_can_be_repeated(
    hub: FakeHub, folder: Path, endpoint: str, fault: int | str
) -> None:
    hub.faults[endpoint] = [fault] * 6  # huggingface_hub tries six times where it tries again at all
    fails(folder, MESSAGES[fault])
    assert hub.commits(REPO) == 0
    hub.faults.clear()
    push(folder, REPO)
    assert hub.commits(REPO) == 1 and hub.files(REPO).keys() == ADAPTER_FILES


@pytest.mark.parametrize("fault", MESSAGES)
def test_a_fault_when_the_repositorys_adapter_is_looked_at(hub: FakeHub, folder: Path, fault: int | str) -> None:
    push(folder, REPO)
    (folder / "README.md").write_text("---\ntags: [new]\n---\n")
    hub.faults["resolve"] = [fault] * 12
    fails(folder, MESSAGES[fault])
    assert hub.commits(REPO) == 1


@pytest.mark.parametrize("fault", [403, 429, 500, "cut"])
def test_a_repository_that_cannot_be_made(hub: FakeHub, folder: Path, fault: int | str) -> None:
    hub.faults = {"create": [fault] * 6, "info": [404] * 6}
    fails(folder, MESSAGES[fault])
    assert REPO not in hub.branches


@pytest.mark.parametrize("fault", [429, 500, "cut"])
@pytest.mark.parametrize("endpoint", ["preupload", "lfs_batch", "lfs_upload"])
def test_a_fault_that_passes_is_survived(hub: FakeHub, folder: Path, endpoint: str, fault: int | str) -> None:
    hub.faults[endpoint] = [fault, fault]
    push(folder, REPO)
    assert hub.commits(REPO) == 1 and hub.files(REPO).keys() == ADAPTER_FILES


def test_a_lost_answer_does_not_lead_to_a_second_commit(hub: FakeHub, folder: Path) -> None:
    hub.faults["commit"] = ["cut after"]
    fails(folder, "connection to the Hub failed")
    assert hub.commits(REPO) == 1
    assert push(folder, REPO).oid == hub.sha(REPO, "main")
    assert hub.commits(REPO) == 1 and hub.requests.count("commit") == 1


def test_a_push_by_someone_else_meanwhile_is_not_overwritten(hub: FakeHub, folder: Path) -> None:
    push(folder, REPO)
    theirs = hub.files(REPO) | {"README.md": b"theirs"}
    upload = hub.preupload

    def preupload(**request: object) -> tuple[int, object]:
        hub.branches[REPO]["main"].append(theirs)
        return upload(**request)

    hub.preupload = preupload
    (folder / "README.md").write_text("mine")
    fails(folder, "changed meanwhile .412")
    assert hub.files(REPO) == theirs


def test_a_process_of_its_own_finds_the_hub_by_hf_endpoint(hub: FakeHub, folder: Path) -> None:
    settings = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    code = f"from hf_robust.cards.push import push; print(push({str(folder)!r}, {REPO!r}).oid)"
    ((printed, _),) = run_programs([sys.executable, "-c", code], **settings)
    assert printed.split() == [hub.sha(REPO, "main")]
    assert hub.commits(REPO) == 1


def test_write_card_replaces_the_card_and_leaves_nothing_else(folder: Path) -> None:
    class Broken:
        def save(self, path: Path) -> None:
            path.write_text("half")
            raise OSError("disk full")

    before = contents(folder)
    with pytest.raises(OSError, match="disk full"):
        write_card(folder, Broken())
    assert contents(folder) == before


def test_peft_models_card_is_replaced(folder: Path, tmp_path: Path) -> None:
    trainer = build(tmp_path / "run", "lora")
    assert isinstance(trainer.model.model, PeftModel)
    trainer.model.model.save_pretrained(str(tmp_path / "lora"), save_embedding_layers=False)
    path = write_card(tmp_path / "lora", model_card(trainer.model))
    assert path.read_text().count("# LORA on CLIPModel") == 1 and "More Information Needed" not in path.read_text()
