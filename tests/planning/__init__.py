"""Tests of headfuse/planning."""
