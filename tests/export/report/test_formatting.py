import math

import pytest

from skink.export.report import formatting as fmt


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (812, "812"),
        (999, "999"),
        (1000, "1.00 k"),
        (7_241_728, "7.24 M"),
        (999_999, "1.00 M"),
        (7e9, "7.00 G"),
    ],
)
def test_count(value, text):
    assert fmt.count(value) == text


def test_size_is_in_decimal_units():
    assert fmt.size(28_966_912) == "29.0 MB"
    assert fmt.size(12) == "12 B"


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (4.3121, 4, "4.312"),
        (9.99996, 4, "10.00"),
        (1234.5, 4, "1,234"),
        (0.0, 4, "0"),
        (2.13e-7, 3, "2.13e\N{MINUS SIGN}07"),
        (-0.25, 2, "\N{MINUS SIGN}0.25"),
        (3e12, 3, "3.00e+12"),
        (math.inf, 4, "∞"),
        (math.nan, 4, "not a number"),
    ],
)
def test_plain(value, digits, text):
    assert fmt.plain(value, digits) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.38, "380 ms"), (4.206, "4.21 s"), (59.96, "1 min 00 s"), (185, "3 min 05 s")]
)
def test_seconds(value, text):
    assert fmt.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "decimals", "text"),
    [(0.805, 3, "0.805"), (1.00651, 4, "1.0065"), (2.34567, 3, "2.35"), (23.456, 3, "23.5"), (1234.5, 3, "1,230")],
)
def test_ratio(value, decimals, text):
    assert fmt.ratio(value, decimals) == f"\N{MULTIPLICATION SIGN}{text}"


def test_change_is_a_signed_percentage_until_it_is_a_multiple():
    assert fmt.change(0.805) == "\N{MINUS SIGN}19.5%"
    assert fmt.change(1.12) == "+12.0%"
    assert fmt.change(1.00001) == "±0.0%"
    assert fmt.change(4.5) == "\N{MULTIPLICATION SIGN}4.50"


def test_settings_are_readable():
    settings = {"text": "held-out", "window_length": 256, "share": 0.5, "paired": True, "limit": None}
    assert fmt.settings(settings) == "text held-out · window length 256 · share 0.5 · paired yes · limit none"


def test_shorten_keeps_both_ends():
    assert fmt.shorten("model.layers.0.q_proj", 11) == "model…_proj"
    assert fmt.shorten("short", 11) == "short"


def test_clean_replaces_terminal_escapes_and_reversed_text():
    assert fmt.clean("a\x1b[31mb\u202ec\x00") == "a\ufffd[31mb\ufffdc\ufffd"
    assert fmt.clean("two\nlines\tüñ中") == "two\nlines\tüñ中"
