"""How the page looks: colors and fonts. The style sheet is page.css."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

STYLE_SHEET = Path(__file__).with_name("page.css")


def theme() -> gr.themes.Base:
    """Colors and fonts; fonts of the system, because nothing may be fetched."""
    system = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    return gr.themes.Base(
        primary_hue=gr.themes.colors.blue,
        neutral_hue=gr.themes.colors.slate,
        radius_size=gr.themes.sizes.radius_md,
        font=system,
        font_mono=mono,
    ).set(
        body_background_fill="#f6f7f9",
        body_text_color_subdued="#59636d",
        body_text_color_subdued_dark="#9aa5af",
        body_background_fill_dark="#13171c",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1b2025",
        block_border_width="1px",
        block_shadow="none",
        button_primary_background_fill="#2166a5",
        button_primary_background_fill_hover="#1a5288",
        button_primary_background_fill_dark="#3a86cc",
        button_primary_text_color="#ffffff",
    )
