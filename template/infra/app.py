"""The inference app: send the model and the code, restart the app, wait until it responds."""

from __future__ import annotations

import time

import requests

from az import AGAIN, UNREACHABLE, AzureError
from azure_settings import INFRA
from code_archive import send_code, set_variable
from provisioned import Provisioned
from share import Share
from sync import send, send_results

POLL = 5.0  # seconds between polls
TRIES = 5  # failed connections allowed while the app restarts
PATIENCE = 1800.0  # seconds for a replica to start: the first one creates its environment


def deploy() -> None:
    """Send the changes, restart the app, and wait until the model responds. Raises AzureError."""
    app = Provisioned("inference")
    share = Share(app.config)
    sent, gone = send(share)
    print(f"Sent {sent} files, removed {gone}.", flush=True)
    if send_results(share):
        print("Sent this machine's tuned model, because it is newer than the one on the share.")
    elif share.read("models/run.json") is None:
        print("There is no tuned model yet, here or on the share: only a command with --baseonly works without one.")
    properties = app.az("show")["properties"]
    if set_variable(app, properties["template"], send_code(share, with_data=False)):
        app.rest("patch", "", body={"properties": {"template": properties["template"]}})  # restarts it
    else:
        app.az("revision", "restart", "--revision", properties["latestRevisionName"])
    print("Restarted; waiting until the model answers …", flush=True)
    wait(app)
    print("The model answers.")
    endpoint()


def wait(app: Provisioned) -> None:
    """Return when the app's /health says that the model is loaded. Raises AzureError."""
    deadline, refused = time.monotonic() + PATIENCE, 0
    log = f"az containerapp logs show {' '.join(app.named)} --follow"
    while time.monotonic() < deadline:
        try:
            answer = requests.get(f"{address(app)}/health", timeout=240, allow_redirects=False)
        except requests.Timeout:
            continue
        except requests.RequestException as error:
            refused += 1
            if refused == TRIES:
                raise AzureError(UNREACHABLE) from error
            time.sleep(POLL)
            continue
        # Without a workspace, /health is an empty page. A refusal comes from the proxy in front of the app: it is up.
        if (answer.ok and answer.text.startswith("{")) or answer.status_code in (302, 401, 403):
            return
        time.sleep(POLL)
    raise AzureError(f"The model does not answer after {PATIENCE / 60:.0f} minutes: `{log}` shows why, {AGAIN}.")


def address(app: Provisioned) -> str:
    """Return the app's address, without a trailing slash."""
    return str(app.config["ACA_APP_ENDPOINT"]).rstrip("/")


def endpoint() -> None:
    """Print the app's address, and how to get its key. Raises AzureError."""
    app = Provisioned("inference")
    print(f"Page: {address(app)}/")
    print(f"API:  {address(app)}/v1")
    secret = "--secret-name chat-api-key --query value --output tsv"
    print(f"Key:  az containerapp secret show {' '.join(app.named)} {secret}")


def status() -> None:
    """Print the state of the app, if there is one. Raises AzureError."""
    if not (INFRA / "inference.config.json").is_file():
        print("There is no app yet: python infra/azure.py provision inference")
        return
    app = Provisioned("inference")
    revisions = app.az("revision", "list") or []
    replicas = sum(int(one["properties"].get("replicas") or 0) for one in revisions)
    print(f"App {app.name}: {replicas} replicas ({'billed' if replicas else 'nothing is billed'}), {address(app)}/")
