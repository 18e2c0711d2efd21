// Philox4x32-10 (Salmon et al., SC 2011): the words that decide what dropout keeps, the same on
// every backend. kernels/reference/philox.py is the definition.
#pragma once
#include <cstdint>

namespace fastattn {

struct PhiloxKey {
  uint64_t seed;
  uint32_t offset;
};
struct PhiloxWords {
  uint32_t word[4];
};

inline PhiloxWords philox4x32(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed) {
  uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = (uint64_t)0xD2511F53 * c0, b = (uint64_t)0xCD9E8D57 * c2;
    c0 = (uint32_t)(b >> 32) ^ c1 ^ key0;
    c1 = (uint32_t)b;
    c2 = (uint32_t)(a >> 32) ^ c3 ^ key1;
    c3 = (uint32_t)a;
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return {{c0, c1, c2, c3}};
}

}  // namespace fastattn
