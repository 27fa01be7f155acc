"""Where to work, and on which GPU: infra/azure.yaml."""

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
    """What infra/azure.yaml says."""

    project: str
    subscription: str | None
    group: str
    location: str
    profile: str  # the workload profile type, as Container Apps names it

    @classmethod
    def read(cls) -> Settings:
        """Read infra/azure.yaml. Raises AzureError."""
        try:
            found = yaml.safe_load((INFRA / "azure.yaml").read_text(encoding="utf-8"))
            return cls(*(found[key] for key in ("project", "subscription", "resource_group", "location", "profile")))
        except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
            raise AzureError(
                f"infra/azure.yaml is missing or torn ({error}): `git checkout` brings it back."
            ) from error

    @property
    def here(self) -> list[str]:
        """The option that names the subscription: that of what is provisioned already, or the settings' own, if any."""
        for file in sorted(INFRA.glob("*.config.json")):
            return ["--subscription", str(json.loads(file.read_text(encoding="utf-8"))["SUBSCRIPTION_ID"])]
        return ["--subscription", self.subscription] if self.subscription else []

    def made(self, resource: dict[str, Any]) -> bool:
        """Tell whether a resource has the tag of what is made for this workspace."""
        return bool((resource.get("tags") or {}).get("workspace") == self.project)
