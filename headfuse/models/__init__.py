"""The source model: its family, its heads, and running it layer by layer."""
