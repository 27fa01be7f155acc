"""Chat with the tuned model in the browser, on this machine only."""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

from engine import ENGINES, ChatError, Engine, Generation, Message, load, not_installed

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, which is later

# The browser loads nothing from elsewhere, not even a picture that an answer asks for.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, load the model, serve the page until Ctrl-C. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseonly", action="store_true", help="the base model, without what was fine-tuned")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="what computes the answers (default: auto)")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="0: any free one (default: 7860)")
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    options = parser.parse_args(arguments)
    try:
        port = free_port(options.host, options.port)
        print("Loading the model …", flush=True)
        engine = load(options.baseonly, options.engine)
        for notice in engine.backend.notices:
            print(notice)
        page = serve(engine, options.host, port)
        print(f"Chat at {page.local_url} (Ctrl-C ends it)", flush=True)
        page.block_thread()
    except ChatError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def free_port(host: str, port: int) -> int:
    """Return the port, or a free one for 0. Raises ChatError unless it can be opened, to this machine alone."""
    loopback = host == "localhost"
    with contextlib.suppress(ValueError):
        loopback = loopback or ipaddress.IPv4Address(host).is_loopback
    if not loopback:
        raise ChatError(
            f"Binding to anything but loopback ({host}) would let others on the network use the model, as the page "
            "asks for no key: use 127.0.0.1, and a tunnel from elsewhere (ssh -L 7860:localhost:7860 THIS-MACHINE)."
        )
    try:
        with socket.create_server((host, port)) as server:
            return int(server.getsockname()[1])
    except (OSError, OverflowError) as error:
        raise ChatError(f"Port {port} cannot be opened ({error}): end what uses it, or choose another.") from error


def serve(engine: Engine, host: str, port: int) -> Any:
    """Serve the page in the background and return it: nothing of it is recorded, and nothing comes from elsewhere."""
    for variable in ("NO_PROXY", "no_proxy"):  # gradio asks its own page whether it is up, which no proxy can tell
        os.environ[variable] = ",".join(filter(None, [os.environ.get(variable), "127.0.0.1,localhost"]))
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    page = build_page(engine)
    page.queue(default_concurrency_limit=1).launch(
        server_name=host,
        server_port=port,
        theme=gr.themes.Default(font=["system-ui", "sans-serif"]),
        head=f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        share=False,
        ssr_mode=False,
        run_history=False,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )
    return page


def build_page(engine: Engine) -> Any:
    """Build the page: what answers, the chat, its settings, and what fine-tuning has changed."""
    import gradio as gr

    source, most = engine.source, min(4096, engine.backend.context)
    adapter = f"adapter **{source.adapter}** ({source.method})" if source.adapter else "**the base model alone**"

    def answer(
        message: str, history: list[Any], system: str, longest: int, temperature: float, top_p: float
    ) -> Iterator[str]:
        messages: list[Message] = [{"role": "system", "content": system}]
        for turn in history:  # whose content comes in parts
            messages.append({"role": turn["role"], "content": "".join(part["text"] for part in turn["content"])})
        messages += [{"role": "user", "content": message.strip()}]
        said = ""
        try:
            generation = Generation(int(longest), temperature, top_p)
            with contextlib.closing(engine.stream(messages, generation, gr.Info)) as pieces:
                for piece in pieces:
                    said += piece
                    yield said
        except ChatError as error:
            raise gr.Error(str(error), print_exception=False) from error

    # Made outside the page: the chat puts them in their place.
    accordion = gr.Accordion("Settings", open=False)
    settings = [
        gr.Textbox(source.system_prompt, label="System prompt", info="Empty: none."),
        gr.Slider(1, most, min(256, most), step=1, label="Longest answer", info="In tokens."),
        gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: always the likeliest words."),
        gr.Slider(0.05, 1, 1, step=0.05, label="Top p", info="The share of the likeliest words to draw from."),
    ]
    with gr.Blocks(title=f"Chat with {source.base}", fill_height=True, analytics_enabled=False) as page:
        gr.Markdown(f"## {source.base}\n{adapter} · {engine.backend.description}")
        gr.ChatInterface(
            answer,
            chatbot=gr.Chatbot(show_label=False, scale=1, min_height=240, buttons=["copy"]),
            additional_inputs=settings,
            additional_inputs_accordion=accordion,
            concurrency_limit=1,
            api_name="chat",
        )
        if table := metrics_table(source.run):
            with gr.Accordion("Before and after fine-tuning", open=False):
                gr.Markdown(table)
    return page


def metrics_table(run: dict[str, Any]) -> str:
    """Return the metrics of models/run.json as a Markdown table, empty when it has none."""
    before, after = (run.get("metrics", {}).get(when, {}) for when in ("before", "after"))
    names = {"accuracy": "exact answers", "eval_loss": "loss", "perplexity": "perplexity"}
    rows = [
        f"| {names[key]} | {before[key]:.4g} | {after[key]:.4g} |" for key in names if key in before and key in after
    ]
    return "\n".join(["| held-out rows | before | after |", "|---|--:|--:|", *rows]) if rows else ""


if __name__ == "__main__":
    sys.exit(main())
