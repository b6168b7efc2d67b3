"""Everything that turns what others trained into a bundle. torch is imported at the first use, not before."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporter.exporting import add_parts, export

__all__ = ["add_parts", "export"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from exporter import exporting

    return getattr(exporting, name)
