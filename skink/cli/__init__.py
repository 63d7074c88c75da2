"""The command line, `skink`. Importing it imports neither PyTorch nor transformers: commands do, when they run."""

from skink.cli.app import app, main

__all__ = ["app", "main"]
