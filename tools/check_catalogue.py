"""Compare the catalogue with what its sources say today, and show what to edit. Nothing is written.

python tools/check_catalogue.py hub        the models on huggingface.co: commit, gate, licence, config.json, bytes
python tools/check_catalogue.py regions    the regions of Azure's GPUs, as the Container Apps team publishes them
python tools/check_catalogue.py prices     the prices of their parts, as Azure publishes them

`make check-hub`, `make regions` and `make prices` do the same. They need the network; gated models need HF_TOKEN too.
Exit status 1: something differs, or could not be asked.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
HUB = "https://huggingface.co"
REGIONS = "https://raw.githubusercontent.com/microsoft/azure-container-apps/main/aca-getting-started/data/region-features.json"
PRICES = "https://prices.azure.com/api/retail/prices"
WAIT = 30  # seconds for an answer
OLD = 90  # days after which a price is worth reading again
SAME_BYTES = 0.01  # by how much the size of a download may differ: headers, and weights that are counted once
# the catalogue's keys → those of config.json
IN_CONFIG = {
    "architecture": "model_type",
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "attention_heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocabulary": "vocab_size",
    "tie_word_embeddings": "tie_word_embeddings",
    "context": "max_position_embeddings",
}


class SilentError(Exception):
    """A source that did not answer, in one sentence."""


class KeepToken(urllib.request.HTTPRedirectHandler):
    """Follows redirects, and shows the token only to the host that it was meant for."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Return the request for the new address."""
        following = super().redirect_request(req, fp, code, msg, headers, newurl)
        if following and (following.type, following.host) == (req.type, req.host):
            following.unredirected_hdrs.update(req.unredirected_hdrs)
        return following


def get(address: str, token: str | None = None) -> Any:
    """Return the JSON at an address. Raises SilentError."""
    request = urllib.request.Request(address)
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with urllib.request.build_opener(KeepToken).open(request, timeout=WAIT) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:  # HTTPError too
        raise SilentError(f"{address} cannot be read ({error})") from error


# ------------------------------------------------------------------------------------------------------- The models


def check_hub(models: list[dict[str, Any]], address: str) -> Iterator[str]:
    """Yield a line for each fact that the hub states otherwise."""
    same = []
    for model in models:
        if not model["revision"]:  # the demo and a custom model
            continue
        try:
            lines = [*about_model(model, address), *about_onnx(model, address)]
        except SilentError as error:
            lines = [str(error)]
        yield from (f"{model['id']}: {line}" for line in lines)
        if not lines:
            same.append(model["id"])
    if same:
        print(f'As in the catalogue: {", ".join(same)}.\nTheir new date: checked: "{datetime.date.today()}"')


def about_model(model: dict[str, Any], address: str) -> Iterator[str]:
    """Yield what the hub says otherwise about a model. Raises SilentError."""
    token = os.environ.get("HF_TOKEN")
    known = get(f"{address}/api/models/{model['hub_id']}/revision/{model['revision']}?blobs=true", token)
    if known["sha"] != model["revision"]:
        yield f"revision is {model['revision']}, and the hub knows it as {known['sha']}"
    if bool(known["gated"]) != model["gated"]:
        yield f"gated is {str(model['gated']).lower()}, and the hub says {known['gated']}"
    if (licence := licence_of(known)) and not is_licence(model["licence"], licence):
        yield f"licence is {model['licence']}, and the hub says {licence}"
    sizes = {file["rfilename"]: file.get("size") or 0 for file in known["siblings"]}
    if ":" not in model["licence_text"] and model["licence_text"] not in sizes:
        yield f"licence_text is {model['licence_text']}, and the repository has no such file"
    weights = sum(size for name, size in sizes.items() if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors", name))
    if abs(weights / (2 * model["parameters"]) - 1) > SAME_BYTES:
        yield f"parameters is {model['parameters']}, two bytes each, and the repository has {weights} bytes of weights"
    config = get(f"{address}/{model['hub_id']}/resolve/{model['revision']}/config.json", token)
    yield from about_config(model, config)


def licence_of(known: dict[str, Any]) -> str | None:
    """Return the licence that the hub shows for a repository."""
    tags = [tag.removeprefix("license:") for tag in known.get("tags", []) if tag.startswith("license:")]
    return tags[0] if tags else None


def is_licence(ours: str, hubs: str) -> bool:
    """Return whether the hub's licence can be ours; of an own licence it has only a short name."""
    spdx = ("apache-2.0", "mit")
    return ours.lower() == hubs if ours.lower() in spdx else hubs not in spdx


def about_config(model: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    """Yield what config.json says otherwise. What it leaves out is a default of transformers, and not compared."""
    text = config.get("text_config") or {}
    for ours, theirs in IN_CONFIG.items():
        given = config if theirs == "model_type" else config | text
        if given.get(theirs) is None or (model["architecture"] == "lfm2" and ours == "intermediate_size"):
            continue  # LFM2 has the width before two thirds of it are taken
        if given[theirs] != model[ours]:
            yield f"{ours} is {model[ours]}, and config.json says {given[theirs]}"
    for key, ours in (model["config"] or {}).items():
        if (theirs := (config | text).get(key)) is not None and theirs != ours:
            yield f"config.{key} is {ours}, and config.json says {theirs}"


def about_onnx(model: dict[str, Any], address: str) -> Iterator[str]:
    """Yield what the hub says otherwise about a model's ready-made ONNX folders. Raises SilentError."""
    if not (ready := model["onnx"]):
        return
    known = get(f"{address}/api/models/{ready['hub_id']}/revision/{ready['revision'] or 'main'}?blobs=true")
    if known["sha"] != ready["revision"]:
        yield f"onnx.revision is {ready['revision'] or 'null'}, and the hub knows it as {known['sha']}"
    for one in ready["folders"]:
        folder, size = one["folder"], 0
        size = sum(file.get("size") or 0 for file in known["siblings"] if file["rfilename"].startswith(f"{folder}/"))
        if not size:
            yield f"onnx has the folder {folder}, and the repository does not"
        elif one["gib"] != (gib := round(size / 2**30, 2)):
            yield f"gib of {folder} is {one['gib'] or 'null'}, and the hub says {gib:.2f}"


# --------------------------------------------------------------------------------------------------- Azure's regions


def check_regions(gpus: list[dict[str, Any]], address: str) -> Iterator[str]:
    """Yield a line for each region that the list has or lacks otherwise. Raises SilentError."""
    published = get(address)
    features = {feature["key"] for feature in published["features"]}
    print(f"As of {published['generated_at'][:10]}:")
    for gpu in gpus:
        key = next((name for name in names_of(gpu) if name in features), None)
        if key is None:
            yield f"{gpu['id']}: the list has no {gpu['profile']}"
            continue
        # null: Azure did not answer for that region
        said = {region["slug"]: region["features"].get(key) for region in published["regions"]}
        new = sorted(slug for slug, offered in said.items() if offered and slug not in gpu["regions"])
        gone = sorted(slug for slug in gpu["regions"] if said.get(slug) is False)
        yield from (f"{gpu['id']}: add {slug} to regions" for slug in new)
        yield from (f"{gpu['id']}: remove {slug} from regions" for slug in gone)


def names_of(gpu: dict[str, Any]) -> tuple[str, str]:
    """Return the names of a profile in the list: each profile's own, or, since 2026, one for each kind of GPU."""
    kind = "Dedicated-GPU" if gpu["kind"] == "dedicated" else f"Consumption-GPU-{gpu['profile'].rpartition('-')[2]}"
    return f"wp:{gpu['profile']}", f"wp:{kind}"


# ---------------------------------------------------------------------------------------------------- Azure's prices


def check_prices(gpus: list[dict[str, Any]], address: str) -> Iterator[str]:
    """Yield a line for each price that differs. Raises SilentError."""
    today = datetime.date.today()
    for gpu in gpus:
        if not (price := gpu["price"]):
            continue
        found = dict(meters(address, price["region"]))
        for part in ("gpu", "vcpu", "gib"):
            meter, ours = price[part]["meter"], price[part]["usd_per_second"]
            if meter not in found:
                yield f"{gpu['id']}: {price['region']} has no meter {meter!r}"
            elif abs(found[meter] - ours) > 1e-9:
                yield f"{gpu['id']}: price.{part}.usd_per_second is {ours:.6f}, and Azure says {found[meter]:.6f}"
        days = (today - datetime.date.fromisoformat(price["date"])).days
        old = ", which users are told" if days > OLD else ""
        print(f'{gpu["id"]}: read {days} days ago{old}. The new date: date: "{today}"')


def meters(address: str, region: str) -> Iterator[tuple[str, float]]:
    """Yield the meters of Container Apps in a region, with the price of a second in US dollars. Raises SilentError."""
    wanted = f"serviceName eq 'Azure Container Apps' and armRegionName eq '{region}' and priceType eq 'Consumption'"
    page: str | None = f"{address}?{urllib.parse.urlencode({'$filter': wanted})}"
    while page:
        answer = get(page)
        for item in answer["Items"]:
            if item["retailPrice"]:  # the free share of a month is an item of its own, for nothing
                seconds = 3600 if "Hour" in item["unitOfMeasure"] else 1
                yield item["meterName"], item["retailPrice"] / seconds
        page = answer.get("NextPageLink")


# ------------------------------------------------------------------------------------------------------------- Main

CHECKS = {
    "hub": (check_hub, "models.yml", "models", HUB),
    "regions": (check_regions, "azure_gpus.yml", "gpus", REGIONS),
    "prices": (check_prices, "azure_gpus.yml", "gpus", PRICES),
}


def main() -> int:
    """Print what differs, and what to edit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=CHECKS)
    parser.add_argument("--address", help="another address of the source")
    arguments = parser.parse_args()
    check, name, key, address = CHECKS[arguments.what]
    entries = yaml.safe_load((ROOT / "catalog" / name).read_text(encoding="utf-8"))[key]
    try:
        lines = list(check(entries, arguments.address or address))
    except SilentError as error:
        print(f"error: {error}: check the connection, then run this again.", file=sys.stderr)
        return 1
    if not lines:
        print(f"catalog/{name} is up to date.")
        return 0
    print("\n".join(lines))
    print(f"Edit catalog/{name}, run `make docs`, and commit both.")
    return 1


if __name__ == "__main__":
    sys.exit(main())
