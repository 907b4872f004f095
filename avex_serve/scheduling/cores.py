"""How many cores this process may use."""

import math
import os
from pathlib import Path
from typing import Final

CGROUPS: Final = Path("/sys/fs/cgroup")
MEMBERSHIP: Final = Path("/proc/self/cgroup")


def usable_cores(cgroups: Path = CGROUPS, membership: Path = MEMBERSHIP) -> int:
    """Cores that this process may be scheduled on, or fewer where a container's quota allows less.

    A quota of one and a half cores counts as two: threads that wait for each other's turn lose less than a core
    that idles half the time.

    Args:
        cgroups: where the control groups are mounted, version 1 or 2.
        membership: which groups this process is in.
    """
    # Only Linux reports which cores a process may use.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *map(math.ceil, _quotas(cgroups, membership))]))


def threads_of_worker(workers: int) -> int:
    """Threads of each of these worker processes, which share the cores."""
    return max(1, usable_cores() // workers)


def _quotas(cgroups: Path, membership: Path) -> list[float]:
    """Cores by the quota of this process's group and of each group above it."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    quotas = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = cgroups / controllers if controllers else cgroups
        if not mount.is_dir():
            mount = cgroups / "cpu"  # where "cpu,cpuacct" is mounted under one of its names
        folder = mount / group.strip("/")
        # In a container the path is often the host's, while the container's own group is mounted as the root.
        for each in (folder, *folder.parents):
            if each.is_relative_to(mount) and (quota := _quota(each)) is not None:
                quotas.append(quota)
    return quotas


def _quota(group: Path) -> float | None:
    try:
        if (file := group / "cpu.max").is_file():  # version 2: "quota period" or "max period"
            quota, period = file.read_text().split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text().strip()  # version 1: -1 without one
            period = (group / "cpu.cfs_period_us").read_text().strip()
    except (OSError, ValueError):
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)
