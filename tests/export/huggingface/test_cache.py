import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skink.errors import ModelError
from skink.export.huggingface.cache import SkinkCache, StateBuffer
from skink.graph.program import StateInput

APPEND = StateInput("past_key_values.0.key", 0, ("B", 2, "P", 3), "append", 2)
RING = StateInput("past_key_values.1.key", 1, ("B", 2, "P4", 3), "ring", 2, 4)
CPU = torch.device("cpu")


def tokens(begin: int, end: int, batch: int = 2) -> Tensor:
    """The state of tokens `begin` to `end`: every number says which token it is of, and which sequence."""
    row = torch.arange(batch)[:, None, None, None] * 1000.0
    return (torch.arange(begin, end)[None, None, :, None] + row).expand(batch, 2, -1, 3)


def buffer(layout: StateInput, batch: int = 2) -> StateBuffer:
    made = StateBuffer(layout, dtype=torch.float32, device=CPU)
    made.replace(made.tensor.new_zeros((batch, 2, 0, 3)))
    return made


def step(cache: SkinkCache, count: int, batch: int = 2) -> list[Tensor]:
    cache.fit(batch, count)
    joined = [each.extend(tokens(cache.seen, cache.seen + count, batch)) for each in cache.buffers]
    cache.seen += count
    return joined


def make_cache(*layouts: StateInput) -> SkinkCache:
    return SkinkCache(layouts or (APPEND, RING), dtype=torch.float32, device=CPU)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=12))
def test_extending_gives_the_visible_past_and_the_new_tokens(steps: list[int]) -> None:
    for layout in (APPEND, RING):
        made, seen = buffer(layout), 0
        for count in steps:
            visible = min(seen, layout.limit) if layout is RING else seen
            assert torch.equal(made.tensor, tokens(seen - visible, seen))
            assert torch.equal(made.extend(tokens(seen, seen + count)), tokens(seen - visible, seen + count))
            seen += count


def test_a_ring_does_not_grow_with_the_tokens_that_went_through() -> None:
    made = buffer(RING)
    for seen in range(1000):
        made.extend(tokens(seen, seen + 1))
    assert made.tensor.untyped_storage().nbytes() <= 2 * 2 * 64 * 3 * 4


def test_appending_copies_the_past_seldom() -> None:
    made, storages = buffer(APPEND), set()
    for seen in range(1000):
        storages.add(made.extend(tokens(seen, seen + 1)).untyped_storage().data_ptr())
    assert len(storages) < 12


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=15))
def test_the_last_step_can_be_taken_back_in_part(steps: list[tuple[int, int]]) -> None:
    cache = make_cache()
    for count, remove in steps:
        step(cache, count)
        cache.crop(-min(remove, count))
        seen = cache.get_seq_length()
        assert torch.equal(cache.tensors[0], tokens(0, seen))
        assert torch.equal(cache.tensors[1], tokens(max(seen - 4, 0), seen))


def test_a_recording_ring_takes_back_all_since_the_last_crop() -> None:
    cache = make_cache(RING)
    step(cache, 200)
    cache.activate_past_recording()
    cache.crop(0)
    for _ in range(70):
        step(cache, 1)
    cache.crop(-70)
    assert torch.equal(cache.tensors[0], tokens(196, 200))


def test_a_ring_says_when_it_has_forgotten() -> None:
    cache = make_cache(APPEND, RING)
    for count in (3, *[1] * 100):
        step(cache, count)
    with pytest.raises(ModelError, match=r"90 tokens cannot be taken back from past_key_values\.1\.key") as caught:
        cache.crop(-90)
    assert caught.value.code == "MODEL-005"
    assert "keeps 4 tokens of 103" in str(caught.value)


def test_crop_takes_a_length_to_keep_and_a_tensor_as_older_transformers_give_them() -> None:
    cache = make_cache(APPEND)
    step(cache, 7)
    cache.crop(5)
    assert torch.equal(cache.tensors[0], tokens(0, 5))
    cache.crop(9)
    assert cache.get_seq_length() == 5
    cache.crop(torch.tensor(-2))
    assert torch.equal(cache.tensors[0], tokens(0, 3))
    assert isinstance(cache.get_seq_length(), int)


def test_sequences_are_reordered_repeated_and_chosen() -> None:
    cache = make_cache()
    step(cache, 6)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.tensors[0], tokens(0, 6)[[1, 1]])
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    cache.batch_select_indices(torch.tensor([0, 3, 2]))
    assert torch.equal(cache.tensors[1], tokens(2, 6)[[1, 1, 1]])
    joined = step(cache, 1, batch=3)
    assert torch.equal(joined[0][0], torch.cat((tokens(0, 6)[1], tokens(6, 7, batch=3)[0]), 1))


def test_it_answers_what_generate_asks() -> None:
    cache = make_cache()
    assert (len(cache), cache.is_sliding, cache.is_croppable, cache.is_compileable) == (2, [False, True], False, False)
    assert (cache.get_seq_length(), cache.get_max_length(), cache.get_mask_sizes(3)) == (0, -1, (3, 0))
    step(cache, 5)
    assert cache.get_mask_sizes(2) == (7, 0)
    assert repr(cache) == "SkinkCache(2 layers, 2 sequences, 5 tokens)"
    assert make_cache(APPEND).is_croppable
    cache.padded = True
    cache.reset()
    assert (cache.seen, cache.padded, cache.tensors[0].shape[2]) == (0, False, 0)
    assert torch.equal(step(cache, 3)[1], tokens(0, 3))


def test_a_copy_goes_on_by_itself() -> None:
    cache = make_cache()
    step(cache, 5)
    other = copy.deepcopy(cache)
    step(other, 3)
    assert torch.equal(step(cache, 1)[0], tokens(0, 6))
    assert torch.equal(other.tensors[0], tokens(0, 8))


def test_what_was_made_in_inference_mode_is_extended_outside_of_it() -> None:
    cache = make_cache()
    with torch.inference_mode():
        step(cache, 5)
    assert torch.equal(step(cache, 1)[0], tokens(0, 6))


def test_what_gradients_flow_through_is_not_written() -> None:
    made, state = buffer(APPEND), tokens(0, 4).clone().requires_grad_()
    made.replace(state)
    made.remove(2, 4)
    with torch.no_grad():
        assert torch.equal(made.extend(tokens(2, 3)), tokens(0, 3))
        made.extend(tokens(30, 31))
    assert torch.equal(state, tokens(0, 4))
