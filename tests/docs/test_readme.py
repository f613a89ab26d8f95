"""What the README promises: its YAML loads, and holds the defaults that it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from headfuse.config.fuse import FuseConfig, load_config

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def test_the_yaml_of_the_readme_is_every_option_with_its_default(tmp_path: Path) -> None:
    (block,) = BLOCKS
    (tmp_path / "readme.yaml").write_text(block)
    assert load_config(str(tmp_path / "readme.yaml"), {}) == FuseConfig()


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_says_what_it_is_for(path: Path) -> None:
    assert path.read_text().startswith("# ")


@pytest.mark.parametrize("link", re.findall(r"\]\(([\w/.]+)\)", (ROOT / "README.md").read_text(encoding="utf-8")))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / link).exists()
