"""Makes the secrets of a cluster, each at random: for Kubernetes on standard output, or as files for compose.

    python scripts/cluster_secrets.py --tenant acme --tenant umbrella | kubectl apply -f -
    python scripts/cluster_secrets.py --directory deploy/secrets

Run it once: another key of the sessions is another name for each of them, and they are not found again.
A tenant's token: kubectl -n antiphon get secret antiphon-tenants -o jsonpath='{.data.tokens\\.yaml}' | base64 -d
"""

from __future__ import annotations

import argparse
import hashlib
import os
import secrets
import sys
from pathlib import Path

import yaml

from services.sessions.connect import ACL_COMMANDS
from services.sessions.keys import PREFIX

# All that Ray does to its store; nothing that stops or rewrites the server.
_RAY_RIGHTS = ("~*", "resetchannels", "+@all", "-@admin", "-@dangerous", "+info", "+keys")
_SESSION_RIGHTS = (f"~{PREFIX}:*", "resetchannels", "-@all", *(f"+{command}" for command in ACL_COMMANDS))


def cluster_secrets(tenants: list[str]) -> dict[str, dict[str, str]]:
    """Secret name -> key -> value."""
    return {
        "antiphon-ray": {"auth_token": secrets.token_hex(32)},
        "antiphon-sessions": {"key": secrets.token_hex(32)},
        "antiphon-tenants": {"tokens.yaml": yaml.safe_dump({name: secrets.token_urlsafe(32) for name in tenants})},
        "sessions-redis": _store("antiphon", _SESSION_RIGHTS),
        "gcs-redis": _store("ray", _RAY_RIGHTS),
    }


def _store(user: str, rights: tuple[str, ...]) -> dict[str, str]:
    """A password, and the file that tells the server its digest and who may do what."""
    password = secrets.token_urlsafe(32)
    digest = hashlib.sha256(password.encode()).hexdigest()
    users = f"user default off\nuser {user} on #{digest} {' '.join(rights)}\n"
    return {"password": password, "users.acl": users}


def manifest(made: dict[str, dict[str, str]], namespace: str) -> str:
    """Kubernetes Secrets, as YAML documents."""
    docs = [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": name, "namespace": namespace, "labels": {"app.kubernetes.io/part-of": "antiphon"}},
            "type": "Opaque",
            "stringData": values,
        }
        for name, values in made.items()
    ]
    return yaml.safe_dump_all(docs, sort_keys=False)


def write_files(made: dict[str, dict[str, str]], directory: Path) -> None:
    """directory/SECRET/KEY, for their owner only. Raises FileExistsError instead of replacing one."""
    for name, values in made.items():
        folder = directory / name
        folder.mkdir(parents=True, mode=0o700, exist_ok=True)
        for key, value in values.items():
            with open(os.open(folder / key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(value)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tenant", action="append", help="a tenant that gets a token; default: demo")
    parser.add_argument("--namespace", default="antiphon")
    parser.add_argument("--directory", type=Path, help="write files instead")
    given = parser.parse_args(arguments)
    made = cluster_secrets(given.tenant or ["demo"])
    if given.directory is None:
        sys.stdout.write(manifest(made, given.namespace))
        return 0
    try:
        write_files(made, given.directory)
    except FileExistsError as error:
        print(f"{error.filename} exists: secrets are not replaced", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
