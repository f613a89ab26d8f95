"""Documents and token windows."""
