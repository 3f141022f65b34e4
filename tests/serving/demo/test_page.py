"""The routes of the page: whom they bring, what may be ranked next, and what they refuse."""

import socket
import threading
import time

import exporting
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from in_thread import served
from processes import HANG

from mmrf_jax import types
from mmrf_jax.data.readers import feedback_log
from mmrf_jax.envs.environment import Environment, StepResult
from mmrf_jax.serving import app, export, guard
from mmrf_jax.serving.demo import page, visits
from mmrf_jax.serving.service import Refused, Service, Settings
from mmrf_jax.signals import SHORT_VIDEO

VIDEO_IDS = exporting.VIDEO_IDS
K, C, S = tiny.SPEC.slate, tiny.SPEC.candidates, len(SHORT_VIDEO)
WORLD = {"source": "world", "world": {"num_videos": tiny.SPEC.num_videos}}
TOKEN = "a-word-of-sixteen-letters"


@pytest.fixture(scope="module", autouse=True)
def two_sizes(few_sizes):
    """All services of this module have few sizes."""


def exported(folder, ids, config):
    """The artefact of agents that no one trained."""
    plan, state = exporting.planned("myopic")
    export.export_run(folder, plan, tiny.SPEC, tiny.make_items(), ids, state, {"config": config})
    return folder


class Toy(Environment):
    """Users who watch so many seconds as the video's row says, like the first of a slate, and leave after three."""

    @staticmethod
    def request(user, position):
        candidates = (jnp.arange(C)[None] + 8 * position[:, None]) % tiny.SPEC.num_videos
        context = jnp.stack([user * 1.0, jnp.log1p(position)], -1)
        return types.Request(user, jnp.ones((len(user), tiny.SPEC.profile)), context, candidates.astype(jnp.int32))

    def reset_env(self, key, params, users, day):
        reported = jnp.zeros((len(users), 2, S)).at[:, :, SHORT_VIDEO.index("watch_time")].set(5.0)
        history = types.Exposure(jnp.array([[3, 4]]), reported, jnp.array([[False, True]]))
        return self.request(users, jnp.zeros_like(users)), history, (users, jnp.zeros_like(users))

    def step_env(self, key, state, slate, params):
        users, position = state
        videos = jnp.take_along_axis(self.request(users, position).candidates, slate, 1)
        reported = (
            jnp.zeros((*videos.shape, S)).at[..., SHORT_VIDEO.index("watch_time")].set(videos).at[:, 0, 2].set(1.0)
        )
        position = position + 1
        exposure = types.Exposure(videos, reported, jnp.ones(videos.shape, bool))
        result = StepResult(exposure, self.request(users, position), position >= 3, position < 0)
        return result, (users, position)

    def next_visit(self, key, state, params):
        return jnp.ones_like(state[0])


def make_toy(config, slate):
    assert config == WORLD and slate == K
    return visits.World(Toy((), SHORT_VIDEO, K), slate)


def application(service, make_world=make_toy, **limits):
    return app.make_app(service, guard.Limits(seconds=60.0, **limits), (page.router(service, make_world),))


@pytest.fixture(scope="module")
def kuairand(tmp_path_factory):
    """A service of an artefact whose users no one can simulate, and a client of it."""
    folder, services = tmp_path_factory.mktemp("kuairand"), []
    exported(folder / "artifact", VIDEO_IDS, {"source": "kuairand"})

    def make():
        services.append(Service(Settings(folder / "artifact", folder / "log", max_candidates=C)))
        return application(services[0])

    with served(make) as client:
        assert client("/healthz")[0] == 200
        yield services[0], client


def ranked(client, visit, turn):
    """The slate of a turn, as the page asks for it."""
    user = {"id": visit["user"]} | ({"profile": visit["profile"]} if visit["profile"] else {})
    if turn["position"] == 0 and visit["history"]:
        user["history"] = visit["history"]
    asked = {"user": user, "context": turn["context"], "candidates": turn["candidates"], "scores": True}
    status, answer = client("/rank", asked)
    assert status == 200, answer
    return answer["request_id"], [v["video"] for v in answer["slate"]]


def test_a_visitor_is_offered_what_was_reacted_to(kuairand):
    _, client = kuairand
    status, about = client("/demo/about")
    assert status == 200 and "kuairand" in about["no_simulated"]
    assert (about["slate"], about["candidates"], about["agents"][-1]) == (K, C, "watch_time")
    status, refused = client("/demo/visits", {"simulated": 3})
    assert status == 409 and "kuairand" in refused["detail"][0]["msg"]

    _, visit = client("/demo/visits", {})
    assert visit["user"] >= page.FIRST_USER and visit["profile"] is None and visit["history"] == []
    turn = visit["turn"]
    assert len(set(turn["candidates"])) == C and set(turn["candidates"]) <= set(VIDEO_IDS.tolist())
    assert len(turn["context"]) == tiny.SPEC.context - 1
    items, columns = tiny.make_items(), turn["videos"]
    for i, video in enumerate(columns["video"]):
        row = int(np.flatnonzero(video == VIDEO_IDS)[0])
        assert columns["tag"][i] == items.tag[row] and columns["author"][i] == items.author[row]
        assert columns["duration"][i] == pytest.approx(float(items.duration[row]))

    _, slate = ranked(client, visit, turn)
    path, tags = f"/demo/visits/{visit['user']}/steps", dict(zip(columns["video"], columns["tag"], strict=True))
    shown = {"position": 0, "slate": slate, "reacted": slate[:1]}
    status, after = client(path, shown)
    assert status == 200 and after["answers"] is None and not after["leaves"]
    following = after["turn"]
    assert following["position"] == 1 and not set(following["candidates"]) & set(slate)
    kept = set(following["candidates"]) & set(turn["candidates"])
    assert len(kept) >= C // 2
    of_topic = [
        v for v, t in zip(*(following["videos"][n] for n in ("video", "tag")), strict=True) if t == tags[slate[0]]
    ]
    assert len(of_topic) >= 2  # a quarter of eight
    assert client(path, shown) == (200, after)  # said again, as after a lost answer

    for body, code, said in (
        (shown | {"position": 4}, 409, "request 1 does"),
        ({"position": 1, "slate": slate}, 422, "no candidate"),
        ({"position": 1, "slate": following["candidates"][:1]}, 422, f"{K} different videos"),
        ({"position": 1, "slate": following["candidates"][:1] * K}, 422, f"{K} different videos"),
        ({"position": 1, "slate": []}, 422, "at least 1"),
        ({"position": 1, "slate": slate, "more": 1}, 422, "not permitted"),
    ):
        status, answer = client(path, body)
        assert status == code and said in answer["detail"][0]["msg"], answer
    assert client(f"/demo/visits/{page.FIRST_USER + 146_999_999}/steps", shown)[0] == 404
    assert client("/demo/visits/5/steps", shown)[0] == 422


def test_a_simulated_user_answers_and_leaves(tmp_path):
    waiting = threading.Event()

    def make_world(config, slate):
        assert waiting.wait(HANG)
        return make_toy(config, slate)

    exported(tmp_path / "artifact", None, WORLD)

    def make():
        return application(Service(Settings(tmp_path / "artifact", tmp_path / "log", max_candidates=C)), make_world)

    with served(make) as client:
        assert client("/demo/about")[1]["no_simulated"] is None
        status, answer = client("/demo/visits", {"simulated": 5})
        assert status == 202 and "world" in answer["preparing"]
        assert client("/demo/visits", {})[0] == 200  # a visitor need not wait
        waiting.set()
        while (answer := client("/demo/visits", {"simulated": 5}))[0] == 202:
            time.sleep(0.05)
        _, visit = answer
        assert visit["simulated"] == 5 and visit["profile"] == [1.0] * tiny.SPEC.profile
        assert visit["history"] == [{"video": 4, "watch_time": 5.0}] and 4 in visit["turn"]["videos"]["video"]
        turn = visit["turn"]
        assert turn["context"] == [5.0] and turn["candidates"] == list(range(C))
        for position in range(3):
            request, slate = ranked(client, visit, turn)
            body = {"position": position, "slate": slate}
            status, answer = client(f"/demo/visits/{visit['user']}/steps", body)
            assert [entry.get("watch_time", 0) for entry in answer["answers"]] == slate  # in the slate's own order
            assert [entry.get("like", 0) for entry in answer["answers"]] == [1, 0, 0]
            assert answer["leaves"] == (position == 2)
            event = {"event_id": f"e{position}", "request_id": request, "left": answer["leaves"]}
            assert client("/feedback", event | {"videos": answer["answers"]})[0] == 200
            turn = answer["turn"]
            assert turn["candidates"] == [(v + 8 * position + 8) % 30 for v in range(C)]
        again = client("/demo/visits", {"simulated": 5})[1]
        assert again["user"] != visit["user"]
    records = [record for record, _ in feedback_log.scan(tmp_path / "log")]
    assert [r["kind"] for r in records] == ["rank", "feedback"] * 3
    history = np.frombuffer(records[0]["history"]["videos"], "<i8")
    assert history.tolist() == [4] and records[-1]["left"]


def test_a_world_that_cannot_be_made_is_said(kuairand, monkeypatch):
    def make_world(config, slate):
        raise ValueError("world.num_videos=30 leaves a topic with 0 videos")

    service, _ = kuairand
    monkeypatch.setitem(service.ranker.manifest, "config", WORLD)
    with served(lambda: application(service, make_world), "off") as client:
        status, answer = client("/demo/visits", {"simulated": 5})
        assert status == 409 and "leaves a topic with 0 videos" in answer["detail"][0]["msg"]
        assert client("/demo/visits", {"simulated": -1})[0] == 422
        assert client("/demo/visits", {"simulated": 5, "name": "x"})[0] == 422


def test_the_page_needs_no_token_and_its_routes_do(kuairand):
    with served(lambda: application(kuairand[0], token=TOKEN), "off") as client:
        status, text = client("/", text=True)
        assert status == 200 and "<title>Feed" in text
        assert client("/demo/about")[0] == 401 and client("/demo/visits", {})[0] == 401
        client.token = TOKEN
        assert client("/demo/about")[0] == 200 and client("/demo/visits", {})[0] == 200


def head_and_get(url: str, path: str, token: str) -> list[tuple[int, dict[str, str], bytes]]:
    """(status, headers, all that came after them) of HEAD and of GET, read to the end of the connection."""
    answers = []
    for method in ("HEAD", "GET"):
        with socket.create_connection(url.removeprefix("http://").split(":"), timeout=60) as connection:
            token_line = f"authorization: Bearer {token}\r\n" if token else ""
            connection.sendall(f"{method} {path} HTTP/1.1\r\nhost: x\r\n{token_line}connection: close\r\n\r\n".encode())
            received = b"".join(iter(lambda: connection.recv(65_536), b""))
        head, _, body = received.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        answers.append((int(first.split()[1]), dict(line.lower().split(": ", 1) for line in lines), body))
    return answers


def test_http_habits_head_is_get_without_a_body(kuairand):
    """On every route, those of no method GET or of no path, and what is refused for want of a token, too."""
    with served(lambda: application(kuairand[0], token=TOKEN), "off") as client:
        client.token = TOKEN
        document = client("/openapi.json")[1]["paths"]
        paths = [*(path for path, methods in document.items() if "get" in methods), "/openapi.json"]
        assert {"/", "/healthz", "/metrics", "/demo/about", "/openapi.json"} == set(paths)
        for path, status in [(path, 200) for path in paths] + [("/rank", 405), ("/demo/visits", 405), ("/none", 404)]:
            (head, headers, nothing), (get, wanted, body) = head_and_get(client.url, path, TOKEN)
            assert head == get == status and nothing == b"" != body, path
            assert headers.keys() == wanted.keys() and headers["content-type"] == wanted["content-type"], path
            if path != "/metrics":  # which counts these requests
                assert headers["content-length"] == wanted["content-length"] == str(len(body)), path
        for path, status in (("/", 200), ("/healthz", 200), ("/metrics", 401), ("/demo/about", 401)):
            (head, _, nothing), (get, _, body) = head_and_get(client.url, path, "")
            assert head == get == status and nothing == b"" != body, path


def test_only_the_last_visits_are_kept(kuairand, monkeypatch):
    monkeypatch.setattr(page, "_MOST_VISITS", 2)
    _, client = kuairand
    begun = [client("/demo/visits", {})[1] for _ in range(3)]

    def step(visit):
        return client(f"/demo/visits/{visit['user']}/steps", {"position": 0, "slate": visit["turn"]["candidates"][:K]})

    assert [step(visit)[0] for visit in begun] == [404, 200, 200]


def test_a_visitor_who_has_seen_everything_is_still_offered_something(kuairand):
    ranker = kuairand[0].ranker
    visit = visits.Visit(visits.Visitor(1, ranker, C), K)
    for position in range(15):  # of 30 videos, three at a time
        shown = visit.viewer.candidates[:K].tolist()
        visit.step(ranker, position, shown, shown)
        assert len(set(visit.viewer.candidates.tolist())) == C


def test_the_page_fetches_nothing_and_may_run_nothing_else():
    html, policy = page.page()
    assert "http://" not in html and "https://" not in html and "innerHTML" not in html
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "*" not in policy
    assert "/* script */" not in html and "/* style */" not in html and " style=" not in html


def test_a_visit_asked_twice_at_once_moves_on_once():
    visit = visits.Visit(visits.SimulatedUser(visits.World(Toy((), SHORT_VIDEO, K), K), 5, 0, C), K)
    first = visit.step(None, 0, [0, 1, 2], [])
    assert visit.step(None, 0, [0, 1, 2], []) is first and visit.position == 1
    with pytest.raises(Refused, match="request 1 does"):
        visit.step(None, 0, [0, 1, 3], [])
