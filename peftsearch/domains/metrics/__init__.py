"""Metrics that no library has as their field computes them, or has in many pieces."""
