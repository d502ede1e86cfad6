// Tokens from rows of logits: log-probabilities, the most probable tokens, and draws.
//
// src/device/host/sample.rs is the definition; weights have the same bits as there, sums in f64 another order. Instead
// of sorting, thresholds are found by halving the range of a weight's bits: as many sweeps over a row in the cache.

constexpr u32 THREADS = 512;

struct DrawTask {
    double uniform;
    u32 row, target, token;
    u32 top, first_top;
    u32 has_allowed, first_allowed, num_allowed;
    u32 first_banned, num_banned;
    u32 first_bias, num_bias;
    u32 first_count, num_counts;
    u32 top_k;
    float repetition_penalty, frequency_penalty, presence_penalty, temperature, min_p, top_p;
    u32 unused;
};

struct TokenBias {
    u32 token;
    float bias;
};

struct TokenCount {
    u32 token, output;
};

struct DrawnToken {
    u32 token;
    float logprob;
    u32 problem;
    u32 unused;
};

enum { NOT_FINITE = 1, NONE_ALLOWED = 2 };

// Below this temperature the best token is taken.
constexpr float GREEDY_BELOW = 1e-5f;

// An element per warp, of each type that is reduced.
struct Room {
    float* floats;
    double* doubles;
    u64* words;
    u32* counts;
};

// Orders tokens by value, then the lower id first: the greatest is the best.
DEVICE u64 rank_of(float value, u32 token) {
    u32 bits = float_bits(value);
    return u64(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | ~token;
}

DEVICE u64 best_below(const float* values, u32 count, u64 bound, const Room& room) {
    u64 best = 0;
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
        u64 rank = rank_of(values[i], i);
        if (rank < bound) best = greatest(best, rank);
    }
    return reduce_block<Max>(best, room.words);
}

// max + ln(sum exp(x - max)); NaN when a logit is not finite.
DEVICE double log_normalizer(const float* logits, u32 count, const Room& room) {
    float max = -infinite(), finite = 0.0f;
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
        max = greatest(max, logits[i]);
        finite = fmaf(logits[i], 0.0f, finite);
    }
    max = reduce_block<Max>(max, room.floats);
    finite = reduce_block<Sum>(finite, room.floats);
    if (finite != finite) return finite;
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < count; i += THREADS) sum += exp_f32(logits[i] - max);
    return max + log(reduce_block<Sum>(sum, room.doubles));
}

// Logits after masks, bias and penalties. A token's changes are all made by one thread, in their order. Adding 0 makes
// one zero of both, so that neither is better.
DEVICE void adjust(const DrawTask& draw, const float* logits, u32 count, const u32* tokens, const TokenBias* biases,
                   const TokenCount* counts, float* out) {
    auto mine = [](u32 token) { return token % THREADS == threadIdx.x; };
    for (u32 i = threadIdx.x; i < count; i += THREADS) out[i] = draw.has_allowed ? -infinite() : logits[i] + 0.0f;
    if (draw.has_allowed) {
        for (u32 i = 0; i < draw.num_allowed; i++) {
            u32 token = tokens[draw.first_allowed + i];
            if (mine(token)) out[token] = logits[token] + 0.0f;
        }
    }
    for (u32 i = 0; i < draw.num_banned; i++) {
        u32 token = tokens[draw.first_banned + i];
        if (token < count && mine(token)) out[token] = -infinite();
    }
    for (u32 i = 0; i < draw.num_bias; i++) {
        TokenBias bias = biases[draw.first_bias + i];
        if (mine(bias.token)) out[bias.token] += bias.bias;
    }
    if (draw.repetition_penalty != 1.0f || draw.frequency_penalty != 0.0f || draw.presence_penalty != 0.0f) {
        for (u32 i = 0; i < draw.num_counts; i++) {
            TokenCount seen = counts[draw.first_count + i];
            if (!mine(seen.token)) continue;
            float logit = out[seen.token];
            logit = logit > 0.0f ? logit / draw.repetition_penalty : logit * draw.repetition_penalty;
            logit -= multiply_rounded(draw.frequency_penalty, float(seen.output));
            if (seen.output > 0) logit -= draw.presence_penalty;
            out[seen.token] = logit;
        }
    }
    sync_block();
}

// How many weights are at least `bits`, or the mass of those that are at most that. Weights are not negative, so they
// are ordered as their bits are.
DEVICE u32 count_from(const float* weights, u32 count, u32 bits, const Room& room) {
    u32 found = 0;
    for (u32 i = threadIdx.x; i < count; i += THREADS) found += float_bits(weights[i]) >= bits;
    return reduce_block<Sum>(found, room.counts);
}
DEVICE double mass_up_to(const float* weights, u32 count, u32 bits, const Room& room) {
    double mass = 0.0;
    for (u32 i = threadIdx.x; i < count; i += THREADS)
        if (float_bits(weights[i]) <= bits) mass += weights[i];
    return reduce_block<Sum>(mass, room.doubles);
}

// The bits of 1, which no weight exceeds.
constexpr u32 MOST = 0x3f800000u;

// Zeroes weights below a threshold.
DEVICE void drop_below(float* weights, u32 count, u32 bits) {
    for (u32 i = threadIdx.x; i < count; i += THREADS)
        if (float_bits(weights[i]) < bits) weights[i] = 0.0f;
    sync_block();
}

// Zeroes all but the k greatest weights; ties with the last are kept.
DEVICE void keep_top_k(float* weights, u32 count, u32 k, const Room& room) {
    u32 low = 0, high = MOST;
    // The greatest threshold that k weights reach.
    while (low < high) {
        u32 middle = (low + high + 1) / 2;
        if (count_from(weights, count, middle, room) >= k) low = middle;
        else high = middle - 1;
    }
    drop_below(weights, count, low);
}

// Keeps the smallest set of greatest weights whose mass reaches top_p, at least one: going up from the least weight
// (of equals from the last id), a token goes while the mass up to and with it is at most 1 - top_p.
DEVICE void keep_top_p(float* weights, u32 count, double top_p, const Room& room) {
    double total = mass_up_to(weights, count, MOST, room), most = (1.0 - top_p) * total;
    u32 low = 1, high = MOST;
    // The least threshold up to which the mass is too much.
    while (low < high) {
        u32 middle = (low + high) / 2;
        if (mass_up_to(weights, count, middle, room) > most) high = middle;
        else low = middle + 1;
    }
    // Of the weights that are equal to it some may go, but not all; the best weighs 1, so it is never one of them.
    double below = mass_up_to(weights, count, low - 1, room), weight = double(bits_float(low));
    u32 equals = count_from(weights, count, low, room) - count_from(weights, count, low + 1, room), dropped = 0;
    for (; dropped + 1 < equals && below + weight <= most; dropped++) below += weight;
    drop_below(weights, count, low);
    // The ids of the equals that go are the greatest ones: as many as lie at or above this one.
    u32 first = 0, last = count;
    while (dropped > 0 && first < last) {
        u32 middle = (first + last) / 2, found = 0;
        for (u32 i = middle + threadIdx.x; i < count; i += THREADS) found += float_bits(weights[i]) == low;
        if (reduce_block<Sum>(found, room.counts) > dropped) first = middle + 1;
        else last = middle;
    }
    if (dropped > 0) {
        for (u32 i = first + threadIdx.x; i < count; i += THREADS)
            if (float_bits(weights[i]) == low) weights[i] = 0.0f;
        sync_block();
    }
}

// The token at `uniform` of the total weight, counting up from id 0; `count` if no weight is positive.
DEVICE u32 pick(const float* weights, u32 count, double uniform, double* masses, u32* lasts, u32* answer) {
    u32 share = ceil_div(count, THREADS), first = least(threadIdx.x * share, count), end = least(first + share, count);
    double mass = 0.0;
    u32 last = count;
    for (u32 i = first; i < end; i++) {
        if (weights[i] > 0.0f) {
            mass += weights[i];
            last = i;
        }
    }
    masses[threadIdx.x] = mass;
    lasts[threadIdx.x] = last;
    sync_block();
    if (threadIdx.x == 0) {
        double total = 0.0;
        UNROLL_NOT
        for (u32 i = 0; i < THREADS; i++) total += masses[i];
        double target = uniform * total, before = 0.0;
        // The first share whose end is past the target, else the last that weighs anything.
        u32 token = count;
        UNROLL_NOT
        for (u32 i = 0; i < THREADS; i++) {
            if (lasts[i] == count) continue;
            token = lasts[i];
            if (before + masses[i] > target) {
                for (u32 j = i * share; j < token; j++) {
                    if (weights[j] > 0.0f) before += weights[j];
                    if (before > target) {
                        token = j;
                        break;
                    }
                }
                break;
            }
            before += masses[i];
        }
        *answer = token;
    }
    sync_block();
    return *answer;
}

// The token drawn; `count` when the rule excludes all.
DEVICE u32 sample(const DrawTask& draw, u32 count, float* weights, const Room& room, double* masses, u32* lasts,
                  u32* answer) {
    u64 best_rank = best_below(weights, count, ~u64(0), room);
    u32 best = ~u32(best_rank);
    float max = weights[best];
    if (max == -infinite()) return count;
    if (draw.temperature < GREEDY_BELOW || !(max - max == 0.0f)) return best;
    float scale = 1.0f / draw.temperature;
    sync_block();
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
        float x = (weights[i] - max) * scale;
        // exp clamps its argument; a masked token weighs exactly nothing.
        float weight = x < EXP_LEAST ? 0.0f : exp_f32(x);
        weights[i] = weight < draw.min_p ? 0.0f : weight;
    }
    sync_block();
    if (draw.top_k > 0 && draw.top_k < count) keep_top_k(weights, count, draw.top_k, room);
    if (draw.top_p < 1.0f) keep_top_p(weights, count, double(draw.top_p), room);
    u32 token = pick(weights, count, draw.uniform, masses, lasts, answer);
    return token == count ? best : token;
}

// Grid: min(draws, rows of the workspace); a block answers draws in turn. A draw reads its row a few times, and about
// 60 times more for each of top_k and top_p, from the second-level cache: some hundred microseconds for a vocabulary of
// 128,000, a processor each, which is little beside a pass over a model that does not fit the card.
KERNEL BOUNDS(512, 2) sample_rows(const float* logits, u32 vocab_size, const DrawTask* draws, u32 num_draws,
                                  const u32* tokens, const TokenBias* biases, const TokenCount* counts,
                                  float* workspace, DrawnToken* drawn, u32* top_tokens, float* top_logprobs) {
    SHARED(float, floats, THREADS / WARP);
    SHARED(double, doubles, THREADS / WARP);
    SHARED(u64, words, THREADS / WARP);
    SHARED(u32, totals, THREADS / WARP);
    SHARED(double, masses, THREADS);
    SHARED(u32, lasts, THREADS);
    SHARED(u32, answer, 1);
    Room room = {floats, doubles, words, totals};
    float* weights = workspace + u64(blockIdx.x) * vocab_size;
    for (u32 index = blockIdx.x; index < num_draws; index += gridDim.x) {
        const DrawTask& draw = draws[index];
        const float* row = logits + u64(draw.row) * vocab_size;
        double normalizer = log_normalizer(row, vocab_size, room);
        bool finite = normalizer == normalizer;
        u32 token = draw.token;
        if (draw.target == 1 && finite) {
            adjust(draw, row, vocab_size, tokens, biases, counts, weights);
            token = sample(draw, vocab_size, weights, room, masses, lasts, answer);
        }
        u32 problem = !finite ? NOT_FINITE : token == vocab_size ? NONE_ALLOWED : 0;
        if (problem) token = 0;
        if (threadIdx.x == 0) drawn[index] = {token, float(double(row[token]) - normalizer), problem, 0};
        u64 bound = ~u64(0);
        for (u32 i = 0; i < draw.top; i++) {
            bound = best_below(row, vocab_size, bound, room);
            // A row that is not finite has no best.
            u32 best = finite ? ~u32(bound) : 0;
            if (threadIdx.x == 0) {
                top_tokens[draw.first_top + i] = best;
                top_logprobs[draw.first_top + i] = float(double(row[best]) - normalizer);
            }
        }
        sync_block();
    }
}
