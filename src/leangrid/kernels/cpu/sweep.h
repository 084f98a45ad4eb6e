// The loop inside one block of columns, one row a SIMD lane: lane l of every vector is row l of the tile, so the whole
// tile (b vectors, at most 8 KB for b = 128) stays in the first-level cache and no lane waits for another. The twin of
// plain/sweep.py and plain/descend.py.
#pragma once
#include "base.h"
#include "table.h"

namespace leangrid {
namespace {

constexpr int kLanes = kFloats;

inline Floats splat(float x) { return x - Floats{}; }

// [rows, b] row-major -> [b][lanes]; missing rows of the last tile repeat the last one (computed, never stored).
template <class T, class U>
inline void load_tile(const T* source, int64_t b, int rows, U* tile) {
    const T* from[kLanes];
    for (int l = 0; l < kLanes; ++l) from[l] = source + least(l, rows - 1) * b;
    for (int64_t j = 0; j < b; ++j)
        for (int l = 0; l < kLanes; ++l) tile[j * kLanes + l] = static_cast<U>(from[l][j]);
}

template <class T, class U>
inline void store_tile(const U* tile, int64_t b, int rows, T* target) {
    for (int l = 0; l < rows; ++l)
        for (int64_t j = 0; j < b; ++j) target[l * b + j] = static_cast<T>(tile[j * kLanes + l]);
}

struct Choice {
    Floats value;
    Ints code;
};

// Nearest of a row's own levels, ties to the lower one; codes count the midpoints passed.
struct LevelGrid {
    const GridArgs& grid;
    Buffer<float> levels, middles;  // [K][lanes]

    explicit LevelGrid(const GridArgs& g) : grid(g), levels(g.count * kLanes), middles(g.count * kLanes) {}
    bool ready() const { return levels.data && middles.data; }

    void tile(int64_t row, int rows) {
        load_tile(grid.levels + row * grid.count, grid.count, rows, levels.data);
        for (int i = 0; i < (grid.count - 1) * kLanes; ++i) middles[i] = 0.5f * levels[i] + 0.5f * levels[i + kLanes];
    }
    void column(int64_t) {}
    Choice nearest(Floats x) const {
        const Floats* level = (const Floats*)levels.data;
        const Floats* middle = (const Floats*)middles.data;
        Choice out{level[0], {}};
        for (int q = 0; q < grid.count - 1; ++q) {
            const Ints past = x > middle[q];
            out.value = past ? level[q + 1] : out.value;
            out.code -= past;
        }
        return out;
    }
    Floats value(Ints code) const {
        Floats out;
        for (int l = 0; l < kLanes; ++l) out[l] = levels[code[l] * kLanes + l];
        return out;
    }
};

// Nearest of S (q - Z), or with a stored offset of S q + B; S and Z or B those of the column's group.
template <bool kStored>
struct GroupGrid {
    const GridArgs& grid;
    int64_t row = 0;
    int rows = 0;
    Floats scale = {}, zero = {};

    explicit GroupGrid(const GridArgs& g) : grid(g) {}
    bool ready() const { return true; }

    void tile(int64_t first, int count) {
        row = first;
        rows = count;
    }
    void column(int64_t j) {
        alignas(64) float s[kLanes], z[kLanes];
        for (int l = 0; l < kLanes; ++l) {
            const int64_t at = (row + least(l, rows - 1)) * grid.groups + grid.group[j];
            s[l] = grid.scale[at];
            z[l] = kStored ? grid.offset[at] : grid.zero_point[at];
        }
        scale = *(const Floats*)s;
        zero = *(const Floats*)z;
    }
    Choice nearest(Floats x) const {
        // magic = 1.5 * 2^23: adding it rounds to an integer.
        const Floats low = {}, top = splat(static_cast<float>(grid.count - 1)), magic = splat(12582912.0f);
        Floats code = kStored ? (x - zero) / scale : x / scale + zero;
        code = code < low ? low : code;
        code = code > top ? top : code;
        code = (code + magic) - magic;
        return {level(code), __builtin_convertvector(code, Ints)};
    }
    Floats level(Floats code) const { return kStored ? scale * code + zero : scale * (code - zero); }
    Floats value(Ints code) const { return level(__builtin_convertvector(code, Floats)); }
};

template <class Grid>
inline bool sweep_tiles(const SweepArgs& args, int64_t begin, int64_t end) {
    const int64_t b = args.b;
    Buffer<float> left(b * kLanes), error(b * kLanes);
    Buffer<int32_t> codes(b * kLanes);
    Grid grid(args.grid);
    if (!left || !error || !codes || !grid.ready()) return false;
    Floats* w = (Floats*)left.data;
    for (int64_t row = begin; row < end; row += kLanes) {
        const int rows = static_cast<int>(least<int64_t>(kLanes, end - row));
        load_tile(args.weight + row * b, b, rows, left.data);
        grid.tile(row, rows);
        for (int64_t j = 0; j < b; ++j) {
            const float* u = args.square + j * b;
            grid.column(j);
            const Choice choice = grid.nearest(w[j]);
            const Floats e = (w[j] - choice.value) / splat(u[j]);
            ((Ints*)codes.data)[j] = choice.code;
            ((Floats*)error.data)[j] = e;
            for (int64_t k = j + 1; k < b; ++k) w[k] = w[k] - u[k] * e;
        }
        store_tile(codes.data, b, rows, args.codes + row * b);
        store_tile(error.data, b, rows, args.error + row * b);
    }
    return true;
}

template <class Grid>
inline bool descend_tiles(const SweepArgs& args, int64_t begin, int64_t end) {
    const int64_t b = args.b;
    Buffer<float> slope(b * kLanes), delta(b * kLanes);
    Buffer<int32_t> codes(b * kLanes);
    Grid grid(args.grid);
    if (!slope || !delta || !codes || !grid.ready()) return false;
    Floats* g = (Floats*)slope.data;
    const Floats zero = {}, better = splat(static_cast<float>(1.0 - 1e-6));
    for (int64_t row = begin; row < end; row += kLanes) {
        const int rows = static_cast<int>(least<int64_t>(kLanes, end - row));
        load_tile(args.weight + row * b, b, rows, slope.data);
        load_tile(args.codes + row * b, b, rows, codes.data);
        grid.tile(row, rows);
        for (int64_t j = 0; j < b; ++j) {
            const float* h = args.square + j * b;
            Floats& change = ((Floats*)delta.data)[j];
            change = zero;
            if (!(h[j] > 0.0f)) continue;
            grid.column(j);
            Ints& code = ((Ints*)codes.data)[j];
            const Floats now = grid.value(code), wanted = now - g[j] / splat(h[j]);
            const Choice choice = grid.nearest(wanted);
            const Floats far = wanted - now, near = wanted - choice.value;
            const Ints move = (near < zero ? -near : near) < (far < zero ? -far : far) * better;
            change = move ? choice.value - now : zero;
            code = move ? choice.code : code;
            bool any = false;
            for (int l = 0; l < kLanes; ++l) any |= move[l] != 0;
            if (any)
                for (int64_t k = j + 1; k < b; ++k) g[k] = g[k] + h[k] * change;
        }
        store_tile(codes.data, b, rows, args.codes + row * b);
        store_tile(delta.data, b, rows, args.error + row * b);
    }
    return true;
}

bool sweep_range(const SweepArgs& args, int64_t begin, int64_t end) noexcept {
    if (args.grid.levels) return sweep_tiles<LevelGrid>(args, begin, end);
    return args.grid.offset ? sweep_tiles<GroupGrid<true>>(args, begin, end) : sweep_tiles<GroupGrid<false>>(args, begin, end);
}

bool descend_range(const SweepArgs& args, int64_t begin, int64_t end) noexcept {
    if (args.grid.levels) return descend_tiles<LevelGrid>(args, begin, end);
    return args.grid.offset ? descend_tiles<GroupGrid<true>>(args, begin, end) : descend_tiles<GroupGrid<false>>(args, begin, end);
}

}  // namespace
}  // namespace leangrid
