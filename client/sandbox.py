"""What the worker takes from itself before it loads the app: the network, new privileges, core dumps, other processes' memory.

Layers, strongest first, each where the system has it: a seccomp filter (sockets fail in native code too), an empty network
namespace, and Python's audit hook, which names the refusal. The worker dies with its agent.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import signal
import struct
import sys
from dataclasses import asdict, dataclass
from typing import Any, Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_SECCOMP: Final = 22
_PR_SET_NO_NEW_PRIVS: Final = 38
_SECCOMP_MODE_FILTER: Final = 2
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000

_BLOCKED_EVENTS: Final = frozenset(
    {
        "socket.__new__",
        "socket.bind",
        "socket.connect",
        "socket.getaddrinfo",
        "socket.gethostbyaddr",
        "socket.gethostbyname",
        "socket.getnameinfo",
        "socket.sendmsg",
        "socket.sendto",
    }
)


@dataclass(frozen=True)
class Sandbox:
    """What is in force in a worker. False: this system does not offer it, or does not permit it."""

    seccomp: bool
    network_namespace: bool
    no_new_privileges: bool
    audit_hook: bool
    dies_with_agent: bool

    def to_dict(self) -> dict[str, bool]:
        """By name."""
        return asdict(self)


def enter(agent_pid: int) -> Sandbox:
    """Close the sandbox around this process. Call it before other threads start and before the app is loaded.

    Args:
        agent_pid: the process that started this one; if it is gone already, this one ends at once.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    dies = _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != agent_pid:
        os._exit(0)
    namespace = _empty_network()
    privileges = _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    filtered = privileges and _filter_calls()
    sys.addaudithook(_refuse_sockets)
    return Sandbox(filtered, namespace, privileges, audit_hook=True, dies_with_agent=dies)


def hide_memory() -> bool:
    """Keep this process's memory from others of the same user, and out of core dumps: for the agent, which holds keys."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return _prctl(_PR_SET_DUMPABLE, 0)


def _refuse_sockets(event: str, _args: tuple[Any, ...]) -> None:
    if event in _BLOCKED_EVENTS:
        raise PermissionError(errno.EPERM, f"a worker opens no sockets ({event}): data leaves through the agent alone")


def _prctl(option: int, value: int, pointer: Any = 0) -> bool:
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.prctl(option, ctypes.c_ulong(value), pointer, ctypes.c_ulong(0), ctypes.c_ulong(0))) == 0


def _empty_network() -> bool:
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) == 0:
        return True
    uid, gid = os.getuid(), os.getgid()
    if libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET) != 0:
        return False
    try:
        # The same user inside as outside, so that files keep their owner.
        for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w", encoding="ascii") as file:  # noqa: PTH123  # /proc wants one plain write
                file.write(line)
    except OSError:
        return True
    return True


# A filter in classic BPF (Linux, Documentation/userspace-api/seccomp_filter.rst): instructions of (code, jt, jf, k) over
# `struct seccomp_data` {int nr; u32 arch; ...}. Numbers are of <asm/unistd.h>.
_ARCHITECTURES: Final = {
    "x86_64": (
        0xC000003E,
        {
            "socket": 41,
            "connect": 42,
            "accept": 43,
            "bind": 49,
            "listen": 50,
            "ptrace": 101,
            "accept4": 288,
            "process_vm_readv": 310,
            "process_vm_writev": 311,
            "io_uring_setup": 425,
            "pidfd_getfd": 438,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "ptrace": 117,
            "socket": 198,
            "bind": 200,
            "listen": 201,
            "accept": 202,
            "connect": 203,
            "accept4": 242,
            "process_vm_readv": 270,
            "process_vm_writev": 271,
            "io_uring_setup": 425,
            "pidfd_getfd": 438,
        },
    ),
}
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K
_ALLOW: Final = 0x7FFF0000
_DENY: Final = 0x00050000 | errno.EPERM
_X32_BIT: Final = 0x40000000


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _filter_calls() -> bool:
    """Refuse the system calls that open sockets or reach into other processes, with EPERM; False where it cannot be done."""
    if sys.platform != "linux" or platform.machine() not in _ARCHITECTURES:
        return False
    arch, calls = _ARCHITECTURES[platform.machine()]
    numbers = sorted(calls.values())
    # Jumps are relative to the next instruction; the last two are "allow" and "deny".
    deny = 4 + len(numbers) + 1
    code = [
        (_LOAD, 0, 0, 4),
        (_EQUAL, 0, deny - 2, arch),
        (_LOAD, 0, 0, 0),
        (_AT_LEAST, deny - 4, 0, _X32_BIT),
        *((_EQUAL, deny - 4 - i - 1, 0, number) for i, number in enumerate(numbers)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _DENY),
    ]
    data = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
    return _prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(_Program(len(code), data)))
