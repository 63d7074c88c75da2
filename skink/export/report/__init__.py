"""What `skink compress` says about its result: `report.json`, `report.html`, and the same table in the terminal."""

from skink.export.report.files import HTML_NAME, JSON_NAME, read_report, write_report
from skink.export.report.model import (
    Calibration,
    Comparison,
    Form,
    LayerRecord,
    PassRecord,
    Perplexity,
    Rate,
    Recipe,
    Rejection,
    Report,
    Source,
    Speed,
)
from skink.export.report.terminal import render

__all__ = [
    "HTML_NAME",
    "JSON_NAME",
    "Calibration",
    "Comparison",
    "Form",
    "LayerRecord",
    "PassRecord",
    "Perplexity",
    "Rate",
    "Recipe",
    "Rejection",
    "Report",
    "Source",
    "Speed",
    "read_report",
    "render",
    "write_report",
]
