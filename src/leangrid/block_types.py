"""llama.cpp's block types: what a block holds, and which type a layer with few columns has instead.

A block holds ``cols`` codes q of one row and, for each ``group`` of them, the numbers from which its reader computes
the weights in float32:

    Q4_0 Q5_0 Q8_0    w = d (q - 2^(bits-1))             d float16
    Q4_1 Q5_1         w = d q + dmin                     d, dmin float16
    Q3_K Q6_K         w = (d sc) (q - 2^(bits-1))        sc a signed integer of 6 or 8 bits
    Q2_K Q4_K Q5_K    w = (d sc) q - (dmin m)            sc, m unsigned integers of 4 or 6 bits

Source: ggml-common.h (the structs) and ggml-quants.c (``dequantize_row_*``) of llama.cpp; gguf-py's quants.py says the
same in numpy."""

from dataclasses import dataclass

from leangrid.errors import ShapeError


@dataclass(frozen=True)
class BlockType:
    """One of ggml's types.

    Attributes:
        name, number: its name, and its number in a GGUF file.
        cols: codes of a block.
        nbytes: bytes of a block.
        bits: bits of a code.
        group: columns that share a sub-scale.
        minimum: whether it holds ``dmin``.
        sc, m: smallest and largest integer of the sub-scales and of the sub-minima; None where the type has none.
        narrow: the type with blocks of 32 columns and at least as many bits, for layers whose columns 256 does not
            divide; None where the blocks have 32 columns already.
    """

    name: str
    number: int
    cols: int
    nbytes: int
    bits: int
    group: int
    minimum: bool = False
    sc: tuple[int, int] | None = None
    m: tuple[int, int] | None = None
    narrow: str | None = None

    @property
    def grid(self) -> str:
        """The kind of grid (``Scheme.grid``) whose levels the type holds."""
        return "superblock" if self.sc else "offset" if self.minimum else "affine"

    @property
    def middle(self) -> int:
        """The code that stands for 0 in types without a minimum; 0 in those with one."""
        return 0 if self.minimum else 2 ** (self.bits - 1)

    @property
    def bits_per_weight(self) -> float:
        """Bits of a weight, everything in the block included."""
        return 8 * self.nbytes / self.cols

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of ``cols`` columns; ShapeError where the blocks do not divide it."""
        if cols % self.cols:
            raise ShapeError(f"{self.name} holds blocks of {self.cols} columns, which do not divide {cols}")
        return cols // self.cols * self.nbytes

    def fitting(self, cols: int) -> "BlockType":
        """The type for rows of ``cols`` columns: this one, or its narrow one where its blocks do not divide them."""
        return BLOCK_TYPES[self.narrow] if self.narrow and cols % self.cols else self


BLOCK_TYPES: dict[str, BlockType] = {
    block_type.name: block_type
    for block_type in (
        BlockType("Q4_0", 2, 32, 18, 4, 32),
        BlockType("Q4_1", 3, 32, 20, 4, 32, minimum=True),
        BlockType("Q5_0", 6, 32, 22, 5, 32),
        BlockType("Q5_1", 7, 32, 24, 5, 32, minimum=True),
        BlockType("Q8_0", 8, 32, 34, 8, 32),
        BlockType("Q2_K", 10, 256, 84, 2, 16, minimum=True, sc=(0, 15), m=(0, 15), narrow="Q4_0"),
        BlockType("Q3_K", 11, 256, 110, 3, 16, sc=(-32, 31), narrow="Q4_0"),
        BlockType("Q4_K", 12, 256, 144, 4, 32, minimum=True, sc=(0, 63), m=(0, 63), narrow="Q4_1"),
        BlockType("Q5_K", 13, 256, 176, 5, 32, minimum=True, sc=(0, 63), m=(0, 63), narrow="Q5_1"),
        BlockType("Q6_K", 14, 256, 210, 6, 16, sc=(-128, 127), narrow="Q8_0"),
    )
}
