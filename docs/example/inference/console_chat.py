"""Chat with the tuned model in a terminal, or in a script.

--prompt TEXT asks one question. Through a pipe each line is a message of one chat, or a command as in the terminal
(/system TEXT, /clear, #end). Both print only the answers.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # -P and PYTHONSAFEPATH leave it out
from engine import ENGINES, ChatError, Engine, Generation, Message, visible
from load_engine import load

END_KEY = "Ctrl-Z Enter" if os.name == "nt" else "Ctrl-D"
HELP = f"""/system TEXT  set the system prompt; without TEXT, what the model adds itself
/clear        start over; the system prompt stays
/help         show this
#end          end, as do Ctrl-C and {END_KEY}
Ctrl-C        stop an answer"""


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, load the model, chat. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseonly", action="store_true", help="the base model, without the adapter")
    parser.add_argument(
        "--engine", default="auto", metavar="NAME", help=f"the backend: {', '.join(ENGINES)} (default: auto)"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="ask this, print only the answer, and exit")
    parser.add_argument("--max-new-tokens", type=at_least_one, default=256, metavar="N", help="(default: 256)")
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, metavar="T", help="0: always the likeliest tokens (default)"
    )
    parser.add_argument(
        "--history",
        type=Path,
        metavar="FILE",
        help="save what is typed in the terminal, for the arrow keys of the next chat (default: not saved)",
    )
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    options = parser.parse_args(arguments)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # characters that the terminal cannot show become ?
    generation = Generation(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    try:
        text = options.prompt
        if text is None and not sys.stdin.isatty():
            text = sys.stdin.read()
        if text is not None and not text.strip():
            raise ChatError("The question is empty: write it after --prompt, or send it through the pipe.")
        if text is None and options.history:
            recall(options.history)
        if sys.stderr.isatty():
            print_stderr("Loading the model …")
        engine = load(options.baseonly, options.engine)
        for notice in engine.backend.notices:
            print_stderr(notice)
        if text is None:
            chat(engine, generation, typed(options.history), in_terminal=True)
        elif options.prompt is None:
            chat(engine, generation, text.splitlines(), in_terminal=False)
        else:
            answer(engine, [{"role": "user", "content": text.strip()}], generation, [])
    except ChatError as error:
        if options.debug:
            raise
        print_stderr(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of the pipe has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def recall(history: Path) -> None:
    """Load a history file for the arrow keys; it is created if missing. Raises ChatError."""
    try:
        history.touch(mode=0o600)  # not readable by others
        lines = history.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ChatError(f"The history cannot be kept in {history} ({error.strerror}): name another file.") from error
    with contextlib.suppress(ImportError):  # Windows has no readline
        import readline

        for line in lines:
            readline.add_history(line)


def typed(history: Path | None) -> Iterator[str]:
    """Yield each typed line until Ctrl-C or the end key, and append it to the file `history`."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (enables the arrow keys in input(); Windows has its own)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            line = input("You: ").strip()
            if history and line:
                with history.open("a", encoding="utf-8", errors="replace") as file:
                    file.write(" ".join(line.splitlines()) + "\n")
            yield line
    print()


def chat(engine: Engine, generation: Generation, lines: Iterable[str], in_terminal: bool) -> None:
    """Answer each line of a chat, or run its command, until `#end`. Raises ChatError, but not in a terminal."""
    if in_terminal:
        source = engine.source
        print(f"\nModel    {visible(source.base)} · {engine.backend.description}")
        adapter = f"{source.adapter} · {source.method}" if source.adapter else "none: the base model alone"
        print(f"Adapter  {visible(adapter)}")
        if source.system_prompt:
            print(f"System   {visible(' '.join(source.system_prompt.split())[:200])}")
        print("#end ends the chat, /help shows all commands\n")
    system: list[Message] = []
    turns: list[Message] = []
    for line in map(str.strip, lines):
        command, _, text = line.partition(" ")
        done = ""
        if line == "#end":
            return
        if line == "/help":
            done = HELP
        elif line == "/clear":
            turns, done = [], "(a new chat)"
        elif command == "/system":
            system = [{"role": "system", "content": text.strip()}]
            done = "(the system prompt is set)" if text.strip() else "(no system prompt is sent)"
        elif in_terminal and command[:1] == "/" and command[1:].isalpha() and not text:
            done = f"(there is no {command}: /help shows what there is)"
        elif line:
            turns += converse(engine, system + turns, line, generation, in_terminal)
        if done and in_terminal:
            print(f"{done}\n")


def converse(
    engine: Engine, before: list[Message], question: str, generation: Generation, in_terminal: bool
) -> list[Message]:
    """Print the answer to a question; return both, or nothing if there is no answer. Raises ChatError in a pipe."""
    asked = {"role": "user", "content": question}
    said: list[str] = []
    if not in_terminal:
        answer(engine, [*before, asked], generation, said)
    else:
        print("Model: ", end="", flush=True)
        try:
            answer(engine, [*before, asked], generation, said)
        except ChatError as error:
            print(f"({error})")
        except KeyboardInterrupt:
            print("\n(stopped)")
        print()
    # A question without an answer would lead to two consecutive user turns, which many chat templates refuse.
    return [asked, {"role": "assistant", "content": "".join(said)}] if any(said) else []


def answer(engine: Engine, messages: list[Message], generation: Generation, said: list[str]) -> None:
    """Print the answer piece by piece, with a line break at its end, and add the pieces to `said`.

    A pipe and a file get it to the letter; in a terminal, control characters are visible.
    """
    notices: list[str] = []
    with contextlib.closing(engine.stream(messages, generation, notices.append)) as pieces:
        for piece in pieces:
            print(visible(piece) if sys.stdout.isatty() else piece, end="", flush=True)
            said.append(piece)
    print()
    for notice in notices:
        print_stderr(notice)


def print_stderr(text: str) -> None:
    """Print to stderr: stdout is for the answers only."""
    print(visible(text), file=sys.stderr, flush=True)


def at_least_one(text: str) -> int:
    """Parse a number of tokens."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def temperature(text: str) -> float:
    """Parse a temperature."""
    try:
        if 0 <= float(text) <= 2:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 2")


if __name__ == "__main__":
    sys.exit(main())
