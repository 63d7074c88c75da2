"""Arguments that several commands share, and options that take several values at once."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from skink.errors import OptionError, suggest

if TYPE_CHECKING:
    from skink.compression import TrainingTextOptions

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A hub id, a folder, a folder made by Skink, or stdlib-llama, the model that ships."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
WORK, TEXT, MEASURED = "How it works", "Text", "What is measured"
Dtype = Annotated[
    str,
    typer.Option(
        help="Of the weights while working: auto, float32, bfloat16, float16 or float64.",
        metavar="TYPE",
        rich_help_panel=WORK,
    ),
]
Device = Annotated[str, typer.Option(help="Where to work: cpu, cuda, cuda:1.", metavar="DEVICE", rich_help_panel=WORK)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it exists.")]


Seed = Annotated[int, typer.Option(help="Of everything random.", metavar="N", rich_help_panel=WORK)]

Calibration = Annotated[
    list[str] | None,
    typer.Option(
        "--calibration",
        metavar="FILES...",
        help="Text to calibrate on: files, folders, or the word stdlib (Python source; the default for stdlib-llama).",
        rich_help_panel=TEXT,
    ),
]
HeldOut = Annotated[
    list[str] | None,
    typer.Option(
        "--held-out",
        metavar="FILES...",
        help="Text to judge on. By default a tenth of the calibration text, which calibration does not see.",
        rich_help_panel=TEXT,
    ),
]
Training = Annotated[
    list[str] | None,
    typer.Option(
        "--training",
        metavar="FILES...",
        help="Text for passes that train: files (text, JSONL, tokens as .npy or .bin), folders, or the word stdlib. By "
        "default the text to calibrate on.",
        rich_help_panel=TEXT,
    ),
]
CalibrationWindows = Annotated[
    int, typer.Option(min=1, help="Windows of calibration text.", metavar="N", rich_help_panel=TEXT)
]
HeldOutWindows = Annotated[
    int, typer.Option(min=1, help="Windows of held-out text.", metavar="N", rich_help_panel=TEXT)
]
Length = Annotated[int, typer.Option(min=2, help="Tokens in a window.", metavar="N", rich_help_panel=TEXT)]
TrainingLength = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens in a window to train on; by default as many as in others.",
        metavar="N",
        rich_help_panel=TEXT,
        show_default=False,
    ),
]
TrainingPacking = Annotated[
    str | None,
    typer.Option(
        help="stream: documents one after another (default). document: each in a row of its own, padded.",
        metavar="stream|document",
        rich_help_panel=TEXT,
        show_default=False,
    ),
]
TrainingField = Annotated[
    str | None,
    typer.Option(
        help="The field of .jsonl lines that holds the text or the token ids; by default text, or else input_ids.",
        metavar="NAME",
        rich_help_panel=TEXT,
        show_default=False,
    ),
]
TrainingDtype = Annotated[
    str | None,
    typer.Option(
        help="Of the integers in .bin files of tokens: uint16, uint32, int32 or int64; by default what the .json "
        "beside each says.",
        metavar="TYPE",
        rich_help_panel=TEXT,
        show_default=False,
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Sequences at once.", metavar="N", rich_help_panel=MEASURED)]
PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens of each prompt.", metavar="N", rich_help_panel=MEASURED)]
NewTokens = Annotated[
    int, typer.Option(min=2, help="Tokens generated after it.", metavar="N", rich_help_panel=MEASURED)
]
Rounds = Annotated[
    int,
    typer.Option(min=1, help="How often each model is timed, in turn.", metavar="N", rich_help_panel=MEASURED),
]


class VariadicCommand(TyperCommand):
    """A command whose list options take several values: `--calibration a.txt b.txt` as `--calibration a.txt
    --calibration b.txt`. The values end at the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        lists = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        return super().parse_args(ctx, spread_values(args, lists))


def spread_values(arguments: Sequence[str], lists: set[str]) -> list[str]:
    """`arguments` with the name of each option among `lists` repeated before each of its values."""
    spread: list[str] = []
    name = ""
    values = 0
    for index, argument in enumerate(arguments):
        if argument == "--":
            spread.extend(arguments[index:])
            break
        if argument.startswith("-") and argument != "-":
            name, values = (argument if argument in lists else ""), 0
        elif name:
            values += 1
            if values > 1:
                spread.append(name)
        spread.append(argument)
    return spread


def parse_overrides(entries: Sequence[str]) -> dict[str, Any]:
    """`low-rank.keep=0.7` → `{"low-rank.keep": 0.7}`.

    Raises:
        typer.BadParameter: an entry without pass, option or value.
    """
    from skink.passes.recipe import parse_value

    overrides: dict[str, Any] = {}
    for entry in entries:
        key, equals, value = entry.partition("=")
        if not equals or "." not in key:
            raise typer.BadParameter(f"{entry!r} is not pass.option=value, as low-rank.keep=0.7.", param_hint="'--set'")
        overrides[key.strip()] = parse_value(value)
    return overrides


def check_place(dtype: str, device: str) -> None:
    """Refuse a dtype or a device that is not there, before anything is loaded.

    Raises:
        OptionError: OPTION-002.
    """
    import torch

    if dtype not in DTYPES:
        raise OptionError("OPTION-002", f"--dtype {dtype!r} is not one to work in.", fix=suggest(dtype, DTYPES))
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise OptionError("OPTION-002", f"--device {device!r} is not a device.", fix="choose cpu or cuda.") from error
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise OptionError(
            "OPTION-002",
            f"--device {device!r} is not on this machine, which has {count or 'no'} CUDA device{'s' * (count != 1)}.",
            fix="choose cpu." if not count else f"choose cpu or cuda:0 to cuda:{count - 1}.",
        )


def training_text_options(
    length: int | None, packing: Any, field: str | None, dtype: str | None
) -> "TrainingTextOptions":
    """What was said of training text; the packing is checked there.

    Raises:
        OptionError: OPTION-002.
    """
    from skink.compression import TrainingTextOptions

    return TrainingTextOptions(length, packing or "stream", field, dtype)
