"""What is provisioned: the job or the app, and its az commands."""

from __future__ import annotations

import json
from typing import Any

from az import AzureError, az
from azure_settings import INFRA

API = "2025-07-01"
# purpose: its az command, its type in a resource id, and the key of its name
KINDS = {
    "finetuning": (("containerapp", "job"), "jobs", "ACA_JOB_NAME"),
    "inference": (("containerapp",), "containerApps", "ACA_APP_NAME"),
}
KEYS = ("SUBSCRIPTION_ID", "RESOURCE_GROUP_NAME", "STORAGE_ACCOUNT_NAME", "FILE_SHARE_NAME")


class Provisioned:
    """The job (finetuning) or the app (inference)."""

    def __init__(self, purpose: str) -> None:
        """Read infra/*.config.json. Raises AzureError."""
        self.purpose, self.config = purpose, read_config(purpose)
        self.command, kind, key = KINDS[purpose]
        self.name, self.group = self.config[key], self.config["RESOURCE_GROUP_NAME"]
        self.subscription = ["--subscription", self.config["SUBSCRIPTION_ID"]]
        self.named = ["--name", self.name, "--resource-group", self.group]
        scope = f"/subscriptions/{self.config['SUBSCRIPTION_ID']}/resourceGroups/{self.group}"
        self.id = f"{scope}/providers/Microsoft.App/{kind}/{self.name}"

    def az(self, *words: str, stdin: str = "") -> Any:
        """Run an az command for it. Raises AzureError."""
        about = {"purpose": self.purpose, "group": self.group}
        return az(*self.command, *words, *self.named, *self.subscription, stdin=stdin, about=about)

    def rest(self, method: str, path: str, api: str = API, body: Any = None) -> Any:
        """Call Azure Resource Manager, if az has no command for it. Raises AzureError."""
        url = f"https://management.azure.com{self.id}{path}?api-version={api}"
        words, stdin = ([], "") if body is None else (["--body", "@-"], json.dumps(body))
        return az("rest", "--method", method, "--url", url, *words, stdin=stdin, about={"purpose": self.purpose})

    def executions(self) -> list[dict[str, Any]]:
        """Return the executions of the job, newest first. Raises AzureError."""
        found = self.az("execution", "list") or []
        return sorted(found, key=lambda one: str(one["properties"].get("startTime")), reverse=True)


def read_config(purpose: str) -> dict[str, Any]:
    """Read the configuration that provisioning wrote. Raises AzureError."""
    file, provision = INFRA / f"{purpose}.config.json", f"run `python infra/azure.py provision {purpose}`"
    if not file.is_file():
        raise AzureError(f"Nothing is provisioned for {purpose} yet: {provision}.")
    try:
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AzureError(f"infra/{file.name} is damaged ({error}): delete it, and {provision}.") from error
    for key in (*KEYS, KINDS[purpose][2]):
        if not config.get(key):
            raise AzureError(f"infra/{file.name} has no {key}: delete it, and {provision}.")
    return config
