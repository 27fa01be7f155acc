"""The Azure CLI, through one function: it runs az, and reports its errors in one sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

LEAST = (2, 80, 0)  # older versions are untested; the tests run 2.91.0
EMPTY: Mapping[str, str] = MappingProxyType({})
AGAIN = "then run the same command again"
NETWORK = (
    r"Max retries exceeded|Failed to resolve|NameResolution|ConnectionError|Connection (?:aborted|refused|reset|broken)"
    r"|ProxyError|RemoteDisconnected|Read timed out|ConnectTimeout"
)
UNREACHABLE = (
    "Azure cannot be reached: check whether `curl -I https://management.azure.com` responds (HTTPS_PROXY sets a "
    f"proxy), {AGAIN}."
)
SIGNED_OUT = f"az is not logged in, or its login has expired: run `az login`, {AGAIN}."
# az's output → what it means and what to do. The first match is used; {0} is its group.
FAILURES = {
    r"AADSTS\d+|az login|ExpiredAuthenticationToken|InvalidAuthenticationToken": SIGNED_OUT,
    NETWORK: UNREACHABLE,
    r"[Ss]ubscription(?: of)? '?([^' ]+)'? (?:not found|could not be found|doesn't exist)": (
        "az's login has no subscription {0}: `az account list --output table` shows those it has; correct "
        f"`subscription` in infra/azure.yaml, or log in to its tenant with `az login --tenant TENANT`, {AGAIN}."
    ),
    r"TooManyRequests|throttl": (
        f"Azure throttles the requests: wait a minute, until `az group list --output table` works, {AGAIN}."
    ),
    r"StorageAccountAlreadyTaken|[Ss]torage account (?:named )?\S+ is already taken": (
        "The storage account's name, which comes from group and project, is already taken: choose another group "
        "with `copier update --trust --data azure_resource_group=…`, or set storageAccountName to an account of yours "
        f"in infra/provision/{{purpose}}.parameters.json, {AGAIN}."
    ),
    r"perform action '([^']+)'": (
        "This login has no permission for {0}: ask an owner of the subscription for the role Contributor (`az role "
        f"assignment list --all --output table` shows your roles), {AGAIN}."
    ),
    r"RequestDisallowedByPolicy[^\n]*": (
        "A policy of the subscription forbids it ({0}): `az policy assignment list --output table` lists it; ask "
        "the person who set it, or change what it forbids in infra/provision/."
    ),
    r"MaxNumberOf\w*|[Qq]uota ?[Ee]xceeded|no quota": (
        "The quota is too small: `az containerapp list-usages --location {location}` shows it; request more on the "
        f"portal's Quotas page, {AGAIN}."
    ),
    r"MissingSubscriptionRegistration[^\n]*namespace '([^']+)'": (
        f"The provider {{0}} is not registered: run `az provider register --namespace {{0}} --wait`, {AGAIN}."
    ),
    r"DeploymentActive": (
        "A deployment to {group} is still running: `az deployment group list --resource-group {group} --output "
        f"table` shows when it has ended, {AGAIN}."
    ),
    r"ResourceGroupNotFound|ResourceNotFound|does not exist": (
        "The resources in infra/{purpose}.config.json do not exist in Azure: run `python infra/azure.py "
        "provision {purpose}`."
    ),
    r"already consumed": (
        "Azure refused the deployment, and az lost the reason: run `az deployment group validate --resource-group "
        "{group} --template-file infra/provision/{purpose}.bicep`, which may show it."
    ),
}


# characters that move the cursor, end a line or turn the direction of writing
CONTROLS = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
# a signature of the share, a key, a token: after its name, or by its form
SECRET = re.compile(
    r"(?i)((?:sig|\w*key|\w*token|\w*secret|\w*password)(?:=|%3d|[\"']?: ?[\"']?)|bearer |\bhf_(?=[a-z0-9]{30}))"
    r"[\w%+/.~-]{16,}=*"
)


class AzureError(Exception):
    """An error in Azure or az: what is wrong, and the command that helps, in one sentence."""

    def __init__(self, text: str) -> None:
        super().__init__(shown(text))


def shown(text: object) -> str:
    """Return a text from Azure as a terminal may show it: signatures and tokens masked, control characters visible.

    They could forge other lines, or write to the clipboard: a log has what the data and the model say.
    """
    masked = SECRET.sub(r"\1***", str(text).replace("\r\n", "\n"))
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", masked)


def az(*words: str, stdin: str = "", show: bool = False, about: Mapping[str, str] = EMPTY) -> Any:
    """Run az and return its output, parsed if it is JSON (None if empty).

    `stdin` goes to az's standard input, for secrets: others can read a command line. The word `@-` reads it. `show`
    makes az print to the terminal. `about` (purpose, group, location) fills in the error message. Raises AzureError.
    """
    program = shutil.which("az")
    if program is None:
        raise AzureError("The Azure CLI is not installed: see https://aka.ms/installazurecli, then run `az login`.")
    quiet = {"AZURE_CORE_COLLECT_TELEMETRY": "no", "AZURE_CORE_ONLY_SHOW_ERRORS": "yes", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        [program, *words, *([] if show else ["--output", "json"])],
        env={**os.environ, **quiet},
        input=stdin,
        stdout=None if show else subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        raise AzureError(sentence(done.stderr, done.returncode, words, about))
    try:
        return json.loads(done.stdout) if done.stdout and done.stdout.strip() else None
    except ValueError:
        return done.stdout.strip()


def sentence(errors: str, status: int, words: tuple[str, ...], about: Mapping[str, str]) -> str:
    """Return the meaning of az's errors in one sentence."""
    if status == 2 or "is misspelled or not recognized" in errors:
        require()  # an old az only says that it does not know an option
    if known := explain(errors, about):
        return known
    said = [line.removeprefix("ERROR: ") for line in errors.splitlines() if line.strip() and "WARNING" not in line]
    said = [line for line in said if re.match(r"(Message|\(\w+\))", line)] or said
    command = " ".join(["az", *words[:4]])
    return f"`{command} …` failed: {said[0].strip().rstrip('.') if said else f'exit status {status}'}."


def explain(errors: str, about: Mapping[str, str]) -> str:
    """Return the sentence for a known error, "" for others."""
    names = {"purpose": "finetuning", "group": "GROUP", "location": "LOCATION", **about}
    for pattern, meaning in FAILURES.items():
        if match := re.search(pattern, errors):
            caught = next((group for group in (*match.groups(), match[0]) if group), "")
            return meaning.format(caught, **names)
    return ""


def require() -> None:
    """Raise AzureError for an az that is too old."""
    found = str((az("version") or {}).get("azure-cli", "0"))
    version = tuple(int(part) for part in re.findall(r"\d+", found)[:3])
    if version < LEAST:
        least = ".".join(map(str, LEAST))
        raise AzureError(f"az is version {found}, and {least} or later is needed: run `az upgrade`, {AGAIN}.")
