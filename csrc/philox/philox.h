// Philox4x32-10: random words as a pure function of (seed, stream ordinal, position, purpose), bit for bit those of
// megadiff/philox.py, which states the contract and the source:
//
//     key     = (seed_lo, seed_hi)
//     counter = (position, purpose * 2^24 + block, ordinal_lo, ordinal_hi)
//
// Integers only, so every compiler and device agrees: per call 20 products of 32 x 32 bits and 40 exclusive ors.
#pragma once

#include "common/portable.h"

namespace megadiff {

struct PhiloxWords {
  uint32_t first;
  uint32_t second;
  uint32_t third;
  uint32_t fourth;
};

// Encrypts a 128-bit counter under a 64-bit key; words from the least significant on.
MD_FN PhiloxWords philox(PhiloxWords counter, uint64_t key) {
  constexpr int kRounds = 10;
  uint32_t key_low = static_cast<uint32_t>(key), key_high = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < kRounds; ++round) {
    uint64_t product_0 = uint64_t{0xD2511F53u} * counter.first;
    uint64_t product_1 = uint64_t{0xCD9E8D57u} * counter.third;
    counter = {static_cast<uint32_t>(product_1 >> 32) ^ counter.second ^ key_low, static_cast<uint32_t>(product_1),
               static_cast<uint32_t>(product_0 >> 32) ^ counter.fourth ^ key_high, static_cast<uint32_t>(product_0)};
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return counter;
}

MD_FN PhiloxWords random_words(uint64_t seed, uint64_t ordinal, uint32_t position, uint32_t purpose,
                               uint32_t block = 0) {
  uint32_t ordinal_low = static_cast<uint32_t>(ordinal), ordinal_high = static_cast<uint32_t>(ordinal >> 32);
  return philox({position, (purpose << 24) + block, ordinal_low, ordinal_high}, seed);
}

// Uniform integer in [0, n) as the high half of word * n, n at most 2^31.
MD_FN uint32_t multiply_high(uint32_t word, uint32_t n) {
  return static_cast<uint32_t>((uint64_t{word} * n) >> 32);
}

// The number below which a word falls with probability p in [0, 1]: p * 2^32, halves to even. The product is exact and
// adding 2^52 rounds the sum to an integer, so a fused product and sum changes nothing.
MD_FN uint64_t threshold(double p) { return static_cast<uint64_t>((p * 0x1p32 + 0x1p52) - 0x1p52); }

}  // namespace megadiff
