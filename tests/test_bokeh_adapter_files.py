from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import Tensor

from bokehdiff.bokeh_adapter_files import read_bokeh_adapter, write_bokeh_adapter
from bokehdiff.models.bokeh_adapter import BokehAdapter
from tests.hub_server import HubServer, Repository
from tests.tiny_flux import tiny_flux_transformer

RANK = 4


def trained_adapter(alpha: float = RANK) -> BokehAdapter:
    adapter = BokehAdapter(
        num_layers=2, num_single_layers=2, width=32, context_width=12, rank=RANK, alpha=alpha
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.data.normal_(generator=generator)
    return adapter


def official() -> dict[str, Tensor]:
    """The content of a ``bokeh_lora.bin``."""
    return {name: value.clone() for name, value in trained_adapter().state_dict().items()}


def read(path: Path, **options: Any) -> BokehAdapter:
    return read_bokeh_adapter(path, transformer=tiny_flux_transformer(), **options)


def assert_read(adapter: BokehAdapter, alpha: float = RANK) -> None:
    """That it is the adapter of :func:`trained_adapter`, as a whole and ready for use."""
    wanted = trained_adapter(alpha)
    state = adapter.state_dict()
    assert list(state) == list(wanted.state_dict())
    assert all(torch.equal(state[name], value) for name, value in wanted.state_dict().items())
    sizes = {name: value for name, value in adapter.config.items() if not name.startswith("_")}
    assert sizes == {n: v for n, v in wanted.config.items() if not n.startswith("_")}
    trainable = {name for name, value in adapter.named_parameters() if value.requires_grad}
    assert trainable == {name for name in state if "to_k_dof" not in name}
    adapter.install(tiny_flux_transformer())


# -- In, out, and back ---------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["bokeh_lora.bin", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("given", ["file", "folder"])
def test_layouts_of_others(tmp_path: Path, file: str, prefix: bool, given: str) -> None:
    tensors = official()
    if not prefix:
        tensors = {name.removeprefix("adapter_modules."): v for name, v in tensors.items()}
    if file.endswith(".bin"):
        torch.save(tensors, tmp_path / file)
    else:
        save_file(tensors, tmp_path / file)
    (tmp_path / "config.json").write_text('{"architectures": ["something else"]}')
    assert_read(read(tmp_path / file if given == "file" else tmp_path))


def test_a_folder_of_several_files_is_read_in_the_authors_order(tmp_path: Path) -> None:
    other = {name: torch.zeros_like(value) for name, value in official().items()}
    torch.save(other, tmp_path / "bokeh_lora.bin")
    torch.save(other, tmp_path / "pytorch_model.bin")
    save_file(official(), tmp_path / "model.safetensors")
    assert_read(read(tmp_path))


def test_bokehdiffusion(tmp_path: Path) -> None:
    tensors = {name.replace("_dof.", "_bokeh."): value for name, value in official().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    blocks = [f"{kind}transformer_blocks.{i}" for kind in ("", "single_") for i in (0, 1)]
    config = {"blocks": blocks, "lora_rank": RANK, "lora_alpha": None, "unfreeze_q": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_read(read_bokeh_adapter(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({**config, "lora_alpha": 6}))
    assert_read(read_bokeh_adapter(tmp_path / "model.safetensors"), alpha=6)

    (tmp_path / "config.json").write_text(json.dumps({**config, "lora_rank": 8}))
    with pytest.raises(ValueError, match="lora_rank 8.*model.safetensors has rank 4"):
        read_bokeh_adapter(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "blocks": blocks[:3]}))
    with pytest.raises(ValueError, match="lists 3 blocks.*layers for 4"):
        read_bokeh_adapter(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "lora_alpha": -1}))
    with pytest.raises(ValueError, match="lora_alpha -1; wanted a positive number"):
        read_bokeh_adapter(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged: it is no JSON object"):
        read_bokeh_adapter(tmp_path)


def test_our_folder(tmp_path: Path) -> None:
    trained_adapter(alpha=6).save_pretrained(tmp_path)
    torch.save(official(), tmp_path / "bokeh_lora.bin")
    assert_read(read_bokeh_adapter(tmp_path), alpha=6)
    (tmp_path / "config.json").write_text('{"_class_name": "BokehAdapter", "depth": 3}')
    with pytest.raises(ValueError, match="does not describe a BokehAdapter.*depth"):
        read_bokeh_adapter(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="no config.json of a BokehAdapter"):
        read_bokeh_adapter(tmp_path)


@pytest.mark.parametrize("name", ["bokeh_lora.bin", "bokeh.safetensors"])
def test_written_as_the_authors_do(tmp_path: Path, name: str) -> None:
    write_bokeh_adapter(trained_adapter(), tmp_path / name)
    assert_read(read(tmp_path / name))
    assert [file.name for file in tmp_path.iterdir()] == [name]
    if name.endswith(".bin"):
        plain = torch.load(tmp_path / name, weights_only=True)
        assert type(plain) is dict and list(plain) == list(official())
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_bokeh_adapter(trained_adapter(), tmp_path / name)
    # Their readers know no alpha.
    write_bokeh_adapter(trained_adapter(alpha=2 * RANK), tmp_path / name, overwrite=True)
    again = read(tmp_path / name)
    assert again.config.alpha == RANK
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    layers = (one.blocks[3].to_q_adp for one in (again, trained_adapter(alpha=2 * RANK)))
    assert torch.equal(*(layer(x) for layer in layers))
    with pytest.raises(ValueError, match="ends in .pt"):
        write_bokeh_adapter(trained_adapter(), tmp_path / "adapter.pt")


def test_dtype_is_that_of_the_file(tmp_path: Path) -> None:
    write_bokeh_adapter(trained_adapter().bfloat16(), tmp_path / "bokeh_lora.bin")
    assert {p.dtype for p in read(tmp_path).parameters()} == {torch.bfloat16}


# -- Files that are not opened, or hold something else ---------------------------------------------


class RunsCode:
    """Creates a file when it is unpickled by a careless reader."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("archive", [True, False])
def test_no_pickle_runs_code(tmp_path: Path, archive: bool) -> None:
    trap, file = tmp_path / "trapped", tmp_path / "bokeh_lora.bin"
    content = {**official(), "adapter_modules.0.to_v_dof.up.weight": RunsCode(trap)}
    if archive:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match="bokeh_lora.bin.*run code when it is read is not opened"):
        read(tmp_path)
    assert not trap.exists()
    # The trap is one: this is what a reader that tries again without the guard does.
    (torch.load(file, weights_only=False) if archive else pickle.loads(file.read_bytes()))
    assert trap.exists()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": official()}, {1: torch.zeros(2)}])
def test_pickles_of_something_else(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "bokeh_lora.bin")
    with pytest.raises(ValueError, match="other than a plain dictionary from names to tensors"):
        read(tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    for name in ("bokeh_lora.bin", "bokeh.safetensors"):
        write_bokeh_adapter(trained_adapter(), tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=f"{name}.*Copy or download it again"):
            read(tmp_path / name)


def damaged(change: str) -> dict[str, Tensor]:
    tensors = official()
    name = "adapter_modules.3.to_q_adp.down.weight"
    if change == "no queries and keys":
        return {n: v for n, v in tensors.items() if "q_adp" not in n and "k_adp" not in n}
    if change == "a block without queries":
        return {n: v for n, v in tensors.items() if "modules.2.to_q_adp" not in n}
    if change == "half a layer":
        del tensors[name]
    elif change == "no embedding":
        return {n: v for n, v in tensors.items() if not n.startswith("embedding")}
    elif change == "a stranger":
        tensors["adapter_modules.3.to_out.down.weight"] = torch.zeros(2)
    elif change == "full layers":
        tensors["adapter_modules.3.to_q_adp.weight"] = torch.zeros(32, 32)
    elif change == "twice":
        tensors["3.to_q_adp.down.weight"] = torch.zeros(4, 32)
    elif change == "both spellings":
        tensors["adapter_modules.3.to_k_bokeh.up.weight"] = torch.zeros(32, 4)
    elif change == "another rank in one block":
        tensors[name] = torch.zeros(5, 32)
    elif change == "integers":
        tensors[name] = tensors[name].long()
    elif change == "a vector":
        tensors["adapter_modules.0.to_v_dof.down.weight"] = torch.zeros(4)
    elif change == "one block too few":
        return {n: v for n, v in tensors.items() if not n.startswith("adapter_modules.3")}
    elif change == "no layers":
        return {n: v for n, v in tensors.items() if n.startswith("embedding")}
    return tensors


@pytest.mark.parametrize(
    ("change", "sentence"),
    {
        "no queries and keys": "a part of an adapter: in 4 of 4 blocks it lacks to_q_adp, the "
        "layer for queries",
        "a block without queries": "in 1 of 4 blocks it lacks to_q_adp.*the first is block 2",
        "half a layer": "missing: adapter_modules.3.to_q_adp.down.weight",
        "no embedding": "missing: embedding_layer.0.weight",
        "a stranger": "1 tensors that are none of an adapter.*3.to_out.down.weight",
        "full layers": "none of an adapter.*3.to_q_adp.weight",
        "twice": "1 tensors twice.*adapter_modules.3.to_q_adp.down.weight",
        "both spellings": "1 tensors twice.*3.to_k_dof.up.weight",
        "another rank in one block": r"3.to_q_adp.down.weight \(5, 32\), wanted \(4, 32\)",
        "integers": "not in floating point: adapter_modules.3.to_q_adp.down.weight torch.int64",
        "a vector": "no two matrices",
        "one block too few": "layers for 3 attention modules.*2 double and 2 single",
        "no layers": "no layers of an adapter",
    }.items(),
)
def test_only_whole_adapters_are_read(tmp_path: Path, change: str, sentence: str) -> None:
    torch.save(damaged(change), tmp_path / "bokeh_lora.bin")
    with pytest.raises(ValueError, match=sentence):
        read(tmp_path)


def test_without_the_transformer_only_flux_is_known(tmp_path: Path) -> None:
    write_bokeh_adapter(trained_adapter(), tmp_path / "bokeh_lora.bin")
    with pytest.raises(ValueError, match="4 attention modules.*has 57.*as transformer="):
        read_bokeh_adapter(tmp_path)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    for name in (tmp_path / "nothing", "./nothing.bin", "nothing.bin", "a/b/c"):
        with pytest.raises(ValueError, match="no file or folder.*'owner/name' on the Hub"):
            read_bokeh_adapter(name)
    with pytest.raises(ValueError, match="holds no adapter; wanted one of model.safetensors"):
        read_bokeh_adapter(tmp_path)


# -- The Hub ---------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A Hub on this machine, with an empty cache."""
    with HubServer() as server:
        template = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.endpoint + template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", server.token)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


def test_from_the_hub(tmp_path: Path, hub: HubServer) -> None:
    write_bokeh_adapter(trained_adapter(), tmp_path / "bokeh_lora.bin")
    files = {
        "bokeh_lora.bin": (tmp_path / "bokeh_lora.bin").read_bytes(),
        "UDv2_dsfa_release.pth": b"large",
    }
    hub.repositories["owner/bokehdepth"] = Repository(files=files)
    assert_read(read("owner/bokehdepth"))
    assert not any("UDv2" in path and "resolve" in path for _, path, _ in hub.requests)
    with pytest.raises(ValueError, match="'owner/nothing'.*could be fetched from the Hub"):
        read("owner/nothing")
    hub.repositories["owner/empty"] = Repository(files={"README.md": b"# nothing"})
    with pytest.raises(ValueError, match="holds no adapter"):
        read("owner/empty")
