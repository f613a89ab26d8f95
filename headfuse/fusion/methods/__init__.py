"""One small file per fusion method."""
