"""Calls that raise the errors whose messages docs/errors.md shows."""

import dataclasses
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any, ClassVar, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import masking_utils
from transformers.models.llama import modeling_llama

import skink
from skink.budget import Curve, allocate
from skink.compression.training_texts import training_windows
from skink.evaluation import HuggingFaceTarget, text_files
from skink.evaluation.harness import run_tasks
from skink.exploration import workers
from skink.exploration.axes import ModelFacts
from skink.exploration.points import expand
from skink.exploration.space import load_space
from skink.exploration.store import Store
from skink.export.folder import output_folder
from skink.export.huggingface import load_source
from skink.graph.bisect import bisect
from skink.graph.passes import Context, Pass, PassResult
from skink.graph.program import Program, Stage
from skink.graph.reproducer import read_reproducer
from skink.graph.rewriter import Rewriter
from skink.graph.serialization import load_graph
from skink.graph.state import derive_step
from skink.graph.windows import Windows
from skink.passes import discover
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose import LowRank
from skink.passes.recipe import load_recipe
from skink.training.loop.checkpoint import newest, write
from skink.training.loop.options import TrainOptions
from skink.training.loop.trainer import train
from skink.training.losses.objectives import Terms
from skink.training.losses.places import corresponding
from skink.training.losses.student import Student
from skink.training.overlap import check_overlap
from skink.training.weights.adapters import LoraOptions, adapter_targets
from skink.training.weights.trainable import choose_trainable, write_back
from tests.models import build, tiny
from tests.programs import canonical
from tests.training.loop.tiny_training import make_inputs, next_module, text

aten = torch.ops.aten


class Scores(nn.Module):
    """Takes two tensors."""

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        return query @ key.transpose(1, 2)


class Branch(nn.Module):
    """Decides by values."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x * 2
        return x


class CountedPositions(nn.Module):
    """Computes positions from the padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(10, 4), nn.Embedding(20, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.tokens(input_ids) + self.places(attention_mask.cumsum(1))


class Noise(nn.Module):
    """Is another at every call."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class RunningSum(nn.Module):
    """Mixes tokens, and remembers nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class Plain(nn.Module):
    """Keeps no cache."""

    def forward(self, input_ids: Tensor) -> Tensor:
        return input_ids


@dataclasses.dataclass(frozen=True)
class HalveLogits(Pass):
    """Calls itself exact."""

    name: ClassVar[str] = "halve-logits"
    summary: ClassVar[str] = ""

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        output = program.graph.output_node()
        (logits,) = output.args[0]
        with rewriter.before(output):
            output.args = ((rewriter.call(aten.mul.Tensor, logits, 0.5),),)
        return PassResult(edits=1)


@dataclasses.dataclass(frozen=True)
class ReluInPlace(Pass):
    """Goes past the rewriter."""

    name: ClassVar[str] = "relu-in-place"
    summary: ClassVar[str] = ""

    def run(self, program: Program, rewriter: Rewriter, context: Context) -> PassResult:
        for node in program.graph.find_nodes(op="call_function", target=aten.silu.default):
            node.target = aten.relu_.default
        return PassResult(edits=1)


def _run(entry: Pass) -> None:
    skink.Pipeline((Canonicalize(), entry)).run(skink.capture(tiny("llama")))


def _broken_package() -> None:
    points = EntryPoints([EntryPoint("shrink", "shrinking:Shrink", "skink.passes")])
    discover.cache_clear()
    try:
        with patch("skink.passes.entry_points", lambda group: points.select(group=group)):
            load_recipe("shrink")
    finally:
        discover.cache_clear()


def _shared_memory() -> None:
    x = torch.zeros(2, 4, 8)
    skink.capture(Scores(), (x, x))


def _meta() -> None:
    skink.capture(build("llama").to("meta"))(*[torch.zeros(1, 2, dtype=torch.int64)] * 3)


def _not_finite() -> None:
    model: Any = build("llama")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    skink.compress(model, "low-rank{method=whitened}", calibration=torch.zeros(2, 8, dtype=torch.int64), verify=0)


def _cut_short() -> None:
    tiny("llama").save_pretrained("tiny")
    file = Path("tiny/model.safetensors")
    file.write_bytes(file.read_bytes()[:100_000])
    load_source("tiny")


def _pickles() -> None:
    tiny("llama").save_pretrained("old")
    Path("old/model.safetensors").unlink()
    Path("old/pytorch_model.bin").touch()
    load_source("old")


def _counted_positions() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    derive_step(skink.capture(CountedPositions(), (ids, torch.ones_like(ids))))


def _empty_folder() -> None:
    Path("notes").mkdir()
    skink.load("notes")


def _no_reproducer() -> None:
    Path("notes").mkdir()
    read_reproducer(Path("notes"))


def _existing_folder() -> None:
    Path("notes").mkdir()
    with output_folder("notes"):
        pass


def _full_disk() -> None:
    with output_folder("smaller"):
        raise OSError(28, "No space left on device")


def _stepped_export() -> None:
    program = skink.capture(tiny("llama"))
    skink.Pipeline((Canonicalize(),)).run(program)
    skink.export_onnx(derive_step(program), "onnx")


def _cut_onnx() -> None:
    Path("broken").mkdir()
    Path("broken/model.onnx").write_bytes(b"\xff\xff")
    from skink.export.onnx import OrtRunner

    OrtRunner("broken")


def _out_of_reach() -> None:
    factored = Curve("q_proj", torch.tensor([2.0, 0.0]), torch.tensor([30.0, 100.0]))
    dense = Curve("k_proj", torch.tensor([0.0]), torch.tensor([100.0]))
    allocate([factored, dense], 100.0)


def _prefix_mask() -> None:
    def prefix(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key < 2

    with_prefix = partial(masking_utils.create_causal_mask, or_mask_function=prefix)
    with patch.object(modeling_llama, "create_causal_mask", with_prefix):
        skink.capture(build("llama"))


def _points(recipe: str, keep: list[float], **content: object) -> None:
    space = load_space({"axes": {"keep": keep}, "recipe": recipe, **content})
    expand(space, ModelFacts((0, 1), ("mlp.up_proj",)))


def _too_many_points() -> None:
    axes = {name: list(range(1, 101)) for name in ("a", "b", "c")}
    expand(load_space({"axes": axes, "recipe": "low-rank{ignore=[$a,$b,$c]}"}), ModelFacts((), ()))


def _other_model() -> None:
    for name, fingerprint in (("other", "2" * 64), ("this", "1" * 64)):
        Store(Path("map"), model=name, fingerprint=fingerprint)


def _dying_worker() -> None:
    class Broken:
        def submit(self, *task: object) -> None:
            raise BrokenProcessPool(
                "A process in the process pool was terminated abruptly while the future was running or pending."
            )

    task: Any = (None, None)
    list(workers._side_by_side(cast("Any", Broken()), [task]))


def _no_harness() -> None:
    with patch.dict("sys.modules", {"lm_eval": None}):
        run_tasks(None, None, ["hellaswag"])


def _trainable(train: str) -> tuple[Program, nn.Module, list[str]]:
    program = canonical("llama").with_dtype(torch.float16)
    module = program.module()
    return program, module, choose_trainable(module, program, None, train)


def _too_large_for_half() -> None:
    program, module, names = _trainable("*.0.mlp.down_proj")
    with torch.no_grad():
        module.get_parameter(names[0])[0, 0] = 7e4
    write_back(module, program, names)


def _other_vocabulary() -> None:
    teacher = skink.capture(build("llama", vocab_size=64))
    Student(canonical("llama"), teacher, Terms(kl=1.0))


def _same_text() -> None:
    tokens = torch.arange(512).view(4, 128)
    check_overlap(Windows(tokens, "notes"), Windows(tokens, "the same notes"))


def _broken_training() -> None:
    train(next_module(), text(), TrainOptions(batch=6, learning_rate=1e20), make_inputs=make_inputs)


def _damaged_checkpoints() -> None:
    folder = Path("recover-0123456789ab")
    for step in (8, 9):
        write(folder, step=step, identity="0123456789ab", state={}, tensors={"weight": torch.ones(3)})
        (folder / f"step-{step:08d}" / "process-0.safetensors").write_bytes(b"")
    newest(folder, "0123456789ab")


EXAMPLES: dict[str, Callable[[], object]] = {
    "CAPTURE-001": _shared_memory,
    "CAPTURE-002": lambda: skink.capture(Branch(), (torch.zeros(2, 4, 8),)),
    "CAPTURE-003": _prefix_mask,
    "CAPTURE-004": lambda: skink.capture(nn.Linear(3, 3)),
    "CAPTURE-005": lambda: skink.capture(Scores(), {"query": torch.zeros(2, 4, 8), "key": [1]}),
    "CAPTURE-006": lambda: skink.capture(Noise(), (torch.zeros(2, 4, 8),)),
    "GRAPH-001": lambda: load_graph('{"format": 7}'),
    "GRAPH-002": _meta,
    "GRAPH-003": lambda: skink.capture(tiny("llama"))(*[torch.zeros(1, 2, dtype=torch.int64)] * 3, mask=None),
    "OPTION-001": lambda: load_recipe("low-rank{kep=0.8}"),
    "OPTION-002": lambda: load_recipe("low-rank{keep=1.8}"),
    "OPTION-003": lambda: load_recipe("low-rank{keep=most}"),
    "RECIPE-001": lambda: load_recipe("lowrank{keep=0.8}"),
    "RECIPE-002": lambda: load_recipe("low-rank{keep=0.8"),
    "RECIPE-003": lambda: skink.Pipeline((LowRank(),)),
    "RECIPE-004": _broken_package,
    "SPACE-001": lambda: load_space("quik"),
    "SPACE-002": lambda: _points("low-rank{keep=$keeep}", [0.5]),
    "SPACE-003": lambda: _points("low-rank{keep=$keep}", [0.5, 1.5]),
    "SPACE-004": _too_many_points,
    "SPACE-005": _other_model,
    "SPACE-006": _dying_worker,
    "TASK-001": _no_harness,
    "VERIFY-001": lambda: _run(ReluInPlace()),
    "VERIFY-002": lambda: _run(HalveLogits()),
    "BISECT-001": lambda: bisect(canonical("llama"), skink.Pipeline((LowRank(method="plain"),), start=Stage.CANONICAL)),
    "REPRO-001": _no_reproducer,
    "STATE-001": _counted_positions,
    "STATE-002": lambda: derive_step(skink.capture(RunningSum(), (torch.zeros(2, 4, 8),))),
    "BUDGET-001": _out_of_reach,
    "CALIBRATION-002": lambda: skink.compress(tiny("llama"), "low-rank"),
    "CALIBRATION-003": _not_finite,
    "CALIBRATION-004": lambda: skink.compress(tiny("llama"), "low-rank", calibration=torch.full((2, 8), 200)),
    "RECOVER-001": lambda: _trainable("*.atention.*"),
    "RECOVER-002": _same_text,
    "RECOVER-003": _broken_training,
    "RECOVER-004": _damaged_checkpoints,
    "RECOVER-005": lambda: skink.compress(tiny("llama"), "recover"),
    "RECOVER-006": _other_vocabulary,
    "RECOVER-007": lambda: corresponding(canonical("llama"), canonical("llama"), "hidden", ("model.layer.*",)),
    "RECOVER-008": lambda: training_windows(None, torch.tensor([[0, 1, 2], [3, 4, 50_000]]), length=3, vocabulary=4096),
    "RECOVER-009": lambda: skink.compress(tiny("llama"), "low-rank{method=plain}", checkpoints="kept"),
    "RECOVER-010": _too_large_for_half,
    "RECOVER-011": lambda: adapter_targets(canonical("gemma2"), LoraOptions(targets=("*",))),
    "MODEL-001": _empty_folder,
    "MODEL-002": _cut_short,
    "MODEL-003": _pickles,
    "MODEL-004": lambda: HuggingFaceTarget(Plain(), vocabulary=5),
    "MODEL-005": lambda: skink.compress(tiny("llama"))(torch.zeros(1, 2, dtype=torch.int64), output_hidden_states=True),
    "EXPORT-001": _stepped_export,
    "EXPORT-003": _cut_onnx,
    "OUTPUT-001": _existing_folder,
    "OUTPUT-002": _full_disk,
    "INPUT-001": lambda: text_files([Path("notes.txt")]),
}
