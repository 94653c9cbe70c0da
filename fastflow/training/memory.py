"""What becomes of memory that a training step on a CPU frees."""

import ctypes
import platform

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h
LARGEST = 32 * 2**20  # bytes; glibc accepts no more


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, instead of giving it back to the system and asking for it anew.

    A step allocates gigabytes, and the system clears every page of them that it hands out.  It holds for the whole
    process from now on, whose memory stays as large as its largest step.  Tensors of more than 32 MiB are given back
    still; another allocator that was loaded in glibc's place goes on as it did.

    Returns:
        Whether the C library is glibc; with another one nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, -1))
