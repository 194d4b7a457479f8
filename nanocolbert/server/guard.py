"""What stands before the app: who may ask, how much a body may hold, and that an error is one line of JSON.

A web page elsewhere may make a browser send requests to this machine, under a name that it made point here (DNS
rebinding). So the Host header must be a name of this server; changes need a token, which no browser sends by itself;
bodies must be called JSON, which pages elsewhere may not send; and no answer allows other origins.
"""

import asyncio
import json
import secrets
import traceback

from nanocolbert.cli import say

BODY_SECONDS = 20  # in which a body must have come
DRAINED = 64  # a body that is too large is read to its end, up to so many times the limit, so that its sender listens
FAILED = "the server has failed here: its own output says why"
HEADERS = {
    "content-security-policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
DOCS_POLICY = HEADERS["content-security-policy"] + "; style-src 'self' 'unsafe-inline'; img-src 'self' data:"


class Refused(Exception):
    """A request that is not let through: status, one line, further headers."""

    def __init__(self, status: int, line: str, **headers: str):
        super().__init__(line)
        self.status, self.headers = status, headers


class Guard:
    """An ASGI app around another one, which gets whole bodies of permitted requests only."""

    def __init__(self, app, hosts: tuple[str, ...], max_body: int, changes: tuple[str, ...], token: str | None):
        """hosts: names of this server, "*": any. changes: paths that need the token; None: that are closed."""
        self.app, self.hosts, self.max_body = app, {host.lower() for host in hosts}, max_body
        self.changes, self.token = changes, token

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return
        is_started = False

        async def send_guarded(message) -> None:
            nonlocal is_started
            if message["type"] == "http.response.start":
                is_started = True
                message["headers"] = [*message.get("headers", []), *headers_for(scope["path"])]
            await send(message)

        try:
            self.check(scope)
            body = await self.read_body(scope, receive)
            await unless_gone(self.app, scope, body, receive, send_guarded)
        except Refused as refused:
            await answer(send_guarded, refused.status, str(refused), refused.headers)
        except asyncio.CancelledError:  # by uvicorn, which ends
            if not is_started:
                await answer(send_guarded, 503, "the server ends: ask again once it has been started", {})
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            what = " ".join(f"{type(error).__name__}: {error}".split())
            say(f"{scope['method']} {scope['path']}: {what} ({at.filename}:{at.lineno})")
            if not is_started:
                await answer(send_guarded, 500, FAILED, {})

    def check(self, scope) -> None:
        """Raises Refused for a request that is not to be read further."""
        headers = dict(scope["headers"])
        host = host_of(headers.get(b"host", b"").decode("latin-1"))
        if host not in self.hosts and "*" not in self.hosts:
            raise Refused(400, f"host {host[:100]!r} is not served: start the server with --allowed_hosts to permit it")
        if not scope["path"].isprintable():  # "/add\n" would be taken for /add behind us
            raise Refused(400, "the path has a control character")
        if scope["path"] in self.changes:
            self.check_token(headers.get(b"authorization", b""))
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            raise Refused(415, "the body must be JSON: say so by the header Content-Type: application/json")

    def check_token(self, given: bytes) -> None:
        """Raises Refused unless a header says that changes are permitted."""
        if self.token is None:
            raise Refused(403, "this server only reads: start it with --writable to permit changes")
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer":
            raise Refused(401, "changes need the header Authorization: Bearer TOKEN", **{"www-authenticate": "Bearer"})
        if not secrets.compare_digest(token.strip(), self.token.encode()):
            raise Refused(401, "this is not the token of this server", **{"www-authenticate": "Bearer"})

    async def read_body(self, scope, receive) -> bytes:
        """The whole body. Raises Refused if it is too large, or does not come."""
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        size = int(announced) if announced.isdigit() else 0
        body, n, more = bytearray(), 0, size <= DRAINED * self.max_body
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while more and n <= DRAINED * self.max_body:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the body has broken off")
                    n += len(message.get("body", b""))
                    if n <= self.max_body:
                        body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError:
            raise Refused(408, f"the body has not come within {BODY_SECONDS} seconds") from None
        if max(n, size) > self.max_body:
            raise Refused(413, f"the body has more than {self.max_body:,} bytes, which is the most: send it in parts")
        return bytes(body)


def host_of(header: str) -> str:
    """The host of a Host header without its port, [::1] in brackets."""
    host = header.strip().lower()
    return host[: host.find("]") + 1] if host.startswith("[") else host.split(":")[0]


async def unless_gone(app, scope, body: bytes, receive, send) -> None:
    """Run the app on a whole body; end it when the client has gone, as one does who types on."""
    gone, is_given = asyncio.ensure_future(receive()), False

    async def receive_again() -> dict:
        nonlocal is_given
        if is_given:
            return await asyncio.shield(gone)
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    running = asyncio.ensure_future(app(scope, receive_again, send))
    try:
        await asyncio.wait({running, gone}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()  # or its error
    finally:
        running.cancel()
        gone.cancel()


def headers_for(path: str) -> list[tuple[bytes, bytes]]:
    """Headers of every answer; the page that shows the interface styles itself."""
    headers = HEADERS | ({"content-security-policy": DOCS_POLICY} if path == "/docs" else {})
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def answer(send, status: int, line: str, headers: dict[str, str]) -> None:
    """An error as one line of JSON."""
    body = json.dumps({"error": line}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **headers}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
