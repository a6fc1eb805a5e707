"""Measurements of checkpoints and of speed. Run them as modules; nothing else imports them."""
