"""What a user types: commands, their help and the tools beside adapt."""

from upstep_fast.cli.commands import main

__all__ = ["main"]
