"""The command line: `python -m ig_captioner.cli`, installed as `ig-captioner`."""

from .main import SHELLS, build_parser, main


__all__ = ["SHELLS", "build_parser", "main"]
