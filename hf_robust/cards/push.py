# SPDX-License-Identifier: Apache-2.0
"""To the Hub: only files from a list, without local paths and tokens, in one commit."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISREG
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from safetensors import SafetensorError, safe_open
from yaml import YAMLError

from ..data.text_files import parse_json, read_json, read_text
from ..data.yaml_files import parse_yaml
from ..errors import ConfigError, DataError, HubError, UnsafeFileError
from ..tasks.task import CONFIG_FILE, PROCESSOR_FOLDER, WEIGHTS_FILE
from .card import REPOSITORY
from .markdown import hub_id

CARD, ADAPTER, ADAPTER_WEIGHTS = "README.md", "adapter_config.json", "adapter_model.safetensors"
MODEL, MODEL_WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
SETTINGS = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
VOCABULARY = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model")
PROCESSOR = (*SETTINGS, *VOCABULARY)  # beside a whole model; in a folder of its own beside an adapter
PICTURE = re.compile(r"!\[[^\]]*\]\((\w[\w.-]*\.png)\)", re.ASCII)
BASE_KEYS = ("base_model_name_or_path", "_name_or_path", "name_or_path")
PRIVATE = {
    "token": re.compile(r"\b(?:hf|hf_oauth|api_org)_[A-Za-z0-9]{20,}"),
    "local path": re.compile(
        r"(?<![\w:/.\-<])~?/(?:[\w.\-@+]|\\[_-])+/[\w.\-@+]"  # /home/me, ~/models; no URL, no and/or, no </s>
        r"|(?<!\w)[A-Za-z]:(?:\\+|/)[\w.\-]+|\\\\\w+\\+\w|\bfile://|(?<![\w.])~/",
        re.ASCII,
    ),
}


def write_card(folder: str | Path, card: ModelCard) -> Path:
    """Writes a card into the folder of a saved model; a card that is there is replaced at once.

    Args:
        folder: the folder; PEFT's own card may be in it.
        card: what `model_card` returned.

    Returns:
        The card's file.

    Example:
        >>> model.save_pretrained("my-adapter")
        >>> write_card("my-adapter", model_card(trainer.model, trainer.args, results))
        PosixPath('my-adapter/README.md')
    """
    path = Path(folder) / CARD
    temporary = path.with_name(f".hf_robust-tmp-{os.getpid()}.md")
    try:
        card.save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload with hf_robust",
    base_model_id: str | None = None,
    overwrite: bool = False,
) -> CommitInfo:
    """Pushes a saved adapter or model to the Hub, in one commit or not at all.

    Only these files are pushed: adapter or whole model, `classifier.json` and its weights, processor, tokenizer,
    the card and the PNG files it shows. All else stays where it is: checkpoints, training arguments, other adapters.
    A base model's local path is replaced by `base_model_id` or by nothing. The folder is not changed.

    Args:
        folder: what `save_pretrained` or `RobustTrainer.save_model` wrote.
        repo_id: `"owner/name"`, or `"name"` for one of your own; the repository is made if it is not there.
        private: whether a new repository is private; by default what the owner's settings say.
        token: by default the one of `hf auth login` or `HF_TOKEN`.
        revision: the branch, by default `main`; it is made if it is not there.
        commit_message: title of the commit.
        base_model_id: id of the base model on the Hub, where it was loaded from a folder.
        overwrite: whether an adapter of another method or base, or a model in the place of an adapter, is replaced.

    Returns:
        The commit, with `commit_url`.

    Raises:
        UnsafeFileError: a file is a link or no ordinary file, or the index names a file that is no shard.
        HubError: the folder holds no complete model; a file that would be pushed holds a token or a local path; the
            repository holds another model; or the Hub cannot be reached or refuses. The message says how to resume.

    Example:
        >>> push("my-adapter", "me/clip-saft").commit_url
        'https://huggingface.co/me/clip-saft/commit/…'
    """
    folder = Path(folder)
    try:
        contents = _contents(folder, base_model_id, token)
    except (UnicodeDecodeError, YAMLError, SafetensorError) as error:
        raise HubError(f"file is malformed ({error}); nothing has been pushed", where=str(folder)) from error
    except (DataError, ConfigError) as error:
        raise HubError(f"{error.what}; nothing has been pushed", where=error.where, got=error.got) from error
    with _explained(folder, repo_id):
        api = HfApi(token=True if token is None else token)
        repo = api.create_repo(repo_id, private=private, exist_ok=True)
        repo_id = repo_id if "/" in repo_id else repo.repo_id
        card = contents.get(CARD)
        if isinstance(card, bytes):  # its snippet names the repository
            contents[CARD] = card.replace(f'"{REPOSITORY}"'.encode(), json.dumps(repo_id).encode())
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        there = api.model_info(repo_id, revision=revision)
        names = {file.rfilename for file in there.siblings or ()}
        operations: list[Any] = [CommitOperationAdd(name, content) for name, content in contents.items()]
        if overwrite:  # what is left of another model would be loaded in the place of this one
            operations += [CommitOperationDelete(name) for name in sorted(names - set(contents)) if _is_model(name)]
        else:
            _check_same_model(api, repo_id, there.sha, names, contents)
        if any(name.startswith(f"{PROCESSOR_FOLDER}/") for name in contents):  # one beside it, of an early version
            operations += [CommitOperationDelete(name) for name in PROCESSOR if name in names - set(contents)]
        # with its parent the commit is refused if someone else has pushed meanwhile
        return api.create_commit(
            repo_id, operations, commit_message=commit_message, revision=revision, parent_commit=there.sha
        )


@contextmanager
def _explained(folder: Path, repo_id: str) -> Iterator[None]:
    """Turns what huggingface_hub raises, after its own retries, into a `HubError` that says how to go on."""
    try:
        yield
    except HubError:
        raise
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        # uploads and downloads raise errors of their own around what happened
        known = isinstance(error, (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled))
        cause = error if known or error.__cause__ is None else error.__cause__
        what, remedy = _reason(cause)
        remedy += f", then call push({str(folder)!r}, {repo_id!r}) again: what the Hub has already is not sent twice."
        remedy = f"The local copy in {str(folder)!r} is complete. {remedy}"
        what += f" ({' '.join(str(cause).split())})"
        raise HubError(what, where=repo_id, remedy=remedy) from error


def _reason(error: BaseException) -> tuple[str, str]:
    if isinstance(error, LocalTokenNotFoundError):
        return "not logged in", "Run `hf auth login` or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "offline mode is on", "Unset HF_HUB_OFFLINE"
    if isinstance(error, HfHubHTTPError):
        return _refusal(error.response.status_code)
    if isinstance(error, HTTPError):
        return "connection to the Hub failed", "Check the network"
    return "push failed", "See to its cause"


def _refusal(status: int) -> tuple[str, str]:
    if status in (401, 403):
        return f"the Hub refuses the token ({status})", "Log in with a token that may write to this repository"
    if status in (409, 412):
        return f"the repository has changed meanwhile ({status})", "Look at what is there now"
    if status == 429:
        return "too many requests (429)", "Wait some minutes"
    if status >= 500:
        return f"the Hub has a problem ({status})", "Wait, and see status.huggingface.co"
    return f"the Hub refuses ({status})", "See to its cause"


def _is_model(name: str) -> bool:
    return name in (ADAPTER, ADAPTER_WEIGHTS, MODEL, MODEL_WEIGHTS, INDEX) or SHARD.fullmatch(name) is not None


def _check_same_model(api: HfApi, repo_id: str, sha: str | None, names: set[str], contents: dict[str, Any]) -> None:
    """Refuses to push over another kind of model, or over an adapter of another method or base."""
    remedy = "Push to another repository, or pass overwrite=True."
    if (MODEL if ADAPTER in contents else ADAPTER) in names - set(contents):
        raise HubError("repository holds another kind of model", where=repo_id, got=sorted(names), remedy=remedy)
    if ADAPTER not in names:
        return
    with TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo_id, ADAPTER, revision=sha, local_dir=folder)
        there = read_json(Path(path))
    new = parse_json(contents[ADAPTER], ADAPTER)
    there = there if isinstance(there, dict) else {}  # PEFT cannot read it, so it is nothing that could be lost
    for key in ("peft_type", "base_model_name_or_path"):
        if there.get(key) and new.get(key) and there[key] != new[key]:
            what = f"repository holds an adapter with another {key}"
            raise HubError(what, where=repo_id, got=there[key], allowed=repr(new[key]), remedy=remedy)


# --- what is pushed ---


def _contents(folder: Path, base_model_id: str | None, token: str | None) -> dict[str, bytes | str]:
    """Returns what will be pushed: small files as they will be, large ones as their paths."""
    if base_model_id is not None and hub_id(base_model_id) is None:
        raise HubError("not an id on the Hub", where="base_model_id", got=base_model_id)
    contents: dict[str, bytes | str] = {}
    for name in _model_files(folder):
        contents[name] = _cleaned(folder, name, base_model_id) if name.endswith(".json") else _weights(folder, name)
    own_folder = ADAPTER in contents and os.path.lexists(folder / PROCESSOR_FOLDER)
    processor = [f"{PROCESSOR_FOLDER}/{name}" for name in PROCESSOR] if own_folder else PROCESSOR
    for name in (CONFIG_FILE, WEIGHTS_FILE, *processor):
        if os.path.lexists(folder / name):
            is_settings = name == CONFIG_FILE or name.rpartition("/")[2] in SETTINGS
            contents[name] = _cleaned(folder, name, base_model_id) if is_settings else str(_file(folder, name))
    if os.path.lexists(folder / CARD):
        card = _card(folder, base_model_id)
        contents[CARD] = card.encode()
        contents |= {name: _file(folder, name).read_bytes() for name in PICTURE.findall(card)}
    for name, content in contents.items():
        if isinstance(content, bytes) and not name.endswith(".png"):
            _check_private(name, content.decode(), token)
    return contents


def _card(folder: Path, base_model_id: str | None) -> str:
    """Returns the card; in the metadata of PEFT's own there is the base model's path."""
    text = read_text(_file(folder, CARD))
    if metadata_block := REGEX_YAML_BLOCK.search(text):  # as ModelCard finds it, and reads without limits
        parse_yaml(metadata_block.group(2), CARD)
    card = ModelCard(text)
    metadata: Any = card.data
    if not isinstance(metadata.base_model, str) or hub_id(metadata.base_model) is not None:
        return text
    metadata.base_model = base_model_id
    metadata.tags = [tag for tag in metadata.tags or [] if not tag.startswith("base_model:")]
    return str(card)


def _model_files(folder: Path) -> list[str]:
    """Returns the names of the adapter's or model's files, of which none may be missing."""
    adapter = os.path.lexists(folder / ADAPTER)
    names = [ADAPTER, ADAPTER_WEIGHTS] if adapter else [MODEL, MODEL_WEIGHTS]
    if not adapter and os.path.lexists(folder / INDEX):
        weight_map = _read_object(folder, INDEX).get("weight_map")
        shards = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else {"no weight_map"}
        if wrong := sorted(shard for shard in shards if SHARD.fullmatch(shard) is None):
            raise UnsafeFileError("index names files that are no shards", where=str(folder / INDEX), got=wrong[:3])
        names = [MODEL, INDEX, *sorted(shards)]
    if missing := [name for name in names if not os.path.lexists(folder / name)]:
        remedy = "Save it with save_pretrained or RobustTrainer.save_model."
        raise HubError("folder holds no complete model", where=str(folder), got=missing, remedy=remedy)
    return names


def _file(folder: Path, name: str) -> Path:
    """Returns the path of an ordinary file that lies in the folder itself, or in its subfolder of the processor."""
    path = folder / name
    if not os.path.lexists(path):
        raise HubError("file is missing", where=str(folder), got=name)
    if not S_ISREG(path.lstat().st_mode) or (path.parent != folder and path.parent.is_symlink()):
        remedy = "Put the file itself in its place."
        raise UnsafeFileError("not an ordinary file; a link could lead anywhere", where=str(path), remedy=remedy)
    return path


def _weights(folder: Path, name: str) -> str:
    path = _file(folder, name)
    with safe_open(path, framework="numpy") as file:
        _check_private(name, json.dumps(file.metadata()))
    return str(path)


def _read_object(folder: Path, name: str) -> dict[str, Any]:
    content = read_json(_file(folder, name))
    if not isinstance(content, dict):
        raise DataError("file is malformed", where=name, got=type(content).__name__, allowed="a JSON object")
    return content


def _cleaned(folder: Path, name: str, base_model_id: str | None) -> bytes:
    """Returns a JSON file in which local paths of the base model are replaced by its id, or by nothing."""
    content = _read_object(folder, name)
    for key in BASE_KEYS:
        if key in content:
            content[key] = hub_id(str(content[key] or ""))
    if name == ADAPTER and base_model_id is not None:
        content[BASE_KEYS[0]] = base_model_id
    return json.dumps(content, indent=2, ensure_ascii=False).encode()


def _check_private(name: str, text: str, token: str | None = None) -> None:
    """Refuses text with a token or a local path, in which a user's name would stand too."""
    found = {what: match.group() for what, pattern in PRIVATE.items() if (match := pattern.search(text))}
    if "token" in found or (token is not None and token in text):
        found["token"] = "…"
    if found:
        remedy = "Take it out of the file; nothing has been pushed."
        raise HubError("file would publish what is private", where=name, got=found, remedy=remedy)
