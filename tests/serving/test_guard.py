"""What a request passes before its route: token, load, size and time."""

import asyncio
import json

from mmrf_jax.serving import monitoring
from mmrf_jax.serving.guard import Guard, Limits


class App:
    """Answers with the body that it was given, when it is let."""

    def __init__(self):
        self.let = asyncio.Event()
        self.bodies: list[bytes] = []

    async def __call__(self, scope, receive, send):
        self.bodies.append((await receive())["body"])
        await self.let.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


def guarded(**limits) -> tuple[Guard, App, monitoring.Metrics]:
    app, metrics = App(), monitoring.Metrics({})
    return Guard(app, Limits(**limits), metrics), app, metrics


async def ask(asgi, path="/rank", parts=(b"{}",), headers=(), late: float = 0.0) -> tuple[int, dict, dict]:
    """Status, headers and body of the answer to a request whose body comes in parts, each `late` seconds."""
    sent: list[dict] = []
    waiting = list(parts)

    async def receive():
        await asyncio.sleep(late)
        if not waiting:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message):
        sent.append(message)

    method = "POST" if path in ("/rank", "/feedback") else "GET"
    await asgi({"type": "http", "path": path, "method": method, "headers": list(headers)}, receive, send)
    return sent[0]["status"], dict(sent[0]["headers"]), json.loads(sent[1]["body"])


def test_a_request_in_parts_arrives_whole():
    async def run():
        asgi, app, _ = guarded()
        app.let.set()
        assert (await ask(asgi, parts=(b"ab", b"", b"cd")))[0] == 200
        assert app.bodies == [b"abcd"]

    asyncio.run(run())


def test_only_so_many_at_once():
    async def run():
        asgi, app, metrics = guarded(in_flight=3)
        first = [asyncio.create_task(ask(asgi)) for _ in range(3)]
        while len(app.bodies) < 3:  # they are not answered yet
            await asyncio.sleep(0.0)
        status, headers, body = await ask(asgi)
        assert status == 429 and headers[b"retry-after"] == b"1"
        assert "3 requests are in flight" in body["detail"][0]["msg"]
        assert metrics.registry.get_sample_value("mmrf_in_flight") == 3
        app.let.set()
        for path in ("/healthz", "/metrics", "/"):  # at any load
            assert (await ask(asgi, path))[0] == 200
        assert [(await task)[0] for task in first] == [200] * 3
        assert (await ask(asgi))[0] == 200
        assert metrics.registry.get_sample_value("mmrf_in_flight") == 0

        def count(status):
            return metrics.registry.get_sample_value("mmrf_requests_total", {"route": "/rank", "status": str(status)})

        assert (count(200), count(429)) == (4, 1)

    asyncio.run(run())


def test_large_bodies_are_refused_before_they_are_read_or_as_they_come():
    async def run():
        asgi, app, _ = guarded(body_bytes=10)
        app.let.set()
        said = await ask(asgi, headers=[(b"content-length", b"11")])
        assert said[0] == 413 and "more than 10 bytes" in said[2]["detail"][0]["msg"]
        assert (await ask(asgi, parts=(b"123456", b"123456")))[0] == 413  # that does not say how long it is
        assert (await ask(asgi, parts=(b"12345", b"12345")))[0] == 200
        assert app.bodies == [b"1234512345"]

    asyncio.run(run())


def test_time_is_limited():
    async def run():
        asgi, app, metrics = guarded(seconds=0.5)
        status, headers, _ = await ask(asgi)  # an app that never answers
        assert status == 503 and b"retry-after" in headers
        status, _, body = await ask(asgi, parts=[b"1"] * 1_000, late=0.01)  # a body that never ends
        assert status == 408 and "did not come within 0.5 s" in body["detail"][0]["msg"]
        app.let.set()
        assert (await ask(asgi))[0] == 200
        assert metrics.registry.get_sample_value("mmrf_in_flight") == 0

    asyncio.run(run())


def test_the_token_is_asked_for():
    async def run():
        asgi, app, _ = guarded(token="a-long-enough-token")
        app.let.set()
        good = [(b"authorization", b"Bearer a-long-enough-token")]
        assert (await ask(asgi, headers=good))[0] == 200
        for wrong in ([], [(b"authorization", b"Bearer a-long-enough-tokem")], [(b"authorization", b"Basic x")]):
            status, headers, _ = await ask(asgi, headers=wrong)
            assert status == 401 and headers[b"www-authenticate"] == b"Bearer"
        assert (await ask(asgi, "/metrics"))[0] == 401
        assert (await ask(asgi, "/healthz"))[0] == (await ask(asgi, "/"))[0] == 200
        assert len(app.bodies) == 3  # no one else came through

    asyncio.run(run())
