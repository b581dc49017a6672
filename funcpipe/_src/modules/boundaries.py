"""Boundaries in a module: after which submodules it may be cut.

In: paths with wildcards, or a predicate.
Out: the paths of submodules, and the forward hook that marks a boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.utils import _pytree as torch_pytree

from funcpipe._src.core.primitives.stage_boundary import stage_boundary
from funcpipe.errors import ModuleError

Boundaries = Iterable[str] | Callable[[str, nn.Module], bool]


def mark_boundary(module: nn.Module, args: Any, out: Any) -> Any:
    """A forward hook: a boundary. (Torch's pytrees know the outputs of Hugging Face models.)"""
    leaves, spec = torch_pytree.tree_flatten(out)
    return torch_pytree.tree_unflatten(stage_boundary(leaves), spec)


def boundary_paths(module: nn.Module, boundaries: Boundaries) -> list[str]:
    """The paths of the submodules after which there is a boundary, each submodule once.

    Raises:
        ModuleError: a boundary matches nothing, or a submodule that is never called.
    """
    submodules = dict(module.named_modules(remove_duplicate=False))
    submodules.pop("", None)
    first_path: dict[int, str] = {}
    for path in reversed(_selected(submodules, boundaries)):
        first_path[id(submodules[path])] = path
    for path in first_path.values():
        submodule = submodules[path]
        if type(submodule).forward is nn.Module.forward:
            raise ModuleError(
                f"from_module: boundary {path!r} is a {type(submodule).__name__}, which holds "
                f"submodules and is never called itself; write '{path}.*' for what is in it"
            )
    return list(first_path.values())


def _selected(submodules: dict[str, nn.Module], boundaries: Boundaries) -> list[str]:
    if callable(boundaries):
        found = [path for path, submodule in submodules.items() if boundaries(path, submodule)]
        if not found:
            raise ModuleError(
                "from_module: boundaries, a predicate, is true of no submodule: there is nowhere "
                "to cut"
            )
        return found
    if isinstance(boundaries, str):
        raise ModuleError(
            f"from_module: boundaries={boundaries!r}; write a list of paths: [{boundaries!r}]"
        )
    found = []
    for pattern in boundaries:
        found += _matching(pattern, list(submodules))
    return found


def _matching(pattern: str, paths: list[str]) -> list[str]:
    found = [path for path in paths if _matches(pattern, path)]
    if not found:
        some = ", ".join(map(repr, paths[:8]))
        if len(paths) > 8:
            some += ", ..."
        raise ModuleError(
            f"from_module: boundary {pattern!r} matches no submodule. A path is one of "
            "named_modules(), and * stands for what is between two dots; this module has "
            f"{some or 'no submodules'}"
        )
    return found


def _matches(pattern: str, path: str) -> bool:
    """Whether a path matches, name by name.

    >>> _matches("layers.*", "layers.0"), _matches("layers.*", "layers.0.linear")
    (True, False)
    """
    wanted = pattern.split(".")
    names = path.split(".")
    return len(wanted) == len(names) and all(map(fnmatchcase, names, wanted))
