"""Render a workspace for every model of the catalogue: render_every_model.py FOLDER. Runs where copier is installed."""

import shutil
import sys
import tempfile
from pathlib import Path

import copier
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
PARTS = ("copier.yml", "catalog", "hooks", "template")


def main(folder: Path) -> None:
    # a plain folder renders the working tree as it is, and faster than a git repository
    with tempfile.TemporaryDirectory() as source:
        for part in PARTS:
            copy = shutil.copytree if (REPOSITORY / part).is_dir() else shutil.copy
            copy(REPOSITORY / part, Path(source) / part)
        text = (REPOSITORY / "catalog" / "models.yml").read_text(encoding="utf-8")
        for model in yaml.safe_load(text)["models"]:
            data = {"model": model["id"], "environment": "none", "project_name": "every-model"}
            if model["id"] == "custom":
                data["custom_model_id"] = "someone/some-model"
            copier.run_copy(source, folder / model["id"], data=data, defaults=True, quiet=True, skip_tasks=True)
        for method, device in (("qlora", "gpu"), ("loha", "cpu")):
            name = f"demo-{method}"
            data = {"device": device, "method": method, "environment": "none", "project_name": name}
            copier.run_copy(source, folder / name, data=data, defaults=True, quiet=True, skip_tasks=True)


main(Path(sys.argv[1]))
