"""Chat with the tuned model in the browser, and through an OpenAI-compatible API, on this machine only.

The page is at /, the API at /v1, and /health says whether the model is there yet. With a key, in the environment
variable CHAT_API_KEY, the API asks for it as a bearer token and the page as password, and --host may be a network's.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from engine import ENGINES, ChatError, Engine, Generation, Message, load, not_installed

if TYPE_CHECKING:
    from line import Line

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported, which is later

# The browser loads nothing from elsewhere, not even a picture that an answer asks for.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, listen, load the model, serve until Ctrl-C. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseonly", action="store_true", help="the base model, without what was fine-tuned")
    parser.add_argument(
        "--engine", default="auto", metavar="NAME", help=f"what computes: {', '.join(ENGINES)} (default: auto)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=7860, help="0: any free one; if it is taken, the next is (default: 7860)"
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("CHAT_API_KEY", ""),
        metavar="KEY",
        help="better in CHAT_API_KEY: others on this machine see what is on a command line",
    )
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    options = parser.parse_args(arguments)
    try:
        serve(options)
    except ChatError as error:
        if options.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def serve(options: argparse.Namespace) -> None:
    """Serve page and API until Ctrl-C. Raises ChatError."""
    try:
        from server import create_app, create_server, listen
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    listener = listen(options.host, options.port, options.api_key)
    port = listener.getsockname()[1]
    if options.port not in (0, port):
        print(f"Port {options.port} is taken: using {port}.")
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)  # all addresses: this machine's too
    address = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
    failures: list[Exception] = []

    def prepare() -> Engine:
        print("Loading the model …", flush=True)
        engine = load(options.baseonly, options.engine)
        for notice in engine.backend.notices:
            print(notice)
        try:
            import gradio  # noqa: F401  (here, as it takes seconds, in which /health is answered already)
        except ModuleNotFoundError as error:
            raise not_installed(error) from error
        return engine

    def is_ready() -> None:
        print(f"Chat at {address} (Ctrl-C ends it); an API for OpenAI's clients at {address}v1", flush=True)

    def fail(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(
        prepare, lambda line: open_page(line, options.api_key), is_ready, fail, options.host, options.api_key
    )
    server = create_server(app)
    server.run(sockets=[listener])
    if failures:
        raise failures[0]


def open_page(line: Line, key: str) -> Any:
    """Return the page as an application: nothing of it is recorded, and nothing comes from elsewhere."""
    import gradio as gr
    from fastapi import FastAPI

    def is_key(_: str, password: str) -> bool:
        return secrets.compare_digest(password.encode(), key.encode())

    return gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        build_page(line).queue(),
        "/",
        auth=is_key if key else None,
        auth_message="The password is the API key; the user name may be any.",
        theme=gr.themes.Default(font=["system-ui", "sans-serif"]),
        head=f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
    )


def build_page(line: Line) -> Any:
    """Build the page: what answers, the chat, its settings, and what fine-tuning has changed."""
    import gradio as gr

    engine = line.engine
    source, most = engine.source, min(4096, engine.backend.context)
    adapter = f"adapter **{source.adapter}** ({source.method})" if source.adapter else "**the base model alone**"

    async def answer(
        message: str, history: list[Any], system: str, longest: int, temperature: float, top_p: float
    ) -> AsyncIterator[str]:
        messages: list[Message] = [{"role": "system", "content": system}]
        for turn in history:  # whose content comes in parts from the page, and as a text from gradio's clients
            parts = [{"text": turn["content"]}] if isinstance(turn["content"], str) else turn["content"]
            messages.append({"role": turn["role"], "content": "".join(part["text"] for part in parts)})
        messages += [{"role": "user", "content": message.strip()}]
        said = ""
        try:
            with line.place() as place:
                async for piece in place.stream(messages, Generation(int(longest), temperature, top_p), gr.Info):
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
            concurrency_limit=None,  # all wait in the same line as the API's requests
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
