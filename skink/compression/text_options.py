"""How text is cut: to calibrate on, to judge on, and to train on."""

from dataclasses import dataclass
from typing import Literal, get_args

from skink.compression.token_arrays import DTYPES
from skink.errors import OptionError, check_range, suggest

Packing = Literal["stream", "document"]


@dataclass(frozen=True)
class TextOptions:
    """How text is cut.

    Args:
        calibration_windows: windows of calibration text, >= 1.
        held_out_windows: windows of held-out text, >= 1.
        length: tokens in a window, >= 2; shortened to what the model's positions allow.
    """

    calibration_windows: int = 128
    held_out_windows: int = 64
    length: int = 512

    def __post_init__(self) -> None:
        check_range("calibration_windows", self.calibration_windows, low=1, high=1e9)
        check_range("held_out_windows", self.held_out_windows, low=1, high=1e9)
        check_range("length", self.length, low=2, high=1e9)


@dataclass(frozen=True)
class TrainingTextOptions:
    """How text to train on is read and cut.

    Args:
        length: tokens in a window, >= 2; None: as many as in other text.
        packing: `stream` packs documents one after another; `document` puts each in a row of its own.
        field: of rows, in .jsonl files and data sets, that holds the text or the token ids; None: "text", or else
            "input_ids".
        dtype: of the integers in .bin files; None: what the file beside each says.

    Raises:
        OptionError: OPTION-002.
    """

    length: int | None = None
    packing: Packing = "stream"
    field: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.length is not None:
            check_range("training length", self.length, low=2, high=1e9)
        if self.packing not in get_args(Packing):
            raise OptionError(
                "OPTION-002",
                f"training packing={self.packing!r} is none that is known.",
                fix=suggest(self.packing, get_args(Packing)),
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise OptionError(
                "OPTION-002", f"training dtype={self.dtype!r} is none that is read.", fix=suggest(self.dtype, DTYPES)
            )

    @property
    def said(self) -> bool:
        """Whether anything was said."""
        return self != TrainingTextOptions()

    def refuse(self, *names: str, why: str) -> None:
        """Refuse options, of those named, that would change nothing.

        Raises:
            OptionError: OPTION-002.
        """
        for name in names:
            value = getattr(self, name)
            if value != getattr(TrainingTextOptions(), name):
                raise OptionError(
                    "OPTION-002",
                    f"training {name}={value!r} does not go with this text.",
                    why=f"{why}.",
                    fix=f"leave --training-{name} out, or give other text by --training.",
                )
