#!/usr/bin/env python3
"""Runs a command, and all that it starts, with a scheduling slice of 0.1 ms.

    benches/lowlat.py COMMAND [ARGUMENT]...

Why: a commit waits for the disk, and then for a core. Since Linux 6.6 the scheduler (EEVDF) lets the
task that is on a core finish its slice first, and where preemption is lazy that is a timer tick: on a
busy machine each commit then takes 4 ms more, whatever its priority, since `nice` weighs only inside
one session's group. What would be measured is the neighbours. A task with a shorter slice has the
earlier deadline and is let in at once. It gets no more of the processor than before, and everything
that is compared runs under the same setting.

Needs Linux 6.12; on an older kernel it says so and runs the command as it is.
"""

import ctypes
import os
import platform
import struct
import sys

SLICE_NS = 100_000
# sched_setattr and sched_getattr have no wrapper in libc.
SYSCALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}
# size, policy, flags, nice, priority, runtime, deadline, period: the kernel's struct sched_attr, v0.
# For an ordinary task, `runtime` is the slice.
ATTR = struct.Struct("=IIQiIQQQ")


def shorten_slice() -> None:
    """Sets this process's slice; its children inherit it."""
    set_attr, get_attr = SYSCALLS[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(ATTR.size)
    if libc.syscall(get_attr, 0, buffer, ATTR.size, 0) != 0:
        raise OSError(ctypes.get_errno(), "sched_getattr")
    _, policy, flags, nice, priority, _, deadline, period = ATTR.unpack(buffer.raw)
    attr = ATTR.pack(ATTR.size, policy, flags, nice, priority, SLICE_NS, deadline, period)
    if libc.syscall(set_attr, 0, attr, 0) != 0:
        raise OSError(ctypes.get_errno(), "sched_setattr")


def main() -> None:
    command = sys.argv[1:]
    if not command:
        sys.exit("usage: lowlat.py COMMAND [ARGUMENT]...")
    try:
        shorten_slice()
    except (KeyError, OSError) as err:
        print(f"lowlat: measuring with the usual scheduling slice: {err}", file=sys.stderr)
    try:
        os.execvp(command[0], command)
    except OSError as err:
        sys.exit(f"lowlat: {command[0]}: {err.strerror}")


if __name__ == "__main__":
    main()
