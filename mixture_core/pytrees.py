"""Immutable records that torch understands as trees of tensors."""

from typing import Any, TypeVar

import attrs
from torch.utils import _pytree  # torch has no public pytree module

Record = TypeVar("Record")


STATIC = {"static": True}  # metadata of a field that belongs to the tree's structure: compared, never mapped over


def pytree(cls: type[Record]) -> type[Record]:
    """Registers a frozen attrs class with torch's trees, so that vmap, grad and compile accept and return it.

    Place it above a visible `@attrs.frozen(eq=False, kw_only=True)`. The `__init__` that attrs generates for a frozen
    class cannot be traced by torch.compile, so that this one takes its place. Fields with the metadata STATIC must hash
    and compare; all others are subtrees. A default must be an `attrs.Factory(..., takes_self=True)`. Fields may not
    have validators or converters: torch rebuilds records with placeholders in the place of tensors.
    """
    fields = attrs.fields(cls)  # type: ignore[arg-type]  # mypy cannot know that the class is an attrs class
    names = tuple(field.name for field in fields)
    defaults = {field.name: field.default.factory for field in fields if field.default is not attrs.NOTHING}
    static_names = tuple(field.name for field in fields if field.metadata.get("static"))
    child_names = tuple(name for name in names if name not in static_names)
    class_name = cls.__name__

    # It must not close over `cls`: a compiled vmap fails on that.
    def __init__(self: Any, **values: Any) -> None:
        if not set(names) - set(defaults) <= set(values) <= set(names):
            optional = f" ({', '.join(defaults)} may be left out)" if defaults else ""
            wanted = f"exactly {', '.join(names)} by keyword{optional}"
            raise TypeError(f"`{class_name}` takes {wanted}, got {', '.join(values)}.")
        for name in names:
            object.__setattr__(self, name, values[name] if name in values else defaults[name](self))

    def flatten(record: Any) -> tuple[list[Any], tuple[Any, ...]]:
        return [getattr(record, name) for name in child_names], tuple(getattr(record, name) for name in static_names)

    def flatten_with_keys(record: Any) -> tuple[list[tuple[Any, Any]], tuple[Any, ...]]:
        children, context = flatten(record)
        keys = [_pytree.GetAttrKey(name) for name in child_names]
        return list(zip(keys, children, strict=True)), context

    def unflatten(children: Any, context: tuple[Any, ...]) -> Any:
        values = dict(zip(child_names, children, strict=True)) | dict(zip(static_names, context, strict=True))
        return cls(**values)

    cls.__init__ = __init__  # type: ignore[method-assign]  # what the decorator is for
    _pytree.register_pytree_node(cls, flatten, unflatten, flatten_with_keys_fn=flatten_with_keys)
    return cls
