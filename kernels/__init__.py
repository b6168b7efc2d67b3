"""Kernels and their numpy twins."""
