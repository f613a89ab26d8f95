"""Tests of headfuse/training."""
