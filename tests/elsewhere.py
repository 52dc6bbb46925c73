"""Windows and macOS as far as a Linux process can be them: what is not there is taken away, names are theirs.

torch is imported before, as it would load its own libraries for the system that it is told. pathlib stays POSIX's.
"""

import builtins
import io
import os
import platform
import signal
import sys

ONLY_UNIX = ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty")
NOT_ON_WINDOWS = (
    "fork", "forkpty", "getgid", "getloadavg", "geteuid", "getuid", "killpg", "mkfifo", "nice", "openpty",
    "posix_spawn", "register_at_fork", "setsid", "sysconf", "uname", "wait", "waitid",
)  # fmt: skip
ONLY_LINUX = ("copy_file_range", "getrandom", "memfd_create", "sched_getaffinity", "sched_setaffinity")
NO_SIGNALS = ("SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGUSR1", "SIGUSR2")
NAMES = {
    "win32": platform.uname_result("Windows", "host", "11", "10.0.26100", "AMD64"),
    "darwin": platform.uname_result("Darwin", "host", "25.1.0", "Darwin Kernel Version 25.1.0", "arm64"),
}


def pretend(name: str) -> None:
    """From here on, ``sys.platform`` is name."""
    windows = name == "win32"
    for function in (*ONLY_LINUX, *(NOT_ON_WINDOWS if windows else ())):
        if hasattr(os, function):
            delattr(os, function)
    if windows:
        for module in ONLY_UNIX:
            sys.modules[module] = None
        for number in NO_SIGNALS:
            delattr(signal, number)
    builtins.open = io.open = without_proc(io.open)
    platform.uname = lambda: NAMES[name]
    platform._platform_cache.clear()
    sys.platform = name


def without_proc(open_file):
    def opened(file, *args, **options):
        if os.fspath(file).startswith(("/proc/", "/sys/", "/dev/")) if isinstance(file, (str, os.PathLike)) else False:
            raise FileNotFoundError(2, "No such file or directory", str(file))
        return open_file(file, *args, **options)

    return opened
