"""Figures of a model folder, and the gates that judge them."""
