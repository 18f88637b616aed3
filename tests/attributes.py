"""The attributes of a class, whether it is compiled or not."""


def attributes(kind: type) -> tuple[str, ...]:
    """Their names: the slots, which a class that mypyc compiled has no more.

    Of the class alone, without those of its bases.
    """
    compiled = getattr(kind, "__mypyc_attrs__", None)
    if compiled is None:
        return getattr(kind, "__slots__", ())
    inherited = {name for base in kind.__mro__[1:] for name in attributes_of_base(base)}
    return tuple(name for name in compiled if name not in inherited)


def attributes_of_base(kind: type) -> tuple[str, ...]:
    """None of a class that is not compiled, such as `object`."""
    return getattr(kind, "__mypyc_attrs__", ())
