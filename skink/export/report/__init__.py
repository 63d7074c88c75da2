"""What `skink compress` says about its result: `report.json`, `report.html`, and the same table in the terminal."""

from skink.export.report.files import HTML_NAME, JSON_NAME, read_report, write_report
from skink.export.report.measures import Amount, Form, Perplexity, Quality, Rate, Saved, Saving, Speed
from skink.export.report.model import (
    Calibration,
    Comparison,
    LayerRecord,
    PassRecord,
    Recipe,
    Recovery,
    Rejection,
    Report,
    Source,
)
from skink.export.report.savings import card_section
from skink.export.report.terminal import render

__all__ = [
    "HTML_NAME",
    "JSON_NAME",
    "Amount",
    "Calibration",
    "Comparison",
    "Form",
    "LayerRecord",
    "PassRecord",
    "Perplexity",
    "Quality",
    "Rate",
    "Recipe",
    "Recovery",
    "Rejection",
    "Report",
    "Saved",
    "Saving",
    "Source",
    "Speed",
    "card_section",
    "read_report",
    "render",
    "write_report",
]
