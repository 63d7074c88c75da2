"""One run of `recover`: adapters, checkpoints, text, and the record of it."""

from pathlib import Path

import pytest
import torch

from skink.errors import OutputError
from skink.export.report import Recovery
from skink.graph.windows import Windows
from skink.passes.recipe import parse_passes
from skink.passes.recover.training import thinned
from tests.passes.recover.samples import CUT, HELD_OUT, progressions, run, weights
from tests.programs import canonical

LORA = "train=lora,ce=1,rank=4,steps=4,learning_rate=0.02"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_merged_adapters_compute_what_adapters_beside_the_model_do(tmp_path: Path) -> None:
    from peft import PeftModel

    from skink.export.huggingface import to_huggingface
    from tests.models import tiny

    merged, _ = run(f"recover{{{LORA}}}")
    folder = str(tmp_path / "adapter")
    kept, result = run(f'recover{{{LORA},merge=false,adapter="{folder}"}}')
    assert all(torch.equal(tensor, weights(canonical("llama"))[name]) for name, tensor in kept.weights())
    assert result.passes[0].result.notes == (f"The adapter is in {folder}, and the model as it was.",)
    tokens = progressions(3, seed=7)
    beside = PeftModel.from_pretrained(to_huggingface(kept, tiny("llama").config), folder)
    with torch.no_grad():
        expected = beside(input_ids=tokens).logits
        found = to_huggingface(merged, tiny("llama").config)(input_ids=tokens).logits
        before = to_huggingface(kept, tiny("llama").config)(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (found - before).abs().max() > 0.05


def test_the_same_again_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    recipe = f"{CUT}, recover{{ce=1,steps=4,learning_rate=0.01,checkpoint_every=128}}"
    first, fresh = run(recipe, checkpoints=tmp_path)
    again, resumed = run(recipe, checkpoints=tmp_path)
    assert fresh.passes[-1].result.training["resumed_at"] is None
    assert resumed.passes[-1].result.training["resumed_at"] == 4
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in first.weights())
    [folder] = tmp_path.iterdir()
    assert folder.name.startswith("recover-")
    _, anew = run(recipe.replace("0.01", "0.02"), checkpoints=tmp_path)
    assert anew.passes[-1].result.training["resumed_at"] is None
    assert len(list(tmp_path.iterdir())) == 2


def test_folders_are_looked_at_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    said: list[str] = []
    for folder, code in (("file/below", "OUTPUT-002"), ("full", "OUTPUT-001")):
        recipe = f'recover{{train=lora,merge=false,steps=1,adapter="{tmp_path / folder}"}}'
        with pytest.raises(OutputError, match=code):
            run(recipe, status=said.append)
    with pytest.raises(OutputError, match="OUTPUT-002"):
        run("recover{steps=1}", checkpoints=tmp_path / "file", status=said.append)
    assert said == []


def test_patterns_that_ignore_nothing_are_noted() -> None:
    _, result = run("recover{steps=1,ignore=[*.layers.0.*,*.layer.0.*,*_proj]}")
    assert result.passes[-1].result.notes == ("ignore: no weight and no layer is named like '*.layer.0.*'.",)


def test_other_text_to_judge_by_makes_another_run(tmp_path: Path) -> None:
    recipe = "recover{ce=1,steps=2,checkpoint_every=128}"
    other = Windows(HELD_OUT.tokens.flip(1), "other")
    for held_out in (HELD_OUT, other):
        _, result = run(recipe, checkpoints=tmp_path, held_out=held_out)
        assert result.passes[-1].result.training["resumed_at"] is None
    # Where nothing is chosen by it, it makes no difference.
    recipe = "recover{ce=1,steps=2,checkpoint_every=128,evaluate_every=0}"
    resumed = [
        run(recipe, checkpoints=tmp_path, held_out=text)[1].passes[-1].result.training for text in (HELD_OUT, other)
    ]
    assert [entry["resumed_at"] for entry in resumed] == [None, 2]


def test_layers_that_are_done_are_not_done_again(tmp_path: Path) -> None:
    recipe = f"{CUT}, recover{{by=layer,train=new,steps=2}}"
    first, _ = run(recipe, checkpoints=tmp_path)
    again, resumed = run(recipe, checkpoints=tmp_path)
    assert "2 layers were taken from checkpoints." in resumed.passes[-1].result.notes
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in first.weights())


def test_the_record_is_a_row_of_the_report() -> None:
    _, result = run(f"{CUT}, recover{{kl=1,hidden=0.5,steps=2}}", held_out=HELD_OUT)
    record = result.passes[-1]
    found = Recovery(name=str(record.pass_), **record.result.training)
    assert found.loss == {"kl": 1.0, "hidden": 0.5}
    assert found.text == "progressions"
    assert found.settings["learning_rate"] == 1e-4
    assert found.settings["final"] == 0.1
    assert found.settings["seed"] == 0
    assert "rank" not in found.settings
    assert "kl" not in found.settings
    assert found.processes == 1
    assert found.after is not None


def test_passages_that_both_texts_have_are_told_of() -> None:
    shared = progressions(1, length=80, seed=3)
    text = Windows(torch.cat([progressions(40, length=80), shared]), "text")
    judged = Windows(torch.cat([progressions(60, length=80, seed=4), shared]), "judged")
    _, result = run("recover{ce=1,steps=1}", text=text, held_out=judged)
    [note] = result.passes[0].result.notes
    assert note.endswith("of the held-out tokens stand in passages that the training text has too.")


def test_text_with_padding_counts_text_alone() -> None:
    tokens = progressions(16)
    padding = torch.ones_like(tokens)
    padding[:, 12:] = 0
    _, result = run("recover{ce=1,steps=2}", text=Windows(tokens, "padded", "3" * 64, padding))
    assert result.passes[0].result.training["tokens"] == 2 * 8 * 12


def test_progress_and_what_it_says_come_through() -> None:
    from skink.graph.pipeline import Pipeline

    program = canonical("llama")
    told, said = [], []
    Pipeline(parse_passes("recover{ce=1,steps=3}"), start=program.stage).run(
        program,
        verify=0,
        training=Windows(progressions(24), "text"),
        progress=lambda *entry: told.append(entry),
        status=said.append,
    )
    assert ("recover", 384, 384) in told
    assert len(said) == 3
    assert all(entry.startswith("loss ") for entry in said)


@pytest.mark.parametrize("count", [1, 7, 400, 401, 4001])
def test_a_long_curve_keeps_its_end_and_its_mean(count: int) -> None:
    points = [(index, float(index)) for index in range(1, count + 1)]
    found = thinned(points, 400)
    assert len(found) <= 400
    assert found[-1][0] == count
    if count <= 400:
        assert found == [list(point) for point in points]
    assert found[0][1] == sum(range(1, int(found[0][0]) + 1)) / found[0][0]


def test_no_points_stay_none() -> None:
    assert thinned([], 400) == []
