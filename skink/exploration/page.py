"""The map as one self-contained page: no script, nothing loaded, light and dark. Its table is sorted by CSS alone."""

import math
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from skink.exploration.result import COSTS, QUALITIES, Exploration
from skink.exploration.scatter import Dot, axis, scatter
from skink.exploration.table import point_table
from skink.exploration.wording import SHORT, beside_dense, families, name, percent, relative, series, shown, spoken
from skink.export.report import formatting as fmt
from skink.export.report.markup import Child, Markup, document, join, tag

# What plots show across: size, work and time. The rest is in the table and in explore.json.
PLOTTED = ("linear_parameters", "macs_per_token", "latency")
# Shares of the dense model's linear parameters for which the best point is named.
_AT_MOST = (0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def page(found: Exploration) -> str:
    """The text of `explore.html`."""
    style = files("skink.export.report").joinpath("report.css").read_text(encoding="utf-8")
    style += files(__package__).joinpath("explore.css").read_text(encoding="utf-8")
    table, sorting = point_table(found)
    body = join(
        _header(found),
        tag(
            "main",
            [_quality(found, quality) for quality in QUALITIES if quality in found.measured],
            _section("All points", table),
            _failures(found),
            _provenance(found),
        ),
        tag("footer", f"Written by Skink at {found.created}. The same numbers are in explore.json."),
    )
    title = f"{found.model['name']}, {found.space['name']}"
    return document(title=f"{title} · Skink map", style=style + sorting, body=body)


def _header(found: Exploration) -> Markup:
    failed = sum(point.error is not None for point in found.points)
    facts = [
        found.model["model_type"],
        f"{len(found.points):,} points" + (f", {failed:,} failed" if failed else ""),
        f"seed {found.settings.get('seed', 0)}",
        found.created,
    ]
    return tag(
        "header",
        tag("p", "Skink map", class_="eyebrow"),
        tag("h1", f"{found.model['name']}: {found.space['name']}"),
        tag("p", found.space["description"], class_="facts") if found.space["description"] else None,
        tag("p", " · ".join(facts), class_="facts"),
    )


def _section(title: str, *children: Child) -> Markup:
    return tag("section", tag("h2", title), children)


def _quality(found: Exploration, quality: str) -> Markup:
    """The plots of one quality, and what is best at each size."""
    costs = [cost for cost in PLOTTED if cost in found.measured]
    return _section(
        QUALITIES[quality].label,
        _legend(found),
        tag("div", [_plot(found, quality, cost) for cost in costs], class_="map"),
        _best(found, quality),
    )


def _legend(found: Exploration) -> Markup:
    names = families(found)
    key: list[Child] = [tag("span", tag("i", class_=f"s{series(found, name)}"), name) for name in names]
    key.append(tag("span", tag("i", class_="diamond"), "dense"))
    key.append(tag("span", tag("i", class_="line"), "front: nothing is better at no higher cost"))
    return tag("p", key, class_="legend")


def _plot(found: Exploration, quality: str, cost: str) -> Markup:
    places, dots = [], []
    scale = 100.0 if not QUALITIES[quality].low else 1.0
    for number, point in enumerate(found.everything):
        x, y = relative(found, point, cost), point.metrics.get(quality, math.nan)
        if math.isfinite(x) and math.isfinite(y):
            places.append(number)
            dots.append(
                Dot(
                    100 * x,
                    scale * y,
                    spoken(found, number),
                    f"p{number}",
                    str(number) if number else "",
                    series(found, point.family),
                    number == 0,
                )
            )
    front = [places.index(number) for number in found.front(quality, cost) if number in places]
    title = f"Against {COSTS[cost].label.lower()}"
    unit = "" if QUALITIES[quality].low else ", %"
    across = axis(f"{COSTS[cost].label}, % of dense", [dot.x for dot in dots])
    up = axis(f"{QUALITIES[quality].label}{unit}", [dot.y for dot in dots], may_be_logarithmic=QUALITIES[quality].low)
    description = f"{len(dots)} points, {len(front)} of them on the front."
    drawing = scatter(f"{quality}-{cost}", title, description, dots, front, across, up, low=QUALITIES[quality].low)
    under = f"Up: {QUALITIES[quality].label.lower()}{unit}, " + ("lower" if QUALITIES[quality].low else "higher")
    under += " is better" + ("; a logarithmic scale." if up.logarithmic else ".")
    lost = len(found.everything) - len(dots) - sum(point.error is not None for point in found.points)
    under += f" {lost} {'point is' if lost == 1 else 'points are'} off the scale." if lost else ""
    return tag("figure", tag("h3", title), drawing, tag("figcaption", under))


def _best(found: Exploration, quality: str) -> Markup | None:
    """The best point with at most so many linear parameters."""
    sign = 1 if QUALITIES[quality].low else -1
    rows: list[Markup] = []
    named: set[int] = set()
    for most in _AT_MOST:
        fitting = [
            (sign * point.metrics[quality], number)
            for number, point in enumerate(found.everything)
            if math.isfinite(point.metrics.get(quality, math.nan))
            and relative(found, point, "linear_parameters") <= most + 1e-9
        ]
        if not fitting or min(fitting)[1] in named:
            continue
        number = min(fitting)[1]
        named.add(number)
        point = found.everything[number]
        rows.append(
            tag(
                "tr",
                tag("th", f"at most {100 * most:.0f}%", scope="row"),
                tag("td", tag("a", name(point), href=f"#p{number}")),
                tag("td", shown(quality, point)),
                tag("td", beside_dense(found, quality, point)),
                [tag("td", percent(relative(found, point, cost))) for cost in PLOTTED if cost in found.measured],
            )
        )
    if not rows:
        return None
    label = QUALITIES[quality].label
    heads = ["Linear parameters", "Best point", SHORT[quality], "Beside dense"]
    heads += [SHORT[cost] for cost in PLOTTED if cost in found.measured]
    caption = f"The best {label.lower()} at each size. Costs are shares of the dense model's."
    head = tag("thead", tag("tr", (tag("th", text, scope="col") for text in heads)))
    return tag(
        "div", tag("table", tag("caption", caption), head, tag("tbody", rows), class_="best"), class_="scroll spaced"
    )


def _failures(found: Exploration) -> Markup | None:
    failed = [point for point in found.points if point.error is not None]
    if not failed:
        return None
    rows = [
        tag(
            "tr",
            tag("th", tag("code", point.recipe), scope="row"),
            tag("td", str((point.error or {}).get("code", ""))),
            tag("td", str((point.error or {}).get("what", ""))),
        )
        for point in failed
    ]
    head = tag("thead", tag("tr", (tag("th", text, scope="col") for text in ("Recipe", "Code", "What"))))
    caption = "Points that could not be made or measured."
    return _section(
        "Failed",
        tag(
            "div", tag("table", tag("caption", caption), head, tag("tbody", rows), class_="rejections"), class_="scroll"
        ),
    )


def _provenance(found: Exploration) -> Markup:
    cards = [
        _facts("Measured on", flat(found.settings)),
        _facts("Machine", {key: str(value) for key, value in found.machine.items() if value not in (None, "")}),
        _facts("Versions", found.versions),
    ]
    space = tag("div", tag("h3", "Space"), tag("pre", tag("code", found.space["yaml"])), class_="card wide")
    return _section("How this was made", tag("div", cards, space, class_="cards"))


def _facts(title: str, facts: Mapping[str, str]) -> Markup:
    content = tag("dl", (tag("div", tag("dt", key), tag("dd", text)) for key, text in facts.items()))
    return tag("div", tag("h3", title), content, class_="card")


def flat(settings: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Nested settings on one level, hashes cut to twelve digits."""
    found: dict[str, str] = {}
    for key, value in settings.items():
        key = f"{before}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            found |= flat(value, f"{key}, ")
        elif isinstance(value, list | tuple):
            found[key] = ", ".join(map(str, value))
        else:
            found[key] = str(value)[:12] if key.endswith("sha256") else fmt.setting(value)
    return found
