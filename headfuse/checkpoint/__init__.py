"""Model folders on disk: the only package that opens or writes weight files."""
