"""Settings of the whole test suite.

Plain ``pytest`` runs the tests that are not marked ``slow``, on all cores; ``pytest -m ''`` runs
all of them. The tests of one file run in one process, so that what a file starts (processes, a
wheel) is started once.

A random test draws the same few cases every time, so that a run that fails is due to what was
changed. ``FUNCPIPE_PROFILE=ci`` draws more, and ``thorough`` many more, others each time. A case
that fails prints what repeats it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tests run beside one another, and some start processes of their own: one thread each.
torch.set_num_threads(1)

# Tracing makes an example slow by nature, and the first one slower than the rest.
_ALWAYS = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=5, derandomize=True, **_ALWAYS)
settings.register_profile("ci", max_examples=15, derandomize=True, **_ALWAYS)
settings.register_profile("thorough", max_examples=250, derandomize=False, **_ALWAYS)
_PROFILE = os.environ.get("FUNCPIPE_PROFILE", "quick")
settings.load_profile(_PROFILE)

# A test that waits for ever is stopped after this many seconds, so that the suite ends.
_LIMIT = 7200 if _PROFILE == "thorough" else 900

# A plain test takes less than this many seconds of CPU; one that takes more is named at the end.
_LONG = 5.0
_CPU = "seconds of CPU"
_START = pytest.StashKey[float]()


# ---- which tests run, and where


def _named(config: pytest.Config) -> list[str]:
    """The files and tests that the command line names."""
    return config.args if config.args_source is pytest.Config.ArgsSource.ARGS else []


def pytest_configure(config: pytest.Config) -> None:
    """A test that is named by its id runs, slow or not."""
    named = _named(config)
    if named and all("::" in name for name in named) and config.option.markexpr == "not slow":
        config.option.markexpr = ""


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """One file runs in this process: to start workers takes longer."""
    named = _named(config)
    one = len({name.split("::")[0] for name in named}) == 1
    return 0 if one and ".py" in named[0] else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


# ---- no test waits for ever


@contextlib.contextmanager
def _limited(item: pytest.Item) -> Iterator[None]:
    def expire(*_: Any) -> None:
        raise TimeoutError(f"{item.nodeid} has not ended after {_LIMIT} s")

    before = signal.signal(signal.SIGALRM, expire)
    signal.alarm(_LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Iterator[None]:
    with _limited(item):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with _limited(item):
        return (yield)


# ---- what a test takes


def _cpu() -> float:
    """Seconds of CPU of this process, and of those that it started and that have ended."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[_START] = _cpu()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[pytest.TestReport]:
    if call.when == "teardown":
        item.user_properties.append((_CPU, _cpu() - item.stash[_START]))
    return (yield)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Names the plain tests that take long: make them shorter, or mark them slow beside a short
    one."""
    teardowns = [
        report for report in terminalreporter.stats.get("", []) if report.when == "teardown"
    ]
    plain = [report for report in teardowns if "slow" not in report.keywords]
    # Examples in docstrings lie outside this folder, and are not measured.
    taken = {report.nodeid: dict(report.user_properties).get(_CPU, 0.0) for report in plain}
    long = {name: seconds for name, seconds in taken.items() if seconds > _LONG}
    if long and _PROFILE == "quick":
        terminalreporter.section(
            f"plain tests that took over {_LONG:g} s of {sum(taken.values()):.0f} s of CPU"
        )
        for name, seconds in sorted(long.items(), key=lambda pair: -pair[1]):
            terminalreporter.write_line(f"{seconds:.1f}s {name}")
