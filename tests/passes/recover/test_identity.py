"""Two trainings share checkpoints only where nothing that decides about them differs."""

from dataclasses import replace

import torch

from skink.passes.recover.identity import identity
from tests.passes.recover.samples import HELD_OUT, TEXT
from tests.programs import canonical


def test_it_is_the_same_for_the_same_and_another_for_anything_else() -> None:
    program, teacher = canonical("llama"), canonical("llama")
    name, weight = next(iter(program.weights()))
    moved = weight.detach().clone()
    moved[3, 5] = torch.nextafter(moved[3, 5], torch.tensor(9.0))
    trained = program.clone()
    trained.set_weight(name, moved)
    other_tokens = TEXT.tokens.clone()
    other_tokens[0, 0] += 1
    other_held_out = HELD_OUT.tokens.flip(0)
    found = [
        identity("recover", 0, TEXT, HELD_OUT, program, teacher),
        identity("recover{ce=1}", 0, TEXT, HELD_OUT, program, teacher),
        identity("recover", 1, TEXT, HELD_OUT, program, teacher),
        identity("recover", 0, replace(TEXT, tokens=other_tokens), HELD_OUT, program, teacher),
        identity("recover", 0, replace(TEXT, padding=torch.ones_like(TEXT.tokens)), HELD_OUT, program, teacher),
        identity("recover", 0, TEXT, None, program, teacher),
        identity("recover", 0, TEXT, replace(HELD_OUT, tokens=other_held_out), program, teacher),
        identity("recover", 0, TEXT, HELD_OUT, trained, teacher),
        identity("recover", 0, TEXT, HELD_OUT, program, trained),
        identity("recover", 0, TEXT, HELD_OUT, program, None),
        identity("recover", 0, TEXT, HELD_OUT, program.with_dtype(torch.bfloat16), teacher),
    ]
    assert len(set(found)) == len(found)
    assert found[0] == identity("recover", 0, TEXT, HELD_OUT, program.clone(), teacher.clone())
    assert len(found[0]) == 64
