"""What Skink can do with one tiny model: capture it, raise its attention, step it, export it; and for each no, why."""

import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx
from transformers import GenerationConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from skink.errors import SkinkError
from skink.export.onnx import OrtRunner, export_onnx
from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.graph.state import derive_step
from skink.graph.text import target_name
from skink.kernels import find_op
from skink.passes.canonicalize import Canonicalize
from tests.zoo.shrink import FIRST_MARK, decoder_config, encoder_config

aten = torch.ops.aten

NEW_TOKENS = 12
TOLERANCE = 1e-5
_ROWS, _LENGTH, _PADDING = 3, 11, 4

DECODERS = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
ENCODERS = tuple(MODEL_FOR_MASKED_LM_MAPPING_NAMES)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        model_type: transformers' name of the family.
        cls: the class that was tried, or "" where none could be built.
        captured, raised, stepped, onnx: "yes", "no", or "" where it was not tried.
        why: the reason of the first no.
    """

    model_type: str
    cls: str
    captured: str = ""
    raised: str = ""
    stepped: str = ""
    onnx: str = ""
    why: str = ""


class RefusedError(Exception):
    """Something that does not work; the message is the reason."""


def build(model_type: str, *, encoder: bool = False) -> PreTrainedModel:
    """A tiny random model of a family, the same at every call; no weight is all zeros or all ones."""
    config, cls = encoder_config(model_type) if encoder else decoder_config(model_type)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PreTrainedModel = cls._from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def prompts() -> dict[str, Tensor]:
    """A batch padded on the left, of tokens that stand for nothing but themselves."""
    generator = torch.Generator().manual_seed(_LENGTH)
    tokens = torch.randint(3, FIRST_MARK, (_ROWS, _LENGTH), generator=generator)
    mask = torch.ones_like(tokens)
    for row in range(_ROWS):
        mask[row, : max(_PADDING - row, 0)] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": tokens * mask, "attention_mask": mask, "position_ids": positions}


def try_decoder(model_type: str, *, onnx: bool = True) -> Row:
    """The row of one family of decoders."""
    return _tried(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], encoder=False, onnx=onnx)


def try_encoder(model_type: str) -> Row:
    """The row of one family of encoders: captured and raised only, since they give no token after another."""
    return _tried(model_type, MODEL_FOR_MASKED_LM_MAPPING_NAMES[model_type], encoder=True, onnx=False)


def _tried(model_type: str, cls: str, *, encoder: bool, onnx: bool) -> Row:
    found = {"model_type": model_type, "cls": cls}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build(model_type, encoder=encoder)
            model.set_attn_implementation("eager")
    except Exception as error:
        return Row(**found, why=f"cannot be built: {one_line(error)}")
    found["cls"] = type(model).__name__
    stages: list[tuple[str, Callable[[], None]]] = []
    trial = _Trial(model)
    stages = [("captured", trial.capture), ("raised", trial.canonicalize)]
    if not encoder:
        stages.append(("stepped", trial.step))
    if onnx:
        stages.append(("onnx", trial.export))
    for name, attempt in stages:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                attempt()
        except Exception as error:
            found[name] = "no"
            found["why"] = (found["why"] + "; " if "why" in found else "") + one_line(error)
            if name != "raised":
                break
        else:
            found[name] = "yes"
    return Row(**found)


class _Trial:
    """One model on its way."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.inputs = prompts()
        self.program: Program
        self.tokens: Tensor | None = None

    def capture(self) -> None:
        """Captured, with the logits of eager transformers."""
        self.program = capture(self.model)
        self._check_logits()

    def _check_logits(self) -> None:
        given = self.inputs | {"token_type_ids": torch.zeros_like(self.inputs["input_ids"])}
        given = {entry.name: given[entry.name] for entry in self.program.inputs}
        (found,) = self.program(*given.values())
        with torch.no_grad():
            wanted = self.model(**given).logits
        if not bool(wanted.isfinite().all()):
            raise RefusedError("transformers' own logits are not finite")
        real = self.inputs["attention_mask"].bool()
        distance = float((found - wanted)[real].abs().max())
        if not distance <= TOLERANCE * max(1.0, float(wanted[real].abs().max())):
            raise RefusedError(f"logits differ from eager's by {distance:.0e}")

    def canonicalize(self) -> None:
        """Canonical, with the same logits, and with every attention an op."""
        result = Pipeline((Canonicalize(),)).run(self.program, verify=1)
        self._check_logits()
        left = unraised(self.program)
        if left:
            refused = {entry.node: entry.reason for entry in result.passes[0].result.refused}
            places = sorted({place(node) for node in left})
            why = next((refused[node] for node in left if node in refused), "no rule fits")
            raise RefusedError(f"attention at {', '.join(places)} is not raised: {why}")

    def step(self) -> None:
        """Stepped, with the greedy tokens of transformers, and the logits of one run over all of them."""
        stepped = derive_step(self.program)
        found, logits = greedy(stepped, self.inputs)
        self._check_steps(found, logits)
        self.tokens = self._generated()
        if not torch.equal(found, self.tokens):
            # Steps equal one run of the model without a cache.
            raise RefusedError(
                "greedy tokens differ from generate's, as they do from transformers' own without its cache"
            )

    def _check_steps(self, tokens: Tensor, logits: Tensor) -> None:
        ids = torch.cat([self.inputs["input_ids"], tokens], 1)
        mask = torch.cat([self.inputs["attention_mask"], torch.ones_like(tokens)], 1)
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with torch.no_grad():
            whole = self.model(**{entry.name: given[entry.name] for entry in self.program.inputs}).logits
        wanted = whole[:, _LENGTH - 1 : -1]
        distance = float((logits - wanted).abs().max())
        if not distance <= 10 * TOLERANCE * max(1.0, float(wanted.abs().max())):
            raise RefusedError(f"logits of steps differ from those of one run by {distance:.0e}")

    def _generated(self) -> Tensor:
        config = GenerationConfig(
            max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        self.model.generation_config = GenerationConfig(pad_token_id=0)
        given = {name: self.inputs[name] for name in ("input_ids", "attention_mask")}
        return self.model.generate(**given, generation_config=config)[:, _LENGTH:]

    def export(self) -> None:
        """Exported, with the same greedy tokens in ONNX Runtime."""
        with tempfile.TemporaryDirectory() as folder:
            export_onnx(self.program, Path(folder) / "onnx", config={}, generation_config={}, check=False)
            runner = OrtRunner(Path(folder) / "onnx", threads=1)
            given = (self.inputs["input_ids"], self.inputs["attention_mask"])
            found = runner.generate(*given, max_new_tokens=NEW_TOKENS, eos=())[:, _LENGTH:]
        if not torch.equal(found, self.tokens):
            raise RefusedError(
                f"greedy tokens differ: {int((found == self.tokens).sum())} of {found.numel()} are equal"
            )


def greedy(stepped: Program, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The likeliest tokens int64[B, N] after the prompts, one step at a time, and their logits [B, N, V]."""
    rows = inputs["input_ids"].shape[0]
    sizes = {"B": rows}
    state = [
        torch.zeros([sizes.get(dim, 0) if isinstance(dim, str) else dim for dim in entry.shape])
        for entry in stepped.state
    ]
    feeds = dict(inputs)
    tokens: list[Tensor] = []
    scores: list[Tensor] = []
    names = [entry.name for entry in stepped.inputs]
    while len(tokens) < NEW_TOKENS:
        logits, *state = stepped(*(feeds[name] for name in names), *state)
        token = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(token)
        scores.append(logits[:, -1:])
        feeds = {
            "input_ids": token,
            "attention_mask": torch.cat([feeds["attention_mask"], torch.ones_like(token)], 1),
            "position_ids": feeds["position_ids"][:, -1:] + 1,
        }
    return torch.cat(tokens, 1), torch.cat(scores, 1)


_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_VIEWS = {
    "slice",
    "select",
    "expand",
    "reshape",
    "view",
    "narrow",
    "permute",
    "transpose",
    "unsqueeze",
    "squeeze",
    "split",
}
_COPIES = {"to", "_to_copy", "type_as", "contiguous", "clone", "dropout", "cat", "getitem", "flatten", "unflatten"}
_THROUGH = _VIEWS | _COPIES | {"masked_fill", "where", "mul", "div", "add", "sub", "nan_to_num"}
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.einsum.default, aten.baddbmm.default)


def unraised(program: Program) -> list[fx.Node]:
    """Attentions that are still plain operators: a softmax whose result is multiplied with values, or PyTorch's own."""
    return [
        node
        for node in program.graph.nodes
        if node.target is aten.scaled_dot_product_attention.default
        or (node.target in _SOFTMAX and _reaches_a_product(node))
    ]


def _reaches_a_product(node: fx.Node) -> bool:
    pending, seen = list(node.users), set()
    while pending:
        user = pending.pop()
        if user in seen:
            continue
        seen.add(user)
        if user.target in _PRODUCTS:
            return True
        if find_op(user.target) is None and target_name(user.target).split(".")[1] in _THROUGH:
            pending.extend(user.users)
    return False


def place(node: fx.Node) -> str:
    """The file and line of a node, without folders."""
    return str(node.meta.get("source", "?")).rsplit("/", 1)[-1]


def one_line(error: Exception) -> str:
    """An error as a short reason: its code where it has one, and nothing of this machine."""
    if isinstance(error, RefusedError):
        return str(error)
    if isinstance(error, SkinkError):
        why = error.why.strip().splitlines()
        where = error.where.rsplit("site-packages/transformers/models/", 1)
        parts = [error.what, *([f"at {where[1]}"] if len(where) == 2 else []), *why[:1]]
        return f"{error.code} {_short(' '.join(parts))}"
    text = str(error).strip().replace("\n", " ")
    return f"{type(error).__name__}: {_short(text)}"


def _short(text: str) -> str:
    text = " ".join(text.replace("|", "/").split())
    return text if len(text) <= 240 else text[:239] + "…"
