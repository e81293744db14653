"""The command line: parses, calls, prints. Nothing heavy is imported before a command runs."""

from strank.cli.commands import app as app
from strank.cli.commands import main as main
