"""The walls around model-written code, built with `sandbox_kernel` and `sandbox_syscalls`.

Two kinds, chosen by what the machine allows:

* `namespaces`: the warm parent process of all sessions (the zygote) enters user, mount, pid, network, IPC and hostname
  namespaces of its own and moves into a read-only root that holds Python, its packages, the system's libraries and
  four devices: no /proc, no /etc, no home. Each session gets its own user, mount and pid namespace below that, a
  private /tmp in memory with a size limit, and no identity but "nobody".
* `landlock`: where namespaces are forbidden (most containers). Landlock hides all files but those same ones. Nothing
  can be written, since no limit would hold for a folder on disk; no threads, since their number cannot be limited
  without a user namespace; no changes of modes and dates of files, which Landlock does not control. Not walled off:
  whether a file exists whose path one guesses, and its size and dates.

Both add: all capabilities dropped for good, limits on memory, processor time, file size and open files, and a seccomp
allowlist without sockets, new processes or programs. `none` has only these.
"""

import errno
import os
import resource
import signal
import socket
import stat
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from typing import Literal

from . import sandbox_kernel as kernel
from .sandbox_syscalls import build_filter, supported_machine

Isolation = Literal["namespaces", "landlock", "none"]

NOBODY = 65534
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
LANDLOCK_NEEDED = 3  # older versions let anyone truncate any file
MOST_THREADS = 32
MOST_OPEN_FILES = 128
MOST_FILES = 10_000
BEHIND = "/behind"  # where folders below /tmp can be seen besides, so that a session's own /tmp can show them again


@dataclass(frozen=True)
class Limits:
    """What one session may use; see `SandboxConfig`."""

    memory_mb: int
    cpu_seconds: int
    disk_mb: int


def readable_paths() -> list[str]:
    """Folders that Python needs to import what it has, outermost first: libraries and packages, nothing of a user's."""
    wanted = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    wanted |= {os.path.join(prefix, "lib") for prefix in (sys.prefix, sys.base_prefix)}
    wanted |= {path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")}
    wanted |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64"}
    paths: list[str] = []
    for path in sorted(path for path in wanted if os.path.isdir(path)):
        inside = next((outer for outer in paths if path.startswith(outer + "/")), None)
        if inside is None or os.path.realpath(path) != os.path.realpath(inside) + path.removeprefix(inside):
            paths.append(path)
    return paths


# ---------------------------------------------------------------------------------------------------------------------
# once, around all sessions


def enter_namespaces() -> bool:
    """Leave the host's namespaces for new ones; children are born in the new pid namespace.

    Returns:
        Whether a second identity, `NOBODY`, can be taken on inside. Root needs one: the kernel does not limit the
        number of root's processes, and root's own files must stay out of reach should all other walls fall.

    Raises:
        OSError: the machine does not allow it.
    """
    everything = (
        kernel.NEW_USER
        | kernel.NEW_MOUNTS
        | kernel.NEW_PIDS
        | kernel.NEW_IPC
        | kernel.NEW_HOSTNAME
        | kernel.NEW_NETWORK
    )
    user, group = os.geteuid(), os.getegid()
    if user != 0:
        _unshare(everything)
        _write("/proc/self/setgroups", "deny")
        _write("/proc/self/uid_map", f"{user} {user} 1")
        _write("/proc/self/gid_map", f"{group} {group} 1")
        return False
    # Only a process outside the new namespace may map two identities.
    entered, tell = os.pipe()
    inside = os.getpid()
    helper = os.fork()
    if helper == 0:
        os.close(tell)
        os.read(entered, 1)
        os._exit(0 if _map_identities(inside) else 1)
    os.close(entered)
    try:
        _unshare(everything)
    finally:
        os.close(tell)
        _, status = os.waitpid(helper, 0)
    return status == 0


def _unshare(namespaces: int) -> None:
    try:
        kernel.unshare(namespaces)
    except OSError as error:
        reasons = {
            errno.EPERM: "forbidden, by a container's seccomp profile or by a sysctl",
            errno.ENOSPC: "not allowed, or not so many (sysctl user.max_user_namespaces)",
        }
        reason = reasons.get(error.errno or 0, "not possible")
        raise OSError(f"new user namespaces are {reason} ({error.strerror})") from error


def _map_identities(process: int) -> bool:
    for identities, complete in ((f"0 0 1\n{NOBODY} {NOBODY} 1\n", True), ("0 0 1\n", False)):
        try:
            _write(f"/proc/{process}/uid_map", identities)
            _write(f"/proc/{process}/gid_map", identities)
            return complete
        except OSError:  # in a container whose root is the only user there is
            continue
    return False


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def enter_root(paths: list[str]) -> None:
    """Exchange the root for an empty, read-only one that shows these folders, at their own places, and `DEVICES`.

    Raises:
        OSError: the machine does not allow it, or has a kernel before 5.12.
    """
    sources = {path: os.path.realpath(path) for path in [*paths, *DEVICES]}
    kernel.keep_mounts_private()
    kernel.mount_tmpfs("/tmp", "mode=755,size=1m", kernel.NO_SETUID | kernel.NO_DEVICES | kernel.NO_PROGRAMS)
    os.mkdir("/tmp/old")
    kernel.pivot_root("/tmp", "/tmp/old")
    os.chdir("/")
    for path, source in sources.items():
        flags = kernel.READ_ONLY | kernel.NO_SETUID
        if path in DEVICES:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.mknod(path, stat.S_IFREG)
        else:
            os.makedirs(path, exist_ok=True)
            flags |= kernel.NO_DEVICES
        _show("/old" + source, path, flags)
        if path.startswith("/tmp/"):
            os.makedirs(BEHIND + path)
            _show("/old" + source, BEHIND + path, flags)
    kernel.detach("/old")
    os.rmdir("/old")
    os.makedirs("/tmp", exist_ok=True)
    kernel.restrict_mount("/", kernel.READ_ONLY)
    socket.sethostname("sandbox")


def _show(source: str, path: str, flags: int) -> None:
    kernel.bind(source, path)
    kernel.restrict_mount(path, flags)


def check_and_prepare(isolation: Isolation) -> None:
    """Compute once what every session of the same parent process needs.

    Raises:
        OSError: this kind of isolation is not possible here, as far as one can know without trying.
    """
    if isolation != "none" and not supported_machine():
        raise OSError(f"no table of system calls for the processor {os.uname().machine}")
    if isolation == "landlock" and (version := kernel.landlock_version()) < LANDLOCK_NEEDED:
        raise OSError(f"Landlock {LANDLOCK_NEEDED} (kernel 6.2) is needed, this kernel has {version or 'none'}")
    if isolation == "namespaces":
        build_filter(1, own_world=True)  # a session is the first process of its pid namespace


# ---------------------------------------------------------------------------------------------------------------------
# around each session, in its own process


def enclose(isolation: Isolation, limits: Limits, base_bytes: int, nobody: bool) -> None:
    """Put this process behind its walls, for good.

    Args:
        isolation: `namespaces` needs `enter_namespaces` and `enter_root` first.
        limits: what it may use.
        base_bytes: address space that the interpreter has already.
        nobody: what `enter_namespaces` returned.

    Raises:
        OSError: a wall cannot be built. The process must end then.
    """
    parent = os.getppid()
    if isolation == "namespaces":
        kernel.unshare(kernel.NEW_MOUNTS)
        hidden = [path for path in readable_paths() if path.startswith("/tmp/")]  # Python itself may stand there
        owner = f",uid={NOBODY},gid={NOBODY}" if nobody else ""
        kernel.mount_tmpfs(
            "/tmp",
            f"mode=700,size={limits.disk_mb}m,nr_inodes={MOST_FILES}{owner}",
            kernel.NO_SETUID | kernel.NO_DEVICES | kernel.NO_PROGRAMS,
        )
        for path in hidden:
            os.makedirs(path)
            _show(BEHIND + path, path, kernel.READ_ONLY | kernel.NO_SETUID | kernel.NO_DEVICES)
        os.chdir("/tmp")
        if nobody:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        kernel.unshare(kernel.NEW_USER)  # processes are counted per user namespace; the mounts stay the parent's
    else:
        kernel.die_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    _limit(limits, base_bytes, threads=isolation == "namespaces")
    kernel.drop_capabilities()
    if isolation == "none":
        os.chdir(tempfile.gettempdir())
        if supported_machine():
            kernel.install_filter(build_filter(os.getpid(), own_world=False))
        return
    if kernel.landlock_version():
        readable, writable = (["/"], ["/tmp"]) if isolation == "namespaces" else (readable_paths(), [])
        kernel.restrict_files([*readable, *DEVICES], [*writable, *DEVICES])
    kernel.install_filter(build_filter(os.getpid(), own_world=isolation == "namespaces"))


def _limit(limits: Limits, base_bytes: int, threads: bool) -> None:
    hard = {
        resource.RLIMIT_AS: base_bytes + limits.memory_mb * 2**20,
        resource.RLIMIT_CPU: limits.cpu_seconds,
        resource.RLIMIT_FSIZE: limits.disk_mb * 2**20,
        resource.RLIMIT_NOFILE: MOST_OPEN_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
        resource.RLIMIT_SIGPENDING: 64,
    }
    if threads:
        hard[resource.RLIMIT_NPROC] = MOST_THREADS
    for kind, value in hard.items():
        _, highest = resource.getrlimit(kind)
        value = value if highest == resource.RLIM_INFINITY else min(value, highest)
        resource.setrlimit(kind, (value, value))
