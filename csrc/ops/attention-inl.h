// attention_fwd and attention_bwd.

namespace fastattn::FASTATTN_BACKEND {

// ---- tensors as the attention kernels see them ------------------------------------------------

static Heads heads(const Tensor& x) {
  Heads h;
  h.data = const_cast<void*>(read(x));
  h.dtype = dtype_of(x);
  if (x.dim() == 4) {
    h.batch = x.stride(0);
    h.head = x.stride(1);
    h.row = x.stride(2);
  } else {  // packed (total, H, D)
    h.row = x.stride(0);
    h.head = x.stride(1);
  }
  return h;
}

static Heads result_heads(const Tensor& x) {
  write(x);
  return heads(x);
}

// Pages (pages, page_size, Hkv, D): the page stands in the batch's place.
static Heads paged_heads(const Tensor& x) {
  Heads h = heads(x);
  h.head = x.stride(2);
  h.row = x.stride(1);
  return h;
}

static Scores scores(const OptionalTensor& x, bool is_mask = false) {
  Scores s;
  if (!x) return s;
  s.data = const_cast<void*>(read(*x));
  if (!is_mask) s.dtype = dtype_of(*x);
  for (int d = 0; d < 4; ++d) s.size[d] = x->size(d);
  int64_t* strides[4] = {&s.batch, &s.head, &s.row, &s.col};
  for (int d = 0; d < 4; ++d) *strides[d] = x->size(d) == 1 ? 0 : x->stride(d);
  return s;
}

// (Hq,) or (B, Hq) in fp32: `holder` keeps a converted copy alive.
static PerHead per_head(const OptionalTensor& x, Tensor* holder) {
  if (!x) return {};
  *holder = fp32(*x);
  return {read<float>(*holder), x->dim() == 2 ? holder->stride(0) : 0};
}

static const int32_t* ints(const OptionalTensor& x) { return x ? read<int32_t>(*x) : nullptr; }

// The next two read data, hence on the host alone.
static void check_cu_seqlens(const char* name, const int32_t* starts, int64_t B, int64_t total) {
  if (!kReadsData) return;
  for (int64_t b = 0; b <= B; ++b) {
    const int32_t before = b == 0 ? 0 : starts[b - 1];
    STD_TORCH_CHECK(
        starts[b] >= before && (b > 0 || starts[b] == 0), "\nattention: ", name,
        " must start at 0 and not decrease: entry ", b, " is ", starts[b], " after ", before, "\n");
  }
  STD_TORCH_CHECK(
      starts[B] == total, "\nattention: ", name, " must end at the packed total ", total, ", got ",
      starts[B], "\n");
}

static void check_key_lengths(const AttentionArgs& a) {
  if (!kReadsData || a.key_lengths == nullptr) return;
  for (int64_t b = 0; b < a.B; ++b)
    STD_TORCH_CHECK(
        a.key_lengths[b] >= 0 && a.key_lengths[b] <= a.Sk,
        "\nattention: key_lengths must be in [0, ", a.Sk, "], entry ", b, " is ", a.key_lengths[b],
        "\n");
}

// The longest sequence. Waits for the device where the data is a GPU's: max_seqlen spares that.
static int64_t longest(const OptionalTensor& starts_any, int64_t max_seqlen) {
  if (!kReadsData && max_seqlen > 0) return max_seqlen;
  const Tensor on_host = to_host(*starts_any);
  const int32_t* starts = on_host.const_data_ptr<int32_t>();
  const int64_t B = on_host.numel() - 1;
  int64_t most = 0;
  for (int64_t b = 0; b < B; ++b) most = std::max<int64_t>(most, starts[b + 1] - starts[b]);
  return most;
}

// The operator's arguments, in the schema's order, once for forward and backward.
struct Call {
  const Tensor &query, &key, &value;
  const OptionalTensor &bias, &mask, &alibi_slopes, &sinks, &cu_seqlens_q, &cu_seqlens_k,
      &key_lengths, &page_table, &philox;
  double scale;
  bool causal;
  std::optional<int64_t> window_left, window_right;
  double softcap, dropout_p;
  bool diagonal_at_length;
  int64_t max_seqlen_q, max_seqlen_k;
};

constexpr float kLeast = std::numeric_limits<float>::min();

struct Held {  // copies that the arguments point into
  Tensor alibi_slopes, sinks;
  OptionalTensor bias;
};

static AttentionArgs attention_args(const Call& call, Held* held) {
  AttentionArgs a{};
  const bool packed = call.query.dim() == 3, paged = call.page_table.has_value();
  a.Hq = call.query.size(1);
  a.D = call.query.size(-1);
  a.Dv = call.value.size(-1);
  a.query = heads(call.query);
  a.key = paged ? paged_heads(call.key) : heads(call.key);
  a.value = paged ? paged_heads(call.value) : heads(call.value);
  a.Hkv = call.key.size(paged ? 2 : 1);
  a.cu_seqlens_q = ints(call.cu_seqlens_q);
  a.cu_seqlens_k = ints(call.cu_seqlens_k);
  a.key_lengths = ints(call.key_lengths);
  if (packed) {
    a.B = call.cu_seqlens_q->numel() - 1;
    check_cu_seqlens("cu_seqlens_q", a.cu_seqlens_q, a.B, call.query.size(0));
    check_cu_seqlens("cu_seqlens_k", a.cu_seqlens_k, a.B, call.key.size(0));
    a.Sq = longest(call.cu_seqlens_q, call.max_seqlen_q);
    a.Sk = longest(call.cu_seqlens_k, call.max_seqlen_k);
    a.lse_head = call.query.size(0);
  } else {
    a.B = call.query.size(0);
    a.Sq = call.query.size(2);
    a.Sk = paged ? call.page_table->size(1) * call.key.size(1) : call.key.size(2);
    a.lse_head = a.Sq;
    a.lse_batch = a.Hq * a.Sq;
  }
  check_key_lengths(a);
  if (paged) a.paging = {ints(call.page_table), call.page_table->stride(0), call.key.size(1)};
  held->bias = without_float64(call.bias);
  a.bias = scores(held->bias);
  a.mask = scores(call.mask, true);
  a.alibi_slopes = per_head(call.alibi_slopes, &held->alibi_slopes);
  a.sinks = per_head(call.sinks, &held->sinks);
  a.scale = static_cast<float>(call.scale);
  // one that fp32 rounds to 0 would be none
  a.softcap = call.softcap > 0 ? std::max(static_cast<float>(call.softcap), kLeast) : 0.f;
  a.window_left = std::min(call.window_left.value_or(kUnlimited), kUnlimited);
  a.window_right = std::min(call.window_right.value_or(kUnlimited), kUnlimited);
  if (call.causal) a.window_right = 0;
  a.diagonal_at_length = call.diagonal_at_length;
  a.dropout = call.philox && call.dropout_p > 0;
  if (a.dropout) {
    a.philox = read<int64_t>(*call.philox);
    a.drop_below = call.dropout_p < 1 ? static_cast<uint32_t>(call.dropout_p * 4294967296.0) : 0;
    a.keep_scale = call.dropout_p < 1 ? static_cast<float>(1 / (1 - call.dropout_p)) : 0.f;
  }
  return a;
}

// ---- forward ----------------------------------------------------------------------------------

// out lies as query does: heads before rows, or rows before heads.
static Tensor empty_out(const Tensor& query, int64_t Dv) {
  if (query.dim() == 3) return fresh(query, {query.size(0), query.size(1), Dv});
  const int64_t B = query.size(0), Hq = query.size(1), Sq = query.size(2);
  if (query.stride(1) >= query.stride(2)) return fresh(query, {B, Hq, Sq, Dv});
  return torch::stable::transpose(fresh(query, {B, Sq, Hq, Dv}), 1, 2);
}

std::tuple<Tensor, Tensor, Tensor> attention_fwd(
    const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& bias,
    const OptionalTensor& mask, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& key_lengths, const OptionalTensor& page_table,
    const OptionalTensor& philox, double scale, bool causal, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, double softcap, double dropout_p, bool diagonal_at_length,
    int64_t max_seqlen_q, int64_t max_seqlen_k) {
  const OnDevice on(query);
  Held held;
  AttentionArgs args = attention_args(
      {query,
       key,
       value,
       bias,
       mask,
       alibi_slopes,
       sinks,
       cu_seqlens_q,
       cu_seqlens_k,
       key_lengths,
       page_table,
       philox,
       scale,
       causal,
       window_left,
       window_right,
       softcap,
       dropout_p,
       diagonal_at_length,
       max_seqlen_q,
       max_seqlen_k},
      &held);
  Tensor out = empty_out(query, args.Dv);
  Tensor lse = query.dim() == 3
                   ? torch::stable::new_empty(query, {args.Hq, query.size(0)}, ScalarType::Float)
                   : torch::stable::new_empty(query, {args.B, args.Hq, args.Sq}, ScalarType::Float);
  args.out = result_heads(out);
  Tensor lse_low = torch::stable::empty_like(lse);
  args.lse = write<float>(lse);
  args.lse_low = write<float>(lse_low);
  if (args.Hq > 0) kernels().attention_fwd(args);
  return {out, lse, lse_low};
}

// ---- backward ---------------------------------------------------------------------------------

static Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

// The slopes' gradient of each sequence, (B, Hq) -> the gradient, in the slopes' shape and dtype.
static Tensor sum_slopes(const Tensor& each, const Tensor& slopes) {
  const int64_t batch = 0;
  const Tensor sums = slopes.dim() == 2 ? each : torch::stable::sum(each, {{&batch, 1}});
  return torch::stable::to(sums, slopes.scalar_type());
}

static Tensor sink_gradient(const AttentionArgs& args, const float* delta, const Tensor& sinks) {
  Tensor sums = torch::stable::new_empty(sinks, sinks.sizes(), ScalarType::Float);
  kernels().sink_gradient(args, delta, write<float>(sums));
  return torch::stable::to(sums, sinks.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> attention_bwd(
    const OptionalTensor& dout_any, const OptionalTensor& dlse, const Tensor& query,
    const Tensor& key, const Tensor& value, const OptionalTensor& bias, const OptionalTensor& mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
    const OptionalTensor& key_lengths, const OptionalTensor& page_table,
    const OptionalTensor& philox, const Tensor& out, const Tensor& lse, const Tensor& lse_low,
    double scale, bool causal, std::optional<int64_t> window_left,
    std::optional<int64_t> window_right, double softcap, double dropout_p, bool diagonal_at_length,
    int64_t max_seqlen_q, int64_t max_seqlen_k, int64_t needs) {
  const OnDevice on(query);
  Held held;
  AttentionArgs args = attention_args(
      {query,
       key,
       value,
       bias,
       mask,
       alibi_slopes,
       sinks,
       cu_seqlens_q,
       cu_seqlens_k,
       key_lengths,
       page_table,
       philox,
       scale,
       causal,
       window_left,
       window_right,
       softcap,
       dropout_p,
       diagonal_at_length,
       max_seqlen_q,
       max_seqlen_k},
      &held);
  STD_TORCH_CHECK(
      !page_table || (needs & 6) == 0, "\nattention: pages of a cache have no gradient\n");
  args.out = heads(out);
  args.lse = const_cast<float*>(read<float>(lse));
  args.lse_low = const_cast<float*>(read<float>(lse_low));

  Tensor dout =
      dout_any ? with_contiguous_rows(*dout_any) : torch::stable::new_zeros(out, out.sizes());
  Tensor delta = torch::stable::new_zeros(lse, lse.sizes());
  if (dlse) torch::stable::copy_(delta, torch::stable::subtract(delta, *dlse));
  ResultLike dquery(query, needs & 1, query), dkey(key, needs & 2, query),
      dvalue(value, needs & 4, query);

  AttentionGradients grads{};
  grads.dout = heads(dout);
  grads.delta = write<float>(delta);
  Tensor dquery_rows = dquery.rows();
  torch::stable::zero_(dquery_rows);
  if (needs & 1) grads.dquery = result_heads(dquery_rows);
  if (needs & 2) grads.dkey = result_heads(dkey.rows());
  if (needs & 4) grads.dvalue = result_heads(dvalue.rows());

  Tensor dbias = nothing(query), dslopes = nothing(query), dsinks = nothing(query), sums;
  if (bias && (needs >> 3 & 1)) {
    dbias = fresh_like(*held.bias);
    torch::stable::zero_(dbias);
    write(dbias);
    grads.dbias = scores(dbias);
  }
  const bool needs_slopes = alibi_slopes && (needs >> 4 & 1);
  if (needs_slopes) {
    sums = torch::stable::new_zeros(lse, {args.B, args.Hq}, ScalarType::Double);
    grads.slope_sums = write<double>(sums);
  }
  if (args.Hq > 0) kernels().attention_bwd(args, grads);
  if (needs_slopes) dslopes = sum_slopes(sums, *alibi_slopes);
  if (sinks && (needs >> 5 & 1)) dsinks = sink_gradient(args, grads.delta, *sinks);
  return {dquery.finish(),          dkey.finish(), dvalue.finish(),
          in_dtype_of(bias, dbias), dslopes,       dsinks};
}

}  // namespace fastattn::FASTATTN_BACKEND
