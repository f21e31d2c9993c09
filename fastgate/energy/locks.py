"""A lock that survives a fork."""

import os
import threading


class ForkLock:
    """A lock for `with`; a forked child finds it free, for the thread that held it does not exist there."""

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()

    def acquire(self) -> None:
        """Wait for the lock and take it."""
        if self._pid != os.getpid():
            self._renew()
        self._lock.acquire()

    def release(self) -> None:
        """Give it back."""
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()
