// test_kernels KERNELS SEED: every kernel of the folder against plain, slow definitions.

#include "tests.h"

int main(int, char** arguments) {
    Device device(arguments[1]);
    Random random(u32(std::atoi(arguments[2])));
    test_rows(device, random);
    test_attention(device, random);
    test_sampling(device, random);
    std::printf("kernels agree with their definitions (seed %s)\n", arguments[2]);
    return 0;
}
