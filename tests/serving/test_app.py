"""The service over HTTP: ids in their own type, features by name, several users a call, and errors with their field."""

import in_thread
import numpy as np
import pytest

from mmrf_jax.data.readers import feedback_log
from mmrf_jax.serving import app, artifact, guard, ranker
from mmrf_jax.serving.service import Service, Settings

TOKEN = "a-word-of-sixteen-letters"
ASK = {"user": {"id": "bob-1"}, "context": {"hour": 0.5}, "candidates": ["item 5", "new one", "item 3", "gone"], "k": 2}
NEW = {"id": "new one", "features": {"price": 6.0, "age": 3.0}, "author": "shop b", "tag": 10, "duration": 12.5}


@pytest.fixture(scope="module")
def served(named, few_sizes, tmp_path_factory):
    """(client, folder of the log, artefact) of a service of string ids, whose features have names."""
    log = tmp_path_factory.mktemp("named") / "log"

    def make():
        settings = Settings(named, log, max_candidates=8, max_new_items=20)
        return app.make_app(Service(settings), guard.Limits(seconds=60.0, token=TOKEN))

    with in_thread.served(make) as client:
        client.token = TOKEN
        yield client, log, artifact.load(named)


def score(loaded, user: int, profile, rows) -> np.ndarray:
    job = ranker.Job(
        user,
        np.float32(profile),
        np.float32([0.5, 0.0]),
        np.array(rows),
        None,
        (),
    )
    return ranker.Ranker(loaded, 8).run([job])[0][0][-1]


def test_strings_and_names_from_the_request_to_the_log(served):
    client, log, loaded = served
    status, slate = client("/rank", ASK)
    assert status == 200 and slate["unknown"] == ["new one", "gone"] and slate["request_id"] == "bob-1-0"
    scores = score(loaded, 2, [3, 1, -2], [5, 3])  # the profile of the training
    best = [["item 5", "item 3"][i] for i in np.argsort(-scores)]
    assert [shown["video"] for shown in slate["slate"]] == best
    np.testing.assert_allclose([shown["score"] for shown in slate["slate"]], np.sort(scores)[::-1], rtol=1e-4)

    status, slate = client("/rank", ASK | {"user": {"id": "ann", "profile": {"sex": "f", "points": 3}}, "items": [NEW]})
    assert status == 200 and slate["unknown"] == ["gone"]
    status, answer = client(
        "/items", {"items": [NEW, {"id": "another", "author": 7, "tag": 25}]}
    )  # of neither in training
    assert status == 200 and answer == {"new": ["another"], "known": ["new one"]}
    event = {"event_id": "a", "request_id": "ann-0", "videos": [{"video": slate["slate"][0]["video"], "like": 1}]}
    assert client("/feedback", event) == (200, {"event_id": "a", "duplicate": False})
    records = {record.get("request", record.get("id")): record for record, _ in feedback_log.scan(log)}
    assert records["new one"]["features"] == {"price": 6.0, "age": 3.0} and records["new one"]["author"] == "shop b"
    record = next(r for r, _ in feedback_log.scan(log) if r["kind"] == "rank" and r["user"] == "ann")
    np.testing.assert_array_equal(np.frombuffer(record["profile"], "<f4"), [2, 1, 0])
    assert record["candidates"] == ["item 5", "new one", "item 3"] and record["arm"] == "a"


def test_several_users_in_one_call(served):
    client, _, loaded = served
    users = [{"id": f"visitor {n}", "profile": [0.1 * n, 0.0, 1.0]} for n in range(3)]
    status, slates = client("/rank", [ASK | {"user": user, "candidates": ["item 5", "item 3"]} for user in users])
    assert status == 200 and [slate["request_id"] for slate in slates] == [f"visitor {n}-0" for n in range(3)]
    for user, slate in zip(users, slates, strict=True):
        scores = {shown["video"]: shown["score"] for shown in slate["slate"]}
        wanted = score(loaded, 0, user["profile"], [5, 3])
        np.testing.assert_allclose([scores["item 5"], scores["item 3"]], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "change", "field", "said"),
    [
        ("/rank", {"candidates": [5]}, ["candidates", 0], "string"),
        ("/rank", {"candidates": ["item 5", "item 5"]}, ["candidates", 1], "video item 5 is there twice"),
        ("/rank", {"candidates": ["x", "y"]}, ["candidates"], "knows none of the videos 'x', 'y'"),
        ("/rank", {"context": [0.5, 1.0]}, ["context"], "at most 1 item"),
        ("/rank", {"context": {"houre": 1.0}}, ["context"], "no feature is called 'houre'; did you mean 'hour'"),
        ("/rank", {"user": {"id": "ann", "profile": {"points": "many"}}}, ["user", "profile"], "points='many'"),
        ("/rank", {"items": [NEW | {"id": "z", "features": [1.0]}]}, ["items", 0, "features"], "has 1 numbers"),
        ("/items", {"items": [NEW | {"id": "z", "features": {"prices": 1}}]}, ["items", 0, "features"], "'price'"),
        ("/items", {"items": [NEW, NEW]}, ["items", 1, "id"], "video new one is there twice"),
        ("/items", {"items": [NEW | {"tag": "shoes"}]}, ["items", 0, "tag"], "integer"),
        ("/items", {"items": [NEW | {"author": 1.5}]}, ["items", 0, "author"], "string"),
    ],
)
def test_errors_name_field_and_value(served, path, change, field, said):
    client, _, _ = served
    status, answer = client(path, (ASK if path == "/rank" else {}) | change)
    assert status == 422 and answer["detail"][0]["loc"] == ["body", *field] and said in answer["detail"][0]["msg"]
    if path == "/rank":
        status, answer = client(path, [ASK, ASK | change])
        assert status == 422 and answer["detail"][0]["loc"] == ["body", 1, *field]


def test_docs_and_warnings(served):
    client, _, _ = served
    client.token = None
    try:
        assert "swagger" in client("/docs", text=True)[1]
        assert {"/rank", "/items", "/feedback"} <= client("/openapi.json")[1]["paths"].keys()
        assert client("/items", {"items": [NEW]})[0] == 401
    finally:
        client.token = TOKEN
    health = client("/healthz")[1]
    assert "no usable propensities" in health["warnings"][0] and health["artifact_b"] is None
