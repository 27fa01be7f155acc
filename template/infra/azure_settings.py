"""The settings in infra/azure.yaml: where to run, and on which GPU."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from az import AzureError

INFRA = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Settings:
    """The content of infra/azure.yaml."""

    project: str
    subscription: str | None
    group: str
    location: str
    profile: str  # the workload profile type of Container Apps

    @classmethod
    def read(cls) -> Settings:
        """Read infra/azure.yaml. Raises AzureError."""
        try:
            found = yaml.safe_load((INFRA / "azure.yaml").read_text(encoding="utf-8"))
            return cls(*(found[key] for key in ("project", "subscription", "resource_group", "location", "profile")))
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise AzureError(
                f"infra/azure.yaml is missing or damaged ({error}): restore it with `git checkout`."
            ) from error

    @property
    def here(self) -> list[str]:
        """The option for the subscription: of what is already provisioned, else from the settings, if any."""
        for file in sorted(INFRA.glob("*.config.json")):
            return ["--subscription", str(json.loads(file.read_text(encoding="utf-8"))["SUBSCRIPTION_ID"])]
        return ["--subscription", self.subscription] if self.subscription else []

    def made(self, resource: dict[str, Any]) -> bool:
        """Return whether a resource has this workspace's tag."""
        return bool((resource.get("tags") or {}).get("workspace") == self.project)
