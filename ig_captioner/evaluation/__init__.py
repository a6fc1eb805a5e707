"""What `ig-captioner evaluate` measures, from images and texts to tables of results."""
