"""Tests of headfuse/text."""
