// A screen before the exact affine search: every pair (S, Z) of a short group scored in float32, one S a lane, no sort.
// A group is decided here when one pair alone can be the exact search's winner; the rest goes to Search (affine.h), so
// the answer is always Search's.
//
// Why one pair can be sure. For a pair let F = sum g e^2, e the distance of w from its nearest level S v (v = q - Z, an
// integer clamped to [-Z, K-1-Z]), E = sum g w^2, |.| the norm sqrt(sum g (.)^2), eps = 2^-24, u = 2^-53. v = 0 is
// allowed, so F <= E.
// (1) The code v' here is the nearest allowed integer to x', w times the rounded 1/S, instead of x = w/S: x' = x (1 +-
//     eps) with fma, 1 +- 2.01 eps without. From |v' - x'| <= |v - x'| follows |v' - x| <= |v - x| + 2 |x' - x|: the
//     error of w grows by 2 eps |w|, or 4.1. Rounding v' S - w adds eps e, without fma another eps (|w| + e). So the
//     norm of the errors computed is sqrt(F) up to eps (kCodeError sqrt(E) + 4 sqrt(F)).
// (2) g rounded to float32, three products and sums of positive terms in chains of at most kChain: a factor 1 +- rho.
//     Whatever underflows (g is scaled to at most 2, w to at most 1) adds less than 2^-120 a weight.
// (3) What Search compares is energy - 2 S A + S^2 B in float64. Its sums have positive terms, so it is F up to (n + K
//     + 8) u times (E + 2 S A + S^2 B) <= 9 E, and what underflows; the literal objective is F up to (8 K + n + 20) u
//     E.
// The pair that Search picks is never above the pair that is best here by more than these bounds, which is the
// threshold below.
#pragma once
#include "affine.h"
#include "base.h"
#include "table.h"

namespace leangrid {
namespace {

constexpr int64_t kChain = 64;       // float32 terms in one running sum
constexpr int64_t kScores = 1 << 16;  // float32 scores kept for a group
#ifdef __FMA__
constexpr double kCodeError = 2.5;
constexpr int64_t kMostWork = 1 << 19;  // n times the number of S above which sorting is faster; measured
#else
constexpr double kCodeError = 6.0;
constexpr int64_t kMostWork = 1 << 16;
#endif
constexpr int kSurvivors = 8;
constexpr int64_t kMostSteps = 1 << 14;  // 2 t; T itself stays where `walk` is sure
constexpr int kFinestSteps = 1 << 20;

struct Weighted {
    float w, g;
};

inline Floats lanes_of(float x) { return x - Floats{}; }

inline double power_of_two(int exponent) {  // -1022..1023
    const uint64_t bits = static_cast<uint64_t>(exponent + 1023) << 52;
    double x;
    memcpy(&x, &bits, 8);
    return x;
}

inline int exponent_of(double x) {  // of a normal double: x = m 2^exponent, 1 <= m < 2
    uint64_t bits;
    memcpy(&bits, &x, 8);
    return static_cast<int>(bits >> 52 & 0x7ff) - 1023;
}

constexpr double kWhole = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds a double to an integer

// sum over the items of g (S v - w)^2, v = w / S rounded and clamped to [low, high] - kMagic; S and Z differ from lane
// to lane. count is even. kMagic = 1.5 * 2^23: adding it to a small float rounds that to an integer.
constexpr float kMagic = 12582912.0f;
template <bool clamped>
inline Floats lane_sums(const Weighted* item, int64_t count, Floats inverse, Floats minus_scale, Floats low, Floats high) {
    const Floats magic = lanes_of(kMagic);
    const auto add = [&](const Weighted& it, Floats sum) {
        const Floats w = lanes_of(it.w);
        Floats code = mul_add(w, inverse, magic);
        if (clamped) {
            code = code > low ? code : low;
            code = code < high ? code : high;
        }
        const Floats error = mul_add(code - magic, minus_scale, w);
        return mul_add(error * it.g, error, sum);
    };
    Floats total = {};
    for (int64_t begin = 0; begin < count; begin += 2 * kChain) {
        Floats even = {}, odd = {};
        const int64_t end = least(count, begin + 2 * kChain);
        for (int64_t i = begin; i < end; i += 2) {
            even = add(item[i], even);
            odd = add(item[i + 1], odd);
        }
        total += even + odd;
    }
    return total;
}

struct Screen {
    const AffineArgs& args;
    double *size, *start;            // distinct S, falling, and the first s of each (one more: 2t - 1)
    float *scale, *inverse, *first, *last;  // the same S in the group's unit, 1/S, and its zero points
    int32_t* spread;                 // how many of those
    float *w, *g, *value;
    Weighted* item;                  // weights no pair clamps first, then a gap, then the others
    double lo, width, step;  // step: 1/T where that is exact, else 0
    int64_t count, bulk, tail, end, kept;
    float energy;

    // lo + a R/T moves by this; a division is a multiplication where that rounds alike.
    template <class T>
    T share_of_width(T part) const { return step > 0.0 ? part * width * step : part * width / static_cast<double>(args.steps); }
    float rounded(double s) const { return round_to((width - share_of_width(s)) / (args.levels - 1), args.dtype); }

    // bfloat16: few distinct S, found from above. V rounds up to the middle between V and the next value below, which
    // in terms of s is `at`; only near an integer is that not sure, and then the definition decides.
    void walk(uint32_t bits, uint32_t end) {
        const double slope = (args.levels - 1) / width * args.steps, slack = args.steps * 2.4e-7 + 1e-9;
        double from = 0.0;
        int64_t found = 0;
        for (; bits > end; bits -= 0x10000u) {
            const double at = args.steps - bits_float(bits - 0x8000u) * slope, nearest = (at + kWhole) - kWhole;
            double next = nearest + (nearest <= at ? 1.0 : 0.0);
            if (__builtin_fabs(at - nearest) < slack) next = nearest + (float_bits(rounded(nearest)) >= bits ? 1.0 : 0.0);
            size[found] = bits_float(bits);
            start[found] = from;
            found += next > from ? 1 : 0;
            from = next;
        }
        size[found] = bits_float(bits);
        start[found] = from;
        count = found + 1;
    }

    // Other dtypes: about one S for every s.
    void list(float low) {
        const double divisor = args.levels - 1;
        const int64_t total = 2 * args.shrink_steps - 1;
        Doubles s = {};
        for (int lane = 0; lane < kDoubles; ++lane) s[lane] = lane;
        for (int64_t i = 0; i < total; i += kDoubles, s += static_cast<double>(kDoubles)) {
            const HalfFloats here = __builtin_convertvector((width - share_of_width(s)) / divisor, HalfFloats);
            *(HalfFloats*)(scale + i) = here;
            *(Doubles*)(size + i) = __builtin_convertvector(here, Doubles);
            *(Doubles*)(start + i) = s;
        }
        count = total;
        if (args.dtype == 0) return;  // T is small enough for every s to have an S of its own
        const bool normal = low >= 6.103515625e-05f;
        for (int64_t i = 0; i < total; ++i) scale[i] = normal ? round_to_half(scale[i]) : round_to(scale[i], 1);
        float before = 0.0f;
        count = 0;
        for (int64_t i = 0; i < total; ++i) {
            size[count] = scale[i];
            start[count] = static_cast<double>(i);
            count += scale[i] != before ? 1 : 0;
            before = scale[i];
        }
    }

    // Every pair, in lanes: for each S the zero points of a in [max(0, s - (t-1)), min(s, t-1)] for all of its s.
    // Neighbouring s share an a and one step of a moves Z by at most 1, so they are the integers between two ends.
    // False: this group is left to Search.
    bool pairs(double unit) {
        const double t1 = args.shrink_steps - 1;
        const float high = rounded(0.0), low = rounded(2.0 * t1);
        if (!(high < args.largest && low > args.smallest && high * unit <= 4.0 && low * unit >= 6e-5)) return false;
        if (!args.symmetric && !(width / args.steps / low < 0.99)) return false;
        if (args.dtype == 2) walk(float_bits(high), float_bits(low));
        else list(low);
        if (count * args.n > kMostWork) return false;
        for (int64_t i = count; i <= count + kFloats; ++i) {
            size[i] = high;
            start[i] = 2.0 * t1 + 1.0;
        }
        const float middle = static_cast<float>(args.levels / 2);
        for (int64_t i = 0; i < count; i += kDoubles) {
            const Doubles s = *(const Doubles*)(size + i), zero = {}, top = zero + (args.levels - 1.0);
            *(HalfFloats*)(scale + i) = __builtin_convertvector(s * unit, HalfFloats);
            if (args.symmetric) {
                *(HalfFloats*)(first + i) = HalfFloats{} + (middle - 1.0f);
                *(HalfFloats*)(last + i) = HalfFloats{} + middle;
                continue;
            }
            Doubles least_a = *(const Doubles*)(start + i) - t1, most_a = *(const DoublesAt*)(start + i + 1) - 1.0;
            least_a = least_a > zero ? least_a : zero;
            most_a = most_a < t1 ? most_a : zero + t1;
            Doubles from = (-(lo + share_of_width(most_a)) / s + kWhole) - kWhole;
            Doubles to = (-(lo + share_of_width(least_a)) / s + kWhole) - kWhole;
            from = from > zero ? from : zero;
            to = to > zero ? to : zero;
            *(HalfFloats*)(first + i) = __builtin_convertvector(from < top ? from : top, HalfFloats);
            *(HalfFloats*)(last + i) = __builtin_convertvector(to < top ? to : top, HalfFloats);
        }
        for (int64_t i = count; i % kFloats; ++i) {  // lanes without an S have no zero point
            scale[i] = 1.0f;
            first[i] = 0.0f;
            last[i] = -1.0f;
        }
        for (int64_t i = 0; i < count; i += kFloats) {
            *(Floats*)(inverse + i) = 1.0f / *(const Floats*)(scale + i);
            *(Ints*)(spread + i) = __builtin_convertvector(*(const Floats*)(last + i) - *(const Floats*)(first + i), Ints) + 1;
        }
        return true;
    }

    // w and g in units that keep float32 away from overflow, and which weights no pair clamps.
    void weights(const float* weight, const double* share, double unit, double share_unit) {
        const int64_t n = args.n;
        for (int64_t i = 0; i < n; ++i) {
            w[i] = static_cast<float>(weight[i] * unit);
            g[i] = static_cast<float>(share[i] * share_unit);
        }
        for (int64_t i = n; i % kFloats; ++i) w[i] = g[i] = 0.0f;
        const Floats top = lanes_of(args.levels - 1.0f);
        Floats above = lanes_of(1e30f), below = lanes_of(-1e30f), sum = {};
        for (int64_t i = 0; i < count; i += kFloats) {
            const Floats s = *(const Floats*)(scale + i), z0 = *(const Floats*)(first + i), z1 = *(const Floats*)(last + i);
            const Floats up = s * (top - z1 + 0.5f), down = s * (-0.5f - z0);
            above = up < above ? up : above;
            below = down > below ? down : below;
        }
        for (int64_t i = 0; i < n; i += kFloats) {
            const Floats x = *(const Floats*)(w + i);
            sum += *(const Floats*)(g + i) * x * x;
        }
        float high = above[0], low = below[0];
        energy = sum[0];
        for (int lane = 1; lane < kFloats; ++lane) {
            high = least(high, above[lane]);
            low = most(low, below[lane]);
            energy += sum[lane];
        }
        high *= 0.999999f;
        low *= 0.999999f;
        int64_t ahead = 0, behind = end;
        for (int64_t i = 0; i < n; ++i) {
            const bool free = (w[i] < high) & (w[i] > low);
            item[free ? ahead : behind - 1] = {w[i], g[i]};
            ahead += free ? 1 : 0;
            behind -= free ? 0 : 1;
        }
        item[ahead] = item[behind - 1] = {0.0f, 0.0f};
        bulk = ahead + (ahead & 1);
        tail = behind - (behind & 1);
    }

    struct Mark {
        int64_t lane;
        int zero_point;
    };

    // The best score; where says which pair has it.
    float score(Mark& where) {
        const Floats top = lanes_of(args.levels - 1.0f), magic = lanes_of(kMagic);
        Floats best = lanes_of(__builtin_inff());
        Ints at = {};
        kept = 0;
        for (int64_t i = 0; i < count; i += kFloats) {
            int32_t most_pairs = 0;
            for (int lane = 0; lane < kFloats; ++lane) most_pairs = most(most_pairs, spread[i + lane]);
            const Floats inverse_scale = *(const Floats*)(inverse + i), minus = -*(const Floats*)(scale + i);
            const Floats stop = *(const Floats*)(last + i), base = lane_sums<false>(item, bulk, inverse_scale, minus, magic, magic);
            Floats zero = *(const Floats*)(first + i);
            if (kept + most_pairs * kFloats > kScores) {  // more than we keep: all survive
                kept = 0;
                return 0.0f;
            }
            for (int32_t z = 0; z < most_pairs; ++z, zero += 1.0f) {
                const Floats low = magic - zero, high = magic + (top - zero);
                const Floats sum = base + lane_sums<true>(item + tail, end - tail, inverse_scale, minus, low, high);
                const Floats here = zero <= stop ? sum : lanes_of(__builtin_inff());
                const Ints better = here < best;
                best = better ? here : best;
                at = better ? Ints{} + static_cast<int32_t>(i << 8 | z) : at;
                *(Floats*)(value + kept) = here;
                kept += kFloats;
            }
        }
        float value_least = best[0];
        int lane = 0;
        for (int l = 1; l < kFloats; ++l)
            if (best[l] < value_least) {
                value_least = best[l];
                lane = l;
            }
        const int64_t i = (at[lane] >> 8) + lane;
        where = {i, static_cast<int>(first[i]) + (at[lane] & 255)};
        return value_least;
    }

    // No pair with a higher score can be the one that Search picks: (1), (2), (3), and back again.
    float threshold(float score, double unit, double share_unit) const {
        const double eps = 0x1p-24, n = static_cast<double>(args.n), k = args.levels, sum = energy * 1.001, root = __builtin_sqrt(sum);
        const double rho = 1.0 + (least(n, static_cast<double>(kChain)) + n / kChain + 12.0) * eps, tiny = n * 0x1p-120;
        const double up = (__builtin_sqrt(score * rho + tiny) + kCodeError * eps * root) / (1.0 - 4.0 * eps);
        const double slack = 18.0 * (n + k + 8.0) * 0x1p-53 * sum + 4.0 * (n + k) * (0x1p-1020 * share_unit) * unit * unit;
        const double back = __builtin_sqrt(up * up + slack) * (1.0 + 4.0 * eps) + kCodeError * eps * root;
        return static_cast<float>((back * back * rho + tiny) * (1.0 + 4.0 * eps));
    }

    // The pairs at or below the limit, in the order of the scores.
    void list_marks(float limit, Mark* mark) const {
        const float* here = value;
        for (int64_t i = 0; i < count; i += kFloats) {
            int32_t most_pairs = 0;
            for (int lane = 0; lane < kFloats; ++lane) most_pairs = most(most_pairs, spread[i + lane]);
            for (int32_t z = 0; z < most_pairs; ++z, here += kFloats)
                for (int lane = 0; lane < kFloats; ++lane)
                    if (here[lane] <= limit) *mark++ = {i + lane, static_cast<int>(first[i + lane]) + z};
        }
    }

    // The pair that Search would pick, where that is sure.
    bool decide(const float* weight, const double* share, double unit, double share_unit, double* term, Found& found) {
        Mark mark[kSurvivors];
        const Floats limit = lanes_of(threshold(score(mark[0]), unit, share_unit));
        Ints hits = {};
        for (int64_t i = 0; i < kept; i += kFloats) hits -= *(const Floats*)(value + i) <= limit;
        int survivors = 0;
        for (int lane = 0; lane < kFloats; ++lane) survivors += hits[lane];
        if (survivors < 1 || survivors > kSurvivors) return false;
        if (survivors > 1) list_marks(limit[0], mark);
        double second = __builtin_inf();
        found.objective = __builtin_inf();
        for (int m = 0; m < survivors; ++m) {
            const bool mirrored = args.symmetric && mark[m].zero_point != args.levels / 2;
            const double s = mirrored ? -size[mark[m].lane] : size[mark[m].lane];
            const int z = args.symmetric ? args.levels / 2 : mark[m].zero_point;
            const double here = literal_objective(weight, share, args.n, s, z, args.levels, term);
            second = least(second, most(here, found.objective));
            if (here < found.objective) found = {s, here, z};
        }
        const double sum = energy * 1.001 / share_unit / unit / unit, terms = static_cast<double>(args.n + args.levels + 10);
        return survivors == 1 || second - found.objective > 40.0 * terms * (0x1p-53 * sum + 0x1p-1020);
    }

    bool solve(const float* weight, const double* share, double low, double range, float magnitude, double* term, Found& found) {
        double heaviest = 0.0;
        for (int64_t i = 0; i < args.n; ++i) heaviest = most(heaviest, share[i]);
        if (!(heaviest > 0x1p-1000)) return false;
        const double unit = power_of_two(-1 - exponent_of(magnitude)), share_unit = power_of_two(-exponent_of(heaviest));
        lo = low;
        width = range;
        if (!pairs(unit)) return false;
        weights(weight, share, unit, share_unit);
        return decide(weight, share, unit, share_unit, term, found);
    }
};

bool affine_range(const AffineArgs& args, int64_t begin, int64_t end) noexcept {
    const int64_t n = args.n, steps = 2 * static_cast<int64_t>(args.shrink_steps), lanes = (steps + 2 * kFloats) / kFloats * kFloats;
    const int64_t wide = (n + 8 + kFloats) / kFloats * kFloats;
    const int k = args.levels;
    const bool screened = steps <= kMostSteps && args.steps <= kFinestSteps && n * (args.dtype == 2 ? 32 : steps / 2) <= kMostWork;
    Buffer<uint64_t> keys(n), spare(n);
    Buffer<double> values(2 * n), tails(4 * (n + 1)), runs(4 * (k + 1)), sizes(screened ? 2 * lanes : 0);
    Buffer<int64_t> spots(2 * (k + 1));
    Buffer<float> grids(screened ? 4 * lanes : 0), parts(screened ? 2 * wide : 0), scores(screened ? kScores : 0);
    Buffer<int32_t> spread(screened ? lanes : 0);
    Buffer<Weighted> items(screened ? wide : 0);
    if (!keys || !spare || !values || !tails || !runs || !spots || !sizes || !grids || !parts || !scores || !spread || !items) return false;
    Search search{args,
                  {values, tails, 0, spots, runs, runs + (k + 1), 0},
                  {values + n, tails + 2 * (n + 1), 0, spots + (k + 1), runs + 2 * (k + 1), runs + 3 * (k + 1), 0},
                  0.0, {}, {}};
    const bool halves = (args.steps & (args.steps - 1)) == 0;
    Screen screen{args, sizes, sizes + lanes, grids, grids + lanes, grids + 2 * lanes, grids + 3 * lanes, spread,
                  parts, parts + wide, scores, items, 0.0, 0.0, halves ? 1.0 / args.steps : 0.0, 0, 0, 0, (n + 5) / 2 * 2, 0, 0.0f};
    for (int64_t item = begin; item < end; ++item) {
        const float* weight = args.weight + item * n;
        const double* share = args.importance + item % args.period * n;
        float low = 0.0f, high = 0.0f;
        for (int64_t i = 0; i < n; ++i) {
            low = least(low, weight[i]);
            high = most(high, weight[i]);
        }
        double lo = low, hi = high;
        if (args.symmetric) {
            hi = most(-lo, hi);
            lo = -hi;
        }
        const float magnitude = most(-low, high);
        Found found{1.0, 0.0, args.symmetric ? k / 2 : 0};
        if (!(magnitude > 0.0f && screened && screen.solve(weight, share, lo, hi - lo, magnitude, values, found))) {
            if (magnitude > 0.0f) search.run(weight, share, lo, hi - lo, keys, spare, found);
            found.objective = literal_objective(weight, share, n, found.scale, found.zero_point, k, values);
        }
        args.scale[item] = static_cast<float>(found.scale);
        args.zero_point[item] = static_cast<uint8_t>(found.zero_point);
        args.objective[item] = found.objective;
    }
    return true;
}

}  // namespace
}  // namespace leangrid
