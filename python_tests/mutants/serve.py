"""Runs tests on request, each time in a fork of a process that has imported what they need (the arguments) already.

One request per line on standard input, one answer per line on standard output, both JSON. A request names the folder
of the test module under trial (`build`), the tests, the order in which they are likely to fail, and how long each may
take. The answer says how the run ended and, where a test failed, which one. What takes too long is ended.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


class Course:
    """Puts likely failures first and tells the parent, over a pipe, which test runs and which one failed."""

    def __init__(self, order: list[str], pipe: int) -> None:
        self.rank = {name: place for place, name in enumerate(order)}
        self.pipe = pipe
        self.began = 0.0

    def pytest_configure(self) -> None:
        import hypothesis

        hypothesis.settings.register_profile(
            "mutants",
            database=None,
            derandomize=True,
            phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # that it fails is enough: nothing is shrunk
        )
        hypothesis.settings.load_profile("mutants")

    def tell(self, **what: Any) -> None:
        os.write(self.pipe, (json.dumps(what) + "\n").encode())

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items.sort(key=lambda item: self.rank.get(item.nodeid, len(self.rank)))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.began = time.monotonic()
        self.tell(start=nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            why = report.longrepr.reprcrash.message if hasattr(report.longrepr, "reprcrash") else str(report.longrepr)
            self.tell(failed=report.nodeid, why=why.strip().split("\n")[0][:300])

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.tell(done=nodeid, seconds=time.monotonic() - self.began)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.tell(failed=report.nodeid or "collection", why=str(report.longrepr).strip().split("\n")[-1][:300])


def run_tests(request: dict[str, Any], pipe: int) -> int:
    """What a forked child does."""
    import pytest

    os.environ["SELA_SIMT_BUILD"] = request["build"]
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-o", "timeout=0", "-m", request["markers"]]
    options += ["-x"] if request["stop"] else []
    return int(pytest.main([*options, *request["tests"]], plugins=[Course(request["order"], pipe)]))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Fork, watch, and end what takes too long."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setsid()
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 70
        try:
            code = run_tests(request, writing)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(writing)

    limits, default = request["limits"], float(request["limit"])
    deadline = time.monotonic() + default
    buffer, running, failed, why, late = b"", "", "", "", False
    seconds: dict[str, float] = {}
    while True:
        ready, _, _ = select.select([reading], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            late = True
            os.killpg(child, signal.SIGKILL)
            break
        got = os.read(reading, 65536)
        if not got:
            break
        *lines, buffer = (buffer + got).split(b"\n")
        for line in lines:
            what = json.loads(line)
            if "start" in what:
                running = what["start"]
                deadline = time.monotonic() + float(limits.get(running, default))
            elif "failed" in what and not failed:
                failed, why = what["failed"], what["why"]
            elif "done" in what:
                seconds[what["done"]] = what["seconds"]
                running = ""
    os.close(reading)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if late:
        ended = "time-out"
    elif code < 0:
        ended = f"signal {-code}"
    elif code == 0:
        ended = "passed"
    elif code == 1 and failed:
        ended = "failed"
    else:
        ended = f"exit {code}"
    return {"ended": ended, "test": failed or running, "why": why, "seconds": seconds}


def main() -> None:
    os.chdir(ROOT)
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder
    main()
