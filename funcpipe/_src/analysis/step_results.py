"""What a step may return: the state that it takes, leaf by leaf, and metrics that are no
parameters.

In: a run of the step on tagged fakes. Out: the structure of the state, and the parameter of every
leaf; or a StateError.
"""

from __future__ import annotations

from typing import Any

from funcpipe._src.analysis.expressions import Seen
from funcpipe._src.analysis.tags import Tags
from funcpipe._src.core import pytree as tree
from funcpipe._src.core.containers import check_containers
from funcpipe.errors import StateError

Params = tuple[int | None, ...]  # for every leaf of a state


def check_results(seen: Seen, tags: Tags) -> tuple[Any, Params]:
    """Check what the step returned.

    Returns:
        the structure of the state, and for every leaf its parameter, or None.

    Raises:
        StateError: a container that trees do not look into; a state of another structure, or with
            a leaf that belongs to another parameter; a metric that is a parameter.
    """
    check_containers("the step returns state: state", seen.state)
    check_containers("the step returns metrics: metrics", seen.metrics)
    spec, params = _params(seen.init_state, tags)
    new_spec, new_params = _params(seen.state, tags)
    if spec != new_spec:
        raise StateError(
            f"the step returns a state of another structure than it takes: {new_spec} instead of "
            f"{spec}"
        )
    paths = tree.paths(seen.init_state)
    for path, before, after in zip(paths, params, new_params, strict=True):
        if before != after:
            raise StateError(
                f"state{path} belongs to {_owner(before, tags)} before the step and to "
                f"{_owner(after, tags)} after it: keep its place and shape"
            )
    _check_metrics(seen.metrics, tags)
    return spec, params


def _params(state: Any, tags: Tags) -> tuple[Any, Params]:
    leaves, spec = tree.flatten(state)
    return spec, tuple(map(tags.of, leaves))


def _owner(param: int | None, tags: Tags) -> str:
    return "no parameter" if param is None else tags.name(param)


def _check_metrics(metrics: Any, tags: Tags) -> None:
    paths = tree.paths(metrics)
    for path, leaf in zip(paths, tree.leaves(metrics), strict=True):
        name = tags.name_of(leaf)
        if name is not None:
            raise StateError(
                f"metrics{path} is {name}, which no rank holds alone; reduce it with fp.global_sum"
            )
