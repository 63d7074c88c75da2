"""The pass `recover`: what trains, against what, and what comes out."""

import pytest
import torch

from skink.errors import OptionError, RecoveryError
from skink.graph.program import Stage
from skink.graph.windows import Windows
from skink.passes.recipe import parse_passes
from skink.passes.recover import Recover
from skink.passes.recover.recover import TOKENS
from tests.passes.recover.samples import CUT, HELD_OUT, TEXT, progressions, run, weights
from tests.programs import canonical

QUICK = "steps=12,learning_rate=0.003"


@pytest.mark.parametrize(
    "recipe",
    [
        f"recover{{{QUICK}}}",
        f"{CUT}, recover{{train=new,ce=1,{QUICK}}}",
        f"{CUT}, recover{{train=lora,ce=1,rank=4,{QUICK}}}",
        f"{CUT}, recover{{js=1,hidden=0.5,attention=0.5,temperature=2,{QUICK}}}",
    ],
)
def test_the_loss_falls_on_the_text_and_on_text_that_it_did_not_see(recipe: str) -> None:
    _, result = run(recipe, held_out=HELD_OUT)
    training = result.passes[-1].result.training
    assert training is not None
    assert training["losses"][-1][1] < training["losses"][0][1]
    assert training["after"] < training["before"]
    assert training["steps"] == 12
    assert training["tokens"] == 12 * 8 * 16
    assert result.passes[-1].result.edits == 0


def test_layer_by_layer_brings_layers_nearer_to_the_original() -> None:
    _, result = run(f"{CUT}, recover{{by=layer,train=new,{QUICK}}}", held_out=HELD_OUT)
    training = result.passes[-1].result.training
    assert training is not None
    assert training["loss"] == {"hidden": 1.0}
    assert training["losses"][-1][1] < training["losses"][0][1]
    assert training["held_out"] == []
    [note] = [note for note in training["notes"] if "mean error" in note]
    before, after = (float(word.rstrip(".")) for word in note.split() if word[0] == "0")
    assert after < before


def test_only_what_shall_train_changes() -> None:
    cut, _ = run(CUT)
    before = weights(cut)
    new = {name for name in before if name not in weights(canonical("llama"))}
    run("recover{train=new,steps=1,learning_rate=0.01,ignore=[*.layers.0.*]}", program=cut, original=canonical("llama"))
    changed = {name for name, tensor in cut.weights() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in new if ".layers.0." not in name}


def test_new_means_new_in_later_stages_too() -> None:
    stages = f"{CUT}, recover{{train=all,steps=1}}, recover{{train=new,steps=1}}"
    _, result = run(stages)
    everything, new = (record.result.training for record in result.passes[1:])
    assert everything is not None
    assert new is not None
    assert 0 < new["trained"] < everything["trained"]


def test_tensors_are_not_written_to_and_dtypes_stay() -> None:
    program = canonical("llama").with_dtype(torch.bfloat16)
    before = weights(program)
    kept = {name: tensor.clone() for name, tensor in before.items()}
    teacher = program.clone()
    run("recover{ce=1,kl=1,steps=2,learning_rate=0.01,precision=bfloat16}", program=program, original=teacher)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in before.items())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in teacher.weights())
    assert {name: tensor.dtype for name, tensor in program.weights()} == {n: t.dtype for n, t in kept.items()}
    assert any(not torch.equal(tensor, kept[name]) for name, tensor in program.weights())


def test_the_stage_stays_and_the_program_runs() -> None:
    program, _ = run("recover{ce=1,steps=1}")
    assert program.stage is Stage.CANONICAL
    program, _ = run(f"{CUT}, recover{{ce=1,steps=1}}")
    assert program.stage is Stage.REWRITTEN


def test_equal_seeds_give_equal_weights() -> None:
    recipe = "recover{train=lora,ce=1,steps=3,dropout=0.1,learning_rate=0.01}"
    one, two, other = (weights(run(recipe, seed=seed)[0]) for seed in (5, 5, 6))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_training_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    run("recover{train=lora,steps=1,dropout=0.5}")
    assert torch.equal(torch.rand(4), expected)


def test_how_much_text_it_reads() -> None:
    assert Recover().training_tokens(512) == TOKENS
    assert Recover(tokens=5).training_tokens(512) == 5
    assert Recover(steps=3, batch=4).training_tokens(512) == 3 * 4 * 512


def test_it_asks_for_the_original_only_where_it_reads_it() -> None:
    assert not Recover(ce=1.0).needs_original
    assert Recover(ce=1.0, train="new").needs_original
    assert Recover(kl=1.0).needs_original
    assert Recover(by="layer").needs_original


def test_losses_go_with_the_way_of_training() -> None:
    assert {name for name, weight in Recover().losses().items() if weight} == {"ce", "kl"}
    assert {name for name, weight in Recover(by="layer").losses().items() if weight} == {"hidden"}
    assert {name for name, weight in Recover(js=2.0).losses().items() if weight} == {"js"}


def test_the_learning_rate_is_the_one_that_is_given() -> None:
    assert Recover(by="layer", learning_rate=0.5).train_options(seed=0, length=8).learning_rate == 0.5


def test_it_prints_as_it_is_read_and_describes_what_says_something() -> None:
    [entry] = parse_passes("recover{train=lora,tokens=2000000,targets=[*.mlp.*],learning_rate=3e-4}")
    assert parse_passes(str(entry)) == (entry,)
    assert parse_passes(entry.describe()) == (entry.resolved(),)
    assert "rank=16" in entry.describe()
    assert "layers_at_once" not in entry.describe()
    assert "rank" not in Recover().describe()


@pytest.mark.parametrize(
    "options",
    ["", "by=layer", "steps=4,schedule=constant", "train=lora,kl=0.5,ce=0", "by=layer,attention=1,hidden=0,final=0.3"],
)
def test_what_is_saved_says_what_was_left_open(options: str) -> None:
    [entry] = parse_passes(f"recover{{{options}}}")
    whole = entry.resolved()
    assert isinstance(whole, Recover)
    assert whole.resolved() == whole
    assert (whole.terms(), whole.training_tokens(8)) == (entry.terms(), entry.training_tokens(8))
    assert whole.train_options(seed=0, length=8) == entry.train_options(seed=0, length=8)
    assert any(getattr(whole, name) for name in ("ce", "kl", "hidden", "attention"))
    assert whole.tokens or whole.steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("lora=1", r"\[OPTION-001\] recover has no option 'lora'"),
        ("learning-rate=1", r"did you mean 'learning_rate'\?"),
        ("train=lorra", r"\[OPTION-003\] recover.train='lorra' is none of its choices.\n  fix: did you mean 'lora'\?"),
        ("ce=-1", r"\[OPTION-002\] recover.ce=-1.0 is out of range"),
        ("ce=0", r"\[OPTION-002\] no term of the loss has a weight above 0."),
        ("tokens=0", r"\[OPTION-002\] recover.tokens=0 is out of range \[1, inf\).\n  fix: choose recover.tokens in"),
        ("steps=0", r"\[OPTION-002\] recover.steps=0 is out of range"),
        ("batch=0", r"\[OPTION-002\] recover.batch=0 is out of range"),
        ("temperature=0", r"\[OPTION-002\] recover.temperature=0.0 is out of range"),
        ("rank=0,train=lora", r"\[OPTION-002\] recover.rank=0 is out of range"),
        ("micro_batch=-1", r"\[OPTION-002\] recover.micro_batch=-1 is out of range"),
        ("layers_at_once=-1,by=layer", r"\[OPTION-002\] recover.layers_at_once=-1 is out of range"),
    ],
)
def test_options_are_refused_when_they_are_read(options: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_passes(f"recover{{{options}}}")


def test_nothing_new_to_train_is_an_error() -> None:
    with pytest.raises(RecoveryError, match=r"\[RECOVER-001\] train=new finds nothing to train"):
        run("recover{train=new,steps=1}")


def test_text_that_it_is_judged_by_is_refused() -> None:
    seen = Windows(progressions(8, length=128), "seen")
    with pytest.raises(RecoveryError, match=r"\[RECOVER-002\]"):
        run("recover{ce=1,steps=1}", text=seen, held_out=Windows(seen.tokens[:2], "judged"))


def test_without_text_nothing_begins() -> None:
    with pytest.raises(RecoveryError, match=r"\[RECOVER-005\] pass recover\{ce=1.0\} trains, and no text"):
        run("recover{ce=1}", text=None)


def test_another_vocabulary_cannot_teach() -> None:
    from skink.graph.capture import capture
    from skink.graph.pipeline import Pipeline
    from skink.passes.canonicalize import Canonicalize
    from tests.models import build

    teacher = capture(build("llama", vocab_size=98))
    Pipeline((Canonicalize(),)).run(teacher, verify=1)
    with pytest.raises(RecoveryError, match=r"\[RECOVER-006\]"):
        run("recover{kl=1,steps=1}", original=teacher, text=TEXT)
