"""Settings that only a cluster of several machines needs reach Ray and Serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

# isort: split
import tests.cluster.ray_session  # noqa: F401  (sets variables that Ray reads when it is imported)

# isort: split
from services.app import build_app
from services.common.errors import InvalidSettings
from services.common.settings import Settings


def settings_of(**sections: dict[str, Any]) -> Settings:
    store = {"store": "redis", "url": "redis://sessions:6379/0", "secret_file": "/secrets/secret"}
    return Settings.from_mapping({"sessions": store, **sections}, {})


def actor_options(settings: Settings) -> dict[str, dict[str, Any]]:
    """What Ray is asked for, by deployment."""
    gateway = build_app(settings)._bound_deployment
    _, tokenizer, decode = (getattr(each, "_bound_deployment", None) for each in gateway.init_args)
    found = {each.name: each.ray_actor_options for each in (gateway, tokenizer, decode)}
    return found | {"prefill": decode.init_args[1]._bound_deployment.ray_actor_options}


def test_each_deployment_asks_for_its_own_resources() -> None:
    names = ("gateway", "tokenizer", "prefill", "decode")
    options = actor_options(settings_of(**{name: {"resources": {f"{name}_slot": 1}} for name in names}))
    assert {name: options[name]["resources"] for name in names} == {name: {f"{name}_slot": 1.0} for name in names}


def test_without_the_setting_a_replica_runs_anywhere() -> None:
    assert all(not options.get("resources") for options in actor_options(settings_of()).values())


def test_gateways_that_are_kept_apart_may_use_one_port_number() -> None:
    with pytest.raises(InvalidSettings, match="several replicas"):
        build_app(settings_of(gateway={"num_replicas": 2}))
    build_app(settings_of(gateway={"num_replicas": 2, "resources": {"gateway": 1}}))


@pytest.mark.parametrize("amount", [0, -1, "many"])
def test_an_amount_that_is_none_is_refused(amount: object, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"decode\.resources\.slot"):
        settings_of(decode={"resources": {"slot": amount}})
