"""One process: what a step is, what a run keeps, and how it ends."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skink.errors import RecoveryError
from skink.graph.windows import Windows
from skink.training.loop.order import Order
from skink.training.loop.trainer import TrainingRecord, TrainOptions, train
from tests.training.loop.tiny_training import Next, make_inputs, next_module, text


def run(module: nn.Module | None = None, windows: Windows | None = None, **options: Any) -> tuple[TrainingRecord, Any]:
    module = module or next_module()
    held_out = text(7, seed=1) if options.get("evaluate_every") else None
    record = train(
        module,
        windows or text(),
        TrainOptions(**{"learning_rate": 3e-2, **options}),
        make_inputs=make_inputs,
        held_out=held_out,
    )
    return record, module


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: entry.detach() for name, entry in module.named_parameters()}


def by_hand(windows: Windows, rows: list[list[int]], rates: list[float], **adam: Any) -> tuple[list[float], Next]:
    """Steps with torch's own AdamW on whole batches."""
    module, losses = next_module(), []
    decay = adam.pop("weight_decay")
    trained = [entry for entry in module.parameters() if entry.requires_grad]
    groups = [
        {"params": [entry for entry in trained if entry.dim() > 1], "weight_decay": decay},
        {"params": [entry for entry in trained if entry.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, **adam)
    for chosen, rate in zip(rows, rates, strict=True):
        padding = None if windows.padding is None else windows.padding[chosen]
        found = module(windows.tokens[chosen], padding)
        loss = found["loss"] / found["tokens"]
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, module


def test_it_does_what_plain_pytorch_does() -> None:

    windows = text(9, padded=True)
    options = {"batch": 4, "weight_decay": 0.3, "warmup": 0.0, "schedule": "linear", "final": 0.0, "learning_rate": 0.1}
    record, module = run(windows=windows, **options)
    order = Order(9, 0)
    rows = [order.rows(0, 4).tolist(), order.rows(4, 8).tolist(), order.rows(8, 9).tolist()]
    losses, expected = by_hand(windows, rows, [0.1, 0.05, 0.0], weight_decay=0.3, betas=(0.9, 0.95), eps=1e-8)
    assert [loss for _, loss in record.losses] == pytest.approx(losses, rel=1e-6)
    torch.testing.assert_close(parameters(module), parameters(expected), rtol=1e-5, atol=1e-6)
    assert record.steps == 3
    assert record.tokens == int(windows.padding.sum())


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("padded", [False, True])
def test_accumulation_changes_nothing_but_rounding(micro_batch: int, padded: bool) -> None:
    windows = text(23, padded=padded)
    whole, expected = run(windows=windows, batch=5)
    parts, module = run(windows=windows, batch=5, micro_batch=micro_batch)
    torch.testing.assert_close(torch.tensor(parts.losses), torch.tensor(whole.losses), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parameters(module), parameters(expected), rtol=1e-5, atol=1e-5)


def test_equal_runs_are_equal_and_others_are_not() -> None:
    options = {"evaluate_every": 60, "seed": 3}
    (first, module), (second, again) = (run(next_module(dropout=0.2), **options) for _ in range(2))
    assert dataclasses.replace(first, seconds=0.0) == dataclasses.replace(second, seconds=0.0)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    other, _ = run(next_module(dropout=0.2), **{**options, "seed": 4})
    assert other.losses != first.losses


def test_the_caller_s_random_numbers_and_modes_are_as_before() -> None:
    module = next_module(dropout=0.2).eval()
    module.layers.train()
    before = torch.get_rng_state()
    run(module, evaluate_every=60)
    assert torch.equal(torch.get_rng_state(), before)
    assert (module.training, module.layers.training, module.dropout.training) == (False, True, False)
    assert all(entry.grad is None for entry in module.parameters())


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    modes: list[tuple[bool, bool]] = []
    module = next_module()
    module.dropout.register_forward_hook(lambda child, *rest: modes.append((child.training, torch.is_grad_enabled())))
    run(module, steps=2, batch=50, evaluate_every=10**6)
    assert modes == [(False, False), (True, True), (True, True), (False, False)]


def test_only_what_requires_gradients_moves_and_trains_in_float32() -> None:
    module = next_module().bfloat16()
    module.norm.requires_grad_(False)
    before = parameters(next_module().bfloat16())
    run(module, precision="bfloat16", steps=3)
    for name, entry in module.named_parameters():
        assert entry.dtype == (torch.float32 if entry.requires_grad else torch.bfloat16)
        assert torch.equal(entry, before[name]) == (not entry.requires_grad)


@pytest.mark.parametrize(
    ("options", "steps", "tokens"),
    [
        ({"batch": 4}, 6, 126),
        ({"batch": 4, "tokens": 49}, 3, 54),
        ({"batch": 4, "tokens": 48}, 2, 48),
        ({"batch": 8, "tokens": 300}, 7, 300),
        ({"batch": 4, "steps": 9}, 9, 216),
    ],
)
def test_how_long_it_trains(options: dict[str, int], steps: int, tokens: int) -> None:
    seen: list[tuple[int, int]] = []
    said: list[str] = []
    record = train(
        next_module(),
        text(),
        TrainOptions(**options),
        make_inputs=make_inputs,
        progress=lambda done, total: seen.append((done, total)),
        status=said.append,
    )
    assert (record.steps, record.tokens, len(record.losses)) == (steps, tokens, steps)
    assert [done for done, _ in seen] == [0, *(done for done, _ in record.losses)]
    assert {total for _, total in seen} == {tokens}
    assert len(said) == steps
    assert said[-1].startswith(f"loss {record.losses[-1][1]:.3f} · ")


def test_the_best_weights_stay() -> None:
    """The rate is far too high: held-out loss falls first, and then rises."""
    record, module = run(steps=30, batch=21, evaluate_every=126, learning_rate=0.3, schedule="constant", clip=0.0)
    losses = [loss for _, loss in record.held_out]
    assert len(losses) == 31
    assert record.best == min(record.held_out, key=lambda entry: entry[1])
    assert record.best[1] < losses[-1]
    found = module(**make_inputs(text(7, seed=1).tokens, None))
    assert (found["ce"] / found["tokens"]).item() == pytest.approx(record.best[1], rel=1e-6)


def test_weights_that_training_cannot_better_stay_as_they_were() -> None:
    best, module = run(steps=20, batch=21, evaluate_every=126)
    expected = parameters(next_module())
    before = {name: entry.clone() for name, entry in parameters(module).items()}
    record, _ = run(module, steps=2, batch=21, evaluate_every=126, learning_rate=5.0, warmup=0.0)
    assert record.best == (0, pytest.approx(best.best[1]))
    assert "the weights stay as they were" in record.notes[0]
    assert not best.notes
    assert all(torch.equal(entry, before[name]) for name, entry in parameters(module).items())
    assert not torch.equal(before["norm"], expected["norm"])


def test_patience_ends_a_run_that_gets_no_better() -> None:
    options = {
        "steps": 30,
        "batch": 21,
        "evaluate_every": 126,
        "learning_rate": 0.3,
        "schedule": "constant",
        "clip": 0.0,
    }
    endless, _ = run(**options)
    record, _ = run(**options, patience=3)
    assert record.stopped_early
    assert record.steps < endless.steps == 30
    assert not endless.stopped_early
    assert [loss for _, loss in record.held_out[-3:]] >= [record.best[1]] * 3
    assert record.held_out == endless.held_out[: len(record.held_out)]


def test_without_evaluations_the_last_weights_stay() -> None:
    record = train(next_module(), text(), TrainOptions(steps=2), make_inputs=make_inputs, held_out=text(7, seed=1))
    assert (record.held_out, record.best) == ((), None)


def test_the_record_is_plain_data() -> None:
    record, _ = run(steps=2, evaluate_every=60)
    assert json.loads(json.dumps(record.as_dict()))["terms"] == {"ce": list(record.terms["ce"])}
    assert record.options["steps"] == 2
    assert record.seconds > 0
    # The module's loss is twice its cross-entropy.
    assert [loss for _, loss in record.losses] == pytest.approx([2 * value for value in record.terms["ce"]])


class Breaks(Next):
    """Has a term, a loss or a gradient that is not finite, from the third call on."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.calls = what, 0

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        found = super().forward(tokens, padding)
        self.calls += 1
        if self.calls < 3:
            return found
        if self.what == "gradient":
            # A square root at 0 is 0 and has no slope.
            return {**found, "loss": found["loss"] + (self.norm[0] * 0).sqrt()}
        value = torch.tensor(float("inf") if self.what == "loss" else float("nan"))
        return {**found, "loss": found["loss"] + value, **({"ce": value} if self.what == "ce" else {})}


@pytest.mark.parametrize(
    ("what", "said"),
    [("ce", "its term 'ce' is nan"), ("loss", "its loss is inf"), ("gradient", "its gradient is nan")],
)
def test_what_is_not_finite_ends_the_run_and_says_where(what: str, said: str) -> None:
    with pytest.raises(RecoveryError) as caught:
        run(Breaks(what), steps=5, batch=4, schedule="constant", warmup=0.0)
    assert caught.value.code == "RECOVER-003"
    assert "at step 3 of 5" in caught.value.what
    assert said in caught.value.what
    assert caught.value.why == "the learning rate was 0.03, after 48 tokens."
    assert "lower learning_rate than 0.03" in caught.value.fix


@pytest.mark.parametrize(("every", "said"), [(60, "its loss on held-out text is nan"), (0, "its term 'ce' is nan")])
def test_weights_that_were_not_finite_are_to_blame_and_no_learning_rate(every: int, said: str) -> None:
    module = next_module()
    module.head.weight.data[0, 0] = float("nan")
    with pytest.raises(RecoveryError) as caught:
        run(module, evaluate_every=every)
    assert caught.value.what == f"training cannot begin: {said}."
    assert caught.value.why == "the weight 'head.weight' was not finite before the first step."
    assert "learning_rate" not in caught.value.fix


@pytest.mark.parametrize("frozen", [False, True])
def test_a_damaged_weight_that_is_only_read_later_is_to_blame(frozen: bool) -> None:
    module, windows = next_module(), text(8)
    # What is damaged is read by the second step alone.
    windows.tokens.clamp_(max=11)
    last = Order(8, 0).rows(4, 8)
    windows.tokens[last, 0] = 12
    module.table.weight.data[12] = float("inf")
    module.table.weight.requires_grad_(not frozen)
    with pytest.raises(RecoveryError) as caught:
        run(module, windows, steps=2, batch=4)
    assert caught.value.what.startswith("training broke down at step 2 of 2")
    assert caught.value.why == "the weight 'table.weight' was not finite before the first step."


def test_a_first_loss_that_is_not_finite_is_no_matter_of_the_learning_rate() -> None:
    module = Breaks("loss")
    module.calls = 2
    with pytest.raises(RecoveryError, match="cannot begin: its loss is inf") as caught:
        run(module, steps=2, batch=4, precision="bfloat16")
    assert caught.value.why.startswith("no step was made yet, and all weights are finite")
    assert caught.value.fix.startswith("try precision=float32 instead of bfloat16; ")


def test_input_that_is_no_number_is_to_blame() -> None:
    def poisoned(tokens: Tensor, padding: Tensor | None) -> dict[str, Any]:
        given = make_inputs(tokens, torch.ones_like(tokens).double())
        given["padding"][0, 1] = float("nan")
        return given

    with pytest.raises(RecoveryError) as caught:
        train(next_module(), text(), TrainOptions(steps=1, batch=4, micro_batch=2), make_inputs=poisoned)
    assert caught.value.why == "the input 'padding' holds NaN."


class Overflows(Next):
    """Its gradient overflows while the loss is scaled by 2^15 or more."""

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
        found = super().forward(tokens, padding)
        found["loss"].register_hook(lambda grad: grad * (float("inf") if float(grad) * 24 > 2**14.5 else 1))
        return found


def test_float16_scales_the_loss_and_leaves_out_steps_that_overflow() -> None:
    start = parameters(next_module())
    for steps, learnt in ((2, False), (3, True)):
        module = next_module()
        module.__class__ = Overflows
        run(module, steps=steps, batch=4, precision="float16")
        for name, entry in parameters(module).items():
            assert torch.equal(entry, start[name]) == (not learnt or name.startswith("frozen"))


def test_float16_trains_as_float32_does() -> None:
    half, _ = run(steps=12, batch=4, precision="float16")
    full, _ = run(steps=12, batch=4)
    assert half.losses != full.losses
    torch.testing.assert_close(torch.tensor(half.losses), torch.tensor(full.losses), rtol=5e-3, atol=5e-3)


def test_float16_gives_up_when_no_scale_helps() -> None:
    class Never(Next):
        def forward(self, tokens: Tensor, padding: Tensor | None = None) -> dict[str, Tensor]:
            found = super().forward(tokens, padding)
            return {**found, "loss": found["loss"] + (self.norm[0] * 0).sqrt()}

    with pytest.raises(RecoveryError, match=r"at step 17 of 50: its gradient is nan"):
        run(Never(), steps=50, batch=4, precision="float16")


def test_no_text_is_said() -> None:
    nothing, something = Windows(torch.zeros(0, 6, dtype=torch.int64)), text(3)
    # Held-out text without a token has the best loss there is, and no weights would ever be better than the first.
    for windows, held_out in ((nothing, something), (something, nothing)):
        with pytest.raises(RecoveryError) as caught:
            train(next_module(), windows, TrainOptions(), make_inputs=make_inputs, held_out=held_out)
        assert caught.value.code == "RECOVER-008"


def test_a_module_without_anything_to_train_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="requires gradients"):
        run(next_module().requires_grad_(False))


def test_a_run_has_its_own_folder(tmp_path: Path) -> None:
    options = TrainOptions(steps=2, checkpoint_every=1)
    for identity in ("a" * 64, ""):
        train(next_module(), text(), options, make_inputs=make_inputs, checkpoints=tmp_path, identity=identity)
    names = [path.name for path in tmp_path.iterdir()]
    assert "recover-" + "a" * 12 in names
    assert len(names) == 2
