"""Tests of headfuse/evaluation."""
