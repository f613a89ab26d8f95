"""Tests of headfuse/checkpoint."""
