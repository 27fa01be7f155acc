"""A script of the workspace in a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import termios


class Terminal:
    """What is shown, and a keyboard."""

    def __init__(self, command: list[str]) -> None:
        self.keyboard, screen = pty.openpty()
        self.seen = ""
        self.process = subprocess.Popen(
            command,
            stdin=screen,
            stdout=screen,
            stderr=screen,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(screen)

    def wait_for(self, text: str) -> str:
        """Read until the text appears; return what came with it."""
        while text not in self.seen:
            assert select.select([self.keyboard], [], [], 60)[0], f"waited for {text!r}, and there is {self.seen!r}"
            self.seen += os.read(self.keyboard, 1024).decode(errors="replace").replace("\r\n", "\n")
        before, self.seen = self.seen.split(text, 1)
        return before + text

    def to_the_end(self) -> str:
        """Read until the process ends; return all that it showed."""
        while True:
            assert select.select([self.keyboard], [], [], 120)[0], f"waited for the end, and there is {self.seen!r}"
            try:
                read = os.read(self.keyboard, 65536)
            except OSError:  # Linux: nobody has the other side open any more
                read = b""
            if not read:
                self.process.wait(timeout=60)
                return self.seen
            self.seen += read.decode(errors="replace").replace("\r\n", "\n")

    def type(self, text: str) -> None:
        os.write(self.keyboard, text.encode())

    def end(self, key: str) -> int:
        """Press a key at the prompt until it breaks the line, and return the status of the process when it has ended.

        Readline does not see a Ctrl-C that comes just as it begins to wait.
        """
        self.type(key)
        while "\n" not in self.seen:
            if select.select([self.keyboard], [], [], 1)[0]:
                self.seen += os.read(self.keyboard, 1024).decode(errors="replace")
            else:
                self.type(key)
        return self.process.wait(timeout=60)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.keyboard)
