"""Figures as SVGs that stand within the HTML of a page, once in the colors of each theme."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

from eval.report.figures import DARK, LIGHT, Theme, make_figure, render

# Inches. A page for phones shows this width on about 360 px: a point is then 1.09 px.
PANEL_IN = (4.6, 2.6)
# Points: a finger needs a target of at least 12 px around the place.
TOUCH = 12.0
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_REFERENCE = re.compile(r"url\(#([^)]+)\)")

# matplotlib's settings belong to the process: two threads of a server must not change them at the same time.
_ONE_AT_A_TIME = threading.Lock()


@dataclass(frozen=True)
class Spot:
    """A part of a figure that can be pointed at.

    Attributes:
        name: its gid in the figure; the id of its group in the light SVG, with "-dark" behind it in the dark one.
        title: what a browser says about it.
        x, y: its middle as shares of the figure, from the left and from below.
    """

    name: str
    title: str
    x: float
    y: float


def themed(
    draw: Callable[[Theme], Figure],
    label: str,
    spots: Callable[[Figure], Sequence[Spot]] | None = None,
) -> str:
    """HTML of a chart in both themes; the page shows one of them.

    The background is transparent, the width that of the place where it stands, and no id occurs twice. Boxes behind
    words have the color that the page gives to `--chart-paper`, if it does. Drawings of several threads wait for
    each other.

    Args:
        draw: makes the figure in given colors, the same but for these.
        label: what is to be seen, for those who do not see it; any text.
        spots: finds what can be pointed at in a figure that was rendered.

    Returns:
        One `<div class="chart">` with two children, "only-light" and "only-dark". Equal figures give equal text.
    """
    parts = []
    places: list[Bbox] = []
    with _ONE_AT_A_TIME:
        for theme, kind, suffix in ((LIGHT, "only-light", ""), (DARK, "only-dark", "-dark")):
            figure = draw(theme)
            figure.set_facecolor("none")
            for axes in figure.axes:
                axes.set_facecolor("none")
            if places:
                # Colors do not move anything, and laying out is half of the time.
                figure.set_layout_engine("none")
                for axes, place in zip(figure.axes, places, strict=True):
                    axes.set_position(place)
            content = render(figure)
            places = [axes.get_position() for axes in figure.axes]
            found = () if spots is None else spots(figure)
            parts.append(
                f'<div class="{kind}">{_inline(content, label, found, suffix, theme.paper)}</div>'
            )
    return f'<div class="chart">{"".join(parts)}</div>'


def _inline(content: bytes, label: str, spots: Sequence[Spot], suffix: str, paper: str) -> str:
    """The SVG element of a file of matplotlib, fit to stand in a page beside others."""
    digest = hashlib.sha256(content + plain(label).encode()).hexdigest()
    root = ET.fromstring(content)  # noqa: S314  written by matplotlib a moment ago
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        if _HREF in element.attrib:
            element.set("href", element.attrib.pop(_HREF))
        element.text = element.tail = None
        if paper in (style := element.get("style", "")):
            element.set("style", style.replace(paper, "var(--chart-paper, transparent)"))
    # Who made it, and a rule for all elements of the page, which the root passes on to its own instead.
    for child in list(root):
        if child.tag == "metadata" or child.find("style") is not None:
            root.remove(child)
    _rename(root, f"c{digest[:10]}{suffix}", {spot.name for spot in spots})
    width, height = (float(side) for side in root.attrib["viewBox"].split()[2:])
    root.attrib = {
        "xmlns": _SVG[1:-1],
        "viewBox": root.attrib["viewBox"],
        "width": "100%",
        "role": "img",
        "aria-label": plain(label),
        "style": "stroke-linejoin:round;stroke-linecap:butt",
    }
    if spots:
        # Words and rings that lie above a spot must not take its clicks.
        root.set("pointer-events", "none")
    groups = {element.attrib["id"]: element for element in root.iter("g") if "id" in element.attrib}
    for spot in spots:
        _make_clickable(groups[spot.name], spot, suffix, (width, height))
    return ET.tostring(root, encoding="unicode")


def _rename(root: ET.Element, prefix: str, kept: set[str]) -> None:
    """Ids that nothing refers to are dropped, the others are numbered behind a prefix of their own."""
    used = {element.attrib["href"][1:] for element in root.iter() if "href" in element.attrib}
    for element in root.iter():
        for value in element.attrib.values():
            used.update(_REFERENCE.findall(value))
    new = {old: f"{prefix}-{place}" for place, old in enumerate(sorted(used))}
    for element in root.iter():
        name = element.attrib.get("id")
        if name in new:
            element.set("id", new[name])
        elif name is not None and name not in kept:
            del element.attrib["id"]
        for key, value in element.attrib.items():
            if key == "href":
                element.set(key, f"#{new[value[1:]]}")
            elif "url(#" in value:
                element.set(key, _REFERENCE.sub(lambda found: f"url(#{new[found[1]]})", value))


def _make_clickable(group: ET.Element, spot: Spot, suffix: str, size: tuple[float, float]) -> None:
    """A title, a class, and room for a finger."""
    group.set("id", spot.name + suffix)
    group.set("class", "point")
    title = ET.Element("title")
    title.text = plain(spot.title)
    group.insert(0, title)
    place = {
        "cx": f"{spot.x * size[0]:.3f}",
        # An SVG counts from above.
        "cy": f"{(1.0 - spot.y) * size[1]:.3f}",
        "r": f"{TOUCH:g}",
    }
    ET.SubElement(group, "circle", place | {"fill": "transparent", "pointer-events": "all"})


def plain(text: str) -> str:
    """One line of text that XML can hold.

    Args:
        text: anything.

    Returns:
        The text with a space for each character that cannot be printed.
    """
    return "".join(letter if letter.isprintable() else " " for letter in text)


def words_instead(text: str, label: str) -> str:
    """A box as large as a chart that says why there is none.

    Args:
        text: lines to be seen.
        label: see `themed`.

    Returns:
        HTML, see `themed`.
    """

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = make_figure(*PANEL_IN, theme)
        axes.set_axis_off()
        axes.text(0.5, 0.5, text, color=theme.faint, ha="center", va="center", fontsize=10)
        return figure

    return themed(draw, label)
