"""The tab Train: drop photos, see what the doctor says, train, watch, stop, go on."""

from __future__ import annotations

from typing import Any

import gradio as gr

from app import cards, photos
from app.asked import Train, asked
from app.storage import Owner, StorageError
from app.studio import Studio
from app.tabs.generate import GenerateTab
from app.tabs.watching import charts, row_of, sheets, status_of
from app.training import TrainingState
from app.visitor import owner_of, plainly, told

_REFRESH_S = 2.0
_KINDS = {"an object": False, "a living thing": True}
_LONGEST_NAME = 40


def _known(kept: object) -> dict[str, str]:
    """What a browser keeps is whatever it says: two names count, and only as text."""
    said = kept if isinstance(kept, dict) else {}
    texts = {name: said.get(name) for name in ("photos", "training")}
    return {
        name: text if isinstance(text, str) and len(text) <= _LONGEST_NAME else ""
        for name, text in texts.items()
    }


class TrainTab:
    """Lays the tab out; `wire` says what its parts do.

    Args:
        studio: the running app.
        key: what the browser keeps.
        kept: names of the photos and of the training that were looked at last; the browser keeps them, too.
    """

    def __init__(self, studio: Studio, key: gr.BrowserState, kept: gr.BrowserState) -> None:
        self._studio, self._key, self._kept = studio, key, kept
        self._shown = gr.State("")
        self._timer = gr.Timer(_REFRESH_S, active=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=330):
                self._lay_out_request()
            with gr.Column(scale=6, min_width=330):
                self._lay_out_trainings()
        self.photo_inputs = [self._key, self._kept]
        self.photo_output = self._doctor
        self.state_inputs = [self._key, self._kept, self._shown]
        self.state_outputs = [
            *(self._shown, self._list, self._status, self._charts, self._sheets),
            *(self._stop, self._resume, self._open, self._remove),
        ]

    # ------------------------------------------------------------------------------------------------- layout

    def _lay_out_request(self) -> None:
        gr.Markdown("### Photos")
        self._files = gr.File(
            label="Drop 3 to 20 photos of one thing",
            file_count="multiple",
            file_types=["image"],
            height=160,
            elem_id="photos",
        )
        with gr.Accordion("No photos at hand?", open=False), gr.Row():
            names = [(name.replace("_", " "), name) for name in photos.examples()]
            self._example = gr.Dropdown(names, value=names[0][1], label="Example pictures")
            self._use_example = gr.Button("Use these", elem_id="use-example")
        self._doctor = gr.HTML(cards.photo_cards([]), js_on_load=cards.CLICKS, elem_id="doctor")
        self._subject = gr.Textbox(
            label="What is it?",
            placeholder="dog, teapot, backpack ...",
            info="its class, one or two words",
            max_length=40,
            elem_id="subject",
        )
        self._living = gr.Radio(list(_KINDS), value="an object", label="It is", elem_id="living")
        self._title = gr.Textbox(
            label="Name", placeholder="how you will find it again", max_length=60, elem_id="title"
        )
        self._lay_out_details()
        self._train = gr.Button("Train", variant="primary", elem_id="train-button")

    def _lay_out_details(self) -> None:
        usual = self._studio.trainings.usual()
        with gr.Accordion("Steps, rank, learning rate", open=False):
            self._steps = gr.Slider(
                10, 5000, usual.steps, step=10, label="Steps", elem_id="train-steps"
            )
            self._rank = gr.Slider(1, 64, usual.rank, step=1, label="Rank")
            self._rate = gr.Number(
                usual.learning_rate,
                label="Learning rate",
                info="spectral norm of the change of a layer per step",
            )
            self._seed = gr.Number(0, label="Seed", precision=0)
            self._prior = gr.Checkbox(
                False,
                label="Keep the class as it was",
                info="also trains on pictures that the base model draws of the class; takes longer",
            )

    def _lay_out_trainings(self) -> None:
        gr.Markdown("### Trainings")
        self._list = gr.HTML(
            cards.training_cards([], ""), js_on_load=cards.CLICKS, elem_id="trainings"
        )
        self._status = gr.HTML(elem_id="training")
        with gr.Row():
            self._stop = gr.Button("Stop", visible=False, elem_id="stop")
            self._resume = gr.Button("Resume", visible=False, elem_id="resume")
            self._open = gr.Button(
                "Open in Generate", variant="primary", visible=False, elem_id="open-trained"
            )
            self._remove = gr.Button("Remove", visible=False, elem_id="remove-training")
        self._sheets = gr.HTML(elem_id="sheets")
        self._charts = gr.HTML(elem_id="charts")

    # ------------------------------------------------------------------------------------------------- events

    def wire(self, tabs: gr.Tabs, generate: GenerateTab) -> None:
        """Connect parts and handlers.

        Args:
            tabs: of the page.
            generate: already wired.
        """
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        looked = [self._kept, self._doctor, self._files, self._subject, self._title]
        self._files.upload(
            self._dropped,
            [self._key, self._kept, self._files, self._subject, self._title],
            looked,
            **private,
        )
        self._use_example.click(
            self._took_example, [self._key, self._kept, self._example], looked, **private
        )
        self._doctor.click(self._removed_photo, [self._key, self._kept], self._doctor, **private)
        wanted = {
            *(self._key, self._kept, self._title, self._subject, self._living, self._steps),
            *(self._rank, self._rate, self._seed, self._prior),
        }
        refresh = (self.refreshed, self.state_inputs, self.state_outputs)
        started = [self._kept, self._doctor]
        self._train.click(self._start, wanted, started, **private).then(*refresh, **private)
        self._list.click(self._picked, [self._key, self._kept], self._kept, **private).then(
            *refresh, **private
        )
        for button, action in (
            (self._stop, self._stopped),
            (self._resume, self._resumed),
            (self._remove, self._removed),
        ):
            button.click(action, [self._key, self._kept], self._kept, **private).then(
                *refresh, **private
            )
        self._timer.tick(*refresh, **private)
        tabs.select(self._switched, None, self._timer, **private)
        self._wire_opening(tabs, generate, private)

    def _wire_opening(self, tabs: gr.Tabs, generate: GenerateTab, private: dict[str, Any]) -> None:
        @plainly
        def opened(
            key: str | None, kept: dict[str, str], prompt: str, filled: str, request: gr.Request
        ) -> list[Any]:
            owner = owner_of(self._studio.storage, key, request)
            _, name = self._named(key, kept, request)
            ids = [f"run:{name}"]
            return [gr.Tabs(selected="generate"), *generate.pick(owner, ids, prompt, filled)]

        self._open.click(
            opened,
            [self._key, self._kept, generate.prompt, generate.filled],
            [tabs, *generate.picked],
            **private,
        )

    @staticmethod
    def _switched(event: gr.SelectData) -> gr.Timer:
        """Look at trainings only while their tab is open."""
        return gr.Timer(active=event.value == "Train")

    @plainly
    def refreshed(
        self, key: str | None, kept: dict[str, str], shown: str, request: gr.Request
    ) -> list[Any]:
        """List and details as they are now; nothing at all if nothing has changed."""
        owner = owner_of(self._studio.storage, key, request)
        states = self._studio.trainings.states(owner)
        chosen = _known(kept)["training"]
        if chosen not in {state.name for state in states}:
            chosen = states[0].name if states else ""
        now = repr((chosen, [row_of(state) for state in states]))
        if now == shown:
            return [gr.skip()] * len(self.state_outputs)
        rows = cards.training_cards([row_of(state) for state in states], chosen)
        state = next((state for state in states if state.name == chosen), None)
        return [now, rows, *self._details(state)]

    @staticmethod
    def _details(state: TrainingState | None) -> list[Any]:
        if state is None:
            return ["", "", "", *[gr.update(visible=False)] * 4]
        running = state.status in {"waiting", "running"}
        ended = state.status in {"stopped", "failed"}
        return [
            status_of(state),
            charts(state),
            sheets(state),
            gr.update(visible=running),
            gr.update(visible=ended, value="Resume" if state.can_resume else "Start again"),
            gr.update(visible=state.status == "finished" or state.best_step is not None),
            gr.update(visible=not running and state.status != "stopping"),
        ]

    # ------------------------------------------------------------------------------------------------- photos

    def _looked(self, owner: Owner, kept: dict[str, str]) -> str:
        """What the doctor says of the photos of this page."""
        try:
            found = photos.look(
                self._studio.storage, owner, _known(kept)["photos"], self._studio.facts.resolution
            )
        except StorageError:  # the set was removed meanwhile
            return cards.photo_cards([])
        listed = "".join(f"<li>{cards.text(sentence)}</li>" for sentence in found.advice)
        words = f"{found.usable} of {len(found.photos)} photos can be used."
        head = cards.line(words, "good" if found.usable else "bad") if found.photos else ""
        return f'{head}<ul class="dr-advice">{listed}</ul>{cards.photo_cards(found.photos)}'

    @plainly
    def looked(self, key: str | None, kept: dict[str, str], request: gr.Request) -> str:
        """The photos after the page was loaded again."""
        return self._looked(owner_of(self._studio.storage, key, request), kept)

    @plainly
    def _dropped(
        self,
        key: str | None,
        kept: dict[str, str],
        files: list[str] | None,
        subject: str,
        title: str,
        request: gr.Request,
    ) -> list[Any]:
        """Take photos in and look through them."""
        owner = owner_of(self._studio.storage, key, request)
        kept = _known(kept)
        name = photos.add(self._studio.storage, owner, kept["photos"], files or [])
        kept = {**kept, "photos": name}
        return [kept, self._looked(owner, kept), None, subject, title]

    @plainly
    def _took_example(
        self, key: str | None, kept: dict[str, str], concept: str, request: gr.Request
    ) -> list[Any]:
        """Try with pictures that come along."""
        owner = owner_of(self._studio.storage, key, request)
        name = photos.add_example(self._studio.storage, owner, concept)
        kept, words = {**_known(kept), "photos": name}, concept.replace("_", " ")
        return [kept, self._looked(owner, kept), None, words, f"my {words}"]

    @plainly
    def _removed_photo(
        self, key: str | None, kept: dict[str, str], event: gr.EventData, request: gr.Request
    ) -> str:
        """Take one photo out."""
        owner = owner_of(self._studio.storage, key, request)
        name, photo = _known(kept)["photos"], told(event, "id")
        if told(event, "action") == "remove" and name and photo:
            photos.remove(self._studio.storage, owner, name, photo)
        return self._looked(owner, kept)

    # ---------------------------------------------------------------------------------------------- trainings

    @plainly
    def _start(self, values: dict[Any, Any], request: gr.Request) -> list[Any]:
        """Start a training with the photos of this page."""
        owner = owner_of(self._studio.storage, values[self._key], request)
        kept = _known(values[self._kept])
        store, side = self._studio.storage, self._studio.facts.resolution
        if kept["photos"] and not photos.look(store, owner, kept["photos"], side).usable:
            raise StorageError(
                "None of the photos can be used; drop 3 to 20 pictures of one thing."
            )
        wanted = asked(
            Train,
            {
                "title": values[self._title] or values[self._subject],
                "subject": values[self._subject],
                "living": _KINDS.get(values[self._living]),
                "photos": kept["photos"],
                "steps": values[self._steps],
                "rank": values[self._rank],
                "learning_rate": float(values[self._rate] or 0),
                "seed": values[self._seed],
                "prior": values[self._prior],
            },
            self._studio.limits,
        )
        name = self._studio.trainings.start(owner, wanted)
        kept = {"photos": "", "training": name}
        return [kept, cards.photo_cards([])]

    @plainly
    def _picked(self, key: str | None, kept: dict[str, str], event: gr.EventData) -> dict[str, str]:
        """Look at another training."""
        return {**_known(kept), "training": told(event, "id")}

    @plainly
    def _stopped(
        self, key: str | None, kept: dict[str, str], request: gr.Request
    ) -> dict[str, str]:
        """Stop; what was learned is kept."""
        self._studio.trainings.stop(*self._named(key, kept, request))
        return _known(kept)

    @plainly
    def _resumed(
        self, key: str | None, kept: dict[str, str], request: gr.Request
    ) -> dict[str, str]:
        """Go on from the last checkpoint."""
        self._studio.trainings.resume(*self._named(key, kept, request))
        return _known(kept)

    @plainly
    def _removed(
        self, key: str | None, kept: dict[str, str], request: gr.Request
    ) -> dict[str, str]:
        """Remove a training and all it has learned."""
        self._studio.trainings.remove(*self._named(key, kept, request))
        return {**_known(kept), "training": ""}

    def _named(
        self, key: str | None, kept: dict[str, str], request: gr.Request
    ) -> tuple[Owner, str]:
        """Owner and name of the training that is looked at."""
        owner = owner_of(self._studio.storage, key, request)
        states = self._studio.trainings.states(owner)
        chosen = _known(kept)["training"]
        return owner, chosen or (states[0].name if states else "")
