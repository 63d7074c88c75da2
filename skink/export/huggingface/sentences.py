"""Folders of sentence-transformers: what makes embeddings of an encoder's results stands in files beside it."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from skink.errors import ModelError
from skink.evaluation.embeddings import Pooling, PoolingMode

MODULES_FILE = "modules.json"
_BESIDE = ("config_sentence_transformers.json", "sentence_bert_config.json")
_OF_A_MODULE = ("config.json", "model.safetensors")
_MODES: dict[str, PoolingMode] = {"cls_token": "cls", "max_tokens": "max", "mean_tokens": "mean"}


@dataclass(frozen=True)
class SentenceSettings:
    """What a checkpoint says of embeddings.

    Args:
        pooling: how they are made; the mean, normalised, where it says nothing.
        longest: tokens of a text, or None.
    """

    pooling: Pooling = field(default_factory=Pooling)
    longest: int | None = None


def sentence_settings(name: str | os.PathLike[str]) -> SentenceSettings:
    """The settings of a folder or repository; the defaults where it is none of sentence-transformers.

    Raises:
        ModelError: MODEL-001, a file that cannot be read.
    """
    modules = _modules(name)
    if not modules:
        return SentenceSettings()
    pooling: dict[str, Any] = next(
        (_json(name, f"{entry['path']}/config.json") for entry in modules if _is(entry, "Pooling")), {}
    )
    chosen = [mode for key, mode in _MODES.items() if pooling.get(f"pooling_mode_{key}")]
    chosen += [mode for mode in _MODES.values() if pooling.get("pooling_mode") == mode]
    longest = _json(name, "sentence_bert_config.json").get("max_seq_length")
    normalise = any(_is(entry, "Normalize") for entry in modules)
    return SentenceSettings(Pooling(chosen[0] if chosen else "mean", normalise), longest)


def copy_sentence_files(source: str | os.PathLike[str], folder: str | os.PathLike[str]) -> tuple[str, ...]:
    """Copy the files by which sentence-transformers reads a model. Returns their names; none where there are none.

    Args:
        source: a folder or hub id.
        folder: where to; made where it does not exist.

    Raises:
        ModelError: MODEL-001 a file that cannot be read, -003 a layer whose weights are a pickle.
    """
    modules = _modules(source)
    # A model in a folder of its own below is read from there, and so would not be ours.
    if not modules or any(_is(entry, "Transformer") and entry["path"] for entry in modules):
        return ()
    names = [MODULES_FILE, *(name for name in _BESIDE if _path(source, name))]
    for path in (entry["path"] for entry in modules if entry["path"]):
        found = [f"{path}/{name}" for name in _OF_A_MODULE if _path(source, f"{path}/{name}")]
        if f"{path}/model.safetensors" not in found and _path(source, f"{path}/pytorch_model.bin"):
            raise ModelError(
                "MODEL-003",
                f"{str(source)!r} has the weights of its layer {path} in a pickle.",
                why="a pickle can run any code when it is loaded.",
                fix="have it converted where it is trusted: load it in sentence-transformers there and save it again.",
            )
        names += found
    for name in names:
        target = Path(folder) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(_path(source, name)), target)
    return tuple(names)


def _is(module: dict[str, Any], kind: str) -> bool:
    return str(module.get("type", "")).rpartition(".")[2] == kind


def _modules(name: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The modules that a sentence-transformers folder lists, in order."""
    if _path(name, MODULES_FILE) is None:
        return []
    values = _json(name, MODULES_FILE)
    if not isinstance(values, list) or not all(_is_plain(entry) for entry in values):
        raise ModelError(
            "MODEL-001",
            f"{MODULES_FILE} is no list of modules.",
            where=str(name),
            fix="copy or download the file again.",
        )
    return values


def _is_plain(module: Any) -> bool:
    """Whether an entry names a folder of the checkpoint itself, and nothing outside it."""
    path = module.get("path") if isinstance(module, dict) else None
    return isinstance(path, str) and not path.startswith(("/", "~")) and ".." not in Path(path).parts


def _json(name: str | os.PathLike[str], file: str) -> Any:
    """The values of a JSON file; {} where there is none."""
    path = _path(name, file)
    if path is None:
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(
            "MODEL-001", f"{file} cannot be read.", where=str(name), why=str(error), fix="copy the file again."
        ) from error


def _path(name: str | os.PathLike[str], file: str) -> Path | None:
    """Where a file of a folder or repository is; None where it has no such file."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    found = cached_file(
        str(name), file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return Path(found) if found else None
