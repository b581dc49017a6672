"""Trees: paths, prefixes, absent leaves."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from funcpipe._src.core import pytree as tree


class Point(NamedTuple):
    x: object
    y: object


TREES = st.recursive(
    st.one_of(st.integers(), st.none(), st.text(max_size=2)),
    lambda t: st.one_of(
        st.lists(t, max_size=3),
        st.tuples(t, t),
        st.dictionaries(st.sampled_from("abc"), t),
        st.builds(Point, t, t),
    ),
    max_leaves=8,
)


@given(TREES)
def test_flatten_and_back(x: object) -> None:
    leaves, spec = tree.flatten(x)
    assert tree.unflatten(spec, leaves) == x
    assert tree.leaves(x) == leaves
    assert len(tree.paths(x)) == len(leaves)
    assert tree.map(lambda leaf: leaf, x) == x


@given(TREES)
def test_a_path_is_code_that_finds_the_leaf(x: object) -> None:
    for path, leaf in zip(tree.paths(x), tree.leaves(x), strict=True):
        assert eval(f"x{path}", {"x": x}) == leaf


@given(TREES)
def test_every_tree_is_a_prefix_of_itself_and_a_leaf_of_all(x: object) -> None:
    assert tree.broadcast_prefix(x, x) == tree.leaves(x)
    assert tree.broadcast_prefix(7, x) == [7] * len(tree.leaves(x))
    assert tree.broadcast_prefix(None, x) == [None] * len(tree.leaves(x))


def test_none_is_no_leaf_of_a_tree_but_one_of_a_prefix() -> None:
    assert tree.leaves({"a": None, "b": [1, None]}) == [1]
    assert tree.broadcast_prefix({"a": 1, "b": None}, {"a": [5, None], "b": [6, 7]}) == [
        1,
        None,
        None,
    ]


def test_what_a_rank_holds_is_read_up_to_the_full_structure() -> None:
    _, spec = tree.flatten({"a": 1, "b": [2, 3]})
    assert tree.leaves_up_to(spec, {"a": None, "b": [5, None]}) == [None, 5, None]
    with pytest.raises(
        ValueError, match="list arity mismatch; expected: 2, got: 1; list: \\[\\*\\]"
    ) as caught:
        tree.leaves_up_to(spec, {"a": None, "b": [torch.zeros(3)]})
    assert "tensor" not in str(caught.value)


def test_a_tree_for_messages_shows_no_data() -> None:
    assert (
        repr(tree.without_data({"a": torch.zeros(2), "b": Point(1, None)}))
        == "{'a': *, 'b': Point(x=*, y=None)}"
    )


def test_map_tensors_leaves_others_alone() -> None:
    out = tree.map_tensors(lambda x: x + 1, {"a": torch.zeros(1), "b": 3, "c": None, "d": "x"})
    assert out == {"a": torch.ones(1), "b": 3, "c": None, "d": "x"}
