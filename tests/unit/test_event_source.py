"""Where an engine's events are to be had, from vLLM's configuration."""

from types import SimpleNamespace

import msgspec
import pytest

from mooncake_connector.kv_transfer.vllm.event_source import event_source
from mooncake_connector.scheduler.engines.base import EngineInfo, KvEventSource


def config(endpoint="tcp://*:5557", replay=None, *, rank=0, enabled=True, publisher="zmq"):
    return SimpleNamespace(
        kv_events_config=SimpleNamespace(
            enable_kv_cache_events=enabled,
            publisher=publisher,
            endpoint=endpoint,
            replay_endpoint=replay,
            topic="kv",
        ),
        parallel_config=SimpleNamespace(data_parallel_index=rank, data_parallel_rank=0),
    )


def test_an_address_that_others_can_connect_to():
    assert event_source(config(replay="tcp://*:6000"), "10.0.0.7") == {
        "endpoint": "tcp://10.0.0.7:5557",
        "replay_endpoint": "tcp://10.0.0.7:6000",
        "topic": "kv",
    }
    assert event_source(config("tcp://[::]:1"), "fd00::1")["endpoint"] == "tcp://[fd00::1]:1"
    assert event_source(config("ipc:///a/socket"), "10.0.0.7")["endpoint"] == "ipc:///a/socket"
    assert (
        event_source(config(replay="tcp://127.0.0.1:6000"), "h")["replay_endpoint"] == "tcp://127.0.0.1:6000"
    )


def test_data_parallel_ranks_publish_at_ports_of_their_own():
    found = event_source(config(replay="tcp://*:6000", rank=3), "h")
    assert (found["endpoint"], found["replay_endpoint"]) == ("tcp://h:5560", "tcp://h:6003")


@pytest.mark.parametrize(
    "given",
    [
        SimpleNamespace(kv_events_config=None),
        SimpleNamespace(),
        config(enabled=False),
        config(publisher="null"),
        config("tcp://*:0"),
        config("tcp://collector:5557"),
        config("inproc://events"),
    ],
)
def test_none_where_nobody_can_subscribe(given):
    assert event_source(given, "h") is None


def test_the_probe_of_an_older_connector_is_understood():
    answer = dict.fromkeys(("engine_id", "host", "layout", "model", "dtype", "role", "version"), "x")
    answer |= dict.fromkeys(("incarnation", "port", "block_size", "max_model_len", "protocol"), 1)
    assert msgspec.convert(answer, EngineInfo).kv_events is None
    assert msgspec.convert(answer | {"kv_events": None}, EngineInfo).kv_events is None
    found = msgspec.convert(answer | {"kv_events": event_source(config(), "h")}, EngineInfo)
    assert found.kv_events == KvEventSource("tcp://h:5557", "", "kv")
