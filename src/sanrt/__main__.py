"""`python -m sanrt`."""

from sanrt.cli import main

main()
