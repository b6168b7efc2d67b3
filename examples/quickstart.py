"""Faces that obey a condition:  python examples/quickstart.py [BUNDLE]"""

import sys

from engine import Sampler
from engine.pictures import grid

sampler = Sampler(sys.argv[1] if len(sys.argv) > 1 else "demo")
print(sampler.bundle)
print("attributes:", ", ".join(sampler.bundle.attributes))

faces = sampler.sample("smile & ~glasses & haircolor=blond", seeds=range(9))
for face in faces:
    print(face)
grid([face.image for face in faces]).save("quickstart.png")
print("look at quickstart.png")
