// The most that one core does: a * b + c and nothing else, no memory. Benchmarks name it the
// ceiling.

namespace fastattn::FASTATTN_ISA {

// 12 sums that do not wait for each other: a core that begins 2 FMAs a cycle and ends them 4 to 6
// cycles later needs that many. They stay finite, and their total is returned so that they are
// made.
static float fma_loop(int64_t steps) {
  constexpr int kSums = 12;
  Vec sums[kSums];
  FA_FOR (i, kSums) sums[i] = splat(static_cast<float>(i));
  const Vec shrink = splat(0.999f), step = splat(0.001f);
  for (int64_t n = 0; n < steps; ++n)
    FA_FOR (i, kSums) sums[i] = fma(sums[i], shrink, step);
  Vec total = splat(0.f);
  FA_FOR (i, kSums) total += sums[i];
  return reduce_sum(total);
}
constexpr double kFmaLoopFlops = 2.0 * 12 * kLanes;  // of one step

}  // namespace fastattn::FASTATTN_ISA
