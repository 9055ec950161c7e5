"""Models: transformers classes, built or loaded."""
