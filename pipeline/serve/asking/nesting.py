"""How deeply JSON is nested: what goes through it by recursion must not be led too far."""

from typing import Any


def is_deeper(value: Any, max_levels: int) -> bool:
    """Whether more objects and arrays than that stand within each other."""
    level = _containers([value])
    for _ in range(max_levels):
        if not level:
            return False
        level = _containers(child for parent in level for child in _children(parent))
    return bool(level)


def _containers(values: Any) -> list[Any]:
    return [value for value in values if isinstance(value, dict | list)]


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value
