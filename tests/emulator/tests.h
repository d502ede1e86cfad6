// The parts of the tests of kernels.
#pragma once

#include "harness.h"

void test_rows(Device& device, Random& random);
void test_attention(Device& device, Random& random);
void test_sampling(Device& device, Random& random);
