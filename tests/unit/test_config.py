import pytest

from mooncake_connector.config import ConnectorConfig, load_connector_config
from mooncake_connector.errors import ConfigError


def test_defaults_come_without_a_word() -> None:
    assert load_connector_config(None, {}) == ConnectorConfig()


def test_environment_wins() -> None:
    config = load_connector_config({"lease_s": 40, "path": "tcp"}, {"MOONCAKE_LEASE_S": "50"})
    assert config.lease_s == 50
    assert config.path == "tcp"


@pytest.mark.parametrize(
    ("extra", "environ", "says"),
    [
        ({"leas_s": 1}, {}, "unknown setting 'leas_s'"),
        ({"lease_s": "long"}, {}, "lease_s"),
        ({"path": "pigeon"}, {}, "pigeon"),
        ({"side_channel_port": 70000}, {}, "side_channel_port"),
        ({"connections": 0}, {}, "connections"),
        ({"lease_s": 6, "heartbeat_s": 5}, {}, "raise lease_s or lower heartbeat_s"),
        ({"side_channel_host": "0.0.0.0"}, {}, "give this host's own address"),
        ({}, {"MOONCAKE_PATH": "pigeon"}, "choose auto, or some of"),
        ({}, {"MOONCAKE_LEASE_S": "long"}, "MOONCAKE_LEASE_S='long' is not a number"),
    ],
)
def test_bad_settings_name_themselves(extra: dict[str, object], environ: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_connector_config(extra, environ)
