"""Figures, the paper's published numbers, and MLflow."""
