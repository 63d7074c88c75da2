import pytest
from pydantic import ValidationError

from skink.export.report import Perplexity, Rate


def test_setting_types_survive_the_round_trip():
    settings = {"text": "a", "windows": 3, "share": 0.5, "whole": 2.0, "paired": True, "limit": None}
    again = Perplexity.model_validate_json(Perplexity(value=2.0, nats=0.7, settings=settings).model_dump_json())
    assert {key: type(value) for key, value in again.settings.items()} == {k: type(v) for k, v in settings.items()}
    assert again.settings == settings


def test_numbers_without_their_settings_are_refused():
    with pytest.raises(ValidationError, match="settings"):
        Perplexity(value=2.0, nats=0.7, settings={})


def test_a_rate_is_ordered():
    with pytest.raises(ValidationError, match=r"min 3\.0 <= median 2\.0"):
        Rate(median=2.0, min=3.0, max=4.0)
