"""`python -m reshard`."""

from .cli.main import main

main()
