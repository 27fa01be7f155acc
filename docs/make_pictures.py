"""Create docs/pictures/: a run in a terminal, and the chat page in a browser.

Run it with the Python of a workspace, on that workspace, after `make test` has downloaded playwright:

demo/.venv/bin/python docs/make_pictures.py demo
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PICTURES = Path(__file__).resolve().parent / "pictures"
COMMAND = "python finetuning/invoke_olive.py"
WIDTH = 100
QUESTION = "The surgeon came to the door, which left Dad jubilant."
CHROMIUM = shutil.which("chromium")
PLAYWRIGHT = PICTURES.parents[1] / ".cache" / "playwright"


def main() -> int:
    """Run the fine-tuning and draw its output, then ask the tuned and the base model on the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workspace", type=Path, help="a workspace whose model can be trained in a minute")
    script = parser.parse_args().workspace / COMMAND.split()[1]
    if not script.is_file():
        print(f"{script} does not exist: name the folder of a workspace; `make demo` creates one.", file=sys.stderr)
        return 1
    if not (CHROMIUM and PLAYWRIGHT.is_dir()):
        print(f"The page needs Chromium and {PLAYWRIGHT}; `make test` downloads the latter.", file=sys.stderr)
        return 1
    terminal = os.environ | {"COLUMNS": str(WIDTH), "FORCE_COLOR": "1", "PYTHONUTF8": "1"}
    done = subprocess.run([sys.executable, str(script)], env=terminal, stdout=subprocess.PIPE, check=False)
    if done.returncode != 0:
        print("The run failed, see above; the pictures are unchanged.", file=sys.stderr)
        return 1
    PICTURES.mkdir(exist_ok=True)
    (PICTURES / "run.svg").write_text(draw(done.stdout.decode()), encoding="utf-8")
    with served(script.parents[1] / "inference" / "gradio_chat.py") as address:
        photograph(address)
    print(f"Written: {', '.join(sorted(path.name for path in PICTURES.iterdir()))}, in docs/pictures")
    return 0


def draw(output: str) -> str:
    """Return a terminal with this output, as SVG."""
    from rich.console import Console
    from rich.text import Text

    console = Console(record=True, width=WIDTH, file=io.StringIO())
    console.print(Text.assemble(("$ ", "bold green"), (COMMAND, "bold")))
    console.print(Text.from_ansi(output.replace("\r\n", "\n").rstrip()))
    console.print()  # the frame cuts off the bottom of the last line
    svg = console.export_svg(title="my-workspace", unique_id="run")
    # rich loads a font from a server; use the reader's own fonts, without any request
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return svg.replace("Fira Code, monospace", "'Fira Code', Menlo, Consolas, 'DejaVu Sans Mono', monospace") + "\n"


@contextmanager
def served(script: Path) -> Iterator[str]:
    """Serve the page and yield its address."""
    command = [sys.executable, str(script), "--port", "0", "--engine", "torch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            yield next(line.split()[2] for line in server.stdout if line.startswith("Chat at "))
        finally:
            server.terminate()


def photograph(address: str) -> None:
    """Take screenshots of the comparison: a window with the metrics table, and a phone in dark mode."""
    sys.path.append(str(PLAYWRIGHT))  # at the end: the workspace's own packages come first
    from playwright.sync_api import expect, sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, width, height, scheme in (("page", 860, 800, "light"), ("phone", 360, 740, "dark")):
            page = browser.new_page(
                viewport={"width": width, "height": height}, color_scheme=scheme, device_scale_factor=2
            )
            page.goto(address)
            page.add_style_tag(content="* { transition: none !important }")
            page.get_by_label("Compare with the base model").check()
            expect(page.get_by_role("log")).to_have_count(2)
            page.get_by_label("Your message").fill(QUESTION)
            page.get_by_label("Your message").press("Enter")
            expect(page.locator(".bot.message")).to_have_count(2)
            expect(page.get_by_role("button", name="Stop")).to_be_disabled()
            if name == "page":
                page.get_by_role("button", name="Before and after").click()
                expect(page.get_by_role("table")).to_be_visible()
            page.mouse.click(1, 1)  # remove the focus
            page.screenshot(path=PICTURES / f"{name}.png", full_page=True)
        browser.close()


if __name__ == "__main__":
    sys.exit(main())
