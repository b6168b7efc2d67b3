"""Solving on a CUDA device: driver, arrays, memory of a solve, graphs. Nothing here imports CUDA before it is used."""
