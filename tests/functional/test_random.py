"""Keys: what is drawn depends on the key and the shape alone, and keys that differ draw values that
do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcpipe as fp
from funcpipe import random

seeds = st.integers(-(2**63), 2**63 - 1)


@given(seeds, st.text(max_size=5), st.text(max_size=5))
def test_names_that_differ_give_keys_that_do(seed: int, a: str, b: str) -> None:
    key = random.key(seed)
    assert bool(random.fold_in(key, a) == random.fold_in(key, b)) == (a == b)


@given(st.lists(seeds, min_size=2, max_size=20, unique=True))
def test_keys_do_not_collide(numbers: list[int]) -> None:
    """The mixing is a bijection of 64 bits."""
    assert len({int(random.key(n)) for n in numbers}) == len(numbers)
    assert len({int(random.fold_in(random.key(0), n)) for n in numbers}) == len(numbers)


def test_keys_stay_what_they_are() -> None:
    """A checkpoint's run can be repeated by a later version: the first outputs of splitmix64 seeded
    with 0 and 1."""
    assert [int(random.key(n)) % 2**64 for n in (0, 1)] == [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1]


def test_the_order_of_folding_matters() -> None:
    key = random.key(0)
    assert random.fold_in(random.fold_in(key, 1), 2) != random.fold_in(random.fold_in(key, 2), 1)
    assert random.fold_in(random.fold_in(key, "a"), "b") != random.fold_in(
        random.fold_in(key, "b"), "a"
    )


def test_a_tensor_folds_like_its_number() -> None:
    assert random.fold_in(random.key(0), torch.tensor(7)) == random.fold_in(random.key(0), 7)


@pytest.mark.parametrize("draw", [random.normal, random.uniform])
def test_draws_leave_the_global_generator_alone(draw: object) -> None:
    before = torch.get_rng_state()
    a = draw(random.key(3), (4, 5), torch.float64)  # type: ignore[operator]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(a, draw(random.key(3), (4, 5), torch.float64))  # type: ignore[operator]
    assert (a.shape, a.dtype) == ((4, 5), torch.float64)


def test_what_is_drawn_has_the_moments_it_should() -> None:
    """Of 10000 values: within five standard errors."""
    x, u = random.normal(random.key(0), (10000,)), random.uniform(random.key(1), (10000,))
    assert abs(x.mean()) < 0.05 and abs(x.std() - 1) < 0.036
    assert abs(u.mean() - 0.5) < 0.0145 and u.min() >= 0 and u.max() < 1


def test_init_draws_every_leaf_from_its_own_path() -> None:
    make = random.scaled_normal((3,), std=1.0, dtype=torch.float64)
    small = random.init(random.key(0), {"a": make, "b": make})
    large = random.init(
        random.key(0), {"a": make, "b": make, "c": [make, random.constant((2, 2), 5.0)]}
    )
    assert torch.equal(small["a"], large["a"]) and torch.equal(small["b"], large["b"])
    leaves = [large["a"], large["b"], large["c"][0]]
    assert all(not torch.equal(x, y) for i, x in enumerate(leaves) for y in leaves[:i])
    assert torch.equal(large["c"][1], torch.full((2, 2), 5.0))


def test_it_is_public() -> None:
    assert fp.random is random
