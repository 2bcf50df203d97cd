"""Triton's interpreter, silent and quicker for the length of a launch."""

import contextlib
import functools
import inspect
from collections.abc import Iterator
from types import ModuleType

import numpy


@functools.cache
def _builtins(of: ModuleType | type) -> list[str]:
    """The names of what the interpreter replaces in a module of triton.language or in its tensor."""
    from triton.language import core

    return [name for name, member in inspect.getmembers(of) if core.is_builtin(member)]


@contextlib.contextmanager
def interpreting() -> Iterator[None]:
    """Let one launch in Triton's interpreter be silent, and take some half of its time.

    Padding may divide by zero, as silently as on a GPU. At every call of a helper, of tl.sum and tl.zeros too, the
    interpreter looks through all of triton.language for what it has yet to replace: once a launch is enough for each of
    the two modules that a function may have under a name, and looking where there was something. And it makes its table
    of dtypes anew for each value.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    replace, look_through, dtype_of = interpreter._patch_lang, interpreter._patch_builtin, interpreter._get_np_dtype
    seen, replaced, dtypes = set(), [], {}

    def replace_once(function):
        names = function.__globals__
        if id(names) in seen:
            return interpreter._LangPatchScope()
        seen.add(id(names))
        visible = [module for module in (tl, tl.core) if any(value is module for value in names.values())]
        if visible and all(module in replaced for module in visible):
            return interpreter._LangPatchScope()
        replaced.extend(visible)
        return replace(function)

    def look_where_there_was_something(of, builder, scope):
        for name in _builtins(of):
            member = getattr(of, name)
            if tl.core.is_builtin(member):
                interpreter._patch_attr(of, name, member, builder, scope)

    def known_dtype_of(kind):
        name = kind.scalar.name
        if name not in dtypes:
            dtypes[name] = dtype_of(kind)
        return dtypes[name]

    interpreter._patch_lang, interpreter._patch_builtin = replace_once, look_where_there_was_something
    interpreter._get_np_dtype = known_dtype_of
    try:
        with numpy.errstate(all="ignore"):
            yield
    finally:
        interpreter._patch_lang, interpreter._patch_builtin = replace, look_through
        interpreter._get_np_dtype = dtype_of
