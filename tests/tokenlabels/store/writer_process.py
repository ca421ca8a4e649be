"""Writes label sets in forked children that can be killed or kept short of disk; test_faults.py talks to it in JSON.

Forked after the imports, a trial costs what its writing costs, and a kill falls into the writing. Started as
`writer_process.py WORK`, where WORK is a pickle of (LabelSet, {stem: ScoreMaps}); then one command per line:

labels          folder of the label set
stems           the shards to write
rewrite         whether finished shards are written again
kill_at_step    number of the change to the file system before which the child is killed with SIGKILL, or null
delay_seconds   the kill comes from outside, so long after the child got to that step; null: exactly there
max_file_bytes  limit on the size of a file, or null

The answer has `killed`, and for a child that came to its end `num_steps` and the `error` it met: [type, message].
"""

import itertools
import json
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenlabels.store import (
    ImageLevelRecord,
    LabelSet,
    SourceRecord,
    claim_shard,
    create_label_set,
    manifest_path,
)
from tokenlabels.types import ScoreMaps

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
STEP_REACHED = b"step reached\n"

Work = tuple[LabelSet, dict[str, ScoreMaps]]


def write(labels: Path, work: Work, stems: list[str], *, rewrite: bool) -> None:
    """What a job does: join the label set, then one shard after the other."""
    info = create_label_set(labels, work[0])
    for stem in stems:
        maps = work[1][stem]
        if rewrite or not manifest_path(labels, stem).exists():
            with claim_shard(labels, stem, info) as writer:
                writer.write(
                    maps,
                    source=SourceRecord(name=f"{stem}.tar", size_bytes=10_240, num_samples=len(maps)),
                    image_level=ImageLevelRecord(num_labelled=0, num_agreeing=0),
                    versions={},
                )


def count_steps(command: dict[str, Any], pipe: int) -> Iterator[int]:
    """A counter of what this process changes on the file system; at the step asked for it dies, or says so."""
    counter = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        is_step = event in CHANGES or (event == "open" and arguments[2] & WRITING)
        if is_step and next(counter) == command["kill_at_step"]:
            if command["delay_seconds"] is None:
                os.kill(os.getpid(), signal.SIGKILL)
            os.write(pipe, STEP_REACHED)

    sys.addaudithook(hook)
    return counter


def run_child(command: dict[str, Any], work: Work, pipe: int) -> None:
    # A kill loses nothing that the kernel holds, and flushing is most of the time of a small write.
    setattr(os, "fsync", os.fstat)  # noqa: B010 (mypy would check the assignment)
    error = None
    if command["max_file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (command["max_file_bytes"], resource.RLIM_INFINITY))
    counter = count_steps(command, pipe)
    try:
        write(Path(command["labels"]), work, command["stems"], rewrite=command["rewrite"])
    except (OSError, ValueError) as caught:
        error = [type(caught).__name__, str(caught)]
    os.write(pipe, json.dumps({"killed": False, "num_steps": next(counter) - 1, "error": error}).encode())


def run_trial(command: dict[str, Any], work: Work) -> dict[str, Any]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        run_child(command, work, writing)
        os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:  # noqa: PTH123 (a descriptor, not a path)
        answer = pipe.readline()
        if answer == STEP_REACHED:
            time.sleep(command["delay_seconds"])
            os.kill(child, signal.SIGKILL)
            answer = pipe.readline()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return {"killed": True}
    assert status == 0, f"the child ended with {status}"
    return json.loads(answer)  # type: ignore[no-any-return]


if __name__ == "__main__":
    main_work: Work = pickle.loads(Path(sys.argv[1]).read_bytes())
    for line in sys.stdin:
        sys.stdout.write(json.dumps(run_trial(json.loads(line), main_work)) + "\n")
        sys.stdout.flush()
