import pytest

from skink.errors import OptionError
from skink.exploration import ExploreOptions


def test_what_is_measured_by_default():
    assert ExploreOptions().kinds(encoder=False) == ("perplexity", "questions")
    assert ExploreOptions().kinds(encoder=True) == ("embedding",)
    assert ExploreOptions(quality=("questions",)).kinds(encoder=False) == ("questions",)


@pytest.mark.parametrize(
    "options",
    [
        {"jobs": 0},
        {"questions": 0},
        {"max_points": 0},
        {"quality": ("beauty",)},
        {"quality": ("tasks",)},
        {"tasks": ("hellaswag",)},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(OptionError) as caught:
        ExploreOptions(**options)
    assert caught.value.code == "OPTION-002"


@pytest.mark.parametrize(("kind", "encoder"), [("embedding", False), ("perplexity", True), ("questions", True)])
def test_a_quality_that_a_model_has_not_is_refused(kind, encoder):
    with pytest.raises(OptionError, match="is not for") as caught:
        ExploreOptions(quality=(kind,)).kinds(encoder=encoder)
    assert caught.value.code == "OPTION-002"


def test_the_workload_is_plain():
    assert ExploreOptions().workload() == {"batch": 1, "prompt": 32, "new_tokens": 32, "rounds": 5}
