import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

import skink
from skink.compression.compress import captured
from skink.compression.texts import read_documents
from skink.errors import OptionError, RecoveryError
from skink.evaluation import text_files, token_windows
from skink.export.huggingface import load_source
from skink.graph.calibration import token_batches
from skink.graph.capture import capture
from skink.graph.pipeline import Pipeline
from skink.graph.program import Program
from skink.graph.windows import Windows
from skink.passes.canonicalize import Canonicalize
from skink.passes.decompose import BasisSharing, LowRank, ReduceWidth
from skink.training.layerwise.match_layers import match_layers
from skink.training.layerwise.record import MatchingRecord
from skink.training.loop.options import TrainOptions
from skink.training.losses.objectives import Terms
from tests.models import VOCABULARY, build
from tests.programs import canonical
from tests.training.layerwise import layer_worker
from tests.training.layerwise.factored import factored

HIDDEN = Terms(hidden=1.0)
BOTH = Terms(hidden=1.0, attention=0.5)


def text(windows: int = 10, length: int = 8, *, padded: bool = False) -> Windows:
    generator = torch.Generator().manual_seed(windows)
    tokens = torch.randint(3, VOCABULARY, (windows, length), generator=generator)
    padding = None
    if padded:
        padding = torch.ones_like(tokens)
        padding[::2, : length // 2] = 0
    return Windows(tokens, padding=padding)


def options(**changed: Any) -> TrainOptions:
    return TrainOptions(**{"steps": 6, "batch": 4, "micro_batch": 2, "learning_rate": 3e-3, **changed})


def match(
    family: str = "llama", terms: Terms = HIDDEN, windows: Windows | None = None, **given: Any
) -> tuple[MatchingRecord, Program]:
    """Match a factored model with its original."""
    program, original = factored(family)
    changed = given.pop("options", options())
    return match_layers(original, program, windows or text(), changed, terms=terms, **given), program


def weights(program: Program) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in program.weights()}


def same(one: Program, other: Program) -> bool:
    return all(torch.equal(tensor, other.weight(name)) for name, tensor in one.weights())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral", "opt", "phi3"])
def test_every_layer_comes_nearer_to_the_original_s(family: str) -> None:
    program, original = factored(family)
    before, kept = weights(program), weights(original)
    record = match_layers(original, program, text(), options(), terms=BOTH)
    assert len(record.layers) == 2
    for layer in record.layers:
        assert layer.after < 0.95 * layer.before
    changed = {
        name for name, tensor in program.weights() if tensor is not before[name] and (tensor != before[name]).any()
    }
    assert changed == set(record.trained)
    assert all(program.weight(name).dtype is before[name].dtype for name in before)
    assert all(torch.equal(original.weight(name), tensor) for name, tensor in kept.items())


class Reference:
    """A Hugging Face layer as it is, fed with what another model's layer receives."""

    def __init__(self, index: int) -> None:
        self.teacher, self.student = build("llama"), build("llama")
        with torch.no_grad():
            for parameter in self.student.parameters():
                generator = torch.Generator().manual_seed(parameter.numel())
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        self.index = index

    def programs(self) -> tuple[Program, Program]:
        original = canonical("llama")
        program = original.clone()
        known = dict(self.student.named_parameters())
        for name, _ in original.weights():
            if name in known:
                program.set_weight(name, known[name].detach().clone())
        return original, program

    def values(self, windows: Windows) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What the teacher's layer receives and gives, the student's for the same, and both attention outputs."""
        seen: dict[str, Any] = {}
        layer = self.teacher.model.layers[self.index]

        def keep(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            seen.update(x=args[0], kwargs=kwargs, y=result if isinstance(result, Tensor) else result[0])

        def attention(name: str) -> Any:
            return lambda module, args, result: seen.update({name: result})

        handles = [
            layer.register_forward_hook(keep, with_kwargs=True),
            layer.self_attn.o_proj.register_forward_hook(attention("a")),
        ]
        with torch.no_grad():
            self.teacher(input_ids=windows.tokens, attention_mask=windows.padding, use_cache=False)
        other = self.student.model.layers[self.index]
        handles.append(other.self_attn.o_proj.register_forward_hook(attention("b")))
        made = other(seen["x"], **seen["kwargs"])
        for handle in handles:
            handle.remove()
        return seen["x"], seen["y"], made if isinstance(made, Tensor) else made[0], seen["a"], seen["b"]

    def loss(self, windows: Windows, measured: Windows) -> Tensor:
        _, y, made, a, b = self.values(windows)
        xs, ys, _, everything, _ = self.values(measured)
        real = torch.ones_like(windows.tokens) if windows.padding is None else windows.padding
        all_real = torch.ones_like(measured.tokens) if measured.padding is None else measured.padding
        tokens = all_real.sum()
        hidden_scale = ((ys - xs).square().sum(-1) * all_real).sum() / tokens
        attention_scale = (everything.square().sum(-1) * all_real).sum() / tokens
        hidden = ((made - y).square().sum(-1) * real).sum() / real.sum() / hidden_scale
        return hidden + 0.5 * ((b - a).square().sum(-1) * real).sum() / real.sum() / attention_scale


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_a_layer_trains_as_the_hugging_face_layer_does_by_plain_pytorch(index: int, padded: bool) -> None:
    reference, windows = Reference(index), text(6, padded=padded)
    original, program = reference.programs()
    given = options(steps=3, batch=6, micro_batch=0, schedule="constant", warmup=0.0, clip=0.0, weight_decay=0.1)
    record = match_layers(original, program, windows, given, terms=BOTH, train="all")
    expected = float(reference.loss(windows, windows).detach())
    assert record.layers[index].before == pytest.approx(expected, rel=1e-4)
    layer = reference.student.model.layers[index]
    groups = [
        {"params": [entry for entry in layer.parameters() if entry.dim() > 1], "weight_decay": 0.1},
        {"params": [entry for entry in layer.parameters() if entry.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    for _ in range(3):
        optimizer.zero_grad()
        reference.loss(windows, windows).backward()
        optimizer.step()
    for name, parameter in layer.named_parameters():
        found = program.weight(f"model.layers.{index}.{name}")
        # Adam's steps hang on the sign of the smallest gradients too.
        assert (found - parameter).abs().mean() < 1e-5, name
    assert record.layers[index].after == pytest.approx(float(reference.loss(windows, windows).detach()), rel=1e-3)


@pytest.mark.parametrize("at_once", [2, 0])
def test_layers_at_once_changes_rounding_only(at_once: int) -> None:
    one, program = match(terms=BOTH)
    several, other = match(terms=BOTH, layers_at_once=at_once)
    for found, expected in zip(several.losses, one.losses, strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    for name in one.trained:
        assert (program.weight(name) - other.weight(name)).abs().mean() < 1e-6


def test_values_in_files_are_the_same_numbers() -> None:
    _, program = match()
    _, other = match(held_bytes=0)
    assert same(program, other)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_is_left_behind_by_an_error(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise error

    with pytest.raises(error):
        match(held_bytes=0, progress=stop)
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_killed_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    whole, program = match(terms=BOTH)

    def stop(said: str) -> None:
        if said.startswith("model.layers.1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        match(terms=BOTH, checkpoints=tmp_path, identity="abc", status=stop)
    record, other = match(terms=BOTH, checkpoints=tmp_path, identity="abc")
    assert record.layers_resumed == 1
    assert (record.losses, record.terms, record.layers) == (whole.losses, whole.terms, whole.layers)
    assert same(program, other)
    again, other = match(terms=BOTH, checkpoints=tmp_path, identity="abc", layers_at_once=2)
    assert again.layers_resumed == 2
    assert same(program, other)


def test_a_damaged_checkpoint_is_said(tmp_path: Path) -> None:
    match(checkpoints=tmp_path, identity="abc")
    for file in tmp_path.rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(RecoveryError) as caught:
        match(checkpoints=tmp_path, identity="abc")
    assert caught.value.code == "RECOVER-004"


def test_checkpoints_need_an_identity(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="identity"):
        match(checkpoints=tmp_path)


def test_only_the_windows_that_are_read_are_held() -> None:
    windows = text(40)
    record, program = match(windows=windows, options=options(tokens=100, steps=None))
    assert (record.steps, record.tokens) == (4, 104)
    assert [tokens for tokens, _ in record.losses] == [32, 64, 96, 104]
    # Windows that no step reads may hold anything.
    order = torch.Generator().manual_seed(0)
    read = set(torch.randperm(40, generator=order)[:13].tolist())
    others = [row for row in range(40) if row not in read]
    changed = windows.tokens.clone()
    changed[others] = 5
    _, other = match(windows=Windows(changed), options=options(tokens=100, steps=None))
    assert same(program, other)


def test_padding_does_not_count() -> None:
    windows = text(padded=True)
    assert windows.padding is not None
    record, program = match(windows=windows, terms=BOTH)
    assert record.tokens == sum(
        int(windows.padding[rows].sum()) for rows in _batches(len(windows.tokens), steps=6, batch=4)
    )
    other_tokens = torch.where(windows.padding != 0, windows.tokens, 7)
    _, other = match(windows=Windows(other_tokens, padding=windows.padding), terms=BOTH)
    for name in record.trained:
        assert (program.weight(name) - other.weight(name)).abs().mean() < 1e-6


def _batches(windows: int, *, steps: int, batch: int) -> list[list[int]]:
    """The windows of each step, as the order of a run with seed 0 is described: round after round."""
    order: list[int] = []
    while len(order) < steps * batch:
        generator = torch.Generator().manual_seed(len(order) // windows)
        order += torch.randperm(windows, generator=generator).tolist()
    return [order[start : start + batch] for start in range(0, steps * batch, batch)]


def test_it_trains_what_is_asked_for() -> None:
    record, _ = match(train="*.mlp.*", ignore=("*.up_proj.*",))
    assert record.trained
    assert all(".mlp." in name and "up_proj" not in name for name in record.trained)
    # The first layer has nothing to train: its values only go on.
    record, _ = match(train="model.layers.1.*")
    assert [layer.name for layer in record.layers] == ["model.layers.1"]


def test_attention_alone_trains_attention_alone() -> None:
    program, original = factored()
    before = weights(program)
    record = match_layers(original, program, text(), options(), terms=Terms(attention=2.0))
    assert set(record.terms) == {"attention"}
    assert record.losses[0][1] == pytest.approx(2 * record.terms["attention"][0])
    changed = {name for name, tensor in program.weights() if not torch.equal(tensor, before[name])}
    assert changed == set(record.trained)
    assert all(".self_attn." in name for name in changed)
    with pytest.raises(RecoveryError, match="nothing to train"):
        match(terms=Terms(attention=1.0), train="*.mlp.*")


def test_patterns_choose_the_places() -> None:
    whole, program = match(terms=BOTH)
    record, other = match(terms=BOTH, patterns=("model.layers.1",))
    assert record.layers == whole.layers[1:]
    assert all(torch.equal(program.weight(name), other.weight(name)) for name in record.trained)
    # Within a layer: what comes behind the place does not train.
    record, program = match(patterns=("model.layers.1.self_attn",))
    assert record.trained
    assert all(name.startswith("model.layers.1.self_attn.") for name in record.trained)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_half_precision_weights_stay_half_precision(precision: str) -> None:
    program, original = factored()
    program, original = (entry.with_dtype(torch.bfloat16) for entry in (program, original))
    record = match_layers(original, program, text(), options(precision=precision), terms=BOTH)
    assert all(layer.after < layer.before for layer in record.layers)
    assert {program.weight(name).dtype for name in record.trained} == {torch.bfloat16}


def test_layers_that_share_a_basis_train_together() -> None:
    original = canonical("llama")
    program = original.clone()
    sharing = BasisSharing(keep=0.6, method="whitened", group=2)
    Pipeline((sharing,), start=original.stage).run(program, calibration=text().tokens)
    record = match_layers(original, program, text(), options(), terms=BOTH)
    (layer,) = record.layers
    assert layer.name == "model.layers.0 to model.layers.1"
    assert layer.after < 0.95 * layer.before


@pytest.mark.parametrize("change", [ReduceWidth(keep=0.6), LowRank(keep=0.6)])
def test_it_works_after_other_passes(change: Any) -> None:
    original = canonical("llama")
    program = original.clone()
    Pipeline((change,), start=original.stage).run(program, calibration=text().tokens)
    record = match_layers(original, program, text(), options(learning_rate=3e-4), terms=BOTH, train="all")
    assert all(layer.after < layer.before for layer in record.layers)


def test_an_encoder_with_norms_behind_its_layers() -> None:
    small = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model("bert", **small, num_hidden_layers=2)).eval()
    original = capture(model)
    Pipeline((Canonicalize(),)).run(original, verify=0)
    program = original.clone()
    Pipeline((LowRank(method="plain", keep=0.5),), start=original.stage).run(program)
    record = match_layers(original, program, text(padded=True), options(), terms=BOTH)
    assert [layer.name for layer in record.layers] == ["encoder.layer.0", "encoder.layer.1"]
    assert all(layer.after < layer.before for layer in record.layers)


def test_a_layer_that_is_as_it_was_has_no_loss() -> None:
    original = canonical("llama")
    record = match_layers(original, original.clone(), text(), options(steps=1), terms=BOTH, train="all")
    assert [layer.before for layer in record.layers] == [0.0, 0.0]


def test_a_layer_that_training_makes_worse_is_left_as_it_was() -> None:
    program, original = factored()
    before = weights(program)
    record = match_layers(original, program, text(), options(steps=1, warmup=0.0, learning_rate=0.3), terms=HIDDEN)
    assert all(layer.after == layer.before > 0 for layer in record.layers)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(program).items())


def test_other_terms_and_sharding_are_refused() -> None:
    with pytest.raises(OptionError, match="there is no kl") as caught:
        match(terms=Terms(hidden=1.0, kl=1.0))
    assert caught.value.code == "OPTION-002"
    with pytest.raises(OptionError, match="sharding=full has no use"):
        match(options=options(sharding="full"))
    with pytest.raises(OptionError, match="layers_at_once"):
        match(layers_at_once=-1)


def test_nothing_to_train_in_the_layers_is_said() -> None:
    with pytest.raises(RecoveryError, match="there is nothing to train") as caught:
        match(train="model.norm.*")
    assert caught.value.code == "RECOVER-001"


def test_no_text_is_said() -> None:
    with pytest.raises(RecoveryError) as caught:
        match(windows=Windows(torch.zeros(0, 8, dtype=torch.int64)))
    assert caught.value.code == "RECOVER-008"


def test_numbers_that_are_not_finite_are_said_with_their_layer() -> None:
    program, original = factored()
    name = "model.layers.1.mlp.down_proj.up.weight"
    program.set_weight(name, torch.full_like(program.weight(name), torch.nan))
    with pytest.raises(RecoveryError, match=r"training of model\.layers\.1 broke down") as caught:
        match_layers(original, program, text(), options(), terms=HIDDEN)
    assert caught.value.code == "RECOVER-003"


def test_progress_ends_where_it_said() -> None:
    seen: list[tuple[int, int]] = []
    said: list[str] = []
    match(progress=lambda done, total: seen.append((done, total)), status=said.append)
    assert seen[-1][0] == seen[-1][1] == len(seen)
    assert len({total for _, total in seen}) == 1
    assert said[0].startswith("model.layers.0 · loss ")
    assert said[-1].startswith("model.layers.1 · loss ")


@pytest.mark.slow
def test_the_model_that_ships_wins_back_much_of_what_low_rank_lost() -> None:
    model, tokenizer = load_source("stdlib-llama")
    original = captured(model)
    Pipeline((Canonicalize(),)).run(original, verify=0)
    program = original.clone()
    Pipeline((LowRank(method="plain", keep=0.4),), start=original.stage).run(program)
    documents = read_documents("stdlib", split="held-out")
    held_out = token_windows(documents, tokenizer, length=96, count=8)
    before = held_out_loss(program, held_out)
    source = text_files([Path(skink.__file__).parent / "graph"])
    windows = token_windows(source, tokenizer, length=64, count=40)
    record = match_layers(original, program, Windows(windows), TrainOptions(batch=4, learning_rate=1e-3), terms=HIDDEN)
    assert len(record.layers) == 8
    assert all(layer.after < 0.8 * layer.before for layer in record.layers)
    dense, after = held_out_loss(original, held_out), held_out_loss(program, held_out)
    assert dense < after < dense + 0.8 * (before - dense)


def held_out_loss(program: Program, windows: Tensor) -> float:
    (batch,) = token_batches(program, windows, batch=len(windows))
    logits = program(**batch)[0][:, :-1].float()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def test_two_processes_give_what_one_gives(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.training.layerwise.layer_worker", str(tmp_path)]
    running = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    record, program = layer_worker.run()
    expected = {**record.as_dict(), "seconds": 0.0, "processes": 2}
    assert len(record.layers) == 3
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert found["record"] == expected
        assert all(torch.equal(program.weight(name), tensor) for name, tensor in found["weights"].items())
