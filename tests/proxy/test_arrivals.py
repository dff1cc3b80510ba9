"""A request as the conductor gets it, and what is promised by default."""

import hashlib
import json
from typing import Any

import pytest
from multidict import CIMultiDict

from mooncake_connector.scheduler.policy.base import Slo
from mooncake_connector.scheduler.policy.prefix_index import PrefixIndex
from mooncake_connector.scheduler.prompts.tokens import Tokens
from mooncake_connector.scheduler.proxy.arrivals import Arrivals, Asked
from mooncake_connector.scheduler.proxy.callers import Callers
from mooncake_connector.scheduler.proxy.openai import BadRequest, ClientRequest
from mooncake_connector.scheduler.proxy.settings import ProxySettings, ServiceClass
from tests.proxy.conftest import Start
from tests.proxy.fakes import MODEL

GOLD = hashlib.sha256(b"gold").hexdigest()
PATH = "/v1/completions"


async def describe(
    body: dict[str, Any], headers: dict[str, str] | None = None, tenant_header: str = ""
) -> Asked:
    tokens = Tokens()
    classes = {"gold": ServiceClass(api_keys=(GOLD,), priority=7, max_priority=9)}
    callers = Callers(
        ProxySettings(
            prefill=("http://p",), decode=("http://d",), classes=classes, tenant_header=tenant_header
        )
    )
    arrivals = Arrivals(
        PrefixIndex(16),
        tokens,
        lambda model, name, count: Slo(ttft={"": 1.0, "gold": 2.0}[name] + count),
        lambda: {"adapter"},
    )
    try:
        request = ClientRequest.parse(PATH, json.dumps(body).encode())
        given = CIMultiDict(headers or {})
        caller = callers.of(given)
        assert caller
        return await arrivals.describe(request, given, caller)
    finally:
        tokens.close()


async def test_a_prompt_of_token_ids():
    asked = await describe({"model": "m", "prompt": list(range(40)), "max_tokens": 9})
    arrival = asked.arrival
    assert asked.ids.tolist() == list(range(40))
    assert (arrival.tokens, len(arrival.keys)) == (40, 2)
    assert (arrival.model, arrival.endpoint, arrival.max_tokens) == ("m", PATH, 9)
    assert arrival.slo == Slo(ttft=41.0)
    assert arrival.tenant == arrival.conversation == ""


async def test_text_without_a_tokenizer_is_estimated():
    asked = await describe({"model": "m", "prompt": "a" * 400})
    assert 90 <= asked.arrival.tokens <= 110
    assert asked.arrival.keys == ()
    assert not len(asked.ids)


async def test_adapters_and_salts_have_keys_of_their_own():
    bodies: list[dict[str, Any]] = [{}, {"model": "adapter"}, {"cache_salt": "s"}, {"model": "m"}]
    keys = [(await describe({"prompt": list(range(40)), **body})).arrival.keys for body in bodies]
    assert keys[0] == keys[3]
    assert len({tuple(each) for each in keys}) == 3


@pytest.mark.parametrize(
    ("headers", "priority", "limit", "tenant"),
    [
        ({}, 0, 1.0, ""),
        ({"X-Priority": "-3"}, -3, 1.0, ""),
        ({"Authorization": "Bearer gold"}, 7, 2.0, GOLD),
        ({"authorization": "bearer gold", "x-priority": "100"}, 9, 2.0, GOLD),
        ({"Authorization": "Bearer tin", "X-Priority": "100"}, 100, 1.0, hashlib.sha256(b"tin").hexdigest()),
        ({"Authorization": "Basic gold"}, 0, 1.0, ""),
    ],
)
async def test_who_asks(headers: dict[str, str], priority: int, limit: float, tenant: str):
    arrival = (await describe({"prompt": [1]}, headers)).arrival
    assert (arrival.priority, arrival.slo.ttft, arrival.tenant) == (priority, limit + 1, tenant)


async def test_a_gateway_may_name_the_tenant():
    said = {"X-Team": "blue", "Authorization": "Bearer gold"}
    assert (await describe({"prompt": [1]}, said, "X-Team")).arrival.tenant == "blue"


@pytest.mark.parametrize("said", ["high", "1.5", "1001", "-1001"])
async def test_a_priority_that_is_none(said: str):
    with pytest.raises(BadRequest, match="whole number from -1000 to 1000"):
        await describe({"prompt": [1]}, {"X-Priority": said})


async def test_a_slow_engine_is_promised_what_it_can_keep(start: Start):
    """A laptop whose tokens take half a second is not overloaded by one request."""
    setting = await start()
    promise = setting.proxy.steering.promise
    assert promise(MODEL, "", 100) == Slo()
    estimators = setting.proxy.estimators
    for _ in range(50):
        estimators.step.observe(setting.decode[0].url, 1, 100, 0.5)
        estimators.prefill.observe(setting.prefill[0].url, 100, 0, 20.0)
    slo = promise(MODEL, "", 100)
    assert slo.tbt == pytest.approx(2.5, rel=0.2)
    assert slo.ttft == pytest.approx(200, rel=0.2)


async def test_an_slo_that_was_set_is_kept_to(start: Start):
    setting = await start(fixed_slo=("tbt",))
    estimators = setting.proxy.estimators
    for _ in range(50):
        estimators.step.observe(setting.decode[0].url, 1, 100, 0.5)
    assert setting.proxy.steering.promise(MODEL, "", 100) == Slo()
