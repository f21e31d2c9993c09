"""A lock that survives a fork."""

import os
import threading


class ForkLock:
    """A lock for `with`; in a forked child it is free, as the thread that held it does not exist there."""

    def __init__(self) -> None:
        self._renew()

    def _renew(self) -> None:
        self._pid, self._lock = os.getpid(), threading.Lock()

    def acquire(self) -> None:
        """Acquire the lock, waiting if necessary."""
        if self._pid != os.getpid():
            self._renew()
        self._lock.acquire()

    def release(self) -> None:
        """Release the lock."""
        self._lock.release()

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()
