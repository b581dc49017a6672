"""What a walk found: every place that a function may read, what is there, and how to see quickly
whether it is still.

In: places, one by one. Out: `Found`.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from funcpipe._src.analysis.host_places import identity_at
from funcpipe._src.analysis.host_shell import MISSING, Token, is_value, token

DEPTH = 12
LONGEST = 256

Read = Callable[[Any], Any]
Reads = list[tuple[Read, Any]]  # how to read something, and what
Objects = list[Any]
Numbers = list[int]


class Found:
    """The places that a walk found, and those that it has yet to look into.

    Args:
        written: the paths that functions were seen to write.
        tensors: whether what a tensor holds counts.
    """

    def __init__(self, written: set[str], tensors: bool) -> None:
        self.written = written
        self.tensors = tensors
        self.values: Objects = []  # pairs of a path and a `Token`
        # Of every entry of a dict: where it lies, what was there, and its number among values.
        self.dicts: Objects = []  # pairs of a dict and a key
        self.last: Objects = []
        self.getters: Reads = []
        self.places: Numbers = []
        self.sized: Objects = []  # what can get more entries, or fewer
        self.sizes: Numbers = []
        self.polls: Reads = []  # whatever else can change
        self.polled: Objects = []
        self.cells: Objects = []  # with what was in them
        self.lists: Objects = []  # with what was in them, which keeps its identities
        self.owners: dict[int, type] = {}  # by number among dicts: the class whose dict it is
        self.params: Objects = []
        self.kept: Objects = []  # so that no other object gets its number
        self.queue: deque[tuple] = deque()  # arguments of `Walk.visit`

    def put(self, path: str, value: Any, depth: int, whole: bool = False) -> bool:
        """Note what is at a place, and go there later; False where the function itself writes
        there."""
        if path in self.written:
            return False
        by_elements = self.tensors and is_small(value)
        noted = Token("Tensor", "a tensor") if by_elements else token(value)
        self.values.append((path, noted))
        if depth < DEPTH and not is_value(value):
            step = value, path, depth + 1, whole
            self.queue.append(step)
        return True

    def entry(
        self,
        box: Mapping,
        key: Any,
        path: str,
        depth: int,
        whole: bool = False,
    ) -> None:
        """A place in a dict."""
        if looks_up_itself(box):
            value = dict.get(box, key, MISSING)  # type: ignore[call-overload]
            if self.put(path, value, depth, whole):
                self.kept.append(value)
                self.poll(functools.partial(identity_at, key), box)
            return
        value = box.get(key, MISSING)
        if self.put(path, value, depth, whole):
            self.dicts.append((box, key))
            self.last.append(value)
            self.places.append(len(self.values) - 1)

    def size(self, box: Any) -> None:
        """The number of entries of something."""
        self.sized.append(box)
        self.sizes.append(len(box))

    def poll(self, read: Read, value: Any) -> None:
        """Something else that can change."""
        self.polls.append((read, value))
        self.polled.append(read(value))

    def group(self) -> None:
        """Have the entries of one dict read at once, in a sixth of the time."""
        numbers_in: dict[int, Numbers] = {}
        for number, (box, _) in enumerate(self.dicts):
            numbers = numbers_in.setdefault(id(box), [])
            numbers.append(number)
        order: Numbers = []
        for numbers in numbers_in.values():
            if len(numbers) == 1:
                numbers = numbers * 2  # of one key alone, a getter gives no tuple
            order += numbers
            entries = [self.dicts[number] for number in numbers]
            box, _ = entries[0]
            keys = [key for _, key in entries]
            self.getters.append((itemgetter(*keys), box))
        owners = {}
        for number, before in enumerate(order):
            if before in self.owners:
                owners[number] = self.owners[before]
        self.owners = owners
        self.dicts = [self.dicts[before] for before in order]
        self.last = [self.last[before] for before in order]
        self.places = [self.places[before] for before in order]


def looks_up_itself(box: Any) -> bool:
    """Whether a dict may look up its entries in a way of its own."""
    plain = type(box) in (dict, OrderedDict)
    return isinstance(box, dict) and not plain


def is_uncounted(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds nothing, or nobody counts its changes."""
    if isinstance(tensor, FakeTensor) or tensor.is_meta:
        return True
    return tensor.is_inference()


def is_small(value: Any) -> bool:
    """Whether a tensor is compared by its elements: reading them must not wait for a GPU."""
    if not isinstance(value, torch.Tensor) or is_uncounted(value):
        return False
    here = value.is_cpu and value.layout is torch.strided
    return here and value.numel() <= LONGEST
