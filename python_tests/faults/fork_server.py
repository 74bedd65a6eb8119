"""Started by conftest.py: the program `sela` again and again, each time in a process of its own, without the imports.

It has imported what a run imports, and started no thread; a request on standard input forks it. The child is then the
program with the arguments asked for: it runs to its own end, its exit status and the end of the interpreter included.
"""

import contextlib
import gc
import json
import os
import resource
import select
import signal
import sys
import traceback

import sklearn.datasets  # noqa: F401
import torch._dynamo
import torch.utils.tensorboard

import sela_ext.training.launch
import sela_ext.training.loop
import sela_ext.training.machine
from sela_ext.cli import main


def serve():
    """Answer requests; returns only in a child, with its request."""
    children = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["do"] == "wait":
            pid = asked["pid"]
            status = None
            if select.select([children[pid]], [], [], asked["seconds"])[0]:
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.close(children.pop(pid))
            answer = {"status": status}
        else:
            assert len(os.listdir("/proc/self/task")) == 1, "a thread would not live on in the child"
            pid = os.fork()
            if pid == 0:
                return asked
            children[pid] = os.pidfd_open(pid)
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    sys.exit(0)


def become(asked):
    """Take standard output, environment, limits and signals as asked."""
    with open(asked["printed"], "ab") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
    if asked["reader"] == "gone":
        ends = os.pipe()
        os.dup2(ends[1], 1)
        for end in ends:
            os.close(end)
    elif asked["reader"] == "closed":
        os.close(1)
        sys.stdout = None
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    os.environ.update(asked["environment"])
    if asked["memory"] is not None:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + asked["memory"],) * 2)
    if asked["file_size"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_size"],) * 2)
    for number in (signal.SIGINT, signal.SIGTERM):  # those who started us may ignore them
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if asked["same_signal"] is not None:
        sela_ext.training.machine._SAME_SIGNAL = asked["same_signal"]
    if asked["folder"] is not None:
        os.chdir(asked["folder"])


def quiet_imports():
    """What a run imports on its way, brought in once; none of it starts a thread."""
    for name in ("triton", "torchvision", "PIL.Image", "matplotlib"):
        with contextlib.suppress(ImportError):
            __import__(name)


if __name__ == "__main__":
    quiet_imports()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what is here stays: no child need look through it at its end
    print(json.dumps({"ready": os.getpid()}), flush=True)
    request = serve()
    become(request)
    if not request["quick"]:
        main(request["arguments"])
    try:
        main(request["arguments"])
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    os._exit(status)
