"""Tests of headfuse/config."""
