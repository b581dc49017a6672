"""Says in a few words what a value is, for messages.

In: any value. Out: a text such as "a list of 3".
"""

from __future__ import annotations

from typing import Any

import torch


def describe(value: Any) -> str:
    """What a value is, for messages.

    >>> describe(None), describe(3), describe(torch.ones(2))
    ('None', 'an int', 'a tensor of shape (2,) and dtype torch.float32')
    """
    if value is None:
        return "None"
    if type(value) in (list, tuple):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    name = type(value).__name__
    article = "an" if name[0] in "aeiou" else "a"
    return f"{article} {name}"
