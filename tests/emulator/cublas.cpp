// libcublas: products as plain loops in f32, in the stream that was set.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "runtime.h"
#include "shim.h"

#define ENTRY extern "C" EXPORT int

extern "C" emulator::Status tidemill_emulator_enqueue(void* stream, const char* name, void (*run)(void*),
                                                      void (*drop)(void*), void* data);
extern "C" int tidemill_emulator_is_device(const void* address, size_t bytes);

namespace {

constexpr int NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15;
constexpr int R_32F = 0, R_16F = 2, R_16BF = 14;

struct Handle {
    void* stream;
};

struct Gemm {
    bool transpose_a, transpose_b;
    int64_t m, n, k;
    float alpha, beta;
    const void *a, *b;
    void* c;
    int type_a, type_b, type_c;
    int64_t lda, ldb, ldc, stride_a, stride_b, stride_c;
    int64_t batches;
};

size_t size_of(int type) { return type == R_32F ? 4 : 2; }

float load(const void* from, int type, int64_t i) {
    if (type == R_32F) return static_cast<const float*>(from)[i];
    uint16_t bits = static_cast<const uint16_t*>(from)[i];
    return type == R_16F ? f16_to_f32(bits) : bits_float(uint32_t(bits) << 16);
}

void store(void* to, int type, int64_t i, float x) {
    if (type == R_32F) static_cast<float*>(to)[i] = x;
    else if (type == R_16F) static_cast<uint16_t*>(to)[i] = f32_to_f16(x);
    else static_cast<uint16_t*>(to)[i] = uint16_t((float_bits(x) + 0x7fff + (float_bits(x) >> 16 & 1)) >> 16);
}

// Column-major: c(i, j) = alpha * sum over l of a(i, l) b(l, j) + beta * c(i, j).
void run(void* data) {
    const Gemm& g = *static_cast<Gemm*>(data);
    for (int64_t batch = 0; batch < g.batches; batch++) {
        const auto* a = static_cast<const uint8_t*>(g.a) + batch * g.stride_a * int64_t(size_of(g.type_a));
        const auto* b = static_cast<const uint8_t*>(g.b) + batch * g.stride_b * int64_t(size_of(g.type_b));
        auto* c = static_cast<uint8_t*>(g.c) + batch * g.stride_c * int64_t(size_of(g.type_c));
        std::vector<float> column(static_cast<size_t>(g.k));
        for (int64_t j = 0; j < g.n; j++) {
            for (int64_t l = 0; l < g.k; l++)
                column[size_t(l)] = load(b, g.type_b, g.transpose_b ? j + l * g.ldb : l + j * g.ldb);
            for (int64_t i = 0; i < g.m; i++) {
                float sum = 0.0f;
                for (int64_t l = 0; l < g.k; l++)
                    sum += load(a, g.type_a, g.transpose_a ? l + i * g.lda : i + l * g.lda) * column[size_t(l)];
                int64_t at = i + j * g.ldc;
                store(c, g.type_c, at, g.alpha * sum + (g.beta == 0.0f ? 0.0f : g.beta * load(c, g.type_c, at)));
            }
        }
    }
}

// Elements from the first of a matrix to its last.
int64_t extent(int64_t rows, int64_t columns, int64_t leading) { return (columns - 1) * leading + rows; }

int enqueue(Handle* handle, const Gemm& gemm) {
    auto known = [](int type) { return type == R_32F || type == R_16F || type == R_16BF; };
    if (!handle) return NOT_INITIALIZED;
    if (!known(gemm.type_a) || !known(gemm.type_c) || gemm.type_a != gemm.type_b) return NOT_SUPPORTED;
    if (gemm.m <= 0 || gemm.n <= 0 || gemm.k <= 0 || gemm.batches <= 0) return INVALID_VALUE;
    int64_t rows_a = gemm.transpose_a ? gemm.k : gemm.m, rows_b = gemm.transpose_b ? gemm.n : gemm.k;
    if (gemm.lda < rows_a || gemm.ldb < rows_b || gemm.ldc < gemm.m) return INVALID_VALUE;
    struct Operand {
        const void* at;
        int64_t rows, columns, leading, stride;
        int type;
        const char* name;
    };
    const Operand operands[] = {
        {gemm.a, rows_a, gemm.transpose_a ? gemm.m : gemm.k, gemm.lda, gemm.stride_a, gemm.type_a, "a"},
        {gemm.b, rows_b, gemm.transpose_b ? gemm.k : gemm.n, gemm.ldb, gemm.stride_b, gemm.type_b, "b"},
        {gemm.c, gemm.m, gemm.n, gemm.ldc, gemm.stride_c, gemm.type_c, "c"},
    };
    for (const Operand& o : operands) {
        int64_t elements = extent(o.rows, o.columns, o.leading) + (gemm.batches - 1) * o.stride;
        if (!tidemill_emulator_is_device(o.at, size_t(elements) * size_of(o.type)))
            return emulator::violation(INVALID_VALUE, "a product's %s is not within an allocation", o.name);
        // What tensor cores read must lie on 16 bytes, or cuBLAS is slow: here that is an error.
        if (o.type != R_32F && (reinterpret_cast<uintptr_t>(o.at) % 16 != 0 || o.leading % 8 != 0))
            return emulator::violation(INVALID_VALUE, "a product's %s is misaligned", o.name);
    }
    auto drop = [](void* data) { delete static_cast<Gemm*>(data); };
    int status = tidemill_emulator_enqueue(handle->stream, "gemm", run, drop, new Gemm(gemm));
    return status == 0 ? 0 : EXECUTION_FAILED;
}

}  // namespace

ENTRY cublasCreate_v2(void** handle) {
    *handle = new Handle{nullptr};
    return 0;
}

ENTRY cublasDestroy_v2(void* handle) {
    delete static_cast<Handle*>(handle);
    return 0;
}

ENTRY cublasGetProperty(int part, int* value) {
    const int version[] = {12, 8, 0};
    if (part < 0 || part > 2) return INVALID_VALUE;
    *value = version[part];
    return 0;
}

ENTRY cublasSetStream_v2(void* handle, void* stream) {
    static_cast<Handle*>(handle)->stream = stream;
    return 0;
}

ENTRY cublasSetWorkspace_v2(void* handle, void* workspace, size_t bytes) {
    if (!handle) return NOT_INITIALIZED;
    if (!tidemill_emulator_is_device(workspace, bytes) || reinterpret_cast<uintptr_t>(workspace) % 256 != 0)
        return emulator::violation(INVALID_VALUE, "a workspace that is misaligned or not within an allocation");
    return 0;
}

ENTRY cublasGemmEx(void* handle, int op_a, int op_b, int m, int n, int k, const void* alpha, const void* a, int type_a,
                   int lda, const void* b, int type_b, int ldb, const void* beta, void* c, int type_c, int ldc,
                   int compute, int) {
    if (compute != 68) return NOT_SUPPORTED;
    return enqueue(static_cast<Handle*>(handle), {op_a == 1,
                                                  op_b == 1,
                                                  m,
                                                  n,
                                                  k,
                                                  *static_cast<const float*>(alpha),
                                                  *static_cast<const float*>(beta),
                                                  a,
                                                  b,
                                                  c,
                                                  type_a,
                                                  type_b,
                                                  type_c,
                                                  lda,
                                                  ldb,
                                                  ldc,
                                                  0,
                                                  0,
                                                  0,
                                                  1});
}
