// The gradient of the sinks: dsink = -sum over rows of exp(sink - lse) * delta, in fp64.

namespace fastattn::FASTATTN_ISA {

static void sink_gradient(const AttentionArgs& args, const float* delta, float* dsinks) {
  const int64_t rows = args.lse_head, batches = args.lse_batch == 0 ? 1 : args.B;
  for (int64_t h = 0; h < args.Hq; ++h) {
    double sum = 0;
    for (int64_t b = 0; b < batches; ++b)
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = b * args.lse_batch + h * args.lse_head + i;
        const double share = std::exp((double)args.sinks.at(0, h) - args.lse[at]);
        if (share > 0) sum -= share * delta[at];
      }
    dsinks[h] = (float)sum;
  }
}

}  // namespace fastattn::FASTATTN_ISA
