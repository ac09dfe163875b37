"""How the hosts of an engine find each other: through the store of jax.distributed."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import time
from dataclasses import dataclass
from typing import Any

import jax

from jlora.engine.channel import Channel

START_SECONDS = 600  # for which a host waits for the others when an engine is made
_KINDS = ("steps", "bulk", "watch")
_KEY = "jlora/engine"


@dataclass(frozen=True)
class Links:
    """The connections to another host.

    steps: what all do in one order. bulk: the arrays of adapters, which must not delay a step.
    watch: signs of life, and what went wrong.
    """

    name: str
    steps: Channel
    bulk: Channel
    watch: Channel

    def close(self) -> None:
        """All of them."""
        for channel in (self.steps, self.bulk, self.watch):
            channel.close()


def _store() -> Any:
    """The key-value store, and the coordinator's host."""
    from jax._src import distributed  # nothing public leads to it

    state = distributed.global_state
    if state.client is None or state.coordinator_address is None:
        raise RuntimeError("several processes, but jax.distributed.initialize() was not called")
    return state.client, state.coordinator_address.rsplit(":", 1)[0].strip("[]")


def host_name(process: int) -> str:
    """As messages name a host."""
    return f"host {process} of {jax.process_count()}"


def meet_followers() -> dict[int, Links]:
    """Waits in the first process until all others have connected."""
    store, host = _store()
    try:
        server = socket.create_server((host, 0))
    except OSError:  # the coordinator is reached by a name that is not this host's own
        host, server = socket.gethostname(), socket.create_server(("", 0))
    token = secrets.token_hex(32)
    store.key_value_set(_KEY, json.dumps([host, server.getsockname()[1], token]))
    found: dict[tuple[int, str], Channel] = {}
    wanted = {(process, kind) for process in range(1, jax.process_count()) for kind in _KINDS}
    deadline = time.monotonic() + START_SECONDS
    try:
        while wanted - found.keys():
            missing = sorted({process for process, _ in wanted - found.keys()})
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                sock, _ = server.accept()
            except TimeoutError:
                raise TimeoutError(
                    f"no engine in {', '.join(map(host_name, missing))} after {START_SECONDS} s; "
                    "every process but the first must call jlora.follow"
                ) from None
            who = _greeted(sock, token)
            if who is not None:
                found[who] = Channel(sock)
    except BaseException:
        for channel in found.values():
            channel.close()
        raise
    finally:
        server.close()
        store.key_value_delete(_KEY)  # the next engine has a meeting of its own
    return {
        process: Links(host_name(process), *(found[process, kind] for kind in _KINDS))
        for process in range(1, jax.process_count())
    }


def _greeted(sock: socket.socket, token: str) -> tuple[int, str] | None:
    """Who has connected; None, and the connection is closed, when it is not one of ours."""
    deadline, expected = time.monotonic() + 10, len(token) + 16
    try:
        data = b""
        while len(data) < expected:
            sock.settimeout(max(deadline - time.monotonic(), 0.001))
            piece = sock.recv(expected - len(data))
            if not piece:
                break
            data += piece
        said, who = data[: len(token)], data[len(token) :].decode("ascii", "replace").split()
        if hmac.compare_digest(said, token.encode()):
            return int(who[0]), who[1]
    except OSError:
        pass
    sock.close()
    return None


def meet_leader() -> Links:
    """Connects any other process with the first, when that makes its engine."""
    store, _ = _store()
    value = store.blocking_key_value_get(_KEY, START_SECONDS * 1000)
    host, port, token = json.loads(value)

    def connect(kind: str) -> Channel:
        sock = socket.create_connection((host, port), 30)
        sock.sendall(f"{token}{jax.process_index()} {kind}".ljust(len(token) + 16).encode())
        return Channel(sock)

    return Links(host_name(0), *map(connect, _KINDS))
