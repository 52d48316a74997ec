"""What the simulated engines are asked for: requests, their times and their ends."""

from dataclasses import dataclass

from hypothesis import strategies as st

from pallasite.engine.request import Finish
from pallasite.engine.sequence import Group

PAGE = 4
EOS = 1


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request, when it comes, and when it ends by itself or by its caller, in steps or tokens.

    `lease` is None, or the steps from its first token to its decode.
    """

    prompt_len: int
    max_tokens: int
    n: int = 1
    priority: int = 0
    arrives: int = 0
    stops_after: int | None = None
    aborts_after: int | None = None
    lease: int | None = None


@st.composite
def scenes(draw: st.DrawFn, num_shards: int = 1) -> tuple[dict[str, int], list[Job]]:
    """Jobs that each fit into a shard's pages alone, and the sizes of an engine."""
    num_pages = draw(st.integers(2, 16))
    num_slots = draw(st.integers(2, 5) if num_shards == 1 else st.integers(1, 3))
    budget = draw(st.integers(num_slots + 1, num_slots + 20))
    capacity = num_pages * PAGE
    jobs = []
    for _ in range(draw(st.integers(1, 6 + num_shards))):
        prompt_len = draw(st.integers(1, min(30, capacity - 1)))
        max_tokens = draw(st.integers(1, min(10, capacity - prompt_len)))
        lease = draw(st.none() | st.integers(0, 12))
        jobs.append(
            Job(
                prompt_len=prompt_len,
                max_tokens=max_tokens,
                n=1 if lease is not None else draw(st.integers(1, 3)),
                priority=draw(st.integers(0, 2)),
                arrives=draw(st.integers(0, 12)),
                stops_after=draw(st.none() | st.integers(1, 10)),
                aborts_after=draw(st.none() | st.integers(0, 12)),
                lease=lease,
            )
        )
    each = {"num_pages": num_pages, "num_slots": num_slots, "max_batch_tokens": budget}
    sizes = {name: num_shards * size for name, size in each.items()}
    return sizes | {"num_shards": num_shards}, jobs


def events_of(group: Group) -> tuple[dict[int, list[int]], dict[int, Finish]]:
    """Tokens and finish by index, as the group's reader gets them."""
    tokens: dict[int, list[int]] = {}
    finishes: dict[int, Finish] = {}
    for event in group.stream:
        assert event.index not in finishes, "nothing follows a finish"
        tokens.setdefault(event.index, []).extend(event.token_ids)
        if event.finish is not None:
            finishes[event.index] = event.finish
    return tokens, finishes
