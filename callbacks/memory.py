"""How much memory a reading may use, so that it does not run into the limit of the machine or of the container."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

# Where Linux tells a container's limit and use, in the second and the first version of control groups.
_LIMITS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def free_memory(device: torch.device) -> float:
    """Bytes that can still be had on a device; infinity if that is not known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # What torch holds but does not use is free for its own allocations, though in pieces.
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return float("inf")
    return min(_available(Path("/proc/meminfo")), _left(_LIMITS))


def _available(meminfo: Path) -> float:
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        return 1024.0 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError, IndexError):  # not Linux
        return float("inf")


def _left(limits: Iterable[tuple[str, str]]) -> float:
    for limit, used in limits:
        try:
            return float(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
    return float("inf")
