"""Every row its own condition, seed and truncation:  python examples/mixed_requests.py [BUNDLE]"""

import sys

from engine import Request, Sampler, attr
from engine.pictures import grid

requests = [
    Request("smile & hat", seed=1),
    Request("hat | beard", seed=2),
    Request("0.2<age<0.4 & gender=female", seed=3),
    Request(attr("glasses") & (attr("age") > 0.7), seed=4),  # a condition may be written in Python too
    Request("2*bald & yaw=0.3", seed=5, truncation=0.5),
    Request(seed=6),  # no condition: a plain sample
]
sampler = Sampler(sys.argv[1] if len(sys.argv) > 1 else "demo", capacity=4)  # 4 rows in flight, the others wait
images = {}
for face in sampler.stream(requests):  # in the order in which rows finish
    images[face.seed] = face.image
    print(f"{face.condition!s:40} {face.status.name}, {face.evaluations} evaluations, energy {face.energy:.3f}")
grid([images[request.seed] for request in requests], columns=3).save("mixed_requests.png")
print("look at mixed_requests.png")
