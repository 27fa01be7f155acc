"""A run in Azure: send the workspace, start the job, follow it; then its state and its results."""

from __future__ import annotations

from az import AzureError, shown
from azure_settings import INFRA
from code_archive import send_code, set_variable
from logs import OVER, follow
from provisioned import Provisioned
from share import Share
from sync import fetch, send


def run(wait: bool) -> None:
    """Send the workspace, start the job and, unless told otherwise, follow it to its end. Raises AzureError."""
    job = Provisioned("finetuning")
    running = [one["name"] for one in job.executions() if one["properties"]["status"] not in OVER]
    if running:
        stop = f"az containerapp job stop {' '.join(job.named)} --job-execution-name {running[0]}"
        print(f"{running[0]} is still running, so nothing is sent or started; `{stop}` stops it.", flush=True)
        execution = running[0]
    else:
        execution = start(job)
    if not wait:
        print("Next: python infra/azure.py logs --follow")
        return
    follow(job, execution)
    print("Next: python infra/azure.py pull")


def start(job: Provisioned) -> str:
    """Send the workspace and start the job; return the execution's name. Raises AzureError."""
    commands(job)  # before anything is sent
    share = Share(job.config)
    sent, gone = send(share)
    set_commands(job, send_code(share))
    print(f"Sent {sent} files, removed {gone}.")
    execution = str(job.az("start")["name"])
    print(f"Started {execution}: https://portal.azure.com/#resource{job.id}/executionHistory", flush=True)
    return execution


def commands(job: Provisioned) -> list[str]:
    """Return COMMANDS of infra/finetuning.config.json. Raises AzureError."""
    found = job.config.get("COMMANDS")
    if not found or not isinstance(found, list):
        raise AzureError(
            "infra/finetuning.config.json has no COMMANDS: run `python infra/azure.py provision finetuning`."
        )
    return found


def set_commands(job: Provisioned, digest: str) -> None:
    """Update the job's commands, and the hash of the code that it may run, if they differ. Raises AzureError."""
    template = job.az("show")["properties"]["template"]
    container = template["containers"][0]
    wanted = (INFRA / "start.sh").read_text(encoding="utf-8") + " && ".join(commands(job))  # as in finetuning.bicep
    others = container["args"] != [wanted]
    container["args"] = [wanted]
    if set_variable(job, template, digest) or others:
        job.rest("patch", "", body={"properties": {"template": template}})
    if others:
        print("The job runs the COMMANDS of infra/finetuning.config.json from now on.")


def status() -> None:
    """Print the last executions of the job. Raises AzureError."""
    job = Provisioned("finetuning")
    print(f"Job {job.name}: https://portal.azure.com/#resource{job.id}/executionHistory")
    for execution in job.executions()[:5]:
        properties = execution["properties"]
        began, ended = properties.get("startTime"), properties.get("endTime") or "now"
        print(f"  {execution['name']}  {properties['status']:10} {began} to {ended}")


def pull() -> None:
    """Download adapter, report and run.json of the newest complete run to models/. Raises AzureError."""
    finished = fetch(Share(Provisioned("finetuning").config))
    if finished is None:
        raise AzureError("The job has no result yet: `python infra/azure.py status` shows its state.")
    print(f"models/ has the results of the run that finished at {shown(finished)}.")
    print("Next: python setup/get_model.py, then python inference/console_chat.py")
