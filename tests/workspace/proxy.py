"""A reverse proxy on this machine that does what nginx does with `proxy_pass` and nothing else in its `location`."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Location:
    """The content of nginx's `location`."""

    path: str = "/"  # where it shows the server
    keep: bool = False  # whether it passes its own path on: `proxy_pass` with an address alone
    headers: dict[str, str] = field(default_factory=dict)  # `proxy_set_header`; {host} is nginx's $http_host
    upstream: int = 0  # the server's port
    port: int = 0  # its own


@contextlib.contextmanager
def proxying(location: Location) -> Iterator[Location]:
    """Run the proxy; the server's port may be set later."""

    class Handler(socketserver.StreamRequestHandler):
        """A connection for a request, as `Connection: close` asks for on both sides."""

        def handle(self) -> None:
            """Send the request on with nginx's headers, and then everything back as it comes."""
            head = b""
            while b"\r\n\r\n" not in head and (line := self.rfile.readline()):
                head += line
            if not head:
                return
            first, *rest = head.decode("latin-1").rstrip("\r\n").split("\r\n")
            method, target, _ = first.split(" ")
            if not target.startswith(location.path):
                self.wfile.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                return
            if not location.keep:
                target = "/" + target.removeprefix(location.path)
            given = {name.lower(): value for name, value in (line.split(": ", 1) for line in rest)}
            sets = {name: value.format(host=given.get("host", "")) for name, value in location.headers.items()}
            sent = given | {"host": f"127.0.0.1:{location.upstream}", "connection": "close"}
            sent |= {name.lower(): value for name, value in sets.items()}
            lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items())]
            body = self.rfile.read(int(given.get("content-length", 0)))
            with socket.create_connection(("127.0.0.1", location.upstream)) as server, contextlib.suppress(OSError):
                server.sendall("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body)
                while piece := server.recv(65536):
                    self.wfile.write(piece)

    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as server:
        location.port = server.server_address[1]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield location
        server.shutdown()
