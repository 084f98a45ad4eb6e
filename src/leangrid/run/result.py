"""The result of a finished run: the figures that ``quantize --json`` prints."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leangrid.results import Result


@dataclass(frozen=True)
class QuantizeResult(Result):
    """Figures of one run.

    Attributes:
        out: the directory with the result.
        scheme, format: what the layers were quantized to, ``auto`` written out.
        layers: how many linears were quantized.
        bits_per_weight: of the quantized linears, codes and grids.
        bytes: size of all files of the directory.
        loss: sum over the layers of tr(E H E^T)/2, before block tuning; ``loss_minmax`` and ``loss_rounding`` the same
            for min-max GPTQ and for rounding, on the same Hessians.
        rescues: how many deviations from the method were recorded; ``rescued_layers`` in how many layers.
        notes: how many remarks that are no rescue were recorded, by kind (solve/rescue.py).
        seconds: time by stage, and ``total``.
        flops: floating-point operations by stage, ``needed`` by the method and ``done`` (machine/flops.py).
        peak_ram_bytes, peak_gpu_bytes: most memory that the process had at once, of the host and of the device.
        kernels: which implementation ran, by kernel.
        windows_sha256: sha256 of the calibration windows.
        max_rescued: share of rescued layers that is allowed.
        rescue_lines: one sentence for each rescue.
        experts: tokens per expert of a mixture (report/experts.py); empty for other models.
        budget: what was chosen within a budget (report/budget.py); empty without one.
        correction: min, median and max of the shares of the inputs' own error that were corrected; empty where the
            recipe gives one for all.
        tuning: what block tuning did (report/tuning.py); empty where it was not asked for.
        finish: what tuning the grids of the whole model did (report/tuning.py); empty where it was not asked for.
        quality: what the quality gate found (gate/quality.py): measure, value, limit, passed, top1_agreement,
            worst_layers, or error.

    Example:
        >>> recipe = leangrid.Recipe(scheme="NU4", calibration="text.txt", samples=8, length=64)
        >>> result = leangrid.quantize("model", "out-nu4", recipe)
        >>> result.exit_code, result.quality["measure"], result["scheme"] == result.to_dict()["scheme"]
        (0, 'kl', True)
    """

    out: str
    scheme: str
    format: str
    layers: int
    bits_per_weight: float
    bytes: int
    loss: float
    loss_minmax: float
    loss_rounding: float
    rescues: int
    rescued_layers: int
    notes: dict[str, int]
    seconds: dict[str, float]
    flops: dict[str, dict[str, float]]
    peak_ram_bytes: int
    peak_gpu_bytes: int
    kernels: dict[str, str]
    windows_sha256: str
    max_rescued: float = 0.01
    rescue_lines: list[str] = field(default_factory=list)
    experts: dict[str, Any] = field(default_factory=dict)
    budget: dict[str, Any] = field(default_factory=dict)
    correction: dict[str, float] = field(default_factory=dict)
    tuning: dict[str, Any] = field(default_factory=dict)
    finish: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=lambda: {"passed": True})

    @property
    def directory(self) -> Path:
        """The directory with the result."""
        return Path(self.out)

    @property
    def exit_code(self) -> int:
        """0, or 4 where more than ``max_rescued`` of the layers needed a rescue, or the result is too far from the
        original."""
        return 4 if self.too_many_rescues or not self.quality["passed"] else 0

    @property
    def too_many_rescues(self) -> bool:
        """Whether more than ``max_rescued`` of the layers needed a rescue."""
        return self.rescued_layers > self.max_rescued * self.layers
