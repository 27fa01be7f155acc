"""The model card of the adapter: README.md in its folder, in the format of the Hugging Face hub.

The text is model_card.md, a Jinja template that you can change; the metadata is made here. The card contains no row of
the data and no path of this machine, so it can be published as it is.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from preparing.workspace import MODEL_FACTS
from reporting.report import metrics, plain
from reporting.run_record import RunRecord, published

TEMPLATE = Path(__file__).with_name("model_card.md")
LICENCES = {  # of the licences of the catalogue, those that the hub has a name for
    "MIT": "mit",
    "Apache-2.0": "apache-2.0",
    "Llama 2 Community License Agreement": "llama2",
    "Meta Llama 3 Community License Agreement": "llama3",
    "Llama 3.1 Community License Agreement": "llama3.1",
    "Llama 3.2 Community License Agreement": "llama3.2",
    "Gemma Terms of Use": "gemma",
}


def write_model_card(run: RunRecord, folder: Path) -> Path:
    """Write README.md into the adapter's folder and return its path. `run` is the content of run.json."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, finalize=plain
    )
    environment.filters["python"] = repr  # a value as written in Python code
    card = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        run=run,
        name=name(run),
        base_model=published(run["base_model"]),
        elsewhere=Path(run["base_model"]).is_absolute(),
        source=published(run["data"]["source"]),
        metrics=metrics(run),
        licence=licence(run),
        front_matter=front_matter(run),
    )
    unfinished = folder / ".README.md.new"
    unfinished.write_text(card, encoding="utf-8")
    return unfinished.replace(folder / "README.md")


def front_matter(run: RunRecord) -> str:
    """Return the card's metadata as YAML, see https://huggingface.co/docs/hub/model-cards."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset = run["config"]["rows"]["dataset_name"]
    method = run["method"]
    after = run["metrics"]["after"]
    measured = [("eval_loss", "loss", "Loss"), ("perplexity", "perplexity", "Perplexity")]
    if run["examples"]:
        measured.insert(0, ("accuracy", "exact_match", "Exact answers"))
    card = ModelCardData(
        # a local folder is not a model on the hub
        base_model=run["base_model"] if run["revision"] else None,
        library_name="peft",
        pipeline_tag="text-generation",
        tags=["lora", "olive", "copier-finetune"] if method == "lora" else ["lora", method, "olive", "copier-finetune"],
        datasets=[dataset] if dataset else None,
        model_name=name(run),
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset or "private",
                dataset_name="rows held out of the training",
                metric_type=metric,
                metric_name=title,
                metric_value=after[key],
            )
            for key, metric, title in measured
        ],
        **{f"license{key}": value for key, value in licence(run).items()},
    )
    return str(card.to_yaml())


def name(run: RunRecord) -> str:
    """Name the adapter after its base model and method."""
    return f"{Path(run['base_model']).name}-{run['method']}"


def licence(run: RunRecord) -> dict[str, str]:
    """Return the base model's licence as the hub expects it, by the suffix of `license`: "", "_name" and "_link".

    Empty if it is not known: setup/model.yaml may describe another model than the one that was trained.
    """
    facts = yaml.safe_load(MODEL_FACTS.read_text(encoding="utf-8"))
    described = facts["source"] or "models/demo"
    if not facts["licence"] or f"/{run['base_model']}/" not in f"/{described}/":
        return {}
    known = LICENCES.get(facts["licence"])
    if known:
        return {"": known}
    return {"": "other", "_name": facts["licence"], "_link": facts["licence_url"]}
