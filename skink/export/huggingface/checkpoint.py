"""What is on disk: checks of a checkpoint's files before anything is loaded from them.

transformers fills what a checkpoint lacks with random numbers and goes on. Here a file that is cut short, damaged or
absent is named, before a model is built.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from skink.errors import GraphError, ModelError
from skink.graph.program import Program
from skink.graph.serialization import program_from_json

GRAPH_FILE = "graph.json"
GRAPH_FORMAT = 1
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder")
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 8),
}
_AGAIN = "copy or download the file again."


def read_graph(name: str | os.PathLike[str], hub: Mapping[str, Any]) -> Program:
    """The full-sequence graph of a Skink folder or repository, with weights on the meta device.

    Args:
        name: a folder or a hub id.
        hub: arguments of `from_pretrained`, of which those about the hub are used.

    Raises:
        ModelError: MODEL-001, there is none.
        GraphError: GRAPH-001, it is damaged or of another format.
    """
    arguments = {key: hub[key] for key in _HUB_ARGUMENTS if hub.get(key) is not None}
    try:
        path = cached_file(str(name), GRAPH_FILE, **arguments)
    except OSError as error:
        raise ModelError(
            "MODEL-001",
            f"{str(name)!r} has no {GRAPH_FILE}, so it is not a Skink model.",
            why=str(error).splitlines()[0],
            fix="give a folder that skink compress or save_pretrained wrote.",
        ) from error
    try:
        data = json.loads(Path(str(path)).read_text(encoding="utf-8"))
        version, program = data["format"], data["program"]
    except (ValueError, KeyError, TypeError) as error:
        raise GraphError(
            "GRAPH-001",
            f"{GRAPH_FILE} is not a graph that Skink wrote, or it was damaged.",
            where=str(path),
            why=f"{type(error).__name__}: {error}",
            fix=_AGAIN,
        ) from error
    if version != GRAPH_FORMAT:
        raise GraphError(
            "GRAPH-001",
            f"{GRAPH_FILE} is of format {version!r}; this Skink reads format {GRAPH_FORMAT}.",
            where=str(path),
            fix="update skink.",
        )
    return program_from_json(program)


def read_config(folder: Path) -> dict[str, Any]:
    """The values of a folder's config.json.

    Raises:
        ModelError: MODEL-001, no such folder, no config.json in it, or one that cannot be read.
    """
    path = folder / "config.json"
    if not path.is_file():
        there = sorted(entry.name for entry in folder.iterdir())[:8]
        raise ModelError(
            "MODEL-001",
            f"{str(folder)!r} is not a checkpoint: config.json is missing.",
            why=f"it holds {', '.join(there)}." if there else "it is empty.",
            fix="give the folder that save_pretrained wrote, or a hub id.",
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(
            "MODEL-001", "config.json cannot be read.", where=str(path), why=str(error), fix=_AGAIN
        ) from error
    if not isinstance(values, dict) or "model_type" not in values:
        raise ModelError(
            "MODEL-001",
            "config.json names no model_type.",
            where=str(path),
            fix="give the folder of a Hugging Face model; a PEFT adapter must be merged into its base model first.",
        )
    return values


def check_weights(folder: Path) -> tuple[Path, ...]:
    """The safetensors files of a checkpoint, each whole.

    Raises:
        ModelError: MODEL-001 no weights; -002 a file is missing, cut short or damaged; -003 only pickles.
    """
    index, single = folder / _INDEX, folder / _WEIGHTS
    if single.is_file():
        check_safetensors(single)
        return (single,)
    if not index.is_file():
        _refuse_without_safetensors(folder)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        placed: dict[str, set[str]] = {}
        for tensor, file in weight_map.items():
            placed.setdefault(str(file), set()).add(tensor)
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ModelError(
            "MODEL-002",
            f"{_INDEX} cannot be read.",
            where=str(index),
            why=f"{type(error).__name__}: {error}",
            fix=_AGAIN,
        ) from error
    files = []
    for file, expected in sorted(placed.items()):
        path = folder / file
        if Path(file).name != file or not path.is_file():
            raise ModelError(
                "MODEL-002",
                f"{file} is missing.",
                where=str(folder),
                why=f"{_INDEX} places {len(expected)} tensors in it.",
                fix=_AGAIN,
            )
        absent = expected - check_safetensors(path)
        if absent:
            raise _damaged(path, f"it lacks {min(absent)!r}, which {_INDEX} places in it.")
        files.append(path)
    return tuple(files)


def check_safetensors(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file, after checking that all their bytes are there.

    Raises:
        ModelError: MODEL-002 where they are not, or the header is damaged.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise _damaged(path, f"the file ends after {size} bytes, within its header.")
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            spans = sorted((*map(int, entry["data_offsets"]), name) for name, entry in entries.items())
            wrong = next((name for name, entry in entries.items() if not _fits(entry)), None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(path, f"its header cannot be read ({type(error).__name__}).") from error
    if wrong is not None:
        raise _damaged(path, f"its header gives {wrong!r} a size that its shape and dtype do not have.")
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            raise _damaged(path, f"its header leaves a gap before {name!r}, or lets it overlap another tensor.")
        end = stop
    if size != 8 + length + end:
        relation = "ends after" if size < 8 + length + end else "has"
        raise _damaged(path, f"it {relation} {size} bytes, where its header announces {8 + length + end}.")
    return set(entries)


def _fits(entry: Mapping[str, Any]) -> bool:
    begin, end = entry["data_offsets"]
    bits = _BITS.get(entry["dtype"])
    return bits is None or (end - begin) * 8 == math.prod(entry["shape"]) * bits


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(
        "MODEL-002", f"{path.name} is damaged or was not copied whole.", where=str(path), why=why, fix=_AGAIN
    )


def _refuse_without_safetensors(folder: Path) -> None:
    pickles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in _PICKLES)
    if pickles:
        raise ModelError(
            "MODEL-003",
            f"{str(folder)!r} has its weights in {pickles[0]}, a pickle, and none in safetensors.",
            why="a pickle can run any code when it is loaded.",
            fix="have it converted where it is trusted: load it there and call save_pretrained.",
        )
    raise ModelError(
        "MODEL-001",
        f"{str(folder)!r} is not a checkpoint: {_WEIGHTS} and {_INDEX} are missing.",
        fix="give the folder that save_pretrained wrote, or a hub id.",
    )


def refuse_partial_load(name: str | os.PathLike[str], info: Any) -> None:
    """Weights that a checkpoint lacks would be left random.

    Args:
        name: the checkpoint's.
        info: what `from_pretrained(..., output_loading_info=True)` says about it.

    Raises:
        ModelError: MODEL-002.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            "MODEL-002",
            f"{len(missing)} weights of the model are not in the checkpoint.",
            where=str(name),
            why=f"missing: {', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}.",
            fix="copy or download the model again, whole.",
        )


def explain_load(name: str | os.PathLike[str], error: Exception) -> ModelError:
    """What transformers raised while it loaded weights, as an error for the user."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, OSError) and "safetensors" in lines[0]:
        return ModelError(
            "MODEL-003",
            f"{str(name)!r} has no weights in safetensors.",
            why=lines[0],
            fix="have it converted where it is trusted: load it there and call save_pretrained.",
        )
    return ModelError(
        "MODEL-002",
        "the weights could not be loaded.",
        where=str(name),
        why=lines[0],
        fix="copy or download the model again.",
    )
