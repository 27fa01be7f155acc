"""Secrets of the job and the app. Their values go to az through its standard input, and are never printed.

So they are in no file, in no log and on no command line, which others on the machine could read.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import sys
from typing import Any

from az import AzureError
from azure_settings import INFRA
from provisioned import Provisioned

SHORTEST = 16  # characters of the app's key, which everybody on the internet could guess


def set_secret(name: str, purpose: str) -> None:
    """Set a secret of the job or the app, and a variable that refers to it; ask for the value. Raises AzureError."""
    store(Provisioned(purpose), name, ask(name))
    owner = "job" if purpose == "finetuning" else "app"
    print(f"The {owner} has the secret {name.lower().replace('_', '-')}, and sees it as {name} from its next start on.")


def ask(name: str) -> str:
    """Return a secret from the variable of that name, from a hidden prompt, or a pipe. Raises AzureError."""
    value = os.environ.get(name, "")
    with contextlib.suppress(EOFError):
        value = value or (getpass.getpass(f"{name}: ") if sys.stdin.isatty() else sys.stdin.readline())
    if not value.strip():
        how = f"type it when asked, or set the variable (`read -rs {name}; export {name}`)"
        raise AzureError(f"{name} is empty: {how}.")
    if name == "CHAT_API_KEY" and len(value.strip()) < SHORTEST:
        how = """python -c "import secrets; print(secrets.token_urlsafe())\""""
        raise AzureError(f"{name} is too short: take one of at least {SHORTEST} characters, for example from `{how}`.")
    return value.strip()


def store(owner: Provisioned, name: str, value: str) -> None:
    """Set a secret, and the variable that refers to it if there is none. Raises AzureError."""
    secret = name.lower().replace("_", "-")
    owner.az("secret", "set", "--secrets", f"{secret}=@-", stdin=value)
    if variables(owner).get(secret) != name:
        owner.az("update", "--set-env-vars", f"{name}=secretref:{secret}")


def variables(owner: Provisioned) -> dict[str, str]:
    """Return the variables that refer to secrets: secret → variable. Raises AzureError."""
    container: dict[str, Any] = owner.az("show")["properties"]["template"]["containers"][0]
    return {one["secretRef"]: one["name"] for one in container.get("env") or [] if one.get("secretRef")}


def values(owner: Provisioned) -> dict[str, str]:
    """Return the values of the secrets, without those in a key vault. Raises AzureError."""
    found = owner.az("secret", "list", "--show-values") or []
    return {one["name"]: one["value"] for one in found if one.get("value")}


def parameters(purpose: str) -> dict[str, str]:
    """Return the template's secure parameters by the secret that each one sets: hf-token → hfToken."""
    text = (INFRA / "provision" / f"{purpose}.bicep").read_text(encoding="utf-8")
    found = re.findall(r"@secure\(\)\s*(?:@[^\n]*\n\s*)*param (\w+)", text)
    return {re.sub(r"(?<!^)([A-Z])", r"-\1", name).lower(): name for name in found}


def as_json(secure: dict[str, str], known: dict[str, str], **more: str) -> str:
    """Return the secure parameters with the current secrets, which a deployment would drop, and more parameters."""
    kept = {parameter: known[name] for name, parameter in secure.items() if name in known}
    return json.dumps({name: {"value": value} for name, value in {**kept, **more}.items()})
