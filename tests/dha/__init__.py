"""Tests of headfuse/dha."""
