"""Batches that shrink until they fit, and memory that runs out for good."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from goldenlayers.errors import UserError
from goldenlayers.progress import OutOfMemory, in_smaller_batches, memory_errors, out_of_memory


def hungry(
    most: int, error: BaseException | None = None
) -> tuple[list[int], Callable[[list[int]], int]]:
    """Sizes that were tried, and a run that adds its members up if there are at most ``most``."""
    tried: list[int] = []

    def run(members: list[int]) -> int:
        tried.append(len(members))
        if len(members) > most:
            raise error or torch.OutOfMemoryError("CUDA out of memory")
        return sum(members)

    return tried, run


def name(member: int) -> str:
    return f"text {member}"


def test_each_member_is_run_once_in_parts_that_fit() -> None:
    tried, run = hungry(2)
    batches = [[3, 1, 4, 15, 9], [2, 6, 5, 35]]
    found = list(in_smaller_batches(batches, run, name))
    assert [m for members, _ in found for m in members] == [m for batch in batches for m in batch]
    assert all(total == sum(members) for members, total in found)
    assert tried == [5, 2, 2, 1, 4, 2, 2]  # a new batch begins whole
    tried, run = hungry(2)
    again = list(in_smaller_batches(batches, run, name, for_good=True))
    assert tried == [5, 2, 2, 1, 2, 2]
    assert [m for members, _ in again for m in members] == [m for batch in batches for m in batch]


def test_one_member_too_large_is_the_users_error_and_still_one_of_memory() -> None:
    tried, run = hungry(0)
    with pytest.raises(UserError, match=r"memory ran out on text 7 alone.*--dtype") as caught:
        list(in_smaller_batches([[7, 8]], run, name))
    assert tried == [2, 1] and out_of_memory(caught.value)
    # Said once, by who knows best.
    _, run = hungry(0, OutOfMemory("memory ran out on a word alone"))
    with pytest.raises(UserError, match="on a word alone"):
        list(in_smaller_batches([[7]], run, name))


def test_other_errors_pass_through() -> None:
    for error in (RuntimeError("shapes do not fit"), KeyError("x"), UserError("no")):
        tried, run = hungry(0, error)
        with pytest.raises(type(error)):
            list(in_smaller_batches([[1, 2]], run, name))
        assert tried == [2]
        with pytest.raises(type(error)), memory_errors("memory ran out"):
            raise error


def test_what_ran_out_is_told() -> None:
    for error in (MemoryError(), RuntimeError("MPS backend out of memory")):
        with (
            pytest.raises(OutOfMemory, match=r"ran out in a test\. Buy more"),
            memory_errors("memory ran out in a test", "Buy more"),
        ):
            raise error
    with pytest.raises(OutOfMemory, match="on a word"), memory_errors("memory ran out in a test"):
        raise OutOfMemory("memory ran out on a word")
