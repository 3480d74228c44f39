"""Accuracy on public tasks, for any model."""
