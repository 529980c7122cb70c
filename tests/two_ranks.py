"""Starts a program on two ranks, ends it when it hangs, and reads what each rank has left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Results = dict[str, Any]
RANKS = (0, 1)
TIME_LIMIT = 120  # seconds for all scenarios of a launch; they take 20 on two idle cores


@dataclass
class Launch:
    """What a launch of both ranks left behind."""

    folder: Path
    codes: list[int | None]  # of each process that was started here; None: it hung, and was killed
    output: str

    @property
    def code(self) -> int | None:
        return self.codes[0]

    def __getitem__(self, scenario: str) -> tuple[Results, Results]:
        """The results of a scenario on rank 0 and rank 1."""
        files = [self.folder / f"{scenario}.{rank}.json" for rank in RANKS]
        if not all(file.exists() for file in files):
            how = "hung" if None in self.codes else f"ended with codes {self.codes}"
            pytest.fail(f"{scenario} did not end on both ranks; the launch {how}:\n{self.output[-6000:]}")
        first, second = (json.loads(file.read_text()) for file in files)
        assert (first["rank"], second["rank"], first["ranks"]) == (0, 1, 2)
        return first, second


def launch(program: str, group: str, folder: Path, apart: bool = False) -> Launch:
    """Run a group of scenarios on both ranks.

    Args:
        program: The file to run, as `program group folder`.
        group: The scenarios' group.
        folder: Where results go.
        apart: Start each rank here, as a cluster does; else rank 0 alone, from which Lightning starts rank 1.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment["OMP_NUM_THREADS"] = "1"
    places: list[dict[str, str]] = [{}]
    if apart:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        places = [{**meeting, "LOCAL_RANK": str(rank), "NODE_RANK": "0"} for rank in RANKS]
    log = folder / "output.txt"
    with log.open("w") as output:
        processes = [
            subprocess.Popen(
                [sys.executable, program, group, str(folder)],
                cwd=folder,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment | place,
                start_new_session=True,  # what a rank starts is ended with it
            )
            for place in places
        ]
        codes: list[int | None] = []
        deadline = time.monotonic() + TIME_LIMIT
        for process in processes:
            try:
                codes.append(process.wait(max(deadline - time.monotonic(), 1)))
            except subprocess.TimeoutExpired:
                codes.append(None)
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Launch(folder, codes, log.read_text())
