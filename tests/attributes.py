"""The attributes of a class, whether it is compiled or not."""


def attributes(kind: type) -> tuple[str, ...]:
    """Their names: the slots, which a class that mypyc compiled has no more."""
    compiled = getattr(kind, "__mypyc_attrs__", None)
    return kind.__slots__ if compiled is None else compiled
