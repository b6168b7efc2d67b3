"""Image classifiers that label or judge, an identity embedding, and distances in their features."""

from pathlib import Path

# Those of the demonstration world.
JUDGE = Path(__file__).parent / "judge.safetensors"
IDENTITY = Path(__file__).parent / "identity.safetensors"
