"""Recovery: continued pre-training of a fused model."""
