"""Start the processes of a mesh on this machine, with torch's own elastic launcher.

The processes are the launcher's *workers*. A worker that fails leaves a report in a file: when,
which error, the traceback. The cause of a failure is the earliest report of an error that does not
follow from another rank's.

In: a function, how many processes. Out: its results in rank order, or one RankError with the cause.
"""

from __future__ import annotations

import contextlib
import json
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from funcpipe._src.comm.failure_watch import one_line
from funcpipe._src.runtime.spmd_runner import leave
from funcpipe.errors import RankError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
_LOGGERS = ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn")


def launch(
    fn: Callable[..., Any], nprocs: int, *args: Any, timeout: float | None = None
) -> list[Any]:
    """Run ``fn(*args)`` in ``nprocs`` new processes of this machine, which are the ranks of a mesh.

    In each of them the environment is what torchrun sets, so that ``fp.spmd`` finds the others. The
    processes do not share this one's memory: ``fn``, its arguments and results are pickled, and a
    script that launches needs ``if __name__ == "__main__":`` around it. They are forked from a
    server that has imported torch, which stays for the next launch.

    Args:
        fn: an importable function, or one of the script that runs.
        nprocs: the number of processes.
        args: what ``fn`` is called with, the same in each process.
        timeout: seconds after which a rank that has not finished counts as failed; without it, none
            does.

    Returns:
        the result of every rank, in rank order.

    Raises:
        RankError: a rank failed; the message names the first one and its error, a note has the
            traceback. The other processes were stopped. Or this process got a signal, and has a
            handler of its own for it that returned.
        KeyboardInterrupt: by Ctrl-C, after the processes were stopped.

    Example::

        def hello(name):
            return f"{name} {os.environ['RANK']}"

        if __name__ == "__main__":
            print(fp.launch(hello, 2, "rank"))  # ['rank 0', 'rank 1']
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if nprocs < 1:
        raise ValueError(f"launch starts 1 process or more, not {nprocs}")
    stopped: signal.Signals | None = None
    multiprocessing.set_forkserver_preload([__name__])
    with tempfile.TemporaryDirectory(prefix="funcpipe-") as logs, _undisturbed():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nprocs,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="127.0.0.1:0",
            rdzv_configs={"is_host": True},
            local_addr="127.0.0.1",
            max_restarts=0,
            start_method="forkserver",
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            job = Job(fn, args, timeout, logs, dict(os.environ))
            results = elastic_launch(config, _worker)(job, nprocs)
        except ChildFailedError as error:
            raise _cause(error.failures, Path(logs)) from None
        except SignalException as error:
            stopped = signal.Signals(error.sigval)
    if stopped is not None:
        # Now that the workers are gone, it does to this process what it does without a launch.
        signal.raise_signal(stopped)
        raise RankError(f"the ranks were stopped: their launcher got {stopped.name}")
    return [pickle.loads(results[rank]) for rank in range(nprocs)]


# --- in the worker --------------------------------------------------------------------------------


class Job(NamedTuple):
    """What a worker does, in the environment of the process that launched it."""

    fn: Callable[..., Any]
    args: tuple
    timeout: float | None
    logs: str
    environment: dict[str, str]


# What the launcher sets for each worker; all else a worker has from the server.
_OF_WORKER = (
    "GROUP_",
    "LOCAL_",
    "MASTER_",
    "RANK",
    "ROLE_",
    "TORCHELASTIC_",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING",
    "WORLD_SIZE",
)


def _take_over(environment: dict[str, str]) -> None:
    """Make a process's environment, as the server started with it, that of the launching one."""
    own = {name: text for name, text in os.environ.items() if name.startswith(_OF_WORKER)}
    os.environ.clear()
    os.environ.update(environment | own)


def _worker(job: Job, nprocs: int) -> bytes:
    """Run the function as one rank; its result, pickled."""
    _take_over(job.environment)
    fn, args, timeout, logs, _ = job
    rank = int(os.environ["RANK"])
    torch.set_num_threads(max(1, _cores() // nprocs))
    _name_loopback()
    timer = threading.Timer(timeout or 0, _expire, (rank, timeout, Path(logs)))
    timer.daemon = True
    if timeout is not None:
        timer.start()
    try:
        # Pickled here: tensors sent through the launcher's queue would need this process to outlive
        # the reading.
        result = pickle.dumps(fn(*args))
        leave()  # the launcher keeps this process until all have returned: none waits for it
        return result
    except Exception as error:
        _report(rank, error, traceback.format_exc(), Path(logs))
        if isinstance(error, RankError):
            # The launcher ends all workers with the first: let the cause write its report.
            time.sleep(0.3)
        raise
    finally:
        timer.cancel()


def _name_loopback() -> None:
    """Tell gloo to use the loopback interface.

    Otherwise gloo looks the host name up, and complains where that fails.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return
    for _, name in socket.if_nameindex():
        if name in ("lo", "lo0"):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _expire(rank: int, timeout: float, logs: Path) -> None:
    """End this process, which has not finished in time, with a report of where it stood."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    where = "".join(traceback.format_stack(frame)) if frame else ""
    _report(rank, TimeoutError(f"not finished after {timeout:g} s"), where, logs)
    os._exit(1)


def _report(rank: int, error: BaseException, trace: str, logs: Path) -> None:
    report = Report(
        rank=rank,
        time=time.time(),
        follows=isinstance(error, RankError),
        text=one_line(error),
        trace=trace,
    )
    # Written elsewhere and renamed: the process may be stopped at any time, and half a report is
    # none.
    part = logs / f"report-{rank}.part"
    part.write_text(json.dumps(report))
    part.rename(logs / f"report-{rank}.json")


# --- in the caller --------------------------------------------------------------------------------


class Report(NamedTuple):
    """What a worker that fails leaves behind."""

    rank: int
    time: float
    follows: bool  # from another rank's failure
    text: str
    trace: str


def _cause(failures: dict[int, Any], logs: Path) -> RankError:
    """The error to raise for what the launcher saw (it sees one failure) and the workers
    reported."""
    found = [Report(*json.loads(path.read_text())) for path in logs.glob("report-*.json")]
    reports = sorted(found, key=lambda report: report.time)
    causes = [report for report in reports if not report.follows]
    reported = {report.rank for report in reports}
    if not causes:
        for rank, failure in failures.items():
            if rank not in reported:
                return RankError(f"rank {rank} failed: {_end(failure.exitcode)}")
    report = (causes or reports)[0]
    text = f"rank {report.rank} failed: {report.text}"
    if report.follows:
        text = report.text.removeprefix("RankError: ")
    error = RankError(text)
    error.add_note(f"in rank {report.rank}:\n{report.trace}")
    return error


def _end(exitcode: int) -> str:
    if exitcode < 0:
        return f"ended by {signal.Signals(-exitcode).name}"
    return f"exited with code {exitcode}"


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Restore what the launcher changes in this process.

    That is signal handlers and one environment variable. The launcher's pages of log about a
    failure are kept off the console: the error that is raised tells it.
    """
    variable = "TORCHELASTIC_SIGNALS_TO_HANDLE"
    before = os.environ.get(variable)
    with contextlib.ExitStack() as stack:
        for name in _LOGGERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                stack.callback(signal.signal, number, signal.getsignal(number))
        try:
            yield
        finally:
            os.environ.pop(variable, None)
            if before is not None:
                os.environ[variable] = before
