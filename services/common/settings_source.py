"""Where settings come from: a Serve config or plain YAML, and environment variables; and what to say about mistakes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import ValidationError

from services.common.errors import InvalidSettings

ENVIRONMENT_PREFIX = "ANTIPHON__"


def application_args(document: Any) -> Mapping[str, Any]:
    """The settings inside a Serve config, or the document itself."""
    if document is None:
        return {}
    if isinstance(document, dict) and "applications" in document:
        applications = document["applications"]
        if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
            raise InvalidSettings("applications: exactly one application is needed")
        args = applications[0].get("args") or {}
        _check_policy(applications[0], args)
        document = args
    if not isinstance(document, dict):
        raise InvalidSettings("a mapping of sections is needed")
    return document


def _check_policy(application: Mapping[str, Any], args: Any) -> None:
    """A policy that decides by other settings than the replicas', or none at all, would be a silent mistake."""
    scaling = args.get("autoscaling") if isinstance(args, dict) else None
    is_enabled = isinstance(scaling, dict) and scaling.get("enabled", False)
    policy = application.get("autoscaling_policy")
    given = (policy.get("policy_kwargs") or {}).get("settings") if isinstance(policy, dict) else None
    if is_enabled and given != args:
        raise InvalidSettings("autoscaling_policy.policy_kwargs.settings: must be the application's args (an anchor)")
    if policy is not None and not is_enabled:
        raise InvalidSettings("autoscaling_policy: is there, but autoscaling.enabled is not set")


def with_overrides(values: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """A copy of `values` in which ANTIPHON__SECTION__KEY variables have replaced or added their keys."""
    merged = _deep_copy(values)
    for key_path, text in _overrides(environment):
        _set(merged, key_path, text)
    return merged


def _overrides(environment: Mapping[str, str]) -> Iterator[tuple[tuple[str, ...], str]]:
    for name in sorted(environment):
        if name.startswith(ENVIRONMENT_PREFIX):
            yield tuple(name.removeprefix(ENVIRONMENT_PREFIX).lower().split("__")), environment[name]


def _set(values: dict[str, Any], key_path: tuple[str, ...], text: str) -> None:
    """Puts an override in its place, read as YAML (so 9001, true, null and [a, b] mean what they say)."""
    dotted = ".".join(key_path)
    for key in key_path[:-1]:
        child = values.setdefault(key, {})
        if not isinstance(child, dict):
            raise InvalidSettings(f"{dotted}: {key} holds no further keys")
        values = child
    try:
        values[key_path[-1]] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidSettings(f"{dotted}: the environment's value is not YAML") from error


def _deep_copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _deep_copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def describe(error: ValidationError) -> str:
    """One line a problem, each beginning with the key's path."""
    problems = []
    for problem in error.errors(include_url=False, include_input=False):
        key = ".".join(str(part) for part in problem["loc"]) or "settings"
        text = "unknown key" if problem["type"] == "extra_forbidden" else problem["msg"]
        problems.append(f"{key}: {text}")
    return "; ".join(problems)
