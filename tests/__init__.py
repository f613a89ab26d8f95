"""Tests: a folder for each room of headfuse, and laws, contracts, robustness, docs for what crosses rooms."""

import pytest

# Failed assertions in helpers say as much as those in tests.
pytest.register_assert_rewrite("tests.support", "tests.robustness.refusals")
