"""The command line: parses, calls, prints. Nothing heavy is imported before a command runs."""

from strank.cli.commands import app, main

__all__ = ["app", "main"]
