from pathlib import Path

import pydantic
import pytest

from services.common.errors import InvalidSettings
from services.common.settings import Settings, markdown


def load(tmp_path: Path, text: str, environment: dict[str, str] | None = None) -> Settings:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return Settings.from_yaml(path, environment or {})


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    settings = load(tmp_path, "")
    assert settings == Settings()
    assert settings.gateway.host == "127.0.0.1"
    assert settings.gateway.max_request_bytes == 16 * 2**20
    assert settings.gateway.max_response_bytes == 4 * 2**20


def test_reads_the_args_of_a_serve_config(tmp_path: Path) -> None:
    text = """
        http_options: {host: 127.0.0.1, port: 8000}
        applications:
        - name: antiphon
          import_path: services.app:build
          args:
            decode: {num_replicas: 2}
            gateway: {port: 9100}
    """
    settings = load(tmp_path, text)
    assert (settings.decode.num_replicas, settings.gateway.port) == (2, 9100)


def test_reads_plain_settings(tmp_path: Path) -> None:
    assert load(tmp_path, "routing: {policy: random}").routing.policy == "random"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("gatway: {}", "gatway: unknown key"),
        ("gateway: {prot: 1}", "gateway.prot: unknown key"),
        ("gateway: {tls: {cert_file: a, key_file: b, cipher: c}}", "gateway.tls.cipher: unknown key"),
        ("gateway: {port: 70000}", "gateway.port: "),
        ("engine: {block_size: 0}", "engine.block_size: "),
        ("routing: {policy: best}", "routing.policy: "),
        ("model: {kv_dtype: fp8, cache_mode: naive}", "model: "),
        ("sessions: {store: redis}", "sessions: "),
        ("sessions: {heartbeat_s: 4.0, registry_ttl_s: 5.0}", "sessions: "),
        ("sessions: {ttl_s: .inf}", "sessions.ttl_s: "),
    ],
)
def test_a_mistake_is_refused_by_the_path_of_its_key(tmp_path: Path, text: str, key: str) -> None:
    with pytest.raises(InvalidSettings, match=key):
        load(tmp_path, text)


@pytest.mark.parametrize("text", ["- 1", "just text", "a: [", "applications: []", "applications: [1]", "{b: *c}"])
def test_a_file_of_another_shape_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidSettings):
        load(tmp_path, text)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"nowhere\.yaml"):
        Settings.from_yaml(tmp_path / "nowhere.yaml", {})


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    environment = {
        "ANTIPHON__GATEWAY__PORT": "9001",
        "ANTIPHON__ENGINE__PREFIX_CACHING": "false",
        "ANTIPHON__ENGINE__NUM_BLOCKS": "null",
        "ANTIPHON__SESSIONS__SENTINELS": "[a:1, b:2]",
        "UNRELATED": "x",
    }
    settings = load(tmp_path, "{gateway: {port: 1}, engine: {num_blocks: 7}}", environment)
    assert settings.gateway.port == 9001
    assert not settings.engine.prefix_caching
    assert settings.engine.num_blocks is None
    assert settings.sessions.sentinels == ("a:1", "b:2")


@pytest.mark.parametrize(
    ("name", "value"),
    [("ANTIPHON__GATEWAY__PROT", "1"), ("ANTIPHON__GATEWAY__PORT__X", "1"), ("ANTIPHON__GATEWAY__PORT", "[")],
)
def test_an_override_that_fits_nothing_is_refused(tmp_path: Path, name: str, value: str) -> None:
    with pytest.raises(InvalidSettings, match=r"gateway\.p"):
        load(tmp_path, "gateway: {port: 1}", {name: value})


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(pydantic.ValidationError):
        Settings().gateway.port = 1


def test_settings_survive_a_round_trip_through_json() -> None:
    settings = Settings.from_mapping({"gateway": {"tls": {"cert_file": "a", "key_file": "b"}}}, {})
    assert Settings.from_mapping(settings.model_dump(mode="json"), {}) == settings


def test_every_knob_is_described() -> None:
    rows = markdown().splitlines()[2:]
    assert len(rows) > 60
    assert all(row.split("|")[3].strip() for row in rows)
    assert any(row.startswith("| `gateway.tls.cert_file` | `required` |") for row in rows)
