"""The API does what its description says: requests drawn from it get answers and errors that it names."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY, inference_of
from served import Here, served

PROGRAM = REPOSITORY / ".cache" / "schemathesis" / "bin" / "st"
SECONDS = os.environ.get("DESCRIPTION_SECONDS", "8")
# A template may refuse an order of turns that the description allows; a field that is null counts as missing; and pages
# of other sites are told from programs by headers that the description does not have.
UNFIT = "positive_data_acceptance,negative_data_rejection,missing_required_header"


@pytest.mark.filterwarnings("ignore:Duplicate Operation ID")  # GET and HEAD
def test_the_api_answers_as_its_description_says(workspace: Path, tmp_path: Path) -> None:
    if not PROGRAM.is_file():
        pytest.skip("schemathesis is not in .cache: `make test` puts it there")
    from training.tiny_model import build_demo

    build_demo()
    with inference_of(workspace):
        from fastapi.openapi.utils import get_openapi

        from api import router
        from load_engine import load

        description = get_openapi(title="The API of a workspace", version="1", routes=router.routes)
        (tmp_path / "openapi.json").write_text(json.dumps(description), encoding="utf-8")
        with served(lambda: Here(load(baseonly=True, root=workspace))) as (address, _):
            command = [PROGRAM, "run", "openapi.json", "--url", address, "--exclude-checks", UNFIT, "--seed", "1"]
            command += ["--max-time", SECONDS, "--generation-deterministic", "--no-color"]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    tested = re.search(r"(\d+) generated", done.stdout)
    assert tested and int(tested[1]) > 100, done.stdout
