"""The catalogue: every entry is complete and consistent, and every chat template works for training and chat."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from jinja2 import Environment, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

CATALOG = Path(__file__).resolve().parents[2] / "catalog"
sys.path.append(str(CATALOG.parent / "template" / "finetuning"))
from planning.architecture import OVERFLOW_IN_FLOAT16, Shape  # noqa: E402 - arithmetic alone, without libraries

ORIGINAL = {
    "phi-3-mini-4k-instruct",
    "phi-2",
    "phi-1_5",
    "llama-2-7b",
    "llama-3-8b",
    "mistral-7b-v0.1",
    "mistral-7b-instruct-v0.2",
    "zephyr-7b-beta",
}
LAYERS = {  # the linear layers of a block in transformers, by architecture
    "phi": {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"},
    "phi3": {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"},
    "lfm2": {"q_proj", "k_proj", "v_proj", "out_proj", "in_proj", "w1", "w2", "w3"},
}
SEPARATE_LAYERS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LAYERS["qwen3_5"] = SEPARATE_LAYERS | {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}
LAYERS["gemma4"] = SEPARATE_LAYERS | {"per_layer_input_gate", "per_layer_projection"}

Id = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
HubId = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")]
Revision = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Url = Annotated[str, Field(pattern=r"^https://[^\s]+$")]
Folder = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+(/[A-Za-z0-9._-]+)*$")]
Date = Annotated[str, Field(pattern=r"^20\d\d-[01]\d-[0-3]\d$")]
Region = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]+$")]


class Entry(BaseModel):
    """Whatever the catalogue holds: no key is unknown, none is left out, and 4 is not "4"."""

    model_config = ConfigDict(extra="forbid", strict=True)


class OnnxFolder(Entry):
    """A ready-made chat model for one kind of device."""

    folder: Folder
    providers: Annotated[list[Literal["cuda", "dml", "cpu"]], Field(min_length=1)]
    gib: PositiveFloat | None


class Onnx(Entry):
    """The repository of ready-made chat models."""

    hub_id: HubId
    revision: Revision | None
    proven: list[Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+$")]]
    folders: Annotated[list[OnnxFolder], Field(min_length=1)]


class Model(Entry):
    """A model that the question `model` offers."""

    id: Id
    name: Annotated[str, Field(min_length=1, max_length=40)]
    hub_id: HubId | None
    revision: Revision | None
    licence: str | None
    licence_text: Url | Annotated[str, Field(pattern=r"^LICENSE(\.\w+)?$")] | None
    gated: bool | None
    parameters: PositiveInt | None
    text_parameters: PositiveInt | None
    layers: PositiveInt | None
    hidden_size: PositiveInt | None
    intermediate_size: PositiveInt | None
    attention_heads: PositiveInt | None
    key_value_heads: PositiveInt | None
    head_dim: PositiveInt | None
    vocabulary: PositiveInt | None
    tie_word_embeddings: bool | None
    context: PositiveInt | None
    architecture: str
    config: dict[str, int | bool | list[int] | list[str]] | None
    float16: bool | None
    target_modules: list[str] | None
    chat_template: str
    instruct: bool | None
    onnx: Onnx | None
    deprecated: bool
    replaced_by: Id | None
    checked: Date | None


class SpecialTokens(Entry):
    """What a tokenizer must know as whole tokens."""

    bos_token: str | None
    eos_token: str
    pad_token: str | None
    additional: list[str]


class Family(Entry):
    """A chat template and its marks."""

    special_tokens: SpecialTokens
    end_of_turn: str
    source: Url | None
    template: str


class Unit(Entry):
    """What a second of one GPU, one vCPU or one GiB of memory costs."""

    meter: str
    usd_per_second: PositiveFloat


class Price(Entry):
    """The prices of the parts of a profile."""

    region: Region
    date: Date
    source: Url
    gpu: Unit
    vcpu: Unit
    gib: Unit


class Gpu(Entry):
    """A GPU that Azure rents."""

    id: Id
    name: str
    profile: str
    kind: Literal["serverless", "dedicated"]
    vcpu: PositiveInt
    memory_gib: PositiveInt
    gpus: PositiveInt
    gpu_memory_gib: PositiveFloat
    tflops: PositiveInt
    tflops_float32: PositiveFloat
    tflops_source: Url
    bf16: bool
    regions: Annotated[list[Region], Field(min_length=1)] | None
    price: Price | None

    @model_validator(mode="after")
    def profile_fits_kind(self) -> Gpu:
        """A serverless profile has one GPU and a name of its own."""
        serverless = self.profile.startswith("Consumption-GPU-")
        if serverless != (self.kind == "serverless") or (serverless and self.gpus != 1):
            raise ValueError(f"{self.profile} with {self.gpus} GPUs is not {self.kind}")
        return self


def read(name: str) -> Any:
    """Read a file of the catalogue."""
    return yaml.safe_load((CATALOG / name).read_text(encoding="utf-8"))


MODELS = [Model.model_validate(entry) for entry in read("models.yml")["models"]]
FROM_HUB = [model for model in MODELS if model.id not in ("demo", "custom")]
FAMILIES = {name: Family.model_validate(entry) for name, entry in read("chat_templates.yml")["families"].items()}
AZURE = read("azure_gpus.yml")
GPUS = [Gpu.model_validate(entry) for entry in AZURE["gpus"]]

each_model = pytest.mark.parametrize("model", MODELS, ids=lambda model: model.id)
each_hub_model = pytest.mark.parametrize("model", FROM_HUB, ids=lambda model: model.id)
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


class Generation(Extension):
    """The tag by which a template marks what the model must learn; here it becomes «…», to be seen in the text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own spelling)

    def parse(self, parser: Parser) -> nodes.Node:
        """Put the marks around the text between the tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"«{caller()}»"


def render_marked(family: Family, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """Render a conversation as transformers does, with «» around the part to learn."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation])
    tokens = {key: value for key, value in family.special_tokens.model_dump(exclude={"additional"}).items() if value}
    template = environment.from_string(family.template)
    return template.render(messages=messages, add_generation_prompt=add_generation_prompt, **tokens)


def render(family: Family, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    """Render a conversation as transformers does."""
    return re.sub("[«»]", "", render_marked(family, messages, add_generation_prompt))


SYSTEM = {"role": "system", "content": "Answer in one word.\n"}
TURNS = [
    {"role": "user", "content": " What a day! "},
    {"role": "assistant", "content": "joy"},
    {"role": "user", "content": "It is dark.\n\nVery dark."},
    {"role": "assistant", "content": " fear\n"},
]


def test_the_files_can_be_included_in_the_questions_and_read_the_same() -> None:
    lines = (CATALOG / "chat_templates.yml").read_text(encoding="utf-8").splitlines()
    assert (lines[0], lines[-1]) == ("# {% raw %}", "# {% endraw %}")
    for path in CATALOG.glob("*.yml"):
        text = path.read_text(encoding="utf-8")
        assert yaml.safe_load(Environment().from_string(text).render()) == yaml.safe_load(text), path.name
        # The questions pass the catalogue on as JSON, which knows no dates.
        assert json.loads(json.dumps(yaml.safe_load(text))) == yaml.safe_load(text), path.name


def test_model_ids_are_unique() -> None:
    ids = [model.id for model in MODELS]
    assert sorted(set(ids)) == sorted(ids)


def test_the_demo_comes_first_and_a_custom_model_last() -> None:
    assert (MODELS[0].id, MODELS[-1].id) == ("demo", "custom")


def test_the_eight_models_of_the_original_are_there() -> None:
    assert {model.id for model in MODELS} >= ORIGINAL


@each_hub_model
def test_a_model_of_the_hub_has_every_fact(model: Model) -> None:
    may_be_missing = {"text_parameters", "config", "onnx", "replaced_by"}
    missing = {key for key, value in model if value is None} - may_be_missing
    assert not missing


@each_model
def test_the_chat_template_of_a_model_exists(model: Model) -> None:
    assert model.chat_template in FAMILIES
    if model.instruct is not None:
        assert model.instruct == (model.chat_template != "plain")


@each_model
def test_the_target_modules_are_those_of_the_architecture(model: Model) -> None:
    if model.target_modules is not None:
        assert set(model.target_modules) == LAYERS.get(model.architecture, SEPARATE_LAYERS)


@each_model
def test_the_shape_of_a_model_gives_its_parameters(model: Model) -> None:
    if model.parameters is None or model.config:
        return  # the test below counts the layers of several kinds
    assert model.vocabulary and model.hidden_size and model.layers and model.intermediate_size
    assert model.attention_heads and model.key_value_heads and model.head_dim
    assert model.attention_heads % model.key_value_heads == 0
    width, heads = model.hidden_size, 2 * model.attention_heads + 2 * model.key_value_heads
    mlp = (2 if model.architecture == "phi" else 3) * width * model.intermediate_size
    blocks = model.layers * (mlp + width * heads * model.head_dim)
    embeddings = (1 if model.tie_word_embeddings else 2) * model.vocabulary * width
    # the rest are norms and biases
    assert blocks + embeddings == pytest.approx(model.parameters, rel=0.0005, abs=1000)


@each_model
def test_the_estimate_counts_the_parameters_of_the_catalogue(model: Model) -> None:
    if model.parameters:
        shape = Shape.of(model.model_dump())
        assert shape.parameters == (model.text_parameters or model.parameters)
        assert model.target_modules and {name for block in shape.blocks for name in block.linear} == {
            *model.target_modules
        }
        assert sum(block.count for block in shape.blocks) == model.layers


@each_hub_model
def test_a_part_of_a_model_has_fewer_weights_than_the_whole(model: Model) -> None:
    assert model.parameters
    assert model.text_parameters is None or model.text_parameters < model.parameters


@each_hub_model
def test_the_precision_of_a_model_is_that_of_its_architecture(model: Model) -> None:
    assert model.float16 == (model.architecture not in OVERFLOW_IN_FLOAT16)


@each_model
def test_a_kind_of_device_has_at_most_one_ready_made_model(model: Model) -> None:
    providers = [name for one in model.onnx.folders for name in one.providers] if model.onnx else []
    assert len(set(providers)) == len(providers)


@each_model
def test_a_deprecated_model_names_its_successor(model: Model) -> None:
    if model.deprecated:
        assert model.replaced_by in {other.id for other in MODELS if not other.deprecated}
    else:
        assert model.replaced_by is None


@each_family
def test_a_template_shows_every_turn_in_order(family: Family) -> None:
    text = render(family, [SYSTEM, *TURNS])
    places = [text.index(turn["content"]) for turn in [SYSTEM, *TURNS]]
    assert places == sorted(places)


@each_family
@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["without system", "with system"])
def test_a_question_reads_the_same_whether_its_answer_follows_or_not(family: Family, system: list[Any]) -> None:
    messages = [*system, *TURNS]
    whole = render(family, messages)
    for i, turn in enumerate(messages):
        if turn["role"] == "assistant":
            question = render(family, messages[:i], add_generation_prompt=True)
            answered = render(family, messages[: i + 1])
            assert whole.startswith(question)
            assert answered.startswith(question)
            assert whole.startswith(answered)


@each_family
def test_the_learned_part_is_the_answer_and_its_end_of_turn(family: Family) -> None:
    learnt = re.findall("«(.*?)»", render_marked(family, [SYSTEM, *TURNS]), flags=re.DOTALL)
    answers = [turn["content"] for turn in TURNS if turn["role"] == "assistant"]
    assert len(learnt) == len(answers)
    for text, answer in zip(learnt, answers, strict=True):
        assert text.endswith(family.end_of_turn)
        assert text.removesuffix(family.end_of_turn).strip() == answer.strip()
        assert answer in text


@each_family
def test_tool_results_are_read_and_never_learned(family: Family) -> None:
    turns = [TURNS[0], {"role": "assistant", "content": "call()"}, {"role": "tool", "content": "22 degrees"}, TURNS[1]]
    text = render_marked(family, turns)
    learnt = re.findall("«(.*?)»", text, flags=re.DOTALL)
    assert len(learnt) == 2
    assert "22 degrees" in text
    assert "22 degrees" not in "".join(learnt)


@each_family
def test_a_prompt_ends_exactly_where_the_learned_part_begins(family: Family) -> None:
    prompt = render(family, [SYSTEM, *TURNS[:1]], add_generation_prompt=True)
    marked = render_marked(family, [SYSTEM, *TURNS[:2]])
    assert marked[: marked.index("«")] == prompt


@each_family
def test_a_text_begins_with_the_first_token_where_the_family_has_one_in_its_template(family: Family) -> None:
    text = render(family, [SYSTEM, *TURNS])
    bos = family.special_tokens.bos_token
    if bos and "bos_token" in family.template:
        assert text.startswith(bos)
    elif bos:
        assert bos not in text


@each_family
def test_every_mark_in_the_text_is_a_special_token(family: Family) -> None:
    tokens = family.special_tokens
    known = {tokens.bos_token, tokens.eos_token, tokens.pad_token, *tokens.additional}
    assert family.end_of_turn in known
    marks = set(re.findall(r"</?\|?[a-z_]+\|?>|\[/?INST\]|<</?SYS>>", render(family, [SYSTEM, *TURNS])))
    assert marks <= known


def test_the_plain_family_needs_only_an_end_token() -> None:
    plain = FAMILIES["plain"]
    assert plain.special_tokens.bos_token is None
    assert plain.special_tokens.additional == []
    assert plain.end_of_turn == plain.special_tokens.eos_token


def test_the_plain_family_begins_as_the_tokenizer_was_trained_to() -> None:
    plain = FAMILIES["plain"].model_copy(deep=True)
    plain.special_tokens.bos_token = "<s>"
    assert render(plain, TURNS[:1]) == "<s>" + render(FAMILIES["plain"], TURNS[:1])


def test_gpu_ids_are_unique() -> None:
    assert len({gpu.id for gpu in GPUS}) == len(GPUS)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.id)
def test_a_gpu_shows_less_memory_than_its_name_says(gpu: Gpu) -> None:
    found = re.search(r"(\d+) GB", gpu.name)
    assert found and 0.9 * int(found[1]) < gpu.gpu_memory_gib * 2**30 / 10**9 < 1.1 * int(found[1])
    assert gpu.gpu_memory_gib < int(found[1])
    assert gpu.regions == sorted(set(gpu.regions or []))


def test_an_hour_costs_the_sum_of_its_parts() -> None:
    sums = {
        gpu.id: 3600
        * (
            gpu.gpus * gpu.price.gpu.usd_per_second
            + gpu.vcpu * gpu.price.vcpu.usd_per_second
            + gpu.memory_gib * gpu.price.gib.usd_per_second
        )
        for gpu in GPUS
        if gpu.price
    }
    assert {name: round(hour, 4) for name, hour in sums.items()} == {"serverless-t4": 1.5588, "serverless-a100": 6.354}
    page = (CATALOG.parent / "docs/reference/models.md").read_text(encoding="utf-8")
    assert all(f"[{hour:.2f}](https://prices.azure.com/api/retail/prices)" in page for hour in sums.values())
