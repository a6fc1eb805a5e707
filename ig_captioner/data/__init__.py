"""Data sets: shards, URLs, the samples that `evaluate` reads, class names and templates."""
