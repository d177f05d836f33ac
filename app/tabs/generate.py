"""The tab Generate: choose concepts, say a prompt, see pictures beside those of the base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from app import cards
from app.jobs import Job
from app.orders import LOOKS, SEEDS, Outcome
from app.storage import Owner
from app.studio import Studio
from app.visitor import owner_of, plainly, told
from eval.report.live import energy_chart

# How many concepts one picture may hold; each has its own sliders.
PLACES = 3
_POLL_S = 0.3
_BASE_LOOK = "base model only"
_SHOW_PICTURES = """
() => { if (innerWidth < 768) document.querySelector('#drawn').scrollIntoView({behavior: 'smooth'}); }
"""


class GenerateTab:
    """Lays the tab out; `wire` says what its parts do.

    Args:
        studio: the running app.
        key: what the browser keeps.
    """

    def __init__(self, studio: Studio, key: gr.BrowserState) -> None:
        self._studio, self._key = studio, key
        self.chosen = gr.State([])
        self.filled = gr.State("")
        self._settings = gr.State([])
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=330):
                self._lay_out_question()
            with gr.Column(scale=6, min_width=330):
                self._lay_out_answer()

    # ------------------------------------------------------------------------------------------------- layout

    def _lay_out_question(self) -> None:
        gr.Markdown("### Concepts")
        self.gallery = gr.HTML(js_on_load=cards.CLICKS, elem_id="concepts")
        self._places = [self._lay_out_place(number) for number in range(PLACES)]
        self.prompt = gr.Textbox(
            label="Prompt",
            placeholder="Choose a concept above, then say where it is",
            # One line, so that Enter draws; a long text wraps, and line breaks are refused anyway.
            lines=1,
            max_lines=4,
            max_length=1000,
            submit_btn=False,
            elem_id="prompt",
        )
        with gr.Row():
            self._draw = gr.Button("Draw", variant="primary", scale=3, elem_id="draw")
            self._cancel = gr.Button("Cancel", scale=1, elem_id="cancel")
        self._look = gr.Radio(list(LOOKS), value=LOOKS[0], label="Show", elem_id="look")
        self._lay_out_details()
        with gr.Accordion("Add an adapter file", open=False):
            self._file = gr.File(
                label="LoRA for this base model, .safetensors",
                file_types=[".safetensors"],
                height=160,
                elem_id="adapter-file",
            )

    def _lay_out_place(self, number: int) -> tuple[gr.Group, gr.Slider, gr.Slider]:
        with gr.Group(visible=False) as group:
            scale = gr.Slider(
                -0.5, 1.5, 1.0, step=0.05, label="Strength", elem_id=f"scale-{number}"
            )
            rank = gr.Slider(1, 8, 8, step=1, label="Rank kept", elem_id=f"rank-{number}")
        return group, scale, rank

    def _lay_out_details(self) -> None:
        facts = self._studio.facts
        sides = [str(side) for side in self._studio.limits.sizes]
        with gr.Accordion("Seed, size, steps", open=False):
            with gr.Row():
                self._seed = gr.Number(
                    0, label="Seed", precision=0, minimum=0, maximum=SEEDS - 1, elem_id="seed"
                )
                self._keep_seed = gr.Checkbox(
                    False, label="Keep this seed", info="else a new one each time", elem_id="keep"
                )
            self._count = gr.Slider(1, 8, 2, step=1, label="How many", elem_id="count")
            with gr.Row():
                self._width = gr.Dropdown(sides, value=str(facts.resolution), label="Width")
                self._height = gr.Dropdown(sides, value=str(facts.resolution), label="Height")
            self._steps = gr.Slider(1, 100, facts.usual_steps, step=1, label="Denoising steps")
            self._guidance = gr.Slider(0, 30, facts.usual_guidance, step=0.5, label="Guidance")
            self._negative = gr.Textbox(label="Negative prompt", max_length=1000)

    def _lay_out_answer(self) -> None:
        self._status = gr.HTML(
            cards.empty("Nothing drawn yet.", "Choose a concept and press Draw."), elem_id="drawn"
        )
        self._pictures = gr.Gallery(
            show_label=False,
            columns=2,
            object_fit="contain",
            height="auto",
            format="png",
            elem_id="pictures",
            buttons=["download", "fullscreen"],
            visible=False,
        )
        with gr.Row():
            self._archive = gr.DownloadButton(
                "Download all, with settings", visible=False, size="sm", elem_id="archive"
            )
        with gr.Accordion("Settings of the picture", open=False, visible=False) as shown:
            self._shown = gr.JSON(show_label=False, elem_id="settings")
        self._shown_box = shown
        with gr.Accordion("What each singular value contributes", visible=False) as box:
            gr.Markdown(
                "The change of a layer is a sum of rank-1 parts, largest first. Move **Rank kept** to leave out the "
                "last ones: the picture is drawn again with the same seed. *at falling rank* above draws all."
            )
            self._energy = gr.HTML(elem_id="energy")
        self._energy_box = box

    # ------------------------------------------------------------------------------------------------- events

    def wire(self) -> None:
        """Connect parts and handlers."""
        scales = [place[1] for place in self._places]
        ranks = [place[2] for place in self._places]
        groups = [place[0] for place in self._places]
        # A set: handlers get a dict by part.
        values = {
            *(self._key, self.chosen, self.prompt, self._negative, self._look, self._seed),
            *(self._keep_seed, self._count, self._width, self._height, self._steps),
            *(self._guidance, *scales, *ranks),
        }
        results = [
            *(self._status, self._pictures, self._archive, self._seed),
            *(self._settings, self._shown_box, self._shown),
        ]
        self.picked = [
            *(self.chosen, self.gallery, self.prompt, self.filled),
            *(*groups, *scales, *ranks, self._energy_box, self._energy),
        ]
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        self.gallery.click(
            self._toggle, [self._key, self.chosen, self.prompt, self.filled], self.picked, **private
        )
        waiting: dict[str, Any] = {"concurrency_limit": None, **private}
        running = [
            event(self._run, values, results, **waiting)
            for event in (self._draw.click, self.prompt.submit)
        ]
        for rank in ranks:
            rank.input(self._energies, {self._key, self.chosen, *ranks}, self._energy, **private)
            running.append(rank.release(self._run_again, values, results, **waiting))
        # On a phone the pictures are far below the button.
        self._draw.click(None, js=_SHOW_PICTURES)
        self._cancel.click(None, cancels=running, queue=False).then(
            self._cancelled, None, self._status, **private
        )
        self._pictures.select(self._show_settings, self._settings, self._shown, **private)
        self._file.upload(
            self._add_file,
            [self._key, self._file, self.chosen],
            [self._file, self.gallery],
            **private,
        )

    def refreshed(self, key: str | None, chosen: list[str], request: gr.Request) -> str:
        """The gallery as it is now."""
        owner = owner_of(self._studio.storage, key, request)
        return cards.adapter_cards(self._studio.gallery.entries(owner), chosen)

    @plainly
    def _toggle(
        self,
        key: str | None,
        chosen: list[str],
        prompt: str,
        filled: str,
        event: gr.EventData,
        request: gr.Request,
    ) -> list[Any]:
        """A click on a concept chooses it, or leaves it out again."""
        wanted = told(event, "id")
        ids = [i for i in chosen if i != wanted] if wanted in chosen else [*chosen, wanted]
        return self.pick(owner_of(self._studio.storage, key, request), ids, prompt, filled)

    def pick(self, owner: Owner, ids: Sequence[str], prompt: str, filled: str) -> list[Any]:
        """What the tab shows when these concepts are chosen.

        Args:
            owner: who looks.
            ids: of concepts; more than fit push out the first.
            prompt: as it stands.
            filled: what was filled in last.

        Returns:
            Values of the parts that `wire` names.
        """
        ids, prompt = list(ids)[-PLACES:], prompt or ""
        gallery = self._studio.gallery
        entries = [gallery.entry(owner, wanted) for wanted in ids]
        if not prompt.strip() or prompt == filled:
            filled = prompt = " and ".join(entry.trigger for entry in entries)
        groups, scales, ranks = [], [], []
        for number in range(PLACES):
            entry = entries[number] if number < len(entries) else None
            groups.append(gr.update(visible=entry is not None))
            title = entry.title if entry else ""
            scales.append(gr.update(value=1.0, label=f"{title}: strength"))
            top = entry.rank if entry else 1
            ranks.append(gr.update(maximum=max(top, 2), value=top, label=f"{title}: rank kept"))
        chart = self._energy_of(owner, ids, [entry.rank for entry in entries])
        shown = cards.adapter_cards(gallery.entries(owner), ids)
        energy = [gr.update(visible=bool(ids)), chart]
        return [ids, shown, prompt, filled, *groups, *scales, *ranks, *energy]

    @plainly
    def _energies(self, values: dict[Any, Any], request: gr.Request) -> str:
        """The charts while a slider moves."""
        ranks = [values[place[2]] for place in self._places]
        return self._energy_of(self._owner(values, request), values[self.chosen], ranks)

    def _energy_of(self, owner: Owner, ids: Sequence[str], ranks: Sequence[float]) -> str:
        charts = []
        for wanted, rank in zip(ids, ranks, strict=False):
            entry = self._studio.gallery.entry(owner, wanted)
            layers = self._studio.gallery.spectrum(owner, wanted)
            charts.append(f"<h4>{cards.text(entry.title)}</h4>{energy_chart(layers, int(rank))}")
        return "".join(charts)

    @plainly
    def _run(self, values: dict[Any, Any], request: gr.Request) -> Iterator[list[Any]]:
        """Draw what the tab says."""
        yield from self._ordered(values, request, keep_seed=bool(values[self._keep_seed]))

    @plainly
    def _run_again(self, values: dict[Any, Any], request: gr.Request) -> Iterator[list[Any]]:
        """Draw with the same seed, because only a slider moved."""
        yield from self._ordered(values, request, keep_seed=True)

    def _owner(self, values: dict[Any, Any], request: gr.Request) -> Owner:
        return owner_of(self._studio.storage, values[self._key], request)

    def _ordered(
        self, values: dict[Any, Any], request: gr.Request, *, keep_seed: bool
    ) -> Iterator[list[Any]]:
        """Put the order in the queue and watch it."""
        owner, chosen = self._owner(values, request), values[self.chosen]
        seed = values[self._seed]
        order = {
            "prompt": values[self.prompt],
            "negative_prompt": values[self._negative] or "",
            "adapters": [
                {"id": wanted, "scale": float(values[scale]), "rank": int(values[rank])}
                for wanted, (_, scale, rank) in zip(chosen, self._places, strict=False)
            ],
            "seed": int(seed) if keep_seed and seed is not None else None,
            "count": values[self._count],
            "width": int(values[self._width]),
            "height": int(values[self._height]),
            "steps": values[self._steps],
            "guidance": float(values[self._guidance]),
        }
        look = values[self._look] if chosen else _BASE_LOOK
        yield from self._watch(owner, self._studio.order(owner, order, look))

    def _watch(self, owner: Owner, job: Job) -> Iterator[list[Any]]:
        """Say how far it is until it has ended; a page that is closed gives up its place."""
        nothing = [gr.skip()] * 6
        try:
            while job.status in {"waiting", "running"}:
                yield [self._progress(job), *nothing]
                job.wait(_POLL_S)
        finally:
            if job.status in {"waiting", "running"}:
                self._studio.device.cancel(owner, job.id)
        if job.status == "done":
            yield self._results(job.result)
        else:
            words = job.error or "Cancelled."
            yield [cards.line(words, "bad" if job.error else ""), *nothing]

    def _progress(self, job: Job) -> str:
        if job.status == "waiting":
            ahead = job.ahead()
            before = f"{ahead} job{'s' * (ahead != 1)} before it" if ahead else "next"
            running = self._studio.device.running()
            now = f"; now on the device: {running.work.name}" if running else ""
            return cards.bar(f"In the queue, {before}{now}", None)
        progress = job.progress
        if progress is None:
            return cards.bar("Getting the model ready ...", None)
        return cards.bar(progress.text, progress.done / max(progress.total, 1))

    @staticmethod
    def _results(outcome: Outcome) -> list[Any]:
        pictures = [(str(drawn.file), drawn.caption) for drawn in outcome.pictures]
        settings = [{"picture": drawn.caption, **drawn.settings} for drawn in outcome.pictures]
        words = f"{len(pictures)} picture{'s' * (len(pictures) != 1)}, first seed {outcome.seed}"
        return [
            cards.line(words, "good"),
            gr.update(value=pictures, columns=outcome.columns, visible=True, selected_index=None),
            gr.update(value=str(outcome.archive), visible=True),
            outcome.seed,
            settings,
            gr.update(visible=True),
            settings[0],
        ]

    @staticmethod
    def _cancelled() -> str:
        return cards.line("Cancelled.")

    @staticmethod
    def _show_settings(settings: list[dict[str, Any]], event: gr.SelectData) -> dict[str, Any]:
        """Settings of the picture that was clicked on."""
        return settings[int(event.index)] if settings else {}

    @plainly
    def _add_file(
        self, key: str | None, file: str | None, chosen: list[str], request: gr.Request
    ) -> list[Any]:
        """Take an adapter file of the user's into their gallery."""
        owner = owner_of(self._studio.storage, key, request)
        if file:
            title = file.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".", 1)[0]
            entry = self._studio.gallery.add_upload(owner, file, title)
            gr.Info(f"{entry.title} was added.")
        return [None, cards.adapter_cards(self._studio.gallery.entries(owner), chosen)]
