"""Scoring: feature extractors, scores of images and of points, and what scores are of."""
