// P^T H P per row without multiplying by the one-hot P: rows of H are added into K bins, n^2/2 additions instead of K
// n^2 products.
//
// H is read in tiles of kTall rows by kWide columns, packed once and used for every row of the range, so H is read from
// memory once a range. Bins are float32 over at most kTall terms, then float64. Only tiles on and right of the diagonal
// are visited: H is symmetric.
#pragma once
#include "base.h"
#include "table.h"

namespace leangrid {
namespace {

constexpr int64_t kTall = 512, kWide = 64;  // a packed tile is 128 KB: second-level cache

// bins[c][0..kWide) summed into out[code of the column][c]; turned first, so that the sums are over neighbours.
inline void collect(const float* bins, float* turned, const uint8_t* codes, int64_t width, int levels, double* out) {
    for (int c = 0; c < levels; ++c)
        for (int64_t i = 0; i < width; ++i) turned[i * levels + c] = bins[c * kWide + i];
    for (int64_t i = 0; i < width; ++i) {
        double* line = out + codes[i] * levels;
        for (int c = 0; c < levels; ++c) line[c] += static_cast<double>(turned[i * levels + c]);
    }
}

bool gram_range(const GramArgs& args, int64_t begin, int64_t end) noexcept {
    const int64_t n = args.n, square = static_cast<int64_t>(args.levels) * args.levels;
    const int k = args.levels;
    Buffer<float> tile(kTall * kWide), bins(k * kWide), turned(k * kWide);
    Buffer<double> beyond((end - begin) * square);  // pairs of columns in different tall tiles, seen once
    if (!tile || !bins || !turned || !beyond) return false;
    memset(args.out + begin * square, 0, sizeof(double) * (end - begin) * square);
    memset(beyond, 0, sizeof(double) * (end - begin) * square);
    for (int64_t top = 0; top < n; top += kTall) {
        const int64_t tall = least(kTall, n - top);
        for (int64_t side = top; side < n; side += kWide) {
            const int64_t wide = least(kWide, n - side);
            memset(tile, 0, sizeof(float) * kTall * kWide);
            for (int64_t j = 0; j < tall; ++j) memcpy(tile + j * kWide, args.hessian + (top + j) * n + side, sizeof(float) * wide);
            for (int64_t row = begin; row < end; ++row) {
                const uint8_t* codes = args.codes + row * n;
                memset(bins, 0, sizeof(float) * k * kWide);
                for (int64_t j = 0; j < tall; ++j) {
                    float* bin = bins + codes[top + j] * kWide;
                    const float* line = tile + j * kWide;
                    for (int64_t i = 0; i < kWide; ++i) bin[i] += line[i];
                }
                double* out = side >= top + kTall ? beyond + (row - begin) * square : args.out + row * square;
                collect(bins, turned, codes + side, wide, k, out);
            }
        }
    }
    for (int64_t row = begin; row < end; ++row)
        for (int a = 0; a < k; ++a)
            for (int c = 0; c < k; ++c) {
                const double* once = beyond + (row - begin) * square;
                args.out[row * square + a * k + c] += once[a * k + c] + once[c * k + a];
            }
    return true;
}

}  // namespace
}  // namespace leangrid
