"""Opens the demo's socket before the model is loaded, so that a port in use is reported at once."""

from __future__ import annotations

import errno
import socket

from scale_rae.errors import ScaleRAEError

PORTS = range(7860, 7960)  # tried when none is given


def bind(host: str, port: int | None) -> socket.socket:
    """A listening socket; without a port, on the first free one of `PORTS`.

    Raises:
        ScaleRAEError: when there is none.
    """
    error: OSError | None = None
    host = host.strip("[]")
    for each in PORTS if port is None else [port]:
        try:
            family = socket.getaddrinfo(host, each, type=socket.SOCK_STREAM)[0][0]
            return socket.create_server((host, each), family=family, backlog=128)
        except OSError as e:
            error = e
            if e.errno != errno.EADDRINUSE:
                break
    assert error is not None
    which = f"port {port}" if port is not None else "any port from 7860 on"
    if error.errno == errno.EADDRINUSE:
        raise ScaleRAEError(f"cannot listen on {host}, {which}; choose another --port") from error
    raise ScaleRAEError(  # asyncio and socket add the address to the system's words
        f"cannot listen on {host}, {which} ({(error.strerror or str(error)).split(' (while')[0]}); choose another --host or --port"
    ) from error
