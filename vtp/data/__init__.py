"""Bytes to batches: sources, views, augmentation, masks and the loader."""
