"""`python -m lorakit` is `lorakit`."""

from lorakit.app.cli import program

program()
