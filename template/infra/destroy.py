"""Delete from Azure what was created for this workspace."""

from __future__ import annotations

from typing import Any

from az import AzureError, az
from azure_settings import INFRA, Settings

# jobs and apps, then their environments, then the rest
ORDER = {"microsoft.app/jobs": 0, "microsoft.app/containerapps": 0, "microsoft.app/managedenvironments": 1}


def destroy() -> None:
    """List what was created, ask for the group's name as confirmation, and delete it. Raises AzureError."""
    settings = Settings.read()
    here = settings.here
    if not az("group", "exists", "--name", settings.group, *here):
        print(f"There is no group {settings.group}: nothing to delete.")
        return forget()
    group = az("group", "show", "--name", settings.group, *here)
    found = az("resource", "list", "--resource-group", settings.group, *here)
    ours = sorted((one for one in found if settings.made(one)), key=lambda one: ORDER.get(one["type"].lower(), 2))
    whole = settings.made(group) and len(ours) == len(found)
    if not ours and not whole:
        look = f"az resource list --resource-group {settings.group} --output table"
        raise AzureError(
            f"Nothing in {settings.group} has the tag workspace={settings.project}: `{look}` shows what is there."
        )
    show(settings, ours, whole, len(found) - len(ours))
    try:
        answer = input(f"To delete it, type the group's name ({settings.group}): ").strip()
    except EOFError:
        answer = ""
    if answer != settings.group:
        raise AzureError(
            f"Nothing was deleted: the answer was not {settings.group}; `python infra/azure.py destroy` asks again."
        )
    if whole:
        az("group", "delete", "--name", settings.group, "--yes", *here)
    else:
        for one in ours:
            az("resource", "delete", "--ids", one["id"])
    return forget()


def show(settings: Settings, ours: list[dict[str, Any]], whole: bool, others: int) -> None:
    """Print what would be deleted."""
    print(f"This permanently deletes {'the group ' + settings.group + ' with' if whole else 'from ' + settings.group}:")
    for one in ours:
        print(f"  {one['type']} {one['name']}")
    if others:
        print(f"{others} other resources of the group stay.")
    print("Results on the share that `pull` did not download are deleted too.")


def forget() -> None:
    """Delete the configuration files of the deleted resources."""
    for purpose in ("finetuning", "inference"):
        (INFRA / f"{purpose}.config.json").unlink(missing_ok=True)
    print("Deleted. The workspace and its models/ did not change.")
