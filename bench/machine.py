# SPDX-License-Identifier: Apache-2.0
"""The machine's description, and the CPU that other processes used while a case ran."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

__all__ = ["CpuTimes", "LoadWatch", "describe", "thread_times"]

TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")
# Above these a case is marked NOISY: in CPUs.
OTHERS_MAX = 0.10
STEAL_MAX = 0.02


def _first(path: str, default: str = "?") -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return default


def describe(image_dir: Path) -> dict[str, Any]:
    """Describe the machine: CPU, cores, memory, kernel, and the settings that affect figures."""
    info = dict(
        line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line
    )
    cpu = {key.strip(): value.strip() for key, value in info.items()}
    hypervisor = "hypervisor" in cpu.get("flags", "").split()
    device = os.stat(image_dir).st_dev
    queue = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve()
    queue = queue if (queue / "queue").exists() else queue.parent
    return {
        "cpu": cpu.get("model name", platform.machine()),
        "cpus": os.cpu_count(),
        "virtual": hypervisor,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": f"{platform.release()} {platform.version()}",
        "python": platform.python_version(),
        "shmem_thp": _first("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
        "fault_around_bytes": _first("/sys/kernel/debug/fault_around_bytes"),
        "readahead_kb": _first(str(queue / "queue/read_ahead_kb")),
        "loadavg": os.getloadavg(),
    }


@dataclass(frozen=True)
class CpuTimes:
    """CPU seconds of the whole machine since it started."""

    busy: float
    steal: float

    @classmethod
    def read(cls) -> Self:
        """Read /proc/stat."""
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        user, nice, system, _idle, _iowait, irq, softirq, steal = (
            int(field) * TICK_SECONDS for field in fields[:8]
        )
        return cls(user + nice + system + irq + softirq, steal)


class LoadWatch:
    """Measures the CPU that other processes used between its construction and read().

    Not counted as others: this process with the children it has waited for, and pids.
    """

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._began = time.monotonic()
        self._times = CpuTimes.read()
        self._ours = self._our_seconds()
        self._loadavg = os.getloadavg()

    def _our_seconds(self) -> float:
        own = os.times()
        total = own.user + own.system + own.children_user + own.children_system
        for pid in self._pids:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(int(field) for field in fields[11:15]) * TICK_SECONDS
        return total

    def read(self) -> dict[str, Any]:
        """Return loadavg before and after, CPUs others used, CPUs stolen, and whether noisy."""
        seconds = time.monotonic() - self._began
        now = CpuTimes.read()
        ours = self._our_seconds() - self._ours
        others = max(0.0, now.busy - self._times.busy - ours) / seconds
        steal = (now.steal - self._times.steal) / seconds
        return {
            "seconds": seconds,
            "loadavg_before": self._loadavg[0],
            "loadavg_after": os.getloadavg()[0],
            "our_cpus": ours / seconds,
            "other_cpus": others,
            "stolen_cpus": steal,
            "noisy": others > OTHERS_MAX or steal > STEAL_MAX,
        }


def cpu_of(tid: int) -> int:
    """Return the CPU that a thread is on, or was on last."""
    fields = Path(f"/proc/{tid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[36])


def thread_times(pid: int) -> dict[str, dict[str, int]]:
    """Return the CPU use of a process's threads so far, added up by their names.

    run_ns on a CPU, wait_ns ready and waiting for one, and context switches.
    """
    total: dict[str, dict[str, int]] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            name = (task / "comm").read_text().strip()
            run_ns, wait_ns, _ = (task / "schedstat").read_text().split()
            status = (task / "status").read_text()
        except FileNotFoundError:
            continue
        switches = dict(line.split(":") for line in status.splitlines() if "ctxt_switches" in line)
        sums = total.setdefault(name, dict.fromkeys(("run_ns", "wait_ns", "slept", "preempted"), 0))
        sums["run_ns"] += int(run_ns)
        sums["wait_ns"] += int(wait_ns)
        sums["slept"] += int(switches["voluntary_ctxt_switches"])
        sums["preempted"] += int(switches["nonvoluntary_ctxt_switches"])
    return total
