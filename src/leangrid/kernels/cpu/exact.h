// LeanQuant-Exact, one weight row at a time: every row removes its columns in an order of its own, so rows share
// nothing but H^-1. The twin of plain/exact.py. There each step reads all earlier pivots; here A, the inverse for the
// columns that remain, is kept: within a batch of kBatch steps a pivot row is A_j less the batch's own pivots, then one
// pass takes the batch's columns out and its products off. That pass is nearly all of the n^3/6 multiplications and
// runs from registers; only the lower triangle of A counts.
#pragma once
#include "base.h"
#include "table.h"

namespace leangrid {
namespace {

constexpr int kBatch = 32, kTileRows = 4, kTileCols = 2 * kDoubles;
constexpr double kTiny = 2.2250738585072014e-308, kNever = __builtin_inf();
typedef int64_t Longs __attribute__((vector_size(kVectorBytes), may_alias));

inline Doubles spread_double(double x) { return x - Doubles{}; }
inline Doubles at(const double* x) { return *(const DoublesAt*)x; }
inline int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }  // a whole number of tiles in every build

struct ExactRow {
    const ExactArgs& args;
    // stride: two cache lines more than a row; a column of widths such as 1536 would else fall into one set.
    const int64_t n, stride;
    // a [n][stride], pivots [kBatch][stride], packed [tiles][kBatch][kTileCols], turned [stride][kBatch].
    Buffer<double> a, pivots, packed, turned;
    // [stride] each; closed: 0, or infinity where a column is done.
    Buffer<double> weight, diagonal, closed, scale, zero;
    Buffer<double> levels, middles;                        // [K]
    Buffer<int32_t> column, keep;                          // [stride]
    int64_t left = 0;                                      // columns in the arrays

    explicit ExactRow(const ExactArgs& x)
        : args(x), n(x.n), stride(padded(x.n) + 16), a(n * stride), pivots(kBatch * stride), packed(kBatch * stride), turned(stride * kBatch),
          weight(stride), diagonal(stride), closed(stride), scale(stride), zero(stride), levels(x.count), middles(x.count), column(stride),
          keep(stride) {}
    bool ready() const {
        return a.data && pivots.data && packed.data && turned.data && weight.data && diagonal.data && closed.data && scale.data &&
               zero.data && levels.data && middles.data && column.data && keep.data;
    }

    void start(int64_t row) {
        left = n;
        for (int64_t i = 0; i < n; ++i) {
            memcpy(a + i * stride, args.inverse + i * n, sizeof(double) * n);
            weight[i] = args.weight[row * n + i];
            diagonal[i] = args.inverse[i * n + i];
            column[i] = static_cast<int32_t>(i);
            const int64_t group = args.levels ? 0 : row * args.groups + args.group[i];
            scale[i] = args.levels ? 1.0 : args.scale[group];
            zero[i] = args.levels ? 0.0 : args.zero[group];
        }
        for (int i = 0; args.levels && i < args.count; ++i) levels[i] = args.levels[row * args.count + i];
        for (int i = 0; args.levels && i + 1 < args.count; ++i) middles[i] = 0.5 * (levels[i] + levels[i + 1]);
        open();
    }

    // Every column left may be chosen, and none of the padding.
    void open() {
        for (int64_t i = 0; i < left; ++i) closed[i] = 0.0;
        for (int64_t i = left; i < padded(left); ++i) {
            closed[i] = kNever;
            weight[i] = zero[i] = 0.0;
            diagonal[i] = scale[i] = 1.0;
        }
    }

    Doubles nearest(Doubles x, int64_t i) const {
        if (args.levels) {
            Doubles value = spread_double(levels[0]);
            for (int q = 0; q + 1 < args.count; ++q) value = x > spread_double(middles[q]) ? spread_double(levels[q + 1]) : value;
            return value;
        }
        // magic = 1.5 * 2^52: adding it rounds to an integer.
        const Doubles low = {}, top = spread_double(args.count - 1), magic = spread_double(6755399441055744.0);
        const Doubles s = at(scale + i), z = at(zero + i);
        Doubles code = x / s + z;
        code = code < low ? low : code;
        code = code > top ? top : code;
        return ((code + magic) - magic - z) * s;
    }

    uint8_t code_of(double x, int64_t i) const {
        int code = 0;
        if (args.levels) {
            for (int q = 0; q + 1 < args.count; ++q) code += x > middles[q];
            return static_cast<uint8_t>(code);
        }
        const double top = args.count - 1, raw = x / scale[i] + zero[i], inside = raw < 0.0 ? 0.0 : raw > top ? top : raw;
        return static_cast<uint8_t>((inside + 6755399441055744.0) - 6755399441055744.0);
    }

    // The column whose rounding costs least, the leftmost of equals; -1 where no cost is a number.
    int64_t cheapest(double* cost) const {
        Doubles best = spread_double(kNever);
        Longs where = Longs{} - 1, here = {};
        for (int l = 0; l < kDoubles; ++l) here[l] = l;
        for (int64_t i = 0; i < left; i += kDoubles, here += kDoubles) {
            const Doubles x = at(weight + i), error = x - nearest(x, i), now = error * error / at(diagonal + i) + at(closed + i);
            const Longs less = now < best;
            best = less ? now : best;
            where = less ? here : where;
        }
        int64_t pick = -1;
        *cost = kNever;
        for (int l = 0; l < kDoubles; ++l)
            if (where[l] >= 0 && (best[l] < *cost || (best[l] == *cost && where[l] < pick))) {
                *cost = best[l];
                pick = where[l];
            }
        return pick;
    }

    // Quantizes column j, moves the others and leaves its pivot row in pivots[step].
    void eliminate(int64_t j, int step) {
        double* row = pivots + step * stride;
        memcpy(row, a + j * stride, sizeof(double) * (j + 1));
        for (int64_t k = j + 1; k < left; ++k) row[k] = a[k * stride + j];
        for (int64_t k = left; k < padded(left); ++k) row[k] = 0.0;
        double own[kBatch];
        for (int t = 0; t < step; ++t) own[t] = pivots[t * stride + j];
        const double root = __builtin_sqrt(diagonal[j]), error = (weight[j] - nearest(spread_double(weight[j]), j)[0]) / root;
        const Doubles under = spread_double(root), moved = spread_double(error), tiny = spread_double(kTiny);
        for (int64_t k = 0; k < left; k += kDoubles) {
            Doubles x = at(row + k);
            for (int t = 0; t < step; ++t) x -= spread_double(own[t]) * at(pivots + t * stride + k);
            x /= under;
            *(DoublesAt*)(row + k) = x;
            *(DoublesAt*)(weight + k) = at(weight + k) - moved * x;
            const Doubles rest = at(diagonal + k) - x * x;
            *(DoublesAt*)(diagonal + k) = rest < tiny ? tiny : rest;
        }
        closed[j] = kNever;
    }

    // Drops the columns that are done, and takes the batch's products off A.
    void compact() {
        int64_t kept = 0;
        for (int64_t i = 0; i < left; ++i)
            if (closed[i] == 0.0) keep[kept++] = static_cast<int32_t>(i);
        for (int64_t i = 0; i < kept; ++i) {
            const int64_t from = keep[i];
            weight[i] = weight[from];
            diagonal[i] = diagonal[from];
            scale[i] = scale[from];
            zero[i] = zero[from];
            column[i] = column[from];
        }
        const int64_t wide = padded(kept);
        for (int64_t i = kept; i < wide; ++i) keep[i] = 0;  // read, never used
        for (int64_t i = 0; i < wide; ++i)
            for (int t = 0; t < kBatch; ++t) {
                const double x = i < kept ? pivots[t * stride + keep[i]] : 0.0;
                turned[i * kBatch + t] = x;
                packed[(i / kTileCols * kBatch + t) * kTileCols + i % kTileCols] = x;
            }
        left = kept;
        open();
        for (int64_t i = 0; i < left; i += kTileRows) take_off(i, least<int64_t>(kTileRows, left - i));
    }

    // Rows i .. i + rows of the smaller A, in place of larger ones: all that a tile needs is read before it is written,
    // and what later tiles and rows need lies to the right or below.
    void take_off(int64_t i, int64_t rows) {
        const double* from[kTileRows];
        const double* factor[kTileRows];
        for (int r = 0; r < kTileRows; ++r) {
            const int64_t mine = i + least<int64_t>(r, rows - 1);
            from[r] = a + keep[mine] * stride;
            factor[r] = turned + mine * kBatch;
        }
        for (int64_t side = 0; side < i + rows; side += kTileCols) {
            Doubles sum[kTileRows][2];
            for (int r = 0; r < kTileRows; ++r)
                for (int l = 0; l < kDoubles; ++l) {
                    sum[r][0][l] = from[r][keep[side + l]];
                    sum[r][1][l] = from[r][keep[side + kDoubles + l]];
                }
            const double* panel = packed + side * kBatch;
            for (int t = 0; t < kBatch; ++t) {
                const Doubles first = at(panel + t * kTileCols), second = at(panel + t * kTileCols + kDoubles);
                for (int r = 0; r < kTileRows; ++r) {
                    const Doubles f = spread_double(factor[r][t]);
                    sum[r][0] -= f * first;
                    sum[r][1] -= f * second;
                }
            }
            for (int64_t r = 0; r < rows; ++r) {
                *(DoublesAt*)(a + (i + r) * stride + side) = sum[r][0];
                *(DoublesAt*)(a + (i + r) * stride + side + kDoubles) = sum[r][1];
            }
        }
    }
};

bool exact_range(const ExactArgs& args, int64_t begin, int64_t end) noexcept {
    ExactRow state(args);
    if (!state.ready()) return false;
    for (int64_t row = begin; row < end; ++row) {
        double loss = 0.0, cost = 0.0;
        state.start(row);
        for (int64_t done = 0; done < args.n; ++done) {
            const int step = static_cast<int>(done % kBatch);
            if (done && step == 0) state.compact();
            int64_t j = state.cheapest(&cost);
            if (j < 0)
                for (j = 0; state.closed[j] != 0.0;) ++j;
            args.codes[row * args.n + state.column[j]] = state.code_of(state.weight[j], j);
            state.eliminate(j, step);
            loss += cost;
        }
        args.loss[row] = loss / 2;
    }
    return true;
}

}  // namespace
}  // namespace leangrid
