// Compiled once per instruction set; LEANGRID_TABLE names the table it exports. No fused multiply-add anywhere
// (-ffp-contract=off): every build, and the torch twins, round alike.
#include "affine_screen.h"
#include "exact.h"
#include "gram.h"
#include "kmeans.h"
#include "sweep.h"
#include "table.h"

namespace leangrid {

extern const KernelTable LEANGRID_TABLE;
const KernelTable LEANGRID_TABLE = {kmeans_range, affine_range, sweep_range, descend_range, gram_range, exact_range};

}  // namespace leangrid
