"""What becomes of memory that a training step on a CPU frees."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of mallopt, in glibc's malloc.h
LARGEST = 32 * 2**20  # bytes; glibc accepts no more


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, instead of giving it back to the system and asking for it anew.

    A step allocates gigabytes, and the system clears every page of them that it hands out: without this, that can be a
    quarter of a step's time on a CPU.  It holds for the whole process from now on, whose memory stays as large as its
    largest step.  Tensors of more than 32 MiB are given back still.  The same as starting Python with
    ``MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=-1``.

    Returns:
        Whether it could be done: on Linux with glibc, not with another C library or allocator in its place.
    """
    if sys.platform != "linux":
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # other libraries have a mallopt that does something else
        mallopt = library.mallopt
    except AttributeError:
        return False
    return bool(mallopt(MMAP_THRESHOLD, LARGEST)) and bool(mallopt(TRIM_THRESHOLD, -1))
