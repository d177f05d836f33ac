"""Frozen sets of prompts: `load_prompts("objects")`, DreamBooth's own file, or a text file with a prompt a line.

A line reads `a {subject} on a red background | background=red`; the part behind the bar is optional and says which
color of `eval.palette` is expected. Numbers of two sets do not share a table, so a set is known by its hash.
"""

from __future__ import annotations

from eval.prompts.reading import FROZEN, load_prompts
from eval.prompts.sets import KINDS, SUBJECT, Prompt, PromptSet

__all__ = ["FROZEN", "KINDS", "SUBJECT", "Prompt", "PromptSet", "load_prompts"]
