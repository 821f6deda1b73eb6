"""Messages among the ranks of a replica: all of them hear, fail and leave together."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from waiting import wait_until

from vcrd.cache import channel
from vcrd.cache.channel import Channel
from vcrd.link.errors import LinkError
from vcrd.link.plan import Place
from vcrd.settings import LinkSettings

SETTINGS = LinkSettings(teacher="cache:/x", timeout=30, connect_timeout=30)
LEADER, *READERS = [Place(0, 0, rank) for rank in range(3)]


class Rank:
    """One rank's channel, and what it was told."""

    def __init__(self, place: Place, settings: LinkSettings = SETTINGS) -> None:
        self.heard: list[dict] = []
        self.failures: list[str] = []
        self.left: list[bool] = []
        self.channel = Channel(
            settings,
            place,
            1,
            3,
            hear=self.heard.append,
            fail=lambda error: self.failures.append(str(error)),
            left=lambda: self.left.append(True),
        )


@pytest.fixture
def ranks(monkeypatch) -> Iterator[list[Rank]]:
    """The leader and two readers, connected."""
    said: queue.Queue = queue.Queue()

    def spread(value, group):
        if group == "leader":
            said.put(value)
            said.put(value)
            return value
        return said.get(timeout=30)

    monkeypatch.setattr(channel, "spread", spread)
    all_ranks = [Rank(place) for place in (LEADER, *READERS)]
    with ThreadPoolExecutor(3) as pool:
        names = ("leader", "reader", "reader")
        for meeting in [pool.submit(r.channel.meet, n) for r, n in zip(all_ranks, names, strict=True)]:
            meeting.result(60)
    yield all_ranks
    for rank in all_ranks:
        rank.channel.close()


def test_the_readers_hear_what_the_leader_tells(ranks):
    leader, *readers = ranks
    for number in range(3):
        leader.channel.tell({"number": number})
    leader.channel.tell({"number": 3}, but=READERS[0])
    wait_until(lambda: [len(each.heard) for each in readers] == [3, 4], 30, "all messages are there")
    assert (
        readers[1].heard == [{"number": number} for number in range(4)]
        and readers[0].heard == readers[1].heard[:3]
    )
    leader.channel.close()
    wait_until(lambda: all(each.left for each in readers), 30, "the readers know that the leader has left")
    assert [rank.failures for rank in ranks] == [[]] * 3 and not leader.heard


def test_a_reader_that_leaves_is_no_failure(ranks):
    leader, first, second = ranks
    first.channel.close()
    wait_until(lambda: leader.channel._left, 30, "the leader knows")
    leader.channel.tell({"number": 0})
    wait_until(lambda: second.heard, 30, "the other reader hears more")
    assert [rank.failures for rank in ranks] == [[]] * 3 and not second.left


def test_a_rank_that_gives_up_ends_all_of_them_once(ranks):
    ranks[1].channel.give_up("it cannot read")
    ranks[1].channel.give_up("another reason")
    wait_until(lambda: all(rank.failures for rank in ranks), 30, "all ranks know")
    ranks[0].channel.give_up("a third reason")
    assert [rank.failures for rank in ranks] == [["it cannot read"]] * 3


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"\x04" + bytes(7) + b"{..}", "its message is not a JSON object"),
        (b"\x02" + bytes(7) + b"[]", "its message is not a JSON object"),
        (b"\xff" * 8, "is longer than 268435456"),
    ],
    ids=["no JSON", "no object", "too long"],
)
def test_a_message_that_cannot_be_read_ends_all_ranks(ranks, sent, reason):
    (connection,) = ranks[1].channel._connections.values()
    connection.send_bytes(sent, seconds=30)
    wait_until(lambda: all(rank.failures for rank in ranks), 30, "all ranks know")
    for rank in ranks[0], ranks[2]:
        (said,) = rank.failures
        assert said.startswith(f"{READERS[0]} is gone: ") and reason in said


def test_ranks_that_do_not_come_are_named():
    settings = replace(SETTINGS, connect_timeout=0.1)
    alone = Rank(LEADER, settings)
    with pytest.raises(LinkError) as error:
        alone.channel.meet(None)
    alone.channel.close()
    both = ", ".join(map(str, READERS))
    assert str(error.value) == f"{both} did not join {LEADER} within 0.1 seconds (connect_timeout)"
