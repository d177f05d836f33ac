"""The box with the main numbers of a report."""

from __future__ import annotations

from html import escape

from eval.report.facts import digits, find_copies, find_score, percent
from eval.results import Result
from eval.scoring import Score

_NAMED = 8


def headline(result: Result) -> str:
    """The main numbers, each with what it says; those that were not computed are left out.

    Args:
        result: scored run.

    Returns:
        Elements of a section.
    """
    cards = [
        _plain(
            find_score(result, "text_similarity"),
            "Text similarity",
            "Cosine of a picture and its prompt, rare token left out.",
        ),
        _share(
            find_score(result, "prompt_retrieval"),
            "Prompt retrieval",
            "Pictures nearer to their own prompt than to any other prompt of the set.",
        ),
        _share(
            find_score(result, "background_color"),
            "Background right",
            "Pictures on the plain color that the prompt asked for.",
        ),
        _plain(
            find_score(result, "prior_drift"),
            "Drift",
            "How far pictures of unrelated prompts moved; 0: not at all, 0.5: nothing in common.",
        ),
        _plain(
            find_score(result, "diversity"),
            "Diversity",
            "How different pictures of one prompt are; 0: all the same.",
        ),
        _copies(result),
    ]
    return f'{_image(result)}<dl class="numbers">{"".join(cards)}</dl>'


def _card(name: str, value: str, interval: str, says: str, kind: str = "card") -> str:
    """One number; what it says is HTML already."""
    shown = f'<span class="range">{escape(interval)}</span>' if interval else ""
    return (
        f'<div class="{kind}"><dt>{escape(name)}</dt><dd><span class="value">{escape(value)}</span>'
        f'{shown}<span class="says">{says}</span></dd></div>'
    )


def interval_words(score: Score) -> str:
    """`0.690 to 0.731 (95 %)`, or "" where there is no interval."""
    if score.interval is None:
        return ""
    return f"{digits(score.interval[0])} to {digits(score.interval[1])} (95 %)"


def _plain(score: Score | None, name: str, says: str) -> str:
    if score is None:
        return ""
    return _card(
        name, digits(score.mean), interval_words(score), f"{says} Encoder: {escape(score.encoder)}."
    )


def _share(score: Score | None, name: str, says: str) -> str:
    """A mean of ones and zeros."""
    if score is None:
        return ""
    right, count = round(sum(score.values.values())), len(score.values)
    interval = ""
    if score.interval is not None:
        interval = "{:.0f} to {:.0f} % (95 %)".format(*(100 * end for end in score.interval))
    return _card(name, percent(score.mean), interval, f"{right} of {count}. {says}")


def _image(result: Result) -> str:
    """Image similarity beside its ceiling, which alone tells what is much."""
    score = find_score(result, "image_similarity")
    if score is None:
        return ""
    parts = [
        f'<div><dt>Image similarity</dt><dd><span class="value">{digits(score.mean)}</span>'
        f'<span class="range">{escape(interval_words(score))}</span></dd></div>'
    ]
    says = f"Mean cosine to all real pictures. Encoder: {score.encoder}."
    ceiling = find_score(result, "ceiling", score.encoder)
    gauge, kind = "", "card wide"
    if ceiling is not None:
        parts.append(
            '<div class="of"><dt>Real against real</dt><dd>'
            f'<span class="value">{digits(ceiling.mean)}</span>'
            '<span class="range">how alike the real pictures are: the ceiling</span></dd></div>'
        )
        if score.mean > ceiling.mean:
            says = (
                "Above the ceiling. That is copying rather than success: look at the copies. "
                + says
            )
            kind += " alarm"
        elif ceiling.mean > 0:
            says = f"{percent(score.mean / ceiling.mean)} of the ceiling. {says}"
        gauge = (
            f'<div class="gauge" aria-hidden="true"><i style="width:{_percent(score.mean)}"></i>'
            f'<b style="left:{_percent(ceiling.mean)}"></b></div>'
        )
    return (
        f'<div class="{kind}"><dl class="pair">{"".join(parts)}</dl>{gauge}'
        f'<span class="says">{escape(says)}</span></div>'
    )


def _percent(value: float) -> str:
    return f"{100 * min(max(value, 0.0), 1.0):.1f}%"


def _copies(result: Result) -> str:
    score = find_score(result, "copy_score")
    copies = score and find_copies(result, score.encoder)
    if not score or not copies:
        return ""
    says = "Pictures nearer to a real one than any two real ones are to each other"
    if copies.files:
        more = len(copies.files) - _NAMED
        rest = f" and {more} more" if more > 0 else ""
        names = [f'<span class="file">{escape(file)}</span>' for file in copies.files[:_NAMED]]
        says += f": {', '.join(names)}{rest}"
    says += f". Bar: {digits(copies.bar)}. Encoder: {escape(score.encoder)}."
    value = f"{len(copies.files)} of {len(copies.nearest)}"
    return _card("Copies", value, "", says, "card alarm" if copies.files else "card")
