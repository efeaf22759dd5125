"""Shapes in signatures, checked at every call: what jaxtyping's import hook does, in a fraction of its time.

Its own decorator makes the check of a nested function again whenever that is defined, binds arguments by a signature at
every call, and checks them twice: before the call, and with what it gives. Here beartype checks both at once, in a
context of jaxtyping's for functions that name shapes; what checks a nested function is made once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import io
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from types import FunctionType
from typing import Any

import jaxtyping
from beartype import beartype
from beartype.roar import BeartypeCallHintViolation as WrongShape

Check = Callable[..., Any]
NESTED: dict[tuple[str, str, int], tuple[Check | None, Check | None, bool]] = {}
"""What `checks_of` made, by a function's module, name and line."""
_jaxtyped = jaxtyping.jaxtyped


def install(modules: Sequence[str]) -> None:
    """Check the functions and dataclasses of modules that are imported from now on."""
    # The hook writes `@jaxtyping.jaxtyped(typechecker=...)` over all of them.
    jaxtyping.jaxtyped = lambda typechecker: decorated
    jaxtyping.install_import_hook(modules, "beartype.beartype")


def decorated(made: Any) -> Any:
    if not inspect.isclass(made):
        return checked(made)
    if dataclasses.is_dataclass(made) and "__init__" in vars(made) and not hasattr(made.__init__, "__wrapped__"):
        made.__init__ = checked(made.__init__)
    return made


def checked(function: FunctionType) -> Any:
    """The function, whose arguments and what it gives are checked; a dimension's name is one number in a call."""
    # A generator's function gives the generator, which beartype would follow where it runs, out of the context.
    if "<locals>" in function.__qualname__ or inspect.isgeneratorfunction(function):
        return checked_apart(function)
    function.__annotations__ = hints = hints_of(function)
    inside = beartype(function) if hints else function
    if not any(map(names_shapes, hints.values())):
        return inside

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        with dimensions():
            return inside(*args, **kwargs)

    return outside


def checked_apart(function: FunctionType) -> Any:
    """The same by checks of their own, for a function that may be defined again and again."""
    key = function.__module__, function.__qualname__, function.__code__.co_firstlineno
    if key not in NESTED:
        NESTED[key] = checks_of(function)
    take, give, shapes = NESTED[key]
    if take is None and give is None:
        return function

    @functools.wraps(function)
    def outside(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        with dimensions() if shapes else nullcontext():
            if take is not None:
                take(*args, **kwargs)
            found = function(*args, **kwargs)
            return found if give is None else give(found)

    return outside


@contextmanager
def dimensions() -> Iterator[None]:
    """Dimensions of one name are one number in the block; where they are not, all numbers are said."""
    with _jaxtyped("context"):
        try:
            yield
        except WrongShape as error:
            with redirect_stdout(io.StringIO()) as said:
                jaxtyping.print_bindings()
            error.add_note(said.getvalue())
            raise


def checks_of(function: FunctionType) -> tuple[Check | None, Check | None, bool]:
    """Functions that check another one's arguments, and what it gives; whether its annotations name shapes."""
    hints = hints_of(function)
    gives = {"found": hints.pop("return")} if "return" in hints else {}
    none = inspect.Parameter.empty
    bare = [p.replace(annotation=none, default=p.default if p.default is none else None)
            for p in inspect.signature(function).parameters.values()]  # fmt: skip
    made: dict[str, Any] = {}
    exec(f"def take{inspect.Signature(bare)}: pass\ndef give(found): return found", made)
    take, give = made["take"], made["give"]
    for check, named in ((take, hints), (give, gives)):
        check.__module__, check.__qualname__ = function.__module__, f"{function.__qualname__} ({check.__name__}s)"
        check.__annotations__ = named
    take.__kwdefaults__, take.__defaults__ = function.__kwdefaults__, function.__defaults__
    checks = beartype(take) if hints else None, beartype(give) if gives else None
    # beartype has looked at them, and nothing shall hold them: they may be a model.
    take.__kwdefaults__ = dict.fromkeys(take.__kwdefaults__ or {})
    take.__defaults__ = (None,) * len(take.__defaults__ or ())
    return *checks, any(map(names_shapes, [*hints.values(), *gives.values()]))


def hints_of(function: FunctionType) -> dict[str, Any]:
    """A function's annotations; without those that name what is not there yet, or only for a type checker."""
    found = {name: hint_of(annotation, function.__globals__) for name, annotation in function.__annotations__.items()}
    return {name: hint for name, hint in found.items() if hint is not Any}


def hint_of(annotation: Any, names: dict[str, Any]) -> Any:
    def holder() -> None: ...

    holder.__annotations__ = {"hint": annotation}
    try:
        return typing.get_type_hints(holder, names, include_extras=True)["hint"]
    except Exception:  # an annotation may be any code
        return Any


def names_shapes(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        return True
    return any(map(names_shapes, typing.get_args(hint)))
