"""What every method, allocator, grouper and layout obeys."""
