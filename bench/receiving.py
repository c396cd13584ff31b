"""A server that reads a request and parses it, and does nothing else: what whole Node objects cost at least.

    python -m bench.receiving PORT

A blocking socket, one buffer of the right size, no garbage collection. Runs until it is terminated.
"""

from __future__ import annotations

import gc
import socket
import sys

import orjson

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def serve(port: int) -> None:
    with socket.create_server(("127.0.0.1", port)) as server:
        while True:
            connection, _ = server.accept()
            with connection:
                while body := _body(connection):
                    parsed = orjson.loads(body)
                    connection.sendall(ANSWER)
                    del parsed


def _body(connection: socket.socket) -> memoryview | bytes | None:
    """Of the next request, {} of one that has none; None at the end."""
    head = b""
    while b"\r\n\r\n" not in head:
        if not (part := connection.recv(65536)):
            return None
        head += part
    head, _, begun = head.partition(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
    if b"content-length" not in fields:
        return b"{}"
    body = memoryview(bytearray(int(fields[b"content-length"])))
    body[: len(begun)] = begun
    got = len(begun)
    while got < len(body):
        got += connection.recv_into(body[got:])
    return body


if __name__ == "__main__":
    gc.disable()
    serve(int(sys.argv[1]))
