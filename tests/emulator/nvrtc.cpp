// libnvrtc: gives a word and a checksum of the program; libcuda finds the kernels that were built from the same text.

#include <cstdint>
#include <cstring>
#include <string>

#define EXPORT __attribute__((visibility("default")))
#define ENTRY extern "C" EXPORT int

namespace {

constexpr int INVALID_INPUT = 3, INVALID_PROGRAM = 4;

struct Program {
    std::string source, image;
};

// As the command `cksum` prints it, with a hyphen between checksum and length.
std::string checksum(const std::string& text) {
    uint32_t crc = 0;
    auto take = [&](uint8_t byte) {
        crc ^= uint32_t(byte) << 24;
        for (int bit = 0; bit < 8; bit++) crc = crc << 1 ^ (crc >> 31 ? 0x04c11db7u : 0);
    };
    for (char c : text) take(uint8_t(c));
    for (size_t length = text.size(); length > 0; length >>= 8) take(uint8_t(length));
    return std::to_string(~crc) + "-" + std::to_string(text.size());
}

}  // namespace

ENTRY nvrtcVersion(int* major, int* minor) {
    *major = 12;
    *minor = 8;
    return 0;
}

extern "C" EXPORT const char* nvrtcGetErrorString(int status) {
    switch (status) {
    case 0: return "NVRTC_SUCCESS";
    case INVALID_INPUT: return "NVRTC_ERROR_INVALID_INPUT";
    case INVALID_PROGRAM: return "NVRTC_ERROR_INVALID_PROGRAM";
    default: return "NVRTC_ERROR unknown";
    }
}

ENTRY nvrtcGetNumSupportedArchs(int* count) {
    *count = 5;
    return 0;
}

ENTRY nvrtcGetSupportedArchs(int* archs) {
    const int known[] = {75, 80, 86, 89, 90};
    std::memcpy(archs, known, sizeof known);
    return 0;
}

ENTRY nvrtcCreateProgram(void** program, const char* source, const char*, int headers, const char* const*,
                         const char* const*) {
    if (!source || headers != 0) return INVALID_INPUT;
    *program = new Program{source, ""};
    return 0;
}

ENTRY nvrtcDestroyProgram(void** program) {
    delete static_cast<Program*>(*program);
    *program = nullptr;
    return 0;
}

ENTRY nvrtcCompileProgram(void* program, int, const char* const*) {
    auto* self = static_cast<Program*>(program);
    if (!self) return INVALID_PROGRAM;
    self->image = "tidemill-emulated " + checksum(self->source);
    return 0;
}

ENTRY nvrtcGetProgramLogSize(void*, size_t* bytes) {
    *bytes = 1;
    return 0;
}

ENTRY nvrtcGetProgramLog(void*, char* log) {
    *log = 0;
    return 0;
}

ENTRY nvrtcGetPTXSize(void* program, size_t* bytes) {
    auto* self = static_cast<Program*>(program);
    if (!self || self->image.empty()) return INVALID_PROGRAM;
    *bytes = self->image.size() + 1;
    return 0;
}

ENTRY nvrtcGetPTX(void* program, char* image) {
    auto* self = static_cast<Program*>(program);
    if (!self || self->image.empty()) return INVALID_PROGRAM;
    std::memcpy(image, self->image.c_str(), self->image.size() + 1);
    return 0;
}

ENTRY nvrtcGetCUBINSize(void* program, size_t* bytes) { return nvrtcGetPTXSize(program, bytes); }

ENTRY nvrtcGetCUBIN(void* program, char* image) { return nvrtcGetPTX(program, image); }
