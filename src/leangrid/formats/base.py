"""What a container says of itself and does: a subclass of ``Format`` in a file of its own, and a row of ``FORMATS``."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from leangrid.errors import FormatError
from leangrid.grids import Grid, Precision
from leangrid.schemes import OFFSET_FORMATS, Scheme

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""The tensors of a layer: suffix of the name -> (dtype, shape)."""

CONFIG = "config.json: quantization_config"
_WEIGHTS_AT_ONCE = 1 << 24  # dequantized in float32 in one step
DAMAGED_CONFIG = "The config is damaged: quantize or copy it again"


@dataclass(frozen=True)
class Reading:
    """How plain transformers reads the layers of a result.

    Attributes:
        paths: layer -> the path of its module in transformers' model.
        merged: the layers that it merges into tensors of all experts.
        dequantize: whether it makes plain weights of packed ones while it loads, which it does by one scheme for the
            ``merged`` layers and one for the others.
        obstacle: why it does not open the result, as a clause that begins with "it"; None where it does.
    """

    paths: Mapping[str, str]
    merged: Collection[str]
    dequantize: bool
    obstacle: str | None = None


class Format(ABC):
    """A container: how the codes and the grid of a linear are stored as named tensors, and config.json's entry for
    them.

    It is pure: no file, no model. In every method ``shape`` is (rows, cols) = (out_features, in_features) of the
    linear, ``dtype`` is the model's (of everything that is not quantized), and ``name`` is the layer's, for messages.

    Attributes:
        NAME: what ``--format`` and ``--to`` call it.
        QUANT_METHOD: ``quant_method`` in config.json; several containers may share one.
        CONFIG_KEYS: keys of config.json under which the entry is written.
        EXPORT_ONLY: whether ``export`` writes it and ``quantize`` does not, because it cannot store every grid that a
            search may find: only a finished result shows whether it fits.
        BLOCKS: whether it stores llama.cpp's block types, and nothing else.
        MARK: suffix of a tensor that alone tells readers that a layer, of any kind, is quantized; None: there is none.
        AUTO_GROUPS: the group sizes that scheme ``auto`` tries, in this order, before whole rows.
    """

    NAME: str
    QUANT_METHOD: str
    CONFIG_KEYS: tuple[str, ...] = ("quantization_config",)
    EXPORT_ONLY: bool = False
    BLOCKS: bool = False
    MARK: str | None = None
    AUTO_GROUPS: tuple[int, ...] = (128,)

    @property
    def stores_offsets(self) -> bool:
        """Whether it stores w = S q + B with any number B, so that the search need not find integer zero points."""
        return self.NAME in OFFSET_FORMATS

    @abstractmethod
    def refuse(self, scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
        """Why the container cannot store this layer exactly, and the way out; None if it can.

        ``kind`` is "linear" (nn.Linear) or "conv1d" (GPT-2's Conv1D)."""

    def stored_scheme(self, scheme: Scheme, columns: set[int]) -> Scheme:
        """The scheme that the files say for a result of ``scheme`` whose layers have these numbers of columns: the same
        levels, in shorter groups where the container needs them."""
        return scheme

    def precision(self, dtype: torch.dtype) -> Precision:
        """How the grid's parameters are rounded, which the search does before it propagates an error."""
        return Precision(dtype)

    @abstractmethod
    def layout(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
        """The tensors of a layer."""

    @abstractmethod
    def pack(
        self, codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype, scheme: Scheme
    ) -> dict[str, Tensor]:
        """The layer's tensors, by suffix, of its codes and its grid; ``scheme`` is the stored one.

        Raises:
            FormatError: the grid is of another kind, or storing it would round one of its numbers.
        """

    @abstractmethod
    def check(self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
        """CheckpointError where a tensor is absent, has another shape or dtype, or holds values that no writer
        makes."""

    @abstractmethod
    def unpack(
        self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer"
    ) -> tuple[UInt8[Tensor, "rows cols"], Grid]:
        """The inverse of ``pack``, after ``check``: (codes, grid in the stored groups)."""

    @abstractmethod
    def weight_dtype(self, tensors: dict[str, Tensor]) -> torch.dtype:
        """The dtype to which readers round the dequantized weight, as the stored tensors alone say it."""

    def dense(
        self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer"
    ) -> Float[Tensor, "rows cols"]:
        """The weight that every reader of the files must arrive at: ``unpack``, then computed in float32 and rounded
        once to ``weight_dtype``."""
        codes, grid = self.unpack(tensors, scheme, shape, name)
        return _dequantize_by_rows(codes, grid, self.weight_dtype(tensors))

    def dequantize(
        self, codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype
    ) -> Float[Tensor, "rows cols"]:
        """The weight by which a model of ``dtype`` multiplies, of a layer that need not be packed: computed in float32
        and rounded once to the dtype of ``precision(dtype)``, in which it is returned."""
        return _dequantize_by_rows(codes, grid, self.precision(dtype).dtype)

    @abstractmethod
    def config(self, schemes: Mapping[str, Scheme], ignore: list[str]) -> dict[str, Any]:
        """config.json's entry for layers of these stored schemes.

        Args:
            schemes: layer -> stored scheme, of every quantized layer.
            ignore: names of the linears that are not quantized.

        Raises:
            FormatError: the layers have several schemes, and the container stores one.
        """

    def config_entries(
        self, schemes: Mapping[str, Scheme], ignore: list[str], reading: Reading | None = None
    ) -> dict[str, Any]:
        """What config.json gets: ``config`` under each of ``CONFIG_KEYS``, in the form that opens in plain transformers
        where its ``reading`` is known."""
        return dict.fromkeys(self.CONFIG_KEYS, self.config(schemes, ignore))

    def is_config(self, config: dict[str, Any]) -> bool:
        """Whether an entry of config.json is this container's.

        Raises:
            FormatError: it is of a version that leangrid does not read.
        """
        return config.get("quant_method") == self.QUANT_METHOD

    @abstractmethod
    def scheme_of(self, config: dict[str, Any]) -> Scheme:
        """The scheme that an entry of config.json says for all layers; FormatError where leangrid does not read it."""

    def schemes(self, config: dict[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
        """Layer -> scheme for these layers, which ``covers`` says are quantized."""
        return dict.fromkeys(names, self.scheme_of(config))

    @abstractmethod
    def covers(self, config: dict[str, Any], name: str) -> bool:
        """Whether an entry of config.json allows the linear ``name`` to be quantized. Where it only says "every linear
        but these", the file's tensors decide (``checks.holds_codes``)."""

    def only_scheme(self, schemes: Mapping[str, Scheme]) -> Scheme:
        """The one scheme of all layers; FormatError where there are several."""
        several = list(dict.fromkeys(schemes.values()))
        if len(several) != 1:
            raise FormatError(
                f"{self.NAME} holds one scheme for all layers, not {len(several)}",
                "layers",
                "Use format compressed-tensors or mlx",
            )
        return several[0]


def _dequantize_by_rows(
    codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype
) -> Float[Tensor, "rows cols"]:
    """The weights in ``dtype``, some rows at a time: the float32 steps of a whole layer are several times its size."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    count = max(1, _WEIGHTS_AT_ONCE // codes.shape[1])
    for start in range(0, len(codes), count):
        rows = torch.arange(start, min(start + count, len(codes)), device=codes.device)
        out[start : start + count] = grid.select_rows(rows).dequantize(codes[start : start + count])
    return out
