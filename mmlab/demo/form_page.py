"""The page of generative runs: a form, the images, and the steps to them; of one run or two side by side."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from mmlab.config.errors import UserError
from mmlab.demo.forms import Drawer, Drawn, Form, common_form
from mmlab.demo.page import AT_ONCE, GENERATES, Handlers, blocks, warn
from mmlab.demo.visits import Visit, Visits

MOST = 64
"""Images at a time."""
PROGRESS = gr.Progress()


class _Stopped(Exception):
    """Ends a drawing that was stopped."""


class FormHandlers(Handlers[Visit]):
    """What happens when a visitor draws or stops.

    Args:
        drawers: the runs.
        form: of all of them.
        names: keys of `mmlab sample` that the form's fields give, in order.
        root: the folder of the visitors' folders.
    """

    def __init__(self, drawers: Sequence[Drawer], form: Form, names: Sequence[str], root: Path):
        super().__init__(Visits(root, Visit))
        self.drawers, self.form, self.names = drawers, form, names

    def draw(self, request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any) -> Iterator[list[Any]]:
        """Draw with each run in turn; yields images and strip of each.

        Args:
            request: of the visitor.
            progress: shown on the page; Gradio knows it by the default.
            *values: of the fields.
        """
        visit = self.visits.start(str(request.session_hash))
        visit.forget()
        settings = dict(zip(self.names, values, strict=True))
        if "size" in settings:
            settings["size"] = self.form.sizes[settings["size"]]
        shown: list[Any] = [value for _ in self.drawers for value in ([], None)]
        for n, drawer in enumerate(self.drawers):

            def on_step(done: int, steps: int, name: str = drawer.name) -> None:
                if visit.stop.is_set():
                    raise _Stopped
                progress((done, steps), desc=name, unit="steps")

            try:
                drawn = drawer(settings, visit.place(), on_step)
            except _Stopped:
                warn("The drawing was stopped.")
                break
            except UserError as error:
                warn(str(error))
                continue
            if drawn.unread:
                warn(f"The text encoder of {drawer.name} does not read {drawn.unread!r}, the end of the prompt.")
            shown[2 * n : 2 * n + 2] = _values(drawn)
            yield shown
        if visit.left:  # images may have been written since
            visit.forget()
        yield shown


def _values(drawn: Drawn) -> list[Any]:
    return [[(str(file), text) for file, text in zip(drawn.files, drawn.captions, strict=True)], str(drawn.strip)]


def form_page(drawers: Sequence[Drawer], root: Path) -> tuple[gr.Blocks, Visits]:
    """The page of some runs with the same form, and its visitors.

    Args:
        drawers: the runs.
        root: the folder of the visitors' folders.

    Raises:
        ConfigError: runs without a common form.
    """
    form = common_form(drawers)
    with blocks([drawer.name for drawer in drawers]) as page:
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                fields = _fields(form)
                with gr.Row():
                    start, stop = gr.Button("Draw", variant="primary", min_width=80), gr.Button("Stop", min_width=80)
            shown: list[Any] = []
            for drawer in drawers:
                with gr.Column(scale=3 if len(drawers) == 1 else 2):
                    shown += _outputs(drawer.name)
        handlers = FormHandlers(drawers, form, list(fields), root)
        start.click(handlers.draw, list(fields.values()), shown, **GENERATES)
        stop.click(handlers.stop, **AT_ONCE)
        page.unload(handlers.leave)
    return page, handlers.visits


def _outputs(run: str) -> list[Any]:
    """Images and strip below the name of their run, which a label would write over them."""
    gr.HTML(f"<h3>{escape(run)}</h3>")
    options: dict[str, Any] = {"show_label": False, "buttons": ["download", "fullscreen"]}
    return [
        gr.Gallery(label="Images", columns=4, object_fit="contain", elem_classes="pictures", **options),
        gr.Image(label="From noise to image", interactive=False, elem_classes="strip", **options),
    ]


def _fields(form: Form) -> dict[str, Any]:
    """The form's fields by the key of `mmlab sample` that each gives."""
    fields: dict[str, Any] = {}
    if form.reads == "class":
        fields["label"] = gr.Dropdown(form.classes, multiselect=True, label="Classes", info="None: all in turn")
    elif form.reads == "text":
        fields["prompt"] = gr.Textbox(label="Prompt", lines=2)
    fields["count"] = gr.Slider(1, MOST, 8, step=1, label="Images")
    fields["seed"] = gr.Number(0, precision=0, minimum=0, label="Seed", info="Of the first image; the next count up")
    if form.samplers:
        fields["sampler"] = gr.Dropdown(form.samplers, value=form.settings["sampler"], label="Sampler")
    for name, label, whole in (
        ("steps", "Steps", True),
        ("guidance", "Guidance", False),
        ("temperature", "Temperature", False),
        ("top_k", "Top k", True),
        ("top_p", "Top p", False),
    ):
        if name in form.settings and not (name == "guidance" and form.reads == "none"):
            precision = 0 if whole else None
            fields[name] = gr.Number(
                form.settings[name], precision=precision, minimum=0, label=label, elem_classes=name
            )
    if len(form.sizes) > 1:
        names = [" × ".join(map(str, size if isinstance(size, list) else [size, size])) for size in form.sizes]
        fields["size"] = gr.Dropdown(names, value=names[0], type="index", label="Size", info="Height × width in pixels")
    return fields
