// The enumerative affine search by sorting; the mathematics is in plain/affine.py, whose
// arithmetic this follows operation by operation.
// affine_screen.h decides most short groups before this is needed.
#pragma once
#include "base.h"
#include "table.h"

namespace leangrid {
namespace {

// One sign of a group's weights: magnitudes ascending and, for every position, the sums of g|w| and g from there to the
// largest.
struct Side {
    double* magnitude;
    double* tails;  // pairs (sum g|w|, sum g), count + 1 of them
    int64_t count;
    int64_t* spot;  // per v: number of magnitudes <= S (v - 1/2); S only falls, so spots only move down
    double* run1;   // per v: sum over 1..v of the tail g|w|
    double* run0;   // per v: sum over 1..v of (2v - 1) times the tail g
    int done;       // how many v hold for the current S

    void build(const float* weight, const double* share, int64_t n, bool negative, uint64_t* keys, uint64_t* spare) {
        count = 0;
        for (int64_t i = 0; i < n; ++i) {
            const float w = negative ? -weight[i] : weight[i];
            keys[count] = static_cast<uint64_t>(float_bits(w)) << 32 | static_cast<uint64_t>(i);
            count += w > 0.0f ? 1 : 0;
        }
        radix_sort(keys, spare, count);
        double sum1 = 0.0, sum0 = 0.0;
        tails[2 * count] = tails[2 * count + 1] = 0.0;
        for (int64_t r = count - 1; r >= 0; --r) {
            const int64_t i = static_cast<int64_t>(keys[r] & 0xffffffffu);
            const double w = negative ? -static_cast<double>(weight[i]) : static_cast<double>(weight[i]);
            magnitude[r] = w;
            sum1 += share[i] * w;
            sum0 += share[i];
            tails[2 * r] = sum1;
            tails[2 * r + 1] = sum0;
        }
        run1[0] = run0[0] = 0.0;
    }

    void start(double scale, int upto) {
        for (int v = 1; v <= upto; ++v) spot[v] = rank_of(magnitude, count, scale * (v - 0.5));
    }

    void extend(double scale, int upto) {
        for (int v = done + 1; v <= upto; ++v) {
            const double x = scale * (v - 0.5);
            int64_t at = spot[v];
            while (at > 0 && magnitude[at - 1] > x) --at;
            spot[v] = at;
            run1[v] = run1[v - 1] + tails[2 * at];
            run0[v] = run0[v - 1] + tails[2 * at + 1] * (2.0 * v - 1.0);
        }
        done = most(done, upto);
    }
};

inline float round_to_half(float x) {  // to float16, from its smallest normal number up
    const uint32_t bits = float_bits(x);
    return bits_float((bits + 0xfffu + ((bits >> 13) & 1u)) & 0xffffe000u);
}

inline float round_to(double x, int dtype) {
    const float single = static_cast<float>(x);
    const uint32_t bits = float_bits(single);
    if (dtype == 2) return bits_float((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
    if (dtype == 0) return single;
    if (single >= 6.103515625e-05f) return round_to_half(single);
    return static_cast<float>(__builtin_rint(static_cast<double>(single) * 16777216.0) / 16777216.0);
}

struct Candidate {
    double value, scale;
    int zero_point;
};

struct Found {  // S, negative where a symmetric grid is mirrored
    double scale, objective;
    int zero_point;
};

struct Search {
    const AffineArgs& args;
    Side right, left;
    double energy;
    Candidate best;
    uint8_t seen[256];

    double zero_point(double lo, double width, int a, double scale) const {
        const double low = lo + a * width / args.steps;
        return most(0.0, least(static_cast<double>(args.levels - 1), __builtin_rint(-low / scale)));
    }

    void score(double scale, int z) {
        const int above = args.levels - 1 - z;
        right.extend(scale, above);
        left.extend(scale, z);
        const double a = right.run1[above] + left.run1[z], b = right.run0[above] + left.run0[z];
        const double value = (energy - (2.0 * scale) * a) + (scale * scale) * b;
        if (value < best.value) best = {value, scale, z};
    }

    void all(double lo, double width) {
        const int t = args.shrink_steps, k = args.levels;
        double last = -1.0;
        int from = 0, to = -1;  // zero points already scored for this S
        for (int s = 0; s < 2 * t - 1; ++s) {
            double scale = round_to((width - s * width / args.steps) / (k - 1), args.dtype);
            scale = most(args.smallest, least(args.largest, scale));
            if (s == 0) {
                right.start(scale, k - 1);
                left.start(scale, k - 1);
            }
            if (scale != last) {
                right.done = left.done = 0;
                from = 0;
                to = -1;
            } else if (args.symmetric) {
                continue;
            }
            last = scale;
            if (args.symmetric) {
                score(scale, k / 2);
                score(scale, k / 2 - 1);
                continue;
            }
            const int fewest = most(0, s - (t - 1)), largest = least(s, t - 1);
            if (width / args.steps / scale < 0.99) {  // one step of a moves -lo/S by less than 1: Z skips nothing
                const int first = static_cast<int>(zero_point(lo, width, largest, scale));
                const int final = static_cast<int>(zero_point(lo, width, fewest, scale));
                for (int z = first; z <= final; ++z)
                    if (z < from || z > to) score(scale, z);
                from = to < from ? first : least(from, first);
                to = most(to, final);
            } else {
                memset(seen, 0, sizeof(seen));
                for (int a = fewest; a <= largest; ++a) seen[static_cast<int>(zero_point(lo, width, a, scale))] = 1;
                for (int z = 0; z < k; ++z)
                    if (seen[z]) score(scale, z);
            }
        }
    }

    void run(const float* weight, const double* share, double lo, double width, uint64_t* keys, uint64_t* spare, Found& found) {
        energy = 0.0;
        for (int64_t i = 0; i < args.n; ++i) energy += share[i] * weight[i] * weight[i];
        right.build(weight, share, args.n, false, keys, spare);
        left.build(weight, share, args.n, true, keys, spare);
        best = {__builtin_inf(), 1.0, found.zero_point};
        all(lo, width);
        const bool mirrored = args.symmetric && best.zero_point != args.levels / 2;
        found.scale = mirrored ? -best.scale : best.scale;
        found.zero_point = args.symmetric ? args.levels / 2 : best.zero_point;
    }
};

// sum g (quant(w) - w)^2, every weight quantized, in column order.
inline double literal_objective(const float* weight, const double* share, int64_t n, double scale, int zero_point, int levels,
                                double* term) {
    // magic = 1.5 * 2^52: adding it rounds half to even.
    const double z = zero_point, top = levels - 1, magic = 6755399441055744.0;
    for (int64_t i = 0; i < n; ++i) {
        const double x = weight[i];
        double code = x / scale + z;
        code = code < 0.0 ? 0.0 : code;
        code = code > top ? top : code;
        code = (code + magic) - magic;
        const double error = x - scale * (code - z);
        term[i] = share[i] * error * error;
    }
    double sum = 0.0;
    for (int64_t i = 0; i < n; ++i) sum += term[i];
    return sum;
}

}  // namespace
}  // namespace leangrid
