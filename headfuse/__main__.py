"""`python -m headfuse`."""

from headfuse.cli import main

main()
