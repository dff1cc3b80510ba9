"""What is read of engines' answers on their way."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake_connector.scheduler.policy.base import Rejected
from mooncake_connector.scheduler.proxy.progress import PrefillTimes, StreamCount, read_whole
from mooncake_connector.scheduler.proxy.rejection import body, explain, retry_seconds

EVENT = b'data: {"choices":[{"text":"\\n\\n"}]}\n\n'


@given(st.integers(0, 40), st.integers(1, 200))
def test_events_are_counted_however_they_are_cut(events: int, size: int):
    stream = EVENT * events
    count = StreamCount()
    for at in range(0, len(stream), size):
        count.feed(stream[at : at + size])
    cuts = len(stream) // size + 1
    assert events - cuts <= count.tokens <= events


def test_usage_is_exact_and_words_about_it_are_not_usage():
    count = StreamCount()
    count.feed(EVENT + b'data: {"choices":[{"text":"\\"completion_tokens\\": 9"}]}\n\n')
    assert count.tokens == 2
    count.feed(b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":17}}\n\n')
    assert count.tokens == 17


def test_prefill_times():
    moments = {"received": 1.0, "scheduled": 1.5, "prefilled": 3.5}
    assert PrefillTimes.of({"timeline": moments, "cached_tokens": 32}) == PrefillTimes(0.5, 2.0, 32)
    assert PrefillTimes.of(None) == PrefillTimes.of({"timeline": "?"}) == PrefillTimes()
    assert PrefillTimes.of({"timeline": {**moments, "scheduled": 0.5}}).queued is None


def test_whole_answers():
    moments = {"first_token": 2.0, "finished": 5.0}
    answer = {"usage": {"completion_tokens": 4}, "kv_transfer_params": {"transfer": {"timeline": moments}}}
    found = read_whole(json.dumps(answer).encode())
    assert (found.tokens, found.decoding) == (4, 3.0)
    for other in (b"", b"[1]", b'{"usage":null,"kv_transfer_params":null}', b'{"usage":3}'):
        assert (read_whole(other).tokens, read_whole(other).decoding) == (None, None)


@pytest.mark.parametrize(("wait", "seconds"), [(0.0, 1), (0.2, 1), (1.1, 2), (30.0, 30)])
def test_a_rejection_in_openais_form(wait: float, seconds: int):
    rejected = Rejected(target="tbt", predicted=0.25, limit=0.1, retry_after=wait)
    assert retry_seconds(rejected) == seconds
    error = json.loads(body(rejected))["error"]
    assert (error["code"], error["slo"], error["predicted"], error["limit"]) == (429, "tbt", 0.25, 0.1)
    assert error["retry_after"] == seconds
    assert error["message"] == explain(rejected)
    assert "0.25 s apart, more than 0.1 s" in error["message"]
