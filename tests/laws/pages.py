"""Code of the pages in docs/contributing, so that tests run what the pages show."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs/contributing"


def code_of(page: str) -> ModuleType:
    """The one block of Python on a page, run as a module."""
    (block,) = re.findall(r"```python\n(.*?)```", (FOLDER / page).read_text(encoding="utf-8"), re.DOTALL)
    module = ModuleType(page.removesuffix(".md"))
    exec(textwrap.dedent(block), module.__dict__)  # annotations stay text, as in this file
    return module


def entry_of(page: str, name: str, **names: Any) -> Any:
    """The value of the table's line that a page shows for `name`."""
    text = (FOLDER / page).read_text(encoding="utf-8")
    (line,) = re.findall(rf'^ +"{name}": (.*),$', text, re.MULTILINE)
    return eval(line, names)
