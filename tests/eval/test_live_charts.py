"""Charts for a page: positions and shares against the data, ids, both themes, hostile labels."""

from __future__ import annotations

import re
import time
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest

from dreamrie.errors import ConfigError
from eval.report import inline, live, plane
from eval.report.figures import DARK, LIGHT, Theme, make_figure
from eval.report.live import PlanePoint
from tests.mutants.summary import FIGURE

EVIL = '<script>alert("1")</script> & $x^2$ -- \x00\ud800\n]]> \U0001f600'
SVG = "{http://www.w3.org/2000/svg}"
LOSSES = [(step, 0.1 + (step * 37 % 11) / 50) for step in range(1, 41)]
SCORINGS = [
    {
        "step": step,
        "image": [0.3 + step / 1000, 0.28 + step / 1000, 0.33 + step / 1000],
        "text": (0.4, 0.38, 0.42),
        "prompts_kept": (1.0, 0.9, 1.1) if step else None,
        "drift": None,
    }
    for step in (0, 50, 100)
]
POINTS = [
    PlanePoint("b", "base model", "base", (0.30, 0.28, 0.31), (0.47, 0.45, 0.50), is_base=True),
    PlanePoint("d1", "dog 1", "dog", (0.42, 0.40, 0.44), (0.50, 0.47, 0.53)),
    PlanePoint("d2", EVIL, "dog", (0.55, 0.50, 0.58), (0.46, 0.44, 0.49), is_chosen=True),
    PlanePoint("u", "upload", "upload", (0.50, 0.46, 0.52), None),
]
CHARTS = {
    "losses": lambda: live.loss_chart(LOSSES, 100),
    "scores": lambda: live.scores_chart(SCORINGS, 50, 0.8),
    "spectrum": lambda: live.spectrum_chart([0, 10, 20], [[0.1, 0.0], [0.4, 0.2], [0.8, 0.3]]),
    "energy": lambda: live.energy_chart([[3.0, 1.0], [2.0]], 1),
    "plane": lambda: live.plane_chart(POINTS, "d1"),
    "no losses": lambda: live.loss_chart([], 10),
    "no finite losses": lambda: live.loss_chart([(1, float("nan"))], 10),
    "no scores": lambda: live.scores_chart([], None),
    "no spectrum": lambda: live.spectrum_chart([], []),
    "no energy": lambda: live.energy_chart([], 4),
    "no change": lambda: live.energy_chart([[0.0, 0.0]], 4),
    "no points": lambda: live.plane_chart([]),
}


def svgs(html: str) -> tuple[ET.Element, ET.Element]:
    """The light and the dark drawing of a chart."""
    root = ET.fromstring(html)
    assert (root.tag, root.attrib) == ("div", {"class": "chart"})
    assert [part.attrib for part in root] == [{"class": "only-light"}, {"class": "only-dark"}]
    light, dark = (next(iter(part)) for part in root)
    return light, dark


def ids(html: str) -> list[str]:
    return re.findall(r'\sid="([^"]*)"', html)


def centers(svg: ET.Element, suffix: str = "") -> list[tuple[float, float]]:
    """Middles of the clickable circles, in the order of the points."""
    found = []
    while (group := svg.find(f".//*[@id='point-{len(found)}{suffix}']")) is not None:
        (circle,) = group.findall(f"{SVG}circle")
        assert float(circle.attrib["r"]) * 360 / 331.2 >= 12
        assert group.attrib["class"] == "point"
        found.append((float(circle.attrib["cx"]), float(circle.attrib["cy"])))
    return found


# ------------------------------------------------------------------------------------------- laws


def law_energies_are_sums_of_squares(impl: Any) -> None:
    """The k-th share is sum over layers of s_k^2 over the sum of all squares: (9 + 4, 1) / 14, not 5 / 6."""
    assert impl.energy_shares([[3.0, 1.0], [2.0]]) == pytest.approx([13 / 14, 1 / 14])
    assert impl.energy_shares([[1.0], [], [0.0, 7.0, 1.0]]) == pytest.approx(
        [1 / 51, 49 / 51, 1 / 51]
    )


def law_the_median_is_centered(impl: Any) -> None:
    """A step in the data stays where it is, a single outlier is not seen, and the ends use what there is."""
    values = np.array([0.0] * 30 + [1.0] * 30)
    values[10] = 50.0
    expected = np.array([0.0] * 30 + [1.0] * 30)
    assert impl.running_median(values).tolist() == expected.tolist()
    assert impl.running_median(np.array([1.0, 3.0])).tolist() == [2.0, 2.0]


def law_points_stand_where_their_scores_are(impl: Any) -> None:
    """Text similarity to the right, image similarity upwards, both affine; where matplotlib put the marker."""
    impl._plane_chart.cache_clear()
    for svg, suffix in zip(svgs(impl.plane_chart(POINTS)), ("", "-dark"), strict=True):
        found = centers(svg, suffix)
        assert len(found) == len(POINTS)
        (x0, y0), (x1, y1), (x2, y2), (x3, y3) = found
        assert (x2 - x0) / (x1 - x0) == pytest.approx((0.46 - 0.47) / (0.50 - 0.47), abs=1e-3)
        assert (y2 - y0) / (y1 - y0) == pytest.approx((0.55 - 0.30) / (0.42 - 0.30), abs=1e-3)
        assert (y3 - y0) / (y1 - y0) == pytest.approx((0.50 - 0.30) / (0.42 - 0.30), abs=1e-3)
        assert x1 > x0 > x2 > x3 > 0
        assert y1 < y0
        for place, (x, y) in enumerate(found):
            (marker,) = svg.findall(f".//*[@id='point-{place}{suffix}']//{SVG}use")
            drawn = float(marker.attrib["x"]), float(marker.attrib["y"])
            assert drawn == pytest.approx((x, y), abs=2e-3)
    impl._plane_chart.cache_clear()


def law_ids_are_unique_and_found(impl: Any) -> None:
    """Charts of one page, each in two themes: no id occurs twice, and every reference leads to one of its own SVG."""

    def draw(theme: Theme) -> Any:
        figure, (axes,) = make_figure(3, 2, theme)
        axes.plot([1, 2], [1, 2], marker="o", color=theme.main)
        return figure

    html = impl.themed(draw, "a") + impl.themed(draw, "b")
    names = ids(html)
    assert len(names) > 8
    assert len(names) == len(set(names))
    for part in re.findall("<svg.*?</svg>", html, re.DOTALL):
        refers = set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', part))
        assert {one or other for one, other in refers} == set(ids(part))


def law_labels_stay_text(impl: Any) -> None:
    """What a user wrote is one text, whatever it holds, and makes no element."""

    class Page(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.tags: list[str] = []

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            self.tags.append(tag)

    def draw(theme: Theme) -> Any:
        figure, (axes,) = make_figure(3, 2, theme)
        axes.plot(1, 1, marker="o", gid="point-0")
        return figure

    html = impl.themed(draw, EVIL, lambda figure: [impl.Spot("point-0", EVIL, 0.5, 0.5)])
    page = Page()
    page.feed(html)
    assert not {"script", "metadata", "style"} & set(page.tags)
    shown = '<script>alert("1")</script> & $x^2$ --    ]]> \U0001f600'
    for svg in svgs(html):
        assert svg.attrib["aria-label"] == shown
        assert [title.text for title in svg.iter(f"{SVG}title")] == [shown]


def test_energies() -> None:
    law_energies_are_sums_of_squares(live)
    assert live.energy_shares([]) == live.energy_shares([[0.0]]) == []


def test_median() -> None:
    law_the_median_is_centered(live)


def test_positions() -> None:
    law_points_stand_where_their_scores_are(plane)


def test_ids() -> None:
    law_ids_are_unique_and_found(inline)


def test_labels() -> None:
    law_labels_stay_text(inline)


# -------------------------------------------------------------------------------------- the charts


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_stands_in_a_page(name: str) -> None:
    """Two SVGs as wide as their place, named for those who do not see them, without date, maker or background."""
    html = CHARTS[name]()
    for svg in svgs(html):
        assert {"viewBox", "width", "role", "aria-label"} <= svg.attrib.keys()
        assert "height" not in svg.attrib
        assert (svg.attrib["width"], svg.attrib["role"]) == ("100%", "img")
        assert svg.attrib["aria-label"]
        assert float(svg.attrib["viewBox"].split()[2]) == pytest.approx(331.2)
    assert len(ids(html)) == len(set(ids(html)))
    for word in ("<?xml", "<!DOCTYPE", "matplotlib", "Date", "<!--", LIGHT.paper, DARK.paper):
        assert word not in html
    colors = [set(re.findall("#[0-9a-f]{6}", part)) for part in html.split("only-dark")]
    assert colors[0]
    assert not colors[0] & colors[1]


@pytest.mark.parametrize("name", ["losses", "scores", "plane"])
def test_equal_input_gives_equal_bytes(name: str) -> None:
    """Drawn anew, not remembered; and the dark drawing has the geometry of the light one."""
    first = CHARTS[name]()
    for remembered in (live._loss_chart, live._scores_chart, plane._plane_chart):
        remembered.cache_clear()
    assert CHARTS[name]() == first
    light, dark = svgs(first)
    paths = [[path.get("d") for path in svg.iter(f"{SVG}path")] for svg in (light, dark)]
    assert paths[0] == paths[1]


def test_panels_of_scores_stand_below_each_other() -> None:
    light, _ = svgs(live.scores_chart(SCORINGS, None))
    assert light.attrib["viewBox"] == f"0 0 331.2 {3 * 2.6 * 72:g}"
    light, _ = svgs(live.scores_chart([{"step": 0, "image": None}], None))
    assert light.attrib["viewBox"] == f"0 0 331.2 {2.6 * 72:g}"


def test_what_the_charts_say() -> None:
    """Names for those who hear them hold the numbers that the picture shows."""
    found = {name: svgs(draw())[0].attrib["aria-label"] for name, draw in CHARTS.items()}
    assert found["losses"] == "Training loss of 40 steps, the last of them 40"
    assert found["energy"].startswith("rank 1 keeps 92.9 % of the energy")
    assert found["scores"] == "Scores of 3 steps, the best of them 50"
    assert found["plane"] == "Image similarity against text similarity of 4 points"
    lost = svgs(live.loss_chart([(1, 0.5), (2, float("inf")), (3, 0.4)], 5))[0]
    assert lost.attrib["aria-label"] == "Training loss of 2 steps, the last of them 3, 1 not finite"
    assert [live.percent(0.9996, False), live.percent(1.0, True)] == ["over 99.9 %", "100 %"]
    places = [live.ordinal(number) for number in (1, 2, 3, 4, 11, 12, 13, 21, 112)]
    assert places == ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "112th"]


def test_wrong_arguments_are_refused() -> None:
    for call, words in (
        (lambda: live.scores_chart(SCORINGS, 30), r"chosen step 30 .* scored are \[0, 50, 100\]"),
        (lambda: live.plane_chart(POINTS, "cat"), "none of the 4 points .* 'cat'"),
        (lambda: live.energy_chart([[1.0]], 0), "at least 1; got 0"),
        (lambda: live.energy_chart([[1.0, float("nan")]], 1), "not negative; got nan"),
        (lambda: live.spectrum_chart([0, 1], [[1.0], [1.0, 2.0]]), r"lengths \[1, 2\]"),
        (lambda: live.spectrum_chart([0, 1], [[1.0]]), "each of its 2 steps"),
    ):
        with pytest.raises(ConfigError, match=words):
            call()


def test_a_chart_of_400_losses_is_drawn_fast(record_property: Any) -> None:
    """Less than 0.4 s of the processor in both themes, the best of three."""
    spent = []
    for shift in range(3):
        losses = [(step, 0.1 + (step * 37 + shift) % 101 / 500) for step in range(1, 401)]
        start = time.process_time()
        live.loss_chart(losses, 400)
        spent.append(time.process_time() - start)
    record_property(FIGURE, f"a chart of 400 losses in two themes: {1e3 * min(spent):.0f} ms")
    assert min(spent) < 0.4
