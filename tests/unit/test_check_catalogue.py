"""tools/check_catalogue.py with a hub and Azure's lists on this machine: it says what to edit, and writes nothing."""

from __future__ import annotations

import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml
from hub import SUNDRIES, Hub

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tools"))
import check_catalogue  # noqa: E402

GPUS = yaml.safe_load((ROOT / "catalog/azure_gpus.yml").read_text(encoding="utf-8"))["gpus"]
COMMIT, NEWER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"
CONFIG = {
    "model_type": "qwen3_5",
    "text_config": {"num_hidden_layers": 4, "hidden_size": 64, "full_attention_interval": 4},
}
MODEL: dict[str, Any] = {
    "id": "small",
    "hub_id": "me/small",
    "revision": COMMIT,
    "licence": "Apache-2.0",
    "licence_text": "LICENSE",
    "gated": False,
    "parameters": 1000,
    "architecture": "qwen3_5",
    "layers": 4,
    "hidden_size": 64,
    **dict.fromkeys(check_catalogue.IN_CONFIG.keys() - {"architecture", "layers", "hidden_size"}),
    "config": {"full_attention_interval": 4, "conv_L_cache": 3},
    "onnx": {"hub_id": "me/onnx", "revision": COMMIT, "folders": [{"folder": "cpu/int4", "gib": 0.01}]},
}
CUSTOM = {"id": "custom", "revision": None}


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        files = SUNDRIES | {"config.json": json.dumps(CONFIG).encode(), "model.safetensors": bytes(2008)}
        hub.add("me/small", files, commit=COMMIT)
        hub.repositories["model", "me/small"].tags = ("text-generation", "license:apache-2.0")
        hub.add("me/onnx", {"cpu/int4/model.onnx.data": bytes(10_500_000)}, commit=COMMIT)
        yield hub


def asked(hub: Hub, **changes: Any) -> list[str]:
    return list(check_catalogue.check_hub([CUSTOM, MODEL | changes], hub.url))


def test_a_model_that_is_as_the_hub_says_gets_a_new_date(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert asked(hub) == []
    said = capsys.readouterr().out
    assert said.startswith('As in the catalogue: small.\nTheir new date: checked: "2')


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"gated": True}, "gated is true, and the hub says False"),
        ({"licence": "MIT"}, "licence is MIT, and the hub says apache-2.0"),
        ({"licence": "Own Terms"}, "licence is Own Terms, and the hub says apache-2.0"),
        ({"licence_text": "LICENSE.txt"}, "licence_text is LICENSE.txt, and the repository has no such file"),
        ({"parameters": 1100}, "parameters is 1100, two bytes each, and the repository has 2008 bytes of weights"),
        ({"layers": 5}, "layers is 5, and config.json says 4"),
        ({"architecture": "qwen3"}, "architecture is qwen3, and config.json says qwen3_5"),
        ({"config": {"full_attention_interval": 6}}, "config.full_attention_interval is 6, and config.json says 4"),
        (
            {"onnx": MODEL["onnx"] | {"folders": [{"folder": "cpu/int4", "gib": None}, {"folder": "gpu", "gib": 1}]}},
            "gib of cpu/int4 is null, and the hub says 0.01",
        ),
        ({"onnx": MODEL["onnx"] | {"revision": None}}, f"onnx.revision is null, and the hub knows it as {COMMIT}"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_the_hub_says_otherwise_is_a_line(hub: Hub, changes: dict[str, Any], line: str) -> None:
    lines = asked(hub, **changes)
    assert lines[0] == f"small: {line}"
    rest = ["small: onnx has the folder gpu, and the repository does not"] if "gib of" in line else []
    assert lines[1:] == rest


def test_a_gated_model_is_asked_with_the_token_that_only_the_hub_sees(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["model", "me/small"].gated = True
    (line,) = asked(hub, gated=True)
    assert "config.json cannot be read (HTTP Error 401" in line
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    assert asked(hub, gated=True) == []
    hub.renamed["me/small"] = "me/large"
    hub.add(
        "me/large",
        {"config.json": json.dumps(CONFIG).encode(), **SUNDRIES, "model.safetensors": bytes(2008)},
        commit=COMMIT,
    )
    hub.repositories["model", "me/large"].gated = True
    hub.tokens.clear()
    assert asked(hub, gated=True) == []  # a redirect to the same host
    assert hub.tokens == {"Bearer hf_good", ""}  # the ONNX folders are open
    assert hub.cdn_tokens <= {""}


def test_a_model_that_is_gone_is_a_line_and_the_others_are_asked(hub: Hub) -> None:
    lines = list(
        check_catalogue.check_hub([MODEL | {"id": "gone", "hub_id": "me/gone"}, MODEL | {"layers": 5}], hub.url)
    )
    assert [line.partition(":")[0] for line in lines] == ["gone", "small"]


# ---- Azure


class Lists(http.server.BaseHTTPRequestHandler):
    """Answers with what a test puts there, by path; of prices, one item a page."""

    answers: dict[str, Any] = {}  # noqa: RUF012 (shared by the requests)
    filters: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        answer = self.answers[address.path]
        if isinstance(answer, list):
            number = int(query.get("$skip", ["0"])[0])
            self.filters.extend(query.get("$filter", []))
            more = f"http://{self.headers['Host']}{address.path}?$skip={number + 1}"
            answer = {"Items": answer[number : number + 1], "NextPageLink": more if number + 1 < len(answer) else None}
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def azure() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Lists) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        Lists.filters.clear()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def features(keys: dict[str, str], changes: dict[tuple[str, str], bool | None]) -> dict[str, Any]:
    """Return Azure's list with the regions of the catalogue; `keys` are the names of its profiles there."""
    regions = sorted({region for gpu in GPUS for region in gpu["regions"]} | {"norwayeast"})
    offered = {
        slug: {keys[gpu["profile"]]: slug in gpu["regions"] for gpu in GPUS if gpu["profile"] in keys}
        for slug in regions
    }
    for (slug, profile), value in changes.items():
        offered[slug][keys[profile]] = value
    return {
        "generated_at": "2026-04-28T06:50:11Z",
        "features": [{"key": key} for key in set(keys.values())],
        "regions": [{"slug": slug, "features": offered[slug]} for slug in regions],
    }


EACH = {gpu["profile"]: f"wp:{gpu['profile']}" for gpu in GPUS}
TOGETHER = {
    "Consumption-GPU-NC8as-T4": "wp:Consumption-GPU-T4",
    "Consumption-GPU-NC24-A100": "wp:Consumption-GPU-A100",
    **dict.fromkeys(("NC24-A100", "NC48-A100", "NC96-A100"), "wp:Dedicated-GPU"),
}


@pytest.mark.parametrize("keys", [EACH, TOGETHER], ids=["a name for each profile", "a name for each kind"])
def test_the_regions_are_compared_with_both_forms_of_the_list(azure: str, keys: dict[str, str]) -> None:
    t4 = "Consumption-GPU-NC8as-T4"
    Lists.answers = {"/regions": features(keys, {})}
    assert list(check_catalogue.check_regions(GPUS, f"{azure}/regions")) == []
    changes = {("norwayeast", t4): True, ("southindia", t4): False, ("westus", t4): None}
    Lists.answers = {"/regions": features(keys, changes)}
    assert list(check_catalogue.check_regions(GPUS, f"{azure}/regions")) == [
        "serverless-t4: add norwayeast to regions",
        "serverless-t4: remove southindia from regions",
    ]


def test_a_profile_that_the_list_does_not_name_is_a_line(azure: str) -> None:
    Lists.answers = {"/regions": features({"NC24-A100": "wp:NC24-A100"}, {})}
    lines = list(check_catalogue.check_regions(GPUS, f"{azure}/regions"))
    assert lines[0] == "serverless-t4: the list has no Consumption-GPU-NC8as-T4" and len(lines) == 4


def items(**prices: float) -> list[dict[str, Any]]:
    """Return the meters of a region, the free share of a month first, a second or an hour each."""
    names = {"t4": "Standard NC T4 v3 GPU Usage", "a100": "Standard NC A100 v4 GPU Usage"}
    names |= {"vcpu": "Standard vCPU Active Usage", "gib": "Standard Memory Active Usage"}
    free = [{"meterName": names["vcpu"], "retailPrice": 0.0, "unitOfMeasure": "1 Second"}]
    each = {"t4": 0.000073, "a100": 0.000529, "vcpu": 0.000024, "gib": 0.000003} | prices
    rows = [
        {"meterName": names[name], "retailPrice": price, "unitOfMeasure": "1 Second"} for name, price in each.items()
    ]
    rows[-1] |= {"retailPrice": rows[-1]["retailPrice"] * 3600, "unitOfMeasure": "1 GiB Hour"}
    return free + rows


def test_the_prices_are_those_of_the_meters_whatever_their_unit_and_page(
    azure: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Lists.answers = {"/prices": items()}
    assert list(check_catalogue.check_prices(GPUS, f"{azure}/prices")) == []
    assert "armRegionName eq 'eastus'" in Lists.filters[0]
    assert capsys.readouterr().out.count('The new date: date: "2') == 2
    Lists.answers = {"/prices": items(t4=0.00008)}
    assert list(check_catalogue.check_prices(GPUS, f"{azure}/prices")) == [
        "serverless-t4: price.gpu.usd_per_second is 0.000073, and Azure says 0.000080"
    ]


def test_a_price_that_is_gone_is_a_line(azure: str) -> None:
    Lists.answers = {"/prices": [item for item in items() if "A100" not in item["meterName"]]}
    (line,) = check_catalogue.check_prices(GPUS, f"{azure}/prices")
    assert line == "serverless-a100: eastus has no meter 'Standard NC A100 v4 GPU Usage'"


def run(what: str, address: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools/check_catalogue.py"), what, "--address", address]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_says_what_to_edit_and_writes_nothing(azure: str) -> None:
    before = {path: path.read_bytes() for path in (ROOT / "catalog").iterdir()}
    Lists.answers = {"/regions": features(EACH, {("norwayeast", "NC24-A100"): True})}
    done = run("regions", f"{azure}/regions")
    assert done.returncode == 1
    assert done.stdout == (
        "As of 2026-04-28:\ndedicated-nc24-a100: add norwayeast to regions\n"
        "Edit catalog/azure_gpus.yml, run `make docs`, and commit both.\n"
    )
    assert {path: path.read_bytes() for path in (ROOT / "catalog").iterdir()} == before
    Lists.answers = {"/regions": features(EACH, {})}
    done = run("regions", f"{azure}/regions")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "catalog/azure_gpus.yml is up to date.")


def test_a_source_that_does_not_answer_is_one_sentence() -> None:
    done = run("prices", "http://127.0.0.1:1/prices")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: http://127.0.0.1:1/prices?") and done.stderr.count("\n") == 1
    assert done.stderr.endswith("check the connection, then run this again.\n")
