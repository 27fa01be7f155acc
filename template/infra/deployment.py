"""Create what a run or the app needs in Azure: checks, resource group, what-if, deployment, configuration."""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import secret
from az import AGAIN, AzureError, az, explain, require, shown
from azure_settings import INFRA, Settings
from code_archive import variable
from provisioned import KEYS, KINDS, Provisioned

PROVIDERS = ("Microsoft.App", "Microsoft.Storage", "Microsoft.OperationalInsights", "Microsoft.ManagedIdentity")
POLL = 5.0  # seconds between polls of a deployment
# The quota for a profile: of the environment for serverless GPUs, of the subscription for dedicated ones.
QUOTAS = {
    "Consumption-GPU-NC8as-T4": "ManagedEnvironmentConsumptionT4Gpus",
    "Consumption-GPU-NC24-A100": "ManagedEnvironmentConsumptionNCA100Gpus",
    "NC24-A100": "SubscriptionDedicatedNCA100Gpus",
    "NC48-A100": "SubscriptionDedicatedNCA100Gpus",
    "NC96-A100": "SubscriptionDedicatedNCA100Gpus",
}


def provision(purpose: str, yes: bool, dry_run: bool) -> None:
    """Create everything for `purpose` (finetuning or inference), or only show what it would be. Raises AzureError."""
    settings = Settings.read()
    account, exists = check_account(settings)
    print(f"Subscription {shown(account['name'])} ({account['id']}), group {settings.group} in {settings.location}")
    about = {"purpose": purpose, "group": settings.group, "location": settings.location}
    here = ["--subscription", account["id"]]
    if not exists and dry_run:
        print(f"It would create the group {settings.group}, which costs nothing; az can show the rest once it exists.")
        return
    if not exists:
        az(
            "group",
            "create",
            "--name",
            settings.group,
            "--location",
            settings.location,
            "--tags",
            f"workspace={settings.project}",
            *here,
        )
    template = [
        *("--template-file", str(INFRA / "provision" / f"{purpose}.bicep")),
        *("--parameters", str(INFRA / "provision" / f"{purpose}.parameters.json"), "--parameters", "@-"),
    ]
    deployment = ["--resource-group", settings.group, "--name", f"{settings.project}-{purpose}", *here]
    known, variables, code = existing(purpose, deployment) if exists else ({}, {}, "none")
    secure = secret.parameters(purpose)
    known.setdefault("environment-key", environment_key(purpose))
    values = secret.as_json(secure, known, codeSha256=code)
    if not yes or dry_run:
        print("az calculates what would change …", flush=True)
        az("deployment", "group", "what-if", *template, *deployment, stdin=values, show=True, about=about)
    if dry_run or not (yes or agreed()):
        print(f"Nothing was deployed. To deploy: python infra/azure.py provision {purpose} --yes")
        return
    az("deployment", "group", "create", *template, *deployment, "--no-wait", stdin=values, about=about)
    write_config(purpose, follow(deployment, about))
    made = Provisioned(purpose)
    for name in set(known) & set(variables) - set(secure):  # a deployment keeps only the template's own secrets
        secret.store(made, variables[name], known[name])
    check_environment(settings, made)
    print(f"Next: python infra/azure.py {'run' if purpose == 'finetuning' else 'deploy'}")


def existing(purpose: str, deployment: list[str]) -> tuple[dict[str, str], dict[str, str], str]:
    """Return the existing secrets, their variables and the code's hash; a lost configuration file is written again."""
    if not (INFRA / f"{purpose}.config.json").is_file():
        group, name = deployment[1], deployment[3]
        query = ["--query", f"[?name=='{name}' && properties.provisioningState=='Succeeded']"]
        before = az("deployment", "group", "list", "--resource-group", group, *query, *deployment[4:])
        if not before:
            return {}, {}, "none"
        write_config(purpose, before[0]["properties"]["outputs"])
    owner = Provisioned(purpose)
    known = secret.values(owner)
    code = variable(owner.az("show")["properties"]["template"])
    return known, secret.variables(owner) if known else {}, code


def environment_key(purpose: str) -> str:
    """Return the key that seals the Python environments: the one of the job or the app that is there, or a new one."""
    other = "inference" if purpose == "finetuning" else "finetuning"
    if (INFRA / f"{other}.config.json").is_file():
        with contextlib.suppress(AzureError):  # it is not there any more
            if key := secret.values(Provisioned(other)).get("environment-key"):
                return key
    return secrets.token_hex(32)


def write_config(purpose: str, outputs: dict[str, Any]) -> None:
    """Write the outputs of a deployment atomically to the configuration file; changed COMMANDS are kept."""
    keys = [*KEYS, KINDS[purpose][2], "COMMANDS", "ACA_APP_ENDPOINT"]
    config = {key: outputs[key]["value"] for key in keys if key in outputs}
    file = INFRA / f"{purpose}.config.json"
    if file.is_file() and (commands := json.loads(file.read_text(encoding="utf-8")).get("COMMANDS")):
        config["COMMANDS"] = commands
    unfinished = file.with_name(f".{file.name}.new")
    unfinished.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(file)
    print(f"Written: infra/{file.name}")


def agreed() -> bool:
    """Ask whether to deploy; without a terminal, the answer is no."""
    try:
        return input("Deploy? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def check_account(settings: Settings) -> tuple[dict[str, Any], bool]:
    """Check az and account, then providers, region and quota; return the account, and whether the group exists.

    Raises AzureError for the first check that fails.
    """
    here = settings.here
    listed = ["containerapp", "env", "workload-profile", "list-supported", "--location", settings.location]
    quota = ["containerapp", "list-usages", "--location", settings.location]
    registered_ones = "[?registrationState=='Registered'].namespace"
    with ThreadPoolExecutor() as pool:
        version, account = pool.submit(require), pool.submit(az, "account", "show", *here)
        version.result()
        account.result()
        providers = pool.submit(az, "provider", "list", "--query", registered_ones, *here)
        profiles = pool.submit(az, *listed, *here)
        group = pool.submit(az, "group", "exists", "--name", settings.group, *here)
        usages = pool.submit(check_quota, settings, *quota, *here)
    registered = {str(name).lower() for name in providers.result() or []}
    for provider in PROVIDERS:
        if provider.lower() not in registered:
            raise AzureError(
                f"The provider {provider} is not registered in this subscription: run "
                f"`az provider register --namespace {provider} --wait`, {AGAIN}."
            )
    if settings.profile not in {"Consumption", *(str(profile["name"]) for profile in profiles.result())}:
        raise AzureError(
            f"The region {settings.location} has no {settings.profile} (`az {' '.join(listed)}` shows what it has): "
            "choose another with `copier update --trust --data azure_location=…`, or another GPU with azure_gpu=…."
        )
    usages.result()
    return account.result(), bool(group.result())


def check_environment(settings: Settings, made: Provisioned) -> None:
    """Raise AzureError if the environment has no quota for the GPU: serverless ones are counted only there."""
    if not settings.profile.startswith("Consumption-"):
        return
    environment = made.az("show")["properties"]["environmentId"]
    group, name = re.findall(r"/resourceGroups/([^/]+)/.*/([^/]+)$", environment, re.IGNORECASE)[0]
    words = ["containerapp", "env", "list-usages", "--name", name, "--resource-group", group]
    check_quota(settings, *words, *made.subscription)


def check_quota(settings: Settings, *words: str) -> None:
    """Raise AzureError if a quota listed by an az command allows no GPU; an unlisted quota is left to Azure."""
    for usage in az(*words)["value"]:
        if usage["name"]["value"] == QUOTAS.get(settings.profile) and usage["limit"] < 1:
            raise AzureError(
                f"The quota {usage['name']['value']} in {settings.location} is {usage['limit']:g}: request more on the "
                f"portal's Quotas page (`az {' '.join(words).partition(' --subscription')[0]}` shows it), {AGAIN}."
            )


def follow(deployed: list[str], about: dict[str, str]) -> dict[str, Any]:
    """Wait for a deployment, print its resources, and return its outputs. Raises AzureError."""
    said: set[str] = set()
    while True:
        found = az("deployment", "group", "show", *deployed, about=about)["properties"]
        for state, kind, name in operations(deployed, about):
            if state == "Succeeded" and name not in said:
                said.add(name)
                print(f"  {kind} {name.rpartition('/')[2]}", flush=True)
        if found["provisioningState"] == "Succeeded":
            return dict(found["outputs"])
        if found["provisioningState"] in ("Failed", "Canceled"):
            raise AzureError(failure(found.get("error") or {}, deployed, about))
        time.sleep(POLL)


def operations(deployed: list[str], about: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    """Yield state, type and id of each resource of a deployment."""
    for operation in az("deployment", "operation", "group", "list", *deployed, about=about):
        properties = operation["properties"]
        if target := properties.get("targetResource"):
            yield properties["provisioningState"], target["resourceType"], target["id"]


def failure(error: dict[str, Any], deployed: list[str], about: dict[str, str]) -> str:
    """Return why a deployment failed: the innermost error, which is the resource's own."""
    while error.get("details"):
        error = error["details"][0]
    said = f"({error.get('code')}) {error.get('message')}".rstrip(".")
    see = f"az deployment operation group list {' '.join(deployed[:4])}"
    return explain(said, about) or f"The deployment failed: {said}; `{see}` shows which resource, {AGAIN}."
