"""Captioners from elsewhere, brought into the format of `ig_captioner` and back: see docs/conversion.md."""
