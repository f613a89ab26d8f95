"""The commands of headfuse, each one short function."""
