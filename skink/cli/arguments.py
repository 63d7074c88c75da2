"""Arguments that several commands share, and options that take several values at once."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from skink.errors import OptionError, suggest

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="A hub id, a folder, a folder made by Skink, or stdlib-llama, the model that ships."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
WORK = "How it works"
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
