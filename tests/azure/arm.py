"""What the emulator has of Azure Resource Manager: groups, deployments with their expressions, and any resource."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import re
import uuid
from itertools import chain
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emulator import Answer, Emulator, Request

TOKENS = re.compile(r"\s*(?:('(?:[^']|'')*')|(-?\d+)|([A-Za-z_]\w*)|(.))")
TENANT = "11111111-1111-1111-1111-111111111111"
TAKEN = "takenbysomebody"  # a storage account of somebody else's


class Template:
    """A template with its parameters: evaluates expressions, and says what a deployment of it makes."""

    def __init__(self, emulator: Emulator, scope: str, template: dict[str, Any], values: dict[str, Any]) -> None:
        """`scope` is the id of the resource group. Raises RefusedError for parameters that do not fit."""
        self.emulator, self.scope, self.template = emulator, scope, template
        self.variables: dict[str, Any] = template.get("variables", {})
        resources = template.get("resources", {})
        self.named: dict[str, Any] = resources if isinstance(resources, dict) else {}
        self.parameters: dict[str, Any] = {}
        self.secure = set()
        unknown = set(values) - set(template.get("parameters", {}))
        if unknown:
            raise refused(
                400,
                "InvalidTemplate",
                f"The following parameters are not defined in the template: '{', '.join(sorted(unknown))}'.",
            )
        for name, wanted in template.get("parameters", {}).items():
            if wanted["type"].lower().startswith("secure"):
                self.secure.add(name)
            if name in values:
                self.parameters[name] = values[name]["value"]
            elif "defaultValue" in wanted:
                self.parameters[name] = self.value(wanted["defaultValue"])
            else:
                raise refused(400, "InvalidTemplate", f"The value for the template parameter '{name}' is not provided.")
            self.check(name, wanted)

    def check(self, name: str, wanted: dict[str, Any]) -> None:
        """Refuse a parameter of another type, or one that its constraints exclude."""
        value, kinds = self.parameters[name], {"string": str, "int": int, "bool": bool, "array": list, "object": dict}
        kind = kinds[wanted["type"].lower().removeprefix("secure")]
        if value is None and wanted.get("nullable"):
            return
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise refused(400, "InvalidTemplate", f"Template parameter JToken type is not valid for '{name}'.")
        size = value if kind is int else len(value) if kind in (str, list) else 0
        low, high = ("minValue", "maxValue") if kind is int else ("minLength", "maxLength")
        if "allowedValues" in wanted and value not in wanted["allowedValues"]:
            raise refused(
                400,
                "InvalidTemplate",
                f"The value '{value}' of '{name}' is not part of the allowed value(s): {wanted['allowedValues']}.",
            )
        if size < wanted.get(low, size) or size > wanted.get(high, size):
            raise refused(
                400,
                "InvalidTemplate",
                f"The provided value for the template parameter '{name}' is not valid: its {low} or {high}.",
            )

    def resources(self) -> list[dict[str, Any]]:
        """Return the resources to create, in the order of their dependencies."""
        waiting = []
        declared = self.template.get("resources", [])
        for key, resource in declared.items() if isinstance(declared, dict) else enumerate(declared):
            if resource.get("existing") or not self.value(resource.get("condition", True)):
                continue
            waiting.append((key, resource, self.identity(resource)))
        ordered: list[dict[str, Any]] = []
        while waiting:
            open_ = {key for key, _, _ in waiting} | {identity.lower() for _, _, identity in waiting}
            for entry in waiting:
                needs = {str(self.value(need)).lower() for need in entry[1].get("dependsOn", [])}
                needs |= {need for need in entry[1].get("dependsOn", []) if need in self.named}
                if not needs & open_:
                    break
            else:
                raise refused(400, "InvalidTemplate", "Circular dependency detected.")
            waiting.remove(entry)
            ordered.append(entry[1])
        return ordered

    def identity(self, resource: dict[str, Any]) -> str:
        """Return the id of a resource."""
        name = self.value(resource["name"])
        if scope := resource.get("scope"):
            return f"{self.value(scope)}/providers/{joined(resource['type'], name)}"
        return f"{self.scope}/providers/{joined(resource['type'], name)}"

    def made(self, resource: dict[str, Any]) -> dict[str, Any]:
        """Return a resource as it is sent, all expressions evaluated."""
        body = {
            key: value
            for key, value in resource.items()
            if key not in ("dependsOn", "condition", "scope", "existing", "comments")
        }
        body = self.value(body)
        return body | {"id": self.identity(resource), "name": body["name"].rpartition("/")[2]}

    def outputs(self) -> dict[str, Any]:
        """Return the outputs, with their types."""
        outputs = self.template.get("outputs", {})
        return {name: {"type": entry["type"], "value": self.value(entry["value"])} for name, entry in outputs.items()}

    def value(self, part: Any) -> Any:
        """Return any part of a template with its expressions evaluated."""
        if isinstance(part, dict):
            return {self.value(key): self.value(value) for key, value in part.items()}
        if isinstance(part, list):
            return [self.value(value) for value in part]
        if isinstance(part, str) and part.startswith("[") and part.endswith("]"):
            if part.startswith("[["):
                return part[1:]
            tokens = [next(group for group in match if group) for match in TOKENS.findall(part[1:-1])]
            result, rest = self.expression(tokens)
            assert not rest, (part, rest)
            return result
        return part

    def expression(self, tokens: list[str]) -> tuple[Any, list[str]]:
        """Evaluate the expression at the beginning; return its value and the rest of the tokens."""
        first, rest = tokens[0], tokens[1:]
        if first.startswith("'"):
            result: Any = first[1:-1].replace("''", "'")
        elif re.fullmatch(r"-?\d+", first):
            result = int(first)
        else:
            assert rest[:1] == ["("], tokens
            arguments, rest = self.arguments(first, rest[1:])
            result = self.call(first, arguments) if first != "if" else arguments
        while rest and rest[0] in (".", "["):
            if rest[0] == ".":
                key, rest = rest[1], rest[2:]
            else:
                key, rest = self.expression(rest[1:])
                rest = rest[1:]
            result = result[key]
        return result, rest

    def arguments(self, name: str, tokens: list[str]) -> tuple[Any, list[str]]:
        """Return the arguments of a call; of an if, the value of the branch that is taken."""
        pieces: list[list[str]] = [[]]
        depth, end = 0, 0
        while (token := tokens[end]) != ")" or depth:
            depth += (token in "([") - (token in ")]")
            if token == "," and depth == 0:
                pieces.append([])
            else:
                pieces[-1].append(token)
            end += 1
        pieces = [piece for piece in pieces if piece]
        if name == "if":  # the other branch may ask for what is not there
            chosen = pieces[1 if self.expression(pieces[0])[0] else 2]
            return self.expression(chosen)[0], tokens[end + 1 :]
        return [self.expression(piece)[0] for piece in pieces], tokens[end + 1 :]

    def call(self, name: str, a: list[Any]) -> Any:
        """Evaluate a function of Azure Resource Manager."""
        subscription = self.scope.split("/")[2]
        group = self.emulator.resources[self.scope.lower()]
        functions = {
            "parameters": lambda: self.parameters[a[0]],
            "variables": lambda: self.value(self.variables[a[0]]),
            "resourceGroup": lambda: group,
            "subscription": lambda: {
                "subscriptionId": subscription,
                "id": f"/subscriptions/{subscription}",
                "tenantId": TENANT,
            },
            "tenant": lambda: {"tenantId": TENANT},
            "deployment": lambda: {"name": "main"},
            "environment": lambda: {
                "suffixes": {"storage": "core.windows.net", "keyvaultDns": ".vault.azure.net"},
                "resourceManager": "https://management.azure.com/",
                "authentication": {"loginEndpoint": "https://login.microsoftonline.com/"},
            },
            "resourceId": lambda: f"{self.scope}/providers/{joined(a[0], '/'.join(a[1:]))}",
            "subscriptionResourceId": lambda: (
                f"/subscriptions/{subscription}/providers/{joined(a[0], '/'.join(a[1:]))}"
            ),
            "extensionResourceId": lambda: f"{a[0]}/providers/{joined(a[1], '/'.join(a[2:]))}",
            "tenantResourceId": lambda: f"/providers/{joined(a[0], '/'.join(a[1:]))}",
            "reference": lambda: self.reference(a[0], len(a) > 2),
            "listKeys": lambda: list_keys(self.emulator, self.find(a[0])["id"]),
            "uniqueString": lambda: (
                base64.b32encode(hashlib.sha256("-".join(a).encode()).digest()).decode()[:13].lower()
            ),
            "guid": lambda: re.sub(
                r"(.{8})(.{4})(.{4})(.{4})(.{12}).*",
                r"\1-\2-\3-\4-\5",
                hashlib.sha256("-".join(a).encode()).hexdigest(),
            ),
            "format": lambda: re.sub(r"\{(\d+)\}", lambda match: text(a[1 + int(match[1])]), a[0]),
            "concat": lambda: list(chain(*a)) if isinstance(a[0], list) else "".join(map(text, a)),
            "join": lambda: a[1].join(map(text, a[0])),
            "split": lambda: a[0].split(a[1]),
            "substring": lambda: a[0][a[1] :][: a[2] if len(a) > 2 else None],
            "take": lambda: a[0][: a[1]],
            "skip": lambda: a[0][a[1] :],
            "replace": lambda: a[0].replace(a[1], a[2]),
            "toLower": lambda: a[0].lower(),
            "toUpper": lambda: a[0].upper(),
            "trim": lambda: a[0].strip(),
            "string": lambda: text(a[0]),
            "int": lambda: int(a[0]),
            "bool": lambda: a[0] in (True, "true", "True", 1),
            "json": lambda: json.loads(a[0]),
            "length": lambda: len(a[0]),
            "empty": lambda: not a[0],
            "not": lambda: not a[0],
            "and": lambda: all(a),
            "or": lambda: any(a),
            "equals": lambda: a[0] == a[1],
            "greater": lambda: a[0] > a[1],
            "less": lambda: a[0] < a[1],
            "contains": lambda: a[1] in a[0],
            "startsWith": lambda: a[0].lower().startswith(a[1].lower()),
            "first": lambda: a[0][0],
            "last": lambda: a[0][-1],
            "min": lambda: min(a[0] if isinstance(a[0], list) else a),
            "max": lambda: max(a[0] if isinstance(a[0], list) else a),
            "add": lambda: a[0] + a[1],
            "sub": lambda: a[0] - a[1],
            "mul": lambda: a[0] * a[1],
            "div": lambda: a[0] // a[1],
            "null": lambda: None,
            "true": lambda: True,
            "false": lambda: False,
            "createArray": lambda: a,
            "createObject": lambda: dict(zip(a[::2], a[1::2], strict=True)),
            "union": lambda: (
                {key: value for entry in a for key, value in entry.items()}
                if isinstance(a[0], dict)
                else list(dict.fromkeys(chain(*a)))
            ),
            "coalesce": lambda: next((value for value in a if value is not None), None),
            "items": lambda: [{"key": key, "value": value} for key, value in sorted(a[0].items())],
            "base64": lambda: base64.b64encode(a[0].encode()).decode(),
            "newGuid": lambda: str(uuid.uuid4()),
            "utcNow": lambda: "2026-11-01",
            "uri": lambda: a[0] + a[1],
        }
        known = {function.lower(): function for function in functions}
        if name.lower() not in known:
            raise refused(400, "InvalidTemplate", f"The template function '{name}' is not valid.")
        return functions[known[name.lower()]]()

    def find(self, reference: str) -> dict[str, Any]:
        """Return the resource with this id or, in a template with names for them, this name."""
        identity = self.identity(self.named[reference]) if reference in self.named else reference
        found = self.emulator.resources.get(identity.lower())
        if found is None:
            raise refused(
                404,
                "ResourceNotFound",
                f"The Resource '{identity}' under resource group '{self.scope.rpartition('/')[2]}' was not found.",
            )
        return found

    def reference(self, reference: str, full: bool) -> Any:
        """Return the properties of a resource, or all of it."""
        found = self.find(reference)
        return found if full else found["properties"]


def text(value: Any) -> str:
    """Return what ARM makes of a value within a text."""
    return value if isinstance(value, str) else json.dumps(value)


def joined(kind: str, name: str) -> str:
    """Return type and name as they stand in an id: Microsoft.Storage/storageAccounts/me/fileServices/default."""
    namespace, *kinds = kind.split("/")
    names = name.split("/")
    return "/".join([namespace, *(part for pair in zip(kinds, names, strict=True) for part in pair)])


def refused(status: int, code: str, message: str) -> Exception:
    """Return the error of a request that is refused."""
    from emulator import RefusedError

    return RefusedError(status, code, message)


def answer(status: int = 200, body: Any = b"", **headers: str) -> Answer:
    """Return an answer."""
    from emulator import Answer

    return Answer(status, body, headers)


def store(emulator: Emulator, body: dict[str, Any]) -> dict[str, Any]:
    """Put a resource where its id says, with what Azure adds to it."""
    kind, old = body["type"].lower(), emulator.resources.get(body["id"].lower())
    body.setdefault("properties", {})
    if kind == "microsoft.storage/storageaccounts":
        if body["name"] == TAKEN or emulator.fails("name taken"):
            raise refused(
                409, "StorageAccountAlreadyTaken", f"The storage account named {body['name']} is already taken."
            )
        if not re.fullmatch("[a-z0-9]{3,24}", body["name"]):
            raise refused(400, "AccountNameInvalid", f"{body['name']} is not a valid storage account name.")
        host = f"https://{body['name']}.file.core.windows.net/"
        body["properties"]["primaryEndpoints"] = {"file": host}
    if kind == "microsoft.storage/storageaccounts/fileservices/shares":
        account = body["id"].split("/")[8]
        emulator.share(account, body["name"]).mkdir(parents=True, exist_ok=True)
    if kind == "microsoft.operationalinsights/workspaces":
        body["properties"]["customerId"] = "33333333-3333-3333-3333-333333333333"
    if kind == "microsoft.managedidentity/userassignedidentities":
        body["properties"] |= {"principalId": "44444444-4444-4444-4444-444444444444", "tenantId": TENANT}
    if kind.startswith("microsoft.app/"):
        emulator.containers.check(body, old)
    body["properties"]["provisioningState"] = "Succeeded"
    emulator.resources[body["id"].lower()] = body
    return body


def groups(emulator: Emulator, request: Request, subscription: str, name: str) -> Answer:
    """Answer for a resource group: GET, HEAD, PUT, DELETE (with all that is in it)."""
    key = f"/subscriptions/{subscription}/resourceGroups/{name}"
    found = emulator.resources.get(key.lower())
    if request.method == "PUT":
        if found and found["location"] != request.json["location"]:
            raise refused(
                409,
                "InvalidResourceGroupLocation",
                f"The Resource group already exists in location '{found['location']}'.",
            )
        body = {"id": key, "name": name, "type": "Microsoft.Resources/resourceGroups", **request.json}
        emulator.resources[key.lower()] = body | {"properties": {"provisioningState": "Succeeded"}}
        return answer(200 if found else 201, emulator.resources[key.lower()])
    if request.method == "HEAD":
        return answer(204 if found else 404)
    if found is None:
        raise refused(404, "ResourceGroupNotFound", f"Resource group '{name}' could not be found.")
    if request.method == "DELETE":
        emulator.containers.stop()
        for identity in [identity for identity in emulator.resources if identity.startswith(key.lower())]:
            del emulator.resources[identity]
        return answer(
            202,
            b"",
            **{"Location": "https://management.azure.com/operations/done?api-version=2021-04-01", "Retry-After": "0"},
        )
    return answer(200, found)


def done(emulator: Emulator, request: Request) -> Answer:
    """Answer that an operation is over."""
    return answer(200, {"status": "Succeeded"})


def all_resources(emulator: Emulator, request: Request, subscription: str) -> Answer:
    """Return what is in the group that the filter names."""
    group = re.search(r"resourceGroup eq '([^']+)'", request.query.get("$filter", ""))
    key = f"/subscriptions/{subscription}/resourceGroups/{group[1] if group else ''}/".lower()
    found = [
        one for identity, one in emulator.resources.items() if identity.startswith(key) and one["type"].count("/") == 1
    ]
    return answer(
        200, {"value": [{name: one.get(name) for name in ("id", "name", "type", "location", "tags")} for one in found]}
    )


def deploy(emulator: Emulator, request: Request, subscription: str, group: str, name: str) -> Answer:
    """Answer for a deployment: GET, PUT."""
    scope = f"/subscriptions/{subscription}/resourceGroups/{group}"
    identity = f"{scope}/providers/Microsoft.Resources/deployments/{name}"
    if request.method == "GET":
        if identity.lower() not in emulator.deployments:
            raise refused(404, "DeploymentNotFound", f"Deployment '{name}' could not be found.")
        return answer(200, emulator.deployments[identity.lower()])
    template = parsed(emulator, request, scope)
    properties: dict[str, Any] = {"provisioningState": "Succeeded", "operations": []}
    emulator.deployments[identity.lower()] = {"id": identity, "name": name, "properties": properties}
    try:
        for resource in template.resources():
            body = template.made(resource)
            target = {"id": body["id"], "resourceType": body["type"], "resourceName": body["name"]}
            properties["operations"].append({"target": target, "error": None})
            store(emulator, copy.deepcopy(body))
        properties["outputs"] = template.outputs()
    except Exception as error:
        if not hasattr(error, "code"):
            raise
        inner = {"code": error.code, "message": error.message}
        properties["operations"][-1]["error"] = inner
        message = "At least one resource deployment operation failed. Please list deployment operations for details."
        properties |= {
            "provisioningState": "Failed",
            "error": {"code": "DeploymentFailed", "message": message, "details": [inner]},
        }
    emulator.deployments[identity.lower()]["properties"] = properties
    state = f"https://management.azure.com{identity}/operationStatuses/1?api-version=2024-07-01"
    return answer(201, emulator.deployments[identity.lower()], **{"Azure-AsyncOperation": state, "Retry-After": "0"})


def deployments(emulator: Emulator, request: Request, subscription: str, group: str) -> Answer:
    """Return the deployments of a group."""
    key = f"/subscriptions/{subscription}/resourceGroups/{group}/".lower()
    return answer(200, {"value": [one for identity, one in emulator.deployments.items() if identity.startswith(key)]})


def deployment_state(emulator: Emulator, request: Request, subscription: str, group: str, name: str) -> Answer:
    """Return how a deployment ended."""
    identity = f"/subscriptions/{subscription}/resourceGroups/{group}/providers/Microsoft.Resources/deployments/{name}"
    properties = emulator.deployments[identity.lower()]["properties"]
    body = {"status": properties["provisioningState"]}
    return answer(200, body | ({"error": properties["error"]} if "error" in properties else {}))


def deployment_operations(emulator: Emulator, request: Request, subscription: str, group: str, name: str) -> Answer:
    """Return what a deployment did, resource by resource."""
    identity = f"/subscriptions/{subscription}/resourceGroups/{group}/providers/Microsoft.Resources/deployments/{name}"
    operations = []
    for number, operation in enumerate(emulator.deployments[identity.lower()]["properties"]["operations"]):
        failed = operation["error"]
        properties = {"provisioningOperation": "Create", "provisioningState": "Failed" if failed else "Succeeded"}
        properties |= {"targetResource": operation["target"], "statusCode": "Conflict" if failed else "OK"}
        properties |= {"statusMessage": {"error": failed}} if failed else {}
        operations.append(
            {"id": f"{identity}/operations/{number}", "operationId": str(number), "properties": properties}
        )
    return answer(200, {"value": operations})


def validate(emulator: Emulator, request: Request, subscription: str, group: str, name: str) -> Answer:
    """Check a template and its parameters as a deployment would."""
    template = parsed(emulator, request, f"/subscriptions/{subscription}/resourceGroups/{group}")
    return answer(
        200,
        {
            "properties": {
                "provisioningState": "Succeeded",
                "validatedResources": [],
                "parameters": {},
                "outputs": list(template.template.get("outputs", {})) and {},
            }
        },
    )


def what_if(emulator: Emulator, request: Request, subscription: str, group: str, name: str) -> Answer:
    """Say what a deployment would make; the values of secure parameters are never shown."""
    template = parsed(emulator, request, f"/subscriptions/{subscription}/resourceGroups/{group}")
    for name in template.secure:
        template.parameters[name] = "*******" if template.parameters[name] else ""
    changes = []
    for resource in template.resources():
        identity = template.identity(resource)
        old = emulator.resources.get(identity.lower())
        after = {
            "id": identity,
            "type": resource["type"],
            "name": identity.rpartition("/")[2],
            "apiVersion": resource["apiVersion"],
        }
        change = {"resourceId": identity, "changeType": "Modify" if old else "Create", "after": after}
        changes.append(change | ({"before": after, "delta": []} if old else {}))
    return answer(200, {"status": "Succeeded", "properties": {"changes": changes}})


def parsed(emulator: Emulator, request: Request, scope: str) -> Template:
    """Return the template that is sent. Raises RefusedError for what Azure would refuse."""
    if scope.lower() not in emulator.resources:
        raise refused(404, "ResourceGroupNotFound", f"Resource group '{scope.rpartition('/')[2]}' could not be found.")
    if emulator.fails("refused"):
        raise refused(
            403,
            "AuthorizationFailed",
            "The client 'me' does not have authorization to perform action 'Microsoft.Resources/deployments/write'.",
        )
    properties = request.json["properties"]
    if properties.get("mode") != "Incremental":
        raise refused(400, "InvalidDeployment", "Another mode than Incremental deletes what is not in the template.")
    return Template(emulator, scope, properties["template"], properties.get("parameters") or {})


def list_keys(emulator: Emulator, identity: str) -> dict[str, Any]:
    """Return the keys of a storage account, or of a workspace for logs."""
    key = base64.b64encode(hashlib.sha512(identity.lower().encode()).digest()).decode()
    keys = [{"keyName": f"key{number}", "value": key, "permissions": "FULL"} for number in (1, 2)]
    return {"keys": keys, "primarySharedKey": key, "secondarySharedKey": key}


def keys(emulator: Emulator, request: Request, path: str) -> Answer:
    """Answer listKeys and sharedKeys."""
    if path.lower() not in emulator.resources:
        raise refused(404, "ResourceNotFound", f"The Resource '{path}' was not found.")
    return answer(200, list_keys(emulator, path))


def accounts(emulator: Emulator, request: Request, subscription: str) -> Answer:
    """Return the storage accounts."""
    kind = "microsoft.storage/storageaccounts"
    return answer(200, {"value": [one for one in emulator.resources.values() if one["type"].lower() == kind]})


def resource(emulator: Emulator, request: Request, path: str) -> Answer:
    """Answer for any resource: GET, PUT, PATCH, DELETE."""
    found = emulator.resources.get(path.lower())
    if request.method == "PUT":
        kinds = path.split("/providers/")[-1].split("/")
        body = {"id": path, "name": kinds[-1], "type": "/".join([kinds[0], *kinds[1::2]]), **request.json}
        return answer(200 if found else 201, store(emulator, body))
    if found is None:
        raise refused(404, "ResourceNotFound", f"The Resource '{path}' was not found.")
    if request.method == "PATCH":
        return answer(200, store(emulator, merged(found, request.json)))
    if request.method == "DELETE":
        del emulator.resources[path.lower()]
        return answer(200)
    return answer(200, emulator.containers.seen(found))


def merged(old: Any, new: Any) -> Any:
    """Return a JSON merge patch applied."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return copy.deepcopy(new)
    return {key: merged(old.get(key), new[key]) if key in new else old[key] for key in {**old, **new}}


S = r"/subscriptions/([^/]+)"
G = S + r"/resourceGroups/([^/]+)"
D = G + r"/providers/Microsoft.Resources/deployments/([^/]+)"
ROUTES = [
    ("GET HEAD PUT DELETE", G, groups),
    ("GET", r"/operations/done", done),
    ("GET", S + r"/resources", all_resources),
    ("GET", G + r"/providers/Microsoft.Resources/deployments/?", deployments),
    ("GET PUT", D, deploy),
    ("GET", D + r"/operationStatuses/1", deployment_state),
    ("GET", G + r"/deployments/([^/]+)/operations", deployment_operations),
    ("POST", D + r"/validate", validate),
    ("POST", D + r"/whatIf", what_if),
    ("GET", S + r"/providers/Microsoft.Storage/storageAccounts", accounts),
    ("POST", r"(/subscriptions/.*)/(?:listKeys|sharedKeys)", keys),
    ("GET PUT PATCH DELETE", r"(/subscriptions/[^/]+/resourceGroups/[^/]+/providers/.+)", resource),
]
