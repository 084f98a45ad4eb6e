"""A container is one class and one row of ``FORMATS``: a new one is quantized to, judged, loaded and exported from and
to, with no other change."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from quantized_checkpoints import answer
from torch import Tensor

import leangrid
from leangrid.errors import FormatError
from leangrid.formats import FORMATS, format_of
from leangrid.formats.base import Format, Layout
from leangrid.formats.checks import affine_grid, cast_exactly, check_layout, check_scales
from leangrid.grids import AffineGrid, Grid
from leangrid.models.result_reader import ResultReader
from leangrid.recipe import Recipe
from leangrid.schemes import GRID_SCHEMES, OFFSET_FORMATS, Scheme


class Bytes(Format):
    """A code in each byte, and (S, Z) by groups."""

    NAME = "bytes"
    QUANT_METHOD = "bytes"
    AUTO_GROUPS = (32,)

    def refuse(self, scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
        return None if scheme.grid == "affine" and kind == "linear" else f"{name}: bytes holds affine grids only"

    def layout(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
        groups = shape[1] // (scheme.group_size or shape[1])
        grid = {"scale": (dtype, (shape[0], groups)), "zero": (torch.int16, (shape[0], groups))}
        return {"codes": (torch.uint8, shape), **grid}

    def pack(self, codes: Tensor, grid: Grid, dtype: torch.dtype, scheme: Scheme) -> dict[str, Tensor]:
        grid = affine_grid(grid, scheme, self.NAME)
        return {"codes": codes, "scale": cast_exactly(grid.scale, dtype, "scales"), "zero": grid.zero_point.short()}

    def check(self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
        dtype = tensors["scale"].dtype if "scale" in tensors else torch.float32
        check_layout(tensors, self.layout(scheme, shape, dtype), name)
        check_scales(tensors["scale"], name)

    def unpack(
        self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer"
    ) -> tuple[Tensor, Grid]:
        self.check(tensors, scheme, shape, name)
        zero_point = tensors["zero"].to(torch.uint8)
        return tensors["codes"], AffineGrid(tensors["scale"].float(), zero_point, scheme.bits, scheme.group_size)

    def weight_dtype(self, tensors: dict[str, Tensor]) -> torch.dtype:
        return tensors["scale"].dtype

    def config(self, schemes: Mapping[str, Scheme], ignore: list[str]) -> dict[str, Any]:
        scheme = self.only_scheme(schemes)
        return {"quant_method": self.QUANT_METHOD, "bits": scheme.bits, "group": scheme.group_size}

    def scheme_of(self, config: dict[str, Any]) -> Scheme:
        return Scheme(grid="affine", method="leanquant", bits=config["bits"], group_size=config["group"])

    def covers(self, config: dict[str, Any], name: str) -> bool:
        return True


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "bytes", Bytes())


@pytest.mark.usefixtures("row")
def test_a_new_container_is_one_class_and_one_row(tiny: Callable[..., Path], tmp_path: Path) -> None:
    recipe = Recipe(format="bytes", calibration="embedded", samples=4, length=32, steps=32)
    result = leangrid.quantize(tiny("llama3_tied", torch.bfloat16), tmp_path / "bytes", recipe)
    assert result.scheme == "W4A16_G32"  # the first of its AUTO_GROUPS that fits
    quality = json.loads((tmp_path / "bytes" / "manifest.json").read_text())["quality"]
    assert "error" not in quality
    leangrid.export(tmp_path / "bytes", tmp_path / "packed", to="compressed-tensors")
    leangrid.export(tmp_path / "packed", tmp_path / "again", to="bytes")
    one, two = (ResultReader.verified(tmp_path / name) for name in ("bytes", "again"))
    assert one.layers == two.layers
    for name in one.layers:
        assert torch.equal(one.weight_in_model_dtype(name), two.weight_in_model_dtype(name))
    expected = answer(leangrid.load(tmp_path / "packed")[0], tiny_models.tokens())
    assert torch.equal(answer(leangrid.load(tmp_path / "bytes")[0], tiny_models.tokens()), expected)
    with pytest.raises(FormatError, match="bytes holds affine grids only"):
        leangrid.quantize(tiny("gpt2", torch.bfloat16), tmp_path / "gpt2", recipe)


def test_a_row_is_found_by_its_name_and_by_its_entry_in_config_json() -> None:
    assert all(name == container.NAME for name, container in FORMATS.items())
    with pytest.raises(FormatError, match="'bytes' is not one that leangrid reads"):
        format_of({"quant_method": "bytes"})


def test_the_recipe_names_containers_that_are_rows() -> None:
    """schemes.py imports no torch, so it cannot ask the rows."""
    assert {name for name, container in FORMATS.items() if container.stores_offsets} == OFFSET_FORMATS
    assert {row.format for row in GRID_SCHEMES.values()} <= FORMATS.keys()
