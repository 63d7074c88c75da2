"""`python -m skink`: the same as the command `skink`."""

from skink.cli import main

main()
