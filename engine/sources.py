"""Where the C++ and CUDA sources lie."""

from pathlib import Path


def folder() -> Path:
    """``kernels/`` of a checkout, which an editable install uses too; a wheel carries it inside this package."""
    carried = Path(__file__).parent / "kernels"
    return carried if carried.is_dir() else Path(__file__).parent.parent / "kernels"
