"""What the emulator has of Container Apps: quotas, jobs whose commands it runs, their log streams, and apps."""

from __future__ import annotations

import copy
import http.client
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arm import answer, refused

if TYPE_CHECKING:
    from emulator import Answer, Emulator, Request

STREAMS, APPS, QUERIES = (
    "swedencentral.azurecontainerapps.dev",
    ".swedencentral.azurecontainerapps.io",
    "api.loganalytics.io",
)
SERVERLESS = {"Consumption-GPU-NC8as-T4": "T4", "Consumption-GPU-NC24-A100": "NCA100"}


def now() -> str:
    """Return the time as Azure writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())


@dataclass
class Execution:
    """One run of a job, its process, and what it printed."""

    name: str
    job: str
    log: Path
    process: subprocess.Popen[bytes] | None = None
    status: str = "Running"
    queued: int = 0  # how many more times it is said to have no replica yet
    over: threading.Event = field(default_factory=threading.Event)
    began: str = field(default_factory=now)
    ended: str = ""


class Containers:
    """The jobs' executions and the apps' processes."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator = emulator
        self.executions: dict[str, Execution] = {}
        self.apps: dict[str, subprocess.Popen[bytes]] = {}
        self.ports: dict[str, int] = {}  # a container has a network of its own; here each app gets a port of its own
        self.starting = threading.Lock()
        self.path = ""  # folders that come first on the PATH of what is run

    def stop(self) -> None:
        """End everything that runs."""
        for process in [*self.apps.values(), *(one.process for one in self.executions.values() if one.process)]:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.apps.clear()

    def check(self, body: dict[str, Any], old: dict[str, Any] | None) -> None:
        """Refuse what Container Apps would refuse of an environment, a job or an app; complete the rest."""
        kind, properties = body["type"].lower(), body["properties"]
        if kind == "microsoft.app/managedenvironments":
            properties.setdefault("defaultDomain", APPS.lstrip("."))
            for profile in properties.get("workloadProfiles") or []:
                counted = {"minimumCount", "maximumCount"} & set(profile)
                if counted and profile["workloadProfileType"].startswith("Consumption"):
                    raise refused(400, "InvalidRequestParameterValue", f"{counted} cannot be set on {profile['name']}.")
        if kind not in ("microsoft.app/jobs", "microsoft.app/containerapps"):
            return
        environment = self.emulator.resources.get(
            str(properties.get("environmentId") or properties.get("managedEnvironmentId")).lower()
        )
        if environment is None:
            raise refused(400, "ManagedEnvironmentNotFound", f"The environment of {body['name']} does not exist.")
        profiles = [one["name"] for one in environment["properties"].get("workloadProfiles") or []]
        if properties.get("workloadProfileName", "Consumption") not in profiles:
            raise refused(
                400, "WorkloadProfileNotFound", f"{properties.get('workloadProfileName')} is none of {profiles}."
            )
        if self.emulator.fails("quota exceeded"):
            raise refused(400, "MaxNumberOfGpusExceeded", "The subscription has no quota left for GPUs in this region.")
        secrets = properties["configuration"].get("secrets") or []
        before = {
            one["name"]: one
            for one in (old or {"properties": {"configuration": {}}})["properties"]["configuration"].get("secrets")
            or []
        }
        for secret in secrets:
            if "keyVaultUrl" not in secret:
                secret.setdefault("value", before.get(secret["name"], {}).get("value"))
            if not (secret.get("value") or secret.get("keyVaultUrl")):
                raise refused(
                    400, "ContainerAppSecretInvalid", f"Invalid secret '{secret['name']}': a value is needed."
                )
        storages = {
            one["name"]
            for one in self.emulator.resources.values()
            if one["id"].lower().startswith(environment["id"].lower() + "/storages/")
        }
        volumes = {one["name"]: one for one in properties["template"].get("volumes") or []}
        for volume in volumes.values():
            if volume.get("storageType") == "AzureFile" and volume["storageName"] not in storages:
                raise refused(400, "ManagedEnvironmentStorageNotFound", f"There is no storage {volume['storageName']}.")
        for container in properties["template"]["containers"]:
            for variable in container.get("env") or []:
                if (name := variable.get("secretRef")) and name not in {one["name"] for one in secrets}:
                    raise refused(
                        400,
                        "ContainerAppSecretRefNotFound",
                        f"SecretRef '{name}' defined for container '{container['name']}' not found.",
                    )
            for mount in container.get("volumeMounts") or []:
                if mount["volumeName"] not in volumes:
                    raise refused(400, "ContainerAppVolumeNotFound", f"There is no volume {mount['volumeName']}.")
        if kind == "microsoft.app/jobs":
            if not properties["configuration"].get("replicaTimeout"):
                raise refused(400, "InvalidParameterValueInContainerTemplate", "replicaTimeout is missing.")
            return
        host = body["name"] + APPS
        (properties["configuration"].get("ingress") or {})["fqdn"] = host
        properties |= {
            "latestRevisionName": f"{body['name']}--1",
            "latestReadyRevisionName": f"{body['name']}--1",
            "runningStatus": "Running",
        }
        properties["eventStreamEndpoint"] = f"https://{STREAMS}/eventstream"
        self.restart(body["name"])

    def seen(self, resource: dict[str, Any]) -> dict[str, Any]:
        """Return a resource as it is shown: secrets without their values."""
        shown = copy.deepcopy(resource)
        for secret in shown.get("properties", {}).get("configuration", {}).get("secrets") or []:
            secret.pop("value", None)
        return shown

    def start(self, job: dict[str, Any]) -> Execution:
        """Run a job's commands, in the folder that stands in for the share."""
        name = f"{job['name']}-{len(self.executions):07x}"
        execution = Execution(name, job["name"], self.emulator.folder / f"{name}.log")
        execution.queued = 2 if self.emulator.fails("queued") else 0
        self.executions[name] = execution
        execution.log.touch()
        extra = {"CONTAINER_APP_JOB_EXECUTION_NAME": name, "CONTAINER_APP_JOB_NAME": job["name"]}
        failing = self.emulator.fails("job failed")
        with execution.log.open("ab") as log:
            execution.process = self.launch(
                job, extra, log, ["bash", "-c", "echo out of memory; exit 1"] if failing else None
            )
        timeout = 0.05 if self.emulator.fails("job timed out") else job["properties"]["configuration"]["replicaTimeout"]
        threading.Thread(target=self.wait, args=(execution, timeout), daemon=True).start()
        return execution

    def wait(self, execution: Execution, timeout: float) -> None:
        """Wait for the end of an execution, or end it."""
        assert execution.process
        try:
            execution.status = "Succeeded" if execution.process.wait(timeout) == 0 else "Failed"
        except subprocess.TimeoutExpired:
            os.killpg(execution.process.pid, signal.SIGKILL)
            execution.process.wait()
            execution.status = "Failed"
            with execution.log.open("ab") as log:
                log.write(b"DeadlineExceeded: the replica ran longer than replicaTimeout\n")
        execution.ended = now()
        execution.over.set()

    def launch(
        self, resource: dict[str, Any], extra: dict[str, str], log: Any, instead: list[str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start the container of a job or an app, after those that prepare it; or run something `instead`."""
        template = resource["properties"]["template"]
        for container in template.get("initContainers") or []:
            if self.container(resource, container, extra, log).wait():
                break
        return self.container(resource, template["containers"][0], extra, log, instead)

    def container(
        self,
        resource: dict[str, Any],
        container: dict[str, Any],
        extra: dict[str, str],
        log: Any,
        instead: list[str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a container as a process, with its variables and secrets, and its mounts as folders."""
        properties = resource["properties"]
        secrets = {one["name"]: one.get("value", "") for one in properties["configuration"].get("secrets") or []}
        folders = self.mounts(properties, container)
        home = self.emulator.folder / "home"
        home.mkdir(exist_ok=True)
        environment = {
            "PATH": f"{self.path}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(home),
            "OMP_NUM_THREADS": "1",
        }
        for one in container.get("env") or []:
            value = secrets[one["secretRef"]] if one.get("secretRef") else one.get("value", "")
            for mounted, folder in folders.items():
                if value == mounted or value.startswith(mounted + "/"):
                    value = str(folder) + value[len(mounted) :]
            environment[one["name"]] = value
        command = instead or [*container.get("command", []), *container.get("args", [])]
        if ingress := properties["configuration"].get("ingress"):
            own = f"--port {self.ports[resource['name']]}"
            command = [word.replace(f"--port {ingress['targetPort']}", own) for word in command]
        return subprocess.Popen(
            command,
            cwd=next(iter(folders.values())),
            env={**environment, **extra},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def mounts(self, properties: dict[str, Any], container: dict[str, Any]) -> dict[str, Path]:
        """Return the folder on this machine for each path that a share is mounted at."""
        environment = str(properties.get("environmentId") or properties.get("managedEnvironmentId")).lower()
        volumes = {one["name"]: one for one in properties["template"].get("volumes") or []}
        found = {}
        for mount in container.get("volumeMounts") or []:
            volume = volumes[mount["volumeName"]]
            if volume.get("storageType") != "AzureFile":
                continue
            azure_file = self.emulator.resources[f"{environment}/storages/{volume['storageName']}".lower()][
                "properties"
            ]["azureFile"]
            folder = self.emulator.share(azure_file["accountName"], azure_file["shareName"])
            found[mount["mountPath"]] = folder / (mount.get("subPath") or "")
        return found

    def restart(self, name: str) -> None:
        """End an app's process; the next request starts it again."""
        if process := self.apps.pop(name, None):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def serve(self, request: Request) -> Answer:
        """Answer as an app, a log stream, or the store of logs. Raises RefusedError."""
        if request.host == STREAMS:
            if request.headers.get("authorization") != "Bearer stream":
                raise refused(401, "Unauthorized", "The token of the stream is missing.")
            execution = self.executions[request.path.split("/")[2]]
            return answer(200, self.stream(execution, int(request.query.get("taillines", "20"))))
        if request.host == QUERIES:
            text = request.json["query"]
            lines = [
                line
                for one in self.executions.values()
                if one.name in text
                for line in one.log.read_text().splitlines()
            ]
            return answer(
                200,
                {
                    "tables": [
                        {"name": "PrimaryResult", "columns": [{"name": "Log_s"}], "rows": [[line] for line in lines]}
                    ]
                },
            )
        return self.forward(request, request.host.removesuffix(APPS))

    def stream(self, execution: Execution, lines: int) -> Iterator[bytes]:
        """Yield the last lines of a log, and then what comes."""
        cut = self.emulator.fails("log cut")
        with execution.log.open("rb") as log:
            before = log.read().splitlines(keepends=True)
            yield b"".join(before[-lines:])
            while not cut:
                over = execution.over.is_set()
                if piece := log.read():
                    yield piece
                elif over:
                    return
                execution.over.wait(0.05)

    def forward(self, request: Request, name: str) -> Answer:
        """Send a request to an app's process; one that is not there is started, as when an app scales from zero."""
        app = self.emulator.find("Microsoft.App/containerApps", name)
        with self.starting:
            process = self.apps.get(name)
            if process is None or process.poll() is not None:
                with (self.emulator.folder / f"{name}.log").open("ab") as log:
                    self.ports[name] = free_port()
                    self.apps[name] = self.launch(app, {}, log)
        connection = http.client.HTTPConnection("127.0.0.1", self.ports[name], timeout=60)
        try:
            headers = {
                key: value for key, value in request.headers.items() if key not in ("connection", "accept-encoding")
            }
            query = "?" + "&".join(f"{key}={value}" for key, value in request.query.items()) if request.query else ""
            connection.request(request.method, request.path + query, request.body, headers)
            response = connection.getresponse()
            kind = response.headers.get("Content-Type", "text/plain")
            return answer(response.status, response.read(), **{"Content-Type": kind})
        except OSError:
            return answer(503, b"no healthy upstream")


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def usages(emulator: Emulator, request: Request, subscription: str, location: str) -> Answer:
    """Return the quotas of a subscription: of GPUs, Azure lists the dedicated ones only."""
    dedicated = 0 if emulator.faults["no quota"] else 48
    return answer(
        200, {"value": [usage("ManagedEnvironmentCount", 50), usage("SubscriptionDedicatedNCA100Gpus", dedicated)]}
    )


def environment_usages(emulator: Emulator, request: Request, subscription: str, group: str, name: str) -> Answer:
    """Return the quotas of an environment, where those of serverless GPUs are."""
    limit = 0 if emulator.faults["no quota"] else 1
    gpus = [usage(f"ManagedEnvironmentConsumption{kind}Gpus", limit) for kind in SERVERLESS.values()]
    return answer(200, {"value": [usage("ManagedEnvironmentConsumptionCores", 100), *gpus]})


def usage(name: str, limit: int) -> dict[str, Any]:
    """Return an entry of a list of quotas."""
    return {"name": {"value": name, "localizedValue": name}, "currentValue": 0, "limit": limit, "unit": "Count"}


def profiles(emulator: Emulator, request: Request, subscription: str, location: str) -> Answer:
    """Return the workload profiles that a region has."""
    kinds = ["Consumption", "D4", *([] if emulator.faults["no gpu in region"] else [*SERVERLESS, "NC24-A100"])]
    return answer(
        200, {"value": [{"name": kind, "properties": {"category": "GPU", "displayName": kind}} for kind in kinds]}
    )


def find_job(emulator: Emulator, request: Request) -> dict[str, Any]:
    """Return the job that a request is about. Raises RefusedError."""
    identity = request.path.lower().partition("/jobs/")
    found = emulator.resources.get(f"{identity[0]}/jobs/{identity[2].split('/')[0]}")
    if not found:
        raise refused(404, "ResourceNotFound", f"The Resource 'Microsoft.App/jobs/{identity[2]}' was not found.")
    return found


def start(emulator: Emulator, request: Request) -> Answer:
    """Start a job."""
    job = find_job(emulator, request)
    execution = emulator.containers.start(job)
    return answer(200, {"name": execution.name, "id": f"{job['id']}/executions/{execution.name}"})


def stop(emulator: Emulator, request: Request, name: str) -> Answer:
    """Stop an execution."""
    execution = emulator.containers.executions[name]
    if execution.process and execution.process.poll() is None:
        os.killpg(execution.process.pid, signal.SIGKILL)
    execution.over.wait()
    execution.status = "Stopped"
    return answer(202)


def executions(emulator: Emulator, request: Request, name: str | None = None) -> Answer:
    """Return the executions of a job, the newest first, or one of them."""
    job = find_job(emulator, request)
    every = [shown(one, job) for one in emulator.containers.executions.values() if one.job == job["name"]]
    if not name:
        return answer(200, {"value": every[::-1]})
    return answer(200, next(one for one in every if one["name"] == name))


def shown(execution: Execution, job: dict[str, Any]) -> dict[str, Any]:
    """Return an execution as Azure shows it."""
    properties = {"status": execution.status, "startTime": execution.began, "template": {}}
    properties |= {"endTime": execution.ended} if execution.ended else {}
    return {"name": execution.name, "id": f"{job['id']}/executions/{execution.name}", "properties": properties}


def replicas(emulator: Emulator, request: Request, name: str) -> Answer:
    """Return the replicas of an execution: none while it is queued, and none when it is over."""
    execution = emulator.containers.executions[name]
    if execution.queued > 0 or execution.over.is_set():
        execution.queued -= 1
        return answer(200, {"value": []})
    end = f"https://{STREAMS}/streams/{name}"
    container = {"name": "main", "logStreamEndpoint": end, "runningState": "Running"}
    return answer(200, {"value": [{"name": f"{name}-x", "properties": {"containers": [container]}}]})


def token(emulator: Emulator, request: Request) -> Answer:
    """Return the token for log streams."""
    return answer(200, {"properties": {"token": "stream", "expires": "2030-01-01T00:00:00Z"}})


def secrets(emulator: Emulator, request: Request, path: str) -> Answer:
    """Return the secrets of a job or an app, with their values."""
    found = emulator.resources[path.lower()]
    return answer(200, {"value": copy.deepcopy(found["properties"]["configuration"].get("secrets") or [])})


def restart(emulator: Emulator, request: Request, name: str) -> Answer:
    """Restart the one revision of an app."""
    emulator.containers.restart(name)
    return answer(200, "Restart succeeded")


def revisions(emulator: Emulator, request: Request, name: str) -> Answer:
    """Return the one revision of an app."""
    process = emulator.containers.apps.get(name)
    alive = process is not None and process.poll() is None
    properties = {
        "active": True,
        "replicas": int(alive),
        "runningState": "Running" if alive else "ScaledToZero",
        "healthState": "Healthy",
    }
    return answer(200, {"value": [{"name": f"{name}--1", "properties": properties}]})


L = r"/subscriptions/([^/]+)/providers/Microsoft.App/locations/([^/]+)"
G = r"/subscriptions/([^/]+)/resourceGroups/([^/]+)"
A = r"/subscriptions/[^/]+/resourceGroups/[^/]+/providers/Microsoft.App"
ROUTES = [
    ("GET", L + r"/usages", usages),
    ("GET", L + r"/availableManagedEnvironmentsWorkloadProfileTypes", profiles),
    ("GET", G + r"/providers/Microsoft.App/managedEnvironments/([^/]+)/usages", environment_usages),
    ("POST", A + r"/jobs/[^/]+/start", start),
    ("POST", A + r"/jobs/[^/]+/stop/([^/]+)", stop),
    ("GET", A + r"/jobs/[^/]+/executions", executions),
    ("GET", A + r"/jobs/[^/]+/executions/([^/]+)", executions),
    ("GET", A + r"/jobs/[^/]+/executions/([^/]+)/replicas", replicas),
    ("POST", A + r"/(?:jobs|containerApps)/[^/]+/getAuthToken", token),
    ("POST", r"(" + A + r"/(?:jobs|containerApps)/[^/]+)/listSecrets", secrets),
    ("GET", A + r"/containerApps/([^/]+)/revisions", revisions),
    ("POST", A + r"/containerApps/([^/]+)/revisions/[^/]+/restart", restart),
]
