"""A seccomp filter for sandboxed programs: system calls that no test of a function needs are refused.

Namespaces already hide the machine; the filter closes what they leave open: memory that no resource limit counts
(memfd, System V segments), new namespaces, other processes' memory, sockets, and the kernel's most attacked corners.
"""

from __future__ import annotations

import struct
import sys

# include/uapi/linux/audit.h
_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
# Numbers of each call on x86-64 and on arm64 (include/uapi/asm-generic/unistd.h).
_REFUSED = {
    "add_key": (248, 217),
    "bpf": (321, 280),
    "chroot": (161, 51),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mount": (165, 40),
    "msgget": (68, 186),
    "perf_event_open": (298, 241),
    "pidfd_getfd": (438, 438),
    "pivot_root": (155, 41),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "request_key": (249, 218),
    "semget": (64, 190),
    "setns": (308, 268),
    "shmget": (29, 194),
    "socket": (41, 198),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
}
_CLONE = (56, 220)
# clone3 hides its flags behind a pointer; told that it does not exist, the C library falls back to clone.
_CLONE3 = 435
# CLONE_NEW{NS, CGROUP, UTS, IPC, USER, PID, NET}
_NAMESPACE_FLAGS = 0x7E020000
_X32 = 0x40000000

_LOAD, _JUMP_EQUAL, _JUMP_SET, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x45, 0x35, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_EPERM, _ENOSYS = 1, 38


def bpf(machine: str) -> bytes | None:
    """The filter as an array of `struct sock_filter` (8 bytes each), or None for a machine it is not written for.

    Args:
      machine: as `platform.machine()` says.
    """
    if machine not in _ARCHITECTURES or sys.maxsize < 2**32 or sys.byteorder != "little":
        return None
    column = list(_ARCHITECTURES).index(machine)
    # Offsets in struct seccomp_data: nr 0, arch 4, low half of the first argument 16.
    checks = [
        *((_JUMP_EQUAL, numbers[column], "refuse") for numbers in _REFUSED.values()),
        (_JUMP_EQUAL, _CLONE3, "absent"),
        # The second numbering of x86-64 (x32) would go around every check above; arm64 has no such numbers.
        (_JUMP_AT_LEAST, _X32, "refuse"),
    ]
    tail = [
        (_JUMP_EQUAL, 0, 2, _CLONE[column]),
        (_LOAD, 0, 0, 16),
        (_JUMP_SET, 1, 0, _NAMESPACE_FLAGS),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | _EPERM),
        (_RETURN, 0, 0, _ERRNO | _ENOSYS),
    ]
    # A foreign architecture has other numbers: everything is refused.
    head = [(_LOAD, 0, 0, 4), (_JUMP_EQUAL, 1, 0, _ARCHITECTURES[machine]), (_RETURN, 0, 0, _ERRNO | _EPERM)]
    head.append((_LOAD, 0, 0, 0))
    targets = {"refuse": len(checks) + 4, "absent": len(checks) + 5}
    body = [(code, targets[target] - i - 1, 0, value) for i, (code, value, target) in enumerate(checks)]
    return b"".join(struct.pack("<HBBI", *instruction) for instruction in [*head, *body, *tail])
