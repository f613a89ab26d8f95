"""Tests of headfuse/fusion."""
