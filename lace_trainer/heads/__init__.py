"""Attribute heads on latents: labelled pairs, training, files."""
