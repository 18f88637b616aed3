"""The cases, a module a chip or a subject."""
