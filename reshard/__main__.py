"""`python -m reshard`."""

from .cli import main

main()
