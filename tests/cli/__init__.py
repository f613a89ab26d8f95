"""Tests of headfuse/cli."""
