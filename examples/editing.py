"""One face, changed step by step:  python examples/editing.py [BUNDLE]"""

import sys

from engine import Sampler
from engine.pictures import grid

sampler = Sampler(sys.argv[1] if len(sys.argv) > 1 else "demo")
stages = sampler.sample("~smile & ~glasses", seeds=4)
for edit in ("yaw=0.75", "smile", "glasses", "age=0.8"):
    stages += sampler.edit(stages[-1], edit)  # keeps the other attributes, stays near, holds the earlier targets

for face, logits in zip(stages, sampler.measure(stages), strict=True):
    print(f"yaw {logits['yaw'][0]:.2f}  age {logits['age'][0]:.2f}  {face.condition}")
grid([face.image for face in stages], columns=len(stages)).save("editing.png")
print("look at editing.png")
