"""The plots of a run: strength against speed, and both against the draft length.

Knows nothing of records or models: it draws the summary that it is given. matplotlib is imported
when a plot is made, and without its global state, so that a program's own plots are left alone.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from filigrane.errors import MissingDependency

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]

# Okabe and Ito's colours, which most kinds of colour blindness tell apart (without their yellow,
# which is too light for lines on white); with more methods than colours the marker tells.
_COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS: Final = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h", "p", "8")
_GREYS: Final = ("#303030", "#909090")
_DOTS: Final = (":", "-.")

_BARS: Final[dict[str, Any]] = {"linewidth": 1.2, "capsize": 2.0, "elinewidth": 0.9}

_SPEED: Final = "AATPS (tokens per target call)"
_STRENGTH: Final = {
    "anlppt_u": "ANLPPT-U (nats per token)",
    "anlppt": "ANLPPT, exact tail (nats per token)",
}


def require() -> None:
    """Raise MissingDependency, before the hours of a run, if plots could not be made after it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise MissingDependency("plots need matplotlib: pip install 'filigrane[plots]'") from error


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write tradeoff and draft-length, each as .png and .svg; returns the files."""
    require()
    files = []
    for name, figure in (("tradeoff", _tradeoff(rows)), ("draft-length", _by_draft_length(rows))):
        for form in ("png", "svg"):
            file = folder / f"{name}.{form}"
            # Without a date an unchanged summary gives an unchanged file.
            metadata = {"Date": None} if form == "svg" else {}
            figure.savefig(file, format=form, dpi=150, metadata=metadata)
            files.append(file)
    return files


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _styles(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Colour, marker and line of each method; those without drafts, the references, are grey."""
    names = list(dict.fromkeys(row["method"] for row in rows))
    drafted = [name for name in names if any(row["draft_length"] for row in _of(rows, name))]
    styles: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in drafted:
            number = drafted.index(name)
            styles[name] = {
                "color": _COLOURS[number % len(_COLOURS)],
                "marker": _MARKERS[number % len(_MARKERS)],
                "linestyle": "-" if number < len(_COLOURS) else "--",
            }
        else:
            number = len(styles) - sum(other in drafted for other in styles)
            styles[name] = {
                "color": _GREYS[number % len(_GREYS)],
                "marker": "*",
                "linestyle": _DOTS[number % len(_DOTS)],
            }
    return styles


def _error(entries: Sequence[dict[str, float | None]]) -> list[list[float]] | None:
    """Lengths of the interval bars below and above; none if an interval is missing."""
    below, above = [], []
    for entry in entries:
        value, low, high = entry["value"], entry["low"], entry["high"]
        if value is None or low is None or high is None:
            return None
        below.append(max(0.0, value - low))
        above.append(max(0.0, high - value))
    return [below, above]


def _tradeoff(rows: Sequence[Row]) -> "Figure":
    """Strength over speed; the draft lengths of a method are joined, K grows with the markers."""
    figure = _figure(10.0, 5.2)
    styles = _styles(rows)
    lengths = _lengths(rows)
    panels = figure.subplots(1, len(_STRENGTH))
    for axes, (key, label) in zip(panels, _STRENGTH.items(), strict=True):
        for name, style in styles.items():
            points = [row for row in _of(rows, name) if row[key]["value"] is not None]
            across = [point["aatps"]["value"] for point in points]
            up = [point[key]["value"] for point in points]
            axes.errorbar(
                across,
                up,
                xerr=_error([point["aatps"] for point in points]),
                yerr=_error([point[key] for point in points]),
                color=style["color"],
                linestyle=style["linestyle"],
                **_BARS,
            )
            for point, x, y in zip(points, across, up, strict=True):
                known = point["draft_length"] in lengths
                rank = lengths.index(point["draft_length"]) if known else len(lengths)
                size = 4.0 + 5.0 * (rank + 1) / max(1, len(lengths))
                axes.plot(x, y, color=style["color"], marker=style["marker"], markersize=size)
        _frame(axes, _SPEED, label)
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    title = "bars: 95 % intervals, bootstrap over prompts"
    if len(lengths) > 1:
        title = f"markers grow with K = {', '.join(map(str, lengths))}; {title}"
    _legend(figure, styles, title)
    return figure


def _by_draft_length(rows: Sequence[Row]) -> "Figure":
    """Speed and strength over K; methods without drafts are horizontal lines."""
    figure = _figure(12.0, 4.8)
    styles = _styles(rows)
    lengths = _lengths(rows) or [1]
    panels = figure.subplots(1, 1 + len(_STRENGTH))
    # Side by side, so that the bars of methods with the same value can be told apart.
    drafted = [name for name in styles if any(r["draft_length"] for r in _of(rows, name))]
    step = 0.36 / max(1, len(drafted) - 1)
    shift = {name: (number - (len(drafted) - 1) / 2) * step for number, name in enumerate(drafted)}
    for axes, (key, label) in zip(panels, {"aatps": _SPEED, **_STRENGTH}.items(), strict=True):
        for name, style in styles.items():
            points = [row for row in _of(rows, name) if row[key]["value"] is not None]
            if name in shift:
                axes.errorbar(
                    [point["draft_length"] + shift[name] for point in points],
                    [point[key]["value"] for point in points],
                    yerr=_error([point[key] for point in points]),
                    markersize=5.5,
                    **style,
                    **_BARS,
                )
            elif points:
                look = {"color": style["color"], "linestyle": style["linestyle"]}
                found = points[0][key]
                axes.axhline(found["value"], linewidth=1.2, **look)
                if found["low"] is not None and found["high"] is not None:
                    axes.axhspan(found["low"], found["high"], color="#909090", alpha=0.15, lw=0)
        axes.set_xticks(lengths)
        axes.set_xlim(lengths[0] - 0.5, lengths[-1] + 0.5)
        _frame(axes, "draft length K (tokens)", label)
        if key != "aatps":
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    for name in styles:
        if name not in shift:
            styles[name] |= {"marker": ""}
    _legend(figure, styles, "bars and bands: 95 % intervals, bootstrap over prompts")
    return figure


def _lengths(rows: Sequence[Row]) -> list[int]:
    return sorted({row["draft_length"] for row in rows if row["draft_length"]})


def _of(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if row["method"] == name]


def _frame(axes: "Axes", across: str, up: str) -> None:
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.grid(True, linewidth=0.4, color="#d0d0d0")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _legend(figure: "Figure", styles: dict[str, dict[str, Any]], title: str) -> None:
    """One legend below all panels, where no point can be."""
    from matplotlib.lines import Line2D

    figure.legend(
        handles=[Line2D([], [], label=name, **style) for name, style in styles.items()],
        loc="outside lower center",
        ncols=min(6, len(styles)),
        frameon=False,
        fontsize=9,
        title=title,
        title_fontsize=8,
    )
