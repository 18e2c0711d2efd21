// Philox4x32-10 (Salmon et al., SC 2011), the one source of dropout masks. An entry is kept where
// its word is at least floor(p * 2^32), so every backend drops the same entries, bit for bit.
#pragma once
#include <cstdint>

#include "target.h"

namespace fastattn {

struct PhiloxKey {
  uint64_t seed;
  uint32_t offset;  // the fourth counter
};

// The pair (seed, offset) as it lies in memory, which may be a GPU's.
FASTATTN_HD inline PhiloxKey philox_key(const int64_t* seed_offset) {
  return {(uint64_t)seed_offset[0], (uint32_t)seed_offset[1]};
}

struct PhiloxWords {
  uint32_t word[4];
};

// Straight-line 32 x 32 -> 64 bit products: a loop over it becomes vector code.
FASTATTN_HD inline __attribute__((always_inline)) PhiloxWords philox4x32(
    uint32_t counter0, uint32_t counter1, uint32_t counter2, uint32_t counter3, uint64_t seed) {
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  FASTATTN_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = (uint64_t)0xD2511F53 * counter0;
    const uint64_t product1 = (uint64_t)0xCD9E8D57 * counter2;
    counter0 = (uint32_t)(product1 >> 32) ^ counter1 ^ key0;
    counter1 = (uint32_t)product1;
    counter2 = (uint32_t)(product0 >> 32) ^ counter3 ^ key1;
    counter3 = (uint32_t)product0;
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return {{counter0, counter1, counter2, counter3}};
}

}  // namespace fastattn
