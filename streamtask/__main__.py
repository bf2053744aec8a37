"""``python -m streamtask``."""

from .cli import main

main(prog_name="streamtask")
