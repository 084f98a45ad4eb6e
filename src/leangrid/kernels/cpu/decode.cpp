// Compiled once per instruction set, as kernels.cpp is; LEANGRID_DECODE names the table it exports.
#include "step.h"

namespace leangrid {

extern const DecodeTable LEANGRID_DECODE;
const DecodeTable LEANGRID_DECODE = {unpack_range, pack_range, tile_range, untile_range, product_range, dense_range, stage_of, head_of};

}  // namespace leangrid
