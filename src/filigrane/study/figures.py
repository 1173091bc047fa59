"""The plots of radioactivity: those inside a report, and those over the table of a study.

Knows numbers only, neither records nor models. What goes into a report is a piece of SVG whose axes
take the colour of the text around it; what a study gets is files. matplotlib is imported when a
plot is made, and its settings are put back afterwards.
"""

import io
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from filigrane.errors import MissingDependency, RecordError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

# Okabe and Ito's colours, which most kinds of colour blindness tell apart (without their yellow,
# which is too light for lines on white); markers and lines differ as well.
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p", "8")
_LINES: Final = ("-", "--", "-.", ":")

# Colours that nothing else has, exchanged for those of the page when a figure is put into it.
_INK: Final = {"#010203": "currentColor", "#010204": "var(--mark)", "#010205": "var(--fill)"}
_TEXT, _MARK, _FILL = _INK

_LEAST: Final = ("setting", "statistic", "rho", "n_scored", "log10_pvalue")
_FACTORS: Final = {
    "rho": "marked share of the training data",
    "epochs": "epochs",
    "learning_rate": "learning rate",
    "window": "window (tokens)",
    "model": "model",
    "scheme": "scheme",
    "language": "language",
}
_FILTERED: Final = ", filtered"
_FONT: Final = "DejaVu Sans"
"""The font that comes with matplotlib."""

_TICKS: Final = (0, 2, 5, 10, 30, 100, 300, 1000, 3000, 10_000)


def require() -> None:
    """Raise MissingDependency, before the hours of a study, if plots could not be made after it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependency("plots need matplotlib: pip install 'filigrane[report]'") from error


@contextmanager
def _settings(fonttype: str) -> Iterator[None]:
    """What can only be set for all of matplotlib: text in SVG, and names that are no accident."""
    require()
    import matplotlib

    settings = {
        "svg.fonttype": fonttype,
        "svg.hashsalt": "filigrane",
        "font.family": _FONT,
        "font.size": 10.0,
        "axes.unicode_minus": True,
        "text.usetex": False,
    }
    with matplotlib.rc_context(settings):
        yield


# Figures of a report.


def decoys(z: Sequence[float], true_z: float, name: str) -> str:
    """SVG of how the true key's z stands among those of decoy keys; name: unique in the page.

    A true key that is far away gets an arrow at the border, so that the decoys stay visible.
    """
    low, high = min(*z, -2.5), max(*z, 2.5)
    inside = abs(true_z) <= max(12.0, 3.0 * high)
    left, right = low - 0.6, high + 0.6
    if inside:
        left, right = min(left, true_z - 0.6), max(right, true_z + 0.6)
    elif true_z > 0.0:
        right += 3.0
    else:
        left -= 3.0
    width = 0.25 if len(z) >= 100 else 0.5
    first = math.floor(left / width)
    edges = [width * step for step in range(first, math.ceil(right / width) + 1)]
    with _settings("none"):
        figure = _figure(4.0, 2.6)
        axes = figure.subplots()
        counts, _, _ = axes.hist(z, bins=edges, color=_FILL, linewidth=0, histtype="stepfilled")
        # The law that decoys have if the test is right: normal, near enough.
        x = [left + (right - left) * step / 200 for step in range(201)]
        scale = len(z) * width / math.sqrt(2.0 * math.pi)
        expected = [scale * math.exp(-0.5 * value * value) for value in x]
        axes.plot(x, expected, color=_TEXT, linewidth=1.2, linestyle="--")
        top = 1.3 * max(*counts, *expected)
        if inside:
            axes.axvline(true_z, color=_MARK, linewidth=2.2)
        else:
            tip, tail = (right, right - 1.5) if true_z > 0.0 else (left, left + 1.5)
            axes.annotate(
                "",
                xy=(tip, 0.72 * top),
                xytext=(tail, 0.72 * top),
                arrowprops={"arrowstyle": "-|>", "color": _MARK, "linewidth": 2.2},
            )
        at = min(max(true_z, left), right)
        toward_left = at > 0.5 * (left + right)
        axes.text(
            at + (-0.03 if toward_left else 0.03) * (right - left),
            0.97 * top,
            f"true key: z = {_minus(f'{true_z:.1f}')}",
            color=_MARK,
            ha="right" if toward_left else "left",
            va="top",
            fontweight="bold",
        )
        axes.set_xlim(left, right)
        axes.set_ylim(0.0, top)
        _frame(axes, "z, sum in standard deviations", "decoy keys", _TEXT)
        side = "beyond the right border" if true_z > 0.0 else "beyond the left border"
        words = (
            f"Histogram of z under {len(z)} decoy keys, from {min(z):.1f} to {max(z):.1f}, with "
            "the normal law as a dashed line. The true key stands at "
            f"z = {true_z:.1f}{'' if inside else ', ' + side}."
        )
        return _inline(figure, name, words)


def sequential(at: Sequence[int], log10_e: Sequence[float], alpha: float, name: str) -> str:
    """SVG of an e-process over the scores, with the border 1 / alpha; name: unique in the page."""
    border = -math.log10(alpha)
    with _settings("none"):
        figure = _figure(4.0, 2.6)
        axes = figure.subplots()
        marker = "o" if len(at) <= 20 else ""
        axes.plot(at, log10_e, color=_MARK, linewidth=2.0, marker=marker, markersize=4)
        axes.axhline(border, color=_TEXT, linewidth=1.2, linestyle="--")
        high, low = max(*log10_e, border), min(*log10_e, 0.0)
        room = 0.05 * (high - low)
        axes.set_ylim(low - room, high + 3.5 * room)
        axes.annotate(
            f"border 1 / alpha = {1.0 / alpha:,.0f}" if alpha >= 1e-7 else "border 1 / alpha",
            xy=(0.99, border),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            color=_TEXT,
            ha="right",
            va="bottom",
        )
        _frame(axes, "scored pairs", "log10 of the e-value", _TEXT)
        axes.xaxis.set_major_locator(_few(4))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        reached = [n for n, value in zip(at, log10_e, strict=True) if value >= border]
        words = (
            f"Line of the decimal logarithm of the e-value after 1 to {at[-1]:,} scored pairs; its "
            f"largest value is {max(log10_e):.1f}, the border is {border:.1f}, "
            + (f"first reached after {reached[0]:,}." if reached else "not reached.")
        )
        return _inline(figure, name, words)


def _inline(figure: "Figure", name: str, words: str) -> str:
    """A figure as part of a page: its colours, no date, no id that another figure has."""
    stream = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # A style element inside SVG would hold for the whole page.
    text = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    for ink, colour in _INK.items():
        text = text.replace(ink, colour)
    # Text has the font of the page; its sizes stay.
    text = re.sub(r"font: (bold |)([\d.]+px)[^;\"]*", r"font: \1\2 var(--font)", text)
    text = re.sub(r'(\sid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None
    head = f'<svg {box[0]} xmlns:xlink="http://www.w3.org/1999/xlink" role="img"'
    head += f' aria-label="{words}" stroke-linejoin="round">'
    return head + text[text.index(">") + 1 :].strip()


# Plots of a study.


def draw(rows: Sequence[Row], folder: Path, *, alpha: float = 1e-5) -> list[Path]:
    """Write rho, tokens, filter and factors, each as .png and .svg where rows show it.

    rows: of one test each: setting, statistic, rho, n_scored, log10_pvalue, and if they are varied
    epochs, learning_rate, window, model, scheme, language, seed. A plot shows the rows in
    which every factor that it does not show has its most common value. Returns the files. Raises
    RecordError for a row that lacks something, MissingDependency.
    """
    rows = [_complete(row, number) for number, row in enumerate(rows)]
    files = []
    # Letters as outlines: a file must look alike where it is opened.
    with _settings("path"):
        for name, make in _PLOTS.items():
            figure = make(rows, alpha)
            if figure is None:
                continue
            for form in ("png", "svg"):
                file = folder / f"{name}.{form}"
                # Without a date an unchanged study gives an unchanged file.
                metadata = {"Date": None} if form == "svg" else {}
                figure.savefig(file, format=form, dpi=150, metadata=metadata)
                files.append(file)
    return files


def _complete(row: Row, number: int) -> Row:
    for name in _LEAST:
        value = row.get(name)
        fits = isinstance(value, str) if name in _LEAST[:2] else type(value) in (int, float)
        if not fits or (type(value) is float and not math.isfinite(value)):
            raise RecordError(
                f'row {number} of the study has no usable "{name}"; run that cell again.'
            )
    row = dict(row)
    if isinstance(row.get("scheme"), str):
        # A factor of its own: a scheme with another window would never be the usual scheme.
        row["scheme"] = re.sub(r"\bcontext_width=\d+,?", "", row["scheme"]).rstrip(":,")
    return row


def _by_rho(rows: Sequence[Row], alpha: float) -> "Figure | None":
    """log10 p over the marked share, one line per setting and statistic; medians over seeds."""
    kept, fixed = _at_usual(_complete_runs(rows), {"rho"})
    if len({row["rho"] for row in kept}) < 2:
        return None
    figure = _figure(8.0, 5.4)
    axes = figure.subplots()
    series = _series(kept)
    styles = _styles(series)
    shares = sorted({row["rho"] for row in kept})
    for name, members in series.items():
        _medians(axes, [(shares.index(r["rho"]), r["log10_pvalue"]) for r in members], styles[name])
    axes.set_xticks(range(len(shares)), [f"{100 * share:g} %" for share in shares])
    axes.set_xlim(-0.3, len(shares) - 0.7)
    _evidence(axes, kept, alpha)
    _frame(axes, _FACTORS["rho"], "log10 p")
    _legend(figure, styles, _note(fixed, _medians_of(kept), alpha))
    return figure


def _by_tokens(rows: Sequence[Row], alpha: float) -> "Figure | None":
    """log10 p over the number of scored positions: a panel per test, a line per share and seed."""
    kept, fixed = _at_usual(rows, {"rho"})
    panels = {
        name: members
        for name, members in _series(kept).items()
        if any(run[0]["n_scored"] < run[-1]["n_scored"] for run in _runs(members))
    }
    if not panels:
        return None
    across = min(3, len(panels))
    down = math.ceil(len(panels) / across)
    figure = _figure(max(6.4, 4.2 * across), 1.2 + 3.8 * down)
    grid = figure.subplots(down, across, squeeze=False).reshape(-1)
    drawn = [row for members in panels.values() for row in members]
    shares = sorted({row["rho"] for row in drawn})
    styles = _styles([_value("rho", share) for share in shares])
    counts = [row["n_scored"] for row in drawn]
    for axes, (name, members) in zip(grid, panels.items(), strict=False):
        for run in _runs(members):
            style = styles[_value("rho", run[0]["rho"])]
            x, y = [row["n_scored"] for row in run], [row["log10_pvalue"] for row in run]
            axes.plot(x, y, markersize=5.5, linewidth=1.2, **style)
        if 0 < 20 * min(counts) < max(counts):
            axes.set_xscale("log")
        else:
            axes.xaxis.set_major_locator(_few(4))
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_title(_plain(name), fontsize=9)
        _evidence(axes, drawn, alpha)
        _frame(axes, "scored positions", "log10 p")
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    seeds = ["a line per seed"] if len({row.get("seed") for row in drawn}) > 1 else []
    _legend(figure, styles, _note(fixed, seeds, alpha), columns=6)
    return figure


def _by_filter(rows: Sequence[Row], alpha: float) -> "Figure | None":
    """Pairs of points: the same test without and with a filter of windows; medians over seeds."""
    rows = [
        row
        for row in _complete_runs(rows)
        if row["statistic"].removesuffix(_FILTERED) == "answer count"
    ]
    varied = [name for name in _FACTORS if len({row.get(name) for row in rows}) > 1]
    pairs: dict[str, dict[bool, list[float]]] = {}
    for row in rows:
        filtered = row["statistic"].endswith(_FILTERED)
        label = ", ".join([row["setting"], *(_value(name, row.get(name)) for name in varied)])
        pairs.setdefault(label, {}).setdefault(filtered, []).append(row["log10_pvalue"])
    both = {label: found for label, found in pairs.items() if len(found) == 2}
    if not both:
        return None
    figure = _figure(8.0, 1.9 + 0.42 * len(both))
    axes = figure.subplots()
    looks: dict[str, dict[str, Any]] = {
        "without filter": {"color": _COLOURS[1], "marker": "o", "markerfacecolor": "white"},
        "with filter": {"color": _COLOURS[0], "marker": "s"},
    }
    values = []
    for number, found in enumerate(both.values()):
        ends = [statistics.median(found[filtered]) for filtered in (False, True)]
        values += ends
        axes.plot(ends, [number, number], color="#808080", linewidth=1.4, zorder=1)
        for end, look in zip(ends, looks.values(), strict=True):
            axes.plot(end, number, markersize=8.0, linestyle="", markeredgewidth=1.6, **look)
    axes.set_yticks(range(len(both)), list(map(_plain, both)))
    axes.set_ylim(len(both) - 0.5, -0.5)
    _symlog(axes, "x", values, alpha)
    _frame(axes, "log10 p (stronger evidence to the right)", "")
    named = {name: look | {"linestyle": ""} for name, look in looks.items()}
    _legend(figure, named, f"medians over seeds; {_dashed(alpha)}")
    return figure


def _by_factor(rows: Sequence[Row], alpha: float) -> "Figure | None":
    """One panel for each factor besides rho that takes several values."""
    panels = []
    for factor in list(_FACTORS)[1:]:
        known = [row for row in _complete_runs(rows) if row.get(factor) is not None]
        kept, _ = _at_usual(known, {factor})
        # A test that was run at one value only has no line to show.
        kept = [
            row
            for members in _series(kept).values()
            if len({row[factor] for row in members}) > 1
            for row in members
        ]
        if kept:
            panels.append((factor, kept))
    if not panels:
        return None
    figure = _figure(max(6.4, 4.4 * len(panels)), 5.2)
    styles = _styles(_series([row for _, kept in panels for row in kept]))
    everything = [row for _, kept in panels for row in kept]
    for axes, (factor, kept) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        values = {row[factor] for row in kept}
        numbers = all(type(value) in (int, float) for value in values)
        order = sorted(values, key=None if numbers else str)
        for name, members in _series(kept).items():
            points = [(order.index(row[factor]), row["log10_pvalue"]) for row in members]
            _medians(axes, points, styles[name])
        axes.set_xticks(range(len(order)), [_plain(_bare(value)) for value in order])
        axes.set_xlim(-0.3, len(order) - 0.7)
        _evidence(axes, everything, alpha)
        _frame(axes, _FACTORS[factor], "log10 p")
    note = "every other factor at its most common value; "
    _legend(figure, styles, f"{note}lines join medians over seeds; {_dashed(alpha)}")
    return figure


_PLOTS: Final = {
    "rho": _by_rho,
    "tokens": _by_tokens,
    "filter": _by_filter,
    "factors": _by_factor,
}


def _at_usual(rows: Sequence[Row], free: set[str]) -> tuple[list[Row], dict[str, Any]]:
    """Rows in which all factors that are not free have their most common value; and those values.

    What a plot does not show must not vary in it.
    """
    kept, fixed = list(rows), {}
    for factor in _FACTORS:
        if factor in free or len({row.get(factor) for row in rows}) < 2:
            continue
        # The usual value is that of all rows, so that plots of one study agree about it.
        usual = Counter(row.get(factor) for row in rows).most_common(1)[0][0]
        fixed[factor] = usual
        kept = [row for row in kept if row.get(factor) == usual]
    return kept, fixed


def _series(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by setting and statistic."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row['setting']}: {row['statistic']}", []).append(row)
    return groups


def _runs(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that differ in nothing but how much was scored, by growing n_scored."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        what = tuple(row.get(name) for name in ("setting", "statistic", *_FACTORS, "seed"))
        groups.setdefault(what, []).append(row)
    return [sorted(run, key=lambda row: float(row["n_scored"])) for run in groups.values()]


def _complete_runs(rows: Sequence[Row]) -> list[Row]:
    """Of every run the row in which the most was scored."""
    return [run[-1] for run in _runs(rows)]


def _value(name: str, value: Any) -> str:
    short = {"rho": "ρ", "learning_rate": "lr"}.get(name, name)
    return f"{short} {100 * value:g} %" if name == "rho" else f"{short} {_bare(value)}"


def _bare(value: Any) -> str:
    return f"{value:g}" if type(value) is float else str(value)


def _note(fixed: dict[str, Any], more: Sequence[str], alpha: float) -> str:
    parts = [_value(name, value) for name, value in fixed.items()]
    return "; ".join([*parts, *more, _dashed(alpha)])


def _medians_of(rows: Sequence[Row]) -> list[str]:
    seeds = len({row.get("seed") for row in rows})
    return [f"{seeds} seeds, lines join medians"] if seeds > 1 else []


def _dashed(alpha: float) -> str:
    return f"dashed: alpha = {alpha:g}".replace("e-0", "e-")


def _styles(names: Sequence[str] | dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each series; no two markers alike among the first twelve."""
    return {
        name: {
            "color": _COLOURS[number % len(_COLOURS)],
            "marker": _MARKERS[number % len(_MARKERS)],
            "linestyle": _LINES[number % len(_LINES)],
        }
        for number, name in enumerate(names)
    }


def _medians(axes: "Axes", points: Sequence[tuple[float, float]], style: dict[str, Any]) -> None:
    """A line through the medians at each place, and every single value as a small point."""
    places = sorted({x for x, _ in points})
    middle = [statistics.median(y for x, y in points if x == place) for place in places]
    axes.plot(places, middle, markersize=6.5, linewidth=1.4, **style)
    if len(points) > len(places):
        look = {"color": style["color"], "marker": style["marker"], "linestyle": ""}
        axes.plot(*zip(*points, strict=True), markersize=3.0, alpha=0.6, **look)


def _evidence(axes: "Axes", rows: Sequence[Row], alpha: float) -> None:
    _symlog(axes, "y", [row["log10_pvalue"] for row in rows], alpha)


def _symlog(axes: "Axes", which: str, values: Sequence[float], alpha: float) -> None:
    """An axis for log10 p that is straight to -10 and logarithmic beyond; more evidence is up."""
    border = math.log10(alpha)
    deepest = min(*values, border)
    ticks = [-tick for tick in _TICKS if tick <= 1.05 * -deepest]
    draw_line, scale, limit, axis = (
        (axes.axhline, axes.set_yscale, axes.set_ylim, axes.yaxis)
        if which == "y"
        else (axes.axvline, axes.set_xscale, axes.set_xlim, axes.xaxis)
    )
    scale("symlog", linthresh=10.0, linscale=1.0)
    limit(0.4, 1.15 * deepest - 0.3)
    axis.set_major_locator(_fixed(ticks))
    axis.set_major_formatter(lambda value, _: _minus(f"{value:,.0f}"))
    axis.set_minor_locator(_fixed([]))
    draw_line(border, color="#606060", linewidth=1.0, linestyle=(0, (5, 3)), zorder=0)


def _fixed(ticks: Sequence[float]) -> Any:
    from matplotlib.ticker import FixedLocator

    return FixedLocator(ticks)


def _few(number: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(number, integer=True)


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def _plain(text: str) -> str:
    """Text that is not read as a formula, and without signs for which there is no picture."""
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont(_FONT))
    shown = "".join(c if c.isprintable() and font.get_char_index(ord(c)) else "?" for c in text)
    return shown.replace("$", r"\$")


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _frame(axes: "Axes", across: str, up: str, ink: str = "#000000") -> None:
    axes.set_xlabel(across, color=ink)
    axes.set_ylabel(up, color=ink)
    axes.grid(True, linewidth=0.5, color=ink, alpha=0.18)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side not in ("top", "right"))
        spine.set_color(ink)


def _legend(
    figure: "Figure", styles: dict[str, dict[str, Any]], title: str, columns: int = 2
) -> None:
    """One legend below all panels, where no point can be."""
    from matplotlib.lines import Line2D

    figure.legend(
        handles=[Line2D([], [], label=_plain(name), **style) for name, style in styles.items()],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        title=_plain(title),
        title_fontsize=8,
    )
