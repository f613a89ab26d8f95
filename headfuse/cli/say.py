"""Sentences on a console: a terminal gets lines broken between words, a log gets one line that can be searched."""

from __future__ import annotations

import textwrap

from rich.console import Console


def say(console: Console, text: str) -> None:
    """Print one line, broken where a terminal ends; a word that is wider, as a path may be, stays whole.

    Args:
        console: where to print.
        text: without line breaks; spaces at its start indent all that it is broken into.
    """
    if console.file.isatty():  # with FORCE_COLOR, rich calls a log a terminal
        indent = text[: len(text) - len(text.lstrip())]
        text = textwrap.fill(
            text, console.width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
    console.print(text, highlight=False, soft_wrap=True)
