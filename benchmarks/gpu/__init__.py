"""Measurements on a GPU. Not yet run on one."""
