"""Plots: what they show, that lines can be told apart, and the same file for the same numbers."""

import math
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from filigrane.errors import MissingDependency, RecordError
from filigrane.study import figures

Row = dict[str, Any]
SETTINGS = (
    ("open, unsupervised", "differential"),
    ("open, unsupervised", "argmax count"),
    ("closed, supervised", "answer count"),
    ("closed, supervised", "answer count, filtered"),
)
NAMES = ("rho", "tokens", "filter", "factors")


def rows() -> list[Row]:
    """A grid over the marked share, with three seeds, and one more for epochs."""
    rng = random.Random(1)
    made = []
    for number, (setting, statistic) in enumerate(SETTINGS):
        for rho in (0.0, 0.01, 0.05, 0.1, 1.0):
            for seed in range(3):
                strength = 40.0 * rho * (4 - number) * rng.uniform(0.7, 1.3)
                for step in (1, 2):
                    made.append(
                        {
                            "setting": setting, "statistic": statistic, "rho": rho, "seed": seed,
                            "n_scored": 5000 * step, "z": strength, "epochs": 1,
                            "log10_pvalue": -0.4 - step * strength**1.5, "model": "tiny",
                        }
                    )  # fmt: skip
    return made + [row | {"epochs": epochs} for row in made[12:18] for epochs in (2, 4)]


@contextmanager
def seen() -> Iterator[list[Any]]:
    """Every pair of axes that is saved meanwhile, once."""
    from matplotlib.figure import Figure

    found: list[Any] = []
    original = Figure.savefig

    def savefig(self: Any, *arguments: Any, **options: Any) -> Any:
        found.extend(each for each in self.axes if each not in found)
        return original(self, *arguments, **options)

    Figure.savefig = savefig
    try:
        yield found
    finally:
        Figure.savefig = original


@pytest.fixture
def axes() -> Iterator[list[Any]]:
    with seen() as found:
        yield found


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[Any]]:
    """The files and the axes of the whole grid."""
    with seen() as found:
        return figures.draw(rows(), tmp_path_factory.mktemp("drawn")), found


def test_a_study_becomes_four_plots_in_two_forms(drawn: tuple[list[Path], list[Any]]) -> None:
    files, _ = drawn
    assert [file.name for file in files] == [f"{n}.{f}" for n in NAMES for f in ("png", "svg")]
    for file in files:
        head = file.read_bytes()[:300]
        assert head.startswith(b"\x89PNG") or b"<svg" in head or b"<?xml" in head


def test_same_rows_same_files(drawn: tuple[list[Path], list[Any]], tmp_path: Path) -> None:
    for one, two in zip(drawn[0], figures.draw(rows(), tmp_path), strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_only_what_the_rows_show_is_drawn(tmp_path: Path) -> None:
    one = [row for row in rows() if row["rho"] == 0.1 and row["n_scored"] == 5000]
    one = [row for row in one if row["epochs"] == 1 and "filtered" not in row["statistic"]]
    assert figures.draw(one, tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_rho_has_one_line_per_setting_and_statistic(drawn: tuple[list[Path], list[Any]]) -> None:
    _, axes = drawn
    lines = [line for line in axes[0].lines if len(line.get_xdata()) == 5]
    assert len(lines) == len(SETTINGS)
    # Told apart without any colour.
    looks = {(line.get_marker(), line.get_linestyle()) for line in lines}
    assert len(looks) == len({marker for marker, _ in looks}) == len(SETTINGS)
    assert [tick.get_text() for tick in axes[0].get_xticklabels()] == [
        "0 %", "1 %", "5 %", "10 %", "100 %",
    ]  # fmt: skip


def test_medians_are_medians(axes: list[Any], tmp_path: Path) -> None:
    values = [-1.0, -2.0, -30.0]
    made = [
        {"setting": "s", "statistic": "t", "rho": rho, "n_scored": 10, "z": 1.0, "seed": seed,
         "log10_pvalue": value * (1.0 + rho)}
        for rho in (0.0, 1.0)
        for seed, value in enumerate(values)
    ]  # fmt: skip
    figures.draw(made, tmp_path)
    assert list(axes[0].lines[0].get_ydata()) == [-2.0, -4.0]
    assert sorted(axes[0].lines[1].get_ydata()) == [-60.0, -30.0, -4.0, -2.0, -2.0, -1.0]


def test_more_tokens_are_shown_in_their_own_plot(
    drawn: tuple[list[Path], list[Any]], tmp_path: Path
) -> None:
    """Elsewhere only the row in which the most was scored counts; the smaller ones are no seeds."""
    panels = [each for each in drawn[1] if each.get_xlabel() == "scored positions"]
    assert [each.get_title() for each in panels if each.get_visible()] == [
        f"{setting}: {statistic}" for setting, statistic in SETTINGS
    ]
    runs = [line for line in panels[0].lines if list(line.get_xdata()) == [5000, 10_000]]
    assert len(runs) == 5 * 3
    rho = drawn[1][0]
    ends = [y for line in rho.lines for x, y in zip(*line.get_data(), strict=True) if x == 4]
    assert set(ends) == {
        row["log10_pvalue"]
        for row in rows()
        if row["rho"] == 1.0 and row["n_scored"] == 10_000 and row["epochs"] == 1
    }


def test_what_a_plot_does_not_show_does_not_vary_in_it(axes: list[Any], tmp_path: Path) -> None:
    """Rows of four epochs are far stronger; the plot over rho is of the usual one epoch only."""
    strange = [row | {"epochs": 4, "log10_pvalue": -5000.0} for row in rows()[:2]]
    figures.draw(rows()[:30] + strange, tmp_path)
    points = [point for line in axes[0].lines for point in zip(*line.get_data(), strict=True)]
    assert {y for x, y in points if x == 0} == {-0.4, -5.0}, "-5 is the line of alpha"


def test_more_evidence_is_up_and_the_axis_reaches_far(axes: list[Any], tmp_path: Path) -> None:
    made = [
        {"setting": "s", "statistic": "t", "rho": rho, "n_scored": 10, "z": 1.0, "log10_pvalue": p}
        for rho, p in ((0.0, 0.0), (0.1, -3.0), (1.0, -10_000.0))
    ]
    figures.draw(made, tmp_path)
    bottom, top = axes[0].get_ylim()
    assert bottom > 0.0 and top < -10_000.0
    ticks = list(axes[0].get_yticks())
    assert ticks == [0, -2, -5, -10, -30, -100, -300, -1000, -3000, -10_000]
    assert axes[0].get_yticklabels()[-1].get_text() == "−10,000"
    # Between alpha and 0 there is room to see, although the axis reaches ten thousand.
    height = axes[0].transData.transform([(0, 0), (0, -5), (0, -10_000)])[:, 1]
    assert (height[1] - height[0]) / (height[2] - height[0]) > 0.1


def test_the_filter_plot_pairs_what_belongs_together(drawn: tuple[list[Path], list[Any]]) -> None:
    _, axes = drawn
    plot = next(each for each in axes if each.get_xlabel().startswith("log10 p"))
    labels = [tick.get_text() for tick in plot.get_yticklabels()]
    assert labels == [f"closed, supervised, ρ {share} %" for share in (0, 1, 5, 10, 100)]


@pytest.mark.parametrize("name", ["a $x^{$ b", "中文", "<b>&amp;</b>", "\u202eא", "é"])
def test_names_are_no_formulas_and_need_no_font(tmp_path: Path, name: str) -> None:
    made = [row | {"setting": name, "model": name + row["model"][:1]} for row in rows()[:30]]
    made += [row | {"model": "other"} for row in made[:5]]
    for file in figures.draw(made, tmp_path):
        assert file.stat().st_size > 1000


def test_windows_are_a_factor_although_they_are_part_of_a_scheme(
    axes: list[Any], tmp_path: Path
) -> None:
    made = [
        {"setting": "s", "statistic": "t", "rho": 1.0, "n_scored": 9, "log10_pvalue": -40.0 / width,
         "window": width, "scheme": f"greenlist:context_width={width},gamma=0.25,delta=3.0"}
        for width in (1, 2, 2, 4)
    ]  # fmt: skip
    assert [file.name for file in figures.draw(made, tmp_path)] == ["factors.png", "factors.svg"]
    assert [each.get_xlabel() for each in axes] == ["window (tokens)"]
    assert list(axes[0].lines[0].get_ydata()) == [-40.0, -20.0, -10.0]


def test_rows_that_lack_something_are_refused(tmp_path: Path) -> None:
    for name, value in (
        ("rho", None),
        ("setting", 5),
        ("log10_pvalue", math.nan),
        ("n_scored", True),
    ):
        with pytest.raises(RecordError, match=f'row 1 of the study has no usable "{name}"'):
            figures.draw([rows()[0], rows()[1] | {name: value}], tmp_path)


def test_settings_of_matplotlib_are_left_alone(tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.draw(rows()[:30], tmp_path)
    figures.decoys([0.1, -0.4, 1.2], 3.0, "x")
    assert dict(matplotlib.rcParams) == before


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependency, match=r"filigrane\[report\]"):
        figures.require()


# Inside a report.

NORMAL = [random.Random(7).gauss(0.0, 1.0) for _ in range(200)]


@pytest.mark.parametrize("z", [-40.0, -2.0, 0.0, 1.5, 9.0, 12.0, 400.0])
def test_the_true_key_is_marked_wherever_it_stands(z: float) -> None:
    svg = figures.decoys(NORMAL, z, "one")
    assert f"true key: z = {z:.1f}<".replace("-", "−") in svg, "as text, in the font of the page"
    beyond = "border" in svg
    assert beyond == (abs(z) > 12.0)
    assert f"z = {z:.1f}{',' if beyond else '.'}" in svg and "200 decoy keys" in svg


def test_names_in_a_figure_are_its_own() -> None:
    one, two = (figures.decoys(NORMAL, 2.0, name) for name in ("one", "two"))
    names = [set(re.findall(r'\sid="([^"]*)"', svg)) for svg in (one, two)]
    assert names[0] and not names[0] & names[1]
    for svg, mine in zip((one, two), names, strict=True):
        used = re.findall(r'(?:href="#|url\(#)([^")]*)', svg)
        assert used and set(used) <= mine
    assert one.replace("one-", "two-") == two
    assert "<style" not in one and "<metadata" not in one and "<?xml" not in one


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.0, 1.0, 2.5], "not reached."),
        ([0.0, 5.5, 4.0], "first reached after 20."),
        ([-2.0], "not reached."),
    ],
)
def test_an_e_process_says_whether_its_border_was_reached(values: list[float], words: str) -> None:
    at = [10, 20, 30][: len(values)]
    svg = figures.sequential(at, values, 1e-5, "e")
    assert f"the border is 5.0, {words}" in svg
    assert "border 1 / alpha = 100,000" in svg
