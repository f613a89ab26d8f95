"""Tests of headfuse/reporting."""
