"""`python -m inrun`: the command line."""

from .cli import main

main()
