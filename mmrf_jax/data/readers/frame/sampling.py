"""Candidates of requests: the logged lists, or the shown items and others that were available on the same day."""

from __future__ import annotations

import numpy as np

from mmrf_jax.data.readers.engine.candidates import CandidatePool, make_pool, mix
from mmrf_jax.data.readers.frame.notes import Notes
from mmrf_jax.schema import Schema

DEFAULT_CANDIDATES = 100
_NEVER = np.int32(2**31 - 1)


def choose_num_candidates(longest: int, num_items: int, slate: int, schema: Schema, notes: Notes) -> int:
    """Return C: as the schema says, or the longest candidate list, or `DEFAULT_CANDIDATES`; at most all items.

    Args:
      longest: length of the longest list; 0 for no lists.
      num_items: that there are.
      slate: K.

    Raises:
      ValueError: if there are too few items to choose from.
    """
    if num_items <= slate:
        raise ValueError(
            f"the log has {num_items} items, and requests show up to {slate}: there is nothing to rank; "
            "set schema.slate_size to fewer"
        )
    if schema.num_candidates:
        if schema.num_candidates > num_items or schema.num_candidates < slate:
            raise ValueError(
                f"schema.num_candidates={schema.num_candidates} must lie between slate_size={slate} and the "
                f"{num_items} items"
            )
        return schema.num_candidates
    found = max(min(longest or DEFAULT_CANDIDATES, num_items), slate)
    notes.assume(
        f"num_candidates={found}, " + ("the longest list of candidates" if longest else "the default, or all items")
    )
    return found


def available_pool(item: np.ndarray, day: np.ndarray, since: np.ndarray, least: int) -> CandidatePool:
    """Return the pool of items by the first day on which they are there; the first `least` are there from the start.

    Args:
      item: [n] different item rows: those that are shown.
      day: [n] their first days.
      since: [V] the days that the item table names, 0 for none. Other items that were never shown are in no request,
        except where a list names them.
      least: C.
    """
    live = np.full(len(since), _NEVER, np.int32)
    live[item] = day
    live = np.where(since > 0, since, live)
    live[0] = _NEVER  # the unknown item
    first = np.lexsort((np.arange(len(live)), live))[: max(least, 1)]
    live[first[first > 0]] = min(int(day.min()), int(live[first].min()))
    return make_pool(live, int(_NEVER))


def note_lengths(lengths: np.ndarray, count: int, notes: Notes) -> None:
    """Note how many lists [r] have fewer or more than C candidates."""
    fewer, more = int((lengths < count).sum()), int((lengths > count).sum())
    notes.count(f"requests list fewer than {count} candidates: filled with items of the day", fewer, len(lengths))
    notes.count(f"requests list more than {count} candidates: sampled", more, len(lengths))


def listed_candidates(
    rows: np.ndarray, lengths: np.ndarray, exposed: np.ndarray, filled: np.ndarray, key: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return candidates [r, C] and slates [r, K] from candidate lists, in random order.

    Args:
      rows: [sum(lengths)] item rows of the lists.
      lengths: [r] of the lists.
      exposed: [r, K] item rows of shown items, all in the lists; -1 for none.
      filled: [r, C] different items of the day, for requests whose lists are shorter than C.
      key: [r] uint64 hash of each request.
    """
    (r, c), k = filled.shape, exposed.shape[1]
    request = np.concatenate([np.repeat(np.arange(r), n) for n in (k, lengths, c)])
    item = np.concatenate([exposed.ravel(), rows, filled.ravel()]).astype(np.int64)
    kind = np.repeat([0, 1, 2], [r * k, len(rows), r * c])
    there = item >= 0
    request, item, kind = request[there], item[there], kind[there]
    chance = mix(key[request] ^ mix(item.astype(np.uint64) + np.uint64(1)))
    once = np.lexsort((kind, item, request))  # of an item's entries, the first kind counts
    repeated = np.zeros(len(once), bool)
    repeated[1:] = (request[once][1:] == request[once][:-1]) & (item[once][1:] == item[once][:-1])
    kept = once[~repeated]
    kept = kept[np.lexsort((chance[kept], kind[kept], request[kept]))]
    first = np.searchsorted(request[kept], np.arange(r))
    chosen = kept[first[:, None] + np.arange(c)]  # each request has C different items in `filled` alone
    order = np.argsort(chance[chosen], axis=1, kind="stable")
    found = item[np.take_along_axis(chosen, order, 1)]
    same = exposed[:, :, None] == found[:, None]
    slate = np.where(exposed >= 0, same.argmax(axis=2), -1)
    return found.astype(np.int32), slate.astype(np.int32)


def plackett_luce_scores(propensity: np.ndarray, slate: np.ndarray, candidates: int) -> np.ndarray:
    """Return scores [r, C] under which Plackett–Luce has the propensities [r, K] of the slates [r, K].

    The item of a slot has its propensity of the mass that the slots above left, and the items that were not shown share
    the rest equally.
    """
    r, k = slate.shape
    rest, weight = np.ones(r), np.full((r, candidates), np.nan)
    for slot in range(k):
        shown = np.flatnonzero(slate[:, slot] >= 0)
        p = propensity[shown, slot]
        weight[shown, slate[shown, slot]] = p * rest[shown]
        rest[shown] *= np.maximum(1.0 - p, 1e-6)  # so that a certain choice leaves some for the next slot
    others = np.isnan(weight)
    share = rest / np.maximum(others.sum(axis=1), 1)
    return np.log(np.where(others, share[:, None], weight)).astype(np.float32)
