"""``python -m nestc``: the command line."""

from nestc.cli import main

main()
