// Kernels that work on rows, and those that read packed weights, against plain definitions.

#include "tests.h"

Packed random_matrix(Random& random, u32 dtype, u32 inputs, u32 outputs) {
    Packed m{dtype, inputs, outputs, {}, std::vector<float>(size_t(inputs) * outputs), {}};
    m.bytes.resize(m.panels() * m.panel_bytes());
    for (u32 output = 0; output < m.panels() * 16; output++) {
        u8* panel = m.bytes.data() + output / 16 * m.panel_bytes();
        u32 lane = output % 16;
        for (u32 group = 0; group < (inputs + 63) / 64; group++) {
            u8* tile = panel + group * m.tile_bytes();
            bool integers = dtype == INT8 || dtype == INT4;
            size_t codes = dtype == INT4 ? 512 : 1024;
            u16 scale = half_bits(0.01f + 0.002f * float(random.below(9))), offset = half_bits(random.normal() * 0.1f);
            if (integers) {
                std::memcpy(tile + codes + 2 * lane, &scale, 2);
                std::memcpy(tile + codes + 32 + 2 * lane, &offset, 2);
            }
            for (u32 k = 0; k < 64; k++) {
                u32 input = group * 64 + k;
                bool real = input < inputs && output < outputs;
                float w = real ? random.normal() : 0.0f;
                if (integers) {
                    u32 code = real ? random.below(dtype == INT4 ? 16 : 256) : 0;
                    u32 within = dtype == INT4 ? k % 32 : k, shift = dtype == INT4 ? k / 32 * 4 : 0;
                    tile[within / 4 * 64 + lane * 4 + within % 4] |= u8(code << shift);
                    w = std::fma(float(code), half_value(scale), half_value(offset));
                } else {
                    u8* at = tile + (k * 16 + lane) * element_size(dtype);
                    put_element(at, dtype, w);
                    w = get_element(at, dtype);
                }
                if (real) m.weights[size_t(output) * inputs + input] = w;
            }
        }
    }
    return m;
}

std::vector<Piece> upload_pieces(Device& device, Random& random, const Packed& m) {
    std::vector<Piece> pieces;
    for (u32 first = 0; first < m.panels();) {
        u32 count = std::min(1 + random.below(3), m.panels() - first);
        auto begin = m.bytes.begin() + ptrdiff_t(first * m.panel_bytes());
        std::vector<u8> part(begin, begin + ptrdiff_t(count * m.panel_bytes()));
        pieces.push_back({device.upload(part), first, count});
        first += count;
    }
    return pieces;
}

namespace {

void lookups(Device& device, Random& random) {
    for (u32 dtype = F32; dtype <= INT4; dtype++) {
        for (u32 width : {20u, 128u, 300u}) {
            Packed table = random_matrix(random, dtype, width, 77);
            std::vector<u32> tokens = {0, 76, 33, 15, 16};
            auto pieces = upload_pieces(device, random, table);
            float* out = device.room<float>(tokens.size() * width);
            device.launch("rows.cu", "embed_rows", {u32(tokens.size()), 1, 256, 0}, device.upload(pieces),
                          u32(pieces.size()), dtype, width, 77u, device.upload(tokens), out);
            std::vector<float> wanted;
            for (u32 token : tokens)
                wanted.insert(wanted.end(), table.weights.begin() + token * width,
                              table.weights.begin() + (token + 1) * width);
            near(device.download(out, wanted.size()), wanted, 0.0, "embed_rows");
        }
    }
    const u32 width = 300;
    std::vector<u32> indices = {3, 0, 3};
    auto table = random.normal_values(5 * width), x = random.normal_values(3 * width);
    float* sum = device.upload(x);
    device.launch("rows.cu", "add_rows", {3, 1, 256, 0}, device.upload(table), device.upload(indices), width, sum);
    float* gathered = device.upload(std::vector<float>(5 * width, 7.0f));
    device.launch("rows.cu", "gather_rows", {3, 1, 256, 0}, device.upload(table), device.upload(indices), width,
                  gathered, 1u);
    std::vector<float> sums = x, rows(5 * width, 7.0f);
    for (u32 i = 0; i < 3 * width; i++) {
        float from = table[indices[i / width] * width + i % width];
        sums[i] += from;
        rows[width + i] = from;
    }
    near(device.download(sum, sums.size()), sums, 0.0, "add_rows");
    near(device.download(gathered, rows.size()), rows, 0.0, "gather_rows");
}

std::vector<float> normalised(const float* x, u32 width, bool layer, float eps, const float* weight,
                              const float* bias) {
    double mean = 0.0, squares = 0.0;
    for (u32 i = 0; layer && i < width; i++) mean += double(x[i]) / width;
    for (u32 i = 0; i < width; i++) squares += (x[i] - mean) * (x[i] - mean) / width;
    std::vector<float> out(width);
    for (u32 i = 0; i < width; i++)
        out[i] = float((x[i] - mean) / std::sqrt(squares + eps) * weight[i] + (bias ? bias[i] : 0.0f));
    return out;
}

void norms(Device& device, Random& random) {
    for (u32 width : {1u, 37u, 256u, 1000u}) {
        for (u32 kind : {0u, 1u}) {
            for (bool biased : {false, true}) {
                auto x = random.normal_values(3 * width), weight = random.normal_values(width),
                     bias = random.normal_values(width);
                float* in_place = device.upload(x);
                device.launch("rows.cu", "norm_rows", {3, 1, 256, 0}, in_place, width, device.upload(weight),
                              biased ? device.upload(bias) : nullptr, kind, 1e-5f, in_place);
                std::vector<float> wanted;
                for (u32 row = 0; row < 3; row++) {
                    auto out = normalised(&x[row * width], width, kind == 1, 1e-5f, weight.data(),
                                          biased ? bias.data() : nullptr);
                    wanted.insert(wanted.end(), out.begin(), out.end());
                }
                near(device.download(in_place, wanted.size()), wanted, 4e-6, "norm_rows");
                // With a part of the rows added only now.
                std::vector<float> part = random.normal_values(u32(x.size())), rest = x;
                for (size_t i = 0; i < x.size(); i++) {
                    rest[i] -= part[i];
                    part[i] = x[i] - rest[i];
                }
                float *sum = device.upload(rest), *out = device.room<float>(wanted.size());
                device.launch("rows.cu", "add_norm_rows", {3, 1, 256, 0}, sum, device.upload(part), width,
                              device.upload(weight), biased ? device.upload(bias) : nullptr, kind, 1e-5f, out);
                near(device.download(sum, x.size()), x, 1e-6, "add_norm_rows, the sum");
                near(device.download(out, wanted.size()), wanted, 8e-6, "add_norm_rows");
            }
        }
    }
}

void heads(Device& device, Random& random) {
    const u32 num_heads = 6, num_kv_heads = 2, rows = 3;
    for (u32 dim : {20u, 64u, 130u}) {
        u32 width = (num_heads + 2 * num_kv_heads) * dim;
        auto x = random.normal_values(rows * width), query = random.normal_values(dim), key = random.normal_values(dim);
        float* qkv = device.upload(x);
        device.launch("rows.cu", "norm_heads", {rows, num_heads + num_kv_heads, 32, 0}, qkv, num_heads, num_kv_heads,
                      dim, 1e-6f, device.upload(query), device.upload(key));
        std::vector<float> wanted = x;
        for (u32 i = 0; i < rows * (num_heads + 2 * num_kv_heads); i++) {
            u32 head = i % (num_heads + 2 * num_kv_heads);
            if (head >= num_heads + num_kv_heads) continue;
            auto out =
                normalised(&x[i * dim], dim, false, 1e-6f, head < num_heads ? query.data() : key.data(), nullptr);
            std::copy(out.begin(), out.end(), wanted.begin() + i * dim);
        }
        near(device.download(qkv, wanted.size()), wanted, 1e-6, "norm_heads");
        u32 half = dim / 2 - 3;
        auto cos = random.normal_values(rows * half), sin = random.normal_values(rows * half);
        x = device.download(qkv, wanted.size());
        device.launch("rows.cu", "rotate_heads", {rows, 1, 256, 0}, qkv, num_heads, num_kv_heads, dim,
                      device.upload(cos), device.upload(sin), 2 * half);
        wanted = x;
        for (u32 row = 0; row < rows; row++)
            for (u32 head = 0; head < num_heads + num_kv_heads; head++)
                for (u32 i = 0; i < half; i++) {
                    u32 at = row * width + head * dim + i;
                    double c = cos[row * half + i], s = sin[row * half + i];
                    wanted[at] = float(x[at] * c - x[at + half] * s);
                    wanted[at + half] = float(x[at + half] * c + x[at] * s);
                }
        near(device.download(qkv, wanted.size()), wanted, 1e-6, "rotate_heads");
    }
}

void elementwise(Device& device, Random& random) {
    const u32 rows = 3;
    for (u32 width : {5u, 256u, 600u}) {
        for (u32 activation = 0; activation < 4; activation++) {
            for (u32 gated : {0u, 1u}) {
                auto x = random.normal_values(rows * width * (1 + gated));
                for (float& value : x) value *= 4.0f;
                float* out = device.room<float>(rows * width);
                device.launch("rows.cu", "activate_rows", {(width + 255) / 256, rows, 256, 0}, activation, gated,
                              device.upload(x), width, out);
                std::vector<float> wanted(rows * width);
                for (u32 i = 0; i < rows * width; i++) {
                    const float* from = &x[i / width * width * (1 + gated) + i % width];
                    double g = *from, y;
                    if (activation == 0) y = std::fmax(g, 0.0);
                    else if (activation == 1) y = g / (1.0 + std::exp(-g));
                    else if (activation == 2) y = g * 0.5 * (1.0 + std::erf(g / std::sqrt(2.0)));
                    else y = 0.5 * g * (1.0 + std::tanh(std::sqrt(2.0 / M_PI) * (g + 0.044715 * g * g * g)));
                    wanted[i] = float(gated ? y * from[width] : y);
                }
                near(device.download(out, wanted.size()), wanted, 1e-6, "activate_rows");
            }
        }
        auto x = random.normal_values(rows * (width + 9)), y = random.normal_values(x.size()),
             bias = random.normal_values(width);
        float* sum = device.upload(x);
        device.launch("rows.cu", "add_elements", {u32(x.size() + 1023) / 1024, 1, 256, 0}, sum, device.upload(y),
                      u64(x.size()));
        device.launch("rows.cu", "add_bias", {(width + 255) / 256, rows, 256, 0}, sum, width + 9, 4u,
                      device.upload(bias), width);
        for (size_t i = 0; i < x.size(); i++) {
            u32 column = u32(i) % (width + 9);
            x[i] += y[i];
            if (column >= 4 && column < 4 + width) x[i] += bias[column - 4];
        }
        near(device.download(sum, x.size()), x, 0.0, "add_elements, add_bias");
        x.resize(rows * width);
        x[1] = 1e6f;
        x[2] = NAN;
        x[3] = 1e-6f;
        for (u32 dtype : {F32, BF16, F16}) {
            u32 stride = (width + 63) / 64 * 64, size = element_size(dtype);
            u8* out = device.room<u8>(rows * stride * size);
            device.launch("rows.cu", "convert_rows", {(stride + 255) / 256, rows, 256, 0}, device.upload(x), width,
                          static_cast<void*>(out), stride, dtype);
            auto got = device.download(out, rows * stride * size);
            for (u32 i = 0; i < rows * stride; i++) {
                float value = i % stride < width ? x[i / stride * width + i % stride] : 0.0f;
                u8 wanted[4];
                put_element(wanted, dtype, value);
                float a = get_element(&got[i * size], dtype), b = get_element(wanted, dtype);
                check(a == b || (std::isnan(a) && std::isnan(b)), "convert_rows");
            }
            // The same rounded to 8 bits: of every 64 inputs multiples of a step.
            device.launch("rows.cu", "round_rows", {(stride + 511) / 512, rows, 256, 0}, device.upload(x), width,
                          static_cast<void*>(out), stride, dtype);
            got = device.download(out, rows * stride * size);
            for (u32 i = 0; i < rows * stride; i++) {
                u32 row = i / stride, at = i % stride, end = std::min(width, at / 64 * 64 + 64);
                float most = 0.0f, value = at < width ? x[row * width + at] : 0.0f;
                bool finite = true;
                for (u32 j = at / 64 * 64; j < end; j++) {
                    most = std::max(most, std::fabs(x[row * width + j]));
                    finite = finite && std::isfinite(x[row * width + j]);
                }
                if (!finite) continue;
                u8 wanted[4];
                put_element(wanted, dtype, std::rint(value * (most > 1e-30f ? 127.0f / most : 0.0f)) * (most / 127.0f));
                check(get_element(&got[i * size], dtype) == get_element(wanted, dtype), "round_rows");
            }
        }
    }
}

// Products of rows of f16 on tensor cores.
void tensor_products(Device& device, Random& random, const Packed& m, const Piece* list, u32 pieces) {
    u32 x_stride = (m.inputs + 7) / 8 * 8;
    std::vector<u16> x(70 * x_stride);
    for (u32 i = 0; i < x.size(); i++) x[i] = i % x_stride < m.inputs ? half_bits(random.normal()) : 0;
    auto bias = random.normal_values(m.outputs);
    std::vector<float> alone;
    for (u32 rows : {1u, 9u, 20u, 70u}) {
        u32 stride = m.outputs + 5;
        std::vector<float> before = random.normal_values(rows * stride), wanted = before;
        float* y = device.upload(before);
        device.launch("weights_tensor.cu", "linear_tensor_rows", {(m.outputs + 31) / 32, 1, 256, 0}, device.upload(x),
                      rows, x_stride, list, pieces, m.dtype, m.inputs, m.outputs, device.upload(bias), y, stride, 2u);
        for (u32 r = 0; r < rows; r++)
            for (u32 o = 0; o < m.outputs; o++) {
                double sum = bias[o];
                for (u32 i = 0; i < m.inputs; i++)
                    sum += double(half_value(x[r * x_stride + i])) * saturated_half(m.weights[o * m.inputs + i]);
                wanted[r * stride + 2 + o] = float(sum);
            }
        auto got = device.download(y, wanted.size());
        near(got, wanted, 2e-6, "linear_tensor_rows");
        if (rows == 1) alone = got;
        else
            check(std::memcmp(&alone[2], &got[2], m.outputs * 4) == 0,
                  "a row's product on tensor cores depends on the others");
    }
}

void weights(Device& device, Random& random) {
    struct Case {
        u32 inputs, outputs;
    };
    for (u32 dtype = F32; dtype <= INT4; dtype++) {
        for (Case c : {Case{20, 7}, Case{64, 16}, Case{130, 50}, Case{700, 33}}) {
            Packed m = random_matrix(random, dtype, c.inputs, c.outputs);
            auto pieces = upload_pieces(device, random, m);
            Piece* list = device.upload(pieces);
            for (u32 to : {F32, BF16, F16}) {
                u32 first = random.below(m.panels()), panels = 1 + random.below(m.panels() - first);
                u32 rows = std::min(panels * 16, c.outputs - first * 16), size = element_size(to);
                u32 stride = random.below(2) ? c.inputs : (c.inputs + 63) / 64 * 64;
                u8* out = device.room<u8>(rows * stride * size);
                device.launch("weights.cu", "dequantize_panels", {panels, (stride + 255) / 256, 256, 0}, list,
                              u32(pieces.size()), dtype, c.inputs, c.outputs, first, static_cast<void*>(out), stride,
                              to);
                auto got = device.download(out, rows * stride * size);
                for (u32 i = 0; i < rows * stride; i++) {
                    u32 output = first * 16 + i / stride, input = i % stride;
                    u8 wanted[4];
                    put_element(wanted, to, input < c.inputs ? m.weights[output * c.inputs + input] : 0.0f);
                    check(std::memcmp(&got[i * size], wanted, size) == 0, "dequantize_panels");
                }
            }
            if (dtype == INT8 || dtype == INT4) tensor_products(device, random, m, list, u32(pieces.size()));
            auto x = random.normal_values(19 * c.inputs), bias = random.normal_values(c.outputs);
            std::vector<float> alone;
            for (u32 rows : {1u, 2u, 3u, 8u, 19u}) {
                u32 stride = c.outputs + 5;
                std::vector<float> before = random.normal_values(rows * stride), wanted = before;
                float* y = device.upload(before);
                bool biased = rows != 3;
                device.launch("weights.cu", "linear_rows", {m.panels(), 1, 256, 0}, device.upload(x), rows, list,
                              u32(pieces.size()), dtype, c.inputs, c.outputs, biased ? device.upload(bias) : nullptr, y,
                              stride, 2u);
                for (u32 r = 0; r < rows; r++)
                    for (u32 o = 0; o < c.outputs; o++) {
                        double sum = biased ? bias[o] : 0.0;
                        for (u32 i = 0; i < c.inputs; i++)
                            sum += double(x[r * c.inputs + i]) * m.weights[o * c.inputs + i];
                        wanted[r * stride + 2 + o] = float(sum);
                    }
                auto got = device.download(y, wanted.size());
                near(got, wanted, 2e-6, "linear_rows");
                if (rows == 1) alone = got;
                else if (biased)
                    check(std::memcmp(&alone[2], &got[2], c.outputs * 4) == 0, "a row's product depends on the others");
            }
            device.clear();
        }
    }
}

}  // namespace

void test_rows(Device& device, Random& random) {
    lookups(device, random);
    norms(device, random);
    heads(device, random);
    elementwise(device, random);
    device.clear();
    weights(device, random);
}
