"""Datasets by name: read from their original files, as their authors distribute them."""
