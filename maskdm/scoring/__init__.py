"""Scoring: feature extractors, scores of images, distances of points, and the protocol that scores belong to."""
