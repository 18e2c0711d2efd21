// cache_append_: new keys, turned if there are tables, and new values into a cache. Of a GPU alone:
// on a CPU the cache copies them in Python.

namespace fastattn::FASTATTN_BACKEND {

struct CachePlaces {
  const Tensor &lengths, &counts;
  const OptionalTensor& page_table;
};

// x (B, H, S, D) into store (B, H, max_length, D), or pages (pages, page_size, H, D).
static CacheArgs cache_args(const Tensor& store, const Tensor& x, const CachePlaces& places) {
  CacheArgs args{};
  args.dtype = dtype_of(x);
  args.B = x.size(0);
  args.H = x.size(1);
  args.S = x.size(2);
  args.D = x.size(3);
  args.x = read(x);
  args.x_batch = x.stride(0);
  args.x_head = x.stride(1);
  args.x_row = x.stride(2);
  const bool paged = places.page_table.has_value();
  args.store = write(store);
  args.store_batch = store.stride(0);
  args.store_head = store.stride(paged ? 2 : 1);
  args.store_row = store.stride(paged ? 1 : 2);
  args.lengths = read<int32_t>(places.lengths);
  args.counts = read<int32_t>(places.counts);
  if (paged) {
    args.pages = read<int32_t>(*places.page_table);
    args.pages_batch = places.page_table->stride(0);
    args.page_size = store.size(1);
  }
  return args;
}

void cache_append_(
    const Tensor& key_store, const Tensor& value_store, const Tensor& key_any,
    const Tensor& value_any, const Tensor& lengths, const Tensor& counts,
    const OptionalTensor& page_table, const OptionalTensor& cos_any, const OptionalTensor& sin_any,
    bool interleaved) {
  const OnDevice on(key_any);
  const CachePlaces places = {lengths, counts, page_table};
  const Tensor key = with_contiguous_rows(key_any), value = with_contiguous_rows(value_any);
  CacheArgs keys = cache_args(key_store, key, places);
  Tensor cos, sin;
  if (cos_any && sin_any) {
    cos = fp32(*cos_any);
    sin = fp32(*sin_any);
    keys.cos = read<float>(cos);
    keys.sin = read<float>(sin);
    keys.half = cos.size(1);
    keys.interleaved = interleaved;
  }
  kernels().cache_append(keys);
  kernels().cache_append(cache_args(value_store, value, places));
}

}  // namespace fastattn::FASTATTN_BACKEND
