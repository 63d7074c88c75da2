"""What the report says of training."""

from xml.etree import ElementTree

import pytest
from rich.console import Console

from skink.export.report import Recovery, Report, render
from skink.export.report.formatting import MISSING
from skink.export.report.html import page
from skink.export.report.recovery import recovery_rows, recovery_section

FULL = Recovery(
    name="recover{tokens=20000}",
    trained=4_570_000,
    loss={"ce": 1.0, "kl": 0.5},
    settings={"batch": 8, "learning_rate": 1e-4},
    text="my text",
    sha256="ab" * 32,
    steps=5,
    tokens=20_000,
    seconds=10.0,
    processes=2,
    losses=[(4000, 3.0), (8000, 2.75), (20000, 2.5)],
    held_out=[(0, 2.9), (20000, 2.6)],
    before=2.9,
    after=2.6,
    stopped_early=True,
    resumed_at=3,
    notes=["A note."],
)
BARE = Recovery(
    name="recover{by=layer}", trained=1, loss={"hidden": 1.0}, settings={"batch": 8}, steps=1, tokens=9, seconds=0
)


@pytest.fixture
def trained(report: Report) -> Report:
    return report.model_copy(update={"recoveries": [FULL, BARE]})


def test_rows_say_how_long_and_what_it_won(trained: Report) -> None:
    full, bare = recovery_rows(trained)
    assert full.cells == ("4.57 M", "20.0 k", "10.0 s", "2,000", "2.900 → 2.600")
    assert full.remarks == (
        "It stopped early: the held-out loss no longer fell.",
        "It went on from a checkpoint after 3 of 5 steps.",
        "2 processes trained together.",
        "A note.",
    )
    assert bare.cells[-2:] == (MISSING, MISSING)
    assert bare.remarks == ()


def test_the_section_has_settings_and_curves(trained: Report) -> None:
    section = str(recovery_section(trained))
    ElementTree.fromstring(section)
    assert section.count("<svg") == 2  # of the first; the second has no points
    assert "ce + 0.5000 kl" in section
    assert "batch 8 · learning rate 0.0001" in section
    assert "abababababab" in section


def test_a_report_without_training_has_no_section(report: Report) -> None:
    assert recovery_section(report) is None
    assert "<h2>Recovery</h2>" not in page(report)


def test_page_and_terminal_show_it(trained: Report) -> None:
    ElementTree.fromstring(page(trained).partition("\n")[2])
    assert "<h2>Recovery</h2>" in page(trained)
    console = Console(width=80, record=True)
    console.print(render(trained))
    said = console.export_text()
    assert "2.900 → 2.600" in said
    assert "• A note." in said


def test_it_is_read_back(trained: Report) -> None:
    assert Report.from_json(trained.to_json()) == trained
