"""What a finished run says of itself: the JSON of ``quantize --json``."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class QuantizeResult:
    """Figures of one run. Losses are sums over layers of tr(E H E^T)/2; ``bits_per_weight`` counts codes and grids of
    the quantized linears; ``bytes`` is the size of the published directory; ``flops`` are needed and done by stage
    (work.py); ``quality`` is what the gate found (gate.py): measure, value, limit, passed, top1_agreement,
    worst_layers, or error; ``experts`` is what the routers of a mixture did (report/experts.py), empty without one."""

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
    quality: dict[str, Any] = field(default_factory=lambda: {"passed": True})

    @property
    def directory(self) -> Path:
        """The published directory."""
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

    def to_json(self) -> dict[str, Any]:
        """The promised keys, and some more."""
        return asdict(self)
