"""Tests of headfuse/modeling."""
