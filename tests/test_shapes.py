"""The check of shapes that the other tests run under finds what is wrong, wherever a function stands."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
from jaxtyping import Float
from shapes import NESTED, WrongShape, decorated, dimensions
from torch import Tensor

if TYPE_CHECKING:
    from nowhere import Unknown  # type: ignore[import-not-found]

ONE, TWO = torch.zeros(2, 3), torch.zeros(3, 3)


@decorated
def same(one: Float[Tensor, "rows columns"], two: Float[Tensor, "rows columns"]) -> Float[Tensor, " columns"]:
    return one[0] if one.shape[1] < 5 else one[:, 0]


@decorated
def plain(count: int, *others: int, named: str = "", **more: str) -> str:
    return named * count if count < 5 else count  # type: ignore[return-value]


@decorated
def unresolved(one: Unknown, two: Float[Tensor, " rows"]) -> Unknown:
    return one


@decorated
@dataclass(frozen=True)
class Pair:
    one: Float[Tensor, "rows columns"]
    two: Float[Tensor, "rows columns"] = ONE


class Named(NamedTuple):
    one: Tensor

    @decorated
    def times(self, row: Float[Tensor, " columns"]) -> Float[Tensor, " columns"]:
        return self.one[0] * row


@contextmanager
@decorated
def block(one: Float[Tensor, "rows columns"], two: Float[Tensor, "rows columns"]) -> Iterator[Tensor]:
    same(torch.zeros(1, 1), torch.zeros(1, 1))  # whose dimensions are others
    yield one + two


def test_dimensions_of_one_name_are_one_number_in_a_call() -> None:
    assert same(ONE, ONE).shape == (3,)
    assert same(TWO, two=TWO).shape == (3,)  # another call's dimensions are others
    with pytest.raises(WrongShape, match="two") as caught:
        same(ONE, TWO)
    assert "rows=2\ncolumns=3" in caught.value.__notes__[0]
    with pytest.raises(WrongShape, match="one"):
        same(ONE.long(), ONE)
    with pytest.raises(WrongShape, match="return"):
        same(torch.zeros(2, 6), torch.zeros(2, 6))
    with dimensions(), pytest.raises(WrongShape):  # what stands around it changes nothing
        same(ONE, TWO)
    assert same(TWO, TWO).shape == (3,)  # also after one that failed


def test_what_has_no_shapes_is_checked_too() -> None:
    assert plain(2, 3, named="a", more="b") == "aa"
    for args, kwargs in [(("2",), {}), ((2, "3"), {}), ((2,), {"named": 3}), ((2,), {"more": 3}), ((7,), {})]:
        with pytest.raises(WrongShape):
            plain(*args, **kwargs)


def test_names_for_type_checkers_alone_are_let_be_and_the_others_checked() -> None:
    assert unresolved(3, torch.zeros(2)) == 3
    with pytest.raises(WrongShape, match="two"):
        unresolved(3, ONE)


def test_dataclasses_and_methods() -> None:
    assert Pair(ONE).two is ONE and Pair(TWO, TWO).one is TWO
    with pytest.raises(WrongShape, match="two"):
        Pair(ONE, TWO)
    assert Named(ONE).times(torch.zeros(3)).shape == (3,)
    for row in (torch.zeros(1, 3), torch.zeros(1)):
        with pytest.raises(WrongShape):
            Named(ONE.long() if row.ndim == 1 else ONE).times(row.long() if row.ndim == 1 else row)


def test_blocks() -> None:
    with block(ONE, two=ONE) as both:
        assert both.shape == (2, 3)
    with pytest.raises(WrongShape, match="two"), block(ONE, TWO):
        pass
    with pytest.raises(ValueError, match="own"), block(ONE, ONE):
        raise ValueError("own")


def test_a_nested_function_is_checked_whenever_it_is_defined_by_checks_that_are_made_once_and_hold_nothing() -> None:
    def make(default: Tensor) -> Callable[..., Tensor]:
        @decorated
        def inner(
            one: Float[Tensor, "rows columns"], *, two: Float[Tensor, "rows columns"] = default
        ) -> Float[Tensor, "columns rows"]:
            return (one + two).T if two.shape[0] < 3 else two

        return inner

    kept = torch.ones(2, 3)
    first, second, third = make(kept), make(2 * kept), make(torch.ones(3, 2))
    keys = [key for key in NESTED if key[1].endswith("make.<locals>.inner")]
    assert len(keys) == 1
    assert (first(ONE) == 1).all() and (second(ONE) == 2).all() and (second(ONE, two=ONE) == 0).all()
    for inner in (first, second):
        with pytest.raises(WrongShape, match="two"):
            inner(ONE, two=TWO)
        with pytest.raises(WrongShape, match="one"):
            inner(torch.zeros(2))
    with pytest.raises(WrongShape, match="found"):
        third(torch.ones(3, 2), two=torch.ones(3, 2))
    there = weakref.ref(kept)
    del kept, first, inner
    gc.collect()
    assert there() is None
