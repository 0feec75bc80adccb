"""The page itself: thin Gradio over ``Visits``. Imported late, because Gradio takes seconds to import."""

from __future__ import annotations

import html
from collections.abc import Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from minigpt4.common.errors import MiniGPT4Error
from minigpt4.conversation.grounding import read_grounded
from minigpt4.models.generation import GenerateOptions
from minigpt4.web.markup import coloured, plain
from minigpt4.web.tasks import IDENTIFY, TASKS, Task
from minigpt4.web.visits import Message, Visits

HERE = Path(__file__).parent
EXAMPLES = HERE / "examples"


@dataclass(frozen=True)
class Style:
    """What differs between the two demos: title, task buttons, ranges of the sliders, pictures with a question."""

    title: str
    placeholder: str
    has_tasks: bool
    max_temperature: float
    max_beams: int  # 1 = no slider
    examples: tuple[tuple[str, str], ...] = ()


class Page:
    """One page for one model. ``blocks`` is the Gradio application."""

    def __init__(self, visits: Visits, style: Style, options: GenerateOptions) -> None:
        self.visits, self.style, self.options = visits, style, options
        # Every message is rendered from the server's own record: what a browser sends as history is never read.
        with gr.Blocks(title=style.title, analytics_enabled=False, delete_cache=(1800, 6 * 3600)) as self.blocks:
            gr.HTML(f"<h1>{html.escape(style.title)}</h1>")
            with gr.Row():
                with gr.Column(scale=2, min_width=320):
                    self._left()
                with gr.Column(scale=3, min_width=320):
                    self._right()
            self._examples()
            self._connect()

    def _left(self) -> None:
        self.picture = gr.Image(
            label="Picture",
            elem_id="picture",
            type="filepath",
            sources=["upload", "clipboard", "webcam"],
            height=380,
            buttons=[],
        )
        # Gradio would decode the file here, with errors that name nothing; ``receive`` looks at it itself.
        self.picture.preprocess = lambda upload: None if upload is None else upload.path
        self.box = gr.Textbox(
            label="Box for [identify], in percent of the picture",
            placeholder="drag over the picture, or write {<10><20><60><80>}",
            elem_id="box",
            max_lines=1,
        )
        with gr.Row(elem_id="tasks", visible=self.style.has_tasks):
            self.tasks = [gr.Button(task.label, size="sm", min_width=72) for task in TASKS]
        self.hint = gr.HTML("", elem_id="hint", visible=self.style.has_tasks)
        with gr.Accordion("Settings", open=False):
            self.temperature = gr.Slider(
                0,
                self.style.max_temperature,
                value=self.options.temperature if self.options.do_sample else 0,
                step=0.1,
                label="Temperature (0 = the likeliest words)",
            )
            self.beams = gr.Slider(
                1,
                max(2, self.style.max_beams),
                value=self.options.num_beams,
                step=1,
                label="Beams (above 1 the answer comes in one piece)",
                visible=self.style.max_beams > 1,
            )

    def _right(self) -> None:
        self.chat = gr.Chatbot(
            label="Conversation",
            elem_id="chat",
            height=560,
            latex_delimiters=[],
            feedback_options=None,
            allow_tags=False,
            buttons=["copy"],
            placeholder=self.style.placeholder,
        )
        self.notice = gr.HTML("", elem_id="notice")
        self.question = gr.Textbox(
            show_label=False,
            placeholder="Your question, then Enter",
            elem_id="question",
            lines=1,
            max_lines=6,
            autofocus=False,
        )
        with gr.Row():
            self.send = gr.Button("Send", variant="primary", min_width=90, elem_id="send")
            self.stop = gr.Button("Stop", min_width=90, elem_id="stop")
            self.restart = gr.Button("Restart", min_width=90, elem_id="restart")

    def _examples(self) -> None:
        if self.style.examples:
            self.examples = gr.Dataset(
                components=[gr.Image(visible=False), gr.Textbox(visible=False)],
                samples=[[str(EXAMPLES / name), question] for name, question in self.style.examples],
                type="index",
                label="Examples",
                elem_id="examples",
            )

    def _connect(self) -> None:
        listening: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        received = [self.picture, self.chat, self.notice, self.box]
        self.picture.input(
            self._receive, [self.picture], received, concurrency_limit=4, **{**listening, "show_progress": "minimal"}
        ).then(None, js="() => window.forgetBox()")
        asked = gr.on(
            [self.question.submit, self.send.click],
            self._ask,
            [self.question, self.box, self.temperature, self.beams],
            [self.chat, self.notice, self.question],
            concurrency_limit=None,
            **listening,
        )
        self.chat.clear(self._restart, None, self._everything(), cancels=[asked], concurrency_limit=None, **listening)
        self.stop.click(self._stop, concurrency_limit=None, **listening)
        cleared = self.restart.click(
            self._restart, None, self._everything(), cancels=[asked], concurrency_limit=None, **listening
        )
        cleared.then(None, js="() => { document.body.classList.remove('selecting'); window.forgetBox(); }")
        for button, task in zip(self.tasks, TASKS, strict=True):
            chosen = button.click(_chooses(task), None, [self.question, self.hint], **listening)
            chosen.then(None, js=f"() => document.body.classList.toggle('selecting', {_js(IDENTIFY in task.text)})")
        if self.style.examples:
            self.examples.click(self._example, [self.examples], [*received, self.question], **listening)
        self.blocks.unload(self._leave)

    def _everything(self) -> list[Any]:
        return [self.picture, self.chat, self.notice, self.box, self.question, self.hint]

    def _receive(self, path: str | None, request: gr.Request) -> tuple[Any, list[Any], str, str]:
        key = _key(request)
        if path is None:  # the cross on the picture
            self.visits.restart(key)
            return None, [], "", ""
        try:
            return self.visits.receive(key, path), [], "", ""
        except MiniGPT4Error as error:
            return None, [], _told(error), ""

    def _ask(
        self, question: str, box: str, temperature: float, beams: float, request: gr.Request
    ) -> Generator[tuple[Any, Any, Any]]:
        key, kept = _key(request), gr.skip()
        try:
            options = self._chosen(temperature, beams)
            is_first = True
            for messages in self.visits.ask(key, question or "", box or "", options):
                yield [_shown(message) for message in messages], "" if is_first else kept, "" if is_first else kept
                is_first = False
        except MiniGPT4Error as error:
            messages = self.visits.visit(key).messages
            yield [_shown(message) for message in messages], _told(error), question

    def _chosen(self, temperature: float, beams: float) -> GenerateOptions:
        """The options with what the sliders say, within their ranges."""
        warmth = min(max(float(temperature), 0.0), self.style.max_temperature)
        width = min(max(int(beams), 1), max(self.style.max_beams, self.options.num_beams))
        return replace(self.options, do_sample=warmth > 0, temperature=warmth or 1.0, num_beams=width)

    def _stop(self, request: gr.Request) -> None:
        self.visits.stop(_key(request))

    def _restart(self, request: gr.Request) -> tuple[None, list[Any], str, str, str, str]:
        self.visits.restart(_key(request))
        return None, [], "", "", "", ""

    def _example(self, index: int, request: gr.Request) -> tuple[Any, list[Any], str, str, str]:
        name, question = self.style.examples[index]
        return *self._receive(str(EXAMPLES / name), request), question

    def _leave(self, request: gr.Request) -> None:
        self.visits.leave(_key(request))


def _key(request: gr.Request) -> str:
    """What names a browser tab: its user, and what the page drew at random when it was loaded."""
    return f"{request.username or ''}:{request.session_hash}"


def _chooses(task: Task) -> Any:
    return lambda: (task.text, f"<span>{html.escape(task.hint)}</span>")


def _js(value: bool) -> str:
    return "true" if value else "false"


def _told(error: MiniGPT4Error) -> str:
    return f'<p class="error" role="alert">{html.escape(str(error))}</p>'


def _shown(message: Message) -> dict[str, Any]:
    """A message as the chat component takes it."""
    if message.picture is not None:
        return {"role": message.role, "content": {"path": str(message.picture), "alt_text": "the picture with boxes"}}
    if message.role == "note":
        return {"role": "assistant", "content": f"<em>{plain(message.text)}</em>"}
    text = coloured(read_grounded(message.text)) if message.role == "assistant" else plain(message.text)
    return {"role": message.role, "content": text}
