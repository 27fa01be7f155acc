"""Chat with the tuned model in the browser and through an OpenAI-compatible API, on this machine only.

The page is at /, the API at /v1, and /health says whether the model is loaded. With a key in the environment variable
CHAT_API_KEY, the API requires it as bearer token and the page as password, and --host may be a network address.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # -P and PYTHONSAFEPATH leave it out
from engine import ENGINES, ChatError
from load_engine import load, not_installed
from model_process import ModelProcess

if TYPE_CHECKING:
    from request_queue import RequestQueue


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, open the port, load the model, serve until Ctrl-C. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseonly", action="store_true", help="the base model, without the adapter")
    parser.add_argument(
        "--engine", default="auto", metavar="NAME", help=f"the backend: {', '.join(ENGINES)} (default: auto)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1)")
    parser.add_argument(
        "--port", type=int, default=7860, help="0: any free port; if it is taken, the next one is used (default: 7860)"
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("CHAT_API_KEY", ""),
        metavar="KEY",
        help="prefer CHAT_API_KEY: others on this machine can see the command line",
    )
    parser.add_argument(
        "--root-path",
        default="",
        metavar="PATH",
        help="where a proxy shows this: a path, or the whole address, which needs no header of the proxy's",
    )
    parser.add_argument("--proxy-headers", action="store_true", help="trust the proxy's X-Forwarded-Host and -For")
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
    """Serve the page and the API until Ctrl-C. Raises ChatError."""
    try:
        from guard import check_root_path
        from server import create_app, create_server, listen
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    check_root_path(options.root_path)
    root_path = options.root_path.rstrip("/")
    listener = listen(options.host, options.port, options.api_key)
    port = listener.getsockname()[1]
    if options.port not in (0, port):
        print(f"Port {options.port} is taken: using {port}.")
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(options.host, options.host)  # all addresses include this machine's
    address = f"http://{f'[{name}]' if ':' in name else name}:{port}/"
    failures: list[Exception] = []
    if "GRADIO_TEMP_DIR" not in os.environ:  # the library's own, /tmp/gradio, may be another user's
        own = tempfile.TemporaryDirectory(prefix="chat-page-", ignore_cleanup_errors=True)
        os.environ["GRADIO_TEMP_DIR"] = own.name

    def prepare() -> ModelProcess:
        print("Loading the model …", flush=True)
        model = ModelProcess(functools.partial(load, options.baseonly, options.engine))
        try:
            import gradio  # noqa: F401  (here, since it takes seconds and /health already responds)
        except ModuleNotFoundError as error:
            raise not_installed(error) from error
        for notice in model.loaded().backend.notices:
            print(notice)
        return model

    def is_ready() -> None:
        print(f"Chat at {address} (Ctrl-C ends it); an API for OpenAI's clients at {address}v1", flush=True)
        if root_path:
            print(f"Through the proxy: {root_path}/, and {root_path}/v1", flush=True)
        if (root_path or options.proxy_headers) and not options.api_key:
            print("Whoever reaches the proxy can use the model, as no key is set in CHAT_API_KEY.", flush=True)

    def fail(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    app = create_app(
        prepare,
        lambda queue: open_page(queue, root_path),
        is_ready,
        fail,
        options.host,
        options.api_key,
        root_path,
        options.proxy_headers,
    )
    server = create_server(app)
    server.run(sockets=[listener])
    if failures:
        raise failures[0]


def open_page(queue: RequestQueue, root_path: str = "") -> Any:
    """Return the page as an application that records nothing and loads nothing from other sites.

    A proxy shows it at `root_path`, a path or a whole address.
    """
    import gradio as gr
    from fastapi import FastAPI

    from page import STYLE, THEME, build_page
    from page_policy import PagePolicy

    page = FastAPI(openapi_url=None)
    page.add_middleware(PagePolicy)
    return gr.mount_gradio_app(
        page,
        build_page(queue).queue(),
        "/",
        root_path=root_path or None,
        theme=THEME,
        css=STYLE,
        run_history=False,
        footer_links=[],
        ssr_mode=False,
        mcp_server=False,
    )


if __name__ == "__main__":
    sys.exit(main())
