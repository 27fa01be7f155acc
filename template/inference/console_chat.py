"""Chat with the tuned model in a terminal, or ask it one question: `--prompt TEXT`, or the question through a pipe."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys

from engine import ENGINES, ChatError, Engine, Generation, Message, load

END_KEY = "Ctrl-Z Enter" if os.name == "nt" else "Ctrl-D"
HELP = f"""#end or {END_KEY}: end · Ctrl-C: stop an answer
/clear: start over · /system TEXT: set the system prompt (no TEXT: none)"""


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, load the model, answer. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseonly", action="store_true", help="the base model, without what was fine-tuned")
    parser.add_argument("--engine", choices=ENGINES, default="auto", help="what computes the answers (default: auto)")
    parser.add_argument("--prompt", metavar="TEXT", help="ask this, print the answer alone, and stop")
    parser.add_argument("--max-new-tokens", type=at_least_one, default=256, metavar="N", help="(default: 256)")
    parser.add_argument(
        "--temperature", type=temperature, default=0.0, metavar="T", help="0: always the likeliest words (default)"
    )
    parser.add_argument("--debug", action="store_true", help="show the full traceback of an error")
    options = parser.parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows ? instead
    generation = Generation(max_new_tokens=options.max_new_tokens, temperature=options.temperature)
    try:
        question = options.prompt
        if question is None and not sys.stdin.isatty():
            question = sys.stdin.read()
        if question is not None and not question.strip():
            raise ChatError("The question is empty: write it behind --prompt, or send it through the pipe.")
        say("Loading the model …")
        engine = load(options.baseonly, options.engine)
        for notice in engine.backend.notices:
            say(notice)
        if question is None:
            chat(engine, generation)
        else:
            answer(engine, [{"role": "user", "content": question.strip()}], generation, [])
    except ChatError as error:
        if options.debug:
            raise
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the answer has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def chat(engine: Engine, generation: Generation) -> None:
    """Talk until the user ends it, on the terminal."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its arrow keys; Windows has its own)
    source = engine.source
    print(f"\nModel    {source.base} · {engine.backend.description}")
    print(f"Adapter  {f'{source.adapter} · {source.method}' if source.adapter else 'none: the base model alone'}")
    print(f"{HELP}\n")
    system: list[Message] = []
    turns: list[Message] = []
    while True:
        try:
            question = input("You: ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print(f"\n(#end or {END_KEY} ends the chat)")
            continue
        if question == "#end":
            return
        if question == "/clear":
            turns = []
            print("(a new chat)\n")
        elif question.split(" ")[0] == "/system":
            system = [{"role": "system", "content": question.removeprefix("/system").strip()}]
            print("(the system prompt is set)\n" if system[0]["content"] else "(no system prompt)\n")
        elif question:
            turns.append({"role": "user", "content": question})
            print("Model: ", end="", flush=True)
            said: list[str] = []
            try:
                answer(engine, system + turns, generation, said)
            except ChatError as error:
                print(f"({error})")
            except KeyboardInterrupt:
                print("\n(stopped)")
            print()
            # A question without an answer would leave two user turns in a row, which many chat templates refuse.
            turns = [*turns, {"role": "assistant", "content": "".join(said)}] if any(said) else turns[:-1]


def answer(engine: Engine, messages: list[Message], generation: Generation, said: list[str]) -> None:
    """Print the answer piece by piece, with a line break at its end, and add the pieces to `said`."""
    notices: list[str] = []
    with contextlib.closing(engine.stream(messages, generation, notices.append)) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
            said.append(piece)
    print()
    for notice in notices:
        say(notice)


def say(text: str) -> None:
    """Tell the person, not the program that reads the answer."""
    print(text, file=sys.stderr, flush=True)


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
