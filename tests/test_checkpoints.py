"""Trained weights in files: both layouts, other spellings, damage, mistakes."""

from __future__ import annotations

import functools
import json
import os
import pickle
import resource
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bokehdiff.attention import PisaConfig
from bokehdiff.checkpoints import (
    LAYOUTS,
    LORA_FILE,
    OFFICIAL_VAE_FILE,
    UNET_LORA_TARGETS,
    VAE_FILE,
    VAE_TRAINED_PARTS,
    BokehWeights,
    adapter_shapes,
    check_adapter,
    codec_parameters,
    official_settings,
    read_bokeh_weights,
    write_bokeh_weights,
)
from tests.tiny_models import tiny_unet, tiny_vae

RANK = 4
SETTINGS = {
    "pisa": PisaConfig.preset("paper").replace(segments=3).to_dict(),
    "timestep": 399,
    "prompt": "é, and a wide aperture",
    "pisa_layers": "down_blocks.1.attentions.0",
}


def config(targets: Any = UNET_LORA_TARGETS, **changes: Any) -> dict[str, Any]:
    values = {"r": RANK, "lora_alpha": RANK, "target_modules": list(targets), **changes}
    return LoraConfig(**values).to_dict()


def random_tensors(
    shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()
    }


VAE_TARGETS = ["encoder.conv_in", "encoder.mid_block.attentions.0.to_q"]


@functools.cache
def all_shapes() -> tuple[dict[str, tuple[int, ...]], ...]:
    """Of adapters of the UNet, trained parameters of the codec, and adapters in it."""
    codec = tiny_vae()
    return (
        adapter_shapes(tiny_unet(), LoraConfig(**config())),
        {name: tuple(value.shape) for name, value in codec_parameters(codec).items()},
        adapter_shapes(codec, LoraConfig(**config(VAE_TARGETS))),
    )


def weights(
    vae: bool = True, vae_lora: bool = False, dtype: torch.dtype = torch.float32
) -> BokehWeights:
    """A set of random weights for the tiny networks."""
    unet_shapes, vae_shapes, vae_lora_shapes = all_shapes()
    return BokehWeights(
        unet_lora=random_tensors(unet_shapes, 0, dtype),
        vae=random_tensors(vae_shapes, 1, dtype) if vae else {},
        vae_lora=random_tensors(vae_lora_shapes, 2, dtype) if vae_lora else {},
        unet_lora_config=config(),
        vae_lora_config=config(VAE_TARGETS) if vae_lora else None,
        settings=SETTINGS,
    )


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


# -- Out and in ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vae", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_read(
    tmp_path: Path, layout: str, vae: bool, dtype: torch.dtype
) -> None:
    written = weights(vae, dtype=dtype)
    write_bokeh_weights(written, tmp_path / "new" / "folder", layout)
    read = read_bokeh_weights(tmp_path / "new" / "folder")
    assert_same(read.unet_lora, written.unet_lora)
    assert_same(read.vae, written.vae)
    assert read.vae_lora == {} and read.vae_lora_config is None
    assert read.settings == SETTINGS
    assert read.unet_lora_config is not None
    assert LoraConfig(**read.unet_lora_config) == LoraConfig(**written.unet_lora_config)
    vae_file = VAE_FILE if layout == "diffusers" else OFFICIAL_VAE_FILE
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == sorted(
        [LORA_FILE, *([vae_file] if vae else [])]
    )


def test_adapters_of_the_codec_are_written_and_read(tmp_path: Path) -> None:
    written = weights(vae=False, vae_lora=True)
    write_bokeh_weights(written, tmp_path)
    read = read_bokeh_weights(tmp_path)
    assert_same(read.vae_lora, written.vae_lora)
    assert_same(read.unet_lora, written.unet_lora)
    assert read.vae_lora_config is not None and written.vae_lora_config is not None
    assert set(read.vae_lora_config["target_modules"]) == written.vae_lora_config["target_modules"]
    assert not read.vae


def test_names_in_the_files(tmp_path: Path) -> None:
    written = weights()
    for layout in LAYOUTS:
        write_bokeh_weights(written, tmp_path / layout, layout)
    ours = load_file(tmp_path / "diffusers" / LORA_FILE)
    assert_same(ours, {f"unet.{name}": value for name, value in written.unet_lora.items()})
    assert_same(load_file(tmp_path / "diffusers" / VAE_FILE), written.vae)
    assert_same(load_file(tmp_path / "official" / LORA_FILE), written.unet_lora)
    # As the authors' reader opens it: a plain dictionary, nothing but tensors.
    codec = torch.load(tmp_path / "official" / OFFICIAL_VAE_FILE, weights_only=True)
    assert type(codec) is dict
    assert_same(codec, written.vae)
    with safe_open(tmp_path / "diffusers" / LORA_FILE, framework="pt") as file:
        header = file.metadata()
    assert header["format"] == "pt"
    assert json.loads(header["lora_adapter_metadata"])["unet.r"] == RANK
    assert json.loads(header["bokehdiff"])["timestep"] == 399


def test_without_a_configuration_none_is_read(tmp_path: Path) -> None:
    written = weights()
    written.unet_lora_config = None
    for layout in LAYOUTS:
        write_bokeh_weights(written, tmp_path / layout, layout)
        assert read_bokeh_weights(tmp_path / layout).unet_lora_config is None


def test_tensors_that_are_read_lie_where_torch_puts_its_own(tmp_path: Path) -> None:
    # Matrix products round by how their operands are aligned, and equal weights shall render alike.
    write_bokeh_weights(weights(), tmp_path)
    read = read_bokeh_weights(tmp_path)
    tensors = [*read.unet_lora.values(), *read.vae.values()]
    assert {value.data_ptr() % 64 for value in tensors} == {torch.empty(5).data_ptr() % 64} == {0}


def test_views_are_written_without_what_they_look_at(tmp_path: Path) -> None:
    written = weights()
    flat = torch.zeros(1_000_000)
    written.vae = {"encoder.conv_in.bias": flat[:8]}
    write_bokeh_weights(written, tmp_path, "official")
    assert (tmp_path / OFFICIAL_VAE_FILE).stat().st_size < 10_000


def test_alpha_goes_into_b_where_the_layout_has_no_place_for_it(tmp_path: Path) -> None:
    written = weights()
    layer, other = "mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2"
    written.unet_lora_config = config(lora_alpha=2 * RANK, alpha_pattern={layer: RANK / 4})
    write_bokeh_weights(written, tmp_path, "official")
    read = read_bokeh_weights(tmp_path)
    for name, scale in ((layer, 1 / 4), (other, 2)):
        a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        assert torch.equal(read.unet_lora[a], written.unet_lora[a])
        assert torch.equal(read.unet_lora[b], scale * written.unet_lora[b])
    assert read.unet_lora_config is not None
    assert read.unet_lora_config["lora_alpha"] == RANK
    assert read.unet_lora_config["alpha_pattern"] == {}


def test_files_of_an_earlier_set_do_not_stay(tmp_path: Path) -> None:
    write_bokeh_weights(weights(), tmp_path, "official")
    write_bokeh_weights(weights(), tmp_path, "diffusers")
    assert sorted(os.listdir(tmp_path)) == sorted([LORA_FILE, VAE_FILE])
    write_bokeh_weights(weights(vae=False), tmp_path, "official")
    assert os.listdir(tmp_path) == [LORA_FILE]
    assert not read_bokeh_weights(tmp_path).vae


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_full_disk_leaves_the_former_files(tmp_path: Path, layout: str) -> None:
    write_bokeh_weights(weights(), tmp_path, layout)
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        with pytest.raises(Exception, match="(?i)large|write|I/O|unexpected"):
            write_bokeh_weights(weights(vae=False), tmp_path, layout)
        with pytest.raises(Exception, match="(?i)large|write|I/O|unexpected"):
            write_bokeh_weights(weights(), tmp_path, layout)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == before


# -- Other spellings, and the authors' own files -------------------------------------------------

SPELLINGS: dict[str, Callable[[str], str]] = {
    "prefix of the part": lambda name: f"unet.{name}",
    "prefix of peft": lambda name: f"base_model.model.{name}",
    "both": lambda name: f"unet.base_model.model.{name}",
    "both, turned": lambda name: f"base_model.model.unet.{name}",
    "name of an adapter": lambda name: name.replace(".weight", ".default_0.weight"),
    "prefixes and a name": lambda name: (
        "base_model.model.unet." + name.replace(".weight", ".bokehdiff.weight")
    ),
    "down, up and a name": lambda name: (
        "unet."
        + name.replace("lora_A.", "lora.down.default.").replace("lora_B.", "lora.up.default.")
    ),
    "down and up": lambda name: name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
    "down and up in one word": lambda name: (
        "unet." + name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings_mean_the_same(tmp_path: Path, spelling: str) -> None:
    written = weights(vae=False)
    save_file(
        {SPELLINGS[spelling](name): value for name, value in written.unet_lora.items()},
        tmp_path / LORA_FILE,
        metadata={"bokehdiff": "{}"},
    )
    read = read_bokeh_weights(tmp_path)
    assert_same(read.unet_lora, written.unet_lora)
    assert read.settings == {}


def authors_folder(folder: Path) -> BokehWeights:
    """Two files that say nothing of settings, as the authors' are; rank and alpha are 4 here."""
    written = weights()
    save_file(written.unet_lora, folder / LORA_FILE, metadata={"format": "pt"})
    torch.save(written.vae, folder / OFFICIAL_VAE_FILE)
    return written


def test_files_that_say_nothing_are_the_authors(tmp_path: Path) -> None:
    written = authors_folder(tmp_path)
    read = read_bokeh_weights(tmp_path)
    assert_same(read.unet_lora, written.unet_lora)
    assert_same(read.vae, written.vae)
    assert read.settings == official_settings()
    assert read.settings["pisa"] == PisaConfig.preset("official_weights").to_dict()
    assert read.settings["timestep"] == 499
    # They are complete or refused.
    fitting = check_adapter(read.unet_lora, read.unet_lora_config, tiny_unet())
    assert (fitting.r, fitting.lora_alpha) == (RANK, RANK)
    for matrix in "AB":
        del read.unet_lora[f"mid_block.resnets.0.conv1.lora_{matrix}.weight"]
    with pytest.raises(ValueError, match="missing: mid_block.resnets.0.conv1.lora_A.weight"):
        check_adapter(read.unet_lora, read.unet_lora_config, tiny_unet())


# name: how names are spelt, and a part of the sentence with which they are refused.
WRONG_SPELLINGS: dict[str, tuple[Callable[[str], str], str]] = {
    "of another wrapper": (
        lambda name: f"module.{name}",
        r"missing: \S+lora_A.weight.*not in the model: module.\S+lora_A.weight.*and \d+ more",
    ),
    "of kohya's scripts": (
        lambda name: (
            "lora_unet_"
            + name.partition(".lora_")[0].replace(".", "_")
            + (".lora_down.weight" if "lora_A" in name else ".lora_up.weight")
        ),
        "not in the model: lora_unet_down_blocks_0_",
    ),
    "of a text encoder": (
        lambda name: f"text_encoder.{name}",
        "not in the model: text_encoder.down_blocks.0",
    ),
    "of a text encoder, by kohya's scripts": (
        lambda name: name.replace("down_blocks.0.", "lora_te1_text_model_encoder."),
        "not in the model: lora_te1_text_model_encoder",
    ),
    "of the original layout": (
        lambda name: name.replace("down_blocks.", "input_blocks."),
        "not in the model: input_blocks.",
    ),
}


@pytest.mark.parametrize("spelling", WRONG_SPELLINGS)
@pytest.mark.parametrize("header", [{"format": "pt"}, {"bokehdiff": "{}"}])
def test_names_of_other_layers_are_refused_by_name(
    tmp_path: Path, spelling: str, header: dict[str, str]
) -> None:
    spelt, sentence = WRONG_SPELLINGS[spelling]
    written = weights()
    names = {spelt(name): value for name, value in written.unet_lora.items()}
    save_file(names, tmp_path / LORA_FILE, metadata=header)
    if "bokehdiff" not in header:
        torch.save(written.vae, tmp_path / OFFICIAL_VAE_FILE)
    read = read_bokeh_weights(tmp_path)
    if "bokehdiff" in header:
        # Nothing says which layers are wanted; the model says that these are not there.
        sentence = sentence[sentence.index("not in the model") :]
    with pytest.raises(ValueError, match=sentence):
        check_adapter(read.unet_lora, read.unet_lora_config, tiny_unet())


def test_codecs_in_every_form_that_torch_can_write(tmp_path: Path) -> None:
    written = authors_folder(tmp_path)
    wanted = {name: value.clone() for name, value in written.vae.items()}
    flat = torch.cat([value.flatten() for value in wanted.values()])
    views = dict(zip(wanted, flat.split([value.numel() for value in wanted.values()]), strict=True))
    forms: dict[str, Any] = {
        "parameters": {name: torch.nn.Parameter(value) for name, value in wanted.items()},
        "in order": OrderedDict(wanted),
        "not contiguous": {
            name: value.transpose(0, -1).contiguous().transpose(0, -1)
            for name, value in wanted.items()
        },
        "views of one tensor": {name: views[name].view(one.shape) for name, one in wanted.items()},
    }
    for form, codec in forms.items():
        for zipped in (True, False):
            torch.save(codec, tmp_path / OFFICIAL_VAE_FILE, _use_new_zipfile_serialization=zipped)
            read = read_bokeh_weights(tmp_path).vae
            assert not any(value.requires_grad for value in read.values()), form
            assert_same(read, wanted)
            # What is read can be written in both layouts.
            for layout in LAYOUTS:
                again = BokehWeights(written.unet_lora, read, {}, None, None, {})
                write_bokeh_weights(again, tmp_path / layout, layout)
                assert_same(read_bokeh_weights(tmp_path / layout).vae, wanted)


def test_numbers_that_are_not_of_floating_point(tmp_path: Path) -> None:
    written = weights()
    written.unet_lora["mid_block.resnets.0.conv1.lora_A.weight"] = torch.zeros(
        RANK, 32, 3, 3, dtype=torch.int8
    )
    with pytest.raises(ValueError, match="not in floating point: mid_block.*int8"):
        check_adapter(written.unet_lora, written.unet_lora_config, tiny_unet())


def test_no_pickle_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    authors_folder(tmp_path)
    codec = {"encoder.conv_in.weight": torch.zeros(1), "code": Code()}
    # With which torch.load would run code wherever nobody said otherwise.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for pickled in (True, False):
        for zipped in (True, False):
            if pickled:
                Path(OFFICIAL_VAE_FILE).write_bytes(pickle.dumps(codec))
            else:
                torch.save(codec, OFFICIAL_VAE_FILE, _use_new_zipfile_serialization=zipped)
            with pytest.raises(ValueError, match=f"{OFFICIAL_VAE_FILE}' cannot be read"):
                read_bokeh_weights(tmp_path)
            assert not Path("code-ran").exists()
    # The same file does run code when it is opened carelessly.
    torch.load(OFFICIAL_VAE_FILE, weights_only=False)
    assert Path("code-ran").is_dir()
    # A pickle under the name of a safetensors file is none.
    Path(OFFICIAL_VAE_FILE).replace(LORA_FILE)
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        read_bokeh_weights(tmp_path)


def test_rank_and_alpha_come_from_the_shapes_where_nothing_says_them() -> None:
    tensors = weights().unet_lora
    name = "mid_block.resnets.0.conv1"
    tensors[f"{name}.lora_A.weight"] = torch.zeros(2, 32, 3, 3)
    tensors[f"{name}.lora_B.weight"] = torch.zeros(32, 2, 1, 1)
    found = check_adapter(tensors, None, tiny_unet())
    assert (found.r, found.lora_alpha) == (RANK, RANK)
    assert list(found.rank_pattern.values()) == list(found.alpha_pattern.values()) == [2]


def test_adapter_shapes_are_those_peft_makes() -> None:
    unet = tiny_unet()
    values = config(rank_pattern={"to_q": 2, "mid_block.resnets.0.conv1": 3})
    wanted = adapter_shapes(unet, LoraConfig(**values))
    unet.add_adapter(LoraConfig(**values))
    made = {
        name.replace(".default.", "."): tuple(value.shape)
        for name, value in unet.named_parameters()
        if ".lora_" in name
    }
    assert wanted == made
    # Adapters that are there already change nothing.
    assert adapter_shapes(unet, LoraConfig(**values)) == made


def test_trained_parts_of_the_codec() -> None:
    names = set(codec_parameters(tiny_vae()))
    assert {name for name in names if not name.startswith(VAE_TRAINED_PARTS)} == set()
    assert "encoder.conv_in.weight" in names and "encoder.conv_norm_out.weight" not in names
    codec = tiny_vae()
    codec.add_adapter(LoraConfig(r=2, target_modules=["encoder.conv_in", "to_q"]))
    assert set(codec_parameters(codec)) == names


# -- Mistakes ------------------------------------------------------------------------------------


def cut(folder: Path, file: str, bytes_left: int) -> None:
    content = (folder / file).read_bytes()
    assert bytes_left < len(content)
    (folder / file).write_bytes(content[:bytes_left])


def change_file(folder: Path, **changes: Any) -> None:
    """Rewrites ``LORA_FILE``, with other entries in its header, or another tensor."""
    with safe_open(folder / LORA_FILE, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        header = file.metadata()
    for name, value in changes.items():
        if isinstance(value, torch.Tensor):
            tensors[name.replace("__", ".")] = value
        else:
            header[name] = value
    save_file(tensors, folder / LORA_FILE, metadata=header)


class Code:
    """What must not run when weights are read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("code-ran",)


# name: layout, what is done to the folder, and a part of the sentence.
DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no adapters": ("diffusers", lambda it: (it / LORA_FILE).unlink(), "holds no trained weights"),
    "adapters cut short": ("diffusers", lambda it: cut(it, LORA_FILE, 5000), "damaged"),
    "an empty file": ("diffusers", lambda it: cut(it, LORA_FILE, 0), "damaged"),
    "text for adapters": (
        "official",
        lambda it: (it / LORA_FILE).write_text("404: not found, dear reader"),
        "damaged",
    ),
    "codec cut short": ("diffusers", lambda it: cut(it, VAE_FILE, 5000), "damaged"),
    "codec gone": ("diffusers", lambda it: (it / VAE_FILE).unlink(), f"lacks {VAE_FILE}"),
    "their codec cut short": (
        "official",
        lambda it: cut(it, OFFICIAL_VAE_FILE, 5000),
        "cannot be read",
    ),
    "their codec empty": ("official", lambda it: cut(it, OFFICIAL_VAE_FILE, 0), "cannot be read"),
    "their codec gone": (
        "official",
        lambda it: (it / OFFICIAL_VAE_FILE).unlink(),
        f"lacks {OFFICIAL_VAE_FILE}",
    ),
    "code in the codec": (
        "official",
        lambda it: torch.save({"encoder": Code()}, it / OFFICIAL_VAE_FILE),
        "cannot be read",
    ),
    "a list as codec": (
        "official",
        lambda it: torch.save([torch.zeros(1)], it / OFFICIAL_VAE_FILE),
        "plain dictionary",
    ),
    "a codec without numbers": (
        "official",
        lambda it: torch.save({"a": torch.zeros(1, device="meta")}, it / OFFICIAL_VAE_FILE),
        "plain dictionary",
    ),
    "a sparse codec": (
        "official",
        lambda it: torch.save({"a": torch.eye(2).to_sparse()}, it / OFFICIAL_VAE_FILE),
        "plain dictionary",
    ),
    "a nested codec": (
        "official",
        lambda it: torch.save({"state_dict": {"a": torch.zeros(1)}}, it / OFFICIAL_VAE_FILE),
        "plain dictionary",
    ),
    "codecs of two layouts": (
        "diffusers",
        lambda it: torch.save({}, it / OFFICIAL_VAE_FILE),
        "does not belong",
    ),
    "a tensor that is no adapter": (
        "diffusers",
        lambda it: change_file(it, unet__conv_in__weight=torch.zeros(3)),
        "no adapters of UNet or codec: unet.conv_in.weight",
    ),
    "a DoRA": (
        "diffusers",
        lambda it: change_file(
            it, unet__mid_block__to_q__lora_magnitude_vector__weight=torch.zeros(3)
        ),
        "lora_magnitude_vector",
    ),
    "an alpha of its own": (
        "official",
        lambda it: change_file(it, mid_block__resnets__0__conv1__alpha=torch.tensor(8.0)),
        "conv1.alpha",
    ),
    "two adapters": (
        "diffusers",
        lambda it: change_file(
            it, unet__mid_block__resnets__0__conv1__lora_A__other__weight=torch.zeros(3)
        ),
        "more than one adapter",
    ),
    "settings that are no JSON": (
        "diffusers",
        lambda it: change_file(it, bokehdiff="{"),
        "bokehdiff is no JSON object",
    ),
    "settings that are a list": (
        "diffusers",
        lambda it: change_file(it, bokehdiff="[]"),
        "bokehdiff is no JSON object",
    ),
    "unknown settings": (
        "diffusers",
        lambda it: change_file(it, bokehdiff=json.dumps({"vae_file": VAE_FILE, "shutter": 1})),
        "settings \\['shutter'\\]",
    ),
    "a codec of another name": (
        "diffusers",
        lambda it: change_file(it, bokehdiff=json.dumps({"vae_file": "../vae.ckpt"})),
        "'../vae.ckpt'",
    ),
    "adapter metadata that are no JSON": (
        "diffusers",
        lambda it: change_file(it, lora_adapter_metadata="r = 8"),
        "lora_adapter_metadata is no JSON object",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folders_are_refused(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    layout, spoil, sentence = DAMAGES[damage]
    write_bokeh_weights(weights(), tmp_path / "set", layout)
    read_bokeh_weights(tmp_path / "set")
    spoil(tmp_path / "set")
    with pytest.raises(ValueError, match=sentence):
        read_bokeh_weights(tmp_path / "set")
    assert os.listdir(tmp_path) == ["set"]


def test_folders_without_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it is empty or no folder"):
        read_bokeh_weights(tmp_path)
    with pytest.raises(ValueError, match="it is empty or no folder"):
        read_bokeh_weights(tmp_path / "nowhere")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="it has model_index.json"):
        read_bokeh_weights(tmp_path)
    save_file({"vae.encoder.conv_in.lora_A.weight": torch.zeros(2, 2)}, tmp_path / LORA_FILE)
    with pytest.raises(ValueError, match="no adapters of the UNet"):
        read_bokeh_weights(tmp_path)


def changed(**changes: Any) -> BokehWeights:
    made = weights()
    for name, value in changes.items():
        setattr(made, name, value)
    return made


PREFIXED = {"unet.mid_block.to_q.lora_A.weight": torch.zeros(2, 2)}
NAMED = {"mid_block.to_q.lora_A.default.weight": torch.zeros(2, 2)}

# name: weights, layout, and a part of the sentence.
REFUSALS: dict[str, tuple[Callable[[], BokehWeights], str, str]] = {
    "an unknown layout": (weights, "kohya", "'kohya'.*'official'"),
    "no adapters": (lambda: changed(unet_lora={}), "diffusers", "no adapters of the UNet"),
    "names with a prefix": (lambda: changed(unet_lora=PREFIXED), "diffusers", "without prefix"),
    "names with an adapter": (lambda: changed(unet_lora=NAMED), "official", "lora_A.default"),
    "names of the codec": (
        lambda: changed(vae_lora={"encoder.conv_in.weight": torch.zeros(1)}),
        "diffusers",
        "Got encoder.conv_in.weight",
    ),
    "their layout with adapters of the codec": (
        lambda: weights(vae=False, vae_lora=True),
        "official",
        "no place for adapters of the codec",
    ),
    "unknown settings": (lambda: changed(settings={"shutter": 1}), "diffusers", "shutter"),
    "a DoRA": (
        lambda: changed(unet_lora_config=config(use_dora=True)),
        "diffusers",
        "use_dora",
    ),
    "a configuration of the future": (
        lambda: changed(unet_lora_config={**config(), "time_travel": 88, "off": None}),
        "diffusers",
        r"\['time_travel'\].*Update peft",
    ),
    "a configuration without targets": (
        lambda: changed(unet_lora_config={"r": 4}),
        "diffusers",
        "no target_modules",
    ),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_what_cannot_be_read_back_is_not_written(tmp_path: Path, refusal: str) -> None:
    make, layout, sentence = REFUSALS[refusal]
    with pytest.raises(ValueError, match=sentence):
        write_bokeh_weights(make(), tmp_path / "set", layout)
    assert not (tmp_path / "set").exists()


def test_a_file_is_no_folder_to_write_to(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        write_bokeh_weights(weights(), tmp_path / "weights")


def test_options_of_another_peft_that_are_off_do_not_matter(tmp_path: Path) -> None:
    unet_lora_config = {**config(), "off": None, "also_off": {}}
    write_bokeh_weights(changed(unet_lora_config=unet_lora_config), tmp_path)
    read = read_bokeh_weights(tmp_path)
    check_adapter(read.unet_lora, read.unet_lora_config, tiny_unet())
