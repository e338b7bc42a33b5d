"""NIXL's own thread pauses: otherwise every idle replica takes a core."""

from __future__ import annotations

import sys

import pytest

from services.transfer.nixl_progress import progress_pauses

api = pytest.importorskip("nixl._api")


def config_of_a_new_agent() -> object:
    config = sys.modules[api.nixl_agent.__module__].nixlBind.nixlAgentConfig()
    config.pthrDelay = 0  # as NIXL's own class sets it
    return config


def test_agents_made_in_the_block_pause_and_later_ones_do_not() -> None:
    with progress_pauses(1000):
        inside = config_of_a_new_agent()
    assert inside.pthrDelay == 1000
    assert config_of_a_new_agent().pthrDelay == 0


def test_a_real_agent_is_made_with_it() -> None:
    with progress_pauses(1000):
        agent = api.nixl_agent("patient", api.nixl_agent_config(backends=["UCX"]))
    assert agent.get_agent_metadata()


def test_where_nixl_has_changed_inside_agents_are_made_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules[api.nixl_agent.__module__]
    other = type("Bindings", (), {})()
    monkeypatch.setattr(module, "nixlBind", other)
    with progress_pauses(1000):
        assert module.nixlBind is other
