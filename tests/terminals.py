"""Real pseudo-terminals: a command in a session of its own, its screen, keys pressed at it."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import termios
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pexpect
from pexpect.fdpexpect import fdspawn

CTRL_C, CTRL_D = "\x03", "\x04"
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
ECHO, LINES = termios.ECHO, termios.ICANON
# What opens a terminal first in its session has it for its controlling one: ^C gets there.
OWN_IT = ': <"$0"; exec "$@"'


class Terminal(fdspawn):  # type: ignore[misc]
    """A command that runs in a terminal; `expect` and `sendline` are pexpect's."""

    def __init__(
        self,
        command: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        size: tuple[int, int] = (50, 200),
    ) -> None:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", OWN_IT, os.ttyname(theirs), *command],
            env=dict(env),
            cwd=cwd,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        super().__init__(ours, timeout=30, encoding="utf-8", codec_errors="replace")
        self.shown = io.StringIO()
        self.logfile_read = self.shown

    def sendintr(self) -> None:
        self.send(CTRL_C)

    def sendeof(self) -> None:
        self.send(CTRL_D)

    @property
    def raw(self) -> str:
        """All that was shown, with its colours."""
        return self.shown.getvalue()

    @property
    def screen(self) -> str:
        return ESCAPE.sub("", self.raw).replace("\r\n", "\n")

    @property
    def is_sane(self) -> bool:
        """Whether what is typed is shown and lines are lines, as a shell wants it back."""
        modes = termios.tcgetattr(self.child_fd)[3]
        hidden = self.raw.rfind("\x1b[?25l") > self.raw.rfind("\x1b[?25h")
        return bool(modes & ECHO) and bool(modes & LINES) and not hidden

    def ended(self, seconds: float = 30) -> int:
        """Its exit status, of a signal as a shell tells it; all that it showed has been read."""
        self.expect(pexpect.EOF, timeout=seconds)
        status = self.process.wait(seconds)
        return status if status >= 0 else 128 - status

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        with suppress(OSError):
            os.close(self.child_fd)
        self.closed = True


@contextmanager
def heeding_ctrl_c() -> Iterator[None]:
    """A shell has its background jobs ignore Ctrl-C, and so would all that they start."""
    before: Any = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# Runs command lines one after the other, [words, environment] each, with one import of the program.
FORKING = """\
import gc, json, os, sys, router
gc.freeze()
for words, env in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        os.environ.update(env)
        try:
            status = router.main(words)
        except SystemExit as stop:
            status = stop.code
        print(end="", flush=True)
        os._exit(status)
    print("==", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "==", flush=True)
"""
# Runs a command that may not write where modes forbid it, not even as root: without
# CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH in the bounding set (PR_CAPBSET_DROP).
OBEYING = """\
import ctypes, os, sys
for overriding in (1, 2):
    ctypes.CDLL(None).prctl(24, overriding, 0, 0, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
