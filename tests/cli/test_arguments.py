import pytest
import typer

from skink.cli.arguments import check_place, parse_overrides, spread_values
from skink.errors import OptionError


def test_each_value_of_a_list_option_gets_its_name() -> None:
    spread = spread_values(["m", "--calibration", "a", "b", "c", "--out", "x"], {"--calibration"})
    assert spread == ["m", "--calibration", "a", "--calibration", "b", "--calibration", "c", "--out", "x"]


def test_repeated_names_stay_as_they_are() -> None:
    given = ["--set", "a.b=1", "--set", "a.c=2"]
    assert spread_values(given, {"--set"}) == given


def test_a_double_dash_ends_options() -> None:
    assert spread_values(["--set", "a.b=1", "--", "x", "y"], {"--set"}) == ["--set", "a.b=1", "--", "x", "y"]


def test_other_options_keep_one_value() -> None:
    assert spread_values(["--out", "x", "model"], {"--set"}) == ["--out", "x", "model"]


def test_overrides_have_the_types_of_a_recipe() -> None:
    found = parse_overrides(["low-rank.keep=0.7", "low-rank.targets=[*.mlp.*,*.q_proj]", "low-rank.method=plain"])
    assert found == {"low-rank.keep": 0.7, "low-rank.targets": ["*.mlp.*", "*.q_proj"], "low-rank.method": "plain"}


@pytest.mark.parametrize("entry", ["low-rank.keep", "keep=0.7"])
def test_an_override_without_pass_or_value_is_refused(entry: str) -> None:
    with pytest.raises(typer.BadParameter, match=r"is not pass\.option=value"):
        parse_overrides([entry])


def test_an_unknown_dtype_lists_the_known_ones() -> None:
    with pytest.raises(OptionError) as caught:
        check_place("bfloat", "cpu")
    assert caught.value.code == "OPTION-002"
    assert "did you mean 'bfloat16'" in str(caught.value)


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(OptionError, match="'tpu9' is not a device"):
        check_place("auto", "tpu9")


def test_a_cuda_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    check_place("auto", "cuda")
    with pytest.raises(OptionError, match="has 1 CUDA device"):
        check_place("auto", "cuda:1")
