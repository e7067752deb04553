"""Partial forward passes through a model's own forward method."""
