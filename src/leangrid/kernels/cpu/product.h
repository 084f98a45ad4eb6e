// y = x W^T and dense rows of W from tiles of codes (codes.h). Every weight is formed exactly as the format says it, in
// float32.
//
// A source turns 16 codes of a row into 16 weights: by a table in one register (four bits and fewer; a table a row for
// a LUT, a table a row and group for an affine grid), by arithmetic, or by a gather. Sums run over 16 columns at a
// time, in one order for any number of tokens: the product of a token never depends on its neighbours.
#pragma once
#include "codes.h"
#include "lanes.h"

namespace leangrid {
namespace {

LEANGRID_INLINE int64_t row_of(const Matrix& weight, int64_t tile, int64_t r) { return least(tile * kTileRows + r, weight.rows - 1); }

// Levels S (q - Z), q = iota & mask, of one row and group: a table that repeats every 2^bits entries.
LEANGRID_INLINE Lanes affine_table(float scale, float zero_point, const Lanes& codes, int rounding) {
    Lanes out;
    for (int p = 0; p < kParts; ++p) out.part[p] = rounded((codes.part[p] - zero_point) * scale, rounding);
    return out;
}

template <int kBits>
struct LutSource {
    static constexpr int kShift = kBits;
    Lanes table[kTileRows];

    LEANGRID_INLINE LutSource(const Matrix& weight, int64_t tile, float*) {
        constexpr int64_t entries = 1 << kBits;
        for (int64_t r = 0; r < kTileRows; ++r) {
            const int64_t first = row_of(weight, tile, r) * entries;
            float wide[16];
            uint16_t narrow[16];
            for (int64_t i = 0; i < 16; i += entries) {  // tables of fewer entries repeat
                if (weight.dtype == kFloat32) memcpy(wide + i, static_cast<const float*>(weight.values) + first, 4 * entries);
                else memcpy(narrow + i, static_cast<const uint16_t*>(weight.values) + first, 2 * entries);
            }
            for (int p = 0; p < kParts; ++p)
                table[r].part[p] = weight.dtype == kFloat32 ? load(wide + p * kFloats) : load(narrow + p * kFloats);
        }
    }
    LEANGRID_INLINE void at(int64_t) {}
    LEANGRID_INLINE Lanes value(int64_t r, const Codes& codes) const { return look_up<kBits>(table[r], codes); }
};

template <int kBits>
struct AffineSource {  // group_size is a multiple of 16
    static constexpr int kShift = kBits;
    Lanes table[kTileRows], iota;
    const float *scale, *zero_point;  // [groups, 4]: this tile's, in float32
    int64_t steps, next = 0;          // steps a group; the first step of the next one
    int rounding;

    LEANGRID_INLINE AffineSource(const Matrix& weight, int64_t tile, float* scratch) : steps(weight.group_size / 16), rounding(weight.rounding) {
        const int64_t groups = weight.cols / weight.group_size;
        if (groups == 1) steps = weight.cols;
        scale = scratch, zero_point = scratch + kTileRows * groups;
        for (int64_t r = 0; r < kTileRows; ++r) {
            const int64_t first = row_of(weight, tile, r) * groups;
            for (int64_t g = 0; g < groups; ++g) {
                scratch[g * kTileRows + r] = scalar(weight.values, weight.dtype, first + g);
                scratch[(groups + g) * kTileRows + r] = weight.zero_point[first + g];
            }
        }
        constexpr int mask = (1 << kBits) - 1;
        float code[16];
        for (int i = 0; i < 16; ++i) code[i] = static_cast<float>(i & mask);
        for (int p = 0; p < kParts; ++p) iota.part[p] = load(code + p * kFloats);
    }
    LEANGRID_INLINE void at(int64_t step) {
        if (__builtin_expect(step != next, 1)) return;
        next += steps;
        for (int64_t r = 0; r < kTileRows; ++r) table[r] = affine_table(*scale++, *zero_point++, iota, rounding);
    }
    LEANGRID_INLINE Lanes value(int64_t r, const Codes& codes) const { return look_up<kBits>(table[r], codes); }
};

template <bool kAligned>
struct ArithmeticSource {  // affine, more than four bits, or groups that are no multiple of 16 columns
    static constexpr int kShift = 0;
    const Matrix& weight;
    Lanes scale[kTileRows], zero_point[kTileRows];
    int64_t row[kTileRows], groups, group = -1;

    LEANGRID_INLINE ArithmeticSource(const Matrix& weight_, int64_t tile, float*) : weight(weight_), groups(weight_.cols / weight_.group_size) {
        for (int64_t r = 0; r < kTileRows; ++r) row[r] = row_of(weight, tile, r) * groups;
    }
    LEANGRID_INLINE void at(int64_t step) {
        const int64_t now = least(step * 16 / weight.group_size, groups - 1);
        if (kAligned && now == group) return;
        group = now;
        for (int64_t r = 0; r < kTileRows; ++r)
            for (int p = 0; p < kParts; ++p)
                for (int i = 0; i < kFloats; ++i) {
                    const int64_t j = step * 16 + p * kFloats + i;
                    const int64_t from = row[r] + (kAligned ? now : least(j / weight.group_size, groups - 1));
                    scale[r].part[p][i] = scalar(weight.values, weight.dtype, from);
                    zero_point[r].part[p][i] = weight.zero_point[from];
                }
    }
    LEANGRID_INLINE Lanes value(int64_t r, const Codes& codes) const {
        const uint32_t mask = (1u << weight.bits) - 1;
        Lanes out;
        for (int p = 0; p < kParts; ++p) {
            const Floats code = __builtin_convertvector(reinterpret_cast<Ints>(codes.part[p] & mask), Floats);
            out.part[p] = rounded((code - zero_point[r].part[p]) * scale[r].part[p], weight.rounding);
        }
        return out;
    }
};

struct GatherSource {  // a LUT of more than 16 entries
    static constexpr int kShift = 0;
    uint32_t mask;
    float table[kTileRows][256];

    LEANGRID_INLINE GatherSource(const Matrix& weight, int64_t tile, float*) : mask((1u << weight.bits) - 1) {
        for (int64_t r = 0; r < kTileRows; ++r)
            for (int64_t i = 0; i <= mask; ++i)
                table[r][i] = scalar(weight.values, weight.dtype, row_of(weight, tile, r) * (int64_t{mask} + 1) + i);
    }
    LEANGRID_INLINE void at(int64_t) {}
    LEANGRID_INLINE Lanes value(int64_t r, Codes codes) const {
        for (int p = 0; p < kParts; ++p) codes.part[p] &= mask;
        return gather(table[r], codes);
    }
};

LEANGRID_INLINE Codes load_codes(const uint8_t* from, int64_t bytes) {
    Codes out;
    for (int p = 0; p < kParts; ++p) {
        const uint16_t* pair = reinterpret_cast<const uint16_t*>(from) + p * kFloats;
        if (bytes == 4) out.part[p] = *reinterpret_cast<const WordsAt*>(from + p * kVectorBytes);
        else if (bytes == 1) out.part[p] = widen(from + p * kFloats);
        else if (bytes == 2) out.part[p] = widen(pair);
        else out.part[p] = widen(pair) | widen(from + 32 + p * kFloats) << 16;
    }
    return out;
}

// visit(step, weights of the four rows at columns 16 step .. 16 step + 15), in order.
template <class Source, class Visit>
LEANGRID_INLINE void walk_tile(const Matrix& weight, const uint8_t* tile, Source& source, Visit& visit) {
    const int bits = Source::kShift ? Source::kShift : weight.bits;
    const int64_t steps = (weight.cols + 15) / 16, per = 32 / bits;
    Codes codes[kTileRows];
    Lanes values[kTileRows];
    auto one = [&](int64_t step) __attribute__((always_inline)) {
        source.at(step);
        for (int64_t r = 0; r < kTileRows; ++r) {
            values[r] = source.value(r, codes[r]);
            for (int p = 0; p < kParts; ++p) codes[r].part[p] >>= bits;
        }
        visit(step, values);
    };
    int64_t step = 0;
    while (step + per <= steps) {
        for (int64_t r = 0; r < kTileRows; ++r, tile += 64) codes[r] = load_codes(tile, 4);
        for (int64_t k = 0; k < per; ++k, ++step) one(step);
    }
    const int64_t bytes = tail_bytes(steps - step, bits);
    for (int64_t r = 0; r < kTileRows && bytes; ++r, tile += 16 * bytes) codes[r] = load_codes(tile, bytes);
    for (; step < steps; ++step) one(step);
}

template <int kTokens>
struct Dot {
    const float* x;
    int64_t stride;
    Floats sums[kTokens][kTileRows];

    LEANGRID_INLINE void operator()(int64_t step, const Lanes* values) {
        for (int p = 0; p < kParts; ++p)
            for (int t = 0; t < kTokens; ++t) {
                const Floats token = load(x + t * stride + step * 16 + p * kFloats);
                for (int64_t r = 0; r < kTileRows; ++r) sums[t][r] = fused(values[r].part[p], token, sums[t][r]);
            }
    }
};

template <class Source, int kTokens>
inline void tile_product(const ProductArgs& args, float* scratch, int64_t tile, int64_t token) {
    const Matrix& weight = args.weight;
    Source source(weight, tile, scratch);
    Dot<kTokens> dot{args.x + token * args.stride, args.stride, {}};
    walk_tile(weight, weight.tiles + tile * tile_bytes(weight.cols, weight.bits), source, dot);
    const int64_t rows = least(kTileRows, weight.rows - tile * kTileRows);
    for (int t = 0; t < kTokens; ++t) {
        float sums[kTileRows];
        four_sums(dot.sums[t], sums);
        float* out = args.out + (token + t) * args.out_stride + tile * kTileRows;
        for (int64_t r = 0; r < rows; ++r) out[r] = sums[r] + (weight.bias ? weight.bias[tile * kTileRows + r] : 0.0f);
    }
}

template <class Source>
struct Product {
    static void run(const ProductArgs& args, float* scratch, int64_t begin, int64_t end) {
        for (int64_t tile = begin; tile < end; ++tile) {
            int64_t token = 0;
            for (; token + 4 <= args.tokens; token += 4) tile_product<Source, 4>(args, scratch, tile, token);
            for (; token + 2 <= args.tokens; token += 2) tile_product<Source, 2>(args, scratch, tile, token);
            if (token < args.tokens) tile_product<Source, 1>(args, scratch, tile, token);
        }
    }
};

struct Keep {  // writes what is visited
    float* out;  // four rows of `padded` floats
    int64_t padded;
    LEANGRID_INLINE void operator()(int64_t step, const Lanes* values) {
        for (int64_t r = 0; r < kTileRows; ++r)
            for (int p = 0; p < kParts; ++p) store(out + r * padded + step * 16 + p * kFloats, values[r].part[p]);
    }
};

template <class Source>
struct Dense {
    static void run(const DenseArgs& args, float* scratch, float* rows, int64_t begin, int64_t end) {
        const Matrix& weight = args.weight;
        const int64_t padded = (weight.cols + 15) / 16 * 16;
        for (int64_t tile = begin; tile < end; ++tile) {
            Source source(weight, tile, scratch);
            Keep keep{rows, padded};
            walk_tile(weight, weight.tiles + tile * tile_bytes(weight.cols, weight.bits), source, keep);
            for (int64_t r = 0; r < least(kTileRows, weight.rows - tile * kTileRows); ++r) {
                const int64_t row = tile * kTileRows + r - args.first_row;
                if (args.dtype == kFloat32) {
                    memcpy(static_cast<float*>(args.out) + row * weight.cols, rows + r * padded, sizeof(float) * weight.cols);
                } else {
                    uint16_t* out = static_cast<uint16_t*>(args.out) + row * weight.cols;
                    const uint32_t* bits = reinterpret_cast<const uint32_t*>(rows + r * padded);
                    for (int64_t j = 0; j < weight.cols; ++j) out[j] = static_cast<uint16_t>((bits[j] + 0x7fff + (bits[j] >> 16 & 1)) >> 16);
                }
            }
        }
    }
};

// Runs Task<Source>::run(...) with the source that the weight asks for.
template <template <class> class Task, class... Args>
inline void with_source(const Matrix& weight, Args&&... args) {
    const bool affine = weight.zero_point != nullptr, aligned = weight.group_size % 16 == 0 || weight.group_size == weight.cols;
    if (affine && !aligned) return Task<ArithmeticSource<false>>::run(args...);
    if (affine && weight.bits > 4) return Task<ArithmeticSource<true>>::run(args...);
    if (weight.bits > 4) return Task<GatherSource>::run(args...);
    if (weight.bits == 4) return affine ? Task<AffineSource<4>>::run(args...) : Task<LutSource<4>>::run(args...);
    if (weight.bits == 3) return affine ? Task<AffineSource<3>>::run(args...) : Task<LutSource<3>>::run(args...);
    if (weight.bits == 2) return affine ? Task<AffineSource<2>>::run(args...) : Task<LutSource<2>>::run(args...);
    return affine ? Task<AffineSource<1>>::run(args...) : Task<LutSource<1>>::run(args...);
}

// A dense W, one token.
template <class Value>
inline void dense_product(const ProductArgs& args, const Value* values, int64_t begin, int64_t end) {
    const Matrix& weight = args.weight;
    const int64_t whole = weight.cols / kFloats * kFloats;
    for (int64_t tile = begin; tile < end; ++tile) {
        const Value* row[kTileRows];
        Floats sums[kTileRows] = {};
        for (int64_t r = 0; r < kTileRows; ++r) row[r] = values + row_of(weight, tile, r) * weight.cols;
        for (int64_t j = 0; j < whole; j += kFloats) {
            const Floats token = load(args.x + j);
            for (int64_t r = 0; r < kTileRows; ++r) sums[r] = fused(load(row[r] + j), token, sums[r]);
        }
        float total[kTileRows];
        four_sums(sums, total);
        for (int64_t r = 0; r < least(kTileRows, weight.rows - tile * kTileRows); ++r) {
            for (int64_t j = whole; j < weight.cols; ++j) total[r] += scalar(row[r], weight.dtype, j) * args.x[j];
            args.out[tile * kTileRows + r] = total[r] + (weight.bias ? weight.bias[tile * kTileRows + r] : 0.0f);
        }
    }
}

inline int64_t grid_floats(const Matrix& weight) {  // what AffineSource needs
    return weight.zero_point ? 2 * kTileRows * (weight.cols / weight.group_size) : 0;
}

bool product_range(const ProductArgs& args, int64_t begin, int64_t end) noexcept {
    if (!args.weight.tiles) {
        if (args.weight.dtype == kFloat32) dense_product(args, static_cast<const float*>(args.weight.values), begin, end);
        else dense_product(args, static_cast<const uint16_t*>(args.weight.values), begin, end);
        return true;
    }
    Buffer<float> scratch(grid_floats(args.weight));
    if (!scratch) return false;
    with_source<Product>(args.weight, args, scratch.data, begin, end);
    return true;
}

bool dense_range(const DenseArgs& args, int64_t begin, int64_t end) noexcept {
    Buffer<float> scratch(grid_floats(args.weight)), rows(kTileRows * ((args.weight.cols + 15) / 16 * 16));
    if (!scratch || !rows) return false;
    with_source<Dense>(args.weight, args, scratch.data, rows.data, begin, end);
    return true;
}

}  // namespace
}  // namespace leangrid
