"""Tests of headfuse/layouts."""
