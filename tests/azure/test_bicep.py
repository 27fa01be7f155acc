"""The Bicep files are valid Bicep, match Azure's type data, and create secure resources.

How Azure deploys them is not tested here: docs/how-to/azure-resources.md lists what only Azure can show.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import copier
import pytest
import yaml

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path.insert(0, str(HERE))

from arm import Template  # noqa: E402
from bicep_to_arm import Bicep, BicepError, main  # noqa: E402
from bicep_types import mistakes  # noqa: E402

PROVISION = REPOSITORY / "template" / "infra" / "provision"
START = (PROVISION.parent / "start.sh").read_text(encoding="utf-8")
TYPES = REPOSITORY.parent / "shared" / "azure-types"
PURPOSES = ("finetuning", "inference")
GPUS = yaml.safe_load((REPOSITORY / "catalog" / "azure_gpus.yml").read_text(encoding="utf-8"))["gpus"]
GROUP = "/subscriptions/00000000-0000-0000-0000-000000000001/resourceGroups/rg-my-ft"
DIGEST = r"[\w.-]+(/[\w.-]+)+@sha256:[0-9a-f]{64}"

for_both = pytest.mark.parametrize("purpose", PURPOSES)
Made = dict[str, list[dict[str, Any]]]
Make = Callable[..., Made]


def read(purpose: str, change: tuple[str, str] = ("", ""), folder: Path | None = None) -> Bicep:
    """Read a file, with a change that a test makes to it."""
    if folder is None:
        return Bicep.read(PROVISION / f"{purpose}.bicep")
    text = (PROVISION / f"{purpose}.bicep").read_text(encoding="utf-8")
    assert change[0] in text
    (folder.parent / "start.sh").write_text(START, encoding="utf-8")
    (folder / f"{purpose}.bicep").write_text(text.replace(*change, 1), encoding="utf-8")
    return Bicep.read(folder / f"{purpose}.bicep")


@pytest.fixture(scope="session")
def parameters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """The rendered parameters by GPU (or cpu) and purpose, from a template that is reduced to them."""
    template = tmp_path_factory.mktemp("template")
    shutil.copy(REPOSITORY / "copier.yml", template)
    shutil.copytree(REPOSITORY / "catalog", template / "catalog")
    shutil.copytree(PROVISION, template / "template" / "infra" / "provision")
    rendered = {}
    for name in [gpu["id"] for gpu in GPUS] + ["cpu"]:
        folder = tmp_path_factory.mktemp(name) / "my-ft"
        answers = {"target": "azure", **({"device": "cpu"} if name == "cpu" else {"device": "gpu", "azure_gpu": name})}
        copier.run_copy(str(template), folder, data=answers, defaults=True, quiet=True, skip_tasks=True)
        rendered[name] = {
            purpose: json.loads((folder / f"infra/provision/{purpose}.parameters.json").read_text("utf-8"))
            for purpose in PURPOSES
        }
    return rendered


@pytest.fixture(scope="session")
def make(parameters: dict[str, dict[str, dict[str, Any]]]) -> Make:
    """Return what a deployment asks Azure for: the resources by type, with every expression evaluated."""
    compiled = {purpose: read(purpose).template() for purpose in PURPOSES}

    def deploy(purpose: str, gpu: str = "serverless-t4", **more: Any) -> Made:
        values = {**parameters[gpu][purpose]["parameters"], **{name: {"value": value} for name, value in more.items()}}
        if purpose == "inference":
            values.setdefault("chatApiKey", {"value": "a key"})
        emulator = SimpleNamespace(resources={GROUP.lower(): {"id": GROUP, "name": "rg-my-ft"}})
        template = Template(emulator, GROUP, compiled[purpose], values)  # type: ignore[arg-type]
        template.find = lambda reference: {"id": reference, "properties": Anything()}  # type: ignore[method-assign]
        template.call = with_keys(template.call)  # type: ignore[method-assign]
        made: Made = {}
        for resource in template.resources():
            made.setdefault(resource["type"].partition("/")[2], []).append(template.made(resource))
        return made

    return deploy


class Anything(dict[str, Any]):
    """The properties of a resource that only Azure knows."""

    def __missing__(self, key: str) -> Anything:
        return Anything()


def with_keys(call: Callable[[str, list[Any]], Any]) -> Callable[[str, list[Any]], Any]:
    """Let listKeys() give a key that can be found again."""
    keys = {"keys": [{"value": "the account's key"}], "primarySharedKey": "the key of the logs"}
    return lambda name, a: keys if name == "listKeys" else call(name, a)


# ---- right as Bicep


@for_both
def test_every_name_is_declared_and_every_declaration_is_used(purpose: str) -> None:
    bicep = read(purpose)
    bicep.template()
    assert bicep.warnings() == []


@for_both
def test_every_parameter_is_described_in_whole_sentences(purpose: str) -> None:
    for name, parameter in read(purpose).template()["parameters"].items():
        assert re.fullmatch(r"[A-Z].*[.\]]", parameter["metadata"]["description"]), name


@for_both
def test_only_constructs_that_these_tests_understand_are_used(purpose: str) -> None:
    text = (PROVISION / f"{purpose}.bicep").read_text(encoding="utf-8")
    assert not re.search(r"^(module|targetScope|import|func|type|assert)\b|\bfor \w+ in\b|=>", text, flags=re.MULTILINE)


def test_the_common_parts_of_both_files_are_identical() -> None:
    first, second = read("finetuning"), read("inference")
    for name in set(first.parameters) & set(second.parameters) - {"keyVaultName", "defaultCommands"}:
        assert first.text(first.parameters[name]) == second.text(second.parameters[name]), name
        described = (one.template_parameter(name, one.parameters[name]) for one in (first, second))
        assert next(described) == next(described), name
    for name in set(first.resources) & set(second.resources):
        assert first.text(first.resources[name].node) == second.text(second.resources[name].node), name
    for name in set(first.variables) & set(second.variables) - {"environmentName"}:
        assert first.text(first.variables[name]) == second.text(second.variables[name]), name


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("param timeout int", "param timeout int =", "this is no Bicep"),
        ("replicaTimeout: timeout", "replicaTimeout: timeuot", 'the name "timeuot" does not exist'),
        ("parent: storage\n", "parent: stroage\n", 'there is no resource "stroage"'),
        ("param image string", "param location string", '"location" is declared twice'),
        ("var size = sizes", "var jobName = newGuid()\nvar size = sizes", '"jobName" is declared twice'),
        ("'job-${uniqueName}'", "newGuid()", "only a parameter's default may call it"),
        ("empty(acaJobName)", "emtpy(acaJobName)", "not known here: emtpy()"),
        ("storage.listKeys()", "storage.listSas()", "not known here: listSas() of a resource"),
        ("[environmentSecret, tokenSecret]", "[for x in tags: x]", "not known here: for_statement"),
        ("param tags object", "module tags 'tags.bicep' = {}", "not known here: module_declaration"),
    ],
)
def test_a_mistake_is_an_error_with_its_position(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(BicepError, match=r"finetuning\.bicep\(\d+,\d+\) : Error: ") as caught:
        read("finetuning", (old, new), tmp_path).template()
    assert message in str(caught.value)


def test_unused_declarations_are_found(tmp_path: Path) -> None:
    bicep = read("finetuning", ("replicaTimeout: timeout", "replicaTimeout: 60"), tmp_path)
    bicep.template()
    assert [warning for warning in bicep.warnings() if "timeout" in warning] == bicep.warnings() != []


def test_the_command_line_has_the_compiler_options_that_az_uses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copy(PROVISION / "finetuning.bicep", tmp_path)
    assert main(["--version"]) == 0
    assert re.fullmatch(r"Bicep CLI version \d+\.\d+\.\d+ \(.*\)\n", capsys.readouterr().out)
    assert main(["build", source, "--stdout"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert main(["build", source]) == 0
    assert json.loads((tmp_path / "finetuning.json").read_text()) == printed == read("finetuning").template()
    Path(source).write_text("param a int int\n")
    assert main(["lint", source]) == 1
    assert "this is no Bicep" in capsys.readouterr().err


@for_both
def test_the_real_compiler_builds_it_without_a_warning(purpose: str, tmp_path: Path) -> None:
    bicep = shutil.which("bicep")
    if bicep is None:
        pytest.skip("bicep is not on PATH; the workflow of a workspace runs it")
    for command in (["build", "--outfile", str(tmp_path / "out.json")], ["lint"]):
        done = subprocess.run([bicep, *command, PROVISION / f"{purpose}.bicep"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr


# ---- right for Azure, as far as its type data says


@for_both
def test_the_resource_bodies_have_the_types_that_azure_expects(purpose: str) -> None:
    if not TYPES.is_dir():
        pytest.skip("no type data beside this checkout (shared/azure-types)")
    wrong, unknown = mistakes(read(purpose), TYPES)
    assert wrong == []
    assert set(unknown) <= {"Microsoft.Consumption/budgets@2024-08-01"}  # there is no data of this one


@pytest.mark.parametrize(
    ("purpose", "old", "new", "message"),
    [
        ("finetuning", "minimumTlsVersion", "minimumTLSVersion", "there is no property minimumTLSVersion"),
        ("finetuning", "'TLS1_2'", "'TLS12'", "'TLS12' is none of TLS1_0"),
        ("finetuning", "triggerType: 'Manual'", "", "triggerType is missing"),
        ("finetuning", "replicaRetryLimit: 0", "replicaRetryLimit: '0'", "'0' is no IntegerType"),
        ("finetuning", "replicaTimeout: timeout", "replicaTimeout: image", "image is StringType, no IntegerType"),
        ("finetuning", "minimumCount: 0", "minCount: 0", "there is no property minCount"),  # in a branch
        ("finetuning", "union({ name: workloadProfileName, ", "union({ ", "name is missing"),
        ("finetuning", "memory: '220Gi' }\n  'NC24", "memory: 220 }\n  'NC24", "220 is no StringType"),  # in a table
        ("finetuning", "days: 7", "days: true", "true is no IntegerType"),
        ("finetuning", "['bash', ", "[1, ", "1 is no StringType"),
        ("finetuning", "kind: 'StorageV2'", "sku_: 'x'", "kind is missing"),
        ("finetuning", "principalType: ", "scope: ", "scope is set by Azure alone"),
        ("inference", "type: 'Liveness'", "type: 'Alive'", "'Alive' is none of Liveness"),
        ("inference", "{ path: '/health', port: 7860 }", "{ path: '/health' }", "port is missing"),  # in a variable
    ],
)
def test_the_type_check_finds_each_mistake(purpose: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    if not TYPES.is_dir():
        pytest.skip("no type data beside this checkout (shared/azure-types)")
    wrong, _ = mistakes(read(purpose, (old, new), tmp_path), TYPES)
    assert [one for one in wrong if message in one], wrong


# ---- the parameters


@for_both
@pytest.mark.parametrize("gpu", [gpu["id"] for gpu in GPUS] + ["cpu"])
def test_the_parameters_of_every_gpu_are_those_that_the_file_asks_for(
    purpose: str, gpu: str, parameters: dict[str, dict[str, dict[str, Any]]], make: Make
) -> None:
    declared = read(purpose).template()["parameters"]
    given = parameters[gpu][purpose]["parameters"]
    assert set(given) <= set(declared)
    assert {name for name, about in declared.items() if "defaultValue" not in about} == set(given)
    assert not [name for name in given if declared[name]["type"].startswith("secure")]
    make(purpose, gpu)  # types, ranges and allowed values are checked as Azure does


def test_the_parameters_have_the_names_that_ai_toolkit_users_know() -> None:
    known = {"defaultCommands", "maximumInstanceCount", "location", "storageAccountName", "fileShareName"}
    known |= {"acaEnvironmentName", "acaEnvironmentStorageName", "acaLogAnalyticsName"}
    assert set(read("finetuning").parameters) >= known | {"timeout", "acaJobName"}
    assert set(read("inference").parameters) >= known | {"acaAppName"}


def test_the_outputs_are_the_keys_of_the_config_files_in_their_order() -> None:
    first = ["SUBSCRIPTION_ID", "RESOURCE_GROUP_NAME", "STORAGE_ACCOUNT_NAME", "FILE_SHARE_NAME"]
    assert list(read("finetuning").outputs) == [*first, "ACA_JOB_NAME", "COMMANDS"]
    assert list(read("inference").outputs) == [*first, "ACA_APP_NAME", "ACA_APP_ENDPOINT"]


@pytest.mark.parametrize("name", ["abc", "a" * 32, "a--b---c", "my-ft", "x" + "-y" * 15])
@for_both
def test_derived_names_follow_azures_rules_for_any_project_name(purpose: str, name: str, make: Make) -> None:
    made = make(purpose, projectName=name)
    rules = {
        "storageAccounts": r"[a-z0-9]{3,24}",
        "storageAccounts/fileServices/shares": r"(?!.*--)[a-z0-9][a-z0-9-]{1,61}[a-z0-9]",
        "managedEnvironments": r"(?!.*--)[a-z][a-z0-9-]{0,58}[a-z0-9]",
        "managedEnvironments/storages": r"(?!.*--)[a-z][a-z0-9-]{0,30}[a-z0-9]",
        "jobs": r"(?!.*--)[a-z][a-z0-9-]{0,30}[a-z0-9]",
        "containerApps": r"(?!.*--)[a-z][a-z0-9-]{0,30}[a-z0-9]",
        "workspaces": r"[a-zA-Z0-9][a-zA-Z0-9-]{2,61}[a-zA-Z0-9]",
        "userAssignedIdentities": r"[a-zA-Z0-9][\w-]{2,127}",
    }
    for kind in rules.keys() & made.keys():
        for resource in made[kind]:
            assert re.fullmatch(rules[kind], resource["name"]), (kind, resource["name"])


@for_both
def test_a_named_resource_is_used_unchanged_and_none_is_created(purpose: str, make: Make) -> None:
    named = {"storageAccountName": "mine", "fileShareName": "files", "acaEnvironmentName": "here"}
    made = make(purpose, **named, acaEnvironmentStorageName="mounted", acaLogAnalyticsName="logs")
    kind, own = {"finetuning": ("jobs", []), "inference": ("containerApps", ["managedEnvironments/storages"])}[purpose]
    assert sorted(made) == sorted([kind, "userAssignedIdentities", *own])
    assert made[kind][0]["properties"]["environmentId"].endswith("/managedEnvironments/here")
    volume = made[kind][0]["properties"]["template"]["volumes"][0]
    assert volume["storageName"] == "mounted"
    for storage in made.get("managedEnvironments/storages", []):
        assert storage["properties"]["azureFile"]["accountName"] == "mine"


def test_both_purposes_use_one_account_share_and_log_but_separate_environments(make: Make) -> None:
    first, second = make("finetuning"), make("inference")
    for kind in (
        "storageAccounts",
        "storageAccounts/fileServices",
        "storageAccounts/fileServices/shares",
        "workspaces",
    ):
        assert first[kind] == second[kind]
    assert first["managedEnvironments"][0]["name"] != second["managedEnvironments"][0]["name"]


# ---- what is rented


@for_both
@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu["id"])
def test_the_profile_and_its_size_are_those_of_the_catalogue(purpose: str, gpu: dict[str, Any], make: Make) -> None:
    made = make(purpose, gpu["id"], maximumInstanceCount=3)
    consumption, profile = made["managedEnvironments"][0]["properties"]["workloadProfiles"]
    assert consumption == {"name": "Consumption", "workloadProfileType": "Consumption"}
    # Azure refuses counts for a serverless profile, and bills the least number of instances of a dedicated one.
    counts = {} if gpu["kind"] == "serverless" else {"minimumCount": 0, "maximumCount": 3}
    assert profile == {"name": "gpu", "workloadProfileType": gpu["profile"], **counts}
    (runs,) = made["jobs" if purpose == "finetuning" else "containerApps"]
    assert runs["properties"]["workloadProfileName"] == "gpu"
    (container,) = runs["properties"]["template"]["containers"]
    assert container["resources"] == {"cpu": gpu["vcpu"], "memory": f"{gpu['memory_gib']}Gi"}


@for_both
def test_the_demo_runs_without_a_gpu(purpose: str, make: Make) -> None:
    made = make(purpose, "cpu")
    (profile,) = made["managedEnvironments"][0]["properties"]["workloadProfiles"]
    assert profile == {"name": "Consumption", "workloadProfileType": "Consumption"}
    (runs,) = made["jobs" if purpose == "finetuning" else "containerApps"]
    assert runs["properties"]["workloadProfileName"] == "Consumption"
    assert runs["properties"]["template"]["containers"][0]["resources"] == {"cpu": 4, "memory": "8Gi"}


@for_both
def test_the_sizes_cover_exactly_the_profiles_of_the_catalogue(purpose: str) -> None:
    sizes = read(purpose).template()["variables"]["sizes"]
    assert list(sizes) == ["Consumption", *(gpu["profile"] for gpu in GPUS)]


def test_all_gpus_of_a_profile_are_trained_on(parameters: dict[str, dict[str, dict[str, Any]]]) -> None:
    for gpu in GPUS:
        last = parameters[gpu["id"]]["finetuning"]["parameters"]["defaultCommands"]["value"][-1]
        several = f"accelerate launch --multi_gpu --num_processes {gpu['gpus']} finetuning/invoke_olive.py"
        assert last == ("python finetuning/invoke_olive.py" if gpu["gpus"] == 1 else several)
    assert parameters["cpu"]["finetuning"]["parameters"]["defaultCommands"]["value"][-1].startswith("python ")


def test_the_app_scales_to_zero_when_idle_and_never_beyond_one_replica(make: Make) -> None:
    (app,) = make("inference")["containerApps"]
    assert app["properties"]["template"]["scale"] == {"minReplicas": 0, "maxReplicas": 1, "cooldownPeriod": 300}


def test_a_job_starts_manually_runs_once_and_ends_at_its_timeout(make: Make) -> None:
    (job,) = make("finetuning", timeout=7200)["jobs"]
    configuration = job["properties"]["configuration"]
    assert configuration["triggerType"] == "Manual"
    assert configuration["manualTriggerConfig"] == {"parallelism": 1, "replicaCompletionCount": 1}
    assert (configuration["replicaTimeout"], configuration["replicaRetryLimit"]) == (7200, 0)


def test_a_budget_is_created_for_an_amount_and_emails_the_owners(make: Make) -> None:
    assert "budgets" not in make("finetuning")
    (budget,) = make("finetuning", budgetAmount=50, budgetContactEmails=["me@example.com"], budgetStart="2026-11-01")[
        "budgets"
    ]
    properties = budget["properties"]
    assert (properties["amount"], properties["timePeriod"]) == (50, {"startDate": "2026-11-01"})
    for notification in properties["notifications"].values():
        assert notification["enabled"] and notification["contactEmails"] == ["me@example.com"]
        assert notification["threshold"] <= 100
        assert notification["contactRoles"] == ["Owner"]
    thresholds = {one["threshold"]: one["thresholdType"] for one in properties["notifications"].values()}
    assert thresholds == {80: "Actual", 100: "Forecasted"}


@for_both
def test_share_and_logs_have_limits(purpose: str, make: Make) -> None:
    made = make(purpose)
    (share,), (logs,) = made["storageAccounts/fileServices/shares"], made["workspaces"]
    assert share["properties"]["shareQuota"] == 1024
    assert logs["properties"]["workspaceCapping"] == {"dailyQuotaGb": 1}
    assert logs["properties"]["retentionInDays"] == 30


@for_both
def test_every_resource_that_can_be_tagged_has_the_workspace_tag(purpose: str, make: Make) -> None:
    made = make(purpose, tags={"team": "blue"})
    tagged = [one for kind, found in made.items() for one in found if kind.count("/") == 0]
    assert len(tagged) == 5
    assert all(one["tags"] == {"team": "blue", "workspace": "my-ft"} for one in tagged)


# ---- how it is kept safe


@for_both
def test_the_share_requires_current_encryption(purpose: str, make: Make) -> None:
    made = make(purpose)
    (account,), (files,) = made["storageAccounts"], made["storageAccounts/fileServices"]
    assert account["properties"]["minimumTlsVersion"] == "TLS1_2"
    assert account["properties"]["supportsHttpsTrafficOnly"] is True
    assert account["properties"]["allowBlobPublicAccess"] is False
    smb = files["properties"]["protocolSettings"]["smb"]
    assert (smb["versions"], smb["channelEncryption"]) == ("SMB3.1.1", "AES-128-GCM;AES-256-GCM")


@for_both
def test_commands_run_in_one_shell_that_stops_at_the_first_failure(purpose: str, make: Make) -> None:
    (runs,) = make(purpose, defaultCommands=["one", "two"])["jobs" if purpose == "finetuning" else "containerApps"]
    template = runs["properties"]["template"]
    for container in [*template["containers"], *template.get("initContainers", [])]:
        assert container["command"] == ["bash", "-euo", "pipefail", "-c"]
        (script,) = container["args"]
        first, start, commands = script.rpartition(START)
        assert start, "nothing runs before infra/start.sh has checked the share"
        assert re.fullmatch(r"(if \[ \"\$CODE_SHA256\" = none \]; then [^;]+; fi\n)?", first)
        assert ";" not in commands
    assert template["containers"][0]["args"][0].endswith("\none && two")


def test_a_new_app_on_an_empty_share_responds_and_exposes_nothing(make: Make, tmp_path: Path) -> None:
    template = make("inference")["containerApps"][0]["properties"]["template"]
    (prepare,), (app,) = template["initContainers"], template["containers"]
    environment = {"PATH": os.environ["PATH"], "WORKSPACE_MOUNT": str(tmp_path), "CODE_SHA256": "none"}
    assert subprocess.run([*prepare["command"], *prepare["args"]], env=environment).returncode == 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    line = app["args"][0].replace("7860", f"{port} --bind 127.0.0.1").replace("/tmp/new", str(tmp_path / "new"))
    environment["PYTHONUNBUFFERED"] = "1"
    command = [*app["command"], line]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout and "Serving HTTP" in server.stdout.readline()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health") as answer:
                assert answer.status == 200
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
                assert re.findall('href="(.*?)"', answer.read().decode()) == ["health/"]
        finally:
            server.terminate()


@for_both
def test_the_image_is_pinned_by_its_digest(purpose: str, make: Make) -> None:
    (runs,) = make(purpose)["jobs" if purpose == "finetuning" else "containerApps"]
    template = runs["properties"]["template"]
    for container in [*template["containers"], *template.get("initContainers", [])]:
        assert re.fullmatch(DIGEST, container["image"])


@for_both
def test_the_identity_is_not_available_inside_the_containers(purpose: str, make: Make) -> None:
    made = make(purpose)
    (runs,) = made["jobs" if purpose == "finetuning" else "containerApps"]
    identity = made["userAssignedIdentities"][0]["id"]
    assert runs["identity"] == {"type": "UserAssigned", "userAssignedIdentities": {identity: {}}}
    assert runs["properties"]["configuration"]["identitySettings"] == [{"identity": identity, "lifecycle": "None"}]
    assert "roleAssignments" not in made


@for_both
def test_with_a_key_vault_no_secret_passes_through_the_deployment(purpose: str, make: Make) -> None:
    made = make(
        purpose,
        keyVaultName="my-vault",
        hfToken="",
        environmentKey="the seal",
        **({"chatApiKey": "x"} if purpose == "inference" else {}),
    )
    (runs,) = made["jobs" if purpose == "finetuning" else "containerApps"]
    own = {"name": "environment-key", "value": "the seal"}  # of this deployment, and of no use elsewhere
    found = [one for one in runs["properties"]["configuration"]["secrets"] if one != own]
    identity = made["userAssignedIdentities"][0]["id"]
    names = ["hf-token"] if purpose == "finetuning" else ["chat-api-key", "hf-token"]
    url = "https://my-vault.vault.azure.net/secrets/"
    assert found == [{"name": name, "keyVaultUrl": url + name, "identity": identity} for name in names]
    (role,) = made["roleAssignments"]
    assert role["id"].startswith("Microsoft.KeyVault/vaults/my-vault/")
    assert role["properties"]["roleDefinitionId"].endswith("/4633458b-17de-408a-874b-0445c86b69e6")  # may read secrets


@for_both
def test_a_secret_is_stored_only_as_a_secret(purpose: str, make: Make) -> None:
    key = {"chatApiKey": "the key"} if purpose == "inference" else {}
    (runs,) = make(purpose, hfToken="the token", environmentKey="the seal", **key)[
        "jobs" if purpose == "finetuning" else "containerApps"
    ]
    kept = runs["properties"]["configuration"].pop("secrets")
    assert sorted(one["value"] for one in kept) == sorted(["the seal", "the token", *key.values()])
    assert not [word for word in ("the token", "the key", "the seal") if word in json.dumps(runs)]
    template = runs["properties"]["template"]
    containers = [*template["containers"], *template.get("initContainers", [])]
    referred = {one["secretRef"]: one["name"] for each in containers for one in each["env"] if "secretRef" in one}
    assert referred == {"hf-token": "HF_TOKEN", "environment-key": "ENVIRONMENT_KEY"} | (
        {"chat-api-key": "CHAT_API_KEY"} if key else {}
    )


@for_both
def test_each_container_turns_off_all_telemetry(purpose: str, make: Make) -> None:
    with patch.dict(os.environ):
        switches = runpy.run_path(str(REPOSITORY / "template" / "setup" / "no_telemetry.py"))
    wanted = [{"name": name, "value": value} for name, value in (switches["OFF"] | switches["OFF_BY_DEFAULT"]).items()]
    (runs,) = make(purpose)["jobs" if purpose == "finetuning" else "containerApps"]
    template = runs["properties"]["template"]
    for container in [*template["containers"], *template.get("initContainers", [])]:
        first = container["env"].index(wanted[0])
        assert container["env"][first : first + len(wanted)] == wanted, container["name"]


@for_both
def test_without_a_token_there_is_no_secret_for_one(purpose: str, make: Make) -> None:
    (runs,) = make(purpose)["jobs" if purpose == "finetuning" else "containerApps"]
    names = [one["name"] for one in runs["properties"]["configuration"]["secrets"]]
    assert names == ["environment-key"] if purpose == "finetuning" else ["chat-api-key", "environment-key"]
    assert "HF_TOKEN" not in json.dumps(runs)


@for_both
def test_secrets_are_secure_parameters_and_in_no_output(purpose: str) -> None:
    template = read(purpose).template()
    secure = {name for name, about in template["parameters"].items() if about["type"].startswith("secure")}
    assert secure == {"hfToken", "environmentKey"} | ({"chatApiKey"} if purpose == "inference" else set())
    told = json.dumps(template["outputs"])
    assert not re.search(r"listKeys|hfToken|chatApiKey|Secret", told)
    assert template["parameters"]["hfToken"]["defaultValue"] == ""


def test_the_app_always_requires_a_key(make: Make) -> None:
    template = read("inference").template()
    assert template["parameters"]["chatApiKey"]["defaultValue"] == "[newGuid()]"  # also when nobody gives one
    for more in (
        {},
        {"entraClientId": "id"},
        {"ipSecurityRestrictions": [{"name": "a"}]},
        {"keyVaultName": "my-vault"},
    ):
        (app,) = make("inference", **more)["containerApps"]
        assert app["properties"]["configuration"]["ingress"]["allowInsecure"] is False
        (container,) = app["properties"]["template"]["containers"]
        assert {"name": "CHAT_API_KEY", "secretRef": "chat-api-key"} in container["env"]


def test_entra_id_protects_the_page_if_its_app_is_named(make: Make) -> None:
    assert "containerApps/authConfigs" not in make("inference")
    (login,) = make("inference", entraClientId="an-id")["containerApps/authConfigs"]
    properties = login["properties"]
    assert login["name"] == "current" and properties["platform"] == {"enabled": True}
    assert properties["globalValidation"]["unauthenticatedClientAction"] == "RedirectToLoginPage"
    # programs cannot log in on a page: only the key protects these
    excluded = ["/v1/models", "/v1/chat/completions", "/health"]
    assert properties["globalValidation"]["excludedPaths"] == excluded
    directory = properties["identityProviders"]["azureActiveDirectory"]
    assert directory["validation"] == {"allowedAudiences": ["an-id", "api://an-id"]}
    issuer = directory["registration"]["openIdIssuer"]
    assert re.fullmatch(r"https://login\.microsoftonline\.com/[0-9a-f-]{36}/v2\.0", issuer)


def test_addresses_can_be_restricted(make: Make) -> None:
    office = [{"name": "office", "action": "Allow", "ipAddressRange": "203.0.113.0/24"}]
    (app,) = make("inference", ipSecurityRestrictions=office)["containerApps"]
    assert app["properties"]["configuration"]["ingress"]["ipSecurityRestrictions"] == office


def test_the_app_mounts_the_share_read_only_and_its_init_container_can_write(make: Make) -> None:
    made = make("inference")
    modes = {one["name"]: one["properties"]["azureFile"]["accessMode"] for one in made["managedEnvironments/storages"]}
    template = made["containerApps"][0]["properties"]["template"]
    volumes = {one["name"]: modes[one["storageName"]] for one in template["volumes"]}
    assert [volumes[one["volumeName"]] for one in template["containers"][0]["volumeMounts"]] == ["ReadOnly"]
    assert [volumes[one["volumeName"]] for one in template["initContainers"][0]["volumeMounts"]] == ["ReadWrite"]


def test_the_probes_request_the_apps_health(make: Make) -> None:
    template = make("inference")["containerApps"][0]["properties"]["template"]
    probes = {one["type"]: one for one in template["containers"][0]["probes"]}
    assert set(probes) == {"Startup", "Readiness", "Liveness"}
    assert all(one["httpGet"] == {"path": "/health", "port": 7860} for one in probes.values())
    # the most that Azure takes: a model and its libraries are read from a share
    assert (probes["Startup"]["periodSeconds"], probes["Startup"]["failureThreshold"]) == (60, 10)
