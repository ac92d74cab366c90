"""The page: what lies where, and what happens when."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from ..cli.renderers import Method
from .files import new_visitor_folder
from .lens import LensControls
from .notes import notes_of_this_request
from .renderers import Renderers
from .sample import NO_SAMPLE
from .scenes import MAP_SUFFIXES, Sources, Unit
from .session import Visitor

INTRODUCTION = """# bokehdiff
Drop a photograph, **click on what shall be in focus**, open the aperture."""

FAST, CHOSEN = "fast", "chosen"
"""Queues: one picture at a time is computed in each, and clicks do not wait for large pictures."""

SETTLED_S = 0.4
"""So long nothing newer is asked for before the chosen renderer starts: sliders ask many times."""

# How old files get in seconds, and how often that is looked at.
FILES_LIVE_S, CLEANED_EVERY_S = 7200, 600


def build_page(renderers: Renderers, folder: Path, sample: Sources | None) -> gr.Blocks:
    """Returns the page.

    Args:
        renderers: what makes disparity and blur, for all visitors.
        folder: the page's folder.
        sample: the photograph that it starts with.
    """
    settings = renderers.settings
    labels = [choice.label for choice in settings.choices]
    with gr.Blocks(
        title="bokehdiff", analytics_enabled=False, delete_cache=(CLEANED_EVERY_S, FILES_LIVE_S)
    ) as page:
        visitor = gr.State(None, delete_callback=_forget)
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            with gr.Column(scale=3):
                picture = gr.Image(
                    label="The picture: click to focus", show_label=False, type="filepath",
                    interactive=False, elem_id="picture", buttons=["fullscreen"],
                )  # fmt: skip
                said = gr.Textbox(
                    "", label="What is shown", interactive=False, lines=2, elem_id="said"
                )
                with gr.Tab("Before and after"):
                    compared = gr.ImageSlider(
                        label="The photograph, and as it is shown above", show_label=False,
                        type="filepath", interactive=False, elem_id="compared",
                        buttons=["fullscreen"],
                    )  # fmt: skip
                with gr.Tab("Circles of confusion"):
                    gr.Markdown("Green in focus, blue in front, red behind.")
                    overlay = gr.Image(
                        label="Circles of confusion", show_label=False, type="filepath",
                        interactive=False, elem_id="overlay", buttons=["fullscreen"],
                    )  # fmt: skip
                with gr.Tab("Focus pull"):
                    with gr.Row():
                        seconds = gr.Slider(1, 4, 2, step=0.5, label="Seconds")
                        pull = gr.Button("Pull from the focus before to this one", elem_id="pull")
                    film = gr.Video(
                        label="Focus pull (fast renderer, preview size)", interactive=False,
                        elem_id="film",
                    )  # fmt: skip
            with gr.Column(scale=2, min_width=300):
                with gr.Row():
                    photo = gr.File(label="Photograph", height=140, elem_id="photo")
                    map_file = gr.File(
                        label="Disparity (else it is estimated)", height=140, elem_id="disparity",
                        file_types=list(MAP_SUFFIXES),
                    )  # fmt: skip
                unit = gr.Radio(
                    [one.value for one in Unit], value=Unit.unit_range.value,
                    label="Unit of the disparity file", elem_id="unit",
                )  # fmt: skip
                f_number = gr.Slider(
                    1, 16, LensControls.f_number, step=0.1, label="f-number", elem_id="f_number",
                    info="smaller: more blur",
                )  # fmt: skip
                focal_length = gr.Slider(
                    14, 200, LensControls.focal_length_mm, step=1,
                    label="Focal length, mm (full frame)",
                )  # fmt: skip
                distance = gr.Slider(
                    0.3, 20, LensControls.subject_distance_m, step=0.1,
                    label="Distance of the main subject, m",
                    info="the nearest large thing near the centre",
                )  # fmt: skip
                strength = gr.Textbox(label="Blur", interactive=False, lines=2, elem_id="strength")
                method = gr.Dropdown(
                    labels, value=labels[0], label="Renderer", elem_id="method",
                    info="A fast preview follows each click; this one then takes its place.",
                )  # fmt: skip
                blades = gr.Radio(
                    [("circle", 0), "5", "6", "7", "8", "9"], value=0, label="Aperture blades",
                    info="for the classical renderers", interactive=False, elem_id="blades",
                )  # fmt: skip
                cat_eye = gr.Slider(
                    0, 1, 0, step=0.05, label="Cat-eye", interactive=False,
                    info="for the classical renderers", elem_id="cat_eye",
                )  # fmt: skip
                with gr.Accordion("Focus without a mouse", open=False), gr.Row():
                    x = gr.Number(0, label="Column", precision=0, minimum=0)
                    y = gr.Number(0, label="Row", precision=0, minimum=0)
                    here = gr.Button("Focus here")
                full = gr.Button("Render at full size", variant="primary", elem_id="full")
                download = gr.DownloadButton("Download", interactive=False, elem_id="download")

        controls = [f_number, focal_length, distance, blades, cat_eye, method]
        shown = [visitor, picture, compared, overlay, said, strength]

        def lens_of(*values: Any) -> LensControls:
            f, focal, metres, sides, vignetting, chosen = values
            if not settings.choice(chosen).shapes_openings:
                sides = vignetting = 0
            return LensControls(f, focal, metres, int(sides), vignetting)

        def fast_preview(guest: Visitor, values: tuple[Any, ...], notes: list[str]) -> Any:
            """The picture that follows at once, beside what is known without rendering."""
            started = time.perf_counter()
            guest.request += 1
            guest.awaited = None
            lens, choice = lens_of(*values), settings.choice(values[-1])
            path = guest.preview(renderers, lens)
            took = time.perf_counter() - started
            name = "BokehFlow" if lens.aperture() is None else "scatter"
            said_now = f"{name}, {took:.2f} s at preview size."
            if not _is_the_fast_one(choice.method, lens):
                guest.awaited = lens, choice
                said_now = (
                    f"Fast preview by {name}, {took:.2f} s; the picture by {choice.name} follows."
                )
            return {
                visitor: guest,
                picture: path,
                compared: (guest.show(guest.opened().photo.image), path),
                overlay: guest.overlay(lens),
                strength: _strength_in_words(guest, lens),
                said: " ".join([said_now, f"In focus: {_focus_in_words(guest)}.", *notes]),
            }

        def opened(guest: Visitor | None, sources: Sources, values: tuple[Any, ...]) -> Any:
            guest = guest or Visitor(new_visitor_folder(folder))

            def work(notes: list[str]) -> Any:
                scene = guest.open(sources, renderers)
                guest.remarks = [*notes]
                return fast_preview(guest, values, notes) | {
                    distance: gr.update(interactive=not scene.metric),
                    download: gr.update(value=None, interactive=False, label="Download"),
                    film: None,
                }

            # The visitor stays one, whatever became of the file.
            return {visitor: guest} | _answered(work, guest, said)

        def start(guest: Visitor | None, *values: Any) -> Any:
            if sample is None:
                return {visitor: guest, said: NO_SAMPLE}
            return opened(guest, sample, values)

        def photo_dropped(guest: Visitor | None, file: str, *values: Any) -> Any:
            return opened(guest, Sources(Path(file)), values) | {photo: None}

        def map_dropped(guest: Visitor | None, file: str, unit_now: str, *values: Any) -> Any:
            if guest is None or guest.dropped is None:
                return {map_file: None, said: "There is no photograph yet; drop one first."}
            sources = Sources(guest.dropped.photo, Path(file), Unit(unit_now))
            return opened(guest, sources, values) | {map_file: None}

        def unit_changed(guest: Visitor | None, unit_now: str, *values: Any) -> Any:
            """The map that was dropped last, read in this unit."""
            sources = None if guest is None else guest.dropped
            if sources is None or sources.disparity is None or sources is sample:
                return gr.skip()
            return opened(guest, replace(sources, unit=Unit(unit_now)), values)

        def refocused(
            guest: Visitor | None, values: tuple[Any, ...], point: tuple[float, float] | None
        ) -> Any:
            def work(notes: list[str]) -> Any:
                someone = _known(guest)
                if point is not None:
                    someone.focus(*point)
                someone.remarks = []
                return fast_preview(someone, values, notes)

            return _answered(work, guest, said)

        def clicked(guest: Visitor | None, event: gr.SelectData, *values: Any) -> Any:
            column, row = event.index
            return refocused(guest, values, (column, row)) | {x: column, y: row}

        def focused(guest: Visitor | None, column: float, row: float, *values: Any) -> Any:
            return refocused(guest, values, (column, row))

        def changed(guest: Visitor | None, *values: Any) -> Any:
            return refocused(guest, values, None)

        def by_chosen(guest: Visitor | None) -> Any:
            """The chosen renderer's picture in the place of the newest fast one, if still wanted.

            What is wanted is asked of the visitor when the work starts: it may be newer by then.
            """
            if guest is None or guest.awaited is None:
                return gr.skip()
            request = guest.request
            time.sleep(SETTLED_S)
            if guest.request != request or guest.awaited is None:
                return gr.skip()  # what is newer comes here too
            (lens, choice), guest.awaited = guest.awaited, None

            def work(notes: list[str]) -> Any:
                started = time.perf_counter()
                path = guest.chosen_preview(renderers, lens, choice)
                took = time.perf_counter() - started
                if guest.request != request:
                    return gr.skip()
                said_now = f"{choice.name}, {took:.1f} s at preview size."
                remarks = dict.fromkeys([*guest.remarks, *notes])
                return {
                    picture: path,
                    compared: (guest.show(guest.opened().photo.image), path),
                    said: " ".join([said_now, f"In focus: {_focus_in_words(guest)}.", *remarks]),
                }

            return _answered(work, guest, said)

        def method_changed(chosen: str) -> Any:
            possible = settings.choice(chosen).shapes_openings
            return [gr.update(interactive=possible) for _ in range(2)]

        def at_full_size(guest: Visitor | None, *values: Any) -> Any:
            def work(notes: list[str]) -> Any:
                started = time.perf_counter()
                someone, lens, choice = _known(guest), lens_of(*values), settings.choice(values[-1])
                someone.opened()
                # The focus may move on meanwhile, so the button tells what it holds.
                label = f"Download: {choice.name}, f/{lens.f_number:g}, {_focus_in_words(someone)}"
                path = someone.full_size(renderers, lens, choice)
                took = time.perf_counter() - started
                ready = f"{path.name} is ready to be downloaded ({took:.1f} s)."
                return {
                    download: gr.update(value=path, interactive=True, label=label),
                    said: " ".join([ready, *notes]),
                }

            return _answered(work, guest, said)

        def pulled(guest: Visitor | None, length: float, *values: Any) -> Any:
            def work(notes: list[str]) -> Any:
                path = _known(guest).film(renderers, lens_of(*values), length)
                return {film: path, said: " ".join(["The focus pull is ready.", *notes])}

            return _answered(work, guest, said)

        # Of what is asked for while a picture is made, the last is made next; files are all taken.
        quick = {
            "concurrency_id": FAST, "concurrency_limit": 1, "show_progress": "minimal",
            "trigger_mode": "always_last",
        }  # fmt: skip
        files = {**quick, "trigger_mode": "multiple"}
        slow = {"concurrency_id": CHOSEN, "concurrency_limit": 1}
        everything = [*shown, distance, download, film]

        def then_by_chosen(event: Any) -> None:
            event.then(
                by_chosen, visitor, [picture, compared, said], trigger_mode="always_last",
                show_progress="hidden", api_visibility="private", **slow,
            )  # fmt: skip

        then_by_chosen(
            page.load(start, [visitor, *controls], everything, api_name="start", **quick)
        )
        then_by_chosen(
            photo.upload(
                photo_dropped, [visitor, photo, *controls], [*everything, photo],
                api_name="photo", **files,
            )
        )  # fmt: skip
        then_by_chosen(
            map_file.upload(
                map_dropped, [visitor, map_file, unit, *controls], [*everything, map_file],
                api_name="disparity", **files,
            )
        )  # fmt: skip
        then_by_chosen(
            unit.input(
                unit_changed, [visitor, unit, *controls], everything,
                api_visibility="private", **quick,
            )
        )  # fmt: skip
        then_by_chosen(
            picture.select(
                clicked, [visitor, *controls], [*shown, x, y], api_visibility="private", **quick
            )
        )
        then_by_chosen(
            here.click(focused, [visitor, x, y, *controls], shown, api_name="focus", **quick)
        )
        for control in (f_number, focal_length, distance, cat_eye):
            then_by_chosen(
                control.change(
                    changed, [visitor, *controls], shown, api_visibility="private", **quick
                )
            )
        method.input(method_changed, method, [blades, cat_eye], api_visibility="private")
        for control in (method, blades):
            then_by_chosen(
                control.input(
                    changed, [visitor, *controls], shown, api_visibility="private", **quick
                )
            )
        full.click(at_full_size, [visitor, *controls], [download, said], api_name="full", **slow)
        pull.click(pulled, [visitor, seconds, *controls], [film, said], api_name="pull", **slow)
    page.queue(max_size=128, default_concurrency_limit=1)
    return page


def _answered(
    work: Callable[[list[str]], dict[Any, Any]], guest: Visitor | None, said: gr.Textbox
) -> dict[Any, Any]:
    """What the work updates, or the sentence that says why it could not be done."""
    with notes_of_this_request() as notes, torch.inference_mode():
        try:
            return work(notes)
        except (ValueError, OSError, ImportError) as mistake:
            sentence = " ".join(str(mistake).split())
            if guest is not None:
                guest.remarks = [sentence]
            return {said: sentence}


def _known(guest: Visitor | None) -> Visitor:
    if guest is None:
        raise ValueError("There is no photograph yet; drop one first.")
    return guest


def _is_the_fast_one(method: Method, lens: LensControls) -> bool:
    return method is (Method.flow if lens.aperture() is None else Method.scatter)


def _focus_in_words(guest: Visitor) -> str:
    if not guest.opened().metric:
        return f"disparity {guest.df:.3g}"
    metres = math.inf if guest.df == 0 else 1 / guest.df
    return f"{metres:.3g} m"


def _strength_in_words(guest: Visitor, lens: LensControls) -> str:
    scene = guest.opened()
    setting = guest.lens(lens)
    scale = max(scene.size) / max(scene.preview_size)
    widest = float(setting.signed_defocus(scene.disparity).abs().max()) * scale
    K = float(setting.K) * scale
    unit = "1/metre" if scene.metric else "unit of disparity"
    return f"K = {K:.3g} px of radius per {unit}; the widest circle has a radius of {widest:.3g} px"


def _forget(guest: Visitor | None) -> None:
    """Deletes what a visitor was shown, some time after the tab was closed."""
    if guest is not None:
        shutil.rmtree(guest.folder, ignore_errors=True)
