"""Tests of headfuse/conversion."""
