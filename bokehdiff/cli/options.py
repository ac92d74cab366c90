"""Options that several verbs share, and what their texts mean."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .speech import Mistake

if TYPE_CHECKING:
    import torch

    from ..camera import Camera
    from ..lens import LensSetting

Photos = Annotated[
    list[Path],
    typer.Argument(metavar="PHOTO", help="One or more photographs.", show_default=False),
]
PictureOrFolder = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="OUT",
        help="The file to write; for several photographs a folder, created if missing.",
        show_default=False,
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        "--K",
        help="Blur strength: pixels of blur radius per unit of disparity; 0 is none. Default: 20, "
        "or what the camera gives.",
        show_default=False,
    ),
]
FNumber = Annotated[
    float | None,
    typer.Option(
        help="f-number of the lens, for instance 1.4. This and the following options of the camera "
        "take the place of --K; what is not given is taken from the EXIF data of the photograph.",
        show_default=False,
    ),
]
FocalLength = Annotated[
    float | None,
    typer.Option(metavar="MM", help="Real focal length in mm.", show_default=False),
]
FocalLength35mm = Annotated[
    float | None,
    typer.Option(
        "--focal-length-35mm",
        metavar="MM",
        help="Focal length as a 35 mm equivalent, in mm.",
        show_default=False,
    ),
]
SensorWidth = Annotated[
    float | None,
    typer.Option(
        metavar="MM", help="Long side of the sensor in mm. Default: 36.", show_default=False
    ),
]
FocusDistance = Annotated[
    float | None,
    typer.Option(
        metavar="M",
        help="Distance of what is in focus, in metres. It ties a map without a unit to the world.",
        show_default=False,
    ),
]
FarthestDistance = Annotated[
    float | None,
    typer.Option(
        metavar="M",
        help="Distance of disparity 0, in metres. Default: infinity.",
        show_default=False,
    ),
]
Metric = Annotated[
    bool, typer.Option("--metric", help="The disparity map is in 1/metres; so are --df and others.")
]
Normalise = Annotated[
    bool,
    typer.Option(
        "--normalise/--no-normalise",
        help="Stretch each disparity map to [0, 1] first: for stereo pixels and other units. --df, "
        "--K and --fringe then refer to the stretched map.",
    ),
]
Invalid = Annotated[
    float | None,
    typer.Option(
        help="The number in the disparity file that marks unknown pixels (often 0); they are "
        "filled from the farther side, as NaN and infinity always are.",
        show_default=False,
    ),
]
DepthModel = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Model that estimates the disparity where --disparity is not given: folder or hub id. "
        "Default: depth-anything/Depth-Anything-V2-Small-hf.",
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Model folder or hub id. Default: the small model inside the package.",
        show_default=False,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        metavar="FOLDER",
        help="Adapters trained for that --model: folder or hub id.",
        show_default=False,
    ),
]
Tiles = Annotated[
    str,
    typer.Option(
        "--tiling",
        metavar="TILES",
        help="How large photographs are cut for --method model: auto, none, official (the authors' "
        "tiles) or the side of a window in pixels.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, ...  Default: cuda if there is one.", show_default=False),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite results that exist.")]


def parse_numbers(text: str, option: str, example: str) -> list[float]:
    """The numbers of an option that takes several, with commas between them."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise Mistake(
            f"{option} is {text!r}; wanted numbers with commas between them, for instance {option} "
            f"{example}."
        ) from None


def parse_focus(text: str, option: str = "--focus") -> Any:
    """A pixel, a box or a word for :func:`bokehdiff.focus.find_focus`."""
    if text in ("auto", "sharpest"):
        return text
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) not in (2, 4):
        raise Mistake(
            f"{option} is {text!r}; wanted column and row of a pixel, for instance {option} "
            f"512,300, a box X0,Y0,X1,Y1, or one of the words auto and sharpest."
        )
    return numbers


def parse_range(text: str) -> tuple[float, float]:
    """Two disparities from --focus-range."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise Mistake(
            f"--focus-range is {text!r}; wanted two disparities, for instance --focus-range "
            "0.4,0.6."
        ) from None
    return low, high


def parse_tiling(text: str) -> Any:
    """The value of ``tiling=`` that --tiling stands for."""
    if text.isdecimal():
        return int(text)
    return None if text == "none" else text


@dataclass(frozen=True)
class LensOptions:
    """What the command line says about focus and blur; :meth:`choose` applies it to a picture."""

    df: float | None = None
    focus: Any = None
    focus_range: tuple[float, float] | None = None
    whole_subject: bool = False
    strength: float | None = None
    f_number: float | None = None
    focal_length_mm: float | None = None
    focal_length_35mm: float | None = None
    sensor_width_mm: float | None = None
    focus_distance_m: float | None = None
    farthest_distance_m: float | None = None
    metric: bool = False

    @property
    def has_camera(self) -> bool:
        """Whether any option describes the camera."""
        parts = (
            self.f_number,
            self.focal_length_mm,
            self.focal_length_35mm,
            self.sensor_width_mm,
            self.focus_distance_m,
            self.farthest_distance_m,
        )
        return any(part is not None for part in parts)

    def check(self) -> None:
        """Refuses options that do not go together, before anything is read."""
        from ..optics import check_focus_and_strength

        given = {
            "--df": self.df is not None,
            "--focus": self.focus is not None,
            "--focus-range": self.focus_range is not None,
        }
        names = [name for name, is_given in given.items() if is_given]
        if len(names) != 1:
            came = f"{' and '.join(names)} were given" if names else "none of them was given"
            raise Mistake(
                "Which plane is in focus is said by one of --df, --focus (or --focus-mask) and "
                f"--focus-range; {came}."
            )
        if self.whole_subject and self.focus is None:
            raise Mistake("--whole-subject goes with --focus X0,Y0,X1,Y1 or --focus-mask.")
        if self.strength is not None and self.has_camera:
            raise Mistake("--K and options of a camera both came; the blur is said by one of them.")
        check_focus_and_strength(
            0.0 if self.df is None else self.df,
            0.0 if self.strength is None else self.strength,
            batch_size=1,
            metric=self.metric,
        )

    def camera(self, photo: Path) -> Camera | None:
        """The camera that the options and the photograph describe, if it is asked for."""
        if not self.has_camera:
            return None
        from ..camera import Camera

        return Camera.from_photo(
            photo,
            f_number=self.f_number,
            focal_length_mm=self.focal_length_mm,
            focal_length_35mm=self.focal_length_35mm,
            sensor_width_mm=self.sensor_width_mm,
        )

    def choose(
        self, photo: Path, image: torch.Tensor, disparity: torch.Tensor, metric: bool
    ) -> LensSetting:
        """Focus and blur for one photograph.

        Args:
            photo: its file.
            image: (1, 3, H, W) display-encoded.
            disparity: (1, 1, H, W), checked.
            metric: whether it is in 1/metres.
        """
        from ..lens import choose_lens

        return choose_lens(
            disparity,
            df=self.df,
            K=self.strength,
            focus=self.focus,
            focus_range=self.focus_range,
            whole_subject=self.whole_subject,
            camera=self.camera(photo),
            focus_distance_m=self.focus_distance_m,
            farthest_distance_m=(
                math.inf if self.farthest_distance_m is None else self.farthest_distance_m
            ),
            metric=metric,
            image=image,
        )
