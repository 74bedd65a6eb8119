"""Images: sources, augmentation and the loader."""
