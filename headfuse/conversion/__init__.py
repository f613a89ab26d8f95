"""The main path: a checkpoint and text to a fused folder."""
