"""Draw docs/pictures/run.svg: what a terminal shows of a run. Run it with the Python of a workspace, on that workspace:

demo/.venv/bin/python docs/make_pictures.py demo
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
from pathlib import Path

PICTURES = Path(__file__).resolve().parent / "pictures"
COMMAND = "python finetuning/invoke_olive.py"
WIDTH = 100


def main() -> int:
    """Do the run, and draw what it printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path, help="a workspace whose model can be trained in a minute")
    script = parser.parse_args().workspace / COMMAND.split()[1]
    if not script.is_file():
        print(f"{script} is not there: name the folder of a workspace; `make demo` makes one.", file=sys.stderr)
        return 1
    terminal = os.environ | {"COLUMNS": str(WIDTH), "FORCE_COLOR": "1", "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, str(script)], env=terminal, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        print("The run failed, as shown above; the picture stays as it was.", file=sys.stderr)
        return 1
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "run.svg").write_text(draw(done.stdout.decode()), encoding="utf-8")
    print("Written: docs/pictures/run.svg")
    return 0


def draw(output: str) -> str:
    """Return a terminal with this output as SVG."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.assemble(("$ ", "bold green"), (COMMAND, "bold")))
    console.print(Text.from_ansi(output.replace("\r\n", "\n").rstrip()))
    console.print()  # the frame cuts the feet off the last line
    svg = console.export_svg(title="my-workspace", unique_id="run")
    # rich names a font on a server; the one that the reader has does as well, and is asked of nobody
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "'Fira Code', Menlo, Consolas, 'DejaVu Sans Mono', monospace") + "\n"


if __name__ == "__main__":
    sys.exit(main())
