"""Tiny models, and the tools of several folders of tests."""
