"""`python -m autosloth`: the commands."""

from .cli import main

main()
