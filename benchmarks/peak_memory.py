"""The peak memory of a process."""

from pathlib import Path


def resident_peak_gb() -> float:
    """Return this process's own peak; `ru_maxrss` would start from that of the process which it was forked from."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return int(status["VmHWM"].split()[0]) / 2**20
