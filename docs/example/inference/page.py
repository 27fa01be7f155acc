"""The chat page: one column for the tuned model and, for comparison, one for the base model.

gradio_chat.py imports this file when the model is loaded; only this file builds user interface.
"""

from __future__ import annotations

import html
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from api import failure
from engine import COMPARE, Generation, Message
from request_queue import RequestQueue

# The columns are side by side if there is room, share the remaining height, and scroll separately below their names.
# Nothing in an answer is drawn outside its column. Gradio's own clear buttons would clear only one column, and its
# slider knobs are white on white.
STYLE = """
.columns { flex: 1 1 0; display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr));
  grid-auto-rows: minmax(16rem, 1fr); align-items: stretch; }
.columns > .block { contain: strict; }
.columns .message-markdown-disabled .md { white-space: pre-wrap; }
.columns label { position: static; align-self: start; }
.columns .top-panel { display: none; }
input[type=range]::-webkit-slider-thumb { background: var(--primary-600); }
input[type=range]::-moz-range-thumb { background: var(--primary-600); }
.prose :is(th, td) { padding: 0.3rem 0.6rem; word-break: normal; overflow-wrap: normal; }
"""
# How a column shows its texts, without Markdown and with it. The button copies what Gradio has, which is HTML without
# Markdown: there, users select the text.
FORMULA = {"left": "$$", "right": "$$", "display": True}
SHOWN: dict[bool, dict[str, Any]] = {
    False: {"render_markdown": False, "latex_delimiters": [], "buttons": []},
    True: {"render_markdown": True, "latex_delimiters": [FORMULA], "buttons": ["copy"]},
}
# The system font, since no other is loaded; a blue on which white text is readable in light and dark mode.
THEME = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"]).set(
    button_primary_background_fill="*primary_600",
    button_primary_background_fill_dark="*primary_600",
    button_primary_background_fill_hover="*primary_700",
    button_primary_background_fill_hover_dark="*primary_700",
    body_text_color_subdued="*neutral_600",
    body_text_color_subdued_dark="*neutral_400",
    block_info_text_color="*neutral_600",
    block_info_text_color_dark="*neutral_400",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
)


@dataclass
class Chat:
    """The questions, and the answers of each model so far: a model may have fewer answers than there are questions."""

    questions: list[str]
    answers: dict[bool, list[str]]  # with and without the adapter
    markdown: bool = False  # whether the columns show Markdown; otherwise, they show each text as it is

    @classmethod
    def shown(cls, tuned: list[Any], base: list[Any], markdown: bool) -> Chat:
        """Return the chat shown in the page's two columns."""

        def said(turns: list[Any], role: str) -> list[str]:
            texts = ("".join(part["text"] for part in turn["content"]) for turn in turns if turn["role"] == role)
            return [text if markdown else html.unescape(text) for text in texts]

        return cls(said(tuned, "user"), {True: said(tuned, "assistant"), False: said(base, "assistant")}, markdown)

    def ask(self, question: str) -> None:
        """Add a question; it replaces one that was stopped before its answer began."""
        self.questions = [*self.questions[: len(self.answers[True])], question]

    def ask_again(self) -> None:
        """Remove the answers to the last question."""
        for answers in self.answers.values():
            del answers[len(self.questions) - 1 :]

    def turns(self, adapter: bool) -> list[Message]:
        """Return the turns of a column; it ends with a question while that has no answer."""
        turns: list[Message] = []
        for i, question in enumerate(self.questions):
            turns.append({"role": "user", "content": question})
            turns += [{"role": "assistant", "content": answer} for answer in self.answers[adapter][i : i + 1]]
        return turns

    def columns(self) -> list[list[Any]]:
        """Return both columns in Gradio's format, which is HTML without Markdown. A str would lose its indentation."""
        escape = str if self.markdown else html.escape
        return [
            [turn | {"content": {"type": "text", "text": escape(turn["content"])}} for turn in self.turns(adapter)]
            for adapter in (True, False)
        ]

    async def answer(
        self, queue: RequestQueue, comparing: bool, system: str, generation: Generation, notify: Callable[[str], None]
    ) -> AsyncIterator[None]:
        """Generate the missing answers of the tuned model, then of the base model if requested; yield after each piece.

        Each model continues from its own answers. Raises the errors of the engine.
        """
        for adapter in (True, False) if comparing else (True,):
            answers = self.answers[adapter]
            while len(answers) < len(self.questions):
                known = self.turns(adapter)[: 2 * len(answers) + 1]
                messages = [{"role": "system", "content": system}, *known]
                answers.append("")
                with queue.ticket() as ticket:
                    async for piece in ticket.stream(messages, replace(generation, adapter=adapter), notify):
                        answers[-1] += piece
                        if piece:
                            yield
                yield  # an empty answer counts too


def build_page(queue: RequestQueue) -> gr.Blocks:
    """Build the page: the model, the chat, its settings, and the metrics before and after fine-tuning."""
    engine = queue.engine
    source, most = engine.source, min(4096, engine.backend.context)
    adapter = f"adapter **{source.adapter}** ({source.method})" if source.adapter else "**the base model alone**"
    column: dict[str, Any] = {"height": None, **SHOWN[False]}
    button: dict[str, Any] = {"min_width": 60}

    with gr.Blocks(title=f"Chat with {source.base}", fill_height=True, analytics_enabled=False) as page:
        gr.Markdown(f"## {source.base}\n{adapter} · {engine.backend.description}")
        with gr.Row(scale=1, elem_classes="columns"):
            tuned = gr.Chatbot(label="Tuned model" if source.adapter else "Base model", **column)
            base = gr.Chatbot(label="Base model", visible=False, **column)
        question = gr.Textbox(label="Your message", placeholder="Enter sends it", max_lines=8, autofocus=True)
        with gr.Row():
            send = gr.Button("Send", variant="primary", **button)
            stop = gr.Button("Stop", interactive=False, **button)
            retry = gr.Button("Retry", elem_id="retry", **button)
            clear = gr.Button("Clear", **button)
        compare = gr.Checkbox(label="Compare with the base model", elem_id="compare", visible=engine.backend.switchable)
        if source.adapter and not engine.backend.switchable:
            gr.Markdown(f"{COMPARE[0].upper()}{COMPARE[1:]}.")
        with gr.Accordion("Settings", open=False):
            settings = draw_settings(source.system_prompt, most)
            markdown = gr.Checkbox(label="Format answers as Markdown", info="Off: exactly what the model said.")
        if table := metrics_table(source.run):
            with gr.Accordion("Before and after fine-tuning", open=False):
                gr.Markdown(table)

        controls = [send, stop, retry, compare, markdown]

        async def answer(
            event: gr.EventData, typed: str, left: Any, right: Any, comparing: bool, formats: bool, *how: Any
        ) -> AsyncIterator[list[Any]]:
            chat, taken = Chat.shown(left, right, formats), gr.skip()
            system, *settings = how
            trigger = event.target.elem_id  # the target is a copy
            if trigger == "retry":
                chat.ask_again()
            elif trigger != "compare" and typed.strip():
                chat.ask(typed.strip())
                taken = ""
            yield [taken, *chat.columns(), *usable(answering=True)]
            try:
                async for _ in chat.answer(queue, comparing, system, generation(*settings), gr.Info):
                    yield [gr.skip(), *chat.columns(), *[gr.skip()] * len(controls)]
            except Exception as error:  # gr.Error would write "Error" over both columns
                gr.Warning(str(failure(error)), duration=None)

        answering = gr.on(
            [question.submit, send.click, retry.click, compare.input],
            answer,
            [question, tuned, base, compare, markdown, *settings],
            [question, tuned, base, *controls],
            trigger_mode="once",
            concurrency_limit=None,  # the request queue, shared with the API, limits concurrency
            show_progress="hidden",
            api_visibility="private",
        )
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        answering.then(usable, None, controls, **quick)
        stop.click(None, cancels=[answering])
        clear.click(None, cancels=[answering]).then(lambda: ([], []), None, [tuned, base], **quick)
        compare.change(lambda comparing: gr.Chatbot(visible=comparing), compare, base, **quick)
        markdown.input(show_again, [tuned, base, markdown], [tuned, base], **quick)

        async def ask(
            question: str,
            system: str = source.system_prompt,
            longest: int = min(256, most),
            temperature: float = 0,
            top_p: float = 1,
            history: list[list[str]] | None = None,
        ) -> AsyncIterator[str]:
            """Answer a question that follows earlier [question, answer] pairs, for users of Gradio's client."""
            before = history or []
            chat = Chat([*(turn[0] for turn in before), question], {True: [turn[1] for turn in before]})
            try:
                async for _ in chat.answer(queue, False, system, generation(longest, temperature, top_p), gr.Info):
                    yield chat.answers[True][-1]
            except Exception as error:
                raise gr.Error(str(failure(error)), print_exception=False) from error

        gr.api(ask, api_name="chat", concurrency_limit=None)
    return page


def draw_settings(system_prompt: str, most: int) -> list[Any]:
    """Draw the settings in order: the system prompt, then the arguments of `generation`. `most` is in tokens."""
    return [
        gr.Textbox(system_prompt, label="System prompt", info="Empty: none."),
        gr.Slider(1, most, min(256, most), step=1, label="Longest answer", info="In tokens."),
        gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0: always the likeliest tokens."),
        gr.Slider(
            0.05, 1, 1, step=0.05, label="Top p", info="Sample from the likeliest tokens with this total probability."
        ),
        gr.Slider(0, 200, 0, step=1, label="Top k", info="Sample from this many of the likeliest tokens; 0: 1,000."),
        gr.Slider(1, 2, 1, step=0.05, label="Repetition penalty", info="Above 1: less repetition."),
        gr.Number(-1, precision=0, label="Seed", info="The same seed gives the same answer; -1: a new one each time."),
    ]


def show_again(tuned: list[Any], base: list[Any], markdown: bool) -> list[Any]:
    """Return both columns with Markdown after they were shown without it, or the other way round."""
    chat = Chat.shown(tuned, base, not markdown)
    chat.markdown = markdown
    return [gr.Chatbot(column, **SHOWN[markdown]) for column in chat.columns()]


def usable(answering: bool = False) -> list[Any]:
    """Return the state of Send, Stop, Retry and the switches while an answer is generated, or otherwise."""
    resting = not answering
    return [gr.update(interactive=interactive) for interactive in (resting, answering, resting, resting, resting)]


def generation(
    longest: float,
    temperature: float,
    top_p: float,
    top_k: float = Generation.top_k,
    repetition_penalty: float = Generation.repetition_penalty,
    seed: int | None = None,
) -> Generation:
    """Return the generation settings of the page. A browser may send 1 as int or float."""
    return Generation(
        max_new_tokens=int(longest),
        temperature=float(temperature),
        top_p=float(top_p),
        top_k=int(top_k),
        repetition_penalty=float(repetition_penalty),
        seed=None if seed is None or seed < 0 else seed,
    )


def metrics_table(run: dict[str, Any]) -> str:
    """Return the metrics of models/run.json as a Markdown table, empty if it has none."""
    before, after = (run.get("metrics", {}).get(when, {}) for when in ("before", "after"))
    names = {"accuracy": ("exact answers", ".1%"), "eval_loss": ("loss", ".4g"), "perplexity": ("perplexity", ".4g")}
    rows = [
        f"| {name} | {before[key]:{form}} | {after[key]:{form}} |"
        for key, (name, form) in names.items()
        if key in before and key in after
    ]
    return "\n".join(["| held-out rows | before | after |", "|---|--:|--:|", *rows]) if rows else ""
