"""Every error that funcpipe raises on purpose: one class per kind, all of them ``FuncpipeError``.

A message says what is wrong, where (pytree path, rank, axis or action), why, and what to write
instead.
"""

from __future__ import annotations


class FuncpipeError(Exception):
    """The base of every error that funcpipe raises on purpose."""


class MeshError(FuncpipeError):
    """A mesh cannot be built, or an axis is asked for that it lacks."""


class AxisError(FuncpipeError):
    """A collective names an axis that is not bound there, or gets a value of the wrong kind."""


class StackError(FuncpipeError):
    """The transforms on a step do not fit each other or the mesh."""


class BatchError(FuncpipeError):
    """A batch cannot be split as the transforms ask, or not without changing the loss."""


class TraceError(FuncpipeError):
    """The loss function cannot be traced into a graph that computes the same numbers."""


class CutError(FuncpipeError):
    """A traced loss cannot be cut at its stage boundaries."""


class StateError(FuncpipeError):
    """The step uses its state in a way that a rank, which holds a part of it, cannot repeat; or a
    runner gets a state that it cannot use."""


class ScheduleError(FuncpipeError):
    """A schedule is wrong: an action is missing, doubled or out of order, or ranks would wait for
    each other for ever."""


class DeadlockError(FuncpipeError):
    """Every in-process rank waits for another one; the message says where each of them stands."""


class MismatchError(FuncpipeError):
    """Ranks disagree about what they are about to run, or about the shapes of it."""


class RankError(FuncpipeError):
    """Another rank failed, or is gone; the message names it."""


class DeviceMemoryError(FuncpipeError):
    """A rank's device has less memory than a step takes."""


class PlanError(FuncpipeError, ValueError):
    """A plan cannot be drawn as asked."""


class OptimError(FuncpipeError, ValueError):
    """An optimizer has a setting out of range, or gets trees that do not fit each other."""


class CheckpointError(FuncpipeError):
    """A checkpoint cannot be saved, or what there is cannot be loaded into this run."""


class ModuleError(FuncpipeError):
    """A module cannot become a pure function, or gets tensors that are not its own."""


class SequenceError(FuncpipeError):
    """A rank's slice of the sequence cannot be proven to compute what one device computes of the
    whole."""
