"""Containers on disk: (codes, grid) of a layer <-> named tensors, and config.json's entry. Pure: no file, no model.

To add one, write one file with a subclass of ``Format``, and add its row to ``FORMATS``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from leangrid.errors import FormatError
from leangrid.formats.awq import Awq
from leangrid.formats.base import CONFIG, Format
from leangrid.formats.compressed_tensors import CompressedTensors
from leangrid.formats.gguf import Gguf
from leangrid.formats.gptq import Gptq
from leangrid.formats.lut import Lut
from leangrid.formats.mlx import Mlx
from leangrid.schemes import Scheme

FORMATS: dict[str, Format] = {
    row.NAME: row for row in (CompressedTensors(), Lut(), Gptq(2), Gptq(1), Awq(), Mlx(), Gguf())
}
CONFIG_KEYS = ("quantization_config", "quantization")  # of config.json: transformers' and mlx-lm's


def schemes_stored_by(container: Format, layers: Mapping[str, tuple[Scheme, int]]) -> dict[str, Scheme]:
    """Layer -> the scheme that the files of ``container`` say for it; ``layers`` has each one's own scheme and number
    of columns."""
    columns: dict[Scheme, set[int]] = {}
    for scheme, cols in layers.values():
        columns.setdefault(scheme, set()).add(cols)
    stored = {scheme: container.stored_scheme(scheme, found) for scheme, found in columns.items()}
    return {name: stored[scheme] for name, (scheme, _) in layers.items()}


def schemes_of(config: dict[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """Layer -> scheme for those of the linears ``names`` that config.json's entry ``config`` covers.

    Raises:
        FormatError: leangrid does not read this entry.
    """
    container = format_of(config)
    return container.schemes(config, [name for name in names if container.covers(config, name)])


def format_of(config: dict[str, Any]) -> Format:
    """The container whose entry in config.json ``config`` is; FormatError where it is of none that leangrid reads."""
    found = next((container for container in FORMATS.values() if container.is_config(config)), None)
    if found is not None:
        return found
    method, methods = config.get("quant_method"), dict.fromkeys(known.QUANT_METHOD for known in FORMATS.values())
    if method in list(methods):
        what = f"format {config.get('format')!r} version {config.get('version')!r} is not known"
        raise FormatError(what, CONFIG, "Upgrade leangrid")
    what = f"quant_method {method!r} is not one that leangrid reads"
    raise FormatError(what, CONFIG, f"Known: {', '.join(methods)}")
