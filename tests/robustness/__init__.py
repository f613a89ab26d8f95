"""Bad input, faults, interruptions and random damage."""
