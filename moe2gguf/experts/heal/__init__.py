"""Layers of experts as torch modules."""
