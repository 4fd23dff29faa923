"""Checks of shapes that are made once for each combination of shapes.

Whether a call fits its annotations is decided by the types of its arguments and result and, of
tensors, by dtype and shape. jaxtyping looks at every call anew, which costs several times what our
small models compute. `jaxtyped` takes the place of `jaxtyping.jaxtyped`:

1. A function without a shape in its annotations is left to the type checker, on every call.
2. A call whose arguments have a key (`key_of`) that was not seen is checked by jaxtyping as ever.
3. One whose key was seen runs unchecked, and its result is looked at if that has a key not seen.
"""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import jaxtyping

checked = jaxtyping.jaxtyped
LONGEST = 64  # elements of a container that are looked at


class Unknown(Exception):
    """A value of which no key says all that a check might ask."""


def key_of(x: Any, text: bool = False) -> Any:
    """What a check may ask of a value, hashable.

    Args:
        text: whether the value of a string or number counts, as for Literal.

    Raises:
        Unknown: it holds too much.
    """
    kind = type(x)
    if kind not in KEYS:
        KEYS[kind] = key_for(kind)
    return KEYS[kind](x, text)


KEYS: dict[type, Callable[[Any, bool], Any]] = {}


def key_for(kind: type) -> Callable[[Any, bool], Any]:
    """The key of the values of a type, as a function of value and `text`."""
    import numpy as np
    import torch

    if issubclass(kind, torch.Tensor):
        return lambda x, text: (kind, x.dtype, x.shape)
    if issubclass(kind, np.ndarray):
        return lambda x, text: (kind, x.dtype.str, x.shape)
    if kind in (type(None), bool, int, float, complex, bytes, str):
        return lambda x, text: (kind, x) if text else kind
    if issubclass(kind, (tuple, list)):
        return lambda x, text: (kind, tuple([key_of(e, text) for e in short(x)]))
    if issubclass(kind, (set, frozenset)):
        return lambda x, text: (kind, frozenset([key_of(e, text) for e in short(x)]))
    if issubclass(kind, dict):
        return lambda x, text: (
            kind,
            tuple([(key_of(k, text), key_of(v, text)) for k, v in short(x).items()]),
        )
    if issubclass(kind, type):
        return lambda x, text: x
    return lambda x, text: kind


def short(x: Any) -> Any:
    if len(x) > LONGEST:
        raise Unknown
    return x


class Seen:
    """The keys of a function's calls, and of its calls with their results.

    Attributes:
        text: whether a check asks for the values of strings.
    """

    def __init__(self, annotations: dict[str, Any]) -> None:
        self.calls: set[Any] = set()
        self.results: set[Any] = set()
        self.text = "Literal" in str(annotations)


SEEN: dict[types.CodeType, Seen] = {}  # an inner function is made anew on every call of its outer


def has_shapes(fn: types.FunctionType) -> bool:
    """Whether an annotation names a shape, or may name one: what stands in quotes is not read."""
    for hint in fn.__annotations__.values():
        hint = fn.__globals__.get(hint, hint) if isinstance(hint, str) else hint
        quoted = not isinstance(hint, type) and "'" in repr(hint)
        if "jaxtyping" in repr(hint) or quoted:
            return True
    return False


def jaxtyped(fn: Any = None, *, typechecker: Any) -> Any:
    """`jaxtyping.jaxtyped` for what its import hook decorates; the checks are remembered."""
    if fn is None:
        return functools.partial(jaxtyped, typechecker=typechecker)
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn):
            fn.__init__ = jaxtyped(fn.__init__, typechecker=typechecker)
        return fn
    if not isinstance(fn, types.FunctionType):
        return checked(fn, typechecker=typechecker)
    if not fn.__annotations__:
        return fn
    if inspect.isgeneratorfunction(fn) or inspect.iscoroutinefunction(fn):
        return checked(fn, typechecker=typechecker)
    with_shapes = remembering(fn, typechecker)
    if "<locals>" in fn.__qualname__:  # made anew on every call of its outer function
        return with_shapes
    check = None

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        nonlocal check
        if check is None:  # a name in quotes may stand further down in the file than the function
            check = with_shapes if has_shapes(fn) else typechecker(fn)
        return check(*args, **kwargs)

    return call


def remembering(fn: types.FunctionType, typechecker: Any) -> Callable:
    """A function whose calls are checked where their like was not seen."""
    if fn.__code__ not in SEEN:
        SEEN[fn.__code__] = Seen(fn.__annotations__)
    seen = SEEN[fn.__code__]
    calls, results, text = seen.calls, seen.results, seen.text
    whole = functools.cache(lambda: checked(fn, typechecker=typechecker))
    result_fits = functools.cache(lambda: of_result(fn, typechecker))

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        try:
            asked = key_of(args, text), key_of(kwargs, text) if kwargs else None
        except Unknown:
            return whole()(*args, **kwargs)
        known = asked in calls
        out = fn(*args, **kwargs) if known else whole()(*args, **kwargs)
        try:
            answered = asked, key_of(out, text)
        except Unknown:
            answered = None
        if known and (answered is None or answered not in results):
            result_fits()(out, args, kwargs)
        calls.add(asked)
        if answered is not None:
            results.add(answered)
        return out

    return call


def of_result(fn: types.FunctionType, typechecker: Any) -> Callable[[Any, tuple, dict], None]:
    """A check of a result of `fn`, which it does not call."""
    held: list[Any] = []

    def hand_back(*_: Any, **__: Any) -> Any:
        return held.pop()

    # annotations in quotes are read among the names of fn's own module
    same = types.FunctionType(
        hand_back.__code__, fn.__globals__, fn.__name__, None, hand_back.__closure__
    )
    check = checked(functools.wraps(fn)(same), typechecker=typechecker)

    def look(out: Any, args: tuple, kwargs: dict) -> None:
        held.append(out)
        check(*args, **kwargs)

    return look
