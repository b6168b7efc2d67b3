"""Cartoon faces with exact labels: the "real data" of the small generator.

factors.py   what a face is made of, and how faces are distributed
layout.py    factors -> positions, sizes and colours
shapes.py    the canvas and three antialiased primitives
features.py  eyes, nose, mouth, beard, wrinkles
layers.py    everything else, and the order of the drawing, back to front
render.py    chunks of factors -> uint8 pictures
pictures.py  whole sets of them, kept on the disk
"""

from lace_trainer.faces.factors import ATTRIBUTES, IDENTITY, SCENE, Factors, sample_factors
from lace_trainer.faces.render import contact_sheet, render

__all__ = ["ATTRIBUTES", "IDENTITY", "SCENE", "Factors", "contact_sheet", "render", "sample_factors"]
