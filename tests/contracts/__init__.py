"""What every family, layout and runtime gets."""
