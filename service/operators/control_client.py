# SPDX-License-Identifier: Apache-2.0
"""The client of a running daemon, found by its run-dir; each failure becomes one line.

Messages and their checks are the transport's. This adds the operator's view: an error number
becomes the run-dir, the reason and the cure.
"""

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from cowshed.cache.errors import PeerError
from cowshed.service.settings.config import socket_path

if TYPE_CHECKING:
    from cowshed.transport import Backend


class ControlClient:
    """A connection to the daemon of `run_dir`, open inside ``with``.

    Raises CowshedError, one line, if there is no daemon, this user may not connect, or the daemon
    closes the connection or refuses.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._socket_path = socket_path(run_dir)
        self._backend: Backend | None = None
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        # Imported here: `--help` and errors in options do not need the guest library.
        from cowshed.transport import connect

        with self._explained("connecting"):
            self._backend = self._open.enter_context(connect(f"unix://{self._socket_path}"))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._backend = None
        self._open.close()

    def request(self, op: str, **fields: Any) -> dict[str, Any]:
        """Return the daemon's reply to one operation."""
        with self._explained(op):
            return dict(self._opened().request(op, **fields))

    def stream(
        self, op: str, *, fds: Sequence[int] = (), **fields: Any
    ) -> Iterator[dict[str, Any]]:
        """Yield the replies to an operation that reports progress; the last has no "progress".

        fds go with the request, and stay the caller's.
        """
        with self._explained(op):
            yield from self._opened().stream(op, fds=fds, **fields)

    def _opened(self) -> "Backend":
        assert self._backend is not None, "use inside `with`"
        return self._backend

    @contextlib.contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        """Turn a failure of the connection into one line; the daemon's refusals pass unchanged."""
        try:
            yield
        except OSError as error:
            raise PeerError(self._explanation(error, doing)) from error
        except PeerError as error:
            if isinstance(error.__cause__, OSError):
                raise PeerError(self._explanation(error.__cause__, doing)) from error
            where = shlex.quote(str(self._run_dir))
            raise PeerError(f"the daemon at {where} ({doing}): {error}: look at its log") from error

    def _explanation(self, error: OSError, doing: str) -> str:
        where, path = shlex.quote(str(self._run_dir)), self._socket_path
        match error:
            case FileNotFoundError() | NotADirectoryError():
                return (
                    f"no daemon at {where} ({path} does not exist): "
                    "start 'cowshed serve', or name its --run-dir"
                )
            case ConnectionRefusedError():
                return (
                    f"no daemon at {where} ({path} is left over from one that ended): "
                    "start 'cowshed serve' again"
                )
            case PermissionError():
                return f"no permission to use {path}: run as root or as the daemon's user"
            case TimeoutError() | BlockingIOError():
                return (
                    f"the daemon at {where} does not answer ({doing}): "
                    "it is stopped or overloaded; look at its log, or try again"
                )
            case ConnectionError():
                return f"the daemon at {where} closed the connection ({doing}): look at its log"
            case _:
                return f"cannot ask the daemon at {where} ({doing}): {error.strerror or error}"
