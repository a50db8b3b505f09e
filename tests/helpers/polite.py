"""Lets the threads of MLX's ring wait politely, so that tests with several ranks are fast."""

import atexit
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# The ring's threads poll their connections without a pause. Where there are more of them than
# cores, each answer would wait for the end of several others' turns.
YIELDING = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <sched.h>
#include <sys/socket.h>
ssize_t recv(int s, void *data, size_t count, int flags) {
  static ssize_t (*of_libc)(int, void *, size_t, int);
  if (!of_libc) of_libc = (ssize_t (*)(int, void *, size_t, int))dlsym(RTLD_NEXT, "recv");
  ssize_t got = of_libc(s, data, count, flags);
  if (got < 0 && errno == EAGAIN) {
    sched_yield();
    errno = EAGAIN;
  }
  return got;
}
"""


@functools.cache
def polite():
    """Environment in which a thread that has nothing to receive lets others run, if there is a C
    compiler; it changes the speed alone."""
    compiler = shutil.which("cc") if sys.platform == "linux" else None
    if compiler is None:
        return {}
    directory = tempfile.mkdtemp(prefix="ring-")
    atexit.register(shutil.rmtree, directory)
    library = Path(directory) / "yielding.so"
    options = ["-shared", "-fPIC", "-O1", "-x", "c", "-", "-o", library, "-ldl"]
    subprocess.run([compiler, *options], input=YIELDING.encode(), check=True)
    return {"LD_PRELOAD": str(library)}
