"""Captioners from elsewhere, brought into the format of `ig_captioner` and back: see README.md in this folder."""
