"""Processes of Ray that end with the node that started them.

Ray ends them too, but one that is told to exit by two at once may wait for itself for ever (seen: SIGTERM from its
node, and word that its owner is gone), and would keep its memory and its GPU.
"""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from typing import Final

PR_SET_PDEATHSIG: Final = 1
LOOK_SECONDS: Final = 2.0


def end_with_parent() -> None:
    """Have this process ended when the one that started it is gone, whatever it is doing then."""
    parent = os.getppid()
    if _started_by_main_thread(parent):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(parent,), name="parent", daemon=True).start()


def _started_by_main_thread(parent: int) -> bool:
    """Return whether the main thread of `parent` has started this process; the signal comes when that thread ends."""
    try:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text(encoding="ascii").split()
    except OSError:
        return False
    return str(os.getpid()) in children


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os._exit(1)
