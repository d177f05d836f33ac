"""The page: its head, its tabs, and how the server is started."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from app import cards
from app.studio import Studio
from app.style import STYLE_SHEET, theme
from app.tabs.generate import GenerateTab
from app.tabs.score import ScoreTab
from app.tabs.train import TrainTab
from app.visitor import new_key

_MAX_UPLOAD = "64mb"
_HOUR_S = 3600
# Handlers only wait for the device, which has a queue of its own.
_MAX_THREADS = 80


def build_page(studio: Studio) -> gr.Blocks:
    """Lay out the page.

    Args:
        studio: the running app.

    Returns:
        The page, not yet served.
    """
    facts = studio.facts
    with gr.Blocks(
        title="dreamrie", analytics_enabled=False, delete_cache=(_HOUR_S, 24 * _HOUR_S)
    ) as page:
        # The secret outlives a restart of the server, or every browser would lose its trainings.
        secret = studio.storage.browser_secret()
        key = gr.BrowserState(None, storage_key="dreamrie", secret=secret)
        # Not inside its tab: what a tab holds is not there before the tab is opened, and this is read at the start.
        kept = gr.BrowserState(
            {"photos": "", "training": ""}, storage_key="dreamrie-train", secret=secret
        )
        note = (
            "toy model that comes with dreamrie: 64 x 64 emoji" if facts.embedded else "base model"
        )
        gr.HTML(
            f'<div class="dr-head"><h1>dreamrie</h1><span>{cards.text(studio.base_name)}, {cards.text(note)}, '
            f"on {cards.text(facts.device)}</span></div>"
        )
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Generate", id="generate"):
                generate = GenerateTab(studio, key)
            with gr.Tab("Train", id="train") as train_tab:
                train = TrainTab(studio, key, kept)
            with gr.Tab("Score", id="score") as score_tab:
                score = ScoreTab(studio, key)
        generate.wire()
        train.wire(tabs, generate)
        score.wire(tabs, generate)
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        page.load(lambda known: known or new_key(), key, key, **private).then(
            generate.refreshed, [key, generate.chosen], generate.gallery, **private
        ).then(train.looked, train.photo_inputs, train.photo_output, **private).then(
            train.refreshed, train.state_inputs, train.state_outputs, **private
        )
        train_tab.select(train.refreshed, train.state_inputs, train.state_outputs, **private)
        score_tab.select(score.refreshed, score.state_inputs, score.state_outputs, **private)
    return page.queue(max_size=256, default_concurrency_limit=16, api_open=False)


def launch(
    studio: Studio,
    *,
    port: int,
    host: str = "127.0.0.1",
    share: bool = False,
    auth: Sequence[tuple[str, str]] = (),
    browser: bool = False,
) -> tuple[gr.Blocks, str]:
    """Serve the page, on this computer only unless told otherwise.

    Args:
        studio: the running app.
        port: to listen on.
        host: address to listen on.
        share: also through gradio's relay; needs `auth`.
        auth: names and passwords of those who may come in; without, each browser is a user of its own.
        browser: open the page in a browser.

    Returns:
        The page that is served, and its address.
    """
    page = build_page(studio)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        auth=list(auth) or None,
        inbrowser=browser,
        prevent_thread_lock=True,
        quiet=True,
        theme=theme(),
        css_paths=[STYLE_SHEET],
        footer_links=[],
        max_threads=_MAX_THREADS,
        max_file_size=_MAX_UPLOAD,
        allowed_paths=[],
        enable_monitoring=False,
        strict_cors=True,
        show_error=False,
        run_history=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
    )
    return page, url
