"""run.json of a result: time and memory of the run block by block, and the sample of one layer (report/sample.py)."""

from collections.abc import Mapping, Sequence
from typing import Any

from leangrid.machine import devices, memory


def run_log(
    infos: Sequence[Mapping[str, Any]], last: Mapping[str, float], bytes_before: int, device: str
) -> dict[str, Any]:
    """The JSON of run.json.

    Args:
        infos: what the journal holds for each block, in order.
        last: seconds by stage since the last block was committed.
        bytes_before: size of all tensors of the source.
        device: where the run computed.

    Returns:
        ``seconds`` (total and by stage, over all processes that resumed the run), ``blocks`` (of each: seconds, the
        most resident bytes during it, and the peaks of its process until its end), ``peak_ram_bytes``,
        ``peak_gpu_bytes``, ``bytes_before``, ``sample`` (None where no layer was sampled).
    """
    laps = [*(info["seconds"] for info in infos), last]
    stages = dict.fromkeys(name for lap in laps for name in lap)
    blocks = [
        {
            "seconds": info["seconds"]["total"],
            **{key: info[key] for key in ("resident_bytes", "peak_ram_bytes", "peak_gpu_bytes")},
        }
        for info in infos
    ]
    return {
        "seconds": {name: round(sum(lap.get(name, 0.0) for lap in laps), 3) for name in stages},
        "blocks": blocks,
        "peak_ram_bytes": max([memory.peak_bytes(), *(block["peak_ram_bytes"] for block in blocks)]),
        "peak_gpu_bytes": max([devices.peak_device_bytes(device), *(block["peak_gpu_bytes"] for block in blocks)]),
        "bytes_before": bytes_before,
        "sample": next((info["sample"] for info in infos if info.get("sample")), None),
    }
