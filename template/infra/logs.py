"""The log of a run: live, across lost connections, and afterwards."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator

import requests

from az import AzureError, az, shown
from provisioned import Provisioned

REPLICAS_API = "2023-11-02-preview"  # only preview versions have the replicas of an execution
OVER = ("Succeeded", "Failed", "Stopped", "Degraded")  # the states of an execution that has ended
POLL = 5.0  # seconds between polls
SILENCE = 300.0  # seconds without a line before reconnecting: the connection may be dead
TAIL = 300  # earlier lines that a new connection repeats


def logs(follow_it: bool) -> None:
    """Print the log of the newest execution, or follow it to its end. Raises AzureError."""
    job = Provisioned("finetuning")
    executions = job.executions()
    if not executions:
        raise AzureError("The job has never run: `python infra/azure.py run` starts it.")
    newest = executions[0]
    if newest["properties"]["status"] in OVER:
        print_kept(job, newest["name"])
    elif follow_it:
        follow(job, newest["name"])
    elif stream := replica(job, newest["name"]):
        for line in lines(job, stream, follow=False):
            print(shown(line))
    else:
        print(f"{newest['name']} is queued: Azure has no GPU for it yet.")


def follow(job: Provisioned, execution: str) -> None:
    """Print an execution's log live until its end, reconnecting if it breaks off. Raises AzureError."""
    printed: list[str] = []
    queued = False
    while True:
        stream, before = replica(job, execution), printed
        for line in unseen(lines(job, stream), printed) if stream else ():
            print(shown(line), flush=True)
            printed = [*printed[1 - TAIL :], line]
        state = job.az("execution", "show", "--job-execution-name", execution)["properties"]["status"]
        if state in OVER:
            break
        if not stream and not queued:
            queued = True
            print(f"Queued: {execution} waits for a GPU. Ctrl-C leaves it waiting; nothing is billed yet.", flush=True)
        if printed is before:
            time.sleep(POLL)
    if state != "Succeeded":
        raise AzureError(
            f"{execution} ended as {state} (a command failed, memory ran out, or it took longer than `timeout` in "
            "infra/provision/finetuning.parameters.json): `python infra/azure.py logs` shows why; after you fix it, "
            "`python infra/azure.py run` resumes from the last checkpoint."
        )
    print(f"{execution} has succeeded.")


def replica(job: Provisioned, execution: str) -> str | None:
    """Return the URL of the log stream; None while nothing runs."""
    for found in job.rest("get", f"/executions/{execution}/replicas", REPLICAS_API)["value"]:
        for container in found["properties"]["containers"]:
            if container.get("logStreamEndpoint"):
                return str(container["logStreamEndpoint"])
    return None


def lines(job: Provisioned, stream: str, follow: bool = True) -> Iterator[str]:
    """Yield the lines of a log stream, until it ends or breaks off."""
    token = job.rest("post", "/getAuthToken", REPLICAS_API)["properties"]["token"]
    options = {"follow": str(follow).lower(), "output": "text", "tailLines": str(TAIL)}
    try:
        headers = {"Authorization": f"Bearer {token}"}
        with requests.get(stream, params=options, headers=headers, stream=True, timeout=(30, SILENCE)) as answer:
            if answer.ok:
                yield from (line.decode(errors="replace") for line in answer.iter_lines())
    except requests.RequestException:
        return  # the caller checks whether the execution has ended, and reconnects


def unseen(stream: Iterator[str], printed: list[str]) -> Iterator[str]:
    """Yield the lines of a new connection that were not printed before."""
    expected: Iterator[str] = iter(())
    for number, line in enumerate(stream):
        if number == 0 and line in printed:
            expected = iter(printed[printed.index(line) :])
        if next(expected, None) != line:
            expected = iter(())
            yield line


def print_kept(job: Provisioned, execution: str) -> None:
    """Print the log of a finished execution from Log Analytics."""
    environment = az("resource", "show", "--ids", job.az("show")["properties"]["environmentId"])
    configuration = environment["properties"]["appLogsConfiguration"]["logAnalyticsConfiguration"]
    table = "ContainerAppConsoleLogs_CL"
    query = f"{table} | where ContainerGroupName_s startswith '{execution}' | order by _timestamp_d asc | project Log_s"
    url = f"https://api.loganalytics.io/v1/workspaces/{configuration['customerId']}/query"
    options = ["--url", url, "--resource", "https://api.loganalytics.io", "--body", "@-"]
    answer = az("rest", "--method", "post", *options, stdin=json.dumps({"query": query}))
    for row in answer["tables"][0]["rows"]:
        print(shown(row[0]))
    if not answer["tables"][0]["rows"]:
        print(
            f"{execution} has ended; its log will be in Log Analytics in some minutes: run this again then.",
            file=sys.stderr,
        )
