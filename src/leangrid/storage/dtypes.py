"""Names of dtypes: the one table between torch, safetensors and config.json."""

import torch

# As a safetensors header spells them -> torch's. (GGUF's plain types have the same names.)
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}

COMPUTED = ("F32", "F16", "BF16")  # dtypes of weights that engines compute in
FLOATS = (*COMPUTED, "F64")  # dtypes of weights that are not quantized
CODES = ("U8", "I8", "I16", "U16", "I32", "U32")  # dtypes of packed codes; int64 holds positions


def torch_name(dtype: torch.dtype) -> str:
    """The name of a dtype in torch and in config.json, such as ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: object) -> torch.dtype | None:
    """The dtype that torch and config.json call ``name``; None where it is none of the table's."""
    return next((dtype for dtype in NAMES if torch_name(dtype) == name), None)


def plain_dtype(name: str) -> torch.dtype | None:
    """The dtype in which plain weights are read that safetensors or GGUF calls ``name``: float32 for F64, which no
    engine computes in; None where they are no plain floats."""
    if name not in FLOATS:
        return None
    return torch.float32 if name == "F64" else DTYPES[name]
