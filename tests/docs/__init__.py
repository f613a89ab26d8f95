"""What the README and the documents promise."""
