"""Checks of process groups over gloo, in four processes that are started once: every check runs in
all of them.

In: checks, functions of a rank that make communicators of their own. Out: what each returned on
every rank, or the text of its error.
"""

from __future__ import annotations

import threading
import traceback
import warnings

import torch
import torch.distributed as dist

from funcpipe._src.comm.process_group import ProcessGroupCommunicator
from funcpipe._src.core.mesh import Mesh
from funcpipe._src.runtime.launch import launch

GRID = Mesh(pipe=2, data=2)
LINE = Mesh(pipe=4)
ZEROS = torch.zeros(2)


def communicator(mesh=GRID, timeout=60.0):
    return ProcessGroupCommunicator(mesh, "cpu", timeout=timeout)


def launched(checks):
    """Every rank's results, by the name of a check."""
    return launch(run_checks, 4, checks, timeout=90)


def run_checks(checks):
    """In each process: every check's result, or the text of its error."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    keeper = communicator()  # so that the default group lives from the first check to the last
    out = {}
    for check in checks:
        try:
            out[check.__name__] = True, check()
        except Exception:
            out[check.__name__] = False, traceback.format_exc()
        keeper.exchange_digest(0)  # the next check's communicator may have a short timeout
    keeper.close()
    assert not dist.is_initialized()
    assert not [t for t in threading.enumerate() if t.name == "funcpipe-failure-watch"]
    return out


def result(results, check):
    """What each rank's check returned."""
    for rank, (fine, value) in enumerate(r[check.__name__] for r in results):
        assert fine, f"rank {rank}: {value}"
    return [r[check.__name__][1] for r in results]
