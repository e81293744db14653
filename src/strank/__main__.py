"""``python -m strank``."""

from strank.cli import main

main()
