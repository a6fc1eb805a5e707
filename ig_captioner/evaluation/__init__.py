"""The tasks of `ig-captioner evaluate`, from images and texts to tables of results."""
