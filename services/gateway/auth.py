"""Bearer tokens to tenants, from a secrets file. The tenant never comes from the body of a request."""

from __future__ import annotations

import hashlib
import hmac
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from services.common.errors import InvalidSettings, Unauthenticated

MIN_TOKEN_CHARS = 16
_TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SCHEME = "bearer "


class Authenticator:
    """Knows the tokens of all tenants, as digests. Without any, every caller is `default_tenant`."""

    def __init__(self, tokens: Mapping[str, str] | None, default_tenant: str) -> None:
        """tokens: token -> tenant; None: no authentication."""
        self._digests: list[tuple[bytes, str]] | None = None
        self._default_tenant = default_tenant
        if tokens is not None:
            self.set_tokens(tokens)

    def set_tokens(self, tokens: Mapping[str, str]) -> None:
        """From now on these are the ones."""
        self._digests = [(_digest(token), tenant) for token, tenant in tokens.items()]

    def tenant_of(self, authorization: str | None) -> str:
        """The tenant of an `authorization` header. Raises Unauthenticated.

        Looks at every token whichever matches, and compares digests in constant time.
        """
        if self._digests is None:
            return self._default_tenant
        if authorization is None or not authorization.lower().startswith(_SCHEME):
            raise Unauthenticated("a bearer token is needed")
        presented = _digest(authorization[len(_SCHEME) :].strip())
        found: str | None = None
        for digest, tenant in self._digests:
            if hmac.compare_digest(digest, presented):
                found = tenant
        if found is None:
            raise Unauthenticated("the token is not valid")
        return found


def read_tokens(path: Path) -> dict[str, str]:
    """token -> tenant, from YAML of `tenant: token` or `tenant: [token, token]` (while one replaces the other).

    Raises InvalidSettings: readable by others or writable by the group, not such a file, a short or double token.
    """
    try:
        mode = path.stat().st_mode
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        # the parser's own message quotes the secret, so it does not even travel as a cause
        raise InvalidSettings(f"gateway.auth_tokens_file: {path} cannot be read as YAML") from None
    if mode & (stat.S_IRWXO | stat.S_IWGRP):
        raise InvalidSettings(f"gateway.auth_tokens_file: {path} is open to others; chmod 600 it")
    if not isinstance(document, dict) or not document:
        raise InvalidSettings(f"gateway.auth_tokens_file: {path} must map tenants to tokens")
    tokens: dict[str, str] = {}
    for tenant, value in document.items():
        _add(tokens, tenant, value if isinstance(value, list) else [value])
    return tokens


def _add(tokens: dict[str, str], tenant: Any, values: list[Any]) -> None:
    if not isinstance(tenant, str) or not _TENANT.fullmatch(tenant):
        raise InvalidSettings("gateway.auth_tokens_file: a tenant is 1 to 64 letters, digits, '.', '_' or '-'")
    for value in values:
        if not isinstance(value, str) or len(value) < MIN_TOKEN_CHARS:
            raise InvalidSettings(
                f"gateway.auth_tokens_file: {tenant}: a token is a string of {MIN_TOKEN_CHARS} characters or more"
            )
        if value in tokens:
            raise InvalidSettings(f"gateway.auth_tokens_file: {tenant}: the token is another's already")
        tokens[value] = tenant


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()
