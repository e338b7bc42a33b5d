import re

import pytest

from services.common.errors import InvalidSettings
from services.sessions.keys import Keyspace

SECRET = b"sixteen bytes ok"
HOSTILE = ["a:b", "{x}", "*", "a\r\nFLUSHALL", "\x00", "ü🙂", "\ud800", "", "x" * 10_000]


def tag_of(key: str) -> str:
    return re.findall(r"\{(.*?)\}", key)[0]


def all_keys(keys: Keyspace, tenant: str, session_id: str) -> list[str]:
    tenant_keys, session_keys = keys.tenant(tenant), keys.session(tenant, session_id)
    return [tenant_keys.sessions, tenant_keys.expiry, tenant_keys.bytes, session_keys.meta, session_keys.turns]


def test_all_keys_of_a_tenant_share_one_hash_tag() -> None:
    keys = Keyspace("prod", SECRET)
    names = all_keys(keys, "acme", "chat-1") + all_keys(keys, "acme", "chat-2")
    assert len({tag_of(name) for name in names}) == 1


def test_tenants_have_different_hash_tags() -> None:
    keys = Keyspace("prod", SECRET)
    assert tag_of(keys.tenant("acme").bytes) != tag_of(keys.tenant("other").bytes)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_people_gets_into_a_key(text: str) -> None:
    for name in all_keys(Keyspace("prod", SECRET), text, text):
        assert re.fullmatch(
            r"antiphon:v1:prod:\{t:[0-9a-f]{32}\}:(sessions|expiry|bytes|session:[0-9a-f]{32}:(meta|turns))", name
        )


def test_same_session_id_of_two_tenants_has_nothing_in_common() -> None:
    keys = Keyspace("prod", SECRET)
    assert not set(all_keys(keys, "acme", "chat")) & set(all_keys(keys, "other", "chat"))
    assert keys.session_digest("acme", "chat") != keys.session_digest("other", "chat")


def test_digests_do_not_mix_up_where_one_part_ends() -> None:
    keys = Keyspace("prod", SECRET)
    assert keys.session_digest("ab", "c") != keys.session_digest("a", "bc")
    assert keys.session_digest("a", "b") != keys.idempotency_digest("a", "b")


def test_another_secret_gives_other_keys() -> None:
    one, other = Keyspace("prod", SECRET), Keyspace("prod", SECRET[::-1])
    assert one.session("acme", "chat") != other.session("acme", "chat")


def test_pattern_of_a_cluster_covers_its_keys_only() -> None:
    keys, other = Keyspace("prod", SECRET), Keyspace("prod2", SECRET)
    prefix = keys.pattern.removesuffix("*")
    assert all(name.startswith(prefix) for name in [*all_keys(keys, "acme", "chat"), keys.replicas])
    assert not other.replicas.startswith(prefix)


def test_meta_key_can_be_found_from_the_digest_alone() -> None:
    keys = Keyspace("prod", SECRET)
    session = keys.session("acme", "chat")
    assert keys.session_meta("acme", session.digest) == session.meta


@pytest.mark.parametrize("cluster", ["", "a:b", "{a}", "a*", "a b", "-a", "x" * 64])
def test_refuses_a_cluster_name_that_could_break_a_key(cluster: str) -> None:
    with pytest.raises(InvalidSettings):
        Keyspace(cluster, SECRET)


def test_refuses_a_short_secret_and_never_shows_one() -> None:
    with pytest.raises(InvalidSettings, match="15 bytes"):
        Keyspace("prod", SECRET[:15])
    assert "sixteen" not in repr(Keyspace("prod", SECRET))
