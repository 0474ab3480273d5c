"""No test reaches a network, nor does a process that a test starts: Python runs this file at its start."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

LOCAL = ("127.0.0.1", "::1", "localhost", "0.0.0.0", "::", "", None)  # noqa: S104
OWN_NAME = socket.gethostname()


def refuse_network(event: str, arguments: tuple) -> None:
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        _, address = arguments
        if not isinstance(address, tuple) or address[0] in LOCAL or str(address[0]).startswith("127."):
            return
        target = f"{address[0]}:{address[1]}"
    elif event == "socket.getaddrinfo":
        if arguments[0] in LOCAL or arguments[0] == OWN_NAME:
            return
        target = f"the address of {arguments[0]}"
    else:
        return
    if report := os.environ.get("ANYSITE_TEST_CONNECTIONS"):
        with Path(report).open("a") as file:
            file.write(f"{target}\n")
    raise PermissionError(f"a test asked for {target}")


sys.addaudithook(refuse_network)
