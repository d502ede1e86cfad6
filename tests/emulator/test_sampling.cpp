// Sampling, against a plain reading of the definitions in f64.

#include <algorithm>
#include <numeric>

#include "tests.h"

namespace {

struct DrawTask {
    double uniform;
    u32 row, target, token, top, first_top;
    u32 has_allowed, first_allowed, num_allowed, first_banned, num_banned, first_bias, num_bias, first_count,
        num_counts, top_k;
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
    u32 problem, unused;
};
static_assert(sizeof(DrawTask) == 96 && sizeof(DrawnToken) == 16, "the layouts of the README");

// Weights of all tokens by a draw's rule; empty where the rule excludes all.
std::vector<double> weights_of(const DrawTask& d, const float* logits, u32 count, const std::vector<u32>& tokens,
                               const std::vector<TokenBias>& biases, const std::vector<TokenCount>& counts) {
    std::vector<double> x(logits, logits + count);
    if (d.has_allowed) {
        std::vector<double> only(count, -INFINITY);
        for (u32 i = 0; i < d.num_allowed; i++) only[tokens[d.first_allowed + i]] = x[tokens[d.first_allowed + i]];
        x = only;
    }
    for (u32 i = 0; i < d.num_banned; i++)
        if (tokens[d.first_banned + i] < count) x[tokens[d.first_banned + i]] = -INFINITY;
    for (u32 i = 0; i < d.num_bias; i++) x[biases[d.first_bias + i].token] += biases[d.first_bias + i].bias;
    for (u32 i = 0; i < d.num_counts; i++) {
        TokenCount seen = counts[d.first_count + i];
        double& logit = x[seen.token];
        logit = logit > 0 ? logit / d.repetition_penalty : logit * d.repetition_penalty;
        logit -= d.frequency_penalty * seen.output + (seen.output ? d.presence_penalty : 0.0f);
    }
    double max = *std::max_element(x.begin(), x.end());
    if (max == -INFINITY) return {};
    std::vector<double> w(count);
    for (u32 i = 0; i < count; i++) {
        if (d.temperature < 1e-5f) w[i] = x[i] == max && std::find(x.begin(), x.end(), max) == x.begin() + i;
        else w[i] = std::exp((x[i] - max) / d.temperature);
        if (w[i] < d.min_p) w[i] = 0.0;
    }
    if (d.temperature < 1e-5f) return w;
    if (d.top_k && d.top_k < count) {
        std::vector<double> sorted = w;
        std::sort(sorted.rbegin(), sorted.rend());
        for (double& weight : w)
            if (weight < sorted[d.top_k - 1]) weight = 0.0;
    }
    if (d.top_p < 1.0f) {
        std::vector<u32> order(count);
        std::iota(order.begin(), order.end(), 0u);
        std::sort(order.begin(), order.end(), [&](u32 a, u32 b) { return w[a] != w[b] ? w[a] < w[b] : a > b; });
        double total = std::accumulate(w.begin(), w.end(), 0.0), mass = 0.0;
        for (u32 i = 0; i + 1 < count; i++) {
            mass += w[order[i]];
            if (mass > (1.0 - double(d.top_p)) * total) break;
            w[order[i]] = 0.0;
        }
    }
    return w;
}

void draws(Device& device, Random& random, u32 count, bool ties) {
    const u32 rows = 5;
    auto logits = random.normal_values(rows * count);
    for (float& x : logits) x = ties ? std::round(2.0f * x) / 2.0f + 0.0f : 3.0f * x;
    logits[4 * count + count / 2] = random.below(2) ? NAN : INFINITY;
    std::vector<DrawTask> tasks;
    std::vector<u32> tokens;
    std::vector<TokenBias> biases;
    std::vector<TokenCount> counts;
    u32 tops = 0;
    for (u32 i = 0; i < 60; i++) {
        DrawTask d{};
        d.row = i % 15 == 14 ? 4 : random.below(4);
        d.target = i % 5 > 0;
        d.token = random.below(count);
        d.top = random.below(2) ? std::min(random.below(6), count) : 0;
        d.first_top = tops;
        tops += d.top;
        d.uniform = i % 7 == 0 ? 0.0 : double(random.below(1u << 30)) / double(1u << 30);
        d.repetition_penalty = 1.0f;
        d.temperature = random.below(4) ? 0.3f + 0.4f * float(random.below(4)) : 0.0f;
        d.min_p = random.below(3) ? 0.0f : 0.03f;
        d.top_k = random.below(2) ? 0 : 1 + random.below(count);
        d.top_p = random.below(2) ? 1.0f : 0.1f * float(random.below(10));
        d.first_allowed = u32(tokens.size());
        if (random.below(4) == 0) {
            d.has_allowed = 1;
            d.num_allowed = random.below(5);
            for (u32 j = 0; j < d.num_allowed; j++) tokens.push_back(random.below(count));
        }
        d.first_banned = u32(tokens.size());
        if (random.below(3) == 0) {
            d.num_banned = 3;
            for (u32 j = 0; j < 3; j++) tokens.push_back(random.below(count + 2));
        }
        d.first_bias = u32(biases.size());
        if (random.below(3) == 0) {
            d.num_bias = 4;
            for (u32 j = 0; j < 4; j++) biases.push_back({random.below(count), random.normal()});
        }
        d.first_count = u32(counts.size());
        if (random.below(3) == 0) {
            d.repetition_penalty = 1.3f;
            d.frequency_penalty = 0.2f;
            d.presence_penalty = -0.4f;
            for (u32 token = random.below(7); token < count && d.num_counts < 20;
                 token += 1 + random.below(9), d.num_counts++)
                counts.push_back({token, random.below(3)});
        }
        tasks.push_back(d);
    }
    const u32 grid = 7;
    auto* drawn = device.room<DrawnToken>(tasks.size());
    u32* top_tokens = device.room<u32>(tops);
    float* top_logprobs = device.room<float>(tops);
    device.launch("sample.cu", "sample_rows", {grid, 1, 512, 0}, device.upload(logits), count, device.upload(tasks),
                  u32(tasks.size()), device.upload(tokens), device.upload(biases), device.upload(counts),
                  device.room<float>(grid * count), drawn, top_tokens, top_logprobs);
    auto got = device.download(drawn, tasks.size());
    auto got_tops = device.download(top_tokens, tops);
    auto got_logprobs = device.download(top_logprobs, tops);
    for (u32 i = 0; i < tasks.size(); i++) {
        const DrawTask& d = tasks[i];
        const float* row = &logits[d.row * count];
        if (d.row == 4) {
            check(got[i].problem == 1, "sample_rows: a logit that is not finite");
            continue;
        }
        double sum = 0.0, max = *std::max_element(row, row + count);
        for (u32 j = 0; j < count; j++) sum += std::exp(row[j] - max);
        auto logprob = [&](u32 token) { return row[token] - max - std::log(sum); };
        if (d.target == 0) {
            check(got[i].token == d.token && got[i].problem == 0, "sample_rows: scores");
        } else {
            auto w = weights_of(d, row, count, tokens, biases, counts);
            if (w.empty()) {
                check(got[i].problem == 2, "sample_rows: nothing is allowed");
                continue;
            }
            double total = std::accumulate(w.begin(), w.end(), 0.0), mass = 0.0;
            check(got[i].problem == 0 && got[i].token < count, "sample_rows: a token");
            // The token's share of the mass holds the uniform number, but for rounding.
            for (u32 j = 0; j < got[i].token; j++) mass += w[j];
            double low = mass / total - 1e-6, high = (mass + w[got[i].token]) / total + 1e-6;
            if (!(w[got[i].token] > 0.0 && low <= d.uniform && d.uniform <= high)) {
                std::fprintf(stderr, "draw %u of %u tokens: token %u of weight %g holds %g .. %g, not %g\n", i, count,
                             got[i].token, w[got[i].token], low, high, d.uniform);
                check(false, "sample_rows: draws");
            }
        }
        check(std::fabs(got[i].logprob - logprob(got[i].token)) < 2e-6 * (1.0 + std::fabs(logprob(got[i].token))),
              "sample_rows: log-probabilities");
        std::vector<u32> order(count);
        std::iota(order.begin(), order.end(), 0u);
        std::stable_sort(order.begin(), order.end(), [&](u32 a, u32 b) { return row[a] > row[b]; });
        for (u32 j = 0; j < d.top; j++) {
            check(got_tops[d.first_top + j] == order[j], "sample_rows: the most probable");
            check(std::fabs(got_logprobs[d.first_top + j] - logprob(order[j])) < 1e-5,
                  "sample_rows: their log-probabilities");
        }
    }
    device.clear();
}

}  // namespace

void test_sampling(Device& device, Random& random) {
    for (u32 count : {1u, 10u, 700u, 3000u})
        for (bool ties : {false, true}) draws(device, random, count, ties);
}
