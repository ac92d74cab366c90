"""The page as a server, with nothing from outside and nothing left behind."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import Any

from .settings import PageSettings

VISITORS_KEPT = 200


def serve(
    settings: PageSettings, host: str | None = None, port: int | None = None, block: bool = True
) -> tuple[Any, str]:
    """Starts the page; returns it and its address once it answers, or is stopped.

    Args:
        settings: models and limits.
        host: address to listen at; None: $GRADIO_SERVER_NAME, or this computer alone.
        port: None: $GRADIO_SERVER_PORT, or the first free one from 7860.
        block: serve until the process is interrupted.

    Raises:
        ValueError: gradio is missing, the device cannot be used, or the depth model cannot be
            loaded.
        OSError: the port is taken.
    """
    # Read when gradio makes its parts; a folder of this process alone, deleted at its end.
    kept = tempfile.TemporaryDirectory(prefix="bokehdiff-page-", ignore_cleanup_errors=True)
    folder = Path(os.path.realpath(kept.name))
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio as gr
        from starlette.middleware import Middleware
    except ImportError:
        raise ValueError("The page needs gradio: pip install 'bokehdiff[app]'.") from None
    from ..cli.renderers import usable_device
    from .files import OnlyFilesOfVisitors
    from .notes import send_warnings_to_their_requests
    from .page import build_page
    from .renderers import Renderers
    from .sample import write_sample
    from .scenes import Sources, Unit

    if block:  # how services are stopped, which would leave the folder behind

        def stop(*_: object) -> None:
            kept.cleanup()
            os._exit(128 + signal.SIGTERM)

        signal.signal(signal.SIGTERM, stop)
    renderers = Renderers(settings, usable_device(settings.device))
    if settings.depth_model is not None:
        renderers.depth_estimator()
    renderers.fast(None)
    send_warnings_to_their_requests()
    files = write_sample(folder / "sample")
    sample = None if files is None else Sources(*files, unit=Unit.any_range)
    page = build_page(renderers, folder, sample)
    page.temporary_folder = kept  # lives as long as the page
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        max_file_size=settings.largest_upload_mb * 2**20,
        allowed_paths=[],
        state_session_capacity=VISITORS_KEPT,
        app_kwargs={"middleware": [Middleware(OnlyFilesOfVisitors, folder=folder)]},
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        share=False,
        ssr_mode=False,
    )
    if block:
        print(f"The page is at {address} (Ctrl-C stops it).", flush=True)
        page.block_thread()
    return page, address
