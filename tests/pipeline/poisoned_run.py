"""A run some of whose pages end the process that touches them: magenta ones, at the operators that are named.

Run as a program: `python -m tests.pipeline.poisoned_run '{"options": {...}, "poisoned": {"Generate": "SIGSEGV"}}'`. It
prints one line of JSON: the error that ended the run, or its summary.
"""

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np

from operators.decode.documents import DecodeDocuments
from operators.generate import Generate
from operators.prepare import read_pictures
from operators.read import ReadPages, page_image
from pipeline import flow, owed, run
from schemas.errors import PagereelError, WorkerLostError

MAGENTA = (255, 0, 255)


def is_poison(pixels):
    """Return whether more than half of an image, or of its slices, is magenta."""
    triples = np.frombuffer(pixels, np.uint8).reshape(-1, 3).astype(int)
    return bool((np.abs(triples - MAGENTA).max(axis=1) < 40).mean() > 0.5)


def die(how):
    """End this process as `how` says, after a line in the file that counts deaths."""
    with open(os.environ["POISON_DEATHS"], "a", encoding="utf-8") as file:
        file.write(f"{how}\n")
    if how == "lost":
        raise WorkerLostError("the device failed: an illegal address")
    if how == "unfit":
        raise WorkerLostError("the model fails on a small request")
    if how == "SIGSEGV":
        # A read at address 0, as a fault in native code is.
        ctypes.string_at(0)
    os.kill(os.getpid(), getattr(signal, how))
    time.sleep(60)


def how_to_die(name):
    return json.loads(os.environ["POISONED"]).get(name)


def kill_workers(seed, count):
    """Kill workers of this process's Ray from outside, at random times, until `count` are dead."""
    chance = random.Random(seed)
    for _ in range(count):
        time.sleep(chance.uniform(0.5, 6.0))
        while not (workers := workers_of(os.getpid())):
            time.sleep(0.2)
        with open(os.environ["POISON_DEATHS"], "a", encoding="utf-8") as file:
            file.write("outside\n")
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(sorted(workers)), signal.SIGKILL)


def workers_of(pid):
    """Return the workers of flows among the descendants of a process."""
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            found += workers_of(child)
            if b"MapWorker" in Path(f"/proc/{child}/cmdline").read_bytes():
                found.append(int(child))
    return found


class PoisonedGenerate(Generate):
    def __init__(self, config):
        if how_to_die("Generate") == "built":
            die("SIGKILL")
        super().__init__(config)
        if how_to_die("Generate") == "unfit":
            die("unfit")

    def outcomes(self, table):
        how = how_to_die("Generate")
        for row in range(table.num_rows if how else 0):
            if self.at_risk(table)[row] and (how == "any" or is_poison(read_pictures(table, row).pixels)):
                die("SIGKILL" if how == "any" else how)
        return super().outcomes(table)


class PoisonedReadPages(ReadPages):
    def _read(self, row):
        if is_poison(np.ascontiguousarray(page_image(row))):
            die(how_to_die("ReadPages"))
        return super()._read(row)


class PoisonedDecodeDocuments(DecodeDocuments):
    def stream(self, table):
        for page in super().stream(table):
            if any(image is not None and is_poison(image) for image in page["image"].to_pylist()):
                die(how_to_die("DecodeDocuments"))
            yield page


POISONED = {
    kind.__name__.removeprefix("Poisoned"): kind
    for kind in (PoisonedGenerate, PoisonedReadPages, PoisonedDecodeDocuments)
}
for name, kind in POISONED.items():
    # Rows name the operator that failed, and the steps after it go by that.
    kind.__name__ = name


def poisoned_flow(config, *, poisoned, batch_rows):
    """Return the flow of a run, with operators that die and other batches."""
    made = flow.record_flow(config)

    def changed(step):
        kind = POISONED[step.name] if step.name in poisoned else step.operator
        rows = batch_rows.get(step.name, step.rows_per_batch)
        return dataclasses.replace(step, operator=kind, rows_per_batch=rows)

    heads = {name: [changed(step) for step in steps] for name, steps in made.heads.items()}
    return dataclasses.replace(made, heads=heads, trunk=[changed(step) for step in made.trunk])


def main():
    asked = json.loads(sys.argv[1])
    poisoned = asked.get("poisoned", {})
    os.environ["POISONED"] = json.dumps(poisoned)
    os.environ["POISON_DEATHS"] = asked["deaths"]
    Path(asked["deaths"]).touch()
    owed.record_flow = functools.partial(poisoned_flow, poisoned=poisoned, batch_rows=asked.get("batch_rows", {}))
    if "kills" in asked:
        threading.Thread(target=kill_workers, kwargs=asked["kills"], daemon=True).start()
    began = time.monotonic()
    try:
        told = {"statuses": run(**asked["options"]).statuses}
    except PagereelError as error:
        told = {"error": type(error).__name__, "message": str(error)}
    sys.stdout.write(json.dumps(told | {"seconds": round(time.monotonic() - began, 1)}) + "\n")


if __name__ == "__main__":
    main()
