"""The networks of the page, each loaded when it is first needed and shared by all visitors."""

from __future__ import annotations

import threading

from ..cli.disparities import depth_estimator
from ..cli.renderers import Method, Prepare, load_renderer
from ..depth import DepthEstimator
from ..rendering import Aperture
from .settings import Choice, PageSettings


class Renderers:
    """What makes disparity and blur.

    The fast previews have a network of their own, so that they need not wait for a large picture.

    Args:
        settings: those of the page.
        device: to compute on.
    """

    def __init__(self, settings: PageSettings, device: str) -> None:
        self.settings = settings
        self.device = device
        self._networks: dict[str, Prepare] = {}
        self._depth: DepthEstimator | ValueError | None = None
        self._lock = threading.Lock()

    def fast(self, aperture: Aperture | None) -> Prepare:
        """What makes the previews that follow the clicks: BokehFlow, or scatter for shapes."""
        if aperture is not None:
            return load_renderer(Method.scatter, self.device, aperture=aperture)
        return self._network("fast", Method.flow, None)

    def chosen(self, choice: Choice, aperture: Aperture | None) -> Prepare:
        """What a visitor has chosen.

        Raises:
            ValueError, OSError: the model cannot be loaded.
        """
        if choice.shapes_openings:
            return load_renderer(choice.method, self.device, aperture=aperture)
        return self._network(choice.label, choice.method, choice.model)

    def depth_estimator(self) -> DepthEstimator:
        """The model that estimates disparity; it keeps nothing of what visitors bring on disk.

        Raises:
            ValueError: it cannot be loaded. That is not tried twice.
        """
        with self._lock:
            if self._depth is None:
                try:
                    self._depth = depth_estimator(self.settings.depth_model, self.device)
                    self._depth.cache = None
                except ValueError as error:
                    self._depth = error
            if isinstance(self._depth, ValueError):
                raise ValueError(str(self._depth))
            return self._depth

    def _network(self, name: str, method: Method, model: str | None) -> Prepare:
        with self._lock:
            if name not in self._networks:
                self._networks[name] = load_renderer(method, self.device, model=model)
            return self._networks[name]
