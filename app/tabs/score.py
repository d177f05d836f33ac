"""The tab Score: concepts and their checkpoints on the plane of image against text similarity."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app import cards
from app.comparing import Scoring, points, scored_entries, scorings
from app.studio import Studio
from app.tabs.generate import GenerateTab
from app.visitor import owner_of, plainly, told
from eval.report.plane import plane_chart

# How many concepts are shown before anything is chosen.
_FIRST = 3
# A point of the chart is a group named point-N or point-N-dark.
_CLICKS = """
element.addEventListener('click', event => {
  const target = event.target.closest('[id^="point-"]');
  if (target) { trigger('click', {id: target.id.replace('point-', '').replace('-dark', '')}); }
});
"""
_NOTE = (
    "Up: more like the photos of its concept. Right: more like what the prompt says. Bars are 95 % intervals over "
    "prompts. Similarities of different concepts are to different photos: compare steps of one concept, and its "
    "distance to the base model, rather than heights of two concepts. **Click a point** for its pictures."
)


class ScoreTab:
    """Lays the tab out; `wire` says what its parts do.

    Args:
        studio: the running app.
        key: what the browser keeps.
    """

    def __init__(self, studio: Studio, key: gr.BrowserState) -> None:
        self._studio, self._key = studio, key
        self._picked = gr.State("")
        with gr.Row(equal_height=False):
            with gr.Column(scale=6, min_width=330):
                self._concepts = gr.Dropdown(
                    [], multiselect=True, label="Concepts", elem_id="compared", value=[]
                )
                self._plane = gr.HTML(
                    cards.empty("No scores yet.", "Train a concept; it is scored on the way."),
                    js_on_load=_CLICKS,
                    elem_id="plane",
                )
                gr.Markdown(_NOTE)
            with gr.Column(scale=5, min_width=330):
                self._detail = gr.HTML(
                    cards.empty("Nothing chosen.", "Click a point of the plane."), elem_id="scoring"
                )
                self._open = gr.Button("Open in Generate", visible=False, elem_id="open-scored")
        self.state_inputs = [self._key, self._concepts]
        self.state_outputs = [self._concepts, self._plane]

    def wire(self, tabs: gr.Tabs, generate: GenerateTab) -> None:
        """Connect parts and handlers.

        Args:
            tabs: of the page.
            generate: already wired.
        """
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        self._concepts.input(self._drawn, self.state_inputs, self._plane, **private)
        self._plane.click(
            self._pick, self.state_inputs, [self._picked, self._detail, self._open], **private
        )

        @plainly
        def opened(
            key: str | None, picked: str, prompt: str, filled: str, request: gr.Request
        ) -> list[Any]:
            owner = owner_of(self._studio.storage, key, request)
            return [gr.Tabs(selected="generate"), *generate.pick(owner, [picked], prompt, filled)]

        self._open.click(
            opened,
            [self._key, self._picked, generate.prompt, generate.filled],
            [tabs, *generate.picked],
            **private,
        )

    @plainly
    def refreshed(self, key: str | None, chosen: list[str], request: gr.Request) -> list[Any]:
        """Choices and chart as they are now."""
        owner = owner_of(self._studio.storage, key, request)
        entries = scored_entries(self._studio.storage, self._studio.gallery, owner)
        # One's own come first: they are what one wants to see.
        entries.sort(key=lambda entry: entry.kind == "example")
        known = [entry.id for entry in entries]
        chosen = [wanted for wanted in chosen or [] if wanted in known] or known[:_FIRST]
        choices = [(entry.title, entry.id) for entry in entries]
        chart = self._chart(self._scorings(key, chosen, request))
        return [gr.update(choices=choices, value=chosen), chart]

    @plainly
    def _drawn(self, key: str | None, chosen: list[str], request: gr.Request) -> str:
        """The chart of the chosen concepts."""
        return self._chart(self._scorings(key, chosen, request))

    def _chart(self, found: list[Scoring]) -> str:
        if not found:
            return cards.empty("No scores to show.", "Choose concepts above, or train one.")
        return plane_chart(points(found))

    def _scorings(self, key: str | None, chosen: list[str], request: gr.Request) -> list[Scoring]:
        studio = self._studio
        owner = owner_of(studio.storage, key, request)
        known = scored_entries(studio.storage, studio.gallery, owner)
        entries = [entry for wanted in chosen for entry in known if entry.id == wanted]
        return scorings(studio.storage, owner, entries)

    @plainly
    def _pick(
        self, key: str | None, chosen: list[str], event: gr.EventData, request: gr.Request
    ) -> list[Any]:
        """A click on a point shows its pictures and numbers."""
        found = self._scorings(key, chosen, request)
        place = told(event, "id")
        if not (place.isdecimal() and int(place) < len(found)):
            raise gr.Error("That point is not there any more; open the tab again.")
        scoring = found[int(place)]
        label = f"Open {scoring.entry.title}, step {scoring.step}, in Generate"
        button = gr.update(visible=bool(scoring.adapter), value=label)
        return [scoring.adapter, _detail(scoring), button]


def _detail(scoring: Scoring) -> str:
    """Pictures and numbers of one scored step."""

    def interval(value: tuple[float, float, float] | None) -> str:
        return "not scored" if value is None else "{:.3f} [{:.3f}, {:.3f}]".format(*value)

    step = f"step {scoring.step}" if scoring.step else "base model"
    rows: list[tuple[str, object]] = [
        ("image similarity", interval(scoring.image)),
        ("text similarity", interval(scoring.text)),
        ("prompts followed, base = 1", interval(scoring.kept)),
        ("drift of other prompts", "-" if scoring.drift is None else f"{scoring.drift:.3f}"),
        ("copies of a photo", "-" if scoring.copies is None else f"{scoring.copies:.0%}"),
    ]
    mark = " · chosen by its scores" if scoring.is_chosen else ""
    head = f"<h4>{cards.text(scoring.entry.title)}, {step}{mark}</h4>"
    if scoring.sheet is None:
        pictures = cards.line("The pictures of this scoring were not kept.")
    else:
        pictures = f'<div class="dr-sheet">{cards.picture(scoring.sheet, "scored pictures")}</div>'
    return head + cards.facts(rows) + pictures
