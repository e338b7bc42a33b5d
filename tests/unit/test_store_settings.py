"""What the configuration says of the session store, as the connection takes it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from services.common.errors import InvalidSettings
from services.common.settings import SessionSettings
from services.sessions.from_settings import redis_settings


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret"
    path.write_text("word\n")
    return path


def test_a_server_with_a_certificate_of_ours(secret: Path) -> None:
    settings = SessionSettings(
        store="redis",
        url="rediss://store:6380/1",
        password_file=secret,
        tls_ca_file=Path("ca.pem"),
        tls_cert_file=Path("us.pem"),
        tls_key_file=Path("us.key"),
    )
    found = redis_settings(settings)
    assert (found.url, found.password) == ("rediss://store:6380/1", "word")
    assert (found.ca_file, found.cert_file, found.key_file) == ("ca.pem", "us.pem", "us.key")
    assert found.uses_tls


def test_sentinels_with_a_password_and_tls_of_their_own(secret: Path) -> None:
    settings = SessionSettings(
        store="sentinel",
        url="rediss://antiphon@ignored/3",
        sentinels=("one:26379", "[::1]:26380"),
        sentinel_username="watcher",
        sentinel_password_file=secret,
    )
    found = redis_settings(settings)
    assert found.sentinels == (("one", 26379), ("::1", 26380))
    assert (found.username, found.db, found.uses_tls) == ("antiphon", 3, True)
    assert (found.sentinel_username, found.sentinel_password, found.password) == ("watcher", "word", None)


def test_sentinels_without_a_url_are_plain_and_of_database_0() -> None:
    found = redis_settings(SessionSettings(store="sentinel", sentinels=("one:26379",)))
    assert (found.username, found.db, found.uses_tls) == (None, 0, False)


@pytest.mark.parametrize("given", ["tls_cert_file", "tls_key_file"])
def test_half_a_client_certificate_is_refused(given: str) -> None:
    with pytest.raises(ValidationError, match="needed together"):
        SessionSettings(store="redis", url="rediss://store/0", **{given: Path("x")})


@pytest.mark.parametrize("changes", [{"sentinels": ("one",)}, {"url": "redis://a/b"}])
def test_what_leads_nowhere_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidSettings):
        redis_settings(SessionSettings.model_validate({"store": "sentinel", "sentinels": ("one:1",)} | changes))
