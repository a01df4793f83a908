"""Programs of Triton's interpreter that run at the same time, as those of a GPU do.

The interpreter runs a kernel's programs one after the other. Here each is a thread, one of which
goes on at a time, until it ends or waits for the others.
"""

import threading
import time
from contextlib import contextmanager
from functools import wraps
from inspect import signature

import numpy as np
import triton.language as tl  # where the interpreter looks for it: beside the kernel

from tl1kernels.backends import triton_teams

PATIENCE = 60.0  # seconds: who waits longer does so for ever


@contextmanager
def at_once(n, monkeypatch):
    """Run `n` programs of the kernel of teams at a time; yield a list with an entry a wait."""
    kernel, waits = triton_teams.split_kernel, []
    turn, slots = threading.Lock(), threading.Semaphore(n)
    threads, errors, grid = [], [], []
    run, rewrite = kernel.run, kernel.rewrite

    def wait(ready):
        waits.append(1)
        since = time.monotonic()
        while not int(tl.load(ready)):
            turn.release()
            time.sleep(0)
            turn.acquire()
            if errors or time.monotonic() - since > PATIENCE:
                raise RuntimeError("waits for a program that failed, or has not begun")

    def interpreted():
        function = rewrite()

        def program(arguments):
            try:
                with turn, np.errstate(all="ignore"):
                    function(**arguments)
            except Exception as error:
                errors.append(error)
            finally:
                slots.release()

        @wraps(function)
        def begin(**arguments):
            slots.acquire()
            threads.append(threading.Thread(target=program, args=(arguments,)))
            threads[-1].start()
            if len(threads) == grid[0]:  # the interpreter's functions are there until this returns
                for thread in threads:
                    thread.join()
                threads.clear()
                if errors:
                    raise errors[0]

        begin.__signature__ = signature(function)
        return begin

    def launch(*arguments, **options):
        grid[:] = options["grid"]
        return run(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(triton_teams, "_wait", wait)
        patch.setattr(kernel, "rewrite", interpreted)
        patch.setattr(kernel, "run", launch)
        yield waits
