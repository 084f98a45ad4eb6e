// Sums of outer products over tokens, bfloat16 in and float32 out, on processors that multiply bfloat16: matrix tiles
// (AMX) or vectors (AVX512_BF16).
//   out[i][j] += sum_t x[t][i] * y[t][j]        products exact, sums in float32
//
// Tokens are taken 32 at a time. A "right" tile holds 16 columns of y as 16 token pairs by 16 columns; a "left" tile is
// the same with rows and columns of its 32-bit pairs exchanged: that is the layout in which the tile product multiplies
// them, and vectors read a row's pairs one after another. Both are packed once a call, then every 32 x 32 square of out
// is four tiles (or four times sixteen vectors) in registers over a stretch of tokens that keeps the packed columns in
// the cache.
#pragma once
#include <cstdint>

namespace leangrid {

// What multiplies bfloat16 here. Both give float32 sums of exact products, in an order of their own.
enum class Units { none, dots, tiles };

constexpr int64_t kTileTokens = 32, kTileCols = 16, kTileBytes = 1024;

// Bytes of all packed tiles of [tokens, cols], both padded up to whole pairs of tiles.
int64_t packed_bytes(int64_t tokens, int64_t cols) noexcept;

// Packs steps begin..end (of 32 tokens each) of x [tokens, cols]; left or right may be null. Tiles of one column strip
// lie one after the other, a strip is steps * kTileBytes long.
void pack_tiles(const uint16_t* x, int64_t tokens, int64_t cols, int64_t begin, int64_t end, char* left, char* right) noexcept;

// Bits of the largest |x|: without their signs the order of the bits is the order of the values, infinity and NaN last.
int largest_magnitude(const uint16_t* x, int64_t count) noexcept;

struct OuterArgs {
    const char* left;   // of x
    const char* right;  // of y
    int64_t tokens, cols;
    bool upper;  // only squares on and right of the diagonal
    float* out;  // [cols, cols]
};

// Adds to rows 32*begin .. 32*end of out.
void add_outer(const OuterArgs& args, int64_t begin, int64_t end, Units units) noexcept;

}  // namespace leangrid
