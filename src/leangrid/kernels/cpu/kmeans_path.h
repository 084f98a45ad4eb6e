// The optimum of k clusters as a shortest path: when every cluster costs lambda more, the cheapest partition into any
// number of clusters is one pass over the row, and where that number is k no partition into k clusters is cheaper. The
// cost of an optimum is convex in its number of clusters (interval costs obey the quadrangle inequality), so some
// lambda gives k, unless two numbers tie at it.
#pragma once
#include "base.h"

namespace leangrid {
namespace {

constexpr int kTurns = 8;

struct Prefix {  // sums over the distinct values 0..m, from one end
    const double *p0, *p1, *p2;
    int64_t m;

    double cost(int64_t from, int64_t to) const {
        const double s0 = p0[to] - p0[from], s1 = p1[to] - p1[from], s2 = p2[to] - p2[from];
        return most(0.0, s2 - (s0 > 0.0 ? s1 * s1 / s0 : 0.0));
    }
};

inline Doubles spread_of(Doubles s0, Doubles s1, Doubles s2) {  // of an interval's sums of g, g x, g x^2: its cost
    const Doubles zero = {}, ratio = s1 * s1 / s0, part = s2 - (s0 > zero ? ratio : zero);
    return part > zero ? part : zero;
}

// The best start in [low, at) of a last cluster that ends at `end`, where total[] holds the cheapest cost of every
// prefix before `at`. It rises, so nothing from the first i on with total[i] alone above the best can win: where that
// comes before `at` the split is final.
inline int64_t last_split(const Prefix& p, const double* total, int64_t low, int64_t at, int64_t end, bool& final) {
    const Doubles zero = {};
    Doubles value = zero + __builtin_inf(), from = zero, index = zero;
    for (int lane = 0; lane < kDoubles; ++lane) index[lane] = static_cast<double>(low + lane);
    final = false;
    for (int64_t i = low; i < at && !final; i += kDoubles, index += static_cast<double>(kDoubles)) {
        const Doubles s0 = p.p0[end] - *(const DoublesAt*)(p.p0 + i), s1 = p.p1[end] - *(const DoublesAt*)(p.p1 + i);
        const Doubles s2 = p.p2[end] - *(const DoublesAt*)(p.p2 + i), here = *(const DoublesAt*)(total + i) + spread_of(s0, s1, s2);
        const auto better = (here < value) & (index < static_cast<double>(at));
        value = better ? here : value;
        from = better ? index : from;
        final = i + kDoubles < at && total[i + kDoubles] >= least_lane(value);
    }
    const double best = least_lane(value);
    return static_cast<int64_t>(least_lane(value == best ? from : zero + __builtin_inf()));
}

// total and split of kDoubles neighbouring ends from at on, one a lane, with splits in [low, high]; unless final, also
// at at and after it.
inline void lane_splits(const Prefix& p, double lambda, int64_t low, int64_t high, int64_t at, bool final, double* total, int32_t* split) {
    const Doubles e0 = *(const DoublesAt*)(p.p0 + at), e1 = *(const DoublesAt*)(p.p1 + at), e2 = *(const DoublesAt*)(p.p2 + at), zero = {};
    Doubles value = zero + __builtin_inf(), from = zero, place = zero;
    const auto relax = [&](int64_t i, double done, auto allowed) {
        const Doubles here = done + spread_of(e0 - p.p0[i], e1 - p.p1[i], e2 - p.p2[i]);
        const auto better = (here < value) & allowed;
        value = better ? here : value;
        from = better ? zero + static_cast<double>(i) : from;
    };
    for (int64_t i = low; i <= high; ++i) relax(i, total[i], zero == zero);
    for (int lane = 0; lane < kDoubles; ++lane) place[lane] = lane;
    for (int lane = 0; !final && lane < kDoubles - 1; ++lane) relax(at + lane, value[lane] + lambda, place > lane);
    *(DoublesAt*)(total + at) = value + lambda;
    for (int lane = 0; lane < kDoubles; ++lane) split[at + lane] = static_cast<int32_t>(from[lane]);
}

// The cheapest way through all values when every cluster costs lambda more, whatever their number: total[j] = min over
// i < j of total[i] + cost(i, j) + lambda, split[j] the smallest such i. Splits rise with j, so a block of neighbouring
// ends has its splits between that of the end before it and that of its own last end. Where a cluster is too short for
// that split to lie before the block, the block is one vector long.
inline void cheapest_path(const Prefix& p, double lambda, int64_t block, double* total, int32_t* split) {
    int64_t low = 0;
    total[0] = 0.0;
    for (int64_t at = 1; at <= p.m;) {
        bool final = false;
        int64_t end = at + most(block, int64_t{kDoubles}) - 1;
        int64_t high = end <= p.m ? last_split(p, total, low, at, end, final) : 0;
        if (!final) {
            end = at + kDoubles - 1;
            high = last_split(p, total, low, at, end, final);
            if (!final) high = at - 1;
        }
        for (; at <= end; at += kDoubles) {
            const int64_t last = at + kDoubles - 1;
            bool sure;
            const int64_t top = last < end ? last_split(p, total, low, high + 1, last, sure) : high;
            lane_splits(p, lambda, low, top, at, final, total, split);
            low = split[last];
        }
    }
}

// The bounds (k + 1) of the optimal partition into k clusters, from a first guess of lambda; false where no lambda
// tried gives k. Each turn that misses gives the exact optimum of another number; between two of them the next lambda
// is the slope of their chord.
inline bool penalised_path(const Prefix& p, int k, double lambda, double* total, int32_t* split, int64_t* bound) {
    // Long blocks spread the search for a block's last split, short ones keep the searches inside it short: w / B
    // against B / kDoubles.
    const double width = static_cast<double>(p.m) / k, even = __builtin_sqrt(width * kDoubles * 2.0 / 3.0);
    const int64_t block = static_cast<int64_t>(least(width / 4.0, even)) / kDoubles * kDoubles;
    int64_t more = 0, fewer = 0;
    double cost_more = 0.0, cost_fewer = 0.0;
    for (int turn = 0; turn < kTurns && lambda > 0.0; ++turn) {
        cheapest_path(p, lambda, block, total, split);
        int64_t count = 0;
        double cost = 0.0;
        for (int64_t at = p.m; at > 0; at = split[at], ++count) {
            if (count < k) bound[k - count] = at;
            cost += p.cost(split[at], at);
        }
        bound[0] = 0;
        if (count == k) return true;
        if (more > 0 && fewer > 0 && (count >= more || count <= fewer)) return false;  // k lies on the chord
        (count > k ? more : fewer) = count;
        (count > k ? cost_more : cost_fewer) = cost;
        const double ratio = static_cast<double>(count) / k;
        lambda = more > 0 && fewer > 0 ? (cost_fewer - cost_more) / static_cast<double>(more - fewer) : lambda * ratio * ratio * ratio;
    }
    return false;
}

}  // namespace
}  // namespace leangrid
