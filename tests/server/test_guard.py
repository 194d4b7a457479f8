"""The guard by itself: names of hosts, and clients that go away."""

import asyncio

from nanocolbert.server.guard import Guard, host_of


def test_hosts_without_their_ports():
    hosts = {"a.example:80": "a.example", "[::1]:80": "[::1]", "[::1]": "[::1]", "": "", "A": "a", "[": ""}
    assert {header: host_of(header) for header in hosts} == hosts


def ask(app, messages: list[dict]) -> list[dict]:
    """What the guarded app sends to a client of whom these messages come, and then none."""
    sent = []

    async def receive() -> dict:
        return messages.pop(0) if messages else await asyncio.Event().wait()

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"host", b"localhost")]}
    asyncio.run(asyncio.wait_for(Guard(app, ("localhost",), 10, (), None)(scope, receive, send), 20))
    return sent


def test_work_for_a_client_who_has_gone_is_given_up():
    ended = []

    async def app(scope, receive, send):
        assert (await receive())["body"] == b"12"
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(True)
            raise

    body = {"type": "http.request", "body": b"12", "more_body": False}
    assert ask(app, [body, {"type": "http.disconnect"}]) == [] and ended == [True]


def test_a_body_that_breaks_off_is_not_passed_on():
    async def app(*_):
        raise AssertionError

    parts = [{"type": "http.request", "body": b"1", "more_body": True}, {"type": "http.disconnect"}]
    assert ask(app, parts)[0]["status"] == 400


def test_an_error_after_the_answer_has_begun_is_no_second_answer(capsys):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise RuntimeError("late")

    sent = ask(app, [{"type": "http.request", "body": b"", "more_body": False}])
    assert [message.get("status") for message in sent] == [
        200
    ] and "GET /: RuntimeError: late" in capsys.readouterr().err
