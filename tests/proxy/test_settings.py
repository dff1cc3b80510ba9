"""The proxy's settings from a file, and how wrong ones are told."""

from pathlib import Path
from typing import Any

import pytest

from mooncake_connector.errors import ConfigError
from mooncake_connector.scheduler.policy.base import Slo
from mooncake_connector.scheduler.proxy import configuration
from mooncake_connector.scheduler.proxy.settings import ProxySettings

POOLS = "prefill: [http://p:1]\ndecode: http://d:2/\n"
KEY = "2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae"
WHOLE = f"""
{POOLS}port: 9000
order: serial
scheduling:
  routing: local_cache
  slo: {{ttft: 5}}
  slos:
    - {{model: big, service_class: gold, slo: {{ttft: 60, ttft_per_1k_tokens: 1, tbt: 0.05}}}}
classes:
  gold: {{api_keys: [{KEY}], priority: 10, max_priority: 20}}
"""


def load(tmp_path: Path, text: str, options: dict[str, Any] | None = None, **environ: str) -> ProxySettings:
    path = tmp_path / "proxy.yaml"
    path.write_text(text)
    environ = {f"MOONCAKE_PROXY_{name.upper()}": value for name, value in environ.items()}
    return configuration.load({"config": str(path), **(options or {})}, environ)


def test_a_whole_file(tmp_path: Path):
    settings = load(tmp_path, WHOLE)
    assert (settings.prefill, settings.decode) == (("http://p:1",), ("http://d:2",))
    assert (settings.port, settings.order) == (9000, "serial")
    scheduling = settings.scheduling
    assert (scheduling.routing, scheduling.admission) == ("local_cache", "per_request")
    assert scheduling.slo == Slo(ttft=5)
    assert scheduling.slo_of("big", "gold") == Slo(ttft=60, ttft_per_1k_tokens=1, tbt=0.05)
    assert scheduling.slo_of("big") == scheduling.slo
    assert settings.fixed_slo == ("ttft",)
    assert settings.classes["gold"].max_priority == 20


def test_the_command_line_beats_the_environment_beats_the_file(tmp_path: Path):
    said = {"order": "concurrent", "routing": "random", "slo_ttft": "7"}
    settings = load(tmp_path, WHOLE, {"routing": "round_robin", "slo_tbt": "0.2"}, **said)
    assert settings.port == 9000
    assert settings.order == "concurrent"
    assert settings.scheduling.routing == "round_robin"
    assert settings.scheduling.slo == Slo(ttft=7, tbt=0.2)
    assert settings.fixed_slo == ("ttft", "tbt")


def test_without_a_file_everything_has_a_default():
    settings = configuration.load({"prefill": ["http://p:1"], "decode": ["http://d:2"]}, {})
    assert (settings.scheduling.routing, settings.scheduling.admission) == ("conductor", "per_request")
    assert settings.fixed_slo == ()


def test_the_environment_names_a_file(tmp_path: Path):
    (tmp_path / "a.yaml").write_text(POOLS + "min_prefill_tokens: 40\n")
    settings = configuration.load({}, {"MOONCAKE_PROXY_CONFIG": str(tmp_path / "a.yaml")})
    assert settings.scheduling.min_prefill_tokens == 40


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is no YAML"),
        ("just words", "must be a mapping"),
        ("prot: 8000", "unknown proxy setting 'prot': did you mean port?"),
        ("port: many", "--port (MOONCAKE_PROXY_PORT) can't be 'many'"),
        ("scheduling: 3", "scheduling can't be 3"),
        (
            "scheduling: {routing: best}",
            "--routing (MOONCAKE_PROXY_ROUTING) can't be 'best': choose conductor or",
        ),
        ("scheduling: {slo: {ttft: soon}}", "--slo-ttft (MOONCAKE_PROXY_SLO_TTFT) can't be 'soon'"),
        (
            "scheduling: {slo: {ttft: -1}}",
            "--slo-ttft (MOONCAKE_PROXY_SLO_TTFT) is -1.0: it must be at least",
        ),
        ("scheduling: {slo: {tfft: 1}}", "scheduling.slo in --config can't be"),
        ("scheduling: {emergency_kv: 0}", "scheduling.emergency_kv in --config is 0.0"),
        ("scheduling: {slos: [{service_class: gold, slo: {}}]}", "names 'gold': define it under classes"),
        ("classes: {gold: {api_keys: [secret]}}", "classes.gold.api_keys[0] in --config is no SHA-256"),
        ("admin_keys: [secret]", "--admin-keys (MOONCAKE_PROXY_ADMIN_KEYS): number 1 is no SHA-256"),
        ("classes: {gold: {api_keys: secret}}", "api_keys in --config is wrong: Expected `array`"),
        ("engine_api_key: [secret]", "MOONCAKE_PROXY_ENGINE_API_KEY is wrong: Expected `str`"),
        ("prefill: http://user:secret@p:1", "--prefill (MOONCAKE_PROXY_PREFILL): leave user, password"),
        ("prefill: http://p:1?key=secret", "--prefill (MOONCAKE_PROXY_PREFILL): leave user, password, query"),
        ("require_key: true", "--require-key (MOONCAKE_PROXY_REQUIRE_KEY) is on, but no class has a key"),
        (
            f"classes: {{a: {{api_keys: [{KEY}]}}, b: {{api_keys: [{KEY}]}}}}",
            "classes.b.api_keys[0] in --config is in classes.a, too",
        ),
        (
            "classes: {gold: {priority: 2000}}",
            "classes.gold.priority in --config is 2000: it must be between",
        ),
        ("scheduling: {favour_cheap: .nan}", "scheduling.favour_cheap in --config is nan"),
        ("fixed_slo: [ttft]", "unknown proxy setting 'fixed_slo'"),
        ("classes: {gold: {priority: high}}", "classes.*.priority in --config is wrong: Expected `int`"),
    ],
)
def test_what_is_wrong_is_named_with_the_mend(tmp_path: Path, text: str, message: str):
    alone = text.startswith(("a:", "just"))
    text = text if alone else text + "\ndecode: http://d:2" if text.startswith("prefill") else POOLS + text
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text)
    assert message in str(raised.value)
    assert "secret" not in str(raised.value)


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"--config .*can't read /nowhere.yaml: No such file"):
        configuration.load({"config": "/nowhere.yaml"}, {})
