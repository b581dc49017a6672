"""Contexts: which there are, how they are bound, and what they hand on."""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import torch

import funcpipe as fp
import funcpipe._src as private
from funcpipe._src.core import context as contexts
from funcpipe._src.core.context import PlainContext, bind_context, current, tap

MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(private.__path__, f"{private.__name__}.")
]


def test_the_table_names_every_context() -> None:
    """A further context needs a line in the table of `core/context.py`."""
    found, todo = {}, [PlainContext]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        if kind.__module__.startswith("funcpipe."):  # not one that another test defines
            room, name = kind.__module__.rsplit(".", 2)[1:]
            found[kind.__name__] = f"{room}/{name}.py"
    assert found == dict(re.findall(r"\| `(\w+)` \| ``([\w/.]+)``", contexts.__doc__ or ""))


def test_four_context_variables() -> None:
    sources = [Path(module.__file__ or "").read_text() for module in MODULES]
    names = re.findall(r'ContextVar\(\s*"(\w+)"', "".join(sources))
    assert sorted(names) == [
        "funcpipe_axes",
        "funcpipe_context",
        "funcpipe_rank",
        "funcpipe_sequence",
    ]


def test_plain_unless_one_is_bound() -> None:
    outer, inner = PlainContext(), PlainContext()
    default = current()
    assert type(default) is PlainContext and default.is_plain
    with bind_context(outer):
        with bind_context(inner):
            assert current() is inner
        assert current() is outer
    assert current() is default


def test_a_context_inside_a_tap_is_tapped_too() -> None:
    loss, weight = fp.value_and_grad(lambda p, b: (p * b).sum()), torch.ones(2)
    inner = PlainContext()
    with tap() as seen:
        with bind_context(inner):
            loss(weight, torch.ones(2))
        loss(weight, torch.ones(2))
    assert [call[0] is inner for call in seen] == [True, False]
    loss(weight, torch.ones(2))
    assert len(seen) == 2
