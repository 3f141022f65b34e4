"""What a request scores in addition to a memory: answered requests with their contexts, histories cut into K videos."""

import numpy as np
import tiny

from mmrf_jax.data.readers import feedback_log
from mmrf_jax.serving.memories import Memories, Memory
from mmrf_jax.serving.ranker import Ranker
from mmrf_jax.signals import SHORT_VIDEO

S = len(SHORT_VIDEO)


class Known(Ranker):
    """A ranker of the videos 0 to 19, which are their rows, and K = 3."""

    def __init__(self, id_: str):
        self.id, self.spec = id_, tiny.SPEC

    def rows_of(self, videos):
        return np.where(videos < 20, videos, -1)


def rank(number: int, slate: list[int], start: bool = False, history: list[int] | None = None) -> dict:
    given = None
    if history is not None:
        feedback = np.ones((len(history), S))
        given = {"videos": feedback_log.pack_ids(np.array(history)), "feedback": feedback_log.to_bytes(feedback, "<f4")}
    return {
        "kind": "rank",
        "number": number,
        "start": start,
        "history": given,
        "time": number,
        "profile": feedback_log.to_bytes(np.zeros(3), "<f4"),
        "context": feedback_log.to_bytes(np.array([number, 0.5]), "<f4"),
        "candidates": feedback_log.pack_ids(np.arange(30)),
        "slate": feedback_log.to_bytes(np.array(slate), "<u2"),
    }


def answer(number: int, videos: list[int]) -> dict:
    return {
        "kind": "feedback",
        "request": f"1-{number}",
        "user": 1,
        "event": f"e{number}",
        "time": number,
        "videos": feedback_log.pack_ids(np.array(videos)),
        "feedback": feedback_log.to_bytes(np.full((len(videos), S), number + 2.0), "<f4"),
        "left": False,
    }


def said(seen) -> list[tuple[list[int], float, float | None]]:
    """(videos, their feedback, first number of the context) of each request."""
    return [
        (x.videos.tolist(), float(x.feedback.mean()), None if x.context is None else x.context[0].item()) for x in seen
    ]


def test_requests_and_contexts_by_hand():
    known, memories, serving = feedback_log.UserLog(SHORT_VIDEO), Memories(10), Known("a")
    history = np.array([7, 99, 8, 9, 10, 11]), np.ones((6, S), np.float32)
    # A session starts: the last H = 4 of the history, of which video 99 is unknown to the ranker.
    assert said(memories.since(1, known, serving, True, history)[1]) == [([8], 1.0, None), ([9, 10, 11], 1.0, None)]
    for record in (rank(0, [1, 2, 25], True, [7, 99, 8, 9, 10, 11]), answer(0, [1, 2, 25]), rank(1, [3, 4, 5])):
        known.apply(record, tiny.SPEC.history)
    memories.hold(1, Memory("a", 0, 0, {"state": np.ones(2)}))
    # Since the first request: its own known videos, with its context; the second one has no answer yet.
    value, seen = memories.since(1, known, serving, False, None)
    assert value["state"].tolist() == [1.0, 1.0] and said(seen) == [([1, 2], 2.0, 0.0)]
    known.apply(answer(1, [3, 4, 5]), tiny.SPEC.history)
    assert said(memories.since(1, known, serving, False, None)[1]) == [([1, 2], 2.0, 0.0), ([3, 4, 5], 3.0, 1.0)]
    # Another artefact begins again with the history before the session.
    value, seen = memories.since(1, known, Known("b"), False, None)
    whole = [([8], 1.0, None), ([9, 10, 11], 1.0, None), ([1, 2], 2.0, 0.0), ([3, 4, 5], 3.0, 1.0)]
    assert value is None and said(seen) == whole
    # Of the next session all of this is history, without requests.
    value, seen = memories.since(1, known, serving, True, None)
    assert value is None and [x.videos.tolist() for x in seen] == [[3, 4, 5]]


def test_a_request_of_more_than_k_videos_is_cut():
    seen = Known("a").seen(np.arange(7), np.ones((7, S), np.float32), np.ones(2))
    assert [x.videos.tolist() for x in seen] == [[0], [1, 2, 3], [4, 5, 6]] and seen[0].context.tolist() == [1.0, 1.0]
