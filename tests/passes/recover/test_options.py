"""Options that contradict each other are refused when a recipe is read, with what to do."""

import pytest

from skink.errors import OptionError
from skink.passes.recipe import parse_passes
from skink.passes.recover import Recover


@pytest.mark.parametrize(
    ("options", "what", "fix"),
    [
        ("rank=4", "recover.rank does not go with train=all.", "choose train=lora, or leave rank out."),
        ("train=new,targets=[a]", "recover.targets does not go with train=new.", "choose train=lora"),
        ("merge=false", "recover.merge does not go with train=all.", "choose train=lora"),
        ("by=layer,train=lora", "recover.by=layer does not go with train=lora.", "choose train=new or train=all."),
        ("by=layer,kl=1", "recover.kl does not go with by=layer.", "choose hidden and attention"),
        ("by=layer,patience=2", "recover.patience does not go with by=layer.", "choose by=model"),
        ("layers_at_once=2", "recover.layers_at_once does not go with by=model.", "choose by=layer"),
        ("tokens=5,steps=6", "recover.tokens=5 does not go with steps=6.", "give one of them."),
        ("train=lora,merge=false", "recover.merge=false leaves the model as it was", "adapter=my-adapter"),
        ("train=lora,adapter=a", "recover.adapter=a does not go with merge=true.", "add merge=false"),
        ("ce=1,temperature=2", "recover.temperature does not go with no kl", "add kl=1"),
        ("at=[a]", "recover.at does not go with no hidden or attention.", "add hidden=1"),
        (
            "schedule=constant,final=0.5",
            "recover.final does not go with schedule=constant.",
            "choose cosine or linear.",
        ),
        ("patience=1,evaluate_every=0", "recover.patience does not go with evaluate_every=0.", "give tokens"),
        ("batch=2,micro_batch=3", "recover.micro_batch=3 does not go with batch=2.", "choose at most the batch."),
    ],
)
def test_contradictions(options: str, what: str, fix: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_passes(f"recover{{{options}}}")
    assert caught.value.code == "OPTION-002"
    assert caught.value.what.startswith(what)
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    "options",
    [
        "train=lora,rank=4,targets=[a],merge=false,adapter=a",
        "by=layer,train=new,hidden=1,attention=0.5,layers_at_once=0,at=[*.3]",
        "kl=1,temperature=2",
        "temperature=2",
        "steps=5,patience=2",
    ],
)
def test_what_goes_together(options: str) -> None:
    [entry] = parse_passes(f"recover{{{options}}}")
    assert parse_passes(str(entry)) == (entry,)


def test_what_says_nothing_is_known() -> None:
    assert not Recover().applies("rank")
    assert Recover(train="lora").applies("rank")
    assert not Recover(by="layer").applies("patience")
    assert not Recover(ce=1.0).applies("temperature")
    assert Recover(kl=1.0).applies("temperature")
