"""``python -m streamtask``."""

from .cli import main

main()
