"""The schema of the settings file, the document made of it, and the example."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import jsonschema
import msgspec
import pytest

from mooncake_connector.cli import main
from mooncake_connector.scheduler.proxy import configuration
from mooncake_connector.scheduler.proxy.configuration import NAMES
from mooncake_connector.scheduler.proxy.schema import settings_schema
from mooncake_connector.scheduler.proxy.settings import NO_OPTION, RELOADABLE, SECTIONS, SHORT

ROOT = Path(__file__).parent.parent.parent
EXAMPLE = ROOT / "examples" / "proxy.yaml"


def test_every_key_is_described():
    schema = settings_schema()
    for name, found in [("", schema), *schema["$defs"].items()]:
        for key, value in found["properties"].items():
            assert len(value.get("description", "")) > 5, (name, key)
    assert set(schema["properties"]) == {*NAMES, *SHORT}
    assert set(schema["properties"]) > RELOADABLE


def test_the_document_is_fresh():
    made = subprocess.run(
        [sys.executable, ROOT / "scripts" / "proxy_settings.py", "--print"], capture_output=True, text=True
    )
    assert made.stdout == (ROOT / "docs" / "proxy-settings.md").read_text(), "run scripts/proxy_settings.py"


def test_every_setting_but_secrets_and_sections_has_an_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["proxy", "--help"])
    told = capsys.readouterr().out
    for name in {*NAMES, *SHORT} - set(NO_OPTION) - set(SECTIONS):
        assert f"--{name.replace('_', '-')} " in told, name


def test_the_command_prints_the_schema(capsys: pytest.CaptureFixture[str]):
    assert main(["proxy", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(settings_schema()))


def test_the_example_loads_and_fits_the_schema():
    settings = configuration.load({"config": str(EXAMPLE)}, {})
    assert settings.require_key
    for name, found in settings.classes.items():
        assert found.api_keys == (hashlib.sha256(name.encode()).hexdigest(),)
    jsonschema.validate(msgspec.yaml.decode(EXAMPLE.read_bytes()), settings_schema())


@pytest.mark.parametrize(
    "text",
    [
        "prot: 8000",
        "port: 70000",
        "order: both",
        "fixed_slo: [ttft]",
        "scheduling: {slo: {tfft: 1}}",
        "scheduling: {favour_cheap: 2}",
        "classes: {gold: {api_keys: [secret]}}",
        "admin_keys: [secret]",
    ],
)
def test_schema_and_loader_refuse_the_same(tmp_path: Path, text: str):
    path = tmp_path / "proxy.yaml"
    path.write_text("prefill: [http://p:1]\ndecode: [http://d:2]\n" + text)
    with pytest.raises(ValueError):
        configuration.load({"config": str(path)}, {})
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(msgspec.yaml.decode(path.read_bytes()), settings_schema())
