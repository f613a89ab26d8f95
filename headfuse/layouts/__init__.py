"""How a fused model lies on disk."""
