"""Tests of headfuse/models."""
