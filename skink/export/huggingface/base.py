"""A module tree with its graph as a `PreTrainedModel`: its weights, its folder, and nothing of what it computes."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import SafetensorError
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from skink.errors import ModelError
from skink.export.huggingface.card import write_card
from skink.export.huggingface.checkpoint import (
    GRAPH_FILE,
    GRAPH_FORMAT,
    check_weights,
    explain_load,
    read_graph,
    refuse_partial_load,
)
from skink.export.huggingface.config import SkinkConfig
from skink.export.huggingface.forms import refuse_other_kind
from skink.export.huggingface.functions import DECODER_INPUTS, Functions
from skink.graph.emit import build_tree, linear_owner, tied_names
from skink.graph.program import Program
from skink.graph.serialization import program_to_json

aten = torch.ops.aten


class SkinkPreTrainedModel(PreTrainedModel):
    """Parameters have the names that they have in the source model, in `nn.Linear` and `nn.Embedding` children.

    Args:
        config: sizes and token ids.
        program: the full-sequence graph. With weights on the meta device, as when a checkpoint is being loaded, the
            trained ones take PyTorch's default dtype.
        copy: give the model tensors of its own. Otherwise it shares them with the program.

    Raises:
        ModelError: MODEL-001, no program; -005, the program is of another kind of model.

    Class attributes:
        known_inputs: the inputs that `forward` can give a graph.
        outputs: those that a graph must begin its results with.
    """

    known_inputs: ClassVar[tuple[str, ...]] = DECODER_INPUTS
    outputs: ClassVar[tuple[str, ...]] = ()
    # What `skink.compress` did to make this model, where it made it: a `skink.compression.Compression`.
    compression: Any = None

    config: SkinkConfig
    config_class = SkinkConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    # Where transformers says whether, and with which function; see `run_region`.
    gradient_checkpointing = False
    _every_n_regions = 1

    def __init__(self, config: SkinkConfig, program: Program | None = None, *, copy: bool = True) -> None:
        if program is None:
            raise ModelError(
                "MODEL-001",
                "a Skink model cannot be made from its configuration alone: what it computes is in a graph.",
                fix="make it with skink.compress, or load a folder with skink.load.",
            )
        refuse_other_kind(type(self), config, program)
        super().__init__(config)
        if program.is_meta:
            program = program.with_dtype(torch.get_default_dtype(), shapes_only=True)
        tree = build_tree([program], copy=copy)
        for name, child in tree.named_children():
            self.add_module(name, child)
        for name, parameter in tree.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in tree.named_buffers(recurse=False):
            self.register_buffer(name, buffer)
        self._functions = Functions(program, self.known_inputs)
        self._tied_weights_keys = tied_names(program, tree)
        self.config.tie_word_embeddings = bool(self._tied_weights_keys)
        self._embedding, self._head = _ends(program)
        self.post_init()  # type: ignore[no-untyped-call]

    @property
    def program(self) -> Program:
        """The full-sequence graph with this model's present weights, which it shares.

        Raises:
            ModelError: MODEL-005 where layers were replaced, as adapters do.
        """
        program = self._functions.program.clone()
        tensors = dict(_tensors(self))
        missing = [name for name, _ in program.weights() if name not in tensors]
        if missing:
            raise ModelError(
                "MODEL-005",
                f"the weights {', '.join(missing[:3])} are not where the graph reads them.",
                why="layers were replaced, as PEFT does.",
                fix="merge adapters first: model = peft_model.merge_and_unload().",
            )
        for name, _ in list(program.weights()):
            program.set_weight(name, tensors[name].detach(), buffer=name in program.buffers)
        return program

    @property
    def recomputes(self) -> bool:
        """Whether a call now keeps little for the backward pass and computes the rest anew."""
        return self.gradient_checkpointing and self.training and torch.is_grad_enabled()

    def run_region(self, index: int, run: Callable[..., Any], *args: Any) -> Any:
        """What `run(*args)` gives, by the function that transformers was given for gradient checkpointing."""
        if index % self._every_n_regions:
            return run(*args)
        return self._gradient_checkpointing_func(run, *args)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, every_n_layers: int = 1
    ) -> None:
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ModelError(
                "MODEL-005",
                "use_reentrant=True is not supported.",
                why="it gives gradients to what reads some, and the graph's first region reads token ids only.",
                fix='leave it out, or give {"use_reentrant": False}.',
            )
        self._every_n_regions = every_n_layers
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func)

    def get_input_embeddings(self) -> nn.Module:
        """The module that turns token ids into vectors."""
        return self.get_submodule(self._embedding)

    def get_output_embeddings(self) -> nn.Module | None:
        """The linear layer that gives the logits; None where something else does."""
        return self.get_submodule(self._head) if self._head else None

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another module in the embedding's place."""
        self.set_submodule(self._embedding, value)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another module in the head's place."""
        self.set_submodule(self._head, new_embeddings)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """As in transformers; with graph.json, and a model card where the folder has none."""
        repository = {name: kwargs.pop(name) for name in ("repo_id", "commit_message", "private") if name in kwargs}
        program = self.program
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            folder = Path(save_directory)
            text = json.dumps({"format": GRAPH_FORMAT, "program": program_to_json(program)})
            (folder / GRAPH_FILE).write_text(text, encoding="utf-8")
            write_card(folder, self.config)
        if push_to_hub:
            repository.setdefault("repo_id", Path(save_directory).name)
            self.push_to_hub(token=kwargs.get("token"), **repository)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str], *model_args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers. Only safetensors are read, no code is run, and every weight must be there.

        Raises:
            ModelError: MODEL-001 no graph.json; -002 weights missing or damaged; -003 no safetensors; -005 a device map
                over several devices.
            GraphError: GRAPH-001, graph.json is not a graph that this Skink reads.
        """
        name = pretrained_model_name_or_path
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs.pop("trust_remote_code", None)
        kwargs["use_safetensors"] = True
        program = read_graph(name, kwargs)
        folder = Path(name) / (kwargs.get("subfolder") or "")
        if folder.is_dir() and not kwargs.get("variant"):
            check_weights(folder)
        load: Any = super().from_pretrained
        try:
            model, info = load(name, program, *model_args, output_loading_info=True, **kwargs)
        except (RuntimeError, SafetensorError) as error:
            raise explain_load(name, error) from error
        refuse_partial_load(name, info)
        devices = {str(device) for device in getattr(model, "hf_device_map", {}).values()}
        if len(devices) > 1:
            raise ModelError(
                "MODEL-005",
                f"the device map spreads the model over {', '.join(sorted(devices))}; a graph runs on one device.",
                fix='load it with device_map={"": 0}, or without device_map.',
            )
        return (model, info) if wants_info else model

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: weights come from a program or from a checkpoint, whole."""

    def _apply(self, fn: Any, recurse: bool = True) -> "SkinkPreTrainedModel":
        # A cast to half precision is for trained weights. Rotary frequencies in half precision are wrong positions.
        before = {name: buffer for name, buffer in self.named_buffers() if buffer.is_floating_point()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            owner_path, _, leaf = name.rpartition(".")
            owner = self.get_submodule(owner_path)
            new = owner._buffers[leaf]
            if new is not None and new.dtype.itemsize < old.dtype.itemsize:
                owner._buffers[leaf] = old.to(new.device)
        return self


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _ends(program: Program) -> tuple[str, str]:
    """Paths of the embedding that reads the token ids and of the linear layer that gives the logits, or ""."""
    ids = program.graph.find_nodes(op="placeholder")[0]
    lookups = [user for user in ids.users if user.target is aten.embedding.default]
    embedding = str(lookups[0].all_input_nodes[0].target).rpartition(".")[0] if lookups else ""
    node: fx.Node = program.graph.output_node().all_input_nodes[0]
    # What is joined of several results, as of a pivoted layer, is no one layer's.
    while node.all_input_nodes and node.target not in (aten.linear.default, aten.cat.default):
        node = node.all_input_nodes[0]
    return embedding, linear_owner(program, node) or ""
