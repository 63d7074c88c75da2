import io

import pytest
from rich.console import Console

from skink.export.report import formatting as fmt
from skink.export.report import render


def show(report, width=80, **options):
    console = Console(file=io.StringIO(), width=width, **options)
    console.print(render(report))
    return console.file.getvalue()


HEADLINE = """\
stdlib-llama at keep 0.8
stdlib-llama (llama, float32)
canonicalize, low-rank{keep=0.8}
                 source (transformers)  skink, empty recipe  skink, compressed
──────────────────────────────────────────────────────────────────────────────
Parameters                      7.24 M        7.24 M x1.000      6.19 M x0.855
  linear layers                 5.24 M        5.24 M x1.000      4.19 M x0.800
Bytes                          29.0 MB       29.0 MB x1.000     24.8 MB x0.855
MACs per token                  6.24 M        6.24 M x1.000      5.19 M x0.832
Perplexity                       4.312        4.312 x1.0000      4.340 x1.0065
  nats/token                     1.461             1.461 ±0      1.468 +0.0065
Prefill, tok/s                   3,211          3,260 x1.02        3,642 x1.13
  min to max               3,050-3,280          3,100-3,330        3,460-3,710
Decode, tok/s                    182.3          241.8 x1.33        287.1 x1.61
  min to max                   173-186              230-247            273-293
First token, ms                   12.5           12.3 x0.98         11.0 x0.88
MACs        context 256 tokens · linear layers and attention; 1 MAC is 2 FLOPs
Perplexity  text held-out · windows 64 · window length 256
Speed       threads 4 · prompt 128 · output 64 · repeats 7
"""

PASSES = """\
Pass                time  edits  skipped      error  KL, nats  verified
───────────────────────────────────────────────────────────────────────
canonicalize      400 ms     58        0  2.00e-07         0  numbers
low-rank      1 min 13 s      5        1     0.0830   0.00640  structure
"""


SAVED = """\
What was saved             Linear layers                    Whole model
───────────────────────────────────────────────────────────────────────
Parameters        5.24 M → 4.19 M -20.0%         7.24 M → 6.19 M -14.5%
Bytes           21.0 MB → 16.8 MB -20.0%       29.0 MB → 24.8 MB -14.5%
MACs per token    5.24 M → 4.19 M -20.0%         6.24 M → 5.19 M -16.8%
Latency           120 ms → 100 ms -16.7%  305 ms → 290 ms -4.9% (noise)
"""


def test_headline_at_80_columns(report):
    shown = "\n".join(line.rstrip() for line in show(report).splitlines())
    shown = shown.replace(fmt.TIMES, "x").replace(fmt.DASH, "-").replace(fmt.MINUS, "-")
    assert shown.startswith(HEADLINE)


def test_what_was_saved_stands_together(report):
    shown = "\n".join(line.rstrip() for line in show(report).splitlines())
    assert SAVED in shown.replace(fmt.MINUS, "-")


def test_the_rest_is_there(report):
    shown = " ".join(show(report).split())
    for part in (
        f"plain SVD 0.8 5.710 {fmt.TIMES}1.3242",
        f"whitened 0.8 4.340 {fmt.TIMES}1.0065",
        "low-rank 1 min 13 s 5 1 0.0830 0.00640 structure",
        "low-rank left model.layers.0.self_attn.v_proj: saves less than 10%",
        "8 of 10 layers factored",
        "Predicted to add 0.00400 nats per token in all; measured, all of them at once add",
        "• Four layers run as two matrix products.",
    ):
        assert part in shown, part


@pytest.mark.parametrize("forms", [3, 4, 5])
def test_no_line_is_wider_than_the_terminal_and_no_number_is_cut(report, forms):
    extra = report.forms[2].model_copy(update={"name": "ONNX Runtime, compressed"})
    wide = report.model_copy(update={"forms": [*report.forms, extra, extra][:forms]})
    shown = show(wide)
    assert max(map(len, shown.splitlines())) <= 80
    assert "…" not in shown
    # Once more where it says what was saved.
    assert shown.count("6.19 M") == forms - 2 + 1


def test_no_colour_where_there_is_no_terminal(report):
    assert "\x1b" not in show(report)
    assert "\x1b[32m" in show(report, force_terminal=True, color_system="standard")


def test_kl_has_a_column_only_where_it_was_measured(report):
    passes = [record.model_copy(update={"kl": None}) for record in report.passes]
    assert "KL" not in show(report.model_copy(update={"passes": passes}))


def test_names_are_not_markup_and_cannot_drive_the_terminal(report):
    form = report.forms[0].model_copy(update={"name": "h[0]"})
    shown = show(report.model_copy(update={"forms": [form], "notes": ["[bold]x[/bold] \x1b[31mred"]}))
    assert "h[0]" in shown
    assert "[bold]x[/bold]" in shown
    assert "\x1b" not in shown


def test_many_reasons_are_summed_up(report):
    rejection = report.passes[1].rejections[0]
    many = [rejection.model_copy(update={"reason": f"reason {index}"}) for index in range(9)]
    record = report.passes[1].model_copy(update={"rejections": many})
    assert "low-rank: 6 more reasons in the report" in show(report.model_copy(update={"passes": [record]}))


def test_what_passes_have_to_say(report):
    record = report.passes[1].model_copy(update={"notes": ["too [little] text", "refit: 3 of 4 factors."]})
    shown = show(report.model_copy(update={"passes": [record]}))
    assert "low-rank: too [little] text" in shown
    assert "low-rank: refit: 3 of 4 factors." in shown


def test_missing_parts(bare):
    assert show(bare).splitlines() == [bare.title, "stdlib-llama (llama, float32)", bare.recipe.line]
